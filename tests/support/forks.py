"""Python scripts in processes that start at once, forked from one that has already imported everything."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys

SERVER = """
import json, os, runpy, signal, sys, traceback
import osdn_jax.training

for line in sys.stdin:
    arguments, out, err = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # even if the tests ignore it
        sys.argv, status = arguments, 0
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs [script, *arguments] in separate processes, one at a time. env and cwd are those of subprocess."""

    def __init__(self, *, env, cwd):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self._server = subprocess.Popen([sys.executable, "-c", SERVER], env=env, cwd=cwd, **pipes)
        self._child = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, line, *, out=os.devnull, err=os.devnull):
        """Start a process; its output goes to two files, or to one."""
        self._end()
        self._server.stdin.write(json.dumps([line, str(out), str(err)]).encode() + b"\n")
        self._child = int(self._server.stdout.readline())

    def _end(self):
        """Kill a process that was not waited for, because a test failed."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self.wait()

    def running(self, seconds=0):
        """Return True if the process is still running after waiting for at most `seconds`."""
        return not select.select([self._server.stdout], [], [], seconds)[0]

    def signal(self, number):
        """Send the process a signal."""
        os.kill(self._child, number)

    def wait(self, timeout=120):
        """Return the process's exit status, as subprocess does; kill it if it takes longer."""
        if self.running(timeout):
            self.signal(signal.SIGKILL)
        self._child = None
        return int(self._server.stdout.readline())

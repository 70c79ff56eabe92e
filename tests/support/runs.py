"""Training runs small enough for a test, in this process and in others."""

import atexit
import functools
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from osdn_jax.training import default_config, read_metrics, train

ROOT = Path(__file__).parents[2]
WORDS = "the memory writes what key and value recall under decay while queries read it back again".split()

# A configuration file with the settings of `tiny_config`, for the command line.
CONFIG_FILE = """
from support.runs import tiny_config

def get_config(arg=None):
    return tiny_config(arg or "")
"""


def write_text(path, words=900, seed=0):
    """Write a .txt file of random words in lines of twelve, the same for the same arguments."""
    drawn = np.random.default_rng(seed).choice(WORDS, words)
    path.write_text("".join(f"{' '.join(drawn[i : i + 12])}.\n" for i in range(0, words, 12)))
    return path


def tiny_config(data, **changes):
    """Forty steps of a model of one layer on the text at `data`; changes by dotted key, "." written as "__"."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "steps": 40,
            "batch_size": 2,
            "sequence_length": 24,
            "data.path": str(data),
            "model.layers": 1,
            "model.width": 16,
            "model.mlp_dim": 16,
            "optimizer.learning_rate": 1e-2,
            "optimizer.warmup_steps": 4,
            "validation.every": 20,
            "validation.windows": 3,
            "validation.batch_size": 2,
            "validation.sequence_length": 48,
            "checkpoint.every": 10,
            "checkpoint.keep": 2,
            "log_every": 1,
        }
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


@functools.cache
def scratch():
    """Return a directory that exists as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="osdn-tests-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def text():
    return write_text(scratch() / "text.txt")


@functools.cache
def finished():
    """(directory, result) of the run of `tiny_config(text())` in this process, uninterrupted. Do not change it."""
    workdir = scratch() / "finished"
    return workdir, train(tiny_config(text()), workdir)


def command(workdir, *arguments, config=None, cached=True):
    """Return (arguments, keyword arguments) of subprocess.run for train.py on `tiny_config(text())`."""
    file = scratch() / "tiny.py"
    file.write_text(CONFIG_FILE)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    if cached:  # eight devices, as in the tests: they are part of a program's key in the cache
        environment["JAX_NUM_CPU_DEVICES"] = "8"
    else:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    line = [sys.executable, str(ROOT / "train.py"), f"--config={config or f'{file}:{text()}'}"]
    if workdir is not None:
        line.append(f"--workdir={workdir}")
    return [*line, *arguments], {"env": environment, "cwd": scratch(), "text": True}


def run(workdir, *arguments, **options):
    """Run train.py in a separate process to its end."""
    line, keywords = command(workdir, *arguments, **options)
    return subprocess.run(line, check=False, capture_output=True, timeout=120, **keywords)


def rows(workdir):
    """Return the rows of metrics.jsonl without the speed, the only value that depends on the machine."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(workdir)]


def arrays(workdir, step=40):
    """Return {name: (dtype, shape, bytes)} of a checkpoint: the whole training state, read without the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax warns that it is not given the shardings
        tree = ocp.PyTreeCheckpointer().restore(Path(workdir).resolve() / "checkpoints" / str(step) / "state")
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k): (str(x.dtype), x.shape, np.asarray(x).tobytes()) for k, x in flat}


def position(workdir, step=40):
    """Return the data iterator's position in the checkpoint of a step."""
    (file,) = (Path(workdir) / "checkpoints" / str(step) / "data").glob("*.json")
    return file.read_text()


def assert_same_run(got, want, step=40):
    """Check that both directories hold the same run, bit for bit."""
    assert rows(got) == rows(want)
    assert arrays(got, step) == arrays(want, step)
    assert position(got, step) == position(want, step)


def compiled_steps(caplog):
    """Return how often a training step was compiled since the test began, of what ran within `jax.log_compiles()`."""
    return sum("Compiling jit(step)" in message for message in caplog.messages)

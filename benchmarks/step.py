"""The training step of the demo:  python -m benchmarks.step

Times the jitted step of configs/demo.py and lists the parts of the model that its time goes into. With --against, the
step of another checkout of this repository is timed in turn. It writes benchmarks/results/step-<platform>.json and .md.
"""

import argparse
import collections
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from osdn_jax import command

if __name__ == "__main__":
    command.start()

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The parts of a step, by a pattern in the names of their operations; the first match counts.
PARTS = {
    # One row: of the preconditioner the profile lists little, since XLA compiles its loop over tokens as a whole.
    "delta rule, preconditioner": r"_jitted_(delta_rule|hypergradient|gram)",
    "loss": r"jit\(_jitted\)",
    "short convolution": r"short_convolution",
    "norms": r"[/(]norm[/)]",
    "MLP": r"[/(]mlp[/)]",
    "embedding": r"[/(]embedding[/)]",
    "projections and gates": r"jit\(_run\)",
    "optimizer, metrics": "",
}


class Step:
    """The step of the demo in the checkout that is imported, and its batches."""

    def __init__(self, rule: str, quick: bool) -> None:
        from osdn_jax.data import training_batches
        from osdn_jax.nn import split_model
        from osdn_jax.training import build_data, make_train_step
        from osdn_jax.training.build import build_step_config
        from osdn_jax.training.initial_state import build_start
        from osdn_jax.training.mesh import Layout

        config = runpy.run_path("configs/demo.py")["get_config"](f"rule={rule}")
        if quick:
            config.batch_size, config.sequence_length, config.model.layers = 2, 16, 1
        model, optimizer, self.state, _ = build_start(config, Layout(None))
        step = make_train_step(split_model(model)[0], optimizer, build_step_config(config))
        stream = training_batches(build_data(config).train, batch_size=config.batch_size, seed=0)
        self.batches: list[Any] = [next(stream) for _ in range(20)]
        started = time.perf_counter()
        self.program = step.lower(self.state, self.batches[0]).compile()
        self.done, seconds = 0, time.perf_counter() - started
        memory = self.program.memory_analysis()
        self.about = {
            "compile_seconds": seconds,
            "temporary_bytes": memory.temp_size_in_bytes,
            "tokens": config.batch_size * config.sequence_length,
        }

    def run(self, count: int) -> dict[str, Any]:
        """Run some steps; return their times and the last loss."""
        seconds, metrics = [], None
        for _ in range(count):
            started = time.perf_counter()
            self.state, metrics = self.program(self.state, self.batches[self.done % len(self.batches)])
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - started)
            self.done += 1
        return {"seconds": seconds, "loss": None if metrics is None else float(metrics["loss"])}

    def parts(self, count: int) -> dict[str, float]:
        """Return the time of each part per step, summed over the operations that a profile shows."""
        names = {
            found[1]: (re.search(r'op_name="([^"]*)"', line) or ["", ""])[1]
            for line in self.program.as_text().splitlines()
            if (found := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line))
        }
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.run(count)
            (file,) = Path(folder).rglob("*.xplane.pb")
            planes = jax.profiler.ProfileData.from_file(str(file)).planes
            lines = [line for plane in planes for line in plane.lines if line.name.startswith("tf_XLA")]
            events = [(event.name, event.duration_ns * 1e-9) for line in lines for event in line.events]
        total: collections.Counter[str] = collections.Counter()
        for name, seconds in events:
            if name in names and not name.startswith(("while", "conditional", "call")):
                total[next(part for part, pattern in PARTS.items() if re.search(pattern, names[name]))] += (
                    seconds / count
                )
        return dict(total)


def work(rule: str, quick: bool) -> None:
    """Answer each line of standard input, a call of a method of `Step`, in JSON."""
    step = Step(rule, quick)
    print(json.dumps(step.about), flush=True)
    for line in sys.stdin:
        method, count = line.split()
        print(json.dumps(getattr(step, method)(int(count))), flush=True)


class Worker:
    """A process that runs the step of a checkout."""

    def __init__(self, checkout: Path, rule: str, quick: bool) -> None:
        line = [sys.executable, __file__, "--worker", rule, *(["--quick"] if quick else [])]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(line, cwd=checkout, env=environment, **pipes)
        self.about = self._answer()

    def ask(self, method: str, count: int) -> Any:
        self._process.stdin.write(f"{method} {count}\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"a worker has ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def measure(rule: str, checkouts: dict[str, Path], rounds: int, steps: int, quick: bool) -> dict[str, Any]:
    """Time the step of each checkout in turn; return their figures and the parts of the first one's time."""
    workers = {name: Worker(path, rule, quick) for name, path in checkouts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    losses = {}
    for _ in range(rounds + 1):
        for name, worker in workers.items():
            answer = worker.ask("run", steps)
            seconds[name].append(float(np.median(answer["seconds"])))
            losses[name] = answer["loss"]
    first, *_ = workers
    parts = workers[first].ask("parts", steps)
    for worker in workers.values():
        worker.close()
    base = np.array(seconds[first][1:])  # without the warm-up
    return {
        "parts": parts,
        "checkouts": {
            name: {
                **worker.about,
                "seconds": float(np.median(seconds[name][1:])),
                "times_as_fast": float(np.median(np.array(seconds[name][1:]) / base)),
                "loss": losses[name],
            }
            for name, worker in workers.items()
        },
    }


def markdown(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table."""
    about = record["environment"]
    yield from ("# The demo's training step", "")
    yield "Medians over rounds, in which the checkouts run in turn; the ratio is the median of those within a round."
    yield f"{about['date']}, {about['cpu']}, {about['cpu_cores']} cores, load average {about['load_at_start']}; jax"
    yield f"{about['jax']}, jaxlib {about['jaxlib']}: `{about['command']}`."
    for rule, found in record["rules"].items():
        yield from ("", f"## {rule}", "")
        yield "| checkout | step | tokens/s | tokens/s of this one over it | loss | temporary memory | compile |"
        yield "| --- " + "| ---: " * 6 + "|"
        for name, x in found["checkouts"].items():
            cost = f"{x['temporary_bytes'] / 1e6:.0f} MB | {x['compile_seconds']:.1f} s"
            speed = f"{x['seconds'] * 1e3:.1f} ms | {x['tokens'] / x['seconds']:,.0f} | {x['times_as_fast']:.2f}"
            yield f"| {name} | {speed} | {x['loss']:.6f} | {cost} |"
        total = sum(found["parts"].values())
        yield from ("", "| part of the step | time | share |", "| --- | ---: | ---: |")
        for name, seconds in sorted(found["parts"].items(), key=lambda item: -item[1]):
            yield f"| {name} | {seconds * 1e3:.2f} ms | {seconds / total:.0%} |"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; return the record."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = command.Parser(prog="python -m benchmarks.step", description=(__doc__ or "").split(":  ")[0] + ".")
    parser.add_argument("--rules", nargs="+", default=["osdn", "delta_net"], help="rules (default osdn delta_net)")
    parser.add_argument("--against", type=Path, help="another checkout, timed in turn")
    parser.add_argument("--rounds", type=int, default=15, help="number of timing rounds (default 15)")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to show that everything runs")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results; --quick: none)")
    parser.add_argument("--worker", metavar="RULE", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.worker is not None:
        work(given.worker, given.quick)
        return {}
    from benchmarks.ops.record import write
    from osdn_jax.compare import environment

    checkouts = {"this one": ROOT} | ({} if given.against is None else {given.against.name: given.against.resolve()})
    rounds, steps = (1, 1) if given.quick else (given.rounds, 5)
    about = environment(shlex.join(["python", "-m", "benchmarks.step", *argv]))
    rules = {rule: measure(rule, checkouts, rounds, steps, given.quick) for rule in given.rules}
    record = {"environment": about, "rules": rules}
    print("\n".join(markdown(record)))
    out = given.out or (None if given.quick else RESULTS)
    if out is not None:
        write(out, f"step-{jax.default_backend()}", record, markdown(record))
    return record


def _run() -> None:
    main()


if __name__ == "__main__":
    command.run(_run)

"""The demo's models with several seeds, and their controls:  python -m benchmarks.seeds

Trains each variant of configs/demo.py with each seed by train.py, one process at a time, and writes the bits per byte
of the held-out text to benchmarks/results/demo-seeds.json and .md. A run that has finished is not trained again.
"""

import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from benchmarks.ops.record import write
from osdn_jax.compare import environment
from osdn_jax.training import load_config, read_metrics

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BASE = "delta_net"
# name: (values of config.model, what it is)
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    BASE: ({"rule": "delta_net"}, "the base"),
    "osdn": ({"rule": "osdn"}, "the paper's form: d_0 learned from 0, eta 1, forgetting per token"),
    "osdn_step": ({"rule": "osdn", "match_step": True}, "the step of OSDN without its direction: damping alone"),
    "fixed_d": (
        {"rule": "osdn", "eta": 0.0, "initial": 1.0, "forget": False},
        "a learned constant d, without feedback",
    ),
    "osdn_from_2": ({"rule": "osdn", "initial": 2.0}, "d_0 learned from 2, above the fixed point of the feedback"),
    "pdn": ({"rule": "pdn"}, "Preconditioned DeltaNet, x = 1.5"),
    "pdn_step": ({"rule": "pdn", "match_step": True}, "the step of PDN without its direction"),
}


def train(folder: Path, name: str, seed: int, steps: int) -> float:
    """Train one model, unless it has finished; return the bits per byte of the held-out text.

    Raises ValueError if the folder has another run under this name.
    """
    workdir, model = folder / f"{name}-{seed}", VARIANTS[name][0]
    if (workdir / "config.json").exists():
        config = load_config(workdir)
        found = {key: config.model.get(key) for key in model} | {"seed": config.seed, "steps": config.steps}
        if found != {**model, "seed": seed, "steps": steps}:
            raise ValueError(f"{workdir}: got a run with {found}, expected {model} with seed {seed} and {steps} steps")
    if (score := _score(workdir, steps)) is None:
        config = f"--config=configs/demo.py:rule={model['rule']},seed={seed},steps={steps}"
        flags = [f"--config.model.{key}={value}" for key, value in model.items() if key != "rule"]
        line = [sys.executable, "train.py", config, *flags, f"--workdir={workdir.absolute()}"]
        subprocess.run(line, cwd=ROOT, check=True)
        score = _score(workdir, steps)
    if score is None:
        raise ValueError(f"{workdir}: got a run without a validation at step {steps}")
    return score


def _score(workdir: Path, steps: int) -> float | None:
    rows = read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
    scores = [
        row["validation/bits_per_byte"] for row in rows if row["step"] == steps and "validation/bits_per_byte" in row
    ]
    return float(scores[-1]) if scores else None


def difference(a: list[float], b: list[float]) -> dict[str, float | int]:
    """Return the mean of a - b over seeds, its standard error and in how many seeds a is lower; at least two seeds."""
    pairs = [x - y for x, y in zip(a, b, strict=True)]
    error = statistics.stdev(pairs) / len(pairs) ** 0.5
    return {"mean": statistics.fmean(pairs), "standard_error": error, "lower": sum(pair < 0 for pair in pairs)}


def markdown(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the page."""
    about, runs, seeds = record["environment"], record["bits_per_byte"], record["seeds"]
    yield from ("# Seeds of the demo's models", "")
    yield f"Bits per byte of the held-out plays after {record['steps']:,} steps; lower is better. The seed sets the"
    yield "initial parameters and the order of the data. The difference to DeltaNet is of the same seed: mean ±"
    yield "standard error, and the number of seeds with fewer bits."
    yield f"{about['date']}, {about['device']} ({about['cpu']}), jax {about['jax']}: `{about['command']}`."
    yield ""
    yield f"| variant | mean | sd | {' | '.join(f'seed {seed}' for seed in seeds)} | minus {BASE} | lower |"
    yield "| --- |" + " ---: |" * (len(seeds) + 4)
    for name, values in runs.items():
        shown = " | ".join(f"{value:.4f}" for value in values)
        versus = difference(values, runs[BASE])
        against = f"{versus['mean']:+.4f} ± {versus['standard_error']:.4f} | {versus['lower']} of {len(seeds)}"
        against = "| " if name == BASE else against
        yield f"| `{name}` | {statistics.fmean(values):.4f} | {statistics.stdev(values):.4f} | {shown} | {against} |"
    yield ""
    for name in runs:
        model, what = VARIANTS[name]
        yield f"- `{name}`: `{' '.join(f'model.{key}={value}' for key, value in model.items())}`; {what}."


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; return the record."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = command.Parser(prog="python -m benchmarks.seeds", description=(__doc__ or "").split(":  ")[0] + ".")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, at least 2 (default 5)")
    parser.add_argument("--steps", type=int, default=900, help="of training (default 900)")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="folder of the runs (default runs/seeds)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record (default benchmarks/results)")
    given = parser.parse_args(argv)
    names = list(dict.fromkeys([BASE, *given.variants.split(",")]))
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--variants: got {', '.join(unknown)}, expected some of {', '.join(VARIANTS)}")
    if given.seeds < 2:
        parser.error(f"--seeds: got {given.seeds}, expected at least 2")
    runs: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(given.seeds):  # seed by seed, so that what has finished can be compared
        for name in names:
            try:
                runs[name].append(train(given.runs, name, seed, given.steps))
            except (ValueError, subprocess.CalledProcessError) as error:
                parser.error(str(error))
            print(f"{name}, seed {seed}: {runs[name][-1]:.4f} bits per byte", flush=True)
    record = {
        "environment": environment(shlex.join(["python", "-m", "benchmarks.seeds", *argv])),
        "steps": given.steps,
        "seeds": list(range(given.seeds)),
        "bits_per_byte": {name: runs[name] for name in VARIANTS if name in runs},
    }
    write(given.out, "demo-seeds", record, markdown(record))
    return record


def _run() -> None:
    main()


if __name__ == "__main__":
    command.run(_run)

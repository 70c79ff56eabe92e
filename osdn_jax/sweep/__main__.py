"""Train many small models on a recall task:  python -m osdn_jax.sweep configs/mqar.py --rules delta_net,osdn --seeds 5

One process per core trains one model after another, in one compiled program per rule. The same command continues where
it was interrupted. It writes results.jsonl, table.md and sweep.png to the output folder, and prints the table.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from osdn_jax._files import write_atomically
from osdn_jax.compare.machine import usable_cores
from osdn_jax.progress import RunsBar
from osdn_jax.sweep.figure import plot_sweep
from osdn_jax.sweep.jobs import JobError, run_jobs
from osdn_jax.sweep.plan import Plan, by_key
from osdn_jax.sweep.results import RESULTS_FILE, Record, read_results
from osdn_jax.sweep.table import Summary, markdown, summarise_plan
from osdn_jax.sweep.trainer import check_config
from osdn_jax.sweep.variants import change, make_variants
from osdn_jax.training.command_line import load_with_globals
from osdn_jax.training.config import ConfigError

_PROGRAM = "python -m osdn_jax.sweep"
TABLE_FILE, FIGURE_FILE = "table.md", "sweep.png"
_MOST_SEEDS, _MOST_JOBS = 10_000, 1024
_EPILOG = """\
--rules takes rules of osdn_jax.nn and names of VARIANTS, a dict in the configuration file, separated by commas.
A variant has a name, a rule and keys of the configuration: --variant 'trust: osdn model.preset=trust model.anchor=1'.
--set changes keys for all: --set steps=3000 model.width=64.
Exit status: 0, 2 for a wrong command line or a file that cannot be written, 130 after Ctrl-C, 1 for other errors.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; default: those of the process.

    Returns:
        The exit status: 0; 1 if a process failed; 2 for a wrong configuration; 130 after Ctrl-C.

    Raises:
        SystemExit: the command line is wrong (status 2) or asks for help (status 0).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given = _parse(argv)
    line = shlex.join([*_PROGRAM.split(), *argv])
    try:
        plan = _plan(given)
        folder = _folder(given)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(error)
    results = read_results(folder)
    for text in results.damaged:
        print(text, file=sys.stderr)
    status = 0
    try:
        status = _train(plan, folder, by_key(results.records), given.jobs, line)
    finally:
        finished = by_key(read_results(folder).records)
        summary = summarise_plan(plan, finished, given.threshold)
        if summary.rows:
            _report(plan, summary, folder, line)
    return status


def _train(plan: Plan, folder: Path, before: dict[str, Record], jobs: int, line: str) -> int:
    runs = plan.runs(before)
    finished = {run.key for run in runs if run.key in before}
    if len(finished) == plan.total:
        return 0
    jobs = min(jobs, plan.total - len(finished))
    try:
        with RunsBar(plan.total, done=len(finished)) as bar:
            processes = f"{jobs:,} process{'' if jobs == 1 else 'es'}"
            bar.print(f"{len(finished):,} of {plan.total:,} runs have finished; {processes}; results in {folder}")
            run_jobs(plan, folder, jobs, line, bar, finished)
    except KeyboardInterrupt:
        left = f"{len(finished):,} of {plan.total:,} runs have finished"
        print(f"interrupted: {left}; the same command continues from there", file=sys.stderr, flush=True)
        return command.INTERRUPTED
    except JobError as error:
        _fail(f"{error}; the same command continues from there")
        return 1
    return 0


def _report(plan: Plan, summary: Summary, folder: Path, line: str) -> None:
    text = markdown(plan, summary, line)
    write_atomically(folder / TABLE_FILE, text)
    config = plan.variants[0].config
    sizes = f"{config.model.layers} layers, width {config.model.width}, {config.steps:,} steps of {config.batch_size}"
    note = (
        f"seeds {', '.join(map(str, plan.seeds))}; {sizes} examples; {config.data.validation_examples:,} test examples"
    )
    plot_sweep(summary, folder / FIGURE_FILE, title=str(config.data.task), note=note)
    print(text)
    print(f"{folder / TABLE_FILE}, {folder / FIGURE_FILE}, {folder / RESULTS_FILE}", flush=True)


def _plan(given: argparse.Namespace) -> Plan:
    """Return the plan of a command line. Raises ConfigError or ValueError."""
    base, names = load_with_globals(given.config)
    change(base, given.set, "--set")
    rules = given.rules or ([] if given.variant else [base.model.rule])
    variants = make_variants(base, rules, given.variant, names.get("VARIANTS"))
    rates = given.learning_rates or [float(base.optimizer.learning_rate)]
    for variant in variants:
        for rate in rates:
            variant.config.optimizer.learning_rate = rate
            try:
                check_config(variant.config)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{variant.label}: {error}") from error
    seeds = [base.seed + i for i in range(given.seeds)]
    if seeds[-1] >= 2**32:
        raise ConfigError(f"--seeds: got {given.seeds} from seed {base.seed}, expected seeds below 2^32")
    return Plan(variants, seeds, rates, choose=given.choose and len(rates) > 1, vmap=given.vmap)


def _folder(given: argparse.Namespace) -> Path:
    """Create the output folder. Raises ValueError or OSError."""
    name = Path(given.config.partition(":")[0]).stem
    folder = command.directory("output", given.output or f"runs/sweep-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    append_check = folder / RESULTS_FILE
    with append_check.open("ab"):  # an error before training, if it cannot be written
        pass
    return folder


def _fail(error: object) -> int:
    print(f"{_PROGRAM}: error: {error}", file=sys.stderr, flush=True)
    return command.USAGE_ERROR


def _integer(most: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer from 1 to {most}")
        return int(text)

    return integer


def _rates(text: str) -> list[float]:
    rates = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = float("nan")
        if not 0 < rate < 1e6:
            raise argparse.ArgumentTypeError(
                f"got {part!r}, expected positive numbers separated by commas, as in 1e-3,3e-3"
            )
        if rate not in rates:
            rates.append(rate)
    return rates


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected names separated by commas")
    return list(dict.fromkeys(names))


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an accuracy above 0, at most 1")
    return share


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog=_PROGRAM,
        description=(__doc__ or "").partition(":")[0] + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", help="configuration file with data.task, such as configs/mqar.py or configs/mqar.py:length=96")
    add("--rules", type=_names, default=[], metavar="RULE,…", help="rules, or variants of the file (default: its rule)")
    add("--variant", action="append", default=[], metavar="TEXT", help="'NAME: RULE KEY=VALUE …'; may be repeated")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of the configuration, for all")
    add("--seeds", type=_integer(_MOST_SEEDS), default=1, metavar="N", help="number of seeds, from seed on (default 1)")
    add(
        "--learning_rates",
        type=_rates,
        default=[],
        metavar="RATE,…",
        help="peaks of the schedule (default: the config's)",
    )
    add("--choose", action="store_true", help="try each rate on the first seed; the other seeds take the best one")
    add("--jobs", type=_integer(_MOST_JOBS), default=usable_cores(), metavar="N", help="processes (default: the cores)")
    add("--vmap", action="store_true", help="train all seeds of a rule and rate at once, for accelerators (--jobs 1)")
    add("--threshold", type=_share, metavar="X", help="accuracy of the transition (default: half-way, chance to best)")
    add("--output", metavar="FOLDER", help="folder of the results (default: runs/sweep-CONFIG)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run(main)

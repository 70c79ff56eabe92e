"""Measure the cost of the operators under XLA:  python -m benchmarks.ops

Every figure is from one process, in which the programs of a section run in turn (A B C A B C ...); the ratios are
medians of ratios within a round. It writes benchmarks/results/ops-<platform>.json and .md and prints the latter. It
takes about 40 minutes on two CPU cores; --sections repeats some sections and keeps the rest of the record. --quick (a
minute) only shows that everything runs, and writes nothing without --out. The rules of osdn_jax/ops/selection.py come
from the sections "forward" and "chunks".
"""

import dataclasses
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from benchmarks.ops.bench import Bench
from benchmarks.ops.grid import forward
from benchmarks.ops.lengths import chunks, length
from benchmarks.ops.packed import packed
from benchmarks.ops.record import markdown, write
from benchmarks.ops.rules import auto_against_scan, bfloat16, parts_of_rules, rules_against_each_other
from osdn_jax.command import Parser
from osdn_jax.compare import environment
from osdn_jax.compare.machine import load

RESULTS = Path(__file__).parents[1] / "results"
SECTIONS: dict[str, Callable[[Bench], None]] = {
    "auto": auto_against_scan,
    "rules": rules_against_each_other,
    "parts": parts_of_rules,
    "length": length,
    "forward": forward,
    "chunks": chunks,
    "bfloat16": bfloat16,
    "packed": packed,
}
HEADINGS = {name: inspect.getdoc(section) or name for name, section in SECTIONS.items()}


def main(argv: Sequence[str] | None = None) -> dict:
    """Run the command line; return the record of the sections measured."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="python -m benchmarks.ops", description=(__doc__ or "").split(":  ")[0] + ".")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        help="sections to measure; the record keeps the others (default all)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="number of timing rounds (default 7)")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to show that everything runs")
    folder = f"{RESULTS.parent.name}/{RESULTS.name}"
    parser.add_argument("--out", type=Path, help=f"folder of the results (default {folder}; with --quick none)")
    given = parser.parse_args(argv)
    record = {}
    for name in given.sections:
        print(f"{name}:", file=sys.stderr, flush=True)
        about = environment(shlex.join(["python", "-m", "benchmarks.ops", *argv]))
        bench = Bench(2 if given.quick else given.repeats, given.quick)
        SECTIONS[name](bench)
        record[name] = {
            "environment": {**about, "load_at_end": load()},
            "figures": [{**dataclasses.asdict(f), "met": f.met()} for f in bench.figures],
            "measurements": bench.rows,
            "tables": bench.tables,
        }
    print("\n".join(markdown(record, HEADINGS)))
    out = given.out or (None if given.quick else RESULTS)
    if out is not None:
        stem = f"ops-{jax.default_backend()}"
        file = out / f"{stem}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        record = {name: {**kept, **record}[name] for name in SECTIONS if name in kept or name in record}
        write(out, stem, record, markdown(record, HEADINGS))
    return record


if __name__ == "__main__":
    main()

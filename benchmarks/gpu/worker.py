"""One job in a process of its own:  python -m benchmarks.gpu.worker SPEC ROWS

SPEC is JSON; the rows go to the file ROWS, one JSON object a line. A timed job says that it is prepared with a row
{"event": "prepared"} and goes on when it reads a line.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import check, timing
from osdn_jax.comparison import parse_shapes


def main(argv: list[str]) -> None:
    spec, rows = json.loads(argv[0]), Path(argv[1])

    def emit(row: dict[str, Any]) -> None:
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def turn() -> None:
        emit({"event": "prepared"})
        if not sys.stdin.readline():
            sys.exit("nobody waits for the result")

    if spec["kind"] == "check":
        check.job(spec, emit)
    elif spec["kind"] == "ceilings":
        timing.ceilings(spec, emit, turn)
    elif spec["kind"] == "warm":
        timing.warm(spec["rule"], parse_shapes(spec["shape"])[0], spec["gradient"])
    else:
        timing.job(spec, emit, turn)


if __name__ == "__main__":
    main(sys.argv[1:])

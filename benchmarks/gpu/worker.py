"""Run one job:  python -m benchmarks.gpu.worker SPEC ROWS

SPEC is JSON; the rows are appended to the file ROWS, one JSON object a line. {"event": "alive"} is a sign of life;
{"event": "prepared"} means that the job waits for a line on its standard input, after which it has the device alone.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import check, timing


def main(argv: list[str]) -> None:
    spec, rows = json.loads(argv[0]), Path(argv[1])

    def emit(row: dict[str, Any]) -> None:
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def turn() -> None:
        emit({"event": "prepared"})
        if not sys.stdin.readline():
            sys.exit("the suite has exited")

    for module in spec["imports"]:
        importlib.import_module(module)
    emit({"event": "alive"})
    if spec["kind"] == "check":
        check.job(spec, emit)
    elif spec["kind"] == "ceilings":
        timing.ceilings(spec, emit, turn)
    elif spec["kind"] == "warm":
        timing.compile_peer(spec, emit)
    else:
        timing.job(spec, emit, turn)


if __name__ == "__main__":
    main(sys.argv[1:])

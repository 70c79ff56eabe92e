"""One job in a process of its own:  python -m benchmarks.gpu.worker SPEC ROWS

SPEC is JSON; the rows go to the file ROWS, one JSON object a line. {"event": "alive"} says that the job goes on, and
{"event": "prepared"} that it waits for its turn to be alone on the device, which is a line that it reads.
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
            sys.exit("nobody waits for the result")

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

"""Compute the logits of folders with the other library:  python -m benchmarks.interop.read FOLDER

It runs in an environment with torch and transformers, without JAX. For each subfolder with inputs.npz it loads the
checkpoint in it and writes theirs.npz, the logits of input_ids, or theirs.txt, the error. It prints the versions of the
libraries as JSON.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.interop import libraries


def main(arguments: list[str]) -> int:
    """Read all subfolders of the folder that is given."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for inputs in sorted(Path(arguments[0]).glob("*/inputs.npz")):
        try:
            logits = libraries.logits(libraries.load(inputs.parent), np.load(inputs)["input_ids"])
        except Exception as error:  # noqa: BLE001 -- whatever a library raises is the result
            inputs.with_name("theirs.txt").write_text(f"{type(error).__name__}: {error}")
        else:
            np.savez(inputs.with_name("theirs.npz"), logits=logits)
    print(json.dumps(libraries.versions()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Data sets of the Hugging Face hub: with a network, from the cache, or the line that says how to get them."""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from osdn_jax._optional import require

_HUB = "https://huggingface.co"


def prepare_environment() -> None:
    """Silence the bars of the libraries, and do without the hub if its name is not known here.

    Without this, each data set takes half a minute to be given up on a machine without a network. Call it before
    lm_eval is imported.
    """
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "DISABLE_MULTIPROC"):
        os.environ.setdefault(name, "1")  # the last: JAX's threads do not survive the fork of lm_eval's bootstrap
    if "HF_HUB_OFFLINE" not in os.environ and not any(os.environ.get(x) for x in ("HTTPS_PROXY", "https_proxy")):
        try:
            socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT", _HUB)).hostname, 443)
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"


def unreachable(data: str | None) -> str:
    """Return what to do about a data set that is neither here nor to be had; None if its name is not known."""
    which = "the data sets of its members are" if data is None else f"the data set {data} is"
    line = f": `hf download --repo-type dataset {data}`" if data else ""
    return (
        f"{which} not in the cache here, and the Hugging Face hub cannot be reached; download it on a machine with a "
        f"network{line}, and copy that machine's HF_HOME"
    )


def save_rows(data: str, split: str, path: Path) -> None:
    """Write the rows of a data set as JSON Lines.

    Args:
        data: its name on the hub.
        split: the split.
        path: the .jsonl file.

    Raises:
        ConnectionError: the hub cannot be reached and the cache does not have it; the message says what to do.
        ImportError: the library datasets is not installed.
    """
    library = require("datasets", "data", f"the data set {data}")
    try:
        library.load_dataset(data, split=split).to_json(path)
    except OSError as error:
        raise ConnectionError(unreachable(data)) from error

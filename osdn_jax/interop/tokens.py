"""The tokenizer of a folder, and the ids of its special tokens."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from osdn_jax._optional import require
from osdn_jax.interop.folder import read_json
from osdn_jax.interop.paths import existing_folder

if TYPE_CHECKING:
    from osdn_jax.data import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""Names of the files of tokenizers."""

# The later files are asked only for what the earlier ones do not say.
_FILES = ("generation_config.json", "config.json")


class FolderTokenizer(NamedTuple):
    """The tokenizer of a folder.

    Attributes:
        tokenizer: converts text to ids and back.
        bos_id: id of the token that starts a text; None if the folder names none.
        eos_ids: ids of the tokens that end a text; empty if the folder names none.
        missing: names of what the folder does not say, of "bos_token" and "eos_token".
        start_tokens: ids that the tokenizer puts before a text, for `generation.Generator`.
    """

    tokenizer: "Tokenizer"
    bos_id: int | None
    eos_ids: tuple[int, ...]
    missing: tuple[str, ...]
    start_tokens: tuple[int, ...]


def tokenizer(path: str | os.PathLike[str]) -> FolderTokenizer:
    """Load the tokenizer of a folder; chat templates are left to the caller.

    The ids of the tokens that start and end a text come from generation_config.json, else from config.json, else from
    the names in tokenizer_config.json.

    Args:
        path: the folder, with a tokenizer.json or a tokenizer.model.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds no tokenizer, or a damaged one; or a special token is none of its ids.
        ImportError: the extra `tokenizers` or `train` is not installed.
    """
    from osdn_jax.data import load_tokenizer

    folder = existing_folder(path)
    loaded = load_tokenizer(folder)
    starts, ends = _ids(folder, "bos"), _ids(folder, "eos")
    missing = tuple(name for name, ids in (("bos_token", starts), ("eos_token", ends)) if not ids)
    return FolderTokenizer(loaded, starts[0] if starts else None, ends, missing, _start_tokens(folder, loaded))


def end_tokens(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text, which `tokenizer` has as `eos_ids`; no tokenizer is needed.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: a special token is none of the ids of its tokenizer.json.
    """
    return _ids(existing_folder(path), "eos")


def _start_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that the folder's tokenizer puts before a text."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return (tokenizer.bos_id,)  # as a SentencePiece model usually does
    library = require("tokenizers", "tokenizers", "a tokenizer.json").Tokenizer.from_file(str(file))
    ids, bare = (library.encode("a", add_special_tokens=special).ids for special in (True, False))
    return next((tuple(ids[:i]) for i in range(len(ids)) if ids[i : i + len(bare)] == bare), ())


def _ids(folder: Path, kind: str) -> tuple[int, ...]:
    """Return the ids of the tokens of a kind, "bos" or "eos"."""
    for name in _FILES:
        values = read_json(folder / name)[1] if (folder / name).is_file() else {}
        texts = values.get("text_config")
        for entries in (values, texts if isinstance(texts, dict) else {}):
            value = entries.get(f"{kind}_token_id")
            if value is not None:
                return _checked(folder / name, f"{kind}_token_id", value)
    settings = folder / "tokenizer_config.json"
    token = read_json(settings)[1].get(f"{kind}_token") if settings.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return ()
    found = _id_of(folder / "tokenizer.json", token)
    if found is None:
        raise ValueError(f"{settings}: got the {kind}_token {token!r}, which tokenizer.json does not have")
    return (found,)


def _id_of(file: Path, token: Any) -> int | None:
    """Return the id of a token by its name in a tokenizer.json."""
    if not isinstance(token, str) or not file.is_file():
        return None
    values = read_json(file)[1]
    try:
        for added in values.get("added_tokens") or []:
            if added.get("content") == token:
                return _checked(file, f"the id of {token!r}", added.get("id"))[0]
        vocabulary = (values.get("model") or {}).get("vocab")
        if isinstance(vocabulary, list):  # of a unigram model: [token, score] for each id
            return next((i for i, row in enumerate(vocabulary) if row[0] == token), None)
        found = (vocabulary or {}).get(token)
    except (AttributeError, TypeError, LookupError) as error:  # other types of JSON than expected
        raise ValueError(f"{file}: is no tokenizer: its added_tokens or its vocab is malformed") from error
    return None if found is None else _checked(file, f"the id of {token!r}", found)[0]


def _checked(file: Path, name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or any(type(x) is not int or x < 0 for x in values):
        raise ValueError(f"{file}: got {name} {value!r}, expected an id or a list of ids")
    return tuple(values)

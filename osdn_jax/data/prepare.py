"""Tokenise text into shards on disk, a folder that training reads as data.path.

    python -m osdn_jax.data.prepare --input PATH --tokenizer TOKENIZER --output FOLDER

Reads a file, a folder or hf:NAME (a data set of the Hugging Face hub, streamed), tokenises it with several processes
and writes ArrayRecord shards and their manifest, dataset.json. An interrupted run leaves complete shards; the same
command then writes the missing ones.
"""

import dataclasses
import hashlib
import itertools
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any

from osdn_jax import command
from osdn_jax.data.documents import Document
from osdn_jax.data.shards.encoder import Encoder
from osdn_jax.data.shards.files import ShardWriter, index_file, record_file
from osdn_jax.data.shards.manifest import MANIFEST_FILE, Manifest, Shard, load_manifest
from osdn_jax.data.streams import DocumentStream, StreamState, open_stream
from osdn_jax.data.tokenizers import BYTES, load_tokenizer
from osdn_jax.data.windows import checked_count
from osdn_jax.progress import PrepareBar

SHARD_BYTES = 256 << 20


def prepare(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = BYTES,
    field: str = "text",
    subset: str = "",
    split: str = "train",
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    quiet: bool = True,
) -> Manifest:
    """Tokenise the documents of `source` into shards in the folder `output`.

    The shards are the same for any number of workers. If the folder already holds complete shards of the same settings,
    only the missing ones are written. Files are then read again up to that point, and a text that has changed is
    refused, even if its size is the same. A data set of the hub is compared by its name alone.

    Args:
        source: a file or folder as `read_documents` takes it, or "hf:NAME" as `HubStream` does.
        output: the folder of the shards; created if missing.
        tokenizer: as `load_tokenizer` takes it; bytes by default.
        field: the name of the text in rows of .jsonl and .parquet files and of data sets of the hub.
        subset: the subset (configuration) of a data set of the hub, such as "sample-10BT".
        split: the split of a data set of the hub.
        workers: the number of processes that tokenise; 1 means this process.
        shard_bytes: the bytes of text after which a shard ends, at the end of a document.
        quiet: show no progress.

    Returns:
        The manifest of the folder: numbers of tokens, documents and bytes of text.

    Raises:
        ValueError: `output` is a file, or holds other files, or shards of other settings or of another text; a text
            cannot be read or tokenised (the message names the place); a count is below 1.
        FileNotFoundError, ConnectionError, ImportError: as `read_documents`, `HubStream` and `load_tokenizer`.
        BrokenProcessPool: a worker was killed, by lack of memory for example; complete shards are kept.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "notes.txt").write_text("some text")
        ...     manifest = prepare(Path(folder, "notes.txt"), Path(folder, "tokens"), tokenizer="bytes")
        >>> manifest.documents, manifest.tokens, manifest.complete
        (1, 9, True)
    """
    checked_count("workers", workers)
    checked_count("shard_bytes", shard_bytes)
    folder, loaded = Path(output), load_tokenizer(tokenizer)
    stream = open_stream(source, field=field, subset=subset, split=split)
    requested = Manifest(
        fingerprint=loaded.fingerprint,
        vocab_size=loaded.vocab_size,
        start_id=loaded.bos_id,
        settings={
            "input": stream.fingerprint,
            "field": field,
            "shard_bytes": shard_bytes,
        },
    )
    manifest = _open_folder(folder, requested)
    with Encoder(tokenizer, workers) as encoder, PrepareBar(stream.size, quiet=quiet) as bar:
        position: StreamState | None = {}  # of the stream; {} = unknown
        shard_start: StreamState | None = None  # None = the start of the input
        number = -1
        while number < len(manifest.shards) - 1 or not manifest.complete:
            number += 1
            recorded = manifest.shards[number] if number < len(manifest.shards) else None
            shard = recorded if recorded is not None and _has_files(folder, number, recorded) else None
            if shard is not None:
                bar.skipped(shard)
                if not (stream.on_disk and shard.text_digest):  # the text cannot be compared
                    shard_start = shard.end
                    continue
            if position != shard_start:
                stream.set_state(shard_start)
            if shard is not None:
                same_text = _text_digest(_next_documents(stream, shard_bytes)) == shard.text_digest
            else:
                shard = _write_shard(folder, number, stream, encoder, shard_bytes, bar)
                same_text = recorded is None or (shard is not None and _is_same(shard, recorded))
                if not same_text:  # the new shard must not be taken for the missing one
                    record_file(folder, number).unlink(missing_ok=True)
                    index_file(folder, number).unlink(missing_ok=True)
            if not same_text:
                raise ValueError(f"{source} is not what shard {number} of {folder} was made of: the text has changed")
            if recorded is None:
                shards = (*manifest.shards, shard) if shard is not None else manifest.shards
                manifest = dataclasses.replace(manifest, shards=shards, complete=shard is None)
                manifest.save(folder)
            if shard is not None:
                position = shard_start = shard.end
    return manifest


def _open_folder(folder: Path, requested: Manifest) -> Manifest:
    """Return the manifest to continue from, without files of an interrupted run. Raises ValueError if there is none."""
    if files := [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]:
        raise ValueError(f"output: got {folder}, but {files[0]} is no folder")
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in (*folder.glob(".shard-*.tmp"), *folder.glob(f".{MANIFEST_FILE}.*")):
        unfinished.unlink()
    if not (folder / MANIFEST_FILE).exists():
        if others := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
            raise ValueError(f"{folder} holds other files, such as {others[0]}; give a new or an empty folder")
        requested.save(folder)
        return requested
    found = load_manifest(folder)
    if not found.shards and not found.complete:  # an error ended the earlier run before its first shard
        requested.save(folder)
        return requested
    new, old = (
        {**made.settings, "tokenizer": made.fingerprint, "vocab_size": made.vocab_size, "start_id": made.start_id}
        for made in (requested, found)
    )
    if changed := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        lines = "".join(f"\n  {name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in changed)
        raise ValueError(f"{folder} holds shards of other settings; give another folder, or the old settings:{lines}")
    return found


def _has_files(folder: Path, number: int, shard: Shard) -> bool:
    """Return True if both files of a recorded shard exist and have the recorded sizes."""
    record, index = record_file(folder, number), index_file(folder, number)
    if not record.is_file() or not index.is_file():
        return False
    return record.stat().st_size == shard.file_bytes and index.stat().st_size == shard.documents * 8


def _write_shard(
    folder: Path, number: int, stream: DocumentStream, encoder: Encoder, shard_bytes: int, bar: PrepareBar
) -> Shard | None:
    """Write a shard of the next documents of the stream. Returns None, writing nothing, if there are none."""
    documents = _next_documents(stream, shard_bytes)
    first = next(documents, None)
    if first is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    with ShardWriter(folder, number) as writer:
        for record, tokens, text_bytes in encoder.encode(_add_to_digest(itertools.chain([first], documents), digest)):
            writer.write(record, tokens, text_bytes)
            bar.advance(tokens, text_bytes)
        counts = writer.finish()
    bar.finished(number)
    return Shard(*counts, end=stream.get_state(), text_digest=digest.hexdigest())


def _is_same(shard: Shard, recorded: Shard) -> bool:
    """Compare all but `end`: `datasets` may describe one position in several ways."""
    text_digest = shard.text_digest if recorded.text_digest else ""  # not recorded by earlier versions
    return dataclasses.replace(shard, end=recorded.end, text_digest=text_digest) == recorded


def _text_digest(documents: Iterable[Document]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for _ in _add_to_digest(documents, digest):
        pass
    return digest.hexdigest()


def _add_to_digest(documents: Iterable[Document], digest: hashlib.blake2b) -> Iterator[Document]:
    """Yield the documents, adding the text of each to `digest` on the way."""
    for document in documents:
        digest.update(len(document.text).to_bytes(8, "little") + document.text)
        yield document


def _next_documents(stream: DocumentStream, size: int) -> Iterator[Document]:
    """Yield the next documents of the stream, up to the one that completes `size` bytes of text."""
    while size > 0 and (document := next(stream, None)) is not None:
        size -= len(document.text)
        yield document


def main() -> None:
    """Run the command line."""
    parser = command.Parser(
        prog="python -m osdn_jax.data.prepare", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--input", required=True, help="file, folder, or hf:NAME of the Hugging Face hub")
    parser.add_argument("--output", required=True, help="folder for the shards, created if missing")
    parser.add_argument("--tokenizer", default=BYTES, help="tokenizer.json, SentencePiece .model, or bytes (default)")
    parser.add_argument(
        "--field", default="text", help="name of the text in rows of .jsonl, .parquet and hf: (default: text)"
    )
    parser.add_argument("--subset", default="", help="subset of hf:NAME, such as sample-10BT")
    parser.add_argument("--split", default="train", help="split of hf:NAME (default: train)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise (default: one per core)"
    )
    parser.add_argument(
        "--shard-size", type=int, default=SHARD_BYTES >> 20, help="MiB of text per shard (default: 256)"
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        manifest = prepare(
            given.input,
            command.directory("output", given.output),
            tokenizer=given.tokenizer,
            field=given.field,
            subset=given.subset,
            split=given.split,
            workers=given.workers,
            shard_bytes=_shard_bytes(given.shard_size),
            quiet=False,
        )
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, BrokenProcessPool) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        raise SystemExit(command.USAGE_ERROR) from error
    except KeyboardInterrupt:
        print("prepare: interrupted; complete shards are kept, and the same command continues", file=sys.stderr)
        raise SystemExit(command.INTERRUPTED) from None
    print(
        f"{given.output}: {manifest.tokens:,} tokens of {manifest.documents:,} documents in "
        f"{len(manifest.shards):,} shards, {manifest.text_bytes / max(manifest.tokens, 1):.2f} bytes of text per token"
    )


def _shard_bytes(megabytes: int) -> int:
    try:
        return checked_count("shard_bytes", megabytes << 20)
    except ValueError as error:
        raise ValueError(f"--shard-size {megabytes}: {error}") from error


def _interrupt(signum: int, frame: FrameType | None) -> Any:
    raise KeyboardInterrupt


if __name__ == "__main__":
    command.run(main)

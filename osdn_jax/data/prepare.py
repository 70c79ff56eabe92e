"""Text to token shards on disk:  python -m osdn_jax.data.prepare --input PATH --tokenizer T --output DIR

Reads a file, a folder or hf:NAME (a data set of the Hugging Face hub, streamed), tokenises it with several processes
and writes ArrayRecord shards and their manifest, dataset.json: a folder to give to training as data.path. Interrupted,
it leaves complete shards; the same command again writes those that are missing.
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
    """Tokenises the documents of `source` into shards in the folder `output`; returns their manifest.

    The shards are the same for any number of workers. Where the folder holds complete shards of the same settings,
    only what is missing is written. Files are then read again up to there: a text that has changed is refused, whatever
    its size. A data set of the hub is compared by its name alone.

    Args:
        source: a file or folder as `read_documents` takes it, or "hf:NAME" as `HubStream` does.
        output: the folder of the shards; made if need be.
        tokenizer: as `load_tokenizer` takes it.
        field: of the rows of .jsonl and .parquet files and of data sets of the hub.
        subset, split: of a data set of the hub.
        workers: processes that tokenise; 1 is this process itself.
        shard_bytes: bytes of text after which a shard ends, with the document that it comes to.
        quiet: whether to show no progress.

    Raises:
        ValueError: the folder is a file, or holds other files, or shards of other settings or of another text; text
            that cannot be read or tokenised, with its place; a count below 1.
        FileNotFoundError, ConnectionError, ImportError: as the readers of text and tokenizers.
        BrokenProcessPool: a worker was killed, for want of memory say; shards that are complete stay.
    """
    checked_count("workers", workers)
    checked_count("shard_bytes", shard_bytes)
    folder, loaded = Path(output), load_tokenizer(tokenizer)
    stream = open_stream(source, field=field, subset=subset, split=split)
    new = Manifest(
        fingerprint=loaded.fingerprint,
        vocab_size=loaded.vocab_size,
        start_id=loaded.bos_id,
        settings={
            "input": stream.fingerprint,
            "field": field,
            "shard_bytes": shard_bytes,
        },
    )
    manifest = _opened(folder, new)
    with Encoder(tokenizer, workers) as encoder, PrepareBar(stream.size, quiet=quiet) as bar:
        at: StreamState | None = {}  # where the stream stands; {} is nowhere in particular
        before: StreamState | None = None  # the position at the start of the shard
        number = -1
        while number < len(manifest.shards) - 1 or not manifest.complete:
            number += 1
            known = manifest.shards[number] if number < len(manifest.shards) else None
            shard = known if known is not None and _is_whole(folder, number, known) else None
            if shard is not None:
                bar.skipped(shard)
                if not (stream.on_disk and shard.text_digest):  # nothing to compare the text with
                    before = shard.end
                    continue
            if at != before:
                stream.set_state(before)
            if shard is not None:
                same = _digest(_first_bytes(stream, shard_bytes)) == shard.text_digest
            else:
                shard = _write(folder, number, stream, encoder, shard_bytes, bar)
                same = known is None or (shard is not None and _alike(shard, known))
                if not same:  # of another text, it must not be taken for the one that is missing
                    record_file(folder, number).unlink(missing_ok=True)
                    index_file(folder, number).unlink(missing_ok=True)
            if not same:
                raise ValueError(f"{source} is not what shard {number} of {folder} was made of: the text has changed")
            if known is None:
                shards = (*manifest.shards, shard) if shard is not None else manifest.shards
                manifest = dataclasses.replace(manifest, shards=shards, complete=shard is None)
                manifest.save(folder)
            if shard is not None:
                at = before = shard.end
    return manifest


def _opened(folder: Path, new: Manifest) -> Manifest:
    """The manifest to go on from; what an interrupted run left behind is removed. Raises ValueError."""
    if files := [place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()]:
        raise ValueError(f"output: got {folder}, but {files[0]} is no folder")
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in (*folder.glob(".shard-*.tmp"), *folder.glob(f".{MANIFEST_FILE}.*")):
        unfinished.unlink()
    if not (folder / MANIFEST_FILE).exists():
        if others := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
            raise ValueError(f"{folder} holds other files, such as {others[0]}; give a new or an empty folder")
        new.save(folder)
        return new
    there = load_manifest(folder)
    if not there.shards and not there.complete:  # a mistake in the command ended it: there is nothing to lose
        new.save(folder)
        return new
    told, kept = (
        {**made.settings, "tokenizer": made.fingerprint, "vocab_size": made.vocab_size, "start_id": made.start_id}
        for made in (new, there)
    )
    if differ := [name for name in {**kept, **told} if kept.get(name) != told.get(name)]:
        lines = "".join(f"\n  {name}: {kept.get(name)!r} there, {told.get(name)!r} now" for name in differ)
        raise ValueError(f"{folder} holds shards of other settings; give another folder, or the old settings:{lines}")
    return there


def _is_whole(folder: Path, number: int, shard: Shard) -> bool:
    record, index = record_file(folder, number), index_file(folder, number)
    if not record.is_file() or not index.is_file():
        return False
    return record.stat().st_size == shard.file_bytes and index.stat().st_size == shard.documents * 8


def _write(
    folder: Path, number: int, stream: DocumentStream, encoder: Encoder, shard_bytes: int, bar: PrepareBar
) -> Shard | None:
    """Writes a shard of the documents that come next; None, and no shard, if there are none."""
    documents = _first_bytes(stream, shard_bytes)
    first = next(documents, None)
    if first is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    with ShardWriter(folder, number) as writer:
        for record, tokens, text_bytes in encoder.encode(_hashed(itertools.chain([first], documents), digest)):
            writer.write(record, tokens, text_bytes)
            bar.advance(tokens, text_bytes)
        counts = writer.finish()
    bar.finished(number)
    return Shard(*counts, end=stream.get_state(), text_digest=digest.hexdigest())


def _alike(shard: Shard, known: Shard) -> bool:
    """Whether they are of one text; a data set of the hub has several words for one position."""
    shard = dataclasses.replace(shard, end=known.end, text_digest=shard.text_digest if known.text_digest else "")
    return shard == known


def _digest(documents: Iterable[Document]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for _ in _hashed(documents, digest):
        pass
    return digest.hexdigest()


def _hashed(documents: Iterable[Document], digest: hashlib.blake2b) -> Iterator[Document]:
    """The documents, each of them added to a digest on its way."""
    for document in documents:
        digest.update(len(document.text).to_bytes(8, "little") + document.text)
        yield document


def _first_bytes(stream: DocumentStream, size: int) -> Iterator[Document]:
    """Documents up to the one that completes `size` bytes of text."""
    while size > 0 and (document := next(stream, None)) is not None:
        size -= len(document.text)
        yield document


def main() -> None:
    """The command line."""
    parser = command.Parser(
        prog="python -m osdn_jax.data.prepare", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--input", required=True, help="a file, a folder, or hf:NAME of the Hugging Face hub")
    parser.add_argument("--output", required=True, help="folder of the shards")
    parser.add_argument("--tokenizer", default=BYTES, help="tokenizer.json, SentencePiece .model or bytes (default)")
    parser.add_argument("--field", default="text", help="of rows of .jsonl, .parquet and hf: (default text)")
    parser.add_argument("--subset", default="", help="of hf:NAME, such as sample-10BT")
    parser.add_argument("--split", default="train", help="of hf:NAME (default train)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument(
        "--shard-size", type=int, default=SHARD_BYTES >> 20, help="megabytes of text in a shard (default 256)"
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
        print("prepare: interrupted; complete shards are kept, and the same command goes on", file=sys.stderr)
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

"""Small texts, tokenizers and data sets on disk, written with the libraries themselves."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from osdn_jax.data import Document, HubStream, StreamedWindows, load_tokenizer
from osdn_jax.data.prepare import prepare

TEXTS = [
    "the memory writes what the key recalls",
    "a value under decay\nreads back — again",
    "the queries read the memory, the keys write it",
    "é",
    "what the key recalls the value writes under decay again and again",
    "back",
    "the memory reads the memory",
]


def documents(texts=TEXTS):
    return [Document(f"d{i}", text.encode()) for i, text in enumerate(texts)]


def write_tokenizer(path, *, start="<|endoftext|>", **settings):
    """Write a byte-level BPE as a `tokenizer.json`; `settings` replace members of its JSON."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [] if start is None else [start]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | settings))
    return path


def write_byte_fallback(path, style="llama"):
    """Write a tokenizer.json with byte fallback in the style of llama or gemma, or with a Metaspace decoder."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {letter: len(vocabulary) + i for i, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz.,")}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    spaces = decoders.Replace("▁", " ")
    match style:
        case "llama":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            steps = [spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        case "gemma":
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            steps = [spaces, decoders.ByteFallback(), decoders.Fuse()]
        case "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            steps = [decoders.ByteFallback(), decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path))
    return path


def write_sentencepiece(path, **settings):
    """Write a SentencePiece model with byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=3,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return path


def write_jsonl(path, texts=TEXTS, field="text"):
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path, texts=TEXTS, field="text", **columns):
    table = pyarrow.table({field: pyarrow.array(texts)} | columns)
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def prepare_rows(corpus, output, **options):
    """Prepare the rows.jsonl of a corpus, or another `source`, into several small shards."""
    options = {"tokenizer": corpus / "tokenizer.json", "shard_bytes": 60} | options
    return prepare(options.pop("source", corpus / "rows.jsonl"), output, **options)


def streamed_windows(corpus, sequence_length, **options):
    """Windows over the data set "set" of a corpus, as the hub streams it."""

    def open_share(index, count):
        return HubStream(f"hf:{corpus / 'set'}", shard_index=index, shard_count=count)

    return StreamedWindows(open_share, load_tokenizer(corpus / "tokenizer.json"), sequence_length, **options)


def contents(folder):
    """The bytes of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_tokens(stream):
    """The tokens of a `TokenStream`."""
    return stream.read(0, len(stream)).tolist()


def edit_manifest(folder, change):
    """Apply `change` to the manifest of a prepared folder."""
    values = json.loads((folder / "dataset.json").read_text())
    change(values)
    (folder / "dataset.json").write_text(json.dumps(values))


def window_counts(batches):
    """{the tokens of a window: how often it occurs}"""
    rows = [row.tobytes() for batch in batches for row in np.concatenate([batch["inputs"], batch["targets"]], -1)]
    return {row: rows.count(row) for row in rows}

"""Small texts, tokenizers and data sets on disk, made with the libraries themselves."""

import io
import json

import pyarrow
import pyarrow.parquet
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from osdn_jax.data import Document

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
    """A byte-level BPE in `tokenizer.json` form; settings are written over its JSON."""
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
    """A tokenizer.json with byte fall-back in the style of llama or gemma, or with a Metaspace decoder."""
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
    """A SentencePiece model with byte fall-back."""
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

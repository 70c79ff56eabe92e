"""Tokenizers from files: round trips, start tokens, text that looks like special tokens, damaged files."""

import hashlib
import json
import re
import sys

import numpy as np
import pytest

from osdn_jax.data import ByteTokenizer, Tokenizer, load_tokenizer
from support.corpora import TEXTS, write_sentencepiece, write_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "bytes": "bytes",
        "json": write_tokenizer(folder / "tokenizer.json"),
        "model": write_sentencepiece(folder / "spm.model"),
    }


@pytest.fixture(params=["bytes", "json", "model"])
def tokenizer(request, files):
    return load_tokenizer(files[request.param])


def test_decode_inverts_encode(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    for text in TEXTS:
        text = text.replace("\n", " ")  # SentencePiece normalises it away
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        assert tokenizer.bos_id not in ids
        started = tokenizer.encode(text, bos=True)
        assert started.tolist() == [tokenizer.bos_id, *ids]
        assert tokenizer.decode(started) == text
    assert tokenizer.encode("").tolist() == []


def test_merges_are_used(files):
    for name in ("json", "model"):
        assert len(load_tokenizer(files[name]).encode(TEXTS[0])) < len(TEXTS[0]) / 1.5


def test_the_fingerprint_is_that_of_the_content(files):
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    for name in ("json", "model"):
        assert load_tokenizer(files[name]).fingerprint == hashlib.sha256(files[name].read_bytes()).hexdigest()
    assert load_tokenizer(files["json"].parent).fingerprint == load_tokenizer(files["json"]).fingerprint


def test_streamed_pieces_join_to_the_whole(tokenizer):
    text = "the memory — reads é back"
    ids = tokenizer.encode(text, bos=True)
    for cut in (1, len(tokenizer.encode("the memory", bos=True)), len(ids) - 1):
        decoder = tokenizer.stream_decoder(ids[:cut])
        pieces = [decoder.push(token) for token in ids[cut:].tolist()]
        pieces.append(decoder.finish())
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert tokenizer.decode(ids[:cut]) + "".join(pieces) == text


def test_half_a_character_is_held_back(files):
    tokenizer = load_tokenizer(files["json"])
    ids = tokenizer.encode("a😀")
    decoder = tokenizer.stream_decoder()
    assert decoder.push(ids[:-1]) == "a"
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"


def test_names_of_special_tokens_in_a_text_are_encoded_as_text(files):
    for name, text in (("json", "a<|endoftext|>b"), ("model", "a <s> b")):
        tokenizer = load_tokenizer(files[name])
        ids = tokenizer.encode(text)
        assert tokenizer.bos_id not in ids
    assert load_tokenizer(files["json"]).decode(load_tokenizer(files["json"]).encode("a<|endoftext|>b")) == (
        "a<|endoftext|>b"
    )


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    settings = {
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 5,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    }
    plain, set_up = (write_tokenizer(tmp_path / f"{i}.json", **s) for i, s in enumerate(({}, settings)))
    assert load_tokenizer(plain).encode(TEXTS[0]).tolist() == load_tokenizer(set_up).encode(TEXTS[0]).tolist()


def test_the_start_token_is_the_configured_one(tmp_path):
    file = write_tokenizer(tmp_path / "tokenizer.json", start="<start>")
    with pytest.raises(ValueError, match=r"tokenizer.json has no start token.*special tokens: '<start>'"):
        load_tokenizer(file)
    settings = tmp_path / "tokenizer_config.json"
    for values in ({"bos_token": "<start>"}, {"bos_token": None, "eos_token": {"content": "<start>"}}):
        settings.write_text(json.dumps(values))
        tokenizer = load_tokenizer(file)
        assert tokenizer.bos_id == 0
    settings.write_text('{"bos_token": "<other>"}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json names the token '<other>', which .* does not have"):
        load_tokenizer(file)
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        load_tokenizer(file)


def test_sentencepiece_uses_its_end_token_without_a_start_token(tmp_path):
    assert load_tokenizer(write_sentencepiece(tmp_path / "a.model", bos_id=-1)).bos_id == 2
    with pytest.raises(ValueError, match="a.model has no start token"):
        load_tokenizer(write_sentencepiece(tmp_path / "a.model", bos_id=-1, eos_id=-1))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"", "a.json is empty"),
        ("a.json", b"{", "a.json is not JSON"),
        ("a.json", b"\xff", "a.json is not JSON"),
        ("a.json", b"[" * 100_000, "a.json is not JSON"),
        ("a.json", b"{}", "a.json is not a Hugging Face tokenizer"),
        ("a.json", b'{"model": {"type": "BPE", "vocab": 3}}', "a.json is not a Hugging Face tokenizer"),
        ("a.model", b"", "a.model is empty"),
        ("a.model", b"junk", "a.model is not a SentencePiece model"),
        ("a.bin", b"junk", "unknown tokenizer file .*a.bin; expected one ending in .json"),
        ("a.pickle", b"cos\nsystem\n(S'exit 1'\ntR.", "unknown tokenizer file"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name)


def test_a_truncated_model_is_refused(tmp_path, files):
    (tmp_path / "a.model").write_bytes(files["model"].read_bytes()[:500])
    with pytest.raises(ValueError, match="a.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "a.model")


def test_a_path_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such tokenizer: .*absent.json; expected 'bytes'"):
        load_tokenizer(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="holds no tokenizer.json and no tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="must not be empty"):
        load_tokenizer("")
    with pytest.raises(TypeError, match="tokenizer must be 'bytes' or a path; got int"):
        load_tokenizer(3)


@pytest.mark.parametrize(("name", "library"), [("json", "tokenizers"), ("model", "sentencepiece")])
def test_a_missing_library_is_reported_with_how_to_install_it(monkeypatch, files, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=re.escape(f"{library}: pip install 'osdn-jax[tokenizers]'")):
        load_tokenizer(files[name])


@pytest.mark.parametrize("name", ["json", "model"])
def test_bad_text_and_bad_ids(files, name):
    tokenizer = load_tokenizer(files[name])
    with pytest.raises(TypeError, match="text must be a str; got bytes"):
        tokenizer.encode(b"bytes")
    with pytest.raises(ValueError, match="surrogate at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match=f"in 0..{tokenizer.vocab_size - 1}; got {tokenizer.vocab_size} at position 1"):
        tokenizer.decode([1, tokenizer.vocab_size])
    with pytest.raises(TypeError, match="integers"):
        tokenizer.decode([0.5])


def test_text_that_becomes_the_start_token_is_refused(tmp_path):
    file = write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "b"}')
    with pytest.raises(ValueError, match=r"tokenizer.json makes token 1 of the text its start token"):
        load_tokenizer(file).encode("ab")

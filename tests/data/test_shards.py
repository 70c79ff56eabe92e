"""Prepared shards: read as they were written, by later versions too, and refused if they are damaged."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from osdn_jax.data import (
    PreparedTokens,
    TokenizedDocuments,
    TokenWindows,
    load_manifest,
    load_tokenizer,
    read_documents,
)
from support.corpora import all_tokens, contents, documents, edit_manifest, prepare_rows


def test_windows_of_shards_equal_those_of_documents_in_memory(corpus, prepared):
    memory = TokenizedDocuments(documents(), load_tokenizer(corpus / "tokenizer.json"))
    for length in (1, 3, 7, 1000):
        for a, b in zip(TokenWindows(PreparedTokens(prepared), length), TokenWindows(memory, length), strict=True):
            np.testing.assert_equal(a, b)


def test_reading_at_any_position(prepared):
    stream = PreparedTokens(prepared)
    tokens = all_tokens(stream)
    for start in range(len(tokens)):
        for size in (1, 2, 30):
            assert stream.read(start, start + size).tolist() == tokens[start : start + size]


def test_a_split_keeps_every_document_once(prepared):
    stream = PreparedTokens(prepared)
    for fraction in (0.1, 0.3, 0.6):
        train, held_out = stream.split(fraction)
        assert all_tokens(train) + all_tokens(held_out) == all_tokens(stream)
        assert all_tokens(held_out)[0] == stream.start_id
        assert train.text_bytes + held_out.text_bytes == stream.text_bytes
        assert 0.5 <= held_out.text_bytes / (fraction * stream.text_bytes) <= 2
        assert held_out.text_tokens == len(held_out) - held_out.documents
    for fraction, message in ((0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.001, "cannot hold out 0.001 of 7")):
        with pytest.raises(ValueError, match=message):
            stream.split(fraction)
    with pytest.raises(ValueError, match="only a whole folder"):
        train.split(0.1)


def test_a_folder_written_by_version_0_1_0_is_read_and_completed(tmp_path):
    """The archive holds a tokenizer, rows and the shards that commit d6114cb prepared from them."""
    with tarfile.open(Path(__file__).with_name("prepared_by_0_1_0.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "prepared"
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    rows = read_documents(tmp_path / "rows.jsonl")
    stream, memory = PreparedTokens(folder), TokenizedDocuments(rows, tokenizer)
    stream.manifest.check_tokenizer(tokenizer, "prepared")
    assert all_tokens(stream) == all_tokens(memory)
    assert (stream.documents, stream.text_tokens, stream.text_bytes) == (7, 99, 222)
    written = contents(folder)
    (folder / "shard-00001.array_record").unlink()
    manifest = prepare_rows(tmp_path, folder, shard_bytes=100)
    assert manifest == stream.manifest
    assert all_tokens(PreparedTokens(folder)) == all_tokens(memory)
    assert contents(folder).keys() == written.keys()
    assert json.loads((folder / "dataset.json").read_bytes()) == json.loads(written["dataset.json"])


# Damaged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "is no manifest of python -m osdn_jax.data.prepare"),
        (lambda m: m.update(version=2), "format version 2; this program reads 1"),
        (lambda m: m.update(dtype="object"), "dtype: got 'object', expected 'uint16'"),
        (lambda m: m.update(complete="yes"), "complete: got 'yes'"),
        (lambda m: m.update(shards={}), "shards: got {}"),
        (lambda m: m["shards"].append(3), "shard 3: expected an object; got 3"),
        (lambda m: m["shards"][1].update(documents=-1), "shard 1: documents: got -1"),
        (lambda m: m["shards"][1].update(tokens=True), "shard 1: tokens: got True"),
        (lambda m: m["shards"][1].update(text_digest=3), "shard 1: text_digest: got 3"),
        (lambda m: m["shards"][1].update(tokens=5), "shard-00001.index does not agree with dataset.json"),
        (lambda m: m["shards"][1].update(documents=99), "shard-00001.index has .* bytes, expected 792"),
        (lambda m: m["shards"].append(m["shards"][0]), "shard-00003.array_record does not exist"),
        (lambda m: m["tokenizer"].update(start_id=290), "start_id 290 is not below vocab_size 290"),
        (lambda m: m["tokenizer"].update(vocab_size=2**40), "vocab_size: got 1099511627776"),
        (lambda m: m.update(shards=[]), "holds no tokens"),
    ],
)
def test_an_invalid_manifest_is_refused(shards, change, message):
    edit_manifest(shards, change)
    with pytest.raises(ValueError, match=message):
        PreparedTokens(shards)


def test_truncated_or_missing_files_are_refused(shards, tmp_path):
    record, index = shards / "shard-00001.array_record", shards / "shard-00001.index"
    for file in (record, index):
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        with pytest.raises(ValueError, match=rf"{file.name} has {len(data) - 1:,} bytes, expected {len(data):,}"):
            PreparedTokens(shards)
        file.unlink()
        with pytest.raises(ValueError, match=rf"{file.name} does not exist"):
            PreparedTokens(shards)
        file.write_bytes(data)
    (shards / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="dataset.json is not readable JSON"):
        PreparedTokens(shards)
    with pytest.raises(FileNotFoundError, match="dataset.json does not exist"):
        PreparedTokens(tmp_path)


def test_damaged_records_are_refused_when_they_are_read(shards):
    record = shards / "shard-00001.array_record"
    data = record.read_bytes()
    record.write_bytes(b"\0" * len(data))
    with pytest.raises(ValueError, match=r"shard-00001.array_record is no ArrayRecord file of \d+ records"):
        all_tokens(PreparedTokens(shards))
    at = len(data) // 2
    damaged = bytearray(data)
    damaged[80 : 80 + 40] = bytes(byte ^ 255 for byte in data[80 : 80 + 40])  # in a record, not in the index of records
    assert 120 < at
    record.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"shard-00001.array_record is damaged"):
        all_tokens(PreparedTokens(shards))
    record.write_bytes(data)
    all_tokens(PreparedTokens(shards))


def test_tokens_beyond_the_vocabulary_are_refused(shards):
    largest = max(all_tokens(PreparedTokens(shards)))
    edit_manifest(shards, lambda m: m["tokenizer"].update(vocab_size=largest))
    with pytest.raises(ValueError, match=rf"document \d: token {largest} is beyond the vocabulary of {largest}"):
        all_tokens(PreparedTokens(shards))


def test_records_that_contradict_the_manifest_are_refused(shards):
    edit_manifest(shards, lambda m: m["tokenizer"].update(start_id=150))
    token = all_tokens(PreparedTokens(shards))[1]
    edit_manifest(shards, lambda m: m["tokenizer"].update(start_id=token))
    with pytest.raises(ValueError, match=rf"document 0: expected \d+ tokens without the start token {token}"):
        all_tokens(PreparedTokens(shards))
    with pytest.raises(ValueError, match=r"document 0: expected \d+ tokens"):
        index = shards / "shard-00001.index"
        lengths = np.fromfile(index, "<u4").reshape(-1, 2)
        index.write_bytes(lengths[::-1].tobytes())
        edit_manifest(shards, lambda m: m["tokenizer"].update(start_id=0))
        all_tokens(PreparedTokens(shards))


def test_another_tokenizer_is_refused(corpus, prepared, tmp_path):
    manifest = load_manifest(prepared)
    with pytest.raises(
        ValueError, match=r"whole was prepared with another tokenizer: [0-9a-f]{16} there, bytes of bytes"
    ):
        manifest.check_tokenizer(load_tokenizer(), "whole")
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes((corpus / "tokenizer.json").read_bytes())
    manifest.check_tokenizer(load_tokenizer(copy), "whole")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    with pytest.raises(ValueError, match="start token 0 there, start token [1-9]"):
        manifest.check_tokenizer(load_tokenizer(copy), "whole")

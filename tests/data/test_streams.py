"""Streams of documents from files and data sets: contents, saved positions, shares, errors."""

import gzip
import json
import lzma
import re
import sys

import pyarrow
import pytest

from osdn_jax.data import FileStream, HubStream, open_stream, read_documents
from support.corpora import TEXTS, write_jsonl, write_parquet


@pytest.fixture
def files(tmp_path):
    """The same texts in every format: {name: path}."""
    rows = write_jsonl(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(rows.read_bytes()))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    data_set = tmp_path / "data_set"
    data_set.mkdir()
    write_parquet(data_set / "train-0.parquet", TEXTS[:3])
    write_parquet(data_set / "train-1.parquet", TEXTS[3:])
    return {
        "jsonl": rows,
        "gz": tmp_path / "rows.jsonl.gz",
        "xz": tmp_path / "rows.jsonl.xz",
        "parquet": write_parquet(tmp_path / "rows.parquet"),
        "txt": folder,
        "hub": f"hf:{data_set}",
    }


def texts(documents):
    return [document.text.decode() for document in documents]


def test_every_format_holds_the_same_documents(files):
    for name, path in files.items():
        assert texts(open_stream(path)) == TEXTS, name
        if name != "hub":
            assert list(open_stream(path)) == read_documents(path), name
    assert read_documents(files["parquet"])[2].name == "rows.parquet:3"


@pytest.mark.parametrize("kind", ["jsonl", "xz", "parquet", "txt", "hub"])
def test_a_saved_position_restores_the_remaining_documents(files, kind):
    stream = open_stream(files[kind])
    states = [stream.get_state()]
    for _ in TEXTS:
        next(stream)
        states.append(stream.get_state())
    for done, state in enumerate(json.loads(json.dumps(states))):
        fresh = open_stream(files[kind])
        fresh.set_state(state)
        assert texts(fresh) == TEXTS[done:]
    stream.set_state(None)
    assert texts(stream) == TEXTS


@pytest.mark.parametrize("count", [2, 3])  # as many as there are files, and more
def test_shares_are_disjoint_and_together_the_whole(files, count):
    shares = [texts(HubStream(files["hub"], shard_index=i, shard_count=count)) for i in range(count)]
    assert all(shares)
    assert sorted(sum(shares, [])) == sorted(TEXTS)


def test_a_fingerprint_changes_with_the_files(files):
    before = FileStream(files["txt"])
    assert before.size == sum(len(text.encode()) for text in TEXTS)
    assert before.fingerprint == FileStream(files["txt"]).fingerprint
    (files["txt"] / "0.txt").write_text("longer than it was" * 9)
    assert before.fingerprint != FileStream(files["txt"]).fingerprint
    assert FileStream(files["parquet"]).size is None  # compressed


def test_blank_rows_are_skipped_and_text_is_normalised(tmp_path):
    rows = ["a\r\nb\rc", " \n", "", "\ufeffd"]
    write_parquet(tmp_path / "rows.parquet", rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "rows.jsonl", ["a\0b", *rows])
    for name in ("rows.parquet", "rows.jsonl"):
        assert texts(open_stream(tmp_path / name)) == ["a\nb\nc", "d"]
    assert texts(open_stream(f"hf:{tmp_path}/hub")) == ["ab", "a\nb\nc", "d"]


def test_parquet_columns_of_every_string_type(tmp_path):
    for i, kind in enumerate((pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))):
        file = write_parquet(tmp_path / f"{i}.parquet", pyarrow.array(TEXTS).cast(kind))
        assert texts(read_documents(file)) == TEXTS


def test_bad_parquet_is_refused_by_name(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", body=list(range(len(TEXTS))))
    with pytest.raises(ValueError, match=r"a.parquet: no field 'txt'; the file has 'text', 'body'"):
        read_documents(file, field="txt")
    with pytest.raises(ValueError, match=r"a.parquet: field 'body' must be of strings; got int64"):
        read_documents(file, field="body")
    data = file.read_bytes()
    for damaged in (b"", b"PAR1", data[:-20], data[: len(data) // 2], b"x" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a.parquet is not a complete Parquet file"):
            read_documents(file)
    file = write_parquet(tmp_path / "b.parquet", ["a", None])
    with pytest.raises(ValueError, match=r"b.parquet, row 2: field 'text' must be a string; got null"):
        read_documents(file)
    file = write_parquet(tmp_path / "b.parquet", ["a\0"])
    with pytest.raises(ValueError, match=r"b.parquet, row 1: field 'text' is not text: NUL at character 1"):
        read_documents(file)
    file = write_parquet(tmp_path / "b.parquet", [" "])
    with pytest.raises(ValueError, match=r"b.parquet holds no text"):
        read_documents(file)


def test_a_bad_data_set_is_refused_by_name(files, tmp_path):
    path = files["hub"]
    with pytest.raises(ValueError, match=r"no field 'body'; the data set has 'text'"):
        HubStream(path, field="body")
    with pytest.raises(ValueError, match=r"Bad split: test. Available splits: \['train'\]"):
        HubStream(path, split="test")
    with pytest.raises(ValueError, match="BuilderConfig 'small' not found"):
        HubStream(path, subset="small")
    with pytest.raises(ValueError, match="'hf:' names no data set; expected for example hf:HuggingFaceFW/fineweb-edu"):
        open_stream("hf:")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no such data set"):
        open_stream(f"hf:{tmp_path}/empty")
    write_jsonl(tmp_path / "empty" / "rows.jsonl", [3, 4])
    with pytest.raises(ValueError, match="field 'text' must be a string; got a number"):
        next(open_stream(f"hf:{tmp_path}/empty"))


def test_an_unreachable_hub_is_reported_with_alternatives(monkeypatch, files):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError) as caught:
        open_stream("hf:a/b")
    for words in (
        "hf:a/b cannot be reached: Couldn't reach",
        ".jsonl or .parquet",
        "osdn_jax.data.prepare --input hf:a/b",
    ):
        assert words in str(caught.value)
    monkeypatch.undo()
    stream = open_stream(files["hub"])  # also if the network fails while reading
    next(stream)
    monkeypatch.setattr(stream, "_rows", iter(fail, None))
    with pytest.raises(ConnectionError, match="cannot be reached"):
        next(stream)


def test_no_remote_code_is_requested(monkeypatch, files):
    import datasets

    real, asked = datasets.load_dataset, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k) or real(*a, **k))
    HubStream(files["hub"])
    assert asked == [{"name": None, "split": "train", "streaming": True}]
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(ImportError, match="needs datasets ≥ 4, which runs no code of data sets; got 3.6.0"):
        HubStream(files["hub"])


@pytest.mark.parametrize(("kind", "library"), [("hub", "datasets"), ("parquet", "pyarrow")])
def test_a_missing_library_is_reported_with_how_to_install_it(monkeypatch, files, kind, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=re.escape(f"{library}: pip install 'osdn-jax[data]'")):
        next(open_stream(files[kind]))

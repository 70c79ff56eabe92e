"""Token shards: the same however they are made, resumed after any interruption, refused where they are not whole."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from osdn_jax.data import PreparedTokens, TokenizedDocuments, TokenWindows, is_prepared, load_manifest, load_tokenizer
from osdn_jax.data.prepare import main, prepare
from osdn_jax.progress import PrepareBar
from support.corpora import TEXTS, documents, write_jsonl, write_parquet, write_sentencepiece, write_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_tokenizer(folder / "tokenizer.json")
    write_sentencepiece(folder / "spm.model")
    write_jsonl(folder / "rows.jsonl")
    return folder


def made(corpus, output, **options):
    options = {"tokenizer": corpus / "tokenizer.json", "shard_bytes": 60} | options
    return prepare(options.pop("source", corpus / "rows.jsonl"), output, **options)


@pytest.fixture(scope="module")
def whole(corpus):
    made(corpus, corpus / "whole")
    return corpus / "whole"


@pytest.fixture
def shards(whole, tmp_path):
    """A copy to break."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, data in contents(whole).items():
        (folder / name).write_bytes(data)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything(stream):
    return stream.read(0, len(stream)).tolist()


@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json", "spm.model"])
def test_shards_hold_the_documents(corpus, tmp_path, tokenizer):
    loaded = load_tokenizer("bytes" if tokenizer == "bytes" else corpus / tokenizer)
    manifest = made(corpus, tmp_path / "out", tokenizer="bytes" if tokenizer == "bytes" else corpus / tokenizer)
    stream, memory = PreparedTokens(tmp_path / "out"), TokenizedDocuments(documents(), loaded)
    assert everything(stream) == everything(memory)
    assert (stream.text_tokens, stream.text_bytes) == (memory.text_tokens, memory.text_bytes)
    assert (manifest.tokens, manifest.documents) == (memory.text_tokens, len(TEXTS))
    assert manifest.text_bytes == memory.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.dtype == {"bytes": "uint8"}.get(tokenizer, "uint16")
    assert len(manifest.shards) > 1
    manifest.check_tokenizer(loaded, "out")
    assert load_manifest(tmp_path / "out") == manifest
    assert is_prepared(tmp_path / "out")
    assert not is_prepared(corpus)


def test_every_input_gives_the_same_shards(corpus, whole, tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "rows.jsonl")
    for i, source in enumerate(
        (write_parquet(tmp_path / "rows.parquet"), tmp_path / "texts", f"hf:{tmp_path / 'set'}")
    ):
        made(corpus, tmp_path / f"{i}", source=source)
        a, b = contents(tmp_path / f"{i}"), contents(whole)
        assert a.keys() == b.keys()
        assert all(a[name] == b[name] for name in a if name != "dataset.json")


def test_several_processes_write_the_same_as_one(corpus, whole, tmp_path):
    made(corpus, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(whole)


def test_windows_of_shards_are_those_of_memory(corpus, whole):
    memory = TokenizedDocuments(documents(), load_tokenizer(corpus / "tokenizer.json"))
    for length in (1, 3, 7, 1000):
        for a, b in zip(TokenWindows(PreparedTokens(whole), length), TokenWindows(memory, length), strict=True):
            np.testing.assert_equal(a, b)


def test_reading_at_any_position(whole):
    stream = PreparedTokens(whole)
    tokens = everything(stream)
    for start in range(len(tokens)):
        for size in (1, 2, 30):
            assert stream.read(start, start + size).tolist() == tokens[start : start + size]


def test_a_split_keeps_every_document_once(whole):
    stream = PreparedTokens(whole)
    for fraction in (0.1, 0.3, 0.6):
        train, held_out = stream.split(fraction)
        assert everything(train) + everything(held_out) == everything(stream)
        assert everything(held_out)[0] == stream.start_id
        assert train.text_bytes + held_out.text_bytes == stream.text_bytes
        assert 0.5 <= held_out.text_bytes / (fraction * stream.text_bytes) <= 2
        assert held_out.text_tokens == len(held_out) - held_out.documents
    for fraction, said in ((0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.001, "cannot hold out 0.001 of 7")):
        with pytest.raises(ValueError, match=said):
            stream.split(fraction)
    with pytest.raises(ValueError, match="only a whole folder"):
        train.split(0.1)


# Interrupted


def test_what_is_missing_is_written_and_what_is_there_is_left(corpus, whole, shards):
    kept = shards / "shard-00000.array_record"
    os.utime(kept, (1, 1))
    (shards / "shard-00001.array_record").unlink()
    (shards / "shard-00002.index").unlink()
    for unfinished in (".shard-00001.array_record.tmp", ".dataset.json.x1y2"):
        (shards / unfinished).write_bytes(b"half")
    made(corpus, shards)
    assert contents(shards) == contents(whole)
    assert kept.stat().st_mtime == 1


@pytest.mark.parametrize("source", ["rows.jsonl", "hub"])
def test_an_interrupted_run_is_gone_on_with(corpus, tmp_path, monkeypatch, source):
    path = corpus / source
    if source == "hub":
        (tmp_path / "set").mkdir()
        write_jsonl(tmp_path / "set" / "rows.jsonl")
        path = f"hf:{tmp_path / 'set'}"
    made(corpus, tmp_path / "want", source=path)
    from osdn_jax.data.shards import encoder

    real, count = encoder._record, [0]

    def interrupted(*arguments):
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(corpus, tmp_path / "out", source=path)
    left = contents(tmp_path / "out")
    assert left.keys() == {"dataset.json", "shard-00000.array_record", "shard-00000.index"}
    assert not load_manifest(tmp_path / "out").complete
    with pytest.raises(ValueError, match="is not complete"):
        PreparedTokens(tmp_path / "out")
    made(corpus, tmp_path / "out", source=path)
    got, want = contents(tmp_path / "out"), contents(tmp_path / "want")
    assert load_manifest(tmp_path / "out").tokens == load_manifest(tmp_path / "want").tokens
    # A data set has several words for one position.
    assert got | {"dataset.json": b""} == want | {"dataset.json": b""}
    for number in range(3):
        (tmp_path / "out" / f"shard-0000{number}.array_record").unlink()
        made(corpus, tmp_path / "out", source=path)
        assert contents(tmp_path / "out") == got


def test_killed_and_run_again(corpus, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", TEXTS * 10_000)
    arguments = ["--input", rows, "--tokenizer", corpus / "tokenizer.json", "--workers", "1", "--shard-size", "1"]
    line = [sys.executable, "-m", "osdn_jax.data.prepare", "--output", tmp_path / "out", *arguments]
    process = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE)
    end = time.monotonic() + 60
    while time.monotonic() < end and not (tmp_path / "out" / "shard-00000.array_record").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not load_manifest(tmp_path / "out").complete
    done = subprocess.run(list(map(str, line)), check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].startswith(f"{tmp_path / 'out'}: ")
    stream = PreparedTokens(tmp_path / "out")
    assert stream.documents == len(TEXTS) * 10_000
    assert {name for name in contents(tmp_path / "out") if name.startswith(".")} == set()


def test_other_settings_are_refused(corpus, shards, tmp_path):
    for options, said in (
        ({"shard_bytes": 99}, r"shard_bytes: 60 there, 99 now"),
        ({"tokenizer": "bytes"}, r"tokenizer: '[0-9a-f]{64}' there, 'bytes' now"),
        ({"source": write_jsonl(tmp_path / "other.jsonl", TEXTS[1:])}, r"input: .* there, .* now"),
        (
            {"source": write_jsonl(tmp_path / "body.jsonl", field="body"), "field": "body"},
            r"field: 'text' there, 'body'",
        ),
    ):
        with pytest.raises(ValueError, match=f"holds shards of other settings(.|\n)*{said}"):
            made(corpus, shards, **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"mine holds other files, such as letter.txt"):
        made(corpus, tmp_path / "mine")
    assert contents(tmp_path / "mine").keys() == {"letter.txt"}


def test_a_text_that_changed_is_noticed(corpus, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl")
    made(corpus, tmp_path / "out", source=rows)
    (tmp_path / "out" / "shard-00000.array_record").unlink()
    write_jsonl(rows, [TEXTS[0].replace("the", "eht"), *TEXTS[1:]])  # of the same size
    with pytest.raises(ValueError, match=r"rows.jsonl is not what shard 0 of .* was made of: the text has changed"):
        made(corpus, tmp_path / "out", source=rows)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_text_that_changed_behind_shards_that_are_kept_is_noticed(corpus, tmp_path, interrupted):
    rows = write_jsonl(tmp_path / "rows.jsonl")
    manifest = made(corpus, tmp_path / "out", source=rows)
    if interrupted:
        breaking(tmp_path / "out", lambda m: m.update(complete=False, shards=m["shards"][:-1]))
    before = contents(tmp_path / "out")
    changes = [[TEXTS[0].replace("the", "eht"), *TEXTS[1:]], [*TEXTS[:2], TEXTS[2].replace("read", "daer"), *TEXTS[3:]]]
    for texts in changes:
        write_jsonl(rows, texts)  # of the same size
        number = int(texts is changes[1])
        with pytest.raises(ValueError, match=f"rows.jsonl is not what shard {number} of .* the text has changed"):
            made(corpus, tmp_path / "out", source=rows)
        assert contents(tmp_path / "out") == before
    write_jsonl(rows)
    assert made(corpus, tmp_path / "out", source=rows) == manifest


def test_a_shard_that_is_missing_is_not_written_of_another_text_of_as_many_tokens(corpus, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl")
    made(corpus, tmp_path / "out", source=rows, tokenizer="bytes")
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "shard-00000.index").unlink()
    write_jsonl(rows, [TEXTS[0].replace("writes", "wrotes"), *TEXTS[1:]])
    with pytest.raises(ValueError, match=r"rows.jsonl is not what shard 0 of .* was made of: the text has changed"):
        made(corpus, tmp_path / "out", source=rows, tokenizer="bytes")
    write_jsonl(rows)
    made(corpus, tmp_path / "out", source=rows, tokenizer="bytes")
    assert contents(tmp_path / "out") == whole


def test_shards_of_an_earlier_version_are_gone_on_with(corpus, whole, shards):
    breaking(shards, lambda m: [shard.pop("text_digest") for shard in m["shards"]])
    (shards / "shard-00002.index").unlink()
    made(corpus, shards)
    assert contents(shards) | {"dataset.json": b""} == contents(whole) | {"dataset.json": b""}


# Damaged


def breaking(shards, change):
    values = json.loads((shards / "dataset.json").read_text())
    change(values)
    (shards / "dataset.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "said"),
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
def test_a_manifest_that_is_none_is_refused(shards, change, said):
    breaking(shards, change)
    with pytest.raises(ValueError, match=said):
        PreparedTokens(shards)


def test_files_that_are_not_whole_are_refused(shards, tmp_path):
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
        everything(PreparedTokens(shards))
    at = len(data) // 2
    spoiled = bytearray(data)
    spoiled[80 : 80 + 40] = bytes(byte ^ 255 for byte in data[80 : 80 + 40])  # in a record, not in the list of them
    assert 120 < at
    record.write_bytes(spoiled)
    with pytest.raises(ValueError, match=r"shard-00001.array_record is damaged"):
        everything(PreparedTokens(shards))
    record.write_bytes(data)
    everything(PreparedTokens(shards))


def test_tokens_beyond_the_vocabulary_are_refused(shards):
    largest = max(everything(PreparedTokens(shards)))
    breaking(shards, lambda m: m["tokenizer"].update(vocab_size=largest))
    with pytest.raises(ValueError, match=rf"document \d: token {largest} is beyond the vocabulary of {largest}"):
        everything(PreparedTokens(shards))


def test_records_that_are_not_the_manifests_are_refused(shards):
    breaking(shards, lambda m: m["tokenizer"].update(start_id=150))
    token = everything(PreparedTokens(shards))[1]
    breaking(shards, lambda m: m["tokenizer"].update(start_id=token))
    with pytest.raises(ValueError, match=rf"document 0: expected \d+ tokens without the start token {token}"):
        everything(PreparedTokens(shards))
    with pytest.raises(ValueError, match=r"document 0: expected \d+ tokens"):
        index = shards / "shard-00001.index"
        lengths = np.fromfile(index, "<u4").reshape(-1, 2)
        index.write_bytes(lengths[::-1].tobytes())
        breaking(shards, lambda m: m["tokenizer"].update(start_id=0))
        everything(PreparedTokens(shards))


def test_another_tokenizer_is_refused(corpus, whole, tmp_path):
    manifest = load_manifest(whole)
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


# The command line


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return status, *capsys.readouterr()

    return run


def test_the_command_ends_in_one_line_of_what_there_is(corpus, tmp_path, command):
    arguments = ("--input", corpus / "rows.jsonl", "--tokenizer", corpus / "tokenizer.json", "--output", tmp_path / "o")
    status, out, err = command(*arguments, "--workers", 1)
    assert (status, err) == (0, "")
    tokens = PreparedTokens(tmp_path / "o").text_tokens
    assert out.splitlines()[0].startswith("shard 0 is complete: 7 documents")
    summary = f"{tmp_path / 'o'}: {tokens} tokens of 7 documents in 1 shards, "
    assert out.splitlines()[-1].startswith(summary)
    status, out, _ = command(*arguments, "--workers", 1)
    assert (status, out.count("\n")) == (0, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--field": "body"}, "rows.jsonl, line 1: no field 'body'; the row has 'id', 'text'"),
        ({"--input": "absent"}, "no such file or folder: absent"),
        ({"--tokenizer": "absent.json"}, "no such tokenizer: absent.json"),
        ({"--workers": "0"}, "workers must be at least 1; got 0"),
        ({"--shard-size": "0"}, "shard_bytes must be at least 1; got 0"),
        ({"--shard-size": "0"}, "--shard-size 0: "),
        ({"--shard-size": "-1"}, "--shard-size -1: "),
        ({"--shard-size": "1.5"}, "--shard-size: invalid int value: '1.5'"),
        ({"--workers": "-1"}, "workers must be at least 1; got -1"),
        ({"--input": ""}, "path must not be empty"),
        ({"--input": "hf:"}, "'hf:' names no data set"),
        ({"--tokenizer": ""}, "tokenizer must not be empty"),
        ({"--output": ""}, "--output: got '', expected a directory"),
        ({"--output": "gs://bucket/data"}, "--output: got 'gs://bucket/data', expected a directory"),
        ({"--output": __file__}, f"--output: got '{__file__}', but {__file__} is no directory"),
        ({"--output": f"{__file__}/out"}, f"--output: got '{__file__}/out', but {__file__} is no directory"),
        ({"--shard": "1"}, "unrecognized arguments: --shard 1"),
    ],
)
def test_a_mistake_is_one_line(corpus, tmp_path, monkeypatch, command, options, said):
    monkeypatch.chdir(tmp_path)
    given = {"--input": corpus / "rows.jsonl", "--output": tmp_path / "out", "--workers": "1"} | options
    status, out, err = command(*(word for pair in given.items() for word in pair))
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert set(os.listdir(tmp_path)) <= {"out"}


def test_a_command_can_be_put_right(corpus, tmp_path, command):
    arguments = ("--input", corpus / "rows.jsonl", "--output", tmp_path / "out", "--workers", 1)
    assert command(*arguments, "--field", "body")[0] == 2
    assert command(*arguments)[0] == 0
    assert PreparedTokens(tmp_path / "out").documents == len(TEXTS)


def test_a_file_in_the_place_of_the_folder_is_named(corpus, tmp_path):
    (tmp_path / "out").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(ValueError, match=f"output: got {folder}, but {tmp_path}/out is no folder"):
            made(corpus, folder)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_reader_that_has_left_is_no_mistake(corpus, tmp_path, command, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(PrepareBar, "finished", closed)
    with pytest.raises(BrokenPipeError):  # which `command.run` ends with
        command("--input", corpus / "rows.jsonl", "--output", tmp_path / "out", "--workers", 1)


def test_a_text_that_cannot_be_tokenised_is_named(corpus, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"document 'rows.jsonl:2': .*tokenizer.json makes token 0 of the text"):
            made(corpus, tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", workers=workers)

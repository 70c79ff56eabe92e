"""Preparing shards: the same however they are written, continued after any interruption, one line for a mistake."""

import os
import signal
import subprocess
import sys
import time

import pytest

from osdn_jax.data import PreparedTokens, TokenizedDocuments, is_prepared, load_manifest, load_tokenizer
from osdn_jax.data.prepare import main
from osdn_jax.progress import PrepareBar
from support.corpora import (
    TEXTS,
    all_tokens,
    contents,
    documents,
    edit_manifest,
    prepare_rows,
    write_jsonl,
    write_parquet,
    write_tokenizer,
)


@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json", "spm.model"])
def test_shards_hold_the_documents(corpus, tmp_path, tokenizer):
    loaded = load_tokenizer("bytes" if tokenizer == "bytes" else corpus / tokenizer)
    manifest = prepare_rows(corpus, tmp_path / "out", tokenizer="bytes" if tokenizer == "bytes" else corpus / tokenizer)
    stream, memory = PreparedTokens(tmp_path / "out"), TokenizedDocuments(documents(), loaded)
    assert all_tokens(stream) == all_tokens(memory)
    assert (stream.text_tokens, stream.text_bytes) == (memory.text_tokens, memory.text_bytes)
    assert (manifest.tokens, manifest.documents) == (memory.text_tokens, len(TEXTS))
    assert manifest.text_bytes == memory.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.dtype == {"bytes": "uint8"}.get(tokenizer, "uint16")
    assert len(manifest.shards) > 1
    manifest.check_tokenizer(loaded, "out")
    assert load_manifest(tmp_path / "out") == manifest
    assert is_prepared(tmp_path / "out")
    assert not is_prepared(corpus)


def test_every_input_gives_the_same_shards(corpus, prepared, tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "rows.jsonl")
    for i, source in enumerate(
        (write_parquet(tmp_path / "rows.parquet"), tmp_path / "texts", f"hf:{tmp_path / 'set'}")
    ):
        prepare_rows(corpus, tmp_path / f"{i}", source=source)
        a, b = contents(tmp_path / f"{i}"), contents(prepared)
        assert a.keys() == b.keys()
        assert all(a[name] == b[name] for name in a if name != "dataset.json")


def test_several_processes_write_the_same_as_one(corpus, prepared, tmp_path):
    prepare_rows(corpus, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(prepared)


# Interrupted


def test_missing_files_are_written_and_existing_ones_kept(corpus, prepared, shards):
    kept = shards / "shard-00000.array_record"
    os.utime(kept, (1, 1))
    (shards / "shard-00001.array_record").unlink()
    (shards / "shard-00002.index").unlink()
    for unfinished in (".shard-00001.array_record.tmp", ".dataset.json.x1y2"):
        (shards / unfinished).write_bytes(b"half")
    prepare_rows(corpus, shards)
    assert contents(shards) == contents(prepared)
    assert kept.stat().st_mtime == 1


@pytest.mark.parametrize("source", ["rows.jsonl", "hub"])
def test_an_interrupted_run_is_continued(corpus, tmp_path, monkeypatch, source):
    path = corpus / source
    if source == "hub":
        (tmp_path / "set").mkdir()
        write_jsonl(tmp_path / "set" / "rows.jsonl")
        path = f"hf:{tmp_path / 'set'}"
    prepare_rows(corpus, tmp_path / "want", source=path)
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
            prepare_rows(corpus, tmp_path / "out", source=path)
    left = contents(tmp_path / "out")
    assert left.keys() == {"dataset.json", "shard-00000.array_record", "shard-00000.index"}
    assert not load_manifest(tmp_path / "out").complete
    with pytest.raises(ValueError, match="is not complete"):
        PreparedTokens(tmp_path / "out")
    prepare_rows(corpus, tmp_path / "out", source=path)
    got, want = contents(tmp_path / "out"), contents(tmp_path / "want")
    assert load_manifest(tmp_path / "out").tokens == load_manifest(tmp_path / "want").tokens
    # `datasets` describes one position in several ways.
    assert got | {"dataset.json": b""} == want | {"dataset.json": b""}
    for number in range(3):
        (tmp_path / "out" / f"shard-0000{number}.array_record").unlink()
        prepare_rows(corpus, tmp_path / "out", source=path)
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
    for options, message in (
        ({"shard_bytes": 99}, r"shard_bytes: 60 there, 99 now"),
        ({"tokenizer": "bytes"}, r"tokenizer: '[0-9a-f]{64}' there, 'bytes' now"),
        ({"source": write_jsonl(tmp_path / "other.jsonl", TEXTS[1:])}, r"input: .* there, .* now"),
        (
            {"source": write_jsonl(tmp_path / "body.jsonl", field="body"), "field": "body"},
            r"field: 'text' there, 'body'",
        ),
    ):
        with pytest.raises(ValueError, match=f"holds shards of other settings(.|\n)*{message}"):
            prepare_rows(corpus, shards, **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"mine holds other files, such as letter.txt"):
        prepare_rows(corpus, tmp_path / "mine")
    assert contents(tmp_path / "mine").keys() == {"letter.txt"}


def test_a_changed_text_is_refused(corpus, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl")
    prepare_rows(corpus, tmp_path / "out", source=rows)
    (tmp_path / "out" / "shard-00000.array_record").unlink()
    write_jsonl(rows, [TEXTS[0].replace("the", "eht"), *TEXTS[1:]])  # of the same size
    with pytest.raises(ValueError, match=r"rows.jsonl is not what shard 0 of .* was made of: the text has changed"):
        prepare_rows(corpus, tmp_path / "out", source=rows)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_changed_text_of_existing_shards_is_refused(corpus, tmp_path, interrupted):
    rows = write_jsonl(tmp_path / "rows.jsonl")
    manifest = prepare_rows(corpus, tmp_path / "out", source=rows)
    if interrupted:
        edit_manifest(tmp_path / "out", lambda m: m.update(complete=False, shards=m["shards"][:-1]))
    before = contents(tmp_path / "out")
    changes = [[TEXTS[0].replace("the", "eht"), *TEXTS[1:]], [*TEXTS[:2], TEXTS[2].replace("read", "daer"), *TEXTS[3:]]]
    for texts in changes:
        write_jsonl(rows, texts)  # of the same size
        number = int(texts is changes[1])
        with pytest.raises(ValueError, match=f"rows.jsonl is not what shard {number} of .* the text has changed"):
            prepare_rows(corpus, tmp_path / "out", source=rows)
        assert contents(tmp_path / "out") == before
    write_jsonl(rows)
    assert prepare_rows(corpus, tmp_path / "out", source=rows) == manifest


def test_a_missing_shard_is_not_written_from_another_text_of_the_same_length(corpus, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl")
    prepare_rows(corpus, tmp_path / "out", source=rows, tokenizer="bytes")
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / "shard-00000.index").unlink()
    write_jsonl(rows, [TEXTS[0].replace("writes", "wrotes"), *TEXTS[1:]])
    with pytest.raises(ValueError, match=r"rows.jsonl is not what shard 0 of .* was made of: the text has changed"):
        prepare_rows(corpus, tmp_path / "out", source=rows, tokenizer="bytes")
    write_jsonl(rows)
    prepare_rows(corpus, tmp_path / "out", source=rows, tokenizer="bytes")
    assert contents(tmp_path / "out") == whole


def test_shards_without_text_digests_are_continued(corpus, prepared, shards):
    edit_manifest(shards, lambda m: [shard.pop("text_digest") for shard in m["shards"]])
    (shards / "shard-00002.index").unlink()
    prepare_rows(corpus, shards)
    assert contents(shards) | {"dataset.json": b""} == contents(prepared) | {"dataset.json": b""}


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


def test_the_command_ends_with_a_summary(corpus, tmp_path, command):
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
    ("options", "message"),
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
def test_a_mistake_is_one_line(corpus, tmp_path, monkeypatch, command, options, message):
    monkeypatch.chdir(tmp_path)
    given = {"--input": corpus / "rows.jsonl", "--output": tmp_path / "out", "--workers": "1"} | options
    status, out, err = command(*(word for pair in given.items() for word in pair))
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert set(os.listdir(tmp_path)) <= {"out"}


def test_a_corrected_command_succeeds(corpus, tmp_path, command):
    arguments = ("--input", corpus / "rows.jsonl", "--output", tmp_path / "out", "--workers", 1)
    assert command(*arguments, "--field", "body")[0] == 2
    assert command(*arguments)[0] == 0
    assert PreparedTokens(tmp_path / "out").documents == len(TEXTS)


def test_a_file_at_the_path_of_the_folder_is_named(corpus, tmp_path):
    (tmp_path / "out").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(ValueError, match=f"output: got {folder}, but {tmp_path}/out is no folder"):
            prepare_rows(corpus, folder)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_closed_pipe_is_not_a_usage_error(corpus, tmp_path, command, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(PrepareBar, "finished", closed)
    with pytest.raises(BrokenPipeError):  # `command.run` handles it
        command("--input", corpus / "rows.jsonl", "--output", tmp_path / "out", "--workers", 1)


def test_a_text_that_cannot_be_tokenised_is_named(corpus, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"document 'rows.jsonl:2': .*tokenizer.json makes token 0 of the text"):
            prepare_rows(corpus, tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", workers=workers)

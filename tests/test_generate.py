"""Text from a trained run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tokenizers

from osdn_jax import generate as module
from osdn_jax import interop
from osdn_jax.command import run as run_command
from osdn_jax.generate import generate
from osdn_jax.generation import Chunk, Generator
from osdn_jax.training import CheckpointMismatchError
from support import runs
from support.continuations import language_model
from support.forks import Forks
from support.runs import finished

pytestmark = pytest.mark.slow

OPTIONS = {"tokens": 30, "seed": 1}


@pytest.fixture(scope="module")
def run():
    return finished()[0]


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def test_importing_it_imports_nothing_that_only_training_needs():
    """These take longer to import than JAX; Orbax is imported while the model is compiled."""
    heavy = ("grain", "jax.experimental.pallas", "matplotlib", "orbax", "tensorstore")
    script = f"import sys, osdn_jax.generate; print([name for name in {heavy} if name in sys.modules])"
    _, keywords = runs.command(None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=keywords["env"],
        cwd=keywords["cwd"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_text_is_that_of_the_newest_checkpoint(run):
    pieces = list(generate(run, "the ", **OPTIONS))
    assert len(pieces) == 30  # one for each token, the last one with the rest
    text = "".join(pieces)
    assert text == "".join(generate(run, "the ", **OPTIONS))
    assert text != "".join(generate(run, "the ", tokens=30, seed=2))
    assert "\0" not in text
    # Forty steps are enough to learn the letters of the training text.
    known = sum(letter in "thememorywritesvaluerecallunderdecayqueriesbackagain .\n" for letter in text)
    assert known > len(text) * 0.6


def test_the_prompt_counts_and_may_be_empty(run):
    cold = OPTIONS | {"temperature": 0.0}
    assert "".join(generate(run, "", **cold)) == "".join(generate(run, **cold))
    first = "".join(generate(run, "memory", **cold))
    again = "".join(generate(run, f"memory{first[:10]}", tokens=20, temperature=0.0))
    assert first[10:30] == again


def test_the_run_is_left_as_it_was(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    list(generate(run, **OPTIONS))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_command_line_writes_prompt_and_text(run, command):
    status, out, err = command("--workdir", run, "--prompt", "what ", "--tokens", 20, "--seed", 3)
    assert (status, err) == (0, "")
    assert out == "what " + "".join(generate(run, "what ", tokens=20, seed=3)) + "\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "--temperature: got -1.0, expected a number of at least 0"),
        (["--top_p", "0"], "--top_p: got 0.0, expected more than 0 and at most 1"),
        (["--tokens", "-3"], "--tokens: got -3, expected an integer from 0"),
        (["--tokens", "many"], "--tokens: invalid int value: 'many'"),
        (["--temperature", "nan"], "--temperature: got nan"),
        (["--temperature", "1e999"], "--temperature: got inf"),
        (["--top_p", "nan"], "--top_p: got nan"),
        (["--seed", "-1"], "--seed: got -1, expected an integer from 0"),
        (["--seed", str(2**70)], f"--seed: got {2**70}, expected an integer from 0"),
        (["--prompt", "a\udcff"], "unpaired surrogate at character 1"),
        (["--prompt", "a\0"], "NUL"),
        (["--temp", "1"], "unrecognized arguments: --temp 1"),
        (["--top_k", "-1"], "--top_k: got -1, expected at least 0"),
        (["--min_p", "2"], "--min_p: got 2.0"),
        (["--repetition_penalty", "0"], "--repetition_penalty: got 0.0"),
        (["--state_dtype", "int8"], "--state_dtype: invalid choice: 'int8'"),
        (["--prompt", "a", "--prompt_ids", "1"], "not allowed with"),
        (["--prompt_ids", "1,b"], "--prompt_ids: got '1,b', expected integers separated by commas"),
        (["--prompt_ids", "1", "--stop", "a"], "--stop: got a text with --prompt_ids"),
        (["--prompts", "nothing.txt"], "--prompts: got 'nothing.txt', which does not exist"),
        (["--prompts", "."], "--prompts: got '.', which is a folder, expected a file"),
        (["--prompt_ids", "1", "--prompt_ids", "999"], "--prompt_ids[1]: got token 999, expected tokens of the vocab"),
        (["--prompt_ids", ""], "--prompt_ids[0]: got no tokens, expected at least one"),
        (["--stop_tokens", "1;2"], "--stop_tokens: got '1;2', expected integers separated by commas"),
        (["--stop_tokens", "999"], "--stop_tokens: got token 999, expected tokens of the vocabulary"),
        (["--save_state", "state", "--keep_every", "0"], "--keep_every: got 0, expected at least 1"),
        (["--prompt", "a", "--prompt", "b", "--save_state", "state"], "--save_state: got 2 prompts, expected one"),
        (["--save_state", "nothing/state"], "--save_state: got 'nothing/state', but there is no folder"),
        (["--ignore_remote_code"], "--ignore_remote_code: expected it with --model"),
        (["--keep_every", "4"], "--keep_every: expected it with --save_state"),
        (["--at", "4"], "--at: expected it with --load_state"),
        (["--load_state", "nothing"], "--load_state: got 'nothing', which does not exist"),
    ],
)
def test_a_number_out_of_range_is_one_line(run, command, arguments, said):
    status, out, err = command("--workdir", run, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("workdir", ["", "gs://bucket/run", "s3://bucket"])
def test_what_is_no_directory_is_one_line(command, workdir):
    status, out, err = command("--workdir", workdir)
    assert (status, out) == (2, "")
    assert err == f"generate: error: --workdir: got {workdir!r}, expected a directory of this machine\n"


def test_the_home_directory_may_be_abbreviated(run, command, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert command("--workdir", f"~/{run.name}", "--tokens", 3)[0] == 0


@pytest.mark.parametrize(("raised", "said", "ends_with"), [(KeyboardInterrupt, "", 130), (ValueError("no"), "no", 2)])
def test_text_that_is_cut_short_ends_its_line(run, command, monkeypatch, raised, said, ends_with):
    def pieces(*_, **__):
        yield Chunk(0, 97, "and", None)
        raise raised

    monkeypatch.setattr("osdn_jax.generation.Generator.stream", pieces)
    monkeypatch.setattr(module, "main", lambda main=module.main: run_command(main))
    status, out, err = command("--workdir", run, "--prompt", "this ")
    assert (status, out) == (ends_with, "this and\n")
    assert said in err
    assert err.count("\n") == (ends_with == 2)


def test_ctrl_c_and_a_reader_that_leaves(tmp_path, run):
    """As processes: `generate` itself sets the exit status."""
    _, keywords = runs.command(None)
    line = [str(Path(module.__file__)), "--workdir", str(run), "--prompt", "this ", "--tokens", "1000000"]
    pipe, errors = tmp_path / "pipe", tmp_path / "errors"
    os.mkfifo(pipe)
    with Forks(env=keywords["env"], cwd=keywords["cwd"]) as forks:
        forks.start(line, out=pipe, err=errors)
        with pipe.open() as reader:
            assert reader.read(10).startswith("this ")
        assert forks.wait() == 141
        assert errors.read_text() == ""

        forks.start(line, out=pipe, err=errors)
        with pipe.open() as reader:
            text = reader.read(10)
            forks.signal(signal.SIGINT)
            text += reader.read()
        assert forks.wait() == 130
        assert errors.read_text() == ""
        assert text.endswith("\n")


def test_a_directory_without_a_run_is_one_line(tmp_path, run, command):
    status, _, err = command("--workdir", tmp_path / "nothing")
    assert status == 2
    assert "nothing/config.json does not exist: is this the working directory of a run?" in err
    assert err.count("\n") == 1
    (tmp_path / "started").mkdir()
    shutil.copy(run / "config.json", tmp_path / "started")
    status, _, err = command("--workdir", tmp_path / "started")
    assert status == 2
    assert "no folder of checkpoints" in err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, run, command):
    other = shutil.copytree(run, tmp_path / "run")
    file = other / "config.json"
    file.write_text(file.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(CheckpointMismatchError, match="of another model"):
        generate(other)
    status, out, err = command("--workdir", other)
    assert (status, out) == (2, "")
    assert "of another model" in err


def test_without_a_directory_is_one_line(command):
    status, _, err = command()
    assert status == 2
    assert "--workdir" in err
    assert err.count("\n") == 1


def test_several_prompts_are_written_in_their_order(run, command, tmp_path):
    """A batch equals its prompts alone, with the seeds that follow one another."""
    flags = ("--tokens", 12, "--temperature", 1.5, "--top_k", 9, "--min_p", 0.01, "--repetition_penalty", 1.1)
    status, out, err = command("--workdir", run, "--prompt", "memory", "--prompt", "the ", "--seed", 3, *flags)
    assert (status, err) == (0, "")
    alone = [
        command("--workdir", run, "--prompt", prompt, "--seed", seed, *flags)[1][:-1]
        for prompt, seed in (("memory", 3), ("the ", 4))
    ]
    assert out == "\n\n".join(alone) + "\n"
    (tmp_path / "prompts").write_text("memory\nthe \n")
    assert command("--workdir", run, "--prompts", tmp_path / "prompts", "--seed", 3, *flags)[1] == out
    text = alone[0].removeprefix("memory")
    stopped = command("--workdir", run, "--prompt", "memory", "--seed", 3, "--stop", text[5:7], *flags)[1]
    assert stopped == "memory" + text[: text.index(text[5:7])] + "\n"


def test_tokens_in_place_of_text(run, command):
    status, out, err = command("--workdir", run, "--prompt_ids", "0,116,104", "--tokens", 5, "--temperature", 0)
    assert (status, err) == (0, "")
    text = command("--workdir", run, "--prompt", "th", "--tokens", 5, "--temperature", 0)[1]
    assert bytes(int(token) for token in out.split(",")[1:]).decode() == text[:-1]


def test_a_state_is_saved_and_continued(run, command, tmp_path):
    cold = ("--temperature", 0)
    whole = command("--workdir", run, "--prompt", "memory", "--tokens", 20, *cold)[1]
    first = command("--workdir", run, "--prompt", "memory", "--tokens", 8, *cold, "--save_state", tmp_path / "state")[1]
    assert first[:-1] == whole[: len("memory") + 8]
    load = ("--load_state", tmp_path / "state")
    assert command("--workdir", run, *load, "--tokens", 12, *cold)[1] == whole[len("memory") + 8 :]
    saved = ("--save_state", tmp_path / "prompt", "--keep_every", 2, "--tokens", 3)
    assert command("--workdir", run, "--prompt", "the memory", *saved, *cold)[0] == 0
    load = ("--load_state", tmp_path / "prompt", "--tokens", 9)
    at = command("--workdir", run, *load, "--at", 5, "--prompt", "value", *cold)
    assert at[:2] == (0, command("--workdir", run, "--prompt", "the value", "--tokens", 9, *cold)[1][4:])
    assert "--at: got 99, expected 1 to 11" in command("--workdir", run, *load, "--at", 99)[2]
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-9])
    status, out, err = command("--workdir", run, "--load_state", tmp_path / "state")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "truncated" in err


def test_a_folder_of_another_library(run, command, tmp_path):
    """A folder without a tokenizer takes and writes tokens."""
    model = language_model("delta_attention")
    interop.save_pretrained(model, tmp_path / "model")
    status, out, err = command(
        "--model", tmp_path / "model", "--prompt_ids", "3,1,4", "--tokens", 4, "--temperature", 0
    )
    [want] = Generator(model).generate([[3, 1, 4]], max_tokens=4, temperature=0.0)
    assert (status, err) == (0, "")
    assert out == ",".join(map(str, [3, 1, 4, *want.tokens])) + "\n"
    status, out, err = command("--model", tmp_path / "model", "--prompt", "text")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "which has no tokenizer; expected tokens with --prompt_ids" in err
    for prompt in (("--prompt_ids", "1"), ("--prompt", "a")):
        status, out, err = command("--model", tmp_path / "nothing", *prompt)
        assert (status, out) == (2, "")
        assert err.startswith(f"generate: error: --model: got '{tmp_path}/nothing', which does not exist")


def test_tokens_that_end_a_continuation(command, tmp_path):
    """Those of the folder, unless a flag names others."""
    model, folder = language_model("delta_net"), tmp_path / "model"
    interop.save_pretrained(model, folder)
    [want] = Generator(model).generate([[3, 1, 4]], max_tokens=8, temperature=0.0)
    tokens = [3, 1, 4, *want.tokens]
    last = want.tokens[3]

    def written(*flags):
        line = ("--model", folder, "--prompt_ids", "3,1,4", "--tokens", 8, "--temperature", 0)
        status, out, err = command(*line, *flags)
        assert (status, err) == (0, "")
        return [int(token) for token in out.split(",")]

    ended = [3, 1, 4, *want.tokens[: want.tokens.index(last) + 1]]
    assert written() == tokens
    assert written("--stop_tokens", last) == ended
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [last, 10**6]}))
    assert written() == ended
    assert written("--stop_tokens", "") == tokens


def test_a_line_of_a_file_of_prompts_ends_at_its_newline(run, command, tmp_path):
    flags = ("--workdir", run, "--tokens", 4, "--temperature", 0)
    (tmp_path / "prompts").write_bytes("\ufeffthe\x0cold\r\n\nmemory\u2028x\n".encode())
    status, out, err = command(*flags, "--prompts", tmp_path / "prompts")
    assert (status, err) == (0, "")
    prompts = [("--prompt", text) for text in ("the\x0cold", "", "memory\u2028x")]
    assert out == command(*flags, *[word for prompt in prompts for word in prompt])[1]


def test_too_little_memory_is_one_line(run, command, monkeypatch):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    monkeypatch.setattr(Generator, "stream", _raising(full))
    status, out, err = command("--workdir", run, "--prompt", "this ")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--tokens: not enough memory" in err
    monkeypatch.setattr(Generator, "stream", _raising(jax.errors.JaxRuntimeError("INTERNAL: something else")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        command("--workdir", run, "--prompt", "this ")


def test_more_tokens_than_a_cache_can_have_are_one_line(command, tmp_path):
    interop.save_pretrained(language_model("delta_attention"), tmp_path / "model")
    line = ("--model", tmp_path / "model", "--prompt_ids", "1,2", "--tokens", 2**31 - 1)
    status, out, err = command(*line)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"generate: error: --tokens: got {2**31 - 1}")


def _raising(error):
    def stream(*_, **__):
        raise error

    return stream


def test_options_of_a_request_join_those_of_the_run(run):
    options = {"tokens": 20, "temperature": 0.0}
    text = "".join(generate(run, "the ", **options))
    letter = text[0]
    assert letter not in "".join(generate(run, "the ", **options, forbidden=list(letter.encode())))
    ended = "".join(generate(run, "the ", **options, stop_tokens=list(text[3].encode())))
    assert ended == text[: text.index(text[3])]
    for tokens, error, said in ((-1, ValueError, "tokens: got -1"), ("a", TypeError, "tokens: got 'a'")):
        with pytest.raises(error, match=f"^{said}, expected"):
            generate(run, tokens=tokens)
    with pytest.raises(TypeError, match="options: got max_tokens, expected tokens"):
        generate(run, max_tokens=3)


def test_a_file_of_prompts_that_is_no_text_is_one_line(run, command, tmp_path):
    for content, said in ((b"the \xff", "is not UTF-8 at byte 4"), (b"", "the empty file")):
        (tmp_path / "prompts").write_bytes(content)
        status, out, err = command("--workdir", run, "--prompts", tmp_path / "prompts")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "--prompts: got " in err
        assert said in err


def test_a_folder_with_a_tokenizer_starts_and_ends_texts_as_it_says(command, tmp_path):
    model, folder = language_model("delta_net"), tmp_path / "model"
    interop.save_pretrained(model, folder)
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: 2 + i for i, letter in enumerate("abcdefghijklmno")}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    for start, special in (([0], template), ([], None)):
        if special is not None:
            tokenizer.post_processor = special
        else:
            tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        status, out, err = command("--model", folder, "--prompt", "abba", "--tokens", 9, "--seed", 2)
        options = {"max_tokens": 9, "temperature": 0.8, "top_p": 0.95, "seed": 2, "stop_tokens": [1]}
        [want] = Generator(model).generate([[*start, 2, 3, 3, 2]], **options)
        letters = [token for token in want.tokens if token > 1]
        assert (status, err) == (0, "")
        assert out == "abba" + "".join("abcdefghijklmno"[token - 2] for token in letters) + "\n"
        status, out, err = command("--model", folder, "--tokens", 2)
        assert status == (0 if start else 2)
        if not start:
            assert err == (
                f"generate: error: --prompt: got an empty text, but the tokenizer of {folder} puts no token before "
                "a text\n"
            )

"""Texts as a harness gives them: pairs, windows, settings of a generation."""

import numpy as np
import pytest

from osdn_jax.data import load_tokenizer
from osdn_jax.evaluation.text_model import TextModel, rolling_windows
from support.text import byte_model, continued, log_likelihoods

TEXT = "To be, or not to be, that is the question: whether it is nobler"
START = 0  # of a document, of bytes


@pytest.fixture(scope="module", params=["carried", "windows"])
def model(request):
    return TextModel(*byte_model(), load_tokenizer("bytes"), max_length=24, long=request.param, batch_size=2, piece=32)


def tokens_of(text):
    return [START, *text.encode()]


def test_a_context_starts_as_a_document(model):
    assert model.encode_pair("ab ", "cd") == (tokens_of("ab"), list(b" cd"))  # blanks belong to what follows
    assert model.encode_pair("", "cd") == ([START], list(b"cd"))
    assert model.encode_pair("  ", "cd") == ([START], list(b"  cd"))
    plain = TextModel(*byte_model(), load_tokenizer("bytes"), max_length=24, start_token=False)
    assert plain.encode_pair("ab", "cd") == (list(b"ab"), list(b"cd"))
    assert plain.encode_pair("", "cd") == ([START], list(b"cd"))
    assert plain.encode_pair(" ", "cd") == ([START], list(b" cd"))


def test_scores_of_texts(model):
    """A window has 24 inputs: of a longer text the beginning is lost."""
    short, long = model.score([("To be", ", or not"), (TEXT, "!")])
    values, _ = log_likelihoods(tokens_of("To be, or not"))
    assert short.log_likelihood == pytest.approx(values[-8:].sum(), abs=1e-4)
    read = tokens_of(TEXT + "!") if model.long == "carried" else list(f"{TEXT}!".encode())[-25:]
    assert long.log_likelihood == pytest.approx(log_likelihoods(read)[0][-1], abs=1e-4)


def test_whole_texts(model):
    """Carried: one pass over the text. Windows: 24 tokens each, those of the last one after a context."""
    done = []
    found = model.score_rolling([TEXT, "", "be"], done.append)
    tokens = tokens_of(TEXT)
    if model.long == "carried":
        want = log_likelihoods(tokens)[0].sum(dtype=np.float64)
    else:
        assert len(tokens) == 64
        parts = [(tokens[:25], 24), (tokens[24:49], 24), (tokens[39:], 15)]
        want = sum(log_likelihoods(part)[0][-count:].sum(dtype=np.float64) for part, count in parts)
        assert sum(count for _, count in parts) == 63
    assert found[0] == pytest.approx(want, rel=1e-5, abs=1e-4)
    assert found[1] == 0.0
    assert found[2] == pytest.approx(log_likelihoods(tokens_of("be"))[0].sum(), abs=1e-4)
    assert sum(done) >= 2


def test_continuations_of_texts(model):
    requests = [("To be", {"until": ["\n"], "max_gen_toks": 6}), (TEXT, {"max_gen_toks": 6, "do_sample": False})]
    prompts = [tokens_of("To be"), tokens_of(TEXT) if model.long == "carried" else tokens_of(TEXT)[-18:]]
    texts = model.generate(requests)
    for text, prompt in zip(texts, prompts, strict=True):
        tokens = continued(prompt, 6)
        whole = model.tokenizer.decode(tokens[: tokens.index(0)] if 0 in tokens else tokens)
        assert text == whole.split("\n")[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs: got num_beams=4, which is not supported"),
        ({"typical_p": 0.2}, "generation_kwargs: got typical_p, which is not supported"),
        ({"max_gen_toks": 0}, "max_tokens: got 0"),
        ({"do_sample": True, "temperature": -1, "max_gen_toks": 4}, "temperature: got -1.0"),
    ],
)
def test_settings_that_cannot_be_served_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate([("a", settings)])


def test_what_does_not_fit_a_window_is_named():
    model = TextModel(*byte_model(), load_tokenizer("bytes"), max_length=8, long="windows")
    with pytest.raises(ValueError, match="pair 0: the continuation has 9 tokens, but a window 8; carry the state"):
        model.score([("a", "123456789")])
    with pytest.raises(ValueError, match="max_gen_toks: got 8, expected fewer than the 8 tokens of a window"):
        model.generate([("a", {"max_gen_toks": 8})])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length: got 1, expected at least 2"),
        ({"max_length": 8, "long": "cut"}, "long: got 'cut', expected one of 'carried', 'windows'"),
        ({"max_length": 8, "seed": -1}, "seed: got -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TextModel(*byte_model(), load_tokenizer("bytes"), **options)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 100])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 10, 11, 33])
def test_windows_have_each_token_once(count, length):
    tokens = list(range(1, count + 1))
    windows = list(rolling_windows(tokens, 0, length))
    assert [token for _, scored in windows for token in scored] == tokens
    stream = [0, *tokens]
    for context, scored in windows:
        read = [*context, *scored]
        assert len(read) - 1 <= length  # inputs
        assert context
        assert read == stream[stream.index(read[0]) : stream.index(read[0]) + len(read)]
    for context, scored in windows[1:]:  # each after the first is full
        assert len(context) + len(scored) == length + 1

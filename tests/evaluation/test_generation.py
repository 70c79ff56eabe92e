"""Continuations in batches: those of each prompt alone, up to the first stop string."""

import numpy as np
import pytest

from osdn_jax.data import load_tokenizer
from osdn_jax.evaluation.generation import BatchGenerator, Stopper
from support.text import byte_model, continued

TOKENIZER = load_tokenizer("bytes")


def prompts_of(*lengths):
    rng = np.random.default_rng(5)
    return [[0, *rng.integers(97, 123, size=n - 1).tolist()] for n in lengths]


def alone(prompt, count, rule, **mixer):
    tokens = continued(prompt, count, rule, **mixer)
    return TOKENIZER.decode(tokens[: tokens.index(0)] if 0 in tokens else tokens)


@pytest.mark.parametrize(("rule", "mixer"), [("osdn", {}), ("transformer", {"max_length": 96})])
def test_a_batch_equals_each_prompt_alone(rule, mixer):
    """Prompts are padded at their start; of one or two tokens, shorter than the convolution's window, too."""
    prompts = prompts_of(1, 2, 3, 9, 16, 17, 40)
    done = []
    generator = BatchGenerator(*byte_model(rule, **mixer), TOKENIZER, batch_size=4, piece=16)
    texts = generator.generate(prompts, max_tokens=21, progress=done.append)
    assert texts == [alone(prompt, 21, rule, **mixer) for prompt in prompts]
    assert sum(done) == len(prompts)
    assert len(set(texts)) > 1


def test_a_text_ends_before_the_first_stop_string():
    (prompt,) = prompts_of(9)
    generator = BatchGenerator(*byte_model(), TOKENIZER, batch_size=1)
    (whole,) = generator.generate([prompt], max_tokens=40)
    assert len(whole) > 8
    stop = whole[5:8]
    (text,) = generator.generate([prompt], max_tokens=40, until=["never there", stop])
    assert text == whole[: whole.index(stop)]


def test_sampling_depends_on_the_seed_and_not_on_the_batch():
    prompts = prompts_of(9, 12, 5)
    one, three = (BatchGenerator(*byte_model(), TOKENIZER, batch_size=n) for n in (1, 3))
    options = {"max_tokens": 16, "temperature": 1.0, "seed": 3}
    texts = one.generate(prompts, **options)
    assert texts == three.generate(prompts, **options)
    assert texts != one.generate(prompts, **options | {"seed": 4})


@pytest.mark.parametrize(
    ("pieces", "until", "want"),
    [
        (["ab", "c\n", "d"], ["\n"], "abc"),
        (["ab", "cd", "ef"], ["bcde"], "a"),  # over three tokens
        (["abcd"], ["cd", "bc"], "a"),  # the one that starts first
        (["a", "b"], [""], "ab"),  # an empty string stops nothing
        (["a", "b"], ["bc"], "ab"),
        (["\u00e9", "x"], ["x"], "\u00e9"),
    ],
)
def test_stop_strings(pieces, until, want):
    class Decoder:
        def push(self, token):
            return pieces[token - 1]

        def finish(self):
            return ""

    class Tokenizer:
        bos_id = 0

        def stream_decoder(self, context):
            return Decoder()

    stopper = Stopper(Tokenizer(), [0], until)
    for token in range(1, len(pieces) + 1):
        if stopper.push(token):
            break
    stopper.finish()
    assert stopper.text == want


def test_the_start_of_a_document_ends_a_text():
    stopper = Stopper(TOKENIZER, [0], [])
    assert [stopper.push(token) for token in (97, 195, 0, 98)] == [False, False, True, True]
    assert stopper.text == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1]], {"max_tokens": 0}, "max_tokens: got 0, expected at least 1"),
        ([[1], []], {}, "prompts: got an empty prompt 1"),
        ([[1]], {"temperature": -1.0}, "temperature: got -1.0"),
    ],
)
def test_wrong_arguments_are_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        BatchGenerator(*byte_model(), TOKENIZER).generate(prompts, **options)

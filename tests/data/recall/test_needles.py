"""Needles in a haystack against RULER's definition."""

import re
import uuid

import numpy as np
import pytest

from osdn_jax.data import ByteTokenizer, load_tokenizer, shakespeare
from osdn_jax.data.recall import contains, contains_accuracy, s_niah

LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PROMPT = re.compile(
    r"A special magic (\w+) is hidden within the following text\. Make sure to memorize it\. I will quiz you about the "
    r"\1 afterwards\.\n(.*)\nWhat is the special magic \1 for ([a-z]+-[a-z]+) mentioned in the provided text\? "
    r"The special magic \1 for \3 mentioned in the provided text is",
    re.DOTALL,
)
WORDS = " ".join(document.text.decode() for document in shakespeare("validation")).split()


def taken_apart(prompt):
    """(kind, context without the needle, key, text before the needle); the oracle finds the answer in the needle."""
    kind, context, key = PROMPT.fullmatch(prompt.text).groups()
    needle = re.search(rf"One of the special magic {kind}s for {key} is: (\S+)\.", context)
    assert needle[1] == prompt.answer
    assert context.count("special magic") == 1
    return kind, context[: needle.start()], context[needle.end() :], key


@pytest.mark.parametrize("length", [640, 1024, 4096])
@pytest.mark.parametrize("variant", [1, 2, 3])
def test_prompts_follow_the_template_and_fit(variant, length):
    prompts = s_niah(variant, 300, length)
    sizes = np.array([len(ByteTokenizer().encode(prompt.text, bos=True)) for prompt in prompts])
    assert sizes.max() + 128 <= length
    assert sizes.min() + 128 > length - 40 - (len(LINE) + 1 if variant == 1 else 20)  # one more would not fit
    for prompt in prompts:
        kind, before, after, _ = taken_apart(prompt)
        assert (prompt.new_tokens, prompt.stop) == (128, None)
        if variant == 3:
            assert str(uuid.UUID(prompt.answer)) == prompt.answer
            assert uuid.UUID(prompt.answer).version == 4
        else:
            assert re.fullmatch("[1-9][0-9]{6}", prompt.answer)
        assert kind == ("uuid" if variant == 3 else "number")
        if variant == 1:
            assert set((before + after.removeprefix("\n")).splitlines()) == {LINE}
            assert after.startswith("\n")
        else:
            words = (before + after).split()
            assert words == WORDS[: len(words)]
            assert not before or not after or re.search(r"[.!?][\"')\]]*\s?$", before)


def test_places_are_spread():
    first = [len(taken_apart(prompt)[1]) for prompt in s_niah(1, 2000, 2048)]
    counts = np.unique(first, return_counts=True)[1]
    assert len(counts) in (15, 16, 17)  # a line of the haystack each
    assert counts.min() > 0.5 * 2000 / len(counts)
    ends = [[len(re.findall(r"[.!?][\"')\]]* ", part)) for part in taken_apart(p)[1:3]] for p in s_niah(2, 2000, 8192)]
    shares = np.array([before / (before + after) for before, after in ends])  # in sentences
    np.testing.assert_allclose(np.quantile(shares, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04)
    assert len(np.unique(np.round(shares, 2))) == 40
    assert shares.min() == 0
    assert shares.max() == 1


def test_keys_and_values_differ():
    prompts = s_niah(1, 500, 1024, seed=3)
    assert len({prompt.answer for prompt in prompts}) == 500
    assert len({taken_apart(prompt)[3] for prompt in prompts}) > 450
    assert prompts == s_niah(1, 500, 1024, seed=3)
    assert prompts != s_niah(1, 500, 1024, seed=4)


def test_another_tokenizer_and_text(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    text = "One fish. Two fish! Red fish? Blue fish. " * 200
    prompts = s_niah(2, 50, 600, tokenizer=tokenizer, text=text, answer_tokens=20)
    sizes = [len(tokenizer.encode(prompt.text, bos=True)) for prompt in prompts]
    assert 560 < max(sizes) + 20 <= 600
    for prompt in prompts:
        _, before, after, _ = taken_apart(prompt)
        assert (before + after).split() == text.split()[: len((before + after).split())]
    short = s_niah(3, 2, 100_000, text="One fish. Two")
    assert all("".join(taken_apart(prompt)[1:3]).split() == ["One", "fish.", "Two"] for prompt in short)


def test_the_score():
    prompts = s_niah(1, 4, 1024)
    right = [f" {prompt.answer}." for prompt in prompts]
    assert contains_accuracy(prompts, right) == 1
    assert contains_accuracy(prompts, [*right[:3], "0000000"]) == 0.75
    assert contains("IT IS A.C?", "a.c?")
    assert not contains("abc", "a.c")
    with pytest.raises(ValueError, match="outputs: got 3 for 4 prompts, expected one for each"):
        contains_accuracy(prompts, right[:3])
    with pytest.raises(ValueError, match="outputs: got 0 for 0 prompts"):
        contains_accuracy([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": 4}, "variant: got 4, expected 1, 2 or 3"),
        ({"length": 200}, "length: got 200, expected at least 5[0-9][0-9] with this tokenizer"),
        ({"variant": 2, "text": " \n"}, "text: got nothing but blanks, expected words"),
        ({"examples": 0}, "examples: got 0, expected at least 1"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        s_niah(**({"variant": 1, "examples": 2, "length": 1024} | arguments))
    with pytest.raises(TypeError, match="^text: got bytes, expected a str or None$"):
        s_niah(2, 2, 1024, text=b"bytes")

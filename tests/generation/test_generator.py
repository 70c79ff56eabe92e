"""The generator: stop strings and tokens, limits per row, streams, states given back to it, and errors of arguments."""

import functools

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from osdn_jax import nn
from osdn_jax.data import load_tokenizer
from osdn_jax.generation import Chunk, Generator, Stopper
from osdn_jax.nn import split_model
from support.continuations import language_model, prompts
from support.models import SHAPES, VOCABULARY
from support.text import byte_model, continued

TOKENIZER = load_tokenizer("bytes")


@functools.cache
def of_text():
    return Generator(byte_model(), TOKENIZER, piece=16)


@functools.cache
def of_tokens():
    return Generator(language_model("delta_net"), piece=16)


def text_of(tokens):
    return TOKENIZER.decode(tokens)


def test_texts_start_a_document_and_end_where_the_next_one_starts():
    [found] = of_text().generate(["sand"], max_tokens=20, temperature=0.0)
    tokens = continued([0, *b"sand"], 20)
    assert found.tokens == (tokens[: tokens.index(0) + 1] if 0 in tokens else tokens)
    assert found.text == text_of([token for token in found.tokens if token])
    [forced] = of_text().generate(["sand"], max_tokens=5, temperature=0.0, forbidden=range(1, 256))
    assert (forced.tokens, forced.text, forced.finish) == ([0], "", "stop_token")
    [further] = of_text().generate(["sand"], max_tokens=5, temperature=0.0, forbidden=range(1, 256), stop_tokens=())
    assert (further.tokens, further.finish) == ([0] * 5, "length")
    other = Generator(byte_model(), TOKENIZER, start_tokens=(), stop_tokens=[97], piece=16)
    tokens = other.generate([b"sand"[:1].decode()], max_tokens=5, temperature=0.0)[0].tokens
    assert tokens == continued([*b"s"], 5)[: len(tokens)]


def test_a_text_ends_before_a_stop_string_wherever_it_lies():
    options = {"max_tokens": 30, "temperature": 1.0, "forbidden": [0], "seed": 3}
    [whole] = of_text().generate(["sand"], **options)
    assert len(whole.text) > 12
    stop = whole.text[7:10]
    [short] = of_text().generate(["sand"], stop=["never there", stop], **options)
    assert (short.text, short.finish) == (whole.text[: whole.text.index(stop)], "stop_string")
    assert whole.tokens[: len(short.tokens)] == short.tokens
    assert text_of(short.tokens).endswith(stop)
    assert of_text().generate(["sand"], stop=stop, **options) == [short]
    # The other rows of the batch continue.
    rows = of_text().generate(["sand", "sand", "water"], stop=stop, **options | {"seed": [3, 4, 5]})
    apart = [of_text().generate([p], stop=stop, **options | {"seed": s})[0] for p, s in (("sand", 4), ("water", 5))]
    assert rows == [short, *apart]


def test_a_stream_yields_every_token_and_no_part_of_a_stop_string():
    options = {"max_tokens": 40, "temperature": 1.0, "forbidden": [0], "seed": [3, 9]}
    texts = ["sand", "a longer prompt than the other"]
    whole = of_text().generate(texts, **options)
    stop = whole[0].text[7:10]
    results = of_text().generate(texts, stop=stop, **options)
    chunks = list(of_text().stream(texts, stop=stop, **options))
    assert all(type(chunk) is Chunk for chunk in chunks)
    for row, result in enumerate(results):
        mine = [chunk for chunk in chunks if chunk.prompt == row]
        assert [chunk.token for chunk in mine] == result.tokens
        assert "".join(chunk.text for chunk in mine) == result.text
        assert [chunk.finish for chunk in mine] == [None] * (len(mine) - 1) + [result.finish]
        so_far = ""
        for chunk in mine:
            so_far += chunk.text
            assert stop not in so_far
    assert results[0].finish == "stop_string"


@pytest.mark.parametrize(
    ("pieces", "until", "want"),
    [
        (["ab", "c\n", "d"], ["\n"], ["ab", "c"]),
        (["ab", "cd", "ef"], ["bcde"], ["a", "", ""]),  # over three tokens
        (["ab", "cd", "xf"], ["bcde"], ["a", "", "bcdxf"]),  # not after all
        (["aa", "ab", "b"], ["ab"], ["a", "a"]),
        (["xx", "yy"], [], ["xx", "yy"]),
    ],
)
def test_text_that_may_become_a_stop_string_is_held_back(pieces, until, want):
    class Decoder:
        def push(self, token):
            return pieces[token - 1]

        def finish(self):
            return ""

    class Tokenizer:
        bos_id = 0

        def stream_decoder(self, context):
            return Decoder()

    stopper, taken = Stopper(Tokenizer(), [0], until), []
    for token in range(1, len(pieces) + 1):
        stopper.push(token)
        taken.append(stopper.take())
        if stopper.done:
            break
    assert taken == want


def test_limits_and_stop_tokens_are_those_of_each_row():
    texts = prompts(3, 7, 1, 5)
    whole = of_tokens().generate(texts, max_tokens=12, temperature=0.0)
    limits = [0, 3, 12, 1]
    found = of_tokens().generate(texts, max_tokens=limits, temperature=0.0)
    assert [row.tokens for row in found] == [row.tokens[:n] for row, n in zip(whole, limits, strict=True)]
    assert {row.finish for row in found} == {"length"}
    end = whole[1].tokens[2]
    found = of_tokens().generate(texts, max_tokens=12, temperature=0.0, stop_tokens=[end])
    for row, all_of_it in zip(found, whole, strict=True):
        count = all_of_it.tokens.index(end) + 1 if end in all_of_it.tokens else 12
        assert row.tokens == all_of_it.tokens[:count]
        assert (row.finish == "stop_token") == (end in all_of_it.tokens)
    assert of_tokens().generate([], max_tokens=3) == []
    assert list(of_tokens().stream(texts[:1], max_tokens=0)) == [Chunk(0, None, "", "length")]


def test_progress_counts_the_prompts_as_they_end():
    done = []
    of_tokens().generate(prompts(3, 7, 1), max_tokens=[4, 0, 2], progress=done.append)
    assert done == [1, 1, 1]


def test_a_state_is_continued_by_one_row_or_by_each():
    texts, more = prompts(9, 9, 4), prompts(3, 3, 3, seed=8)
    options = {"max_tokens": 6, "seed": [5, 6, 7]}
    state = of_tokens().prefill(texts)
    whole = of_tokens().generate([a + b for a, b in zip(texts, more, strict=True)], **options)
    assert of_tokens().generate(more, state=state, **options) == whole
    assert of_tokens().generate(more, state=state, **options) == whole  # the state is as it was
    further = of_tokens().prefill(more, state=state)
    assert of_tokens().generate([[], [], []], state=further, **options) == whole
    # One state, and prompts of any lengths after it.
    several = prompts(1, 8, 3, seed=9)
    want = of_tokens().generate([texts[0] + text for text in several], **options)
    assert of_tokens().generate(several, state=of_tokens().prefill(texts[:1]), **options) == want


def test_a_pair_is_the_same_model():
    model = language_model("delta_attention")
    texts, options = prompts(3, 20), {"max_tokens": 5, "seed": 2}
    got = Generator(split_model(model), piece=16).generate(texts, **options)
    assert got == Generator(model, piece=16).generate(texts, **options)


def test_parameters_may_come_after_the_programs():
    apply, parameters = byte_model()
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in parameters.items()}
    late = Generator((apply, shapes), TOKENIZER, piece=16, token_by_token=64)
    for texts in (["sand"], ["sand", "a longer one, read in several pieces"]):
        options = {"max_tokens": 6, "seed": 3}
        late.parameters = shapes
        late.compile(texts, **options)
        compiled = late.compilations
        late.parameters = parameters
        assert late.generate(texts, **options) == of_text().generate(texts, **options)
        assert late.compilations == compiled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "text"}, "prompts: got str, expected a sequence of prompts"),
        ({"prompts": [[1], []]}, "prompts.1.: got no tokens, expected at least one"),
        ({"prompts": [[1, VOCABULARY]]}, f"prompts.0.: got token {VOCABULARY}, expected tokens of the vocabulary"),
        ({"prompts": [[0.5]]}, "prompts.0.: got float64 of shape .1., expected integers"),
        ({"prompts": ["text"]}, "prompts: got text at 0 without a tokenizer, expected tokens"),
        ({"max_tokens": -1}, "max_tokens: got -1, expected an integer from 0"),
        ({"max_tokens": 1.5}, "max_tokens: got 1.5, expected an integer"),
        ({"max_tokens": [1, 2, 3]}, "max_tokens: got 3 values for 2 prompts"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": [0.1, "hot"]}, "temperature: got 'hot', expected a number"),
        ({"top_k": -2}, "top_k: got -2"),
        ({"top_p": 0}, "top_p: got 0.0, expected more than 0"),
        ({"min_p": 1.5}, "min_p: got 1.5, expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0.0, expected a number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: got nan"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"seed": [1]}, "seed: got 1 values for 2 prompts"),
        ({"forbidden": [VOCABULARY]}, f"forbidden: got token {VOCABULARY}"),
        ({"forbidden": range(VOCABULARY)}, f"forbidden: got all {VOCABULARY} tokens"),
        ({"forbidden": 3}, "forbidden: got 3, expected a sequence of tokens"),
        ({"stop_tokens": [-1]}, "stop_tokens: got token -1"),
        ({"stop": "."}, "stop: got strings without a tokenizer, expected stop_tokens"),
        ({"stop": [1]}, "stop: got 1, expected strings"),
        ({"state": "here"}, "state: got str, expected a GenerationState"),
        ({"temprature": 1}, "options: got temprature, expected some of max_tokens, temperature"),
    ],
)
def test_wrong_arguments_are_named_by_the_call(changes, message):
    given = {"prompts": [[1, 2], [3]]} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        of_tokens().stream(given.pop("prompts"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model: got int, expected an nn.CausalLM or"),
        ({"piece": 24}, "piece: got 24, expected a power of two of at least 16"),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"state_dtype": "float16"}, "state_dtype: got float16, expected 'float32', 'bfloat16' or None"),
        ({"state_dtype": "narrow"}, "state_dtype: got 'narrow'"),
        ({"tokenizer": "bytes"}, "tokenizer: got str without stream_decoder, expected a tokenizer"),
        ({"stop_tokens": [VOCABULARY]}, "stop_tokens: got token"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    given = {"model": language_model("delta_net")} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        Generator(given.pop("model"), **given)


def test_progress_that_is_no_function_is_named_before_anything_runs():
    with pytest.raises(TypeError, match="progress: got 5, expected a function"):
        of_tokens().generate([[1]], progress=5)


def test_states_of_another_model_or_number_are_refused():
    state = of_tokens().prefill(prompts(3, 4))
    with pytest.raises(ValueError, match="state: got one of 2 texts for 3 prompts, expected 1 or 3"):
        of_tokens().generate(prompts(1, 1, 1), state=state)
    with pytest.raises(ValueError, match="prompts: got 1, 2 tokens after a state, expected equal numbers of tokens"):
        of_tokens().prefill(prompts(1, 2), state=state)
    with pytest.raises(ValueError, match="state: got .* at blocks.*: it is the state of another model"):
        Generator(language_model("osdn"), piece=16).generate(prompts(1, 1), state=state)
    with pytest.raises(ValueError, match=f"state: got one of a model with {VOCABULARY} vocabulary entries"):
        of_text().generate(["a", "b"], state=state)
    with pytest.raises(ValueError, match="prompts: got none, expected at least one"):
        of_tokens().prefill([])


def test_logits_that_are_none_name_the_token_and_the_prompt():
    model = language_model("delta_net")
    apply, parameters = split_model(model)
    broken = parameters | {"head/kernel": parameters["head/kernel"] * np.float32(np.nan)}
    with pytest.raises(ValueError, match="token 0 of prompt 0 cannot be drawn: the model's logits are NaN"):
        Generator((apply, broken), piece=16).generate(prompts(3), max_tokens=2)


def test_text_after_a_state_is_that_without_one(tmp_path):
    """A tokenizer whose tokens carry the blank before them writes none before the first token of a text."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "▁sand": 1, "▁sea": 2}, unk_token="<s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    words.decoder = tokenizers.decoders.Metaspace()
    words.add_special_tokens(["<s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    model = Generator(language_model("delta_net"), load_tokenizer(tmp_path), piece=16)
    options = {"max_tokens": 3, "forbidden": [0, 1], "stop_tokens": ()}
    [whole] = model.generate(["sand"], **options)
    assert (whole.tokens, whole.text) == ([2, 2, 2], " sea sea sea")
    assert model.generate([[]], state=model.prefill(["sand"]), **options) == [whole]
    both = model.prefill(["sand", ""])
    assert [row.text for row in model.generate([[], []], state=both, **options)] == [whole.text, whole.text.lstrip()]
    [stopped] = model.generate([[]], state=model.prefill(["sand"]), stop=" sea", **options)
    assert (stopped.text, stopped.finish) == ("", "stop_string")


def test_texts_longer_than_a_cache_depend_on_nothing_else():
    """Neither on a longer neighbour nor on the size of pieces: (apply, parameters) have caches of a fixed size."""
    block = nn.BlockConfig(nn.AttentionConfig(**SHAPES, max_length=16), nn.MLPConfig(10))
    pair = split_model(nn.CausalLM(nn.ModelConfig(VOCABULARY, blocks=(block,) * 3), rngs=nnx.Rngs(0)))
    text, longer = prompts(40, 61)
    want = np.asarray(Generator(pair, piece=16).logits(Generator(pair, piece=16).prefill([text])))
    for piece, texts in ((64, [text]), (64, [text, longer]), (32, [text, longer])):
        generator = Generator(pair, piece=piece)
        np.testing.assert_allclose(np.asarray(generator.logits(generator.prefill(texts)))[:1], want, atol=1e-5)
    cache = generator.prompt_cache(text, keep_every=10)
    np.testing.assert_allclose(np.asarray(generator.logits(cache.state)), want, atol=1e-5)
    [alone], both = (generator.generate(texts, max_tokens=5, temperature=0.0) for texts in ([text], [text, longer]))
    assert both[0].tokens == alone.tokens

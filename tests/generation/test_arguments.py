"""Wrong arguments of generation: every error is one line that names the argument, what came and what was expected."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from osdn_jax.data import load_tokenizer
from osdn_jax.generation import Generator, Stopper
from osdn_jax.nn import MESH_AXES, split_model
from osdn_jax.sampling import Sampler
from support.continuations import language_model, prompts
from support.models import VOCABULARY
from support.text import byte_model

TOKENIZER = load_tokenizer("bytes")


@functools.cache
def of_text():
    return Generator(byte_model(), TOKENIZER, piece=16)


@functools.cache
def generator(name="delta_net"):
    return Generator(language_model(name), piece=16)


@functools.cache
def state(name="delta_attention"):
    return generator(name).prefill(prompts(3, 7))


def refused(message, call, *args, **kwargs):
    """Check that a call raises one error with this message, and say of which type."""
    with pytest.raises((ValueError, TypeError)) as raised:
        call(*args, **kwargs)
    text = str(raised.value)
    assert "\n" not in text
    assert re.search(message, text), text
    return type(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": 5}, "^stop: got 5, expected a string or a sequence of strings$"),
        ({"stop": None}, "^stop: got None, expected a string or a sequence of strings$"),
        ({"stop": b"end"}, "^stop: got b'end', expected a string or a sequence of strings$"),
        ({"stop": {"a": 1}}, "^stop: got {'a': 1}, expected a string or a sequence of strings$"),
        ({"temperature": [[1], [1, 2]]}, r"^temperature: got \[1\], expected a number$"),
        ({"temperature": np.ones((2, 1))}, r"^temperature: got array\(\[1.\]\), expected a number$"),
        ({"top_p": np.ones(2, bool)}, "^top_p: got np.True_, expected a number$"),
        ({"max_tokens": [[1], [1, 2]]}, r"^max_tokens: got \[1\], expected an integer$"),
        ({"seed": [[1], [2, 3]]}, r"^seed: got \[1\], expected an integer$"),
        ({"seed": np.asarray([[1], [2]])}, r"^seed: got array\(\[1\]\), expected an integer$"),
        ({"prompts": [[1], [[1, 2], [3]]]}, r"^prompts\[1\]: got \[1, 2\], expected an integer$"),
        ({"prompts": [[1], [10**30]]}, r"^prompts\[1\]: got token 1000000000000000000000000000000, expected tokens of"),
        ({"prompts": [[1], [2**63, -1]]}, r"^prompts\[1\]: got token 9223372036854775808, expected tokens of"),
        ({"prompts": [[1], [None]]}, r"^prompts\[1\]: got None, expected an integer$"),
        ({"prompts": [[1], 5]}, r"^prompts\[1\]: got 5, expected integers \[T\]$"),
        ({"prompts": [[1], {2, 3}]}, r"^prompts\[1\]: got {2, 3}, expected integers \[T\]$"),
        ({"prompts": [[1], [[]]]}, r"^prompts\[1\]: got \[\], expected an integer$"),
        ({"prompts": np.asarray(5)}, "^prompts: got ndarray, expected a sequence of prompts$"),
        ({"forbidden": {3: 1}}, "^forbidden: got {3: 1}, expected a sequence of tokens$"),
        ({"forbidden": np.asarray(3)}, r"^forbidden: got array\(3\), expected a sequence of tokens$"),
        ({"stop_tokens": [10**30]}, "^stop_tokens: got token 1000000000000000000000000000000, expected tokens of"),
    ],
)
def test_options_and_prompts(changes, message):
    given = {"prompts": [[1, 2], [3]]} | changes
    refused(message, generator().stream, given.pop("prompts"), **given)


def test_values_for_each_prompt_may_be_arrays():
    texts, options = prompts(3, 4), {"max_tokens": 4}
    want = generator().generate(texts, temperature=[0.5, 0.7], seed=[3, 9], **options)
    arrays = {"temperature": jnp.asarray([0.5, 0.7]), "seed": jnp.asarray([3, 9], jnp.uint32)}
    assert generator().generate(texts, **arrays, **options) == want
    one = generator().generate(texts, temperature=0.5, **options)
    assert generator().generate(texts, temperature=np.asarray(0.5), **options) == one


def test_texts_that_cannot_be_encoded_are_named():
    message = r"^prompts\[1\]: text must be valid Unicode; unpaired surrogate at character 0$"
    refused(message, of_text().stream, ["sand", "\ud800"])
    refused(r"^prompts\[0\]: ", of_text().prefill, ["\0"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_by_token": "a"}, "^token_by_token: got 'a', expected an integer$"),
        ({"token_by_token": None}, "^token_by_token: got None, expected an integer$"),
        ({"token_by_token": 1.5}, "^token_by_token: got 1.5, expected an integer$"),
        ({"token_by_token": -1}, "^token_by_token: got -1, expected an integer from 0 to 64$"),
        ({"token_by_token": 65}, "^token_by_token: got 65, expected an integer from 0 to 64$"),
        ({"state_dtype": np.ones(1)}, r"^state_dtype: got array\(\[1.\]\), expected 'float32', 'bfloat16' or None$"),
        ({"start_tokens": 5}, r"^start_tokens: got 5, expected integers \[T\]$"),
        ({"start_tokens": [[1, 2], [3]]}, r"^start_tokens: got \[1, 2\], expected an integer$"),
        ({"stop_tokens": 5}, "^stop_tokens: got 5, expected a sequence of tokens$"),
        ({"tokenizer": type(TOKENIZER)}, "^tokenizer: got the class ByteTokenizer, expected a tokenizer$"),
        ({"tokenizer": "bytes"}, "^tokenizer: got str without stream_decoder, expected a tokenizer$"),
        ({"model": (lambda: 0, {})}, "^model: got a pair without an unembedding, expected .*split_model.*'method'$"),
        ({"model": (lambda *_, **__: jnp.ones(3), {})}, "^model: got a pair whose unembedding is no matrix, expected"),
    ],
)
def test_settings_of_a_generator(changes, message):
    given = {"model": language_model("delta_net")} | changes
    refused(message, Generator, given.pop("model"), **given)


def test_a_start_token_outside_the_vocabulary_is_the_tokenizers():
    class Tokenizer(type(TOKENIZER)):
        bos_id = VOCABULARY

    message = f"^tokenizer.bos_id: got token {VOCABULARY}, expected tokens of the vocabulary"
    refused(message, Generator, language_model("delta_net"), Tokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"until": 5}, "^until: got 5, expected a string or a sequence of strings$"),
        ({"until": [5]}, "^until: got 5, expected strings$"),
        ({"tokenizer": None}, "^tokenizer: got NoneType without stream_decoder, expected a tokenizer$"),
        ({"prompt": 5}, r"^prompt: got 5, expected integers \[T\]$"),
        ({"prompt": [-1]}, "^prompt: got token -1, expected tokens of the vocabulary"),
        ({"stop_tokens": 5}, "^stop_tokens: got 5, expected a sequence of tokens$"),
        ({"stop_tokens": ["a"]}, "^stop_tokens: got 'a', expected an integer$"),
    ],
)
def test_arguments_of_a_stopper(changes, message):
    refused(message, Stopper, *({"tokenizer": TOKENIZER, "prompt": [0], "until": []} | changes).values())


def test_one_stop_string_is_not_its_characters():
    stopper = Stopper(TOKENIZER, [0], "nd")
    assert [stopper.push(token) for token in b"don't stand"] == [False] * 10 + [True]
    assert stopper.text == "don't sta"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "^path: got '', expected the path of a file$"),
        (Path(), "^path: got '.', expected the path of a file$"),
        ("a\0b", r"^path: got 'a\\x00b', expected the path of a file$"),
        (None, "^path: got NoneType, expected the path of a file$"),
        (5, "^path: got int, expected the path of a file$"),
        (b"state", "^path: got bytes, expected the path of a file$"),
    ],
)
def test_paths_of_states(path, message):
    assert refused(message, generator("delta_attention").save_state, path, state()) is refused(
        message, generator("delta_attention").load_state, path
    )


def test_arguments_of_a_sampler():
    model, prompt, options = split_model(language_model("delta_net")), np.asarray([1]), {"tokens": 2, "seed": 0}
    refused("^token_by_token: got 65, expected", Sampler, *model, prompt, **options, token_by_token=65)
    refused("^token_by_token: got 'a', expected", Sampler, *model, prompt, **options, token_by_token="a")
    refused(r"^prompt: got \[1, 2\], expected an integer$", Sampler, *model, [[1, 2], [3]], **options)
    refused(r"^prompt: got None, expected integers \[T\]$", Sampler, *model, None, **options)


LENGTH = jnp.asarray([3, 7], jnp.int32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": jnp.asarray([3, 7, 7], jnp.int32)}, r"^state.length: got shape \[3\], expected .* of 2 tokens$"),
        ({"length": jnp.int32(3)}, r"^state.length: got shape \[\], expected integers \[B\] with"),
        ({"length": -LENGTH}, "^state.length: got -3, expected an integer from 1 to "),
        ({"length": LENGTH.at[1].set(2**31 - 1)}, "^state.length: got 2147483647, expected an integer from 1 to "),
        ({"length": LENGTH.astype(jnp.float32)}, r"^state.length: got dtype float32, expected integers \[B\]$"),
        ({"length": None}, r"^state.length: got None, expected an array of integers \[B\]$"),
        ({"token": jnp.asarray([1, 5000], jnp.int32)}, "^state.token: got token 5000, expected tokens of the vocab"),
        ({"token": jnp.asarray([1, -1], jnp.int32)}, "^state.token: got token -1, expected tokens of the vocabulary"),
        ({"token": jnp.asarray([1.0, 2.0])}, r"^state.token: got dtype float32, expected integers \[B\]$"),
        ({"token": jnp.int32(1)}, r"^state.token: got shape \[\], expected integers \[B\]$"),
        ({"token": [1, 2]}, r"^state.token: got \[1, 2\], expected an array of integers \[B\]$"),
        ({"token": None}, r"^state.token: got None, expected an array of integers \[B\]$"),
        ({"seen": None}, r"^state.seen: got None, expected an array of booleans \[B, vocabulary\]$"),
        ({"seen": jnp.zeros((2, VOCABULARY))}, "^state.seen: got dtype float32, expected booleans"),
        ({"seen": jnp.zeros(2, bool)}, r"^state.seen: got shape \[2\], expected booleans"),
        ({"blocks": None}, r"^state: got nothing at blocks.*, expected an array"),
    ],
)
@pytest.mark.parametrize("call", ["stream", "prefill", "logits", "save_state"])
def test_fields_of_a_state(fields, message, call, tmp_path):
    wrong = state()._replace(**fields)
    calls = {
        "stream": lambda: generator("delta_attention").stream([[1], [2]], state=wrong),
        "prefill": lambda: generator("delta_attention").prefill([[1], [2]], state=wrong),
        "logits": lambda: generator("delta_attention").logits(wrong),
        "save_state": lambda: generator("delta_attention").save_state(tmp_path / "state", wrong),
    }
    refused(message, calls[call])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": None}, r"got nothing at .*\.position, expected an array"),
        ({"position": "a"}, r"got a str at .*\.position, expected an array"),
        ({"position": jnp.float32(3)}, r"got an array \(floating-point\) of shape \[\] at .*\.position, .*int32"),
        ({"position": jnp.zeros(2, jnp.int32)}, r"got an array \(int32\) of shape \[2\] at .*\.position, expected"),
        ({"start": jnp.zeros((2, 1), jnp.int32)}, r"got an array \(int32\) of shape \[2, 1\] at .*\.start, expected"),
        ({"keys": jnp.zeros((2, 2, 16, 4), jnp.int32)}, r"got an array \(int32\) of shape .*\.keys, expected .*float"),
    ],
)
def test_attention_caches_of_a_state(fields, message):
    blocks = list(state().blocks)
    blocks[1] = blocks[1]._replace(**fields)
    refused(message, generator("delta_attention").stream, [[1], [2]], state=state()._replace(blocks=tuple(blocks)))


def test_integers_of_a_state_may_be_of_any_width():
    wide = state()._replace(token=np.asarray(state().token, np.int64), length=np.asarray(state().length, np.uint8))
    texts, options = [[1], [2]], {"max_tokens": 3}
    want = generator("delta_attention").generate(texts, state=state(), **options)
    assert generator("delta_attention").generate(texts, state=wide, **options) == want
    long = state()._replace(length=np.asarray([3, 2**31 - 1], np.int32))
    refused(r"^state.length: got 2147483647, expected", generator("delta_attention").prefill, texts, state=long)
    recurrent = generator().prefill([[3, 1]])
    after = generator().prefill([[4]], state=recurrent._replace(length=np.asarray([2**31 - 1], np.int32)))
    assert after.length.tolist() == [2**31 - 1]


def test_continuations_that_no_cache_has_room_for():
    message = f"^max_tokens: got {2**31 - 1}, expected at most {3 * 2**29 - 7} with attention after this text$"
    refused(message, generator("delta_attention").stream, prompts(7), max_tokens=2**31 - 1)
    refused("expected at most [0-9]+ with attention", generator("attention").stream, [[1], [2]], max_tokens=3 * 2**29)
    generator().stream(prompts(7), max_tokens=2**31 - 1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_under_a_mesh(kind):
    model = language_model("delta_net")
    cache = generator().prompt_cache(prompts(20)[0], keep_every=8)
    kept, message = generator().prefill([[3, 1]]), "^generation: got a call under jax.set_mesh of a mesh .data, fsdp,"
    sampler = Sampler(*split_model(model), np.asarray([1]), tokens=2, seed=0)
    with jax.set_mesh(jax.make_mesh((1, 1, 1, 1), MESH_AXES, (kind,) * 4)):
        refused(message, Generator, model, piece=16)
        refused(message, generator().stream, [[1]])
        refused(message, generator().prefill, [[1]])
        refused(message, generator().compile, [[1]])
        refused(message, generator().prompt_cache, [1])
        refused(message, generator().logits, kept)
        refused(message, cache.at, 5)
        refused(message, Sampler, *split_model(model), np.asarray([1]), tokens=2, seed=0)
        refused(message, list, sampler.draw(split_model(model)[1]))
    with jax.set_mesh(jax.make_mesh((1,), ("rows",), (kind,))):
        assert len(generator().generate([[1]], max_tokens=2)[0].tokens) == 2

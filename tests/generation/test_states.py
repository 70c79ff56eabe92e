"""States that are kept: prompt caches, files, caches of other sizes, and bfloat16."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax.generation import Generator, PromptCache, state_files
from osdn_jax.generation.states import fit_caches
from osdn_jax.interop import safetensors
from osdn_jax.nn import split_model
from osdn_jax.nn.attention import AttentionState
from support import relative_error
from support.continuations import language_model, logits_after, prompts
from support.models import VOCABULARY, model_config, parameters_of

[PROMPT] = prompts(37)
OPTIONS = {"max_tokens": 6, "seed": 3}


@functools.cache
def generator(name):
    return Generator(language_model(name), piece=16)


@functools.cache
def cache(name):
    return generator(name).prompt_cache(PROMPT, keep_every=8)


@pytest.mark.parametrize("name", ["osdn", "delta_attention", "window"])
def test_generation_starts_at_any_token_of_a_prompt(name, tmp_path):
    """Also after the cache was saved and loaded; bit for bit."""
    path = tmp_path / "prompt.safetensors"
    generator(name).save_state(path, cache(name))
    loaded = generator(name).load_state(path)
    assert isinstance(loaded, PromptCache)
    assert loaded.tokens.tolist() == PROMPT
    assert loaded.number_of_bytes == cache(name).number_of_bytes
    places = (1, 9, 12, 37)
    got = [np.asarray(generator(name).logits(cache(name).at(token)))[0] for token in places]
    assert relative_error(got, logits_after(name, [PROMPT[:token] for token in places])) < 1e-5
    for token, logits in zip(places, got, strict=True):
        np.testing.assert_array_equal(generator(name).logits(loaded.at(token))[0], logits)
    [want] = generator(name).generate([PROMPT[:20] + [3, 1]], **OPTIONS)
    assert generator(name).generate([[3, 1]], state=loaded.at(20), **OPTIONS) == [want]
    assert generator(name).generate([[]], state=loaded.state, **OPTIONS) == generator(name).generate(
        [PROMPT], **OPTIONS
    )


def test_kept_states_share_one_attention_cache():
    recurrent, hybrid = cache("osdn"), cache("delta_attention")
    assert sorted(recurrent.kept) == [0, 8, 16, 24, 32]
    sizes = {token: sum(x.size for x in jax.tree.leaves(blocks)) for token, blocks in hybrid.kept.items()}
    assert len(set(sizes.values())) == 1
    caches = [x for x in jax.tree.leaves(hybrid.last) if x.ndim == 4 and x.shape[2] >= len(PROMPT)]
    assert len(caches) == 2  # keys and values, at the end alone
    assert all(x.shape[2] < len(PROMPT) for x in jax.tree.leaves(hybrid.kept) if x.ndim == 4)


def test_a_saved_state_continues_the_same(tmp_path):
    name = "delta_attention"
    path = tmp_path / "state.safetensors"
    state = generator(name).prefill(prompts(3, 20, 1))
    generator(name).save_state(path, state)
    loaded = generator(name).load_state(path)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)
    options = OPTIONS | {"repetition_penalty": 3.0}
    assert generator(name).generate([[]] * 3, state=loaded, **options) == generator(name).generate(
        prompts(3, 20, 1), **options
    )


def rewritten(path, change):
    """Change the JSON header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("states") / "state.safetensors"
    model = Generator(parameters_of(model_config("delta_net")), piece=16)
    model.save_state(path, model.prefill(prompts(3)))
    return path.read_bytes()


@pytest.fixture
def small():
    return Generator(parameters_of(model_config("delta_net")), piece=16)


@pytest.mark.parametrize("end", [0, 5, 100, -1])
def test_a_truncated_file_is_one_error(saved, small, tmp_path, end):
    path = tmp_path / "state.safetensors"
    path.write_bytes(saved[:end])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
        small.load_state(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.pop("format"), "got a file of the format None, expected 'osdn-jax generation state 1'"),
        (lambda about: about.pop("about"), "the state is malformed: KeyError: 'about'"),
        (lambda about: about.pop("checksum"), "the state is malformed: KeyError: 'checksum'"),
        (lambda about: about.update(about="{}"), r"the state is malformed: .* differs from what was written"),
        (lambda about: about.update(model_config="0"), "of a model of another configuration, expected one of this"),
    ],
)
def test_a_malformed_file_is_one_error(saved, small, tmp_path, change, message):
    path = tmp_path / "state.safetensors"
    path.write_bytes(saved)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        small.load_state(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(about="{}"), "the state is malformed: KeyError: 'rows'"),
        (lambda about: about.update(about="{"), "the state is malformed: JSONDecodeError"),
        (
            lambda about: about.update(about=about["about"].replace('"rows":1', '"rows":2')),
            "the state of another model",
        ),
    ],
)
def test_malformed_content_is_one_error(saved, small, tmp_path, monkeypatch, change, message):
    """With a checksum that fits."""
    path = tmp_path / "state.safetensors"
    path.write_bytes(saved)
    rewritten(path, change)
    monkeypatch.setattr(state_files, "_checksum", lambda *_: safetensors.read_header(path).metadata["checksum"])
    with pytest.raises(ValueError, match=message):
        small.load_state(path)


def test_no_changed_byte_is_loaded(saved, small, tmp_path):
    """Flip one bit in each of a sample of the bytes of header and tensors."""
    path = tmp_path / "state.safetensors"
    for place in range(0, len(saved), max(1, len(saved) // 150)):
        changed = bytearray(saved)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
            small.load_state(path)


def test_the_state_of_another_model_is_refused(saved, tmp_path):
    path = tmp_path / "state.safetensors"
    path.write_bytes(saved)
    apply, parameters = parameters_of(model_config("delta_net"), seed=1)
    with pytest.raises(ValueError, match="of a model with other weights, expected one of this model"):
        Generator((apply, parameters), piece=16).load_state(path)
    with pytest.raises(ValueError, match="of a model whose parameters have other names or shapes"):
        Generator(parameters_of(model_config("gla")), piece=16).load_state(path)
    path = tmp_path / "rule.safetensors"
    generator("delta_attention").save_state(path, generator("delta_attention").prefill(prompts(3)))
    model = language_model("delta_attention")
    other = model.with_config(dataclasses.replace(model.config, norm_epsilon=1e-5))
    with pytest.raises(ValueError, match="of a model of another configuration, expected one of this model"):
        Generator(other, piece=16).load_state(path)


def test_a_write_that_fails_leaves_the_old_file(saved, small, tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    path.write_bytes(saved)
    monkeypatch.setattr("osdn_jax.interop.safetensors.write", _fail)
    with pytest.raises(OSError, match="full"):
        small.save_state(path, small.prefill(prompts(4)))
    assert path.read_bytes() == saved
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError, match="nothing"):
        small.save_state(tmp_path / "nothing" / "state", small.prefill(prompts(4)))


def _fail(path, *_):
    path.write_bytes(b"half")
    raise OSError("the disk is full")


def test_places_of_a_prompt_that_are_none_are_refused():
    for token in (0, 38, -1):
        with pytest.raises(ValueError, match=f"token: got {token}, expected 1 to 37, the tokens of the prompt"):
            cache("osdn").at(token)
    with pytest.raises(ValueError, match="keep_every: got 0, expected at least 1"):
        generator("osdn").prompt_cache(PROMPT, keep_every=0)


@pytest.mark.parametrize(
    ("before", "after", "position"), [(8, 16, 5), (8, 16, 11), (16, 8, 5), (16, 8, 21), (12, 8, 13)]
)
def test_caches_of_another_size_hold_the_last_tokens(before, after, position):
    def holding(slots):
        x = np.zeros((1, 1, slots, 1), np.float32)
        for token in range(max(0, position - min(before, slots)), position):
            x[0, 0, token % slots] = token + 1
        return x

    def state(x):
        return (AttentionState(jnp.asarray(x), jnp.asarray(-x), jnp.int32(position), jnp.zeros(1, jnp.int32)),)

    [got] = fit_caches(state(holding(before)), state(np.zeros((1, 1, after, 1), np.float32)))
    np.testing.assert_array_equal(got.keys, holding(after))
    np.testing.assert_array_equal(got.values, -holding(after))


def test_attention_caches_have_the_size_of_the_request():
    """Also more than the configuration's max_length, which limits models given as (apply, parameters) alone."""
    model = language_model("attention")
    state = generator("attention").prefill(prompts(20))
    assert {x.shape[2] for x in jax.tree.leaves(state.blocks) if x.ndim == 4} == {24}
    pair = Generator(split_model(model), piece=16).prefill(prompts(20))
    assert {x.shape[2] for x in jax.tree.leaves(pair.blocks) if x.ndim == 4} == {2048}


# The largest error of the logits after 48 tokens, relative to their norm; benchmarks/results/generation-bfloat16.md has
# those of thousands of tokens.
@pytest.mark.parametrize("name", ["osdn", "latent_experts"])
def test_bfloat16_states_are_half_as_large_and_nearly_as_good(name):
    narrow = Generator(language_model(name), piece=16, state_dtype="bfloat16")
    texts = prompts(48, 31)
    state, wide = narrow.prefill(texts), generator(name).prefill(texts)
    sizes = {x.dtype for x in jax.tree.leaves(state.blocks)}
    assert jnp.dtype(jnp.bfloat16) in sizes
    error = relative_error(narrow.logits(state), generator(name).logits(wide))
    assert 1e-5 < error < 2e-2
    rows = narrow.generate(texts, max_tokens=5, temperature=0.0)
    assert all(0 <= token < VOCABULARY for row in rows for token in row.tokens)
    # A state of either dtype continues in both generators.
    assert relative_error(generator(name).logits(state), narrow.logits(state)) < 2e-3
    assert relative_error(narrow.logits(wide), narrow.logits(state)) < 2e-2

"""Sampling: which tokens, how often, and in which order."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn_jax.sampling import Sampler, sample, sample_token
from support import jit
from support.models import VOCABULARY, small_model

KEY = jax.random.key(0)


@functools.cache
def drawing(size, top_p, temperature=1.0, draws=300):
    """Return a program from logits [size] to many sampled tokens."""
    keys = jax.random.split(KEY, draws)
    draw = functools.partial(sample_token, temperature=temperature, top_p=top_p)
    return jit(lambda logits: jax.vmap(lambda key: draw(logits, key))(keys))


def softmax(logits, temperature=1.0):
    x = np.asarray(logits, np.float64) / temperature
    p = np.exp(x - x.max())
    return p / p.sum()


@given(st.lists(st.floats(-5, 5, width=32, allow_subnormal=False), min_size=6, max_size=6, unique=True))
@settings(max_examples=30)
def test_temperature_zero_takes_the_likeliest(logits):
    logits = np.asarray(logits, np.float32)
    assert int(sample_token(jnp.asarray(logits), KEY, temperature=0.0)) == int(np.argmax(logits))


def smallest_set(probabilities, top_p):
    """Return the most likely of the smallest sets that hold top_p, by trying all of them."""
    tokens = range(len(probabilities))
    for size in range(1, len(probabilities) + 1):
        holding = [s for s in itertools.combinations(tokens, size) if probabilities[list(s)].sum() >= top_p]
        if holding:
            return set(max(holding, key=lambda s: probabilities[list(s)].sum()))
    return set(tokens)


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9])
def test_top_p_keeps_exactly_the_smallest_set(top_p):
    @given(st.permutations([0.4, 0.25, 0.15, 0.12, 0.06, 0.02]), st.floats(0.5, 2.0))
    @settings(max_examples=15)
    def check(probabilities, sharpness):
        p = softmax(sharpness * np.log(probabilities))
        kept = smallest_set(p, top_p)
        if abs(sum(p[list(kept)]) - top_p) < 1e-4 or abs(sum(p[list(kept)]) - min(p[list(kept)]) - top_p) < 1e-4:
            return  # undecided in float32
        drawn = np.asarray(drawing(6, top_p)(jnp.asarray(np.log(p), jnp.float32)))
        assert set(drawn) <= kept
        # Kept tokens are sampled in proportion: 300 samples miss a token of probability s with probability (1 - s)^300.
        share = p[sorted(kept)] / p[sorted(kept)].sum()
        seen = np.bincount(drawn, minlength=6)[sorted(kept)] / 300
        np.testing.assert_allclose(seen, share, atol=5 * np.sqrt(0.25 / 300))
        assert {t for t, s in zip(sorted(kept), share, strict=True) if s > 0.05} <= set(drawn)

    check()


def test_top_p_takes_the_temperature_first():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    assert set(np.asarray(drawing(3, 0.6)(logits))) == {0, 1}
    assert set(np.asarray(drawing(3, 0.6, temperature=0.3)(logits))) == {0}  # 0.5 is 0.84 when sharpened
    assert set(np.asarray(drawing(3, 0.6, temperature=10.0)(logits))) == {0, 1}
    assert set(np.asarray(drawing(3, 0.7, temperature=100.0)(logits))) == {0, 1, 2}


def test_frequencies_are_the_probabilities():
    logits = jnp.asarray([0.0, 1.0, -1.0, 0.5])
    for temperature in (0.5, 1.0, 2.0):
        drawn = np.asarray(drawing(4, 1.0, temperature, draws=20000)(logits))
        p = softmax(logits, temperature)
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, p, atol=5 * np.sqrt(0.25 / 20000))


def test_what_is_ruled_out_stays_so():
    logits = jnp.asarray([3.0, -jnp.inf, 2.9])
    for top_p in (0.3, 0.999, 1.0):
        assert 1 not in np.asarray(drawing(3, top_p)(logits))


SMALLEST = [5e-324, 1e-40, 1e-38, 1e-6]  # in float32: 0, subnormal, subnormal, normal
LARGEST = [1e6, 3e38, 1.7e308]


@pytest.mark.parametrize(("temperature", "dtype"), [*((t, jnp.float32) for t in SMALLEST), (1e-40, jnp.bfloat16)])
def test_a_small_temperature_takes_the_likeliest(temperature, dtype):
    for top_p in (1.0, 0.9):
        draw = drawing(4, top_p, temperature)
        for logits in ([-jnp.inf, 3.0, 2.0, -jnp.inf], [-jnp.inf, -300.0, -302.0, -6e4], [-jnp.inf, 0.25, 0.0, -0.25]):
            assert set(np.asarray(draw(jnp.asarray(logits, dtype)))) == {1}
        if top_p == 1:
            assert set(np.asarray(draw(jnp.asarray([1.0, 5.0, -jnp.inf, 5.0], dtype)))) == {1, 3}  # equally likely


@pytest.mark.parametrize("temperature", LARGEST)
def test_a_large_temperature_draws_everything_that_may_be(temperature):
    drawn = np.asarray(drawing(4, 1.0, temperature)(jnp.asarray([100.0, -100.0, -jnp.inf, 3e4])))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 300, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.14)


def test_logits_of_any_size():
    for logits, wanted in (([3e38, -3e38, 3.3e38], {2}), ([-3e38, -jnp.inf, -3.3e38], {0}), ([jnp.inf, 1.0, 0.0], {0})):
        assert set(np.asarray(drawing(3, 1.0, 0.5)(jnp.asarray(logits)))) == wanted


@pytest.mark.parametrize("top_p", [5e-324, 1e-7])
def test_a_small_share_is_the_likeliest_token(top_p):
    for logits in ([-jnp.inf, 0.1, 0.0, -0.1], [-jnp.inf, -jnp.inf, 4.0, -jnp.inf]):
        assert set(np.asarray(drawing(4, top_p)(jnp.asarray(logits)))) == {int(np.argmax(logits))}


def test_a_share_of_almost_1_is_everything_that_may_be():
    drawn = drawing(3, 1 - 1e-12)(jnp.asarray([0.0, -jnp.inf, 0.0]))
    assert set(np.asarray(drawn)) == {0, 2}


@pytest.mark.parametrize("value", ["hot", None, [0.5, 1.0]])
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(TypeError, match=f"{name}: got .*, expected a number"):
        sample_token(jnp.zeros(3), KEY, **{name: value})


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf"), pytest.param(10**400, id="huge")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature: got"):
        sample_token(jnp.zeros(3), KEY, temperature=temperature)


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(top_p):
    with pytest.raises(ValueError, match="top_p: got"):
        sample_token(jnp.zeros(3), KEY, top_p=top_p)


# Sequences

PROMPT = np.asarray([3, 1, 4, 1, 5], np.int32)


@pytest.fixture(scope="module")
def model():
    _, apply, parameters, _ = small_model("delta_net")
    return apply, parameters


def test_without_heat_it_is_the_whole_model_run_again_and_again(model):
    apply, parameters = model
    got = list(sample(apply, parameters, PROMPT, tokens=8, seed=0, temperature=0.0))
    assert {type(token) for token in got} == {int}
    whole = jit(lambda p, x: apply(p, x)[0])
    text = list(PROMPT)
    for _ in range(8):
        padded = jnp.asarray([text + [0] * (13 - len(text))], jnp.int32)
        text.append(int(np.argmax(whole(parameters, padded)[0, len(text) - 1])))
    assert got == text[len(PROMPT) :]
    assert len(set(got)) > 1


@pytest.fixture(scope="module")
def bigram():
    """A model without memory: logits from a table."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)), jnp.float32)
    return (lambda table, ids, states: (table[ids], states)), table


def test_the_seed_says_what_is_drawn(bigram):
    a, same, b = (list(sample(*bigram, PROMPT, tokens=12, seed=seed)) for seed in (0, 0, 1))
    assert a == same != b
    assert all(0 <= token < VOCABULARY for token in a)
    assert len(set(a)) > 3  # each sample has another key


def test_every_seed_of_64_bits_draws_tokens_of_its_own(bigram):
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**63, 2**64 - 1, np.int64(5), np.uint64(2**63 + 1)]
    drawn = [tuple(sample(*bigram, PROMPT, tokens=12, seed=seed)) for seed in seeds]
    assert len(set(drawn)) == len(seeds)


@pytest.mark.parametrize("seed", [-1, -(2**70), 2**64, 2**70])
def test_a_seed_beyond_64_bits_is_refused(bigram, seed):
    with pytest.raises(ValueError, match=f"seed: got {seed}, expected an integer from 0 to"):
        sample(*bigram, PROMPT, tokens=1, seed=seed)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1e-38, 1.0), (1.0, 1e-46), (1e308, 1.0), (1e308, 0.5)])
def test_forbidden_tokens_are_never_drawn_at_any_temperature(bigram, temperature, top_p):
    forbidden = tuple(range(VOCABULARY - 2))
    drawn = sample(*bigram, PROMPT, tokens=8, seed=0, temperature=temperature, top_p=top_p, forbidden=forbidden)
    assert set(drawn) <= {VOCABULARY - 2, VOCABULARY - 1}


@pytest.mark.parametrize("damage", [np.nan, -np.inf])
def test_logits_that_are_none_are_refused(bigram, damage):
    apply, table = bigram
    drawn = sample(apply, table.at[:, 1:].set(damage), PROMPT, tokens=3, seed=0, forbidden=(0,))
    with pytest.raises(ValueError, match="token 0 cannot be drawn: the model's logits are NaN"):
        next(drawn)


def test_forbidden_tokens_are_never_drawn(bigram):
    forbidden = tuple(range(0, VOCABULARY, 2))
    drawn = set(sample(*bigram, PROMPT, tokens=40, seed=0, temperature=3.0, forbidden=forbidden))
    assert drawn
    assert not drawn & set(forbidden)
    greedy = list(sample(*bigram, PROMPT, tokens=3, seed=0, temperature=0.0))
    assert greedy[0] not in sample(*bigram, PROMPT, tokens=3, seed=0, temperature=0.0, forbidden=(greedy[0],))


def test_tokens_come_one_by_one_at_a_constant_cost():
    calls = []

    def apply(parameters, ids, states):
        jax.debug.callback(lambda: calls.append(ids.shape))
        count = (jnp.zeros((), jnp.int32) if states is None else states) + ids.shape[1]
        logits = jnp.where(jnp.arange(6) == count % 6, 9.0, 0.0)
        return jnp.broadcast_to(logits, (1, ids.shape[1], 6)), count

    stream = sample(apply, {}, np.arange(4, dtype=np.int32), tokens=5, seed=0, temperature=0.0)
    jax.effects_barrier()
    assert calls == []  # nothing runs before the first token is requested
    assert next(stream) == 4
    jax.effects_barrier()
    assert calls == [(1, 3), (1, 1)]  # the loop reads the prompt's last token
    assert list(stream) == [5, 0, 1, 2]  # the state after the prompt and one token each
    jax.effects_barrier()
    assert calls == [(1, 3)] + [(1, 1)] * 5


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("rule", ["osdn", "transformer"])
def test_a_prompt_may_be_read_token_by_token(rule):
    """One program then reads and draws, and it is compiled without parameters."""
    _, apply, parameters, _ = small_model(rule)
    traced = []

    def counting(parameters, ids, states):
        traced.append((ids.shape[1], states is not None))
        return apply(parameters, ids, states)

    for length in (1, 5):
        prompt, options = PROMPT[:length], {"tokens": 6, "seed": 3, "temperature": 0.7, "top_p": 0.9}
        sampler = Sampler(counting, shapes(parameters), prompt, **options, token_by_token=5)
        sampler.compile(shapes(parameters))
        drawn = list(sampler.draw(parameters))
        assert drawn == list(sample(apply, parameters, prompt, **options)) == list(sampler.draw(parameters))
        assert set(traced) == {(0, False), (1, True)}
    longer = Sampler(counting, shapes(parameters), PROMPT, **options, token_by_token=4)
    longer.compile(shapes(parameters))
    assert (4, rule == "transformer") in traced  # a cache of a fixed size: the prompt sees what a continuation sees
    assert list(longer.draw(parameters)) == drawn


def test_no_tokens_are_no_tokens(model):
    assert list(sample(*model, PROMPT, tokens=0, seed=0)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": np.zeros(0, np.int32)}, "prompt: got no tokens"),
        ({"tokens": -1}, "tokens: got -1"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 2.0}, "top_p: got 2.0"),
        ({"prompt": [3, VOCABULARY]}, f"prompt: got token {VOCABULARY}, expected tokens of the vocabulary"),
        ({"prompt": [-1]}, "prompt: got token -1"),
        ({"forbidden": (0, VOCABULARY)}, f"forbidden: got token {VOCABULARY}"),
        ({"forbidden": (-1,)}, "forbidden: got token -1"),
        ({"forbidden": tuple(range(VOCABULARY))}, f"forbidden: got all {VOCABULARY} tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_the_call_itself(model, changes, said):
    options = {"prompt": PROMPT, "tokens": 1, "seed": 0} | changes
    with pytest.raises(ValueError, match=said):
        sample(*model, options.pop("prompt"), **options)  # nothing is sampled yet


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": [0.5]}, r"prompt: got float64 of shape \[1\], expected integers"),
        ({"prompt": [[1, 2]]}, r"prompt: got int64 of shape \[1, 2\], expected integers \[T\]"),
        ({"tokens": 2.5}, "tokens: got 2.5, expected an integer"),
        ({"seed": 0.5}, "seed: got 0.5, expected an integer"),
        ({"seed": None}, "seed: got None, expected an integer"),
        ({"forbidden": (1.5,)}, "forbidden: got 1.5, expected an integer"),
    ],
)
def test_what_is_no_integer_is_refused(bigram, changes, said):
    options = {"prompt": PROMPT, "tokens": 1, "seed": 0} | changes
    with pytest.raises(TypeError, match=said):
        sample(*bigram, options.pop("prompt"), **options)

"""Multi-head latent attention: against a loop in NumPy, in parts, with documents, and its cache."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import LatentAttention, LatentAttentionConfig, LatentState
from osdn_jax.nn.split import split_model
from support import jit, relative_error

B, T, D = 2, 24, 10
PLAIN = LatentAttentionConfig(width=D, heads=3, key_dim=4, value_dim=5, rank=6, shared_key_dim=2, max_length=T)
CONFIGS = {
    "shared channels": PLAIN,
    "no shared channels": dataclasses.replace(PLAIN, shared_key_dim=0),
    "queries of low rank": dataclasses.replace(PLAIN, query_rank=7),
}
IDS = np.stack([np.repeat([1, 2, 3], (5, 1, 18)), np.repeat([4, 9], (13, 11))]).astype(np.int32)


def made(config):
    apply, parameters = split_model(LatentAttention(config, 1, jnp.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    moved = {name: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for name, x in parameters.items()}
    return apply, moved, jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


def reference(config, parameters, x, ids):
    p = {name: np.asarray(y, np.float64) for name, y in parameters.items()}
    heads, own = config.heads, config.key_dim

    def norm(y, name):
        return y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + 1e-6) * p[f"{name}/scale"]

    x = np.asarray(x, np.float64)
    queries = norm(x @ p["query_down/kernel"], "query_norm") if config.query_rank else x
    q = (queries @ p["query/kernel"]).reshape(B, T, heads, -1)
    down = x @ p["down/kernel"]
    both = (norm(down[..., : config.rank], "norm") @ p["up/kernel"]).reshape(B, T, heads, -1)
    out = np.zeros((B, T, heads, config.value_dim))
    for b, t, h in np.ndindex(B, T, heads):
        seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t]]
        keys = np.concatenate([both[b, seen, h, :own], down[b, seen, config.rank :]], axis=-1)
        scores = keys @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ both[b, seen, h, own:] / weights.sum()
    return out.reshape(B, T, -1) @ p["output/kernel"]


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_a_loop(name):
    config = CONFIGS[name]
    apply, parameters, x = made(config)
    for ids in (None, IDS):
        out, _ = jit(lambda p, x, ids: apply(p, x, None, ids))(parameters, x, ids)
        want = reference(config, parameters, x, np.zeros((B, T)) if ids is None else ids)
        assert relative_error(out, want) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parts", [(1,) * T, (3, 1, 20), (0, 24), (20, 2, 2)])
def test_parts_equal_the_whole(name, parts):
    """Parts of up to 16 tokens score the latents themselves, longer ones the keys computed from them."""
    apply, parameters, x = made(CONFIGS[name])
    whole, last = jit(apply)(parameters, x)
    step, state, outputs, at = jit(apply), None, [], 0
    for size in parts:
        out, state = step(parameters, x[:, at : at + size], state)
        outputs.append(out)
        at += size
    assert relative_error(jnp.concatenate(outputs, axis=1), whole) < 1e-5
    for got, want in zip(state, last, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_cache_has_one_latent_per_token():
    apply, parameters, x = made(PLAIN)
    _, state = apply(parameters, x)
    assert isinstance(state, LatentState)
    assert state.latents.shape == (B, T, 6 + 2)


def test_a_full_cache_forgets_its_oldest_token():
    config = dataclasses.replace(PLAIN, max_length=5)
    apply, parameters, x = made(config)
    _, state = apply(parameters, x[:, :16])
    out, state = apply(parameters, x[:, 16:17], state)
    assert relative_error(out[:, 0], apply(parameters, x[:, 12:17])[0][:, -1]) < 1e-5
    out, _ = apply(parameters, x[:, 17:19], state)
    assert relative_error(out[:, 1], apply(parameters, x[:, 14:19])[0][:, -1]) < 1e-5


@pytest.mark.usefixtures("our_checks")
def test_states_of_others_are_refused():
    apply, parameters, x = made(PLAIN)
    _, state = apply(parameters, x)
    with pytest.raises(ValueError, match=r"state: got latents of shape \(2, 24, 8\), expected \(1, 24, 8\)"):
        apply(parameters, x[:1], state)
    with pytest.raises(TypeError, match="expected the LatentState of an earlier call"):
        apply(parameters, x, tuple(state))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"query_rank": 0}, "query_rank: got 0"),
        ({"shared_key_dim": -1}, "shared_key_dim: got -1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon: got 0.0"),
        ({"max_length": 0}, "max_length: got 0"),
    ],
)
def test_the_field_that_is_wrong_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(PLAIN, **changes)

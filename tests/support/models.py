"""Small models of every rule, and a NumPy language model that is independent of the package's modules."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from osdn_jax.nn import RULES, AttentionConfig, CausalLM, ModelConfig, mixer_config
from osdn_jax.nn.split import split_model
from support import jit, oracle

VOCABULARY, LENGTH = 17, 24
# Three segments in the first row and two in the second; one has a single token, others cross chunks of 8.
LENGTHS = ((5, 1, 18), (13, 11))
SEGMENTS = np.stack([np.repeat([1, 2, 3], LENGTHS[0]), np.repeat([4, 9], LENGTHS[1])]).astype(np.int32)

# Two value heads per key head, and sizes that all differ, so that no shape matches by accident.
SHAPES = {"width": 12, "heads": 4, "key_heads": 2, "key_dim": 6, "value_dim": 5}


def model_config(rule, *, layers=1, dtype="float32", tied_embeddings=False, dropout=0.0, remat="none", **mixer):
    return ModelConfig(
        vocab_size=VOCABULARY,
        layers=layers,
        mixer=mixer_config(rule, **SHAPES | mixer),
        mlp_dim=10,
        tied_embeddings=tied_embeddings,
        dropout=dropout,
        dtype=dtype,
        remat=remat,
    )


def parameters_of(config, seed=0):
    """Return (apply, parameters), with noise added to the parameters, some of which start constant."""
    apply, parameters = split_model(CausalLM(config, rngs=nnx.Rngs(params=seed)))
    rng = np.random.default_rng(seed)
    moved = {name: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for name, x in parameters.items()}
    return apply, moved


def tokens(seed=0, batch=2):
    return np.random.default_rng(seed).integers(VOCABULARY, size=(batch, LENGTH), dtype=np.int32)


@functools.cache
def small_model(rule):
    """Return (config, apply, parameters, forward); forward(parameters, tokens, segment_ids) -> (logits, states)."""
    config = model_config(rule)
    apply, parameters = parameters_of(config)
    forward = jit(lambda parameters, x, ids: apply(parameters, x, segment_ids=ids))
    return config, apply, parameters, forward


def with_mixer(config, **changes):
    return dataclasses.replace(config, mixer=dataclasses.replace(config.mixer, **changes))


every_rule = tuple(RULES)
delta_rules = tuple(rule for rule in RULES if rule != "transformer")


# The model in NumPy, float64


def reference_logits(config, parameters, tokens, segment_ids):
    """Return logits [B, T, vocabulary] of packed sequences, from the definitions and the oracle's loops."""
    p = {name: np.asarray(x, np.float64) for name, x in parameters.items()}
    x = p["embedding/embedding"][tokens]
    for i in range(config.layers):
        block = {name.removeprefix(f"blocks/{i}/"): y for name, y in p.items() if name.startswith(f"blocks/{i}/")}
        mix = reference_attention if isinstance(config.mixer, AttentionConfig) else _mixer
        x = x + mix(config.mixer, block, _rms(x, block["mixer_norm/scale"]), segment_ids)
        gate, up = np.split(_rms(x, block["mlp_norm/scale"]) @ block["mlp/gate_and_up/kernel"], 2, axis=-1)
        x = x + (_silu(gate) * up) @ block["mlp/down/kernel"]
    x = _rms(x, p["norm/scale"])
    return x @ (p["embedding/embedding"].T if config.tied_embeddings else p["head/kernel"])


def check_slopes(config, parameters, gradient, cotangent):
    """Compare the gradient of vdot(logits, cotangent) with finite differences of the NumPy model."""
    # Along the unit gradients of all parameters together the slope is the sum of their norms.
    wide = {name: np.asarray(g, np.float64) for name, g in gradient.items()}
    norms = {name: np.linalg.norm(g) for name, g in wide.items()}
    above, below = (
        {name: np.asarray(p, np.float64) + h * wide[name] / norms[name] for name, p in parameters.items()}
        for h in (1e-6, -1e-6)
    )
    change = reference_logits(config, above, tokens(), SEGMENTS) - reference_logits(config, below, tokens(), SEGMENTS)
    np.testing.assert_allclose(np.vdot(change, cotangent) / 2e-6, sum(norms.values()), rtol=1e-4)


def _mixer(config, p, x, segment_ids):
    batch, length, _ = x.shape
    heads, key_heads, key_dim = config.heads, config.key_heads or config.heads, config.key_dim
    mixed = x @ p["mixer/project/kernel"]
    taps = p["mixer/convolution/kernel"]
    padded = np.pad(mixed, ((0, 0), (len(taps) - 1, 0), (0, 0)))
    ids = np.pad(segment_ids, ((0, 0), (len(taps) - 1, 0)), constant_values=-1)[..., None]
    mixed = sum(
        padded[:, j : j + length] * taps[j] * (ids[:, j : j + length] == segment_ids[..., None])
        for j in range(len(taps))
    )
    q, k, v = np.split(_silu(mixed), [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
    q, k = (y.reshape(batch, length, key_heads, key_dim) for y in (q, k))
    q, k = _unit(q), _unit(k) if config.key_norm else k
    v = v.reshape(batch, length, heads, config.value_dim)
    beta = np.ones((batch, length, heads))
    if config.strength == "scalar" and (config.erase or config.decay == "scalar"):
        if config.fixed_beta is None:
            beta = _logistic(x @ p["mixer/beta/kernel"]) * (2 if config.negative_eigenvalues else 1)
        else:
            beta = config.fixed_beta * beta
    decay = None if config.decay == "none" else _decay(p, "mixer/decay/", x, heads)
    if decay is not None and config.decay == "channel":
        decay = decay.reshape(batch, length, heads, key_dim)
    write_key = None
    if config.strength == "channel":
        erase = _logistic(x @ p["mixer/erase_gate/project/kernel"]) * (2 if config.negative_eigenvalues else 1)
        write = _logistic(x @ p["mixer/write_gate/project/kernel"])
        k, write_key, v = erase.reshape(k.shape) * k, k, write.reshape(v.shape) * v
    if config.preconditioner == "hypergradient":
        settings = config.hypergradient
        keys = np.repeat(k, heads // key_heads, axis=2) if settings.beta_aware else k
        gate = _forgetting(settings, p, x, keys.shape[2]) if settings.forget else None
        d, _ = oracle.hypergradient(
            keys,
            beta if settings.beta_aware else None,
            eta=settings.eta,
            log_forget=None if gate is None else np.log(gate),
            initial=p["mixer/initial"][None],
            anchor=settings.anchor,
            bounds=settings.bounds,
            normalize=settings.normalize,
            segment_ids=segment_ids,
        )
        write_key = d * keys
    elif config.preconditioner == "gram":
        gain = _logistic(x @ p["mixer/gram_gain/kernel"])
        gram_decay = _decay(p, "mixer/gram_decay/", x, key_heads)
        center = p["mixer/gram_center"]
        multiplier, _ = oracle.gram(
            k, gram_decay, gain, center=center, squash=config.gram.squash, segment_ids=segment_ids
        )
        write_key = multiplier * k
    if config.match_step:
        keys = np.repeat(k, write_key.shape[2] // key_heads, axis=2)
        write_key = keys * np.sum(write_key * keys, -1, keepdims=True) / np.sum(keys * keys, -1, keepdims=True)
    out, _ = oracle.delta_rule(
        q, k, v, beta, write_key=write_key, log_decay=decay, erase=config.erase, segment_ids=segment_ids
    )
    out = _rms(out, p["mixer/norm/scale"]).reshape(batch, length, -1)
    if config.output_gate:
        out = out * _silu(x @ p["mixer/gate/kernel"])
    return out @ p["mixer/output/kernel"]


def _forgetting(settings, p, x, heads):
    if settings.forget_gate == "constant":
        return np.full((*x.shape[:2], heads), settings.forget_constant)
    moved = x @ p["mixer/forget/kernel"] if settings.forget_gate == "token" else np.zeros((*x.shape[:2], heads))
    return _logistic(moved + p["mixer/forget/bias"])


def reference_attention(config, p, x, segment_ids):
    """Compute attention in loops over tokens and heads; positions restart in each segment, rotary pairs are complex."""
    batch, length, _ = x.shape
    heads, key_heads, key_dim = config.heads, config.key_heads or config.heads, config.key_dim
    q, k, v = np.split(x @ p["mixer/project/kernel"], [heads * key_dim, (heads + key_heads) * key_dim], axis=-1)
    q, k = q.reshape(batch, length, heads, key_dim), k.reshape(batch, length, key_heads, key_dim)
    v = v.reshape(batch, length, key_heads, config.value_dim)
    if config.qk_norm:
        q, k = _rms(q, p["mixer/query_norm/scale"]), _rms(k, p["mixer/key_norm/scale"])
    rates = config.rotary_base ** (-2 * np.arange(key_dim // 2) / key_dim)
    out = np.zeros((batch, length, heads, config.value_dim))
    for b, t, h in np.ndindex(batch, length, heads):
        past = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
        keys, values = k[b, past, h * key_heads // heads], v[b, past, h * key_heads // heads]
        positions = np.arange(len(past))[:, None]
        rotated = (keys[:, : key_dim // 2] + 1j * keys[:, key_dim // 2 :]) * np.exp(1j * positions * rates)
        query = (q[b, t, h, : key_dim // 2] + 1j * q[b, t, h, key_dim // 2 :]) * np.exp(1j * positions[-1] * rates)
        scores = (rotated * query.conj()).real.sum(axis=-1) / np.sqrt(key_dim)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ values / weights.sum()
    out = out.reshape(batch, length, -1)
    if config.output_gate:
        out = out * _logistic(x @ p["mixer/gate/kernel"])
    return out @ p["mixer/output/kernel"]


def _decay(p, name, x, heads):
    if f"{name}down/kernel" in p:
        x = x @ p[f"{name}down/kernel"]
    steps = np.logaddexp(0, x @ p[f"{name}project/kernel"] + p[f"{name}bias"])
    rate = np.repeat(np.exp(p[f"{name}log_rate"]), steps.shape[-1] // heads)
    return -rate * steps


def _logistic(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _logistic(x)


def _rms(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def _unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def largest_error(got, want):
    """Return max |got − want| / max |want|, or infinity if it is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    error = np.max(np.abs(got - want)) / np.max(np.abs(want))
    return float(error) if np.isfinite(error) else np.inf

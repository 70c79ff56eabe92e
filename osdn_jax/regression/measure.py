"""One rule on the sequences of one condition, at several values of beta: losses and residual ratios."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from osdn_jax import ops
from osdn_jax.regression.rules import Rule
from osdn_jax.regression.sequences import Sequences

LEAST_RATIO = 1e-30  # a ratio of 0 would make every geometric mean 0
DIVERGED = 1e6  # a loss above it, or not a number, counts as infinite
_BLOCK = 8_000_000  # numbers in an array of keys; more values of beta than fit run one after another


class Scores(NamedTuple):
    """Scores of a rule, [betas, S]. The squared norm of a clean value is about 1, so 1 is the loss of no memory."""

    loss: np.ndarray  # mean over tokens of |v_t - S_{t-1}^T k_t|^2 / E|k_t|^2: prediction before the write
    end: np.ndarray  # mean over the keys asked at the end of |answer - S_T^T k|^2
    ratio: np.ndarray  # geometric mean over tokens of |residual after the write|^2 / |residual before|^2
    recall: np.ndarray  # fraction of the keys asked whose nearest answer is the right one; NaN without pairs


def measure_rule(rule: Rule, sequences: Sequences, betas: Sequence[float]) -> Scores:
    """Run a rule over sequences, in float64, with one constant beta at a time.

    Args:
        rule: the rule.
        sequences: what `draw` returns.
        betas: the values of beta.

    Raises:
        ValueError: what the rule returns is not of the expected shape.
    """
    with jax.enable_x64(True):
        seeds, size = len(sequences.k), sequences.k.size
        together = len(betas) if len(betas) * size <= _BLOCK else 1
        keys = None
        if rule.run is None and not rule.reads_beta:
            keys = _write_key(rule, sequences, np.ones(seeds))
        blocks = []
        for start in range(0, len(betas), together):
            values = np.repeat(np.asarray(betas[start : start + together], float), seeds)
            if rule.run is not None:
                found = _whole(rule.run, sequences, values)
            else:
                written = _write_key(rule, sequences, values) if keys is None else keys
                found = _delta(written, sequences, values, rule.log_decay)
            blocks.append([np.asarray(x).reshape(-1, seeds) for x in found])
    loss, end, ratio, recall = (np.concatenate(x) for x in zip(*blocks, strict=True))
    bad = ~(loss < DIVERGED)
    ratio = np.where(np.isfinite(ratio), ratio, np.inf)
    return Scores(np.where(bad, np.inf, loss), np.where(bad | ~(end < DIVERGED), np.inf, end), ratio, recall)


def check_causal(rule: Rule, sequences: Sequences) -> None:
    """Raise ValueError if what a rule does at a token depends on the keys of later tokens."""
    half = sequences.k.shape[1] // 2
    changed = sequences.k.copy()
    changed[:, half:] = sequences.k[:, half:][:, ::-1] + 0.1
    with jax.enable_x64(True):
        both = [sequences, sequences._replace(k=changed)]
        if rule.run is None:
            found = [_write_key(rule, s, np.ones(len(changed))) for s in both]
        else:
            beta = jnp.ones((*changed.shape[:2], 1))
            found = [_outputs(rule.run, sequences.k, s.k, sequences.v, beta) for s in both]
        first, second = (np.asarray(x[:, :half]) for x in found)
    if not np.allclose(first, second, rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ValueError("got a result that depends on later tokens, expected one that depends on the tokens so far")


def _batch(x: np.ndarray | jax.Array, rows: int) -> jax.Array:
    """Repeat arrays of the seeds for every value of beta: [S, ...] to [rows, ...]."""
    return jnp.tile(jnp.asarray(x), (rows // len(x),) + (1,) * (x.ndim - 1))


def _write_key(rule: Rule, s: Sequences, betas: np.ndarray) -> jax.Array:
    """Return the write keys for one value of beta for each row, [rows, T, 1, K]."""
    k = _batch(s.k, len(betas))[:, :, None]
    arrays = [k, jnp.broadcast_to(jnp.asarray(betas)[:, None, None], k.shape[:3])]
    if rule.told:
        arrays.append(_batch(s.second_moment, len(betas))[:, :, None])
    return _checked("write_key", _jitted(rule.write_key)(*arrays), k.shape)


_jitted = functools.lru_cache(maxsize=256)(jax.jit)  # one compilation for each function and shape


def _checked(name: str, found: Any, expected: tuple[int, ...]) -> jax.Array:
    if getattr(found, "shape", None) != expected:
        got = getattr(found, "shape", type(found).__name__)
        raise ValueError(f"{name}: got a result of shape {got}, expected {expected}")
    return jnp.asarray(found)


def _delta(keys: jax.Array, s: Sequences, betas: np.ndarray, log_decay: float) -> Any:
    arrays = (_batch(x, len(betas)) for x in (s.k, s.v, s.scale, s.asked, s.answers, keys))
    return _judged(*arrays, jnp.asarray(betas), log_decay, s.pairs)


@functools.partial(jax.jit, static_argnums=(7, 8))
def _judged(
    k: jax.Array,
    v: jax.Array,
    scale: jax.Array,
    asked: jax.Array,
    answers: jax.Array,
    write_key: jax.Array,
    betas: jax.Array,
    log_decay: float,
    pairs: bool,
) -> tuple[jax.Array, ...]:
    beta = jnp.broadcast_to(betas[:, None, None], (*k.shape[:2], 1))
    following = jnp.roll(k, -1, axis=1)  # the output at t is the prediction of the value of t + 1
    out, state = ops.delta_rule(
        following[:, :, None],
        k[:, :, None],
        v[:, :, None],
        beta,
        write_key=write_key,
        log_decay=jnp.full(beta.shape, log_decay, k.dtype) if log_decay else None,
        scale=1.0,
    )
    ratio = jnp.square(1.0 - beta[:, :, 0] * jnp.sum(write_key[:, :, 0] * k, axis=-1))
    recalled = jnp.einsum("bnk,bkv->bnv", asked, state[:, 0])
    return _scores(out[:, :, 0], v, scale, recalled, answers, ratio, pairs)


def _whole(function: Callable[..., Any], s: Sequences, betas: np.ndarray) -> Any:
    """Ask a rule that is a whole memory: for predictions, then for the keys asked at the end under beta = 0."""
    length = s.k.shape[1]
    k, v, scale, asked, answers = (_batch(x, len(betas)) for x in (s.k, s.v, s.scale, s.asked, s.answers))
    more = ((0, 0), (0, asked.shape[1]), (0, 0))
    beta = jnp.pad(jnp.broadcast_to(jnp.asarray(betas)[:, None, None], (*k.shape[:2], 1)), more)
    keys, values = jnp.concatenate([k, asked], axis=1), jnp.pad(v, more)

    def outputs(q: jax.Array) -> jax.Array:
        return _outputs(function, jnp.concatenate([q, asked], axis=1), keys, values, beta)

    before, after = outputs(jnp.roll(k, -1, axis=1)), outputs(k)[:, :length]
    first = jnp.sum(jnp.square(_residual(before[:, :length], v)), axis=-1)
    ratio = jnp.sum(jnp.square(v - after), axis=-1) / jnp.where(first > 0, first, 1.0)
    ratio = jnp.where(first > 1e-20, ratio, 1.0)
    return _scores(before[:, :length], v, scale, before[:, length:], answers, ratio, s.pairs)


def _outputs(function: Callable[..., Any], q: Any, k: Any, v: Any, beta: jax.Array) -> jax.Array:
    """Return the outputs of a whole memory, [B, T, V]."""
    queries, keys, values = (jnp.asarray(x)[:, :, None] for x in (q, k, v))
    found = _jitted(function)(queries, keys, values, beta=beta)
    return _checked("run", found[0] if isinstance(found, tuple | list) else found, values.shape)[:, :, 0]


def _residual(out: jax.Array, v: jax.Array) -> jax.Array:
    """Return v_t minus its prediction, which is the output of the token before; the memory is empty at first."""
    return v - jnp.pad(out[:, :-1], ((0, 0), (1, 0), (0, 0)))


@functools.partial(jax.jit, static_argnums=6)
def _scores(
    out: jax.Array,
    v: jax.Array,
    scale: jax.Array,
    recalled: jax.Array,
    answers: jax.Array,
    ratio: jax.Array,
    pairs: bool,
) -> tuple[jax.Array, ...]:
    loss = jnp.mean(jnp.sum(jnp.square(_residual(out, v)), axis=-1) / scale, axis=1)
    end = jnp.mean(jnp.sum(jnp.square(answers - recalled), axis=-1), axis=1)
    right = jnp.full(loss.shape, jnp.nan)
    if pairs:
        products = jnp.einsum("bnv,bmv->bnm", recalled, answers)
        distances = jnp.sum(jnp.square(answers), axis=-1)[:, None] - 2.0 * products
        right = jnp.mean(jnp.argmin(distances, axis=-1) == jnp.arange(answers.shape[1])[None], axis=1)
    return loss, end, jnp.exp(jnp.mean(jnp.log(jnp.maximum(ratio, LEAST_RATIO)), axis=1)), right

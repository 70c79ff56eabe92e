"""Sequences of keys and values, drawn as a condition says (NumPy, float64)."""

import functools
from typing import NamedTuple

import numpy as np

from osdn_jax.regression.conditions import Condition

HELD_OUT = 512  # fresh keys on which the memory is judged at the end
_STEP = 0.02
_NODES = np.exp(np.arange(-40.0, 40.0, _STEP))  # of the integral in `unit_second_moment`


class Sequences(NamedTuple):
    """Sequences of one condition, one for each seed (S): the arrays that a rule reads, and those that judge it."""

    k: np.ndarray  # [S, T, K]
    v: np.ndarray  # [S, T, V]
    scale: np.ndarray  # [S, T], expected squared norm of the key, by which a squared error is divided
    second_moment: np.ndarray  # [S, T, K], E k_i^2 at each token: for rules that are told the distribution
    asked: np.ndarray  # [S, N, K], keys asked at the end: fresh ones of expected squared norm 1, or those of the pairs
    answers: np.ndarray  # [S, N, V], the values without noise
    pairs: bool  # whether asked and answers are the pairs that were read


def spectrum(width: int, condition_number: float) -> np.ndarray:
    """Return `width` eigenvalues that fall geometrically from 1 to 1 / condition_number.

    Example:
        >>> spectrum(3, 100)
        array([1.  , 0.1 , 0.01])
    """
    return np.logspace(0.0, -np.log10(condition_number), width)


@functools.lru_cache(maxsize=64)
def unit_second_moment(width: int, condition_number: float) -> np.ndarray:
    """Return E k_i^2 for k = x / |x| with x normal of covariance diag(lambda), lambda the `spectrum`.

    It is the integral over t > 0 of lambda_i / (1 + 2 lambda_i t) prod_j (1 + 2 lambda_j t)^-1/2, here by the
    trapezoidal rule in log t; the moments sum to 1.
    """
    factor = 1.0 + 2.0 * spectrum(width, condition_number)[:, None] * _NODES
    density = np.exp(-0.5 * np.sum(np.log(factor), axis=0))
    moment = np.asarray(np.sum(spectrum(width, condition_number)[:, None] / factor * density * _NODES, axis=1) * _STEP)
    moment.setflags(write=False)
    return moment


def draw(condition: Condition, seeds: int, *, first_seed: int = 0) -> Sequences:
    """Draw the sequences of a condition.

    A seed's sequence depends on the seed alone, not on how many there are. Conditions that differ in the condition
    number, the noise or the scale share the random numbers of a seed.

    Args:
        condition: the condition.
        seeds: number of sequences.
        first_seed: the seed of the first; the others follow it.

    Raises:
        ValueError: `seeds` is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected at least 1")
    one = _pairs if condition.pairs else _stream
    drawn = [one(condition, np.random.default_rng(first_seed + i)) for i in range(seeds)]
    k, v, scale, second_moment, asked, answers = (np.stack(x) for x in zip(*drawn, strict=True))
    return Sequences(k, v, scale, second_moment, asked, answers, condition.pairs > 0)


def _stream(c: Condition, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    z, asked_z = rng.standard_normal((c.length, c.width)), rng.standard_normal((HELD_OUT, c.width))
    maps = rng.standard_normal((2, c.width, c.width)) / np.sqrt(c.width)
    noise = c.noise / np.sqrt(c.width) * rng.standard_normal((c.length, c.width))
    scale = _scales(c, rng)
    rotation = _rotation(c, rng)
    late = np.arange(c.length) >= c.length // 2
    reverse = late if c.drift == "keys" else np.zeros_like(late)
    k, moment = _keys(c, z, scale, reverse, rotation)
    asked, _ = _keys(c, asked_z, np.ones(HELD_OUT), np.full(HELD_OUT, reverse[-1]), rotation)
    w = maps[int(c.drift == "map")]
    v = np.where(late[:, None], k @ w, k @ maps[0]) + noise
    return k, v, scale, moment, asked, asked @ w


def _pairs(c: Condition, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    z, values = rng.standard_normal((2, c.pairs, c.width))
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    scale = _scales(c, rng)
    k, moment = _keys(c, z, scale[: c.pairs], np.zeros(c.pairs, bool), _rotation(c, rng))
    read_k, read_v, read_moment = (np.tile(x, (c.reads, 1)) for x in (k, values, moment))
    return read_k, read_v, np.ones(c.tokens), read_moment, k, values


def _scales(c: Condition, rng: np.random.Generator) -> np.ndarray:
    """Return the expected squared norm of each key, [T]."""
    first, last = (1.0, 1.0) if c.scale is None else c.scale
    place = np.linspace(0.0, 1.0, c.tokens)
    if c.path == "random":
        place = rng.uniform(size=c.tokens)
    elif c.path == "step":
        place = (np.arange(c.tokens) >= c.tokens // 2).astype(float)
    elif c.path == "constant":
        place = np.zeros(c.tokens)
    return first * (last / first) ** place


def _rotation(c: Condition, rng: np.random.Generator) -> np.ndarray:
    """Return a random orthogonal matrix, uniform over all of them, if the condition asks for one."""
    if not c.rotated:
        return np.eye(c.width)
    q, r = np.linalg.qr(rng.standard_normal((c.width, c.width)))
    return q * np.sign(np.diag(r))


def _keys(
    c: Condition, z: np.ndarray, scale: np.ndarray, reverse: np.ndarray, rotation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of normal numbers z, [T, K], and E k_i^2 of each token; `reverse` turns the spectrum round."""
    eigenvalues = spectrum(c.width, c.condition_number)
    x = z * np.sqrt(np.where(reverse[:, None], eigenvalues[::-1], eigenvalues))
    if c.scale is None:
        x, moment = x / np.linalg.norm(x, axis=-1, keepdims=True), unit_second_moment(c.width, c.condition_number)
    else:
        x, moment = x / np.sqrt(np.sum(eigenvalues)), eigenvalues / np.sum(eigenvalues)
    moment = np.where(reverse[:, None], moment[::-1], moment)
    return np.sqrt(scale)[:, None] * x @ rotation.T, scale[:, None] * (moment @ np.square(rotation).T)

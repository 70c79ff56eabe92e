"""A packed segment that is not finite does not change the others, in the kernels' interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support import assert_close, random_like, value_and_gradient

pytestmark = pytest.mark.slow

LENGTH, SIZE = 68, 64  # two chunks
START, END = 20, 66  # of the bad segment, which spans both
BAD = 40
OTHERS = np.r_[:START, END:LENGTH]
IDS = np.searchsorted([START, END], np.arange(LENGTH), side="right")[None]
RULES = {
    "gated_delta_net": {},
    "os_gdn": {"eta": 0.5, "bounds": (0.9, 1.1), "initial": 1.0},
    "pgdn": {},
}


def inputs(rule):
    rng, lead = np.random.default_rng(0), (1, LENGTH, 1)
    x = {name: rng.normal(size=(*lead, SIZE)) for name in "qkv"}
    x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
    x = {name: jnp.asarray(value, jnp.bfloat16) for name, value in x.items()}
    gates = {"beta": rng.uniform(size=lead), "log_decay": -rng.uniform(0, 0.3, size=lead)}
    if rule == "pgdn":
        gates |= {"gram_log_decay": -rng.uniform(0, 0.3, size=lead), "gram_gain": rng.uniform(size=lead)}
    return x | {name: jnp.asarray(value, jnp.float32) for name, value in gates.items()}


def spoil(x, cotangents, kind):
    """Make inputs or cotangents of the bad segment non-finite, or so large that their products are."""
    at = np.s_[:, BAD : BAD + 2]
    if kind == "overflow":
        return x | {"k": x["k"].at[at].set(1e30)}, cotangents
    if kind == "cotangent":
        return x, cotangents | {"o": cotangents["o"].at[at].set(jnp.nan)}
    return x | {kind: x[kind].at[at].set(jnp.nan)}, cotangents


@functools.cache
def compiled(rule):
    """Return the program of values and gradients, finite arguments for it, and its results for them."""

    def run(x):
        function, options = getattr(ops, rule), {"implementation": "mosaic_gpu_interpret", **RULES[rule]}
        o, state = function(**x, segment_ids=jnp.asarray(IDS), **options)
        return {"o": o, **{name: value for name, value in state._asdict().items() if value is not None}}

    x = inputs(rule)
    cotangents = random_like(jax.eval_shape(run, x), seed=1)
    program = jax.jit(value_and_gradient(run))
    return program, x, cotangents, program(x, cotangents)


def of_others(value, gradient):
    """Return outputs and gradients at the tokens of the other segments, and the final state of the last."""
    tokens = {"o": value["o"], **{f"gradient of {name}": g for name, g in gradient.items()}}
    state = {name: a for name, a in value.items() if name != "o"}
    return {name: a.astype(jnp.float32)[:, OTHERS] for name, a in tokens.items()} | state


CASES = [(rule, kind) for rule in RULES for kind in ("k", "overflow", "cotangent")]
CASES += [("gated_delta_net", kind) for kind in ("v", "log_decay")]


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize(("rule", "kind"), CASES)
def test_other_segments_keep_values_and_gradients(rule, kind):
    program, x, cotangents, finite = compiled(rule)
    value, gradient = program(*spoil(x, cotangents, kind))
    assert_close(of_others(value, gradient), of_others(*finite), 2e-2)
    missing = [not np.isfinite(a[:, START:END].astype(jnp.float32)).all() for a in (value["o"], *gradient.values())]
    assert any(missing[1:])  # nothing is hidden
    assert missing[0] is (kind != "cotangent")

"""Every rule by the Triton kernels against the scan, with packed documents, one of which is not finite."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from osdn_jax.ops import gram_recurrence, hypergradient_recurrence
from support import assert_close, jit, random_like, value_and_gradient

KERNEL = "triton_interpret"
LENGTH, SIZE, HEADS = 40, 16, 2  # more tokens than a chunk of 32; heads that are padded
START, END, BAD = 10, 36, 20  # the bad document, which spans chunks, and its first bad token
OTHERS = np.r_[:START, END:LENGTH]
IDS = np.searchsorted([START, END], np.arange(LENGTH), side="right")[None]
HYPERGRADIENT = {"eta": 0.5, "bounds": (0.9, 1.1), "initial": 1.0}
RULES = {
    "linear_attention": {},
    "mamba2": {},
    "gla": {},
    "delta_net": {},
    "gated_delta_net": {},
    "gdn2": {},
    "kda": {},
    "osdn": HYPERGRADIENT,
    "os_gdn": HYPERGRADIENT,
    "os_kda": HYPERGRADIENT,
    "pdn": {},
    "pgdn": {},
    "pkda": {},
}
CHANNEL_DECAY = ("gla", "gdn2", "kda", "os_kda", "pkda")


def inputs(rule):
    rng, rows = np.random.default_rng(0), (1, LENGTH, HEADS)
    x = {name: rng.normal(size=(*rows, SIZE)) for name in "qkv"}
    x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
    channels = (*rows, SIZE)
    gates = {
        "beta": rng.uniform(size=rows),
        "erase_gate": rng.uniform(size=channels),
        "write_gate": rng.uniform(size=channels),
        "log_decay": -rng.uniform(0, 0.3, size=channels if rule in CHANNEL_DECAY else rows),
        "log_forget": -rng.uniform(0, 0.1, size=rows),
        "gram_log_decay": -rng.uniform(0, 0.3, size=rows),
        "gram_gain": rng.uniform(size=rows),
    }
    known = inspect.signature(getattr(ops, rule)).parameters
    x |= {name: gate for name, gate in gates.items() if name in known}
    return {name: jnp.asarray(value, jnp.float32) for name, value in x.items()}


def program(rule, implementation, packed=True):
    ids = jnp.asarray(IDS) if packed else None

    def run(x):
        o, state = getattr(ops, rule)(**x, **RULES[rule], segment_ids=ids, implementation=implementation)
        return {"o": o} | {name: value for name, value in state._asdict().items() if value is not None}

    return run


@functools.cache
def compiled(rule):
    """Return the program of values and gradients by kernels, finite arguments for it, and its results for them."""
    x = inputs(rule)
    run = jax.jit(value_and_gradient(program(rule, KERNEL)))
    cotangents = random_like(jax.eval_shape(program(rule, "scan"), x), seed=1)
    return run, x, cotangents, run(x, cotangents)


def test_these_are_all_rules():
    names = {"q", "k", "v", "implementation"}
    functions = {n: f for n, f in inspect.getmembers(ops) if inspect.isfunction(f)}
    found = {name for name, f in functions.items() if names <= set(inspect.signature(f).parameters)}
    assert found == {*RULES, "delta_rule", "exact_pdn"}  # exact_pdn has no kernels


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule):
    _, x, cotangents, got = compiled(rule)
    want = jit(value_and_gradient(program(rule, "scan")))(x, cotangents)
    assert_close(got, want, 2e-5)


def spoil(x, cotangents, kind):
    """Make inputs or cotangents of the bad document non-finite, or so large that their products are."""
    at = np.s_[:, BAD : BAD + 2]
    if kind == "overflow":
        return x | {"k": x["k"].at[at].set(1e30)}, cotangents
    if kind == "cotangent":
        return x, cotangents | {"o": cotangents["o"].at[at].set(jnp.nan)}
    return x | {kind: x[kind].at[at].set(jnp.nan)}, cotangents


def of_others(value, gradient):
    """Return outputs and gradients at the tokens of the other documents, and the final state of the last."""
    tokens = {"o": value["o"], **{f"gradient of {name}": g for name, g in gradient.items()}}
    return {name: a[:, OTHERS] for name, a in tokens.items()} | {n: a for n, a in value.items() if n != "o"}


@pytest.mark.parametrize(
    ("rule", "kind"),
    [(rule, "k") for rule in RULES]
    + [(rule, kind) for rule in ("gated_delta_net", "os_gdn", "pgdn") for kind in ("v", "overflow", "cotangent")],
)
def test_a_document_that_is_not_finite_stays_alone(rule, kind):
    run, x, cotangents, finite = compiled(rule)
    value, gradient = run(*spoil(x, cotangents, kind))
    assert_close(of_others(value, gradient), of_others(*finite), 2e-5)
    missing = [not np.isfinite(a[:, START:END]).all() for a in (value["o"], *gradient.values())]
    assert any(missing[1:])  # nothing is hidden
    assert missing[0] is (kind != "cotangent")


@pytest.mark.parametrize("rule", ["osdn", "pgdn"])
def test_write_keys_come_from_the_kernels(rule, monkeypatch):
    def refuse(*_):
        raise AssertionError("a multiplier has left the kernels")

    jax.clear_caches()  # a call that was traced before would not be traced again
    for module in (gram_recurrence, hypergradient_recurrence):
        monkeypatch.setattr(module, "scaled", refuse)
    jax.eval_shape(program(rule, KERNEL, packed=False), inputs(rule))
    with pytest.raises(AssertionError, match="has left the kernels"):
        jax.eval_shape(program(rule, "scan", packed=False), inputs(rule))

"""The registries of the three operators: a back end is one function and one entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from osdn_jax.ops import delta_rule_operator, gram, hypergradient, selection
from osdn_jax.ops.selection import Implementation, choose
from support import assert_close, jit

B, T, H, K = 2, 9, 2, 4
MODULES = {"delta_rule": delta_rule_operator, "hypergradient": hypergradient, "gram": gram}


def operator(name, write_key=False):
    """Return (function, arrays), called as function(**arrays, implementation=...)."""
    rng = np.random.default_rng(0)
    uniform = lambda *shape: jnp.asarray(rng.uniform(0.1, 0.5, size=shape), jnp.float32)
    k, gate = uniform(B, T, H, K), uniform(B, T, H)
    if name == "delta_rule":
        x = {"q": uniform(B, T, H, K), "k": k, "v": uniform(B, T, H, K), "beta": gate, "log_decay": -gate}
        return ops.delta_rule, x
    if name == "gram":
        function = ops.gram_write_key if write_key else ops.gram_preconditioner
        return (lambda **x: function(center=-0.2, **x)), {"k": k, "log_decay": -gate, "gain": gate}
    function = ops.hypergradient_write_key if write_key else ops.hypergradient_preconditioner
    return (lambda **x: function(eta=0.5, bounds=(0.9, 1.05), initial=1.0, **x)), {"k": k, "beta": gate}


@pytest.mark.parametrize("write_key", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_back_end_is_one_function_and_one_entry(name, write_key, monkeypatch):
    """A new entry is used under its name, and by None if it is preferred and has no limitation."""
    implementations = MODULES[name].IMPLEMENTATIONS
    seen = []

    def run(call, options):
        seen.append(options)
        out, final = implementations["scan"].run(call, options)
        return 2 * out, final

    entry = Implementation(run)
    monkeypatch.setattr(MODULES[name], "IMPLEMENTATIONS", implementations := dict(implementations))
    implementations["mine"] = entry
    function, x = operator(name, write_key)
    want = function(**x, implementation="scan")
    assert_close(function(**x, implementation="mine"), (2 * want[0], want[1]), 1e-6)
    assert len(seen) == 1
    if name != "delta_rule":
        assert seen[0].write_key is write_key

    # None takes the first entry that is preferred, so the new one goes before the others.
    others = {key: value for key, value in implementations.items() if key != "mine"}
    limited = entry._replace(preferred=lambda call, gradient: True, limitation=lambda call, options: "k: too short")
    for first, factor in ((limited, 1), (limited._replace(limitation=entry.limitation), 2)):
        implementations.clear()
        implementations |= {"mine": first} | others
        assert_close(function(**x), (factor * want[0], want[1]), 1e-5)
    monkeypatch.setitem(implementations, "mine", limited)
    with pytest.raises(NotImplementedError, match="implementation 'mine': k: too short"):
        function(**x, implementation="mine")


@pytest.mark.parametrize("name", MODULES)
def test_registries_have_one_form(name):
    implementations = MODULES[name].IMPLEMENTATIONS
    kernels = ["mosaic_gpu", "mosaic_gpu_interpret", "triton", "triton_interpret"]
    assert sorted(implementations) == sorted(["chunk", "scan", *kernels])
    assert {type(entry) for entry in implementations.values()} == {Implementation}
    assert [key for key, entry in implementations.items() if not entry.mixes_segments] == ["scan"]


def test_choose_takes_the_first_preferred_entry_without_a_limitation():
    always, never = (lambda call, gradient: True), (lambda call, gradient: False)
    entries = {
        "unmeasured": Implementation(None, preferred=never),
        "too large": Implementation(None, lambda call, options: f"k: got {call}", always),
        "for gradients": Implementation(None, preferred=lambda call, gradient: gradient),
        "plain": Implementation(None, preferred=always),
    }
    assert choose(entries, 3, None) == "plain"
    assert choose(entries, 3, None, gradient=True) == "for gradients"
    with pytest.raises(NotImplementedError, match="implementation: got None, but no implementation serves this call"):
        choose({"unmeasured": entries["unmeasured"]}, 3, None)


@pytest.mark.parametrize("name", ["hypergradient", "gram"])
@pytest.mark.parametrize("implementation", ["scan", "chunk", None])
def test_write_keys_are_the_preconditioner_times_the_keys(name, implementation):
    """Values, final states and gradients, and the type of k."""
    (multiplier, x), (write_key, _) = (operator(name, write_key) for write_key in (False, True))
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, H, K)), jnp.float32)

    def product(x):
        d, final = multiplier(**x, implementation=implementation)
        return d * x["k"], final

    def gradient(run):
        return jax.grad(lambda x: jnp.sum(cotangent * run(x)[0]) + jnp.sum(run(x)[1]))

    at_once = lambda x: write_key(**x, implementation=implementation)
    got, want = jit(lambda x: tuple((run(x), gradient(run)(x)) for run in (at_once, product)))(x)
    assert_close(got, want, 1e-5)
    narrow = x | {"k": x["k"].astype(jnp.bfloat16)}
    keys, final = jit(at_once)(narrow)
    assert (keys.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.usefixtures("our_checks")
@pytest.mark.parametrize("name", ["hypergradient", "gram"])
def test_write_key_functions_check_their_arguments(name):
    function, x = operator(name, write_key=True)
    with pytest.raises(ValueError, match="implementation: got 'fast', expected None or one of chunk"):
        function(**x, implementation="fast")
    with pytest.raises(TypeError, match=r"k: got list, expected an array \[B, T, Hk, K\]"):
        function(**x | {"k": [1.0]})


def test_choices_on_a_cpu():
    """The scan for forward passes of small states and for preconditioners, chunks for gradients of the delta rule."""
    assert selection.on_cpu()
    q = jnp.ones((1, 64, 1, 8))
    beta = jnp.ones((1, 64, 1))
    call = delta_rule_operator.check_call(q, q, q, beta, None, None, None, None)
    options = delta_rule_operator.DeltaRuleOptions(True, 1.0, None, None)
    chosen = [choose(delta_rule_operator.IMPLEMENTATIONS, call, options, gradient=g) for g in (False, True)]
    assert chosen == ["scan", "chunk"]
    assert choose(gram.IMPLEMENTATIONS, None, None) == choose(hypergradient.IMPLEMENTATIONS, None, None) == "scan"


def test_default_is_the_scan_forward_and_chunks_for_the_gradient():
    """On a CPU; both agree with "chunk"."""
    function, x = operator("delta_rule")

    def outputs(x, implementation):
        return function(**x, chunk_size=4, implementation=implementation)

    def loss(x, implementation):
        o, state = outputs(x, implementation)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state))

    def both(implementation):
        run = lambda f: jit(lambda x: f(x, implementation))(x)
        return run(outputs), run(jax.value_and_grad(loss))

    default, by_chunks = both(None), both("chunk")
    assert_close(default, by_chunks, 1e-6)
    o_by_scan, _ = jit(lambda x: outputs(x, "scan"))(x)
    np.testing.assert_array_equal(default[0][0], o_by_scan)
    assert not np.array_equal(o_by_scan, by_chunks[0][0])
    jax.tree.map(np.testing.assert_array_equal, default[1], by_chunks[1])

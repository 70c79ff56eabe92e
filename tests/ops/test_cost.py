"""Costs of the chunkwise gradient: it saves one state per chunk, and its program does not grow with the sequence."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from osdn_jax import ops
from support import jit

H, K = 2, 64


def gradient(implementation):
    def loss(q, k, v, beta, log_decay):
        o, state = ops.delta_rule(q, k, v, beta, log_decay=log_decay, chunk_size=64, implementation=implementation)
        return jnp.sum(o) + jnp.sum(state)

    return jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))


def arguments(length):
    keys = jax.ShapeDtypeStruct((1, length, H, K), jnp.float32)
    heads = jax.ShapeDtypeStruct((1, length, H), jnp.float32)
    return keys, keys, keys, heads, heads


def temporary_bytes(implementation, length):
    return gradient(implementation).lower(*arguments(length)).compile().memory_analysis().temp_size_in_bytes


def test_chunkwise_gradient_holds_no_state_per_token():
    state = H * K * K * 4
    scan, chunk, longer = temporary_bytes("scan", 2048), temporary_bytes("chunk", 2048), temporary_bytes("chunk", 4096)
    assert scan > 2048 * state  # the scan does, so the test can tell the two apart
    assert chunk < scan / 20
    # Each further chunk adds its state, and 64 tokens of K elements in each of q, k, v, o and their gradients.
    assert (longer - chunk) / (2048 / 64) < 8 * state


def largest_array(jaxpr):
    """Return the size of the largest array that a program, or one inside it, computes."""
    sizes = [x.aval.size for eqn in jaxpr.eqns for x in eqn.outvars]
    return max(sizes + [largest_array(inner) for inner in inner_programs(jaxpr)], default=0)


def inner_programs(jaxpr):
    values = [x for eqn in jaxpr.eqns for value in eqn.params.values() for x in jax.tree.leaves(value)]
    return [x for x in (getattr(x, "jaxpr", x) for x in values) if hasattr(x, "eqns")]


def test_no_array_of_the_gradient_holds_a_state_per_token():
    largest = {
        name: largest_array(gradient(name).trace(*arguments(2048)).jaxpr.jaxpr) for name in ("scan", "chunk", None)
    }
    assert largest["scan"] >= 2048 * H * K * K
    assert largest[None] == largest["chunk"] == 2048 // 64 * H * K * K


def equations(jaxpr):
    """Return the number of equations of a program, inner programs included."""
    return len(jaxpr.eqns) + sum(equations(inner) for inner in inner_programs(jaxpr))


@pytest.mark.parametrize("implementation", ["scan", "chunk", None])
def test_programs_do_not_grow_with_the_sequence(implementation):
    counts = [equations(gradient(implementation).trace(*arguments(length)).jaxpr.jaxpr) for length in (256, 2048)]
    assert counts[0] == counts[1] > 50


def scan_lengths(jaxpr):
    """Return the lengths of all scans in a program, inner programs included."""
    lengths = {eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"}
    return lengths.union(*(scan_lengths(inner) for inner in inner_programs(jaxpr)))


@pytest.mark.parametrize(
    ("batch", "length", "steps"),
    [(1, 512, {512}), (32, 512, {512 // 32, 2}), (32, 15, {15})],  # chunks of 32, two blocks of rows
    ids=["small states", "large states", "few tokens"],
)
def test_forward_pass_on_a_cpu_is_the_scan_while_states_are_small(batch, length, steps):
    x = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in arguments(length)[:4]]
    assert scan_lengths(jax.jit(ops.delta_rule).trace(*x).jaxpr.jaxpr) == steps


@pytest.mark.parametrize(
    ("heads", "size", "decay", "by_scan"),
    [
        (4, 32, False, True),
        (16, 32, False, False),
        (8, 64, False, True),
        (16, 64, False, False),
        (16, 64, True, True),
        (32, 64, True, False),
        (1, 128, False, False),
        (1, 128, True, False),
    ],
)
def test_forward_pass_on_a_cpu_by_heads_and_size(heads, size, decay, by_scan):
    """Few small heads by scan, many or large ones by chunks; later with a decay per channel."""
    keys = jax.ShapeDtypeStruct((1, 64, heads, size), jnp.float32)
    beta = jax.ShapeDtypeStruct((1, 64, heads), jnp.float32)
    run = jax.jit(lambda q, k, v, beta, g: ops.delta_rule(q, k, v, beta, log_decay=g if decay else None))
    assert (64 in scan_lengths(run.trace(keys, keys, keys, beta, keys).jaxpr.jaxpr)) == by_scan


def test_no_prefix_scan_over_states():
    """It would hold a state per token, T K V elements. The linter bans the function, too."""
    root = Path(__file__).parents[2]
    sources = [path for folder in ("osdn_jax/ops", "pallas_kernels") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 20
    for source in sources:
        assert "associative_scan" not in source.read_text(), source.name

"""flash-linear-attention's functions, replaced by fakes."""

import dataclasses
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import peers, plan, timing
from osdn_jax.compare import parse_shapes
from support.gpu_records import owed, text


def test_a_peer_that_is_not_installed_says_so():
    with pytest.raises(peers.NoPeer, match="fla.ops.kda.chunk_kda: ModuleNotFoundError"):
        peers.load("kda")
    with pytest.raises(peers.NoPeer, match="no such rule"):
        peers.load("osdn")
    with pytest.raises(peers.NoPeer, match="as many key heads as value heads only"):
        peers.load("pkda", parse_shapes("B1T8H4Hk2D8")[0])


def test_a_peers_cache_is_that_of_the_stage_that_compiled_it(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/another")  # so that it is put back as it was before the test
    monkeypatch.delenv("TRITON_CACHE_DIR")  # as jax-triton does on import
    for at_start in (None, "/somewhere"):
        monkeypatch.setattr(peers, "_CACHE_AT_START", at_start)
        with pytest.raises(peers.NoPeer):
            peers.load("kda")
        assert os.environ.get("TRITON_CACHE_DIR") == at_start


def test_a_peer_gets_our_arguments_by_its_names(monkeypatch):
    def chunk_precond_gated_delta_rule(
        q, k, v, g_atk, g, beta_atk, beta, output_final_state, use_qk_l2norm_in_kernel, log_atk_scale
    ):
        assert not output_final_state
        assert not use_qk_l2norm_in_kernel
        return (q, k, v, g_atk, g, beta_atk, beta, log_atk_scale), None, None

    module = types.SimpleNamespace(chunk_precond_gated_delta_rule=chunk_precond_gated_delta_rule)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace())
    for name in ("fla", "fla.ops", "fla.ops.precond_gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, module)
    names = ("q", "k", "v", "gram_log_decay", "log_decay", "gram_gain", "beta", "center")
    assert peers.load("pgdn")({name: name for name in names}) == names
    module.chunk_precond_gated_delta_rule = lambda q, k: None
    with pytest.raises(peers.NoPeer, match="takes no beta, beta_atk, g, g_atk"):
        peers.load("pgdn")


def test_the_refusal_of_a_gated_backward_pass_is_said_in_short(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    said = (
        "Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results for gated chunk_bwd_dqkwg (see #640). "
        "Please upgrade Triton to >= 3.7.1 or install tilelang: `pip install tilelang`"
    )
    status, reason = timing.why(RuntimeError(said))
    assert status == "refused"
    assert reason.endswith("backward pass on Hopper with Triton 3.4 to 3.7.0 (here 3.6.0) without tilelang")
    row = {**owed("peers")[2], "status": status, "reason": reason}
    assert reason in text([row])
    assert timing.why(RuntimeError("other"))[0] == "raised"
    assert timing.why(peers.NoPeer("none"))[0] == "missing"


def test_the_gradient_of_vectors_that_are_normalised_first():
    x, cotangent = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    unit = jax.vjp(lambda y: y / jnp.linalg.norm(y, axis=-1, keepdims=True), x)[1](cotangent)[0]
    np.testing.assert_allclose(peers.along_sphere(x, cotangent), unit, atol=1e-6)


@pytest.mark.parametrize("normalizes", [False, True])
def test_a_peers_gradients_are_compared(monkeypatch, normalizes):
    """Its gradient of beta is wrong."""
    rule = "delta_net"
    peer = dataclasses.replace(peers.PEERS[rule], normalizes=normalizes)
    monkeypatch.setitem(peers.PEERS, rule, peer)

    def run(x):
        if normalizes:
            x = x | {name: x[name] / jnp.linalg.norm(x[name], axis=-1, keepdims=True) for name in ("q", "k")}
        return timing.program_of(rule, "chunk", False)(x)

    def program(run, cotangent, gradient):
        def both(x):
            out, pull = jax.vjp(run, x)
            gradients = pull(cotangent)[0]
            return out, gradients | {"beta": 1.1 * gradients["beta"]}

        return both if gradient else run

    monkeypatch.setattr(peers, "load", lambda rule, shape=None: run)
    monkeypatch.setattr(peers, "program", program)
    monkeypatch.setattr(peers, "tensors", lambda rule, arrays: {n: arrays[n] for n in peer.arguments.values()})
    monkeypatch.setattr(peers, "as_jax", lambda x: x)
    monkeypatch.setattr(peers, "synchronize", jax.block_until_ready)
    monkeypatch.setattr(peers, "release", lambda: None)
    rows, programs = [], [["peer", program] for program in plan.PROGRAMS]
    spec = {"rule": rule, "shape": "B1T64H1D64", "dry": True, "implementation": "chunk"}
    race = timing.Race({**spec, "timed": programs, "beside": [["ours", plan.BOTH]]}, rows.append)
    race.prepare(np.inf)
    race.race(np.inf)
    rows = {row["program"]: row for row in rows if "event" not in row}
    assert rows[plan.FORWARD]["difference"] < 0.02
    assert rows[plan.BOTH]["in"] == "d_beta"
    assert rows[plan.BOTH]["differences"].pop("d_beta") == pytest.approx(0.1, abs=5e-3)
    assert max(rows[plan.BOTH]["differences"].values()) < 0.02
    assert rows[plan.BOTH]["ours_seconds"] > 0
    assert "ours_seconds" not in rows[plan.FORWARD]

"""`python -m benchmarks.peers_cpu`, with fakes for the other libraries."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import peers_cpu
from benchmarks.peers import maxtext_gdn, tokamax_kda
from osdn_jax import ops

ARGUMENTS = ["--shapes", "B1T64H2D4", "--repeats", "1"]

# The module cannot be imported, and the function is one among others.
MAXTEXT = """
import nothing_that_is_installed

def another_function(x: nothing_that_is_installed.Array): ...

def jax_chunk_gated_delta_rule(
    query: Array, key, value, g, beta, chunk_size=64, initial_state=None, compute_dtype=jnp.bfloat16
):
    def step(state, token):
        q, k, v, decay, b = token
        state = state * jnp.exp(decay)[..., None, None]
        written = b[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, state))
        state = state + k[..., None] * written[..., None, :]
        return state, SCALE * jnp.einsum("bhk,bhkv->bhv", q, state)

    tokens = [jnp.moveaxis(x.astype(compute_dtype), 1, 0) for x in (query, key, value, g, beta)]
    state, o = lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(o, 0, 1), state
"""


@pytest.fixture
def checkout(tmp_path):
    file = tmp_path / maxtext_gdn.FILE
    file.parent.mkdir(parents=True)
    file.write_text(MAXTEXT.replace("SCALE", "0.5"))
    return tmp_path


def kimi_delta_attention(
    query, key, value, gate, beta, *, a_log, initial_state, lower_bound, output_final_state, use_gate_in_kernel,
    implementation
):  # fmt: skip
    assert (output_final_state, use_gate_in_kernel, implementation) == (True, True, "xla_chunked")
    q, k, v, gate, beta = (jnp.moveaxis(x, 0, 2) for x in (query, key, value, gate, beta))
    log_decay = lower_bound * jax.nn.sigmoid(jnp.exp(a_log)[None, None, :, None] * gate)
    o, state = ops.kda(q, k, v, beta=beta, log_decay=log_decay, initial_state=initial_state[:, 0])
    return jnp.moveaxis(o, 2, 0), state.recurrent[:, None]


@pytest.fixture
def installed(monkeypatch):
    name = tokamax_kda.MODULE
    monkeypatch.setattr(tokamax_kda, "version", lambda name: "0.0.17")
    for parent in [".".join(name.split(".")[: i + 1]) for i in range(name.count("."))]:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(kimi_delta_attention=kimi_delta_attention))


@pytest.mark.usefixtures("installed")
def test_both_libraries_agree_with_ours(checkout, tmp_path, capsys):
    assert peers_cpu.main([*ARGUMENTS, "--maxtext", str(checkout), "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "peers-cpu.json").read_text())
    shared = {"o", "state", "d_q", "d_k", "d_v", "d_beta", "d_initial_state"}
    assert {r["rule"]: set(r["errors"]) for r in record["differences"]} == {
        "gated_delta_net": shared | {"d_log_decay"},
        "kda": shared | {"d_gate"},
    }
    assert len(record["figures"]) == 10
    page = (tmp_path / "peers-cpu.md").read_text()
    assert "| B1T64H2D4, forward + backward: time of kda, ours / tokamax 0.0.17 |" in page
    assert page in capsys.readouterr().out


def test_a_result_that_differs_is_an_error(checkout, tmp_path, capsys):
    file = checkout / maxtext_gdn.FILE
    file.write_text(file.read_text().replace("0.5", "0.50001"))
    assert peers_cpu.main([*ARGUMENTS, "--maxtext", str(checkout), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "beyond 1e-05: B1T64H2D4 gated_delta_net o: 2.0e-05" in said
    assert "state:" not in said.replace("d_initial_state:", "")


def test_libraries_that_are_missing_are_said_with_what_to_do(tmp_path, capsys):
    found, missing = peers_cpu.pairs(tmp_path)
    assert found == {}
    assert "git clone" in missing[0]
    assert "pip install tokamax==0.0.17" in missing[1]
    assert "No such file" in missing[0]
    assert "git clone" in peers_cpu.pairs(None)[1][0]


@pytest.mark.parametrize("shape", ["B1T65H1D4", "B1T64H2Hk1D4", "B1T64H1K4V8", "T64"])
def test_a_shape_that_not_all_take_is_a_usage_error(shape, capsys):
    with pytest.raises(SystemExit) as end:
        peers_cpu.main(["--shapes", shape])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("python -m benchmarks.peers_cpu: error: --shapes: ")

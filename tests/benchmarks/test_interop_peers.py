"""`python -m benchmarks.interop_peers`, with a fake for the other library: this package itself."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import interop_peers
from benchmarks.interop import cases
from osdn_jax import interop, nn

GOOD, REFUSED = "qwen3_5_wide", "qwen3_next_gelu"  # of the names that the comparison knows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with all that the other library computes for it."""
    mixer = nn.mixer_config("delta_net", width=8, heads=2, key_dim=4, value_dim=4, conv_size=0)
    model = nn.CausalLM(nn.ModelConfig(17, 1, mixer, mlp_dim=8), rngs=nnx.Rngs(0))
    folder, rng = tmp_path_factory.mktemp("peers") / "checkpoint", np.random.default_rng(0)
    interop.save_pretrained(model, folder, layout="osdn_jax")
    ids = rng.integers(0, 17, (2, 12))
    np.savez(folder / "expected.npz", input_ids=ids, logits=interop.logits(model, ids))
    apply, parameters = nn.split_model(model)
    tokens, mask = jnp.asarray(ids, jnp.int32), (np.arange(12) >= np.array([[0], [7]])).astype(np.int32)
    padded, _ = jax.jit(apply)(parameters, tokens, segment_ids=mask)
    more = {"input_ids_padded": ids, "mask_padded": mask, "logits_padded": padded}
    for name, n in (("1", 1), ("long", 20)):
        more[f"input_ids_{name}"] = rng.integers(0, 17, (2, n))
        more[f"logits_{name}"] = interop.logits(model, more[f"input_ids_{name}"])
    np.savez(folder / "more.npz", **more)
    weights = rng.normal(size=(2, 12, 17)).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda p: (apply(p, tokens)[0] * weights).sum()))(parameters)
    saved, state = nnx.split(model)
    flat = [(path, x.replace(gradients["/".join(map(str, path))])) for path, x in nnx.to_flat_state(state)]
    interop.save_pretrained(nnx.merge(saved, nnx.from_flat_state(flat)), folder / "gradients", layout="osdn_jax")
    np.savez(folder / "gradients" / "weights.npz", input_ids=ids, weights=weights)
    return folder


class Peer:
    """Stands in for the process with the other library."""

    def __init__(self, checkpoint, *, expected=0.0, returned=0.0, fails=False):
        self.checkpoint, self.expected, self.returned, self.fails = checkpoint, expected, returned, fails
        self.wrong = fails or expected or returned
        self.names = None

    def __call__(self, peer, module, folder, *names):
        assert peer == sys.executable
        folder = Path(folder)
        if module == "make":
            self.names = names
            for name in (GOOD, REFUSED):
                if name in names:
                    shutil.copytree(self.checkpoint, folder / name)
                    expected = dict(np.load(folder / name / "expected.npz"))
                    expected["logits"] += np.float32(self.expected)
                    np.savez(folder / name / "expected.npz", **expected)
                    if self.wrong:
                        (folder / name / "more.npz").unlink()
                        shutil.rmtree(folder / name / "gradients")
            if REFUSED in names:
                config = json.loads((folder / REFUSED / "config.json").read_text())
                (folder / REFUSED / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
            return ""
        for inputs in folder.glob("*/inputs.npz"):
            if self.fails:
                inputs.with_name("theirs.txt").write_text("KeyError: lm_head")
                continue
            logits = interop.logits(interop.load_pretrained(inputs.parent), np.load(inputs)["input_ids"])
            np.savez(inputs.with_name("theirs.npz"), logits=logits + np.float32(self.returned))
        return '{"torch": "1.2"}'


def run(monkeypatch, tmp_path, peer, *arguments):
    monkeypatch.setattr(interop_peers, "run_peer", peer)
    status = interop_peers.main(["--peer", sys.executable, "--out", str(tmp_path / "out"), *arguments])
    record = json.loads((tmp_path / "out" / "interop-transformers.json").read_text())
    return status, record, (tmp_path / "out" / "interop-transformers.md").read_text()


def test_it_compares_all_ways(monkeypatch, tmp_path, checkpoint, capsys):
    peer = Peer(checkpoint)
    status, record, page = run(monkeypatch, tmp_path, peer)
    assert status == 0
    assert set(peer.names) == {*cases.CASES, *cases.REFUSABLE}
    (row,) = record["rows"]
    differences = [
        row[name] for name in ("loaded", "lengths", "padded", "gradients", "again", "returned", "original", "new")
    ]
    assert all(0 <= x <= 1e-6 for x in differences)
    assert (row["files"], row["error"], record["versions"]) == ("", "", {"torch": "1.2"})
    assert list(record["refused"]) == [REFUSED]
    assert "hidden_act" in record["refused"][REFUSED]
    assert f"| {GOOD} | " in page
    assert "**" not in page
    assert page in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "column"), [({"expected": 1e-3}, "loaded"), ({"returned": 1e-3}, "returned"), ({"fails": True}, None)]
)
def test_differences_and_errors_fail(monkeypatch, tmp_path, checkpoint, wrong, column):
    status, record, page = run(monkeypatch, tmp_path, Peer(checkpoint, **wrong), "--only", "qwen3_5")
    assert status == 1
    (row,) = record["rows"]
    if column is None:
        assert "KeyError: lm_head" in page
    else:
        assert row[column] == pytest.approx(1e-3, rel=1e-2)
        assert f"**{row[column]:.1e}**" in page


def test_wrong_gradients_fail(monkeypatch, tmp_path, checkpoint):
    folder = tmp_path / "made" / GOOD
    shutil.copytree(checkpoint, folder)
    (folder / "more.npz").unlink()
    file = folder / "gradients" / "weights.npz"
    saved = dict(np.load(file))
    np.savez(file, **{**saved, "weights": saved["weights"] * np.float32(1.01)})
    status, record, _ = run(monkeypatch, tmp_path, Peer(checkpoint), "--checkpoints", str(tmp_path / "made"))
    assert status == 1
    assert record["rows"][0]["gradients"] == pytest.approx(0.01, rel=0.1)


def test_differences_of_folders(tmp_path, checkpoint):
    assert interop_peers.folder_differences(checkpoint, checkpoint) == ""
    other = tmp_path / "other"
    interop.save_pretrained(interop.load_pretrained(checkpoint), other, dtype="bfloat16")
    assert "tensors other shape or type" in interop_peers.folder_differences(checkpoint, other)
    shutil.rmtree(other)
    model = interop.load_pretrained(checkpoint)
    nnx.update(model, jax.tree.map(lambda x: x * 2, nnx.state(model)))
    interop.save_pretrained(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "more": 1}))
    text = interop_peers.folder_differences(checkpoint, other)
    assert "tensors other values" in text
    assert "config.json: more" in text


def test_a_python_is_needed(capsys):
    with pytest.raises(SystemExit) as stop:
        interop_peers.main([])
    assert stop.value.code == 2
    assert "--peer: expected the Python of an environment" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        interop_peers.main(["--peer", "no/such/python"])
    assert "--peer: got no/such/python, expected a Python" in capsys.readouterr().err


def test_the_table_of_cases():
    everything = {**cases.CASES, **cases.REFUSABLE}
    assert len(everything) == len(cases.CASES) + len(cases.REFUSABLE)
    assert {case.family for case in everything.values()} == set(cases.BASE)
    for name, case in everything.items():
        layers = case.fields.get("layer_types", ())
        assert not layers or len(layers) == case.fields["num_hidden_layers"], name

"""Programs of the kernels, written here and read in a process without Triton."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from triton_kernels import exported
from triton_kernels.common.target import Target
from triton_kernels.export import __main__ as command
from triton_kernels.export.programs import serialized, write

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).parent.parent.parent
# Lowers the gradient of an operator with the programs of a folder, where no Triton can be imported.
READER = """
import json, re, sys, zlib
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "jax_triton"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import jax, jax.numpy as jnp
from triton_kernels import exported
from triton_kernels.common.target import Target

capability, name = int(sys.argv[1]), sys.argv[2]
programs = exported.programs()
(call,) = [call for call in programs.files if not call.gradient]
given = call.shapes() | dict(call.options)
absent = dict.fromkeys(set(exported.ARRAYS[name]) - given.keys())
run = lambda arrays: getattr(exported, name)(**absent, **{**given, **arrays}, target=Target(capability))

def loss(arrays):
    return sum(jnp.sum(x.astype(jnp.float32)) for x in run(arrays))

texts = [jax.jit(jax.grad(loss)).trace(call.shapes()).lower(lowering_platforms=("cuda",)).as_text()]
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from osdn_jax import ops
device = AbstractDevice({80: "NVIDIA A100-SXM4-80GB", 89: "NVIDIA GeForce RTX 4090"}[capability], None, "gpu")
mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
if name == "delta_rule":
    with use_abstract_mesh(mesh):
        run = lambda arrays: ops.delta_rule(**arrays, implementation="triton")
        texts.append(jax.jit(jax.grad(loss)).trace(call.shapes()).lower(lowering_platforms=("cuda",)).as_text())
text = "".join(texts)
escape = re.compile(rb'\\\\([0-9A-Fa-f]{2}|[\\\\"])')
unescaped = lambda match: match[1] if len(match[1]) == 1 else bytes.fromhex(match[1].decode())
opaque = re.findall(r'@triton_kernel_call_ffi\\(.*?opaque = "((?:[^"\\\\]|\\\\.)*)"', text)
code = [zlib.decompress(escape.sub(unescaped, x.encode())) for x in opaque]
found = sorted({int(re.search(rb"\\.target sm_(\\d+)", x)[1]) for x in code})
print(json.dumps([len(opaque), found, "triton" in sys.modules or "jax_triton" in sys.modules]))
"""
SMALL = ["--batch", "1", "--length", "100", "--heads", "2", "--key-dim", "64"]


@pytest.mark.parametrize(
    ("name", "gpu", "capability"),
    [("delta_rule", "a100", 80), ("delta_rule", "rtx4090", 89), ("hypergradient", "rtx4090", 89), ("gram", "a100", 80)],
)
def test_programs_are_read_without_triton(name, gpu, capability, tmp_path, capsys):
    folder = tmp_path / "programs"
    status = command.main(["--gpu", gpu, "--out", str(folder), "--operators", name, *SMALL])
    said = capsys.readouterr()
    assert status == 0, said
    assert f"2 programs for an {gpu.upper()}" in said.out
    index = json.loads((folder / "index.json").read_text())
    assert index["capability"] == capability
    assert {"jax", "triton", "jax-triton"} <= index["versions"].keys()
    environment = os.environ | {exported.VARIABLE: str(folder), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", READER, str(capability), name]
    run = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    count, found, has_triton = json.loads(run.stdout.splitlines()[-1])
    assert count >= 2
    assert found == [capability]
    assert not has_triton


# --- what the programs compute, with the scan on this CPU in place of the kernels -------------------------------------


def scan(*, resets, initial_state, write_key, splits, **given):
    segments = None if resets is None else jnp.cumsum(resets, axis=1, dtype=jnp.int32)
    given |= {"write_key": write_key, "segment_ids": segments, "initial_state": initial_state}
    return ops.delta_rule(**given, implementation="scan")


def arguments(resets=False):
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    given = {name: draw(2, 5, 2, 4) for name in ("q", "k", "v")}
    given |= {"beta": draw(2, 5, 2), "log_decay": -jnp.abs(draw(2, 5, 2)), "initial_state": draw(2, 2, 4, 4)}
    return given | ({"resets": jnp.zeros((2, 5), bool).at[:, 3].set(True)} if resets else {})


def loss(function, arrays, **options):
    out, final = function(**arrays, **options)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(final))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Programs for this CPU of the calls that `arguments` are for, in use."""
    with exported.recorded() as calls:
        for resets in (False, True):
            floats = {name: x for name, x in arguments(resets).items() if x.dtype != bool}
            others = {name: x for name, x in arguments(resets).items() if x.dtype == bool}
            run = lambda x: loss(exported.delta_rule, x | others, scale=0.5, target=Target(80))  # noqa: B023
            jax.eval_shape(jax.grad(run), floats)
    assert [call.gradient for call in calls] == [False, True, False, True]
    make = lambda call, capability: serialized(call, capability, scan, "cpu")
    assert write(tmp_path, calls, 80, make=make) == []
    monkeypatch.setenv(exported.VARIABLE, str(tmp_path))
    return calls


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("resets", [False, True])
def test_programs_give_values_and_gradients(programs, resets, wrap):
    given = arguments(resets)
    floats = {name: x for name, x in given.items() if x.dtype != bool}
    others = {name: x for name, x in given.items() if x.dtype == bool}
    ours = functools.partial(exported.delta_rule, scale=0.5, target=Target(80))
    theirs = functools.partial(scan, scale=0.5, erase=True, splits=None, write_key=None)
    theirs = theirs if resets else functools.partial(theirs, resets=None)
    differentiated = lambda function: wrap(jax.value_and_grad(lambda x: loss(function, x | others)))
    found, expected = differentiated(ours)(floats), differentiated(theirs)(floats)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


def test_a_call_without_a_program_is_named(programs):
    given = arguments()
    message = r"no program for delta_rule: q float32\[1,5,2,4\], .* scale=0.5, splits=None; .* has 4 others"
    with pytest.raises(NotImplementedError, match=message):
        exported.delta_rule(**{name: x[:1] for name, x in given.items()}, scale=0.5, target=Target(80))
    with pytest.raises(NotImplementedError, match="scale=0.25"):
        exported.delta_rule(**given, scale=0.25, target=Target(80))


def test_programs_for_another_gpu_are_refused(programs):
    with pytest.raises(NotImplementedError, match="has programs for compute capability 8.0, this GPU has 8.9"):
        exported.delta_rule(**arguments(), scale=0.5, target=Target(89))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(exported.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"TRITON_KERNELS_PROGRAMS: cannot read .*none/index.json"):
        exported.programs()
    for text in ('{"format": 2}', "[]", "no JSON", '{"format": 1, "capability": 80, "versions": {}}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="cannot read"):
            exported.Programs(tmp_path)
    monkeypatch.delenv(exported.VARIABLE)
    with pytest.raises(ValueError, match="got nothing, expected a folder"):
        exported.programs()
    assert not exported.in_use()


def test_programs_of_another_jax_are_said_to_be_so(programs, tmp_path):
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"versions": {"jax": "0.1"}}))
    with pytest.warns(UserWarning, match=f"were written with jax 0.1, this is {jax.__version__}"):
        exported.Programs(tmp_path)


def test_chunk_sizes_are_those_of_the_kernels(programs):
    from triton_kernels import delta_rule

    found = exported.kernels("delta_rule")
    for dtype in (jnp.bfloat16, jnp.float32):
        assert found.chunk_size(dtype, 64, 128) == delta_rule.chunk_size(dtype, 64, 128)
    assert found.limitation() is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--gpu", "v100"], "--gpu"),
        (["--gpu", "a100", "--length", "0"], "--length"),
        (["--gpu", "a100", "--calls", "/no/such/file"], "--calls"),
        (["--gpu", "a100", "--decay", "some"], "--decay"),
    ],
)
def test_a_wrong_command_line_names_the_flag(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--out", str(tmp_path / "programs"), *flags])
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert named in err
    assert err.count("\n") == 1


def test_a_folder_with_programs_is_not_overwritten(programs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--gpu", "a100", "--out", str(tmp_path)])
    assert "which has programs; expected another folder" in capsys.readouterr().err


def test_calls_can_be_given_in_a_file(tmp_path, capsys):
    """A call that the kernels refuse is told, and the others are written."""
    arrays = {name: {"shape": [1, 70, 1, 32], "dtype": "bfloat16"} for name in ("q", "k", "v")}
    arrays |= {"beta": {"shape": [1, 70, 1], "dtype": "float32"}}
    arrays |= {"initial_state": {"shape": [1, 1, 32, 32], "dtype": "float32"}}
    options = {"erase": True, "scale": 0.5, "splits": None}
    call = {"operator": "delta_rule", "gradient": False, "arrays": arrays, "options": options}
    refused = {**call, "arrays": {**arrays, "k": {"shape": [1, 70, 1, 32], "dtype": "float32"}}}
    file = tmp_path / "calls.json"
    file.write_text(json.dumps([refused, call]))
    status = command.main(["--gpu", "rtx3090", "--out", str(tmp_path / "programs"), "--calls", str(file)])
    out = capsys.readouterr().out
    assert status == 1
    assert "refused: delta_rule: q bfloat16[1,70,1,32]" in out
    assert "1 programs for an RTX3090" in out
    index = json.loads((tmp_path / "programs" / "index.json").read_text())
    assert exported.Call.of_data(index["programs"][0]) == exported.Call.of_data(call)
    file.write_text(json.dumps([{"operator": "sum"}]))
    with pytest.raises(SystemExit):
        command.main(["--gpu", "rtx3090", "--out", str(tmp_path / "more"), "--calls", str(file)])
    assert "--calls: cannot read" in capsys.readouterr().err

"""The launcher, in the interpreter: arguments, batches, vmap, meshes, and what it refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from support.triton_examples import scale_rows
from triton_kernels.common import cards, installation
from triton_kernels.common.launch import launch, recorded
from triton_kernels.common.mend import check
from triton_kernels.common.settings import OVERRIDES, TABLE, settings
from triton_kernels.common.target import INTERPRETER, Target, limitation, target_in_use


def scaled(x, factor=0.5, **options):
    """x [batch, programs, rows, size] times a factor."""
    _, programs, rows, size = x.shape
    given = {
        "inputs": {"x_ptr": x},
        "outputs": {"out_ptr": jax.ShapeDtypeStruct(x.shape, x.dtype)},
        "scalars": {"rows": rows, "factor": factor},
        "constants": {"SIZE": size, "programs": programs},
        "programs": programs,
        "target": INTERPRETER,
    }
    return launch(scale_rows, **(given | options)).out_ptr


def numbers(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_launch_runs_every_program_of_every_batch_row(wrap, dtype):
    x = numbers(2, 3, 5, 16, dtype=dtype)
    found = wrap(scaled)(x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, x * jnp.asarray(0.5, dtype))


def test_vmap_makes_one_launch_of_a_larger_batch():
    x = numbers(4, 2, 3, 2, 16)
    for mapped, given in (jax.vmap(scaled), x), (jax.vmap(jax.vmap(scaled)), x[None]):
        calls = str(jax.make_jaxpr(mapped)(given)).count("pure_callback[")
        assert calls == 1
    with recorded() as launches:
        jax.eval_shape(jax.vmap(jax.vmap(scaled, in_axes=1), in_axes=2), numbers(2, 5, 4, 3, 2, 16))
    assert launches[-1].inputs["x_ptr"].shape == (40, 3, 2, 16)
    np.testing.assert_array_equal(jax.jit(jax.vmap(scaled))(x), x * 0.5)


def test_vmap_over_an_axis_without_elements():
    assert jax.vmap(scaled)(jnp.zeros((0, 2, 3, 2, 16))).shape == (0, 2, 3, 2, 16)


def test_an_input_and_an_output_that_are_absent():
    """The kernel gets an array for each, and must not touch it."""
    x = numbers(2, 3, 2, 16)
    with recorded() as launches:
        jax.eval_shape(lambda x: scaled(x, inputs={"x_ptr": x, "other": None}, outputs={"out_ptr": x, "more": None}), x)
    (one,) = launches
    assert one.inputs["other"] == one.inputs["x_ptr"]
    assert one.outputs["more"].shape == (2, 1)


def test_a_mesh_of_two_devices():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x = numbers(2, 3, 2, 16)
    sharded = jax.jit(jax.shard_map(scaled, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    np.testing.assert_array_equal(sharded(x), x * 0.5)


def test_two_runs_are_equal():
    x = numbers(2, 3, 2, 16)
    np.testing.assert_array_equal(scaled(x), scaled(x))


def test_recording_runs_nothing_and_ends():
    x = numbers(2, 3, 2, 16)
    with recorded() as launches:
        assert not jnp.any(jax.jit(lambda x: scaled(x))(x))
    assert len(launches) == 1
    assert launches[0].name == "scale_rows"
    assert jnp.any(jax.jit(lambda x: scaled(x))(x))
    assert len(launches) == 1


def test_more_programs_than_a_launch_takes_are_refused():
    x = jax.ShapeDtypeStruct((2**11, 2**20, 1, 16), jnp.float32)
    with pytest.raises(ValueError, match="scale_rows: 2,147,483,648 programs, a launch takes at most 2,147,483,647"):
        jax.eval_shape(scaled, x)


# --- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A30", 80),
        ("NVIDIA GeForce RTX 3090", 86),
        ("NVIDIA A10G", 86),
        ("NVIDIA RTX A6000", 86),
        ("NVIDIA GeForce RTX 4090", 89),
        ("NVIDIA L4", 89),
        ("NVIDIA L40S", 89),
        ("NVIDIA RTX 6000 Ada Generation", 89),
        ("NVIDIA H100 80GB HBM3", 90),
        ("NVIDIA GH200 480GB", 90),
        ("NVIDIA B200", 100),
        ("NVIDIA GeForce RTX 5090", 120),
        ("Tesla V100-SXM2-16GB", 70),
        ("Tesla T4", 75),
        ("NVIDIA GeForce RTX 2080 Ti", 75),
        ("Quadro P6000", None),
    ],
)
def test_the_compute_capability_of_a_gpu_that_is_described(name, capability):
    device = SimpleNamespace(platform="cuda", device_kind=name)
    assert cards.capability_of(device) == capability


def test_a_gpu_that_is_present_is_asked():
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB", compute_capability="8.6")
    assert cards.capability_of(device) == 86


def test_devices_that_cannot_run_the_kernels_are_named(monkeypatch):
    with pytest.raises(NotImplementedError, match="got a cpu, the kernels need an NVIDIA GPU of compute"):
        target_in_use()
    turing = SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
    monkeypatch.setattr("triton_kernels.common.target.device_in_use", lambda: turing)
    assert limitation().startswith("got a Tesla T4 of compute capability 7.5, the kernels need")
    ampere = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr("triton_kernels.common.target.device_in_use", lambda: ampere)
    assert limitation() is None
    assert target_in_use() == Target(80)


def test_shared_memory_beyond_the_card_is_refused():
    check("scan", 101376, 89)
    with pytest.raises(
        NotImplementedError, match=r"scan: needs 101,377 bytes of shared memory, .* 8.9 may have 101,376"
    ):
        check("scan", 101377, 89)
    with pytest.raises(NotImplementedError):
        check("scan", 101377, 99)  # an unknown GPU is taken for the smallest
    check("scan", 10**6, "gfx942")


def test_what_is_missing_is_named(monkeypatch):
    assert installation.missing(interpret=True) is None
    assert "unset it, or name triton_interpret" in installation.missing(interpret=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "needs a process started with TRITON_INTERPRET=1" in installation.missing(interpret=True)
    assert installation.missing(interpret=False) is None
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    assert installation.missing(interpret=True).startswith("needs triton: pip install 'osdn-jax[triton]'")
    assert installation.missing(interpret=False).startswith("needs triton and jax-triton: pip install")


def test_settings_of_a_gpu_go_before_those_of_all(monkeypatch):
    kernel, table = next(iter(TABLE.items()))
    (bits, size), general = next(iter(table.items()))
    special = general._replace(warps=16)
    monkeypatch.setitem(OVERRIDES, 89, {kernel: {(bits, size): special}})
    assert settings(kernel, Target(89), bits, size) == special
    assert settings(kernel, Target(80), bits, size) == general
    assert settings(kernel, INTERPRETER, bits, size) == general


def test_overrides_are_of_kernels_and_sizes_that_there_are():
    for capability, kernels in OVERRIDES.items():
        assert capability in cards.SHARED_MEMORY
        for kernel, table in kernels.items():
            assert table.keys() <= TABLE[kernel].keys()

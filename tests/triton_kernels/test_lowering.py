"""The kernels in programs for GPUs that are not here: the operators lower, in every transformation that JAX has."""

import contextlib
import functools
import inspect
import re
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from jax_triton import triton_lib

from osdn_jax.ops import delta_rule, gram_preconditioner, hypergradient_preconditioner
from support.triton_examples import pipelined, scale_rows
from triton_kernels.common.launch import launch
from triton_kernels.common.mend import mend
from triton_kernels.common.target import Target, target_in_use

pytestmark = pytest.mark.compiles

GPUS = {
    "NVIDIA A100-SXM4-40GB": 80,
    "NVIDIA GeForce RTX 3090": 86,  # in no list of JAX
    "NVIDIA GeForce RTX 4090": 89,
    "NVIDIA H100 80GB HBM3": 90,
}
GPU = "NVIDIA GeForce RTX 3090"


@contextlib.contextmanager
def described(name, size=1):
    """Use a mesh of GPUs of that name, none of which is here."""
    device = jax.sharding.AbstractDevice(name, None, "gpu")
    mesh = AbstractMesh((size,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield mesh


def lowered(function, *arguments):
    """Return the module for an NVIDIA GPU, as text."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    """Return what each kernel in a module is compiled to: a message with the code in it."""
    found = re.findall(r'@triton_kernel_call_ffi\(.*?opaque = "((?:[^"\\]|\\.)*)"', text)
    assert len(found) == text.count("@triton_kernel_call_ffi(")
    escape = re.compile(rb'\\([0-9A-Fa-f]{2}|[\\"])')
    unescaped = lambda match: match[1] if len(match[1]) == 1 else bytes.fromhex(match[1].decode())
    return [zlib.decompress(escape.sub(unescaped, one.encode())) for one in found]


def capabilities(text):
    """Return the compute capabilities that the kernels in a module are compiled for, times 10."""
    return {int(re.search(rb"\.target sm_(\d+)", kernel)[1]) for kernel in kernels(text)}


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def shapes(name, batch=2, length=128, heads=2, size=64, dtype=jnp.bfloat16):
    """Return the arguments of an operator."""
    key, token = array(batch, length, heads, size, dtype=dtype), array(batch, length, heads)
    return {"delta_rule": (key, key, key, token, token), "hypergradient": (key, token), "gram": (key, token, token)}[
        name
    ]


def operator(name):
    """Return an operator with the kernels, as a function of arrays."""
    if name == "delta_rule":
        return lambda q, k, v, beta, decay: delta_rule(q, k, v, beta, log_decay=decay, implementation="triton")
    if name == "hypergradient":
        return lambda k, beta: hypergradient_preconditioner(k, beta, eta=0.1, implementation="triton")
    return lambda k, decay, gain: gram_preconditioner(k, decay, gain, center=-0.2, implementation="triton")


def loss(name):
    return lambda *arguments: sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in operator(name)(*arguments))


OPERATORS = ("delta_rule", "hypergradient", "gram")


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_lowers_for_the_gpu_in_use(name, gpu):
    with described(gpu):
        assert target_in_use() == Target(GPUS[gpu])
        text = lowered(operator(name), *shapes(name))
    assert capabilities(text) == {GPUS[gpu]}


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, n: jax.grad(f, argnums=tuple(range(n))),
        lambda f, n: jax.value_and_grad(jax.checkpoint(f), argnums=tuple(range(n))),
        lambda f, n: jax.vmap(jax.grad(f)),
        lambda f, n: lambda *xs: jax.lax.scan(lambda total, x: (total + f(*x), None), 0.0, xs)[0],
        lambda f, n: jax.grad(lambda *xs: jax.lax.scan(lambda total, x: (total + f(*x), None), 0.0, xs)[0]),
    ],
    ids=["gradient", "remat", "vmap", "scan", "gradient of a scan"],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_lowers_in_a_transformation(name, transform, request):
    arguments = shapes(name)
    if "vmap" in request.node.name or "scan" in request.node.name:
        arguments = tuple(array(3, *x.shape, dtype=x.dtype) for x in arguments)
    with described(GPU):
        text = lowered(transform(loss(name), len(arguments)), *arguments)
    assert capabilities(text) == {86}


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_lowers_in_shard_map(name, check):
    with described(GPU, size=2) as mesh:
        shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("x"), check_vma=check)
        summed = lambda *xs: jax.lax.psum(loss(name)(*xs), "x")
        text = lowered(shard(operator(name), out_specs=P("x")), *shapes(name))
        assert capabilities(text) == {86}
        text = lowered(jax.grad(shard(summed, out_specs=P())), *shapes(name))
    assert capabilities(text) == {86}


@pytest.mark.parametrize("name", OPERATORS)
def test_millions_of_tokens_lower(name):
    """More programs than the 65,535 that a grid may have on its other axes: all lie on axis 0."""
    with described(GPU):
        text = lowered(operator(name), *shapes(name, length=2**23))
    assert capabilities(text) == {86}


def test_a_scale_and_sizes_of_one():
    """Triton makes constants of scalars that are 1."""
    one = lambda q, k, v, beta, decay: delta_rule(q, k, v, beta, log_decay=decay, scale=1.0, implementation="triton")
    arguments = shapes("delta_rule", batch=1, length=1, heads=1)
    with described(GPU):
        text = lowered(jax.grad(lambda *xs: sum(jnp.sum(x.astype(jnp.float32)) for x in one(*xs))), *arguments)
    assert capabilities(text) == {86}


@pytest.mark.parametrize("gpu", ["Tesla T4", "NVIDIA GeForce RTX 2080 Ti", "AMD Instinct MI300X"])
def test_a_gpu_without_the_kernels_is_named(gpu):
    with described(gpu), pytest.raises(NotImplementedError, match=f"got a {gpu}.* capability 8.0 or later"):
        lowered(operator("delta_rule"), *shapes("delta_rule"))


# --- the launcher ----------------------------------------------------------------------------------------------------


def tiles(a, b, *, capability, stages):
    steps, size, _ = a.shape[1:]
    return launch(
        pipelined,
        inputs={"a_ptr": a, "b_ptr": b},
        outputs={"out_ptr": array(1, size, size)},
        scalars={"steps": steps},
        constants={"SIZE": size},
        programs=1,
        target=Target(capability),
        stages=stages,
    ).out_ptr


def test_too_much_shared_memory_is_refused_before_xla_sees_it():
    a, b = array(1, 9, 128, 64, dtype=jnp.bfloat16), array(1, 9, 64, 128, dtype=jnp.bfloat16)
    assert capabilities(lowered(functools.partial(tiles, capability=80, stages=5), a, b)) == {80}
    message = r"pipelined: needs 131,\d\d\d bytes of shared memory, .* 8.9 may have 101,376"
    with pytest.raises(NotImplementedError, match=message):
        lowered(functools.partial(tiles, capability=89, stages=5), a, b)
    assert capabilities(lowered(functools.partial(tiles, capability=89, stages=2), a, b)) == {89}


def test_code_is_written_for_an_assembler_of_cuda_12_8():
    x = array(2, 3, 4, 64)
    for capability in (80, 90):
        call = lambda x: (
            launch(
                scale_rows,
                inputs={"x_ptr": x},
                outputs={"out_ptr": x},
                scalars={"rows": 4, "factor": 0.5},
                constants={"SIZE": 64, "programs": 3},
                programs=3,
                target=Target(capability),  # noqa: B023
            ).out_ptr
        )
        (kernel,) = kernels(lowered(call, x))
        assert b".version 8.7" in kernel


def test_the_repair_does_nothing_where_it_is_not_needed(monkeypatch):
    rules, primitive = triton_lib.pe.dce_rules, triton_lib.triton_kernel_call_p
    needed = jax.__version_info__ >= (0, 12)
    mend()
    assert len(inspect.signature(rules[primitive]).parameters) == 2
    is_theirs = rules[primitive] is triton_lib._triton_kernel_call_dce_rule
    assert is_theirs != needed
    own = lambda used, context, equation: ([True] * len(equation.invars), equation)
    monkeypatch.setitem(rules, primitive, own)  # as a later jax-triton may have it
    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", triton_lib.compile_ttir_inplace)
    mend.cache_clear()
    mend()
    assert rules[primitive] is own

"""The Triton kernels as implementations, without Triton: what they refuse and how they say so, and padded heads."""

import importlib.metadata
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from osdn_jax.compare import measure
from osdn_jax.ops import delta_rule_operator, gram, hypergradient, selection, triton
from osdn_jax.ops.calls import DeltaRuleOptions
from osdn_jax.ops.selection import choose
from support import assert_close, jit, random_like, value_and_gradient
from triton_kernels.common import cards, installation, target

B, T, H = 1, 7, 2
OPERATORS = ("delta_rule", "hypergradient", "gram")
INSTALL = r"pip install 'osdn-jax\[triton\]'"


def device(kind, capability=None, platform="gpu"):
    more = {} if capability is None else {"compute_capability": capability}
    return types.SimpleNamespace(platform=platform, device_kind=kind, **more)


def arguments(operator, key_dim=8, value_dim=6, dtype=jnp.float32):
    """Return keyword arguments of a public operator."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.uniform(0.1, 0.5, size=shape), dtype)
    k, gate = draw(B, T, H, key_dim), draw(B, T, H).astype(jnp.float32)
    if operator == "delta_rule":
        return {"q": draw(B, T, H, key_dim), "k": k, "v": draw(B, T, H, value_dim), "beta": gate}
    if operator == "gram":
        return {"k": k, "log_decay": -gate, "gain": gate, "center": -0.2}
    return {"k": k, "beta": gate, "eta": 0.5}


def run(operator, implementation="triton", **changes):
    function = getattr(ops, operator if operator == "delta_rule" else f"{operator}_preconditioner")
    return function(**arguments(operator) | changes, implementation=implementation)


def fails(operator, said, implementation="triton", **changes):
    with pytest.raises(NotImplementedError, match=f"^implementation '{implementation}': {said}"):
        run(operator, implementation, **changes)


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends a device, an installation and a variable; importing the kernels is an error."""

    def imported(name, interpret):
        raise AssertionError(f"triton_kernels.{name} is imported")

    monkeypatch.setattr(triton, "_kernels", imported)
    real, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.9.0" if name == "triton" else version(name))

    def pretend(kind=None, capability=None, *, installed=True, variable=None):
        there = device(kind, capability) if kind else jax.devices()[0]
        monkeypatch.setattr(target, "device_in_use", lambda: there)
        monkeypatch.setattr(selection, "_device", lambda: there)
        spec = lambda name: (installed or None) if name in ("triton", "jax_triton") else real(name)
        monkeypatch.setattr(importlib.util, "find_spec", spec)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if variable is not None:
            monkeypatch.setenv("TRITON_INTERPRET", variable)

    pretend(installed=False)
    return pretend


@pytest.fixture
def kernels(machine, monkeypatch):
    """Replace the kernels by the scan, for the head dimensions that they have."""

    def delta(q, k, v, beta, *, write_key, log_decay, erase, scale, initial_state, resets, target):
        assert {q.shape[-1], v.shape[-1]} <= {32, 64, 128, 256}
        call = delta_rule_operator.DeltaRuleCall(initial_state, q, k, write_key, v, beta, log_decay, resets)
        return scan(delta_rule_operator, call, DeltaRuleOptions(erase, scale, None, None), target)

    def hyper(k, step, beta, log_forget, resets, initial, after_reset, anchor, bounds, *, return_write_key, target):
        start = hypergradient.HypergradientStart(initial, after_reset, anchor)
        call = hypergradient.HypergradientCall(k, beta, step, log_forget, start, resets)
        options = hypergradient.HypergradientOptions(bounds, None, None, return_write_key)
        out, final = scan(hypergradient, call, options, target)
        if bounds is not None and not return_write_key:
            assert bool(jnp.all((out[..., -1] >= bounds[0]) & (out[..., -1] <= bounds[1])))  # of a padding channel
        return out, final

    def squares(k, log_decay, gain, center, squash, initial, resets, *, return_write_key, target):
        call = gram.GramCall(k, log_decay, gain, center, initial, resets)
        return scan(gram, call, gram.GramOptions(squash, None, None, return_write_key), target)

    def scan(module, call, options, target):
        assert target == triton._target(True)
        return module.IMPLEMENTATIONS["scan"].run(call, options)

    found = {"delta_rule": delta, "hypergradient": hyper, "gram": squares}
    limits = {"chunk_size": lambda dtype, *_: 32 if dtype == jnp.float32 else 64, "limitation": lambda *_: None}
    monkeypatch.setattr(
        triton, "_kernels", lambda name, interpret: types.SimpleNamespace(**{name: found[name]}, **limits)
    )
    machine("NVIDIA A100-SXM4-80GB", "8.0", variable="1")


@pytest.mark.parametrize("implementation", ["triton", "triton_interpret"])
def test_arguments_are_named_before_the_device_and_the_installation(machine, implementation):
    x = {operator: arguments(operator, key_dim=257) for operator in OPERATORS}
    fails(
        "delta_rule", "q: got a head dimension of 257, the kernels take at most 256", implementation, **x["delta_rule"]
    )
    wide = arguments("delta_rule", value_dim=300)
    fails("delta_rule", "v: got a head dimension of 300, the kernels take at most 256", implementation, **wide)
    for operator in ("hypergradient", "gram"):
        fails(operator, "k: got a head dimension of 257", implementation, **x[operator])
    q = arguments("delta_rule")["q"]
    for name in ("k", "v", "write_key"):
        other = arguments("delta_rule").get(name, q).astype(jnp.bfloat16)
        fails("delta_rule", f"{name}: got bfloat16 beside a q of float32, the kernels", implementation, **{name: other})


def test_float64_is_refused(machine):
    with jax.enable_x64(True):
        wide = lambda operator, name: {name: arguments(operator)[name].astype(jnp.float64)}
        for operator, name in (("delta_rule", "q"), ("delta_rule", "v"), ("hypergradient", "k"), ("gram", "k")):
            fails(
                operator, f"{name}: got float64, the kernels take bfloat16, float16 or float32", **wide(operator, name)
            )
        fails("delta_rule", "beta: got gates and a state of float64", **wide("delta_rule", "beta"))
        fails("delta_rule", "beta: got gates and a state of float64", initial_state=jnp.zeros((B, H, 8, 6)))
        fails("hypergradient", "k: got gates and a state of float64", **wide("hypergradient", "beta"))
        fails("gram", "log_decay: got gates and a state of float64", **wide("gram", "gain"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_devices_are_named_before_the_installation(machine, operator):
    needed = r"the kernels need an NVIDIA GPU of compute capability 8.0 or later(\n|$)"
    fails(operator, f"got a cpu, {needed}")
    machine("Tesla T4", "7.5", installed=False)
    fails(operator, f"got a Tesla T4 of compute capability 7.5, {needed}")
    machine("NVIDIA GeForce RTX 2080 Ti", installed=False)  # one that is not there has no compute capability
    fails(operator, f"got a NVIDIA GeForce RTX 2080 Ti of compute capability 7.5, {needed}")
    machine("AMD Instinct MI300X", "gfx942", installed=False)
    fails(operator, f"got a AMD Instinct MI300X, {needed}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_installation_that_lacks_something_says_how_to_get_it(machine, operator):
    fails(operator, f"needs triton: {INSTALL}", "triton_interpret")
    machine("NVIDIA A100-SXM4-80GB", "8.0", installed=False)
    fails(operator, f"needs triton and jax-triton: {INSTALL}")
    machine("NVIDIA A100-SXM4-80GB", "8.0", variable="1")
    fails(operator, "cannot compile in a process started with TRITON_INTERPRET=1")
    for variable in (None, "0"):
        machine(variable=variable)
        fails(operator, "needs a process started with TRITON_INTERPRET=1", "triton_interpret")


def test_a_triton_that_is_too_old(machine, monkeypatch):
    versions = {"triton": "3.4.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    machine("NVIDIA A100-SXM4-80GB", "8.0")
    fails("gram", "needs triton 3.7 or later, got 3.4.0")
    machine(variable="1")
    fails("gram", "needs triton 3.7 or later, got 3.4.0", "triton_interpret")
    for version in ("3.7.0", "3.10.1+git123", "4.0.0"):
        versions["triton"] = version
        assert installation.missing(interpret=True) is None


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("operator", OPERATORS)
def test_chunk_sizes_are_those_of_the_kernels(operator):
    said = "chunk_size: got 16, the kernels work in chunks of {} with this type and head dimension"
    fails(operator, said.format(32), "triton_interpret", chunk_size=16)
    narrow = arguments(operator, dtype=jnp.bfloat16)
    fails(operator, said.format(64), "triton_interpret", **narrow, chunk_size=16)
    for size in (None, 64):
        run(operator, "triton_interpret", **narrow, chunk_size=size)


def test_cards_are_known_by_name():
    assert cards.capability_of(device("NVIDIA GeForce RTX 3090")) == 86
    assert cards.capability_of(device("NVIDIA B300", "10.3")) == 103
    assert cards.capability_of(device("cpu", platform="cpu")) is None
    assert cards.capability_of(device("AMD Instinct MI300X", "gfx942")) is None


def check_padding(module, implementation, x, checked, **options):
    """Assert that values and gradients through padded kernels equal those of the scan."""

    def outputs(run):
        def f(x):
            call, fixed = checked(x)
            return run(call, fixed._replace(**options))

        return f

    cotangents = random_like(jax.eval_shape(outputs(module.IMPLEMENTATIONS["scan"].run), x), seed=1)
    scan = jit(value_and_gradient(outputs(module.IMPLEMENTATIONS["scan"].run)))(x, cotangents)
    assert_close(value_and_gradient(outputs(implementation))(x, cotangents), scan, 1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("decay", [(), (40,)], ids=["scalar", "channel"])
def test_padded_heads_of_the_delta_rule(decay):
    x = arguments("delta_rule", key_dim=40, value_dim=3)
    x |= {"log_decay": -jnp.full((B, T, H, *decay), 0.1), "write_key": 2 * x["k"]}
    x["initial"] = jnp.asarray(np.random.default_rng(1).normal(size=(B, H, 40, 3)), jnp.float32)

    def checked(x):
        call = delta_rule_operator.check_call(
            x["q"], x["k"], x["v"], x["beta"], x["write_key"], x["log_decay"], x["initial"], None
        )
        return call, DeltaRuleOptions(True, 0.5, None, None)

    check_padding(delta_rule_operator, lambda *call: triton.delta_rule(*call, interpret=True), x, checked)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("write_key", [False, True])
@pytest.mark.parametrize("anchor", [None, 1.2])
@pytest.mark.parametrize("bounds", [None, (0.0, 1e9), (2 / 3, 3 / 2), (-np.inf, -0.5), (0.5, np.inf)])
def test_padded_heads_of_the_hypergradient(bounds, anchor, write_key):
    x = arguments("hypergradient", key_dim=40)
    x = {"k": x["k"], "beta": x["beta"], "log_forget": -x["beta"], "initial": x["k"][:, 0] + 0.7}

    def checked(x):
        more = {} if anchor is None else {"anchor": anchor}
        none = dict.fromkeys(("restart", "segment_ids", "chunk_size", "implementation", "context_axis"))
        k, beta = x["k"], x["beta"]
        options = {"eta": 0.5, "bounds": bounds, "normalize": False, "anchor": 0.0, **none, **more}
        return hypergradient._checked(k, beta, log_forget=x["log_forget"], initial=x["initial"], **options)

    run = lambda *call: triton.hypergradient(*call, interpret=True)
    check_padding(hypergradient, run, x, checked, write_key=write_key)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("write_key", [False, True])
def test_padded_heads_of_the_gram_preconditioner(write_key):
    x = arguments("gram", key_dim=40)
    x |= {"center": jnp.asarray([-0.2, 0.3]), "initial": x["k"][:, 0]}

    def checked(x):
        return gram._checked(x["k"], x["log_decay"], x["gain"], x["center"], 1.5, x["initial"], None, None, None, None)

    check_padding(gram, lambda *call: triton.gram(*call, interpret=True), x, checked, write_key=write_key)


def test_none_does_not_pick_the_kernels_before_a_gpu_has_run_them(kernels, machine, monkeypatch):
    """And once one has, the kernels for Hopper GPUs come first on those."""
    x = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    call = delta_rule_operator.check_call(x, x, x, jnp.ones((1, 64, 1)), None, None, None, None)
    implementations, options = delta_rule_operator.IMPLEMENTATIONS, DeltaRuleOptions(True, 1.0, None, None)
    choice = lambda: {choose(implementations, call, options, gradient=g) for g in (False, True)}
    for kind, capability in (("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA H100 80GB HBM3", "9.0")):
        machine(kind, capability)
        assert choice() == {"chunk"}
    monkeypatch.setattr(selection, "TRITON_MEASURED", True)
    assert choice() == {"triton"}
    monkeypatch.setattr(selection, "MOSAIC_GPU_MEASURED", True)
    monkeypatch.setattr("osdn_jax.ops.mosaic_gpu.on_hopper", selection.on_hopper)
    assert choice() == {"mosaic_gpu"}
    machine("NVIDIA A100-SXM4-80GB", "8.0", installed=False)
    assert choice() == {"chunk"}
    machine("Tesla T4", "7.5")
    assert choice() == {"chunk"}


def test_comparison_runs_the_kernels_where_there_is_a_gpu_for_them(machine):
    assert measure.default_implementations() == ["scan", "chunk", "auto"]
    for kind, capability, kernels in (
        ("Tesla T4", "7.5", []),
        ("NVIDIA GeForce RTX 4090", "8.9", ["triton"]),
        ("NVIDIA H200", "9.0", ["mosaic_gpu", "triton"]),
    ):
        machine(kind, capability, installed=False)
        assert measure.default_implementations() == ["scan", "chunk", *kernels, "auto"]

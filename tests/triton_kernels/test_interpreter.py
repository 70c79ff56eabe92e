"""Triton's interpreter as repaired: it rounds as a GPU does, and it finds races and accesses out of bounds."""

import ml_dtypes
import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from support.triton_examples import calls_others, elementwise, faulty, load_with_other, product
from triton_kernels.common import interpreter_watch
from triton_kernels.common.interpreter import run
from triton_kernels.common.interpreter_repair import repair
from triton_kernels.common.launch import Launch
from triton_kernels.common.target import INTERPRETER

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def call(kernel, inputs, outputs, programs=1, scalars=(), **constants):
    """Run a kernel on arrays with one batch row and return its outputs."""
    repair()
    arrays = [np.ascontiguousarray(x)[None] for x in inputs.values()]
    shapes = {name: np.empty((1, *shape), dtype) for name, (shape, dtype) in outputs.items()}
    plan = Launch(kernel, inputs, shapes, dict(scalars), constants, programs, 4, 1, INTERPRETER)
    return [x[0] for x in run(plan, arrays)]


def multiply(a, b, precision):
    (out,) = call(product, {"a_ptr": a, "b_ptr": b}, {"out_ptr": ((16, 16), np.float32)}, PRECISION=precision)
    return out


def matrices(dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((16, 16)).astype(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32])
def test_arithmetic_rounds_to_the_type(dtype):
    random = np.random.default_rng(0)
    x, y = (random.standard_normal(64).astype(dtype) for _ in range(2))
    names = ("sum_ptr", "product_ptr", "negative_ptr", "less_ptr", "rounded_ptr")
    outputs = {name: ((64,), np.int32 if name == "less_ptr" else dtype) for name in names}
    found = call(elementwise, {"x_ptr": x, "y_ptr": y}, outputs, SIZE=64)
    exact = [side.astype(np.float64) for side in (x, y)]
    # Rounded once, to the nearest: a float64 holds sums and products of these exactly, or nearly.
    expected = [exact[0] + exact[1], exact[0] * exact[1], -exact[0], exact[0] < exact[1]]
    expected.append((x.astype(np.float32) * np.float32(1.001)).astype(np.float64))
    for name, got, want in zip(names, found, expected, strict=True):
        np.testing.assert_array_equal(got, want.astype(got.dtype), err_msg=name)


def test_bfloat16_is_rounded_to_the_nearest_even():
    """Truncation, which the interpreter does as it comes, would give the smaller of the neighbours each time."""
    x = np.array([1.0, 1.0 + 2**-7, 1.5, 3.0], np.float32).astype(BFLOAT16)
    outputs = dict.fromkeys(("sum_ptr", "product_ptr", "negative_ptr"), ((4,), BFLOAT16))
    outputs |= {"less_ptr": ((4,), np.int32), "rounded_ptr": ((4,), BFLOAT16)}
    y = np.array([2**-8, 2**-8, 2**-7 * 0.75, -(2**-8)], np.float32).astype(BFLOAT16)
    total, *_ = call(elementwise, {"x_ptr": x, "y_ptr": y}, outputs, SIZE=4)
    assert total.astype(np.float32).tolist() == [1.0, 1.0 + 2**-6, 1.5 + 2**-7, 3.0]


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16, np.float32])
def test_a_masked_load_fills_with_the_other_value(dtype):
    x = np.arange(1, 17).astype(dtype)
    (out,) = call(load_with_other, {"x_ptr": x}, {"out_ptr": ((16,), dtype)}, scalars={"length": 5}, SIZE=16)
    assert out.astype(np.float32).tolist() == [1, 2, 3, 4, 5, *[-1.5] * 11]


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16])
def test_products_of_16_bit_matrices_are_exact(dtype):
    a, b = matrices(dtype)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    for precision in ("tf32", "tf32x3", "bf16x3", "ieee"):
        np.testing.assert_allclose(multiply(a, b, precision), exact, rtol=0, atol=2e-6)


def kept(precision):
    """Return what a product with the identity keeps of a matrix, and the matrix."""
    a, _ = matrices()
    return multiply(a, np.eye(16, dtype=np.float32), precision), a


def bits(x, count, *, truncated):
    """Return x in float64 with that number of bits of the significand, truncated or rounded to the nearest."""
    significand, exponent = np.frexp(x.astype(np.float64))
    scaled = significand * 2.0**count
    return np.ldexp(np.trunc(scaled) if truncated else np.rint(scaled), exponent - count)


def test_tf32_drops_the_low_bits():
    found, a = kept("tf32")
    np.testing.assert_array_equal(found, bits(a, 11, truncated=True))


@pytest.mark.parametrize(("precision", "count"), [("tf32x3", (11, 11)), ("bf16x3", (8, 8)), ("bf16x6", (8, 8, 8))])
def test_parts_are_summed(precision, count):
    found, a = kept(precision)
    rest, total = a.astype(np.float64), np.zeros(a.shape)
    for some in count:
        part = bits(rest, some, truncated=False)
        rest, total = rest - part, total + part
    # Ties may be rounded either way, which moves the last part by one unit.
    np.testing.assert_allclose(found, total, rtol=2.0 ** -(sum(count) - 1), atol=0)
    assert precision == "bf16x6" or np.abs(found - a).max() > 0


def test_ieee_is_float32():
    found, a = kept("ieee")
    np.testing.assert_array_equal(found, a)


def test_the_error_of_a_product_is_that_of_its_precision():
    a, b = matrices()
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = {name: np.abs(multiply(a, b, name) - exact).max() for name in ("tf32", "bf16x3", "tf32x3", "ieee")}
    assert 1e-4 < error["tf32"] < 2e-2
    assert 1e-6 < error["bf16x3"] < 3e-4
    assert error["tf32x3"] < 1e-5
    assert error["ieee"] < 2e-6


def copy(fault, programs=4, size=16):
    x = np.arange(programs * size, dtype=np.float32)
    outputs = {"out_ptr": (x.shape, np.float32)}
    return call(faulty, {"x_ptr": x}, outputs, programs, SIZE=size, FAULT=fault)[0], x


@pytest.mark.parametrize("fault", ["none", "masked", "two readers", "one program twice"])
def test_a_kernel_without_a_fault_passes_the_watch(fault):
    assert np.isfinite(copy(fault)[0]).all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("load before", r"faulty, program \(0, 0, 0\): load of 1 elements outside of the arrays"),
        ("load behind", r"faulty, program \(3, 0, 0\): load of 1 elements outside of the arrays"),
        ("store behind", r"faulty, program \(3, 0, 0\): store of 1 elements outside of the arrays"),
        ("load two arrays", r"faulty, program \(0, 0, 0\): one load of elements of two arrays"),
    ],
)
def test_an_access_out_of_bounds_is_found(fault, message):
    with pytest.raises(IndexError, match=message):
        copy(fault)


@pytest.mark.parametrize(("fault", "count"), [("two writers", 16), ("one writer, one reader", 64)])
def test_a_race_between_programs_is_found(fault, count):
    with pytest.raises(RuntimeError, match=f"faulty: {count} elements are written by one program and touched by"):
        copy(fault)


def test_one_program_has_no_race():
    assert np.isfinite(copy("two writers", programs=1)[0]).all()


def test_nothing_is_watched_outside_of_the_context(monkeypatch):
    monkeypatch.setattr(interpreter_watch, "_on", False)
    out, x = copy("two writers")
    np.testing.assert_array_equal(out[:16], x[-16:])
    assert np.isnan(out[16:]).all()  # what no program writes is no number


def test_the_watch_ends_with_its_context():
    before = interpreter_watch._on
    with pytest.raises(KeyError), interpreter_watch.watch():
        raise KeyError
    assert interpreter_watch._on == before


def test_the_language_is_replaced_once_per_launch_and_put_back(monkeypatch):
    """However often a kernel calls other functions; after the launch `triton.language` is what it was."""
    repair()
    x, outputs = np.arange(4, dtype=np.float32), {"out_ptr": ((1,), np.float32)}
    before, replaced, counts = dict(vars(tl)), [], []
    real = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *given: replaced.append(given[0]) or real(*given))
    for calls in (1, 8, 1):
        replaced.clear()
        (out,) = call(calls_others, {"x_ptr": x}, outputs, SIZE=4, CALLS=calls)
        assert out == [12.0 * calls]
        assert vars(tl) == before
        counts.append(len(replaced))
    assert counts[1] == counts[2] > 0

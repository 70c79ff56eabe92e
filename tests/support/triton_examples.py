"""Kernels for the tests of what all kernels share: the launcher, the interpreter, ahead-of-time compilation."""

import triton
import triton.language as tl


@triton.jit
def scale_rows(x_ptr, out_ptr, rows, factor, SIZE: tl.constexpr, programs: tl.constexpr):
    """Multiply each row of x [batch, programs, rows, SIZE] by a factor."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SIZE)
    for row in range(rows):
        at = (program * rows + row) * SIZE + columns
        tl.store(out_ptr + at, (tl.load(x_ptr + at) * factor).to(out_ptr.dtype.element_ty))


@triton.jit
def spill_in_loop(x_ptr, out_ptr, rows, SIZE: tl.constexpr):
    """Keep more values over a loop than registers hold."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.load(x_ptr + at)
    for row in range(rows):
        x = tl.load(x_ptr + row * SIZE * SIZE + at)
        total = tl.dot(total, x) + tl.dot(x, total)
    tl.store(out_ptr + at, total)


@triton.jit
def product(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    """Multiply matrices [16, 16], in float32 sums."""
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def elementwise(x_ptr, y_ptr, sum_ptr, product_ptr, negative_ptr, less_ptr, rounded_ptr, SIZE: tl.constexpr):
    """Compute with x and y in their type, and round x in float32 to it."""
    i = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(sum_ptr + i, x + y)
    tl.store(product_ptr + i, x * y)
    tl.store(negative_ptr + i, -x)
    tl.store(less_ptr + i, (x < y).to(tl.int32))
    tl.store(rounded_ptr + i, (x.to(tl.float32) * 1.001).to(x.dtype))


@triton.jit
def load_with_other(x_ptr, out_ptr, length, SIZE: tl.constexpr):
    """Copy x, and fill with -1.5 behind its length."""
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < length, other=-1.5))


@triton.jit
def faulty(x_ptr, out_ptr, SIZE: tl.constexpr, FAULT: tl.constexpr):
    """Copy x [programs, SIZE], with a fault that a GPU would not report."""
    program = tl.program_id(0)
    i = tl.arange(0, SIZE)
    at = program * SIZE + i
    if FAULT == "none":
        tl.store(out_ptr + at, tl.load(x_ptr + at))
    if FAULT == "masked":  # the mask keeps it inside
        inside = at + 1 < tl.num_programs(0) * SIZE
        tl.store(out_ptr + at, tl.load(x_ptr + at + 1, mask=inside, other=0.0))
    if FAULT == "load before":
        tl.store(out_ptr + at, tl.load(x_ptr + at - 1))
    if FAULT == "load behind":
        tl.store(out_ptr + at, tl.load(x_ptr + at + 1))
    if FAULT == "store behind":
        tl.store(out_ptr + at + 1, tl.load(x_ptr + at))
    if FAULT == "load two arrays":
        distance = (out_ptr.to(tl.int64) - x_ptr.to(tl.int64)) // 4
        tl.store(out_ptr + at, tl.load(x_ptr + at + tl.where(i == 0, distance, 0)))
    if FAULT == "two writers":
        tl.store(out_ptr + i, tl.load(x_ptr + at))
    if FAULT == "one writer, one reader":
        tl.store(out_ptr + at, tl.load(x_ptr + at))
        previous = (program + tl.num_programs(0) - 1) % tl.num_programs(0)
        tl.store(x_ptr + at, tl.load(out_ptr + previous * SIZE + i))
    if FAULT == "two readers":
        tl.store(out_ptr + at, tl.load(x_ptr + i))
    if FAULT == "one program twice":
        tl.store(out_ptr + at, tl.load(x_ptr + at))
        tl.store(out_ptr + at, tl.load(out_ptr + at) + 1)


@triton.jit
def pipelined(a_ptr, b_ptr, out_ptr, steps, SIZE: tl.constexpr):
    """Sum products of tiles [SIZE, 64] and [64, SIZE], with the tiles of several steps in shared memory."""
    wide = tl.arange(0, SIZE)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tall = tl.arange(0, 64)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        total = tl.dot(tl.load(a_ptr + step * SIZE * 64 + wide), tl.load(b_ptr + step * SIZE * 64 + tall), total)
    tl.store(out_ptr + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :], total)


@triton.jit
def copy_rows(x_ptr, out_ptr, rows, SIZE: tl.constexpr, LONG: tl.constexpr):
    """Copy x [batch, rows, SIZE], with offsets of 64 bits if LONG, else of 32, which wrap."""
    program = tl.program_id(0)
    if LONG:
        program = program.to(tl.int64)
    columns = tl.arange(0, SIZE)
    for row in tl.range(rows):
        at = (program * rows + row) * SIZE + columns
        tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def doubled(x):
    """Return twice the sum of x, by a function of Triton's library."""
    return 2 * tl.sum(x, axis=0)


@triton.jit
def calls_others(x_ptr, out_ptr, SIZE: tl.constexpr, CALLS: tl.constexpr):
    """Call another function CALLS times."""
    total = 0.0
    for _ in range(CALLS):
        total += doubled(tl.load(x_ptr + tl.arange(0, SIZE)))
    tl.store(out_ptr, total)

"""Kernels for the tests of what all kernels share."""

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

"""Roofline bounds: the minimum of bytes through device memory and of floating-point operations.

Bytes: a forward pass reads every argument once and writes its outputs once; a backward pass reads the arguments and
the cotangent of the outputs and writes a gradient for each argument. The write keys of a preconditioner and the states
at the starts of chunks are not counted: a kernel could keep them on the chip.

Operations: the products of one token and head in chunks of C = 64, with any decay: those with the state, K S, Q S and
W^T R, 2 K V each; those inside the chunk, X R and P R, 2 C V each, K W^T and Q W^T, 2 C K each. That is 164 kFLOP for
K = V = 128. A product's two gradients cost twice the product, so forward + backward is three times the forward pass.
Recomputation, the inverse (I + A)^-1 and the preconditioners are not counted.
"""

import dataclasses
from collections.abc import Mapping

from osdn_jax.compare import Shape

CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Peak rates of the device, per second: measured, or those of its data sheet."""

    bytes: float  # copy in device memory, bytes read plus bytes written
    flops: float  # bfloat16 matrix product


def least_bytes(arguments: Mapping[str, int], output: int, gradient: bool) -> int:
    """Return the bytes that a program must move, given the bytes of its arguments and of its output."""
    inputs = sum(arguments.values())
    forward = inputs + output
    return forward + (inputs + output + inputs if gradient else 0)


def least_flops(shape: Shape, gradient: bool) -> int:
    """Return the floating-point operations that a program must execute on the tensor cores."""
    k, v = shape.key_dim, shape.value_dim
    token = 3 * 2 * k * v + 2 * 2 * CHUNK * v + 2 * 2 * CHUNK * k
    return token * shape.batch * shape.length * shape.heads * (3 if gradient else 1)


def shares(seconds: float, moved: int, flops: int, ceilings: Ceilings) -> tuple[float, float]:
    """Return the times of the bytes and of the operations at the ceilings, as fractions of `seconds`."""
    return moved / ceilings.bytes / seconds, flops / ceilings.flops / seconds


def per_head_and_token(seconds: float, shape: Shape) -> float:
    """Return nanoseconds per head and token."""
    return seconds * 1e9 / (shape.batch * shape.length * shape.heads)

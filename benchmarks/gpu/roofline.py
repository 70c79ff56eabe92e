"""The least that a program can cost: bytes through device memory and floating-point operations.

Bytes: a forward pass reads every argument once and writes its outputs once; a backward pass reads the arguments and
the cotangent of the outputs and writes a gradient for each argument. Write keys that a preconditioner makes and the
memories at the starts of chunks are not counted: a kernel could keep them on the chip.

Operations: the products of one token and head in chunks of C = 64, whatever the decay: with the memory K S, Q S and
W^T R, 2 K V each; inside the chunk X R and P R, 2 C V each, K W^T and Q W^T, 2 C K each. That is 164 kFLOP for
K = V = 128. A product's two gradients cost twice the product, so that forward + backward is three times the forward
pass. What a kernel computes again, the inverse (I + A)^-1 and the preconditioners are not counted.
"""

import dataclasses
from collections.abc import Mapping

from osdn_jax.compare import Shape

CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates that the device reached for plain work, per second."""

    bytes: float  # of a copy from device memory to device memory, read and written bytes both counted
    flops: float  # of a bfloat16 matrix product


def least_bytes(arguments: Mapping[str, int], output: int, gradient: bool) -> int:
    """Bytes that a program must move, from the sizes in bytes of its arguments and its output."""
    inputs = sum(arguments.values())
    forward = inputs + output
    return forward + (inputs + output + inputs if gradient else 0)


def least_flops(shape: Shape, gradient: bool) -> int:
    """Operations that a program must do on the tensor cores."""
    k, v = shape.key_dim, shape.value_dim
    token = 3 * 2 * k * v + 2 * 2 * CHUNK * v + 2 * 2 * CHUNK * k
    return token * shape.batch * shape.length * shape.heads * (3 if gradient else 1)


def shares(seconds: float, moved: int, flops: int, ceilings: Ceilings) -> tuple[float, float]:
    """The parts of a time that its bytes and its operations would take at the ceilings."""
    return moved / ceilings.bytes / seconds, flops / ceilings.flops / seconds


def per_head_and_token(seconds: float, shape: Shape) -> float:
    """Nanoseconds."""
    return seconds * 1e9 / (shape.batch * shape.length * shape.heads)

"""Small layers of the blocks: short convolution, normalisation, MLP, embedding lookup, dropout."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from osdn_jax.nn import initializers
from osdn_jax.nn.parallel import shard_size
from osdn_jax.ops import checks, sequence_parallel


class NoDecayParam(nnx.Param):
    """A parameter without weight decay: gates, rates, preconditioners, convolutions."""


class RMSNorm(nnx.RMSNorm):
    """Flax's RMSNorm over the last axis, computed in float32; the output has the dtype of the input.

    Args:
        features: size of the last axis.
        epsilon: added to the mean of squares.
        offset: constant added to the scale, which starts at 1 - offset; 1 in Qwen's models. Default: 0.
        rngs: random streams for the parameters.
    """

    def __init__(self, features: int, epsilon: float, offset: float = 0.0, *, rngs: nnx.Rngs) -> None:
        """Create the scale of each of the `features` of the last axis."""
        start = nnx.initializers.constant(1.0 - offset)
        super().__init__(features, epsilon=epsilon, dtype=jnp.float32, scale_init=start, rngs=rngs)
        self.offset = offset

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*B D"], mask: jax.Array | None = None) -> Float[Array, "*B D"]:
        """Return x / sqrt(mean(x^2) + epsilon) * (offset + scale)."""
        if self.offset == 0.0:
            return super().__call__(x, mask).astype(x.dtype)
        wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scale = cast(nnx.Param, self.scale)[...].astype(wide.dtype) + self.offset
        return (normed * scale.reshape(*[1] * (x.ndim - 1), -1)).astype(x.dtype)


class ShortConvolution(nnx.Module):
    """Causal depthwise convolution along the sequence, without bias, that stays inside packed segments.

    Args:
        channels: C, number of features; each has its own taps.
        size: number of taps; the last one is on the current token.
        rngs: random streams for the parameters.
    """

    def __init__(self, channels: int, size: int, *, rngs: nnx.Rngs) -> None:
        """Create the taps."""
        bound = size**-0.5  # PyTorch's Conv1d default, as in the papers' code
        taps = jax.random.uniform(rngs.params(), (size, channels), minval=-bound, maxval=bound)
        self.kernel = NoDecayParam(taps)

    @jax.named_scope("short_convolution")
    def __call__(
        self,
        x: Float[Array, "B T C"],
        window: Float[Array, "B W C"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        context_axis: str | None = None,
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B W C"]]:
        """Convolve a sequence, or its continuation.

        Args:
            x: [B, T, C].
            window: [B, size - 1, C], the inputs before x, as returned by an earlier call. Default: zeros, the start of
                a sequence.
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
            context_axis: mesh axis that splits the sequence, as in `ops.delta_rule`. The windows are then those before
                the first token and after the last token of the whole sequence.

        Returns:
            The outputs [B, T, C], and the window for the next call.

        Raises:
            ValueError: window or segment_ids has another shape; or too few tokens on each device of context_axis.
            TypeError: segment_ids are not integers.
        """
        kernel = self.kernel[...]
        size, length = kernel.shape[0], x.shape[1]
        shape = (x.shape[0], size - 1, x.shape[2])
        if window is None:
            window = jnp.zeros(shape, x.dtype)
        elif window.shape != shape:
            raise ValueError(
                f"window: got shape {window.shape}, expected {shape}; the state is of another batch or model"
            )
        if segment_ids is not None:
            segment_ids = checks.segment_ids(segment_ids, x.shape[:2])
        window = window.astype(x.dtype)
        if context_axis is not None:
            if length < size - 1:
                raise ValueError(
                    f"x: got {length} tokens on each device of {context_axis!r}, expected at least the {size - 1} that "
                    "the convolution reads of the device to the left"
                )
            left = sequence_parallel.from_left(x[:, length - (size - 1) :], context_axis)
            window = jnp.where(jax.lax.axis_index(context_axis) == 0, window, left)
        padded = jnp.concatenate([window, x], axis=1)
        ids = None
        if segment_ids is not None:
            # The window belongs to the segment of the first token.
            earlier = jnp.repeat(segment_ids[:, :1], size - 1, axis=1)
            if context_axis is not None:
                earlier = sequence_parallel.ids_before(segment_ids, context_axis, size - 1)
            ids = jnp.concatenate([earlier, segment_ids], axis=1)
        out = _convolve(kernel, padded, ids)
        after = padded[:, length:]
        if ids is not None and length:  # a last segment shorter than the window continues from zeros, as it started
            last = ids[:, length:] == ids[:, -1:]
            after = jnp.where(last[..., None], after, jnp.zeros_like(after))
        return out, after if context_axis is None else sequence_parallel.from_last(after, context_axis)


@jax.checkpoint  # without it, the gradient would keep a masked copy of the inputs for each tap
def _convolve(kernel: jax.Array, padded: jax.Array, ids: jax.Array | None) -> jax.Array:
    """Convolve [B, W + T, C] inside the segments of ids, [B, W + T]; return [B, T, C]."""
    wide = jnp.float64 if padded.dtype == jnp.float64 else jnp.float32
    window = kernel.shape[0] - 1
    length = padded.shape[1] - window
    # In bfloat16, the sums over taps and, in the gradient, tokens would round and be slow on a CPU.
    out = jnp.zeros((padded.shape[0], length, padded.shape[2]), wide)
    for tap in range(window + 1):
        shifted = padded[:, tap : tap + length]
        if ids is not None and tap < window:
            shifted = jnp.where((ids[:, tap : tap + length] == ids[:, window:])[..., None], shifted, 0.0)
        out = out + shifted.astype(wide) * kernel[tap].astype(wide)[None, None]
    return out.astype(padded.dtype)


class SwiGLU(nnx.Module):
    """Gated MLP: down(activation(gate(x)) * up(x)), without biases (arXiv 2002.05202).

    Args:
        width: D, size of the residual stream.
        hidden: number of hidden units.
        layers: number of layers of the whole model, which scales the initial `down` projection.
        dtype: of activations and matrix products; the parameters are float32.
        activation: "silu" (the default) or "powlu", as in `MLPConfig`.
        rngs: random streams for the parameters.
    """

    def __init__(
        self, width: int, hidden: int, layers: int, dtype: DTypeLike, activation: str = "silu", *, rngs: nnx.Rngs
    ) -> None:
        """Create the parameters."""
        self.width, self.hidden, self.dtype = width, hidden, checks.floating_dtype("dtype", dtype)
        self.activation = activation
        self.gate_and_up = linear(width, 2 * hidden, dtype, rngs=rngs)
        self.down = linear(hidden, width, dtype, kernel_init=initializers.residual_kernel(layers), rngs=rngs)

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the projections fused along the last axis of a parameter, by the parameter's name."""
        return {"gate_and_up/kernel": (self.hidden, self.hidden)}

    def shard(self, count: int) -> nnx.GraphDef:
        """Return the graph of the MLP with 1/count of the hidden units; see `TensorParallel`."""
        hidden = shard_size("mlp_dim", self.hidden, count)
        shape, kind = (self.width, hidden, 1, self.dtype), self.activation
        return nnx.graphdef(nnx.eval_shape(lambda: SwiGLU(*shape, kind, rngs=nnx.Rngs(0))))

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP to each token."""
        gate, up = jnp.split(self.gate_and_up(x), 2, axis=-1)
        return self.down(ACTIVATIONS[self.activation](gate) * up)


def powlu(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Return x^(3 / (sqrt(x) + 1)) sigmoid(x) for x > 0 and silu(x) otherwise, as in flash-linear-attention."""
    positive = jnp.where(x > 0, x, jnp.ones_like(x))  # so that the gradient of the branch not taken is finite
    power = jnp.power(positive, 3.0 / (jnp.sqrt(positive) + 1.0))
    return jnp.where(x > 0, power * jax.nn.sigmoid(x), jax.nn.silu(x))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": jax.nn.silu, "powlu": powlu}


@jax.named_scope("embedding")
def embed(table: Float[Array, "Vocab D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return the tokens' rows of an embedding; NaN for a token outside the vocabulary, so that the mistake shows."""
    return jnp.take(table, jnp.where(tokens < 0, table.shape[0], tokens), axis=0, mode="fill", fill_value=jnp.nan)


def linear(
    inputs: int,
    outputs: int,
    dtype: DTypeLike,
    *,
    bias: bool = False,
    kernel_init: nnx.Initializer = initializers.kernel,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Return a projection, by default without bias, with float32 parameters and computation in dtype."""
    return nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=dtype, kernel_init=kernel_init, dot_general=_dot_general, rngs=rngs
    )


def _dot_general(x: jax.Array, matrix: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """Compute `project`, in the form in which Flax's Linear calls it."""
    return project(x, matrix)


@jax.custom_jvp
def project(x: Float[Array, "*B D"], matrix: Float[Array, "D E"]) -> Float[Array, "*B E"]:
    """Return x @ matrix, with a gradient that is fast on a CPU.

    XLA's CPU library takes the gradient of the matrix, a product over all tokens, only in some forms, which a barrier
    keeps: in 16 bits between the product and the transpose that JAX puts after it (else forward and backward take 7
    times as long), in 32 bits before the product, which would otherwise compute the cotangent again in its order.
    """
    return x @ matrix


@project.defjvp
def _project_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    (x, matrix), (d_x, d_matrix) = primals, tangents
    # In reverse mode a barrier around a tangent is one around its cotangent.
    if x.dtype.itemsize == 2:
        d_rows = jax.lax.optimization_barrier(d_matrix.T)
        return x @ matrix, d_x @ matrix + jnp.einsum("...d,ed->...e", x, d_rows)
    out = x @ matrix
    flat, d_flat = (y.reshape(-1, y.shape[-1]) for y in (x, d_x))
    d_out = jax.lax.optimization_barrier(d_flat @ matrix + flat @ d_matrix)
    return out, d_out.reshape(out.shape)


@jax.named_scope("norm")
def unit_norm(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Return x / sqrt(sum(x^2) + 1e-6) over the last axis, computed in float32, in the dtype of x.

    The mixers normalise queries and keys with it.

    Args:
        x: [..., D], floating-point.

    Raises:
        TypeError: x is not a floating-point array.

    Example:
        >>> [f"{x:.3f}" for x in unit_norm(jnp.asarray([3.0, 4.0]))]
        ['0.600', '0.800']
    """
    x = checks.floating_array("x", x, range(1, 32), "[..., D]")
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def dropout(x: Float[Array, "B T D"], rate: float, key: jax.Array | None) -> Float[Array, "B T D"]:
    """Zero each element with probability `rate` and scale the others by 1 / (1 - rate); without a key return x."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)

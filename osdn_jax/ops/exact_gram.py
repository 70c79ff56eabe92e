"""The exact Gram preconditioner: a float64 reference for the theorem of Preconditioned DeltaNet."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from osdn_jax.ops import checks
from osdn_jax.ops.shards import over_shards


def exact_gram_write_key(
    k: Float[Array, "B T Hk K"],
    *,
    ridge: float = 1.0,
    initial: Float[Array, "B Hk K K"] | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K K"]]:
    """Compute the write keys under which the delta rule with beta = 1 is ridge regression (arXiv 2604.21100, theorem).

        P_t = (ridge I + sum_{s<=t} k_s k_s^T)^-1,    w_t = P_{t-1} k_t / (1 + k_t^T P_{t-1} k_t)

    This is a float64 reference for small sizes: one token at a time, T K^2 operations per head, no chunkwise form.

    Args:
        k: keys, [B, T, Hk, K] float64.
        ridge: weight of the identity, positive; default 1.
        initial: P before the first token, [B, Hk, K, K]; default I / ridge.

    Returns:
        write_key: [B, T, Hk, K] float64.
        final: P after the last token, [B, Hk, K, K] float64.

    Raises:
        ValueError: ridge is not positive, or a shape does not fit k.
        TypeError: k is not float64.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from osdn_jax import ops
        >>> with jax.enable_x64(True):
        ...     k, v = jax.random.normal(jax.random.key(0), (2, 1, 8, 1, 3), jnp.float64)
        ...     write_key, _ = ops.exact_gram_write_key(k, ridge=0.1)
        ...     _, state = ops.delta_rule(k, k, v, jnp.ones((1, 8, 1)), write_key=write_key)
        ...     keys, values = k[0, :, 0], v[0, :, 0]
        ...     ridge = jnp.linalg.solve(0.1 * jnp.eye(3) + keys.T @ keys, keys.T @ values)
        ...     print(jnp.allclose(state[0, 0], ridge))
        True
    """
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    if k.dtype != jnp.float64:
        raise TypeError(
            f"k: got dtype {k.dtype}, expected float64 (the exact Gram rule is not exact in lower precision)"
        )
    ridge = checks.number("ridge", ridge)
    if ridge <= 0:
        raise ValueError(f"ridge: got {ridge}, expected more than 0")
    batch, _, heads, key_dim = k.shape
    shape = (batch, heads, key_dim, key_dim)
    if initial is None:
        initial = jnp.broadcast_to(jnp.eye(key_dim, dtype=k.dtype) / ridge, shape)
    initial = checks.shaped_array("initial", initial, shape, "[B, Hk, K, K]").astype(k.dtype)
    arrays, axes = (checks.varying_like(initial, k), k), ("bhkk", "bthk")
    return over_shards(_jitted_exact_gram, (), arrays, axes, ("bthk", "bhkk"), ("initial", "k"))


@jax.jit
def _jitted_exact_gram(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    initial, k = arrays

    def step(inverse: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        mapped = jnp.einsum("bhij,bhj->bhi", inverse, key)
        write_key = mapped / (1.0 + jnp.sum(mapped * key, axis=-1, keepdims=True))
        return inverse - write_key[..., :, None] * mapped[..., None, :], write_key

    final, write_key = lax.scan(step, initial, jnp.moveaxis(k, 1, 0))
    return jnp.moveaxis(write_key, 0, 1), final

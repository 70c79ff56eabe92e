"""Read a prompt at once, then go on one token at a time from the state:  python examples/prefill_and_decode.py

The state has the same size however long the text is, and the outputs are those of one call over the whole sequence.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from osdn_jax import nn, ops

B, T, PROMPT, H, K, V = 2, 48, 40, 2, 16, 32


def tokens(start: int, end: int, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: x[:, start:end] for name, x in arrays.items()}


# A rule of `ops`. Its state is a pytree: the recurrent state and, here, the preconditioner's.
keys = jax.random.split(jax.random.key(0), 5)
arrays = {
    "q": nn.unit_norm(jax.random.normal(keys[0], (B, T, H, K))),
    "k": nn.unit_norm(jax.random.normal(keys[1], (B, T, H, K))),
    "v": jax.random.normal(keys[2], (B, T, H, V)),
    "beta": jax.nn.sigmoid(jax.random.normal(keys[3], (B, T, H))),
    "log_decay": jax.nn.log_sigmoid(jax.random.normal(keys[4], (B, T, H)) + 3),
}
rule = jax.jit(ops.os_gdn)
whole, _ = rule(**arrays)
o, state = rule(**tokens(0, PROMPT, arrays))  # prefill
outputs = [o]
for t in range(PROMPT, T):  # decoding: sequences of one token
    o, state = rule(**tokens(t, t + 1, arrays), initial_state=state)
    outputs.append(o)
error = jnp.max(jnp.abs(jnp.concatenate(outputs, 1) - whole))
print(f"ops.os_gdn: states {[x.shape for x in jax.tree.leaves(state)]}, largest difference {error:.1e}")

# A module of `nn`. Its state also has the last inputs of the short convolution.
config = nn.mixer_config("os_kda", width=64, heads=H, key_dim=K, value_dim=V)
mixer = nn.DeltaMixer(config, layers=1, dtype=jnp.float32, rngs=nnx.Rngs(0))
mix = nnx.jit(lambda mixer, x, state: mixer(x, state))
x = jax.random.normal(jax.random.key(1), (B, T, 64))
whole, _ = mix(mixer, x, None)
o, state = mix(mixer, x[:, :PROMPT], None)
outputs = [o]
for t in range(PROMPT, T):
    o, state = mix(mixer, x[:, t : t + 1], state)
    outputs.append(o)
error = jnp.max(jnp.abs(jnp.concatenate(outputs, 1) - whole))
print(f"nn.DeltaMixer: states {[x.shape for x in jax.tree.leaves(state)]}, largest difference {error:.1e}")

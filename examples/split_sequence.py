"""A sequence split over devices by `context_axis`, inside `jax.shard_map`:  python examples/split_sequence.py

Every device holds 1 / N of the tokens. Outputs stay where their tokens are; every device gets the final state.
On a machine with a single device the script makes eight of its CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from osdn_jax import nn, ops

if jax.config.jax_num_cpu_devices < 2:  # not set by the reader; it has no effect on GPUs
    jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device

B, T, H, K, V = 1, 1024, 2, 16, 16

keys = jax.random.split(jax.random.key(0), 5)
arrays = {
    "q": nn.unit_norm(jax.random.normal(keys[0], (B, T, H, K))),
    "k": nn.unit_norm(jax.random.normal(keys[1], (B, T, H, K))),
    "v": jax.random.normal(keys[2], (B, T, H, V)),
    "beta": jax.nn.sigmoid(jax.random.normal(keys[3], (B, T, H))),
    "log_decay": jax.nn.log_sigmoid(jax.random.normal(keys[4], (B, T, H)) + 3),
}

mesh = jax.make_mesh((jax.device_count(),), ("context",))
tokens = P(None, "context")  # the second axis of every array is the sequence


@jax.jit
@functools.partial(jax.shard_map, mesh=mesh, in_specs=tokens, out_specs=(tokens, P()))
def split(arrays: dict[str, jax.Array]) -> tuple[jax.Array, ops.State]:
    return ops.gated_delta_net(**arrays, context_axis="context")


o, state = split(jax.device_put(arrays, jax.NamedSharding(mesh, tokens)))
want, final = ops.gated_delta_net(**arrays)
print(f"{jax.device_count()} devices, {o.addressable_shards[0].data.shape[1]} of {T} tokens on each")
print(f"largest difference from one device: outputs {jnp.max(jnp.abs(o - want)):.1e}")
print(f"final states {jnp.max(jnp.abs(jax.device_get(state)[0] - jax.device_get(final)[0])):.1e}")

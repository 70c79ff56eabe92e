"""Gradients of the kernels can be traced inside jax.shard_map, whichever arguments vary over devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from osdn_jax import ops

B, T, H, K = 4, 128, 2, 64


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


TOKENS = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, K), "beta": (B, T, H)}
DECAY = {"log_decay": (B, T, H)}
GRAM = {"gram_log_decay": (B, T, H), "gram_gain": (B, T, H)}
# Arguments per token, sharded over devices; arguments that are replicated; options.
RULES = {
    "linear_attention": (ops.linear_attention, {name: TOKENS[name] for name in "qkv"}, {}, {}),
    "delta_net": (ops.delta_net, TOKENS, {}, {}),
    "kda": (ops.kda, TOKENS | {"log_decay": (B, T, H, K)}, {}, {}),
    "osdn": (ops.osdn, TOKENS, {"initial": (H, K)}, {"eta": 1.0, "bounds": (0.0, 1e9)}),
    "os_gdn": (ops.os_gdn, TOKENS | DECAY, {"initial": (H, K)}, {"eta": 0.003, "bounds": (2 / 3, 3 / 2)}),
    "pgdn": (ops.pgdn, TOKENS | DECAY | GRAM, {"center": (H,)}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_can_be_traced(rule, packed):
    function, split, same, options = RULES[rule]
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = P(("data", "fsdp"))
    dtype_of = lambda name: jnp.bfloat16 if name in "qkv" else jnp.float32
    arrays = {name: shape(2 * size[0], *size[1:], dtype=dtype_of(name)) for name, size in split.items()}
    arrays |= {name: shape(*size) for name, size in same.items()}
    specs = {name: rows if name in split else P() for name in arrays}
    ids = shape(2 * B, T, dtype=jnp.int32)

    def local(x, ids):
        ids = ids if packed else None
        return function(**x, segment_ids=ids, implementation="mosaic_gpu_interpret", **options)[0]

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(specs, rows), out_specs=rows)
    gradient = jax.grad(lambda x, ids: jnp.sum(sharded(x, ids), dtype=jnp.float32))
    found = jax.eval_shape(gradient, arrays, ids)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in arrays.items()
    }

"""A mixture of experts in place of a block's MLP."""

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from osdn_jax.nn.config import MixtureConfig
from osdn_jax.nn.experts import block_size, blocks_of, expert_product
from osdn_jax.nn.layers import NoDecayParam, SwiGLU, linear, project
from osdn_jax.nn.parallel import shard_size
from osdn_jax.ops import checks


class Routing(NamedTuple):
    """Choice of a router: the experts of each token, and the weights of their outputs.

    Attributes:
        experts: the experts of each token, [B, T, active].
        weights: of their outputs, [B, T, active] float32.
        balance: the load-balancing loss, 1 if every expert has an equal share.
    """

    experts: Int[Array, "B T A"]
    weights: Float[Array, "B T A"]
    balance: Float[Array, ""]


class MixtureOfExperts(nnx.Module):
    """A sum of SwiGLU experts chosen per token by a router, and a shared expert (arXiv 2101.03961, 2401.06066).

    No token is dropped. Over a mesh the experts are split over the axis tensor.

    Args:
        config: sizes and router.
        width: D, size of the residual stream.
        layers: number of layers of the whole model, which scales the initial `down` projections.
        dtype: of activations and matrix products; the parameters and the router's computation are float32.
        local: number of experts on this device. Default: all.
        rngs: random streams for the parameters.
    """

    def __init__(
        self,
        config: MixtureConfig,
        width: int,
        layers: int,
        dtype: DTypeLike,
        local: int | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """Create the parameters."""
        self.config, self.width, self.dtype = config, width, checks.floating_dtype("dtype", dtype)
        self.local, hidden = local or config.experts, config.hidden
        self.router = linear(width, config.experts, jnp.float32, rngs=rngs)
        by_score = config.router == "sigmoid"
        self.router_bias = NoDecayParam(jnp.zeros(config.experts, jnp.float32)) if by_score else None
        experts = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        into = nnx.initializers.variance_scaling(1.0 / (2 * layers), "fan_in", "normal", batch_axis=0)
        self.experts_gate_and_up = nnx.Param(experts(rngs.params(), (self.local, width, 2 * hidden), jnp.float32))
        self.experts_down = nnx.Param(into(rngs.params(), (self.local, hidden, width), jnp.float32))
        shared = config.shared_hidden
        self.shared = SwiGLU(width, shared, layers, dtype, rngs=rngs) if shared else None
        self.shared_gate = linear(width, 1, dtype, rngs=rngs) if config.shared_gate else None

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the projections fused along the last axis of a parameter, by the parameter's name."""
        hidden = self.config.shared_hidden
        return {"shared/gate_and_up/kernel": (hidden, hidden)} if hidden else {}

    def shard(self, count: int) -> nnx.GraphDef:
        """Return the graph of the mixture with 1/count of the experts; see `TensorParallel`."""
        config, local = self.config, shard_size("experts", self.config.experts, count)
        if config.shared_hidden:
            hidden = shard_size("shared_hidden", config.shared_hidden, count)
            config = dataclasses.replace(config, shared_hidden=hidden)

        def build() -> MixtureOfExperts:
            return MixtureOfExperts(config, self.width, 1, self.dtype, local, rngs=nnx.Rngs(0))

        return nnx.graphdef(nnx.eval_shape(build))

    @jax.named_scope("router")
    def route(self, x: Float[Array, "B T D"]) -> Routing:
        """Choose the experts of each token, from the whole router.

        The balance is E sum_e f_e p_e, for the share f_e of all assignments that expert e has and its mean probability
        p_e (arXiv 2101.03961, equation 4); with the sigmoid router the probabilities are the scores divided by their
        sum.
        """
        config = self.config
        logits = project(x.astype(jnp.float32), self.router.kernel[...].astype(jnp.float32))
        if config.router == "softmax":
            scores = choice = probabilities = jax.nn.softmax(logits, axis=-1)
        else:
            scores = jax.nn.sigmoid(logits)
            probabilities = scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-20)
            bias = cast(NoDecayParam, self.router_bias)[...].astype(jnp.float32)
            choice = _in_best_groups(scores + bias[None, None], config.groups, config.active_groups)
        _, experts = jax.lax.top_k(choice, config.active)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if config.renormalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        chosen = jax.nn.one_hot(experts, config.experts, dtype=jnp.float32)
        share = jnp.mean(jnp.sum(chosen, axis=-2), axis=(0, 1)) / config.active
        balance = config.experts * jnp.sum(share * jnp.mean(probabilities, axis=(0, 1)))
        return Routing(experts.astype(jnp.int32), weights * config.scale, balance)

    @jax.named_scope("mixture")
    def mix(
        self, x: Float[Array, "B T D"], experts: Int[Array, "B T A"], weights: Float[Array, "B T A"]
    ) -> Float[Array, "B T D"]:
        """Return the weighted outputs of this device's experts, and its part of the shared expert's.

        Args:
            x: tokens.
            experts: of each token, as `route` returns them.
            weights: of the experts' outputs.
        """
        tokens, active = x.reshape(-1, self.width), experts.shape[-1]
        flat = experts.reshape(-1)
        if self.local < self.config.experts:
            flat = flat - self.local * jax.lax.axis_index("tensor")
            flat = jnp.where((flat >= 0) & (flat < self.local), flat, self.local)
        out = jnp.zeros_like(tokens)
        if flat.size:
            size = block_size(flat.size, self.config.experts)
            blocks = blocks_of(flat, self.local, size)
            rows = jnp.take(tokens, blocks.row // active, axis=0, mode="fill", fill_value=0)
            rows = rows.reshape(-1, size, self.width)
            where = (blocks.expert, blocks.number)
            gate, up = jnp.split(expert_product(rows, self.experts_gate_and_up[...], *where), 2, axis=-1)
            done = expert_product(jax.nn.silu(gate) * up, self.experts_down[...], *where)
            each = jnp.take(done.reshape(-1, self.width), blocks.place, axis=0, mode="fill", fill_value=0)
            each = each.reshape(-1, active, self.width) * weights.reshape(-1, active, 1).astype(x.dtype)
            out = jnp.sum(each, axis=1)
        out = out.reshape(x.shape)
        if self.shared is not None:
            shared = self.shared(x)
            out = out + (shared if self.shared_gate is None else shared * jax.nn.sigmoid(self.shared_gate(x)))
        return out

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the mixture to each token."""
        experts, weights, _ = self.route(x)
        return self.mix(x, experts, weights)


def _in_best_groups(choice: jax.Array, groups: int, active: int) -> jax.Array:
    """Return -inf for the experts outside of each token's best groups, ranked by the sum of their two best."""
    if groups == active:
        return choice
    grouped = choice.reshape(*choice.shape[:-1], groups, choice.shape[-1] // groups)
    best = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    _, kept = jax.lax.top_k(best, active)
    inside = jnp.any(jax.nn.one_hot(kept, groups, dtype=jnp.bool_), axis=-2)
    return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(choice.shape)

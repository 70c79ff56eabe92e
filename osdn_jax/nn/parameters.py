"""Number of parameters, counted and by closed formula, and which of them weight decay and Muon act on."""

import jax
from flax import nnx

from osdn_jax.nn.config import (
    MLP,
    AttentionConfig,
    LatentAttentionConfig,
    Mixer,
    MixtureConfig,
    ModelConfig,
)
from osdn_jax.nn.layers import NoDecayParam

# Projections to the gates of the recurrences, preconditioners and mixtures, by their name in a block.
_GATES = {"beta", "decay", "erase_gate", "write_gate", "gram_decay", "gram_gain", "router", "shared_gate"}


def count_parameters(model: nnx.Module) -> int:
    """Return the number of trainable parameters of a model, which may be abstract (`nnx.eval_shape`)."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def parameter_formula(config: ModelConfig) -> int:
    """Return the number of trainable parameters of a `CausalLM`, by closed formula."""
    width = config.width
    blocks = sum(
        count * (2 * width + mixer_formula(block.mixer) + mlp_formula(block.mlp, width))
        for block, count in config.counted
    )
    return config.vocab_size * width * (1 if config.tied_embeddings else 2) + blocks + width


def mlp_formula(config: MLP, width: int) -> int:
    """Return the number of trainable parameters of an MLP or a mixture of experts, by closed formula."""
    if not isinstance(config, MixtureConfig):
        return 3 * width * config.hidden
    experts = 3 * width * (config.experts * config.hidden + config.shared_hidden)
    router = config.experts * (width + (1 if config.router == "sigmoid" else 0))
    return experts + router + (width if config.shared_gate else 0)


def mixer_formula(config: Mixer) -> int:
    """Return the number of trainable parameters of a mixer, by closed formula."""
    width, heads, key_dim = config.width, config.heads, config.key_dim
    values = heads * config.value_dim
    if isinstance(config, LatentAttentionConfig):
        queries, rank = heads * (key_dim + config.shared_key_dim), config.query_rank
        total = width * queries if rank is None else rank * (width + 1 + queries)
        total += width * (config.rank + config.shared_key_dim) + config.rank
        return total + config.rank * (heads * key_dim + values) + values * width
    if isinstance(config, AttentionConfig):
        qkv = heads * key_dim + config.num_key_heads * (key_dim + config.value_dim)
        outputs = 2 * values if config.output_gate else values
        normed = 2 if config.qk_norm_over == "head" else heads + config.num_key_heads
        biases = qkv if config.qkv_bias else 0
        return width * (qkv + outputs) + biases + (normed * key_dim if config.qk_norm else 0)
    qkv = 2 * config.num_key_heads * key_dim + values
    total = width * qkv + config.conv_size * qkv + values * width + config.value_dim
    if config.strength == "channel":
        total += width * (config.num_key_heads * key_dim + values)
    elif config.gated_write and config.fixed_beta is None:
        total += width * (config.num_key_heads if config.beta_per_key_head else heads)
    if config.output_gate:
        rank = config.output_gate_rank
        total += (width * values if rank is None else rank * (width + values)) + config.output_gate_bias * values
    if config.decay == "scalar":
        total += width * heads + 2 * heads
    elif config.decay == "channel":
        rank = config.decay_rank or key_dim
        total += width * rank + rank * heads * key_dim + heads + heads * key_dim
    total += heads if config.decay_scale else 0
    preconditioners = config.preconditioner_heads
    if config.preconditioner == "hypergradient":
        total += preconditioners * (key_dim + (1 if config.hypergradient.learned_eta else 0))
        gate = config.hypergradient.forget_gate if config.hypergradient.forget else "constant"
        total += {"token": (width + 1) * preconditioners, "head": preconditioners, "constant": 0}[gate]
    elif config.preconditioner == "gram":
        total += 2 * width * preconditioners + (4 if config.gram.learned_squash else 3) * preconditioners
    elif config.preconditioner == "squares":
        total += preconditioners * key_dim
    return total


def weight_decay_mask(model: nnx.Module) -> dict[str, bool]:
    """Return {parameter: does weight decay act on it}: True for matrices that are not a `NoDecayParam`."""
    return {
        "/".join(map(str, path)): x.get_value().ndim >= 2 and not issubclass(x.type, NoDecayParam)
        for path, x in nnx.to_flat_state(nnx.state(model))
    }


def muon_mask(model: nnx.Module) -> dict[str, bool]:
    """Return {parameter: does Muon update it}: True for the blocks' weight matrices, except projections to gates.

    The embedding and the head are not in a block, a `NoDecayParam` is not a weight matrix, and the experts of a mixture
    are stacks of matrices.
    """
    matrices = {"/".join(map(str, path)) for path, x in nnx.to_flat_state(nnx.state(model)) if x.get_value().ndim == 2}
    return {
        name: decayed and name in matrices and name.startswith("blocks/") and _GATES.isdisjoint(name.split("/"))
        for name, decayed in weight_decay_mask(model).items()
    }

"""Number of parameters, counted and by closed formula, and which of them weight decay and Muon act on."""

import jax
from flax import nnx

from osdn_jax.nn.config import AttentionConfig, MixerConfig, ModelConfig
from osdn_jax.nn.layers import NoDecayParam

# Projections to the gates of the recurrences and preconditioners, by their name in a block.
_GATES = {"beta", "decay", "erase_gate", "write_gate", "gram_decay", "gram_gain"}


def count_parameters(model: nnx.Module) -> int:
    """Return the number of trainable parameters of a model, which may be abstract (`nnx.eval_shape`)."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def parameter_formula(config: ModelConfig) -> int:
    """Return the number of trainable parameters of a `CausalLM`, by closed formula."""
    width = config.mixer.width
    block = 2 * width + mixer_formula(config.mixer) + 3 * width * config.mlp_dim
    embeddings = config.vocab_size * width * (1 if config.tied_embeddings else 2)
    return embeddings + config.layers * block + width


def mixer_formula(config: MixerConfig | AttentionConfig) -> int:
    """Return the number of trainable parameters of a mixer, by closed formula."""
    width, heads, key_dim = config.width, config.heads, config.key_dim
    values = heads * config.value_dim
    if isinstance(config, AttentionConfig):
        qkv = heads * key_dim + config.num_key_heads * (key_dim + config.value_dim)
        outputs = 2 * values if config.output_gate else values
        return width * (qkv + outputs) + (2 * key_dim if config.qk_norm else 0)
    qkv = 2 * config.num_key_heads * key_dim + values
    total = width * qkv + config.conv_size * qkv + values * width + config.value_dim
    if config.strength == "channel":
        total += width * (config.num_key_heads * key_dim + values)
    elif config.gated_write and config.fixed_beta is None:
        total += width * heads
    if config.output_gate:
        total += width * values
    if config.decay == "scalar":
        total += width * heads + 2 * heads
    elif config.decay == "channel":
        total += width * key_dim + key_dim * heads * key_dim + heads + heads * key_dim
    preconditioners = config.preconditioner_heads
    if config.preconditioner == "hypergradient":
        total += preconditioners * key_dim
        gate = config.hypergradient.forget_gate if config.hypergradient.forget else "constant"
        total += {"token": (width + 1) * preconditioners, "head": preconditioners, "constant": 0}[gate]
    elif config.preconditioner == "gram":
        total += 2 * width * preconditioners + 3 * preconditioners
    return total


def weight_decay_mask(model: nnx.Module) -> dict[str, bool]:
    """Return {parameter: does weight decay act on it}: True for matrices that are not a `NoDecayParam`."""
    return {
        "/".join(map(str, path)): x.get_value().ndim >= 2 and not issubclass(x.type, NoDecayParam)
        for path, x in nnx.to_flat_state(nnx.state(model))
    }


def muon_mask(model: nnx.Module) -> dict[str, bool]:
    """Return {parameter: does Muon update it}: True for the blocks' weight matrices, except projections to gates.

    The embedding and the head are not in a block, and a `NoDecayParam` is not a weight matrix.
    """
    return {
        name: decayed and name.startswith("blocks/") and _GATES.isdisjoint(name.split("/"))
        for name, decayed in weight_decay_mask(model).items()
    }

"""Rows that the tables of several families share."""

from collections.abc import Collection, Mapping
from typing import Any

from osdn_jax.interop.mapping import Key, Row, fused, linear, same
from osdn_jax.nn.config import LatentAttentionConfig, MixerConfig, MixtureConfig, ModelConfig

NO_TOKENS: dict[str, None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""Entries without special tokens; the defaults of Transformers may lie outside a small vocabulary."""


def mixers_of(config: ModelConfig, attention: type[Any], heads: int = 1) -> tuple[MixerConfig, Any]:
    """Return the first delta mixer and the first mixer of another kind, which describe a model whose mixers agree.

    A model without one of them is described with a small one that no layer has.

    Args:
        config: the model.
        attention: the class of the other mixers.
        heads: heads of a mixer that stands in.
    """
    mixers = [block.mixer for block in config.stack]
    delta = next((mixer for mixer in mixers if isinstance(mixer, MixerConfig)), None)
    other = next((mixer for mixer in mixers if isinstance(mixer, attention)), None)
    sizes: dict[str, Any] = {"width": config.width, "heads": heads, "key_dim": 16, "value_dim": 16}
    latent = {"rank": 16} if attention is LatentAttentionConfig else {}
    return delta or MixerConfig(**sizes), other or attention(**sizes, **latent)


def layer_types(config: ModelConfig) -> list[str]:
    """Return the kind of each layer, as config.json of Transformers names it."""
    return ["linear_attention" if isinstance(b.mixer, MixerConfig) else "full_attention" for b in config.stack]


def frame(config: ModelConfig, embedding: str, norm: str, head: str = "lm_head.weight") -> list[Row]:
    """Return the rows of the embedding, the last norm and the head.

    The file of a model with tied embeddings may have a head with the same values.

    Args:
        config: the model.
        embedding: name of the embedding's tensor.
        norm: name of the last norm's tensor.
        head: name of the head's tensor.
    """
    if config.tied_embeddings:
        return [same(embedding, "embedding/embedding", copies=(head,)), same(norm, "norm/scale")]
    return [same(embedding, "embedding/embedding"), same(norm, "norm/scale"), linear(head, "head/kernel")]


def swiglu(
    keys: str, path: str, hidden: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> list[Row]:
    """Return the rows of a gated MLP.

    Args:
        keys: prefix of the tensors' names.
        path: prefix of the parameters' paths.
        hidden: number of hidden units.
        names: names of the tensors of gate, up and down.
    """
    gate, up, down = (f"{keys}{name}.weight" for name in names)
    return [fused({gate: hidden, up: hidden}, f"{path}gate_and_up/kernel"), linear(down, f"{path}down/kernel")]


def experts(mlp: MixtureConfig, keys: str, path: str, names: tuple[str, str, str], found: Collection[str]) -> list[Row]:
    """Return the rows of a mixture's experts: one tensor for each expert, or all experts in one.

    Args:
        mlp: the mixture.
        keys: prefix of the tensors' names.
        path: prefix of the parameters' paths.
        names: names of the tensors of an expert's gate, up and down.
        found: names in the file. With "gate_up_proj", the experts are in one tensor, as in a running Transformers.
    """
    both, down = f"{path}experts_gate_and_up", f"{path}experts_down"
    if f"{keys}gate_up_proj" in found:
        pieces = {"gate": mlp.hidden, "up": mlp.hidden}
        return [
            Row((Key(f"{keys}gate_up_proj", pieces),), {both: ("gate", "up")}),
            linear(f"{keys}down_proj", down),
        ]
    gate_key, up_key, down_key = (f"{keys}{{expert}}.{name}.weight" for name in names)
    return [
        Row(
            (Key(gate_key, {"gate": mlp.hidden}), Key(up_key, {"up": mlp.hidden})), {both: ("gate", "up")}, mlp.experts
        ),
        Row((Key(down_key),), {down: (down_key,)}, mlp.experts),
    ]


def convolution(key: str, path: str) -> Row:
    """Return the row of one tensor with the taps of all channels."""
    return Row((Key(key),), {path: (key,)}, convolution=True)


def widths(mixer: MixerConfig) -> Mapping[str, int]:
    """Return the channels of queries, keys and values of a delta mixer, by "q", "k" and "v"."""
    keys = mixer.num_key_heads * mixer.key_dim
    return {"q": keys, "k": keys, "v": mixer.heads * mixer.value_dim}


def apart(mixer: MixerConfig, keys: str, path: str, *, any_widths: bool = False) -> list[Row]:
    """Return the rows of q, k and v whose projections and convolutions are tensors apart.

    Args:
        mixer: the mixer.
        keys: prefix of the tensors' names.
        path: prefix of the parameters' paths.
        any_widths: as in `Row`, of the convolutions.
    """
    projections = {f"{keys}{name}_proj.weight": width for name, width in widths(mixer).items()}
    table = [fused(projections, f"{path}project/kernel")]
    if mixer.conv_size:
        taps = {f"{keys}{name}_conv1d.weight": width for name, width in widths(mixer).items()}
        table.append(fused(taps, f"{path}convolution/kernel", convolution=True, any_widths=any_widths))
    return table

"""Another rule for layers of a model: a preconditioner or a decay that starts without effect and is learned."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from osdn_jax.interop.loading import assembled, parameter_shapes
from osdn_jax.nn import (
    MESH_AXES,
    BlockConfig,
    CausalLM,
    DeltaMixer,
    GramConfig,
    HypergradientConfig,
    MixerConfig,
    ModelConfig,
    parameter_spec,
    split_model,
)

NEUTRAL_HYPERGRADIENT = HypergradientConfig(
    eta=0.0, learned_eta=True, bounds=(2 / 3, 3 / 2), initial=1.0, anchor=1.0, forget=False, beta_aware=True
)
"""d is d_0 = 1 while eta is 0, whatever the keys are. d_0 and eta have gradients from the start."""

NEUTRAL_GRAM = GramConfig(squash=1.0, learned_squash=True)
"""The factors on the keys are 1 while log(x) is 0."""

# log(x) and the scale of a decay start here and not at 0. In float32, 1 plus this is 1, so nothing changes, but the
# parameters that 0 would cut off from the loss have gradients, which grow with it.
_ALMOST_ZERO = 1e-10

_OF_DECAY = ("decay/down/kernel", "decay/project/kernel", "decay/bias")


def replace_rule(
    model: CausalLM,
    layers: Iterable[int] | None = None,
    *,
    preconditioner: Literal["none", "hypergradient", "gram"] | None = None,
    decay: Literal["scalar", "channel"] | None = None,
    hypergradient: HypergradientConfig | None = None,
    gram: GramConfig | None = None,
    seed: int = 0,
) -> CausalLM:
    """Return a model with another rule in some layers; all parameters of the old one are shared with it.

    By default the new parts start without effect: the logits of the new model are those of the old one, and the new
    parameters have gradients. A preconditioner by feedback starts with d_0 = 1 and a learned step size of 0, the Gram
    preconditioner with a learned squash of 1. A scalar decay becomes one per channel with the same value in all
    channels, and a layer without decay gets one with a learned scale of almost 0. docs/rule-surgery.md has the table of
    what has which gradient.

    Args:
        model: the model, such as one of `load_pretrained`.
        layers: numbers of the layers to change, the last one also as -1. Default: all with a delta rule.
        preconditioner: "hypergradient" (OSDN) or "gram" (Preconditioned DeltaNet) for layers without preconditioner;
            "none" removes one, which changes the logits. Default: None, no change.
        decay: "channel" for layers with a scalar decay or none, "scalar" for layers without. Default: None, no change.
        hypergradient: settings in place of the neutral ones. With a fixed step size they are neutral on unit keys if
            they are not beta-aware, and d_0 = 1 = anchor; models of `HypergradientConfig(learned_eta=False, anchor=0)`
            can be saved in the layouts of OSDN's authors. Default: `surgery.NEUTRAL_HYPERGRADIENT`.
        gram: settings in place of the neutral ones; models with a fixed squash can be saved in the layouts of
            flash-linear-attention. Default: `surgery.NEUTRAL_GRAM`.
        seed: of the new projections' random values. Default: 0.

    Returns:
        The new model, with the `origin` of the old one. `save_pretrained` writes it in our own layout, or in one that
        is named and can hold it.

    Raises:
        ValueError: a layer does not exist, is named twice, has no delta rule, or has a preconditioner already; the
            rule cannot have the decay or preconditioner; or nothing is to be changed.
        TypeError: an argument has another type.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from osdn_jax import interop, nn
        >>> mixer = nn.mixer_config("gated_delta_net", width=16, heads=2, key_dim=8, value_dim=8)
        >>> model = nn.CausalLM(nn.ModelConfig(32, 2, mixer, mlp_dim=32), rngs=nnx.Rngs(0))
        >>> changed = interop.replace_rule(model, layers=[-1], preconditioner="hypergradient")
        >>> [block.mixer.preconditioner for block in changed.config.stack]
        ['none', 'hypergradient']
        >>> tokens = jnp.asarray([[3, 1, 4, 1, 5]])
        >>> bool(jnp.allclose(interop.logits(changed, tokens), interop.logits(model, tokens), atol=1e-6))
        True
    """
    if not isinstance(model, CausalLM):
        raise TypeError(f"model: got {type(model).__name__}, expected a CausalLM")
    if type(seed) is not int:
        raise TypeError(f"seed: got {seed!r}, expected an int")
    settings: dict[str, Any] = {"hypergradient": hypergradient, "gram": gram}
    changed = replaced_config(model.config, layers, preconditioner=preconditioner, decay=decay, **settings)
    return _rebuilt(model, changed, seed)


def replaced_config(
    config: ModelConfig,
    layers: Iterable[int] | None = None,
    *,
    preconditioner: Literal["none", "hypergradient", "gram"] | None = None,
    decay: Literal["scalar", "channel"] | None = None,
    hypergradient: HypergradientConfig | None = None,
    gram: GramConfig | None = None,
) -> ModelConfig:
    """Return the configuration of the model that `replace_rule` makes of one with this configuration.

    The arguments and errors are those of `replace_rule`.
    """
    if preconditioner is None and decay is None:
        raise ValueError("preconditioner: got None with decay=None, expected at least one of them")
    for name, value, kind in (("hypergradient", hypergradient, HypergradientConfig), ("gram", gram, GramConfig)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a {kind.__name__}")
        if value is not None and preconditioner != name:
            raise ValueError(f"{name}: got settings with preconditioner={preconditioner!r}, expected {name!r}")
    changes: dict[str, Any] = {"hypergradient": hypergradient, "gram": gram}
    stack = config.stack
    mixers = {
        i: _changed(i, cast(MixerConfig, stack[i].mixer), preconditioner, decay, changes)
        for i in _chosen(config, layers)
    }
    return _with_mixers(config, mixers)


def _chosen(config: ModelConfig, layers: Iterable[int] | None) -> list[int]:
    """Return the numbers of the layers to change."""
    delta = [i for i, block in enumerate(config.stack) if isinstance(block.mixer, MixerConfig)]
    if layers is None:
        if not delta:
            raise ValueError("model: got one without a delta rule, expected at least one such layer")
        return delta
    if isinstance(layers, str | bytes) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: got {layers!r}, expected numbers of layers")
    chosen: list[int] = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
            raise TypeError(f"layers: got {layer!r}, expected an int")
        if not -config.depth <= layer < config.depth:
            raise ValueError(f"layers: got {layer}, expected a number from {-config.depth} to {config.depth - 1}")
        number = int(layer) % config.depth
        if number in chosen:
            raise ValueError(f"layers: got layer {number} twice, expected each once")
        if number not in delta:
            kind = type(config.stack[number].mixer).__name__
            raise ValueError(f"layers: got {layer}, whose mixer is of {kind}, expected layers with a delta rule")
        chosen.append(number)
    if not chosen:
        raise ValueError("layers: got none, expected at least one")
    return chosen


def _changed(
    layer: int, mixer: MixerConfig, preconditioner: str | None, decay: str | None, settings: Mapping[str, Any]
) -> MixerConfig:
    """Return the configuration of a layer's mixer with the new rule."""
    fields: dict[str, Any] = {}
    if decay is not None:
        fields |= _decay(layer, mixer, decay)
    if preconditioner is not None:
        if preconditioner not in ("none", "hypergradient", "gram"):
            raise ValueError(f"preconditioner: got {preconditioner!r}, expected one of none, hypergradient, gram")
        if preconditioner == "none" and mixer.preconditioner == "none":
            raise ValueError(f"preconditioner: got 'none' for layer {layer}, which has none")
        if preconditioner != "none" and mixer.preconditioner != "none":
            raise ValueError(
                f"preconditioner: got {preconditioner!r} for layer {layer}, which has {mixer.preconditioner!r}; "
                "preconditioner='none' removes that first, which changes the logits"
            )
        fields["preconditioner"] = preconditioner
        if preconditioner == "hypergradient":
            fields["hypergradient"] = settings["hypergradient"] or NEUTRAL_HYPERGRADIENT
        elif preconditioner == "gram":
            fields["gram"] = settings["gram"] or NEUTRAL_GRAM
        else:
            fields |= {"match_step": False, "preconditioner_per_value_head": False}
    try:
        return dataclasses.replace(mixer, **fields)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error


def _decay(layer: int, mixer: MixerConfig, decay: str) -> dict[str, Any]:
    allowed = {"none": ("scalar", "channel"), "scalar": ("channel",), "channel": ()}
    if decay not in ("scalar", "channel"):
        raise ValueError(f"decay: got {decay!r}, expected scalar or channel")
    if decay not in allowed[mixer.decay]:
        raise ValueError(f"decay: got {decay!r} for layer {layer}, whose decay is {mixer.decay!r} already or finer")
    if mixer.strength == "channel" or not mixer.gated_write:
        raise ValueError(f"decay: got {decay!r} for layer {layer}, expected it for a rule with one beta per token")
    fields: dict[str, Any] = {"decay": decay, "decay_scale": mixer.decay_scale or mixer.decay == "none"}
    if mixer.decay == "scalar":  # the projections of all heads have to fit through the one of low rank
        fields["decay_rank"] = max(mixer.key_dim, mixer.heads)
    return fields


def _with_mixers(config: ModelConfig, mixers: Mapping[int, MixerConfig]) -> ModelConfig:
    """Return the configuration with other mixers in some layers, equal blocks still written as such."""
    if config.blocks is None and len(mixers) == config.depth and len(set(mixers.values())) == 1:
        return dataclasses.replace(config, mixer=mixers[0])
    blocks = tuple(
        BlockConfig(mixers.get(i, block.mixer), block.mlp, block.norm) for i, block in enumerate(config.stack)
    )
    return dataclasses.replace(config, blocks=blocks, layers=None, mixer=None, mlp_dim=None)


def _rebuilt(model: CausalLM, config: ModelConfig, seed: int) -> CausalLM:
    """Return a model of the configuration with the parameters of the old one where they exist, else new ones."""
    old, names = split_model(model)[1], parameter_shapes(config)
    values = {name: old[name] for name, shape in names.items() if name in old and old[name].shape == shape}
    for i, (before, block) in enumerate(zip(model.config.stack, config.stack, strict=True)):
        if before == block:
            continue
        prefix = f"blocks/{i}/mixer/"
        if cast(MixerConfig, before.mixer).decay != cast(MixerConfig, block.mixer).decay:
            for name in _OF_DECAY:  # also where the shapes are the same by chance
                values.pop(prefix + name, None)
        missing = tuple(sorted(n.removeprefix(prefix) for n in names if n.startswith(prefix) and n not in values))
        mixer = cast(MixerConfig, block.mixer)
        new = _fresh(mixer, config.depth, config.dtype, missing, jax.random.fold_in(jax.random.key(seed), i))
        new |= _neutral_decay(cast(MixerConfig, before.mixer), mixer, old, prefix, new)
        if "gram_log_squash" in new and mixer.gram.squash == 1.0:
            new["gram_log_squash"] = jnp.full_like(new["gram_log_squash"], _ALMOST_ZERO)
        like = old[f"{prefix}project/kernel"]
        for name in missing:
            values[prefix + name] = _placed(prefix + name, new[name], like)
    changed = assembled(config, values)
    changed.origin = model.origin
    return changed


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _fresh(
    config: MixerConfig, layers: int, dtype: str, names: tuple[str, ...], key: jax.Array
) -> dict[str, jax.Array]:
    """Return the initial values of some parameters of a mixer; the compiler leaves out the others."""
    parameters = split_model(DeltaMixer(config, layers, jnp.dtype(dtype), rngs=nnx.Rngs(params=key)))[1]
    return {name: parameters[name] for name in names}


def _neutral_decay(
    before: MixerConfig, after: MixerConfig, old: Mapping[str, Any], prefix: str, new: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Return the values of a decay gate that make a new decay the old one, or almost none."""
    if before.decay == after.decay:
        return {}
    heads, channels = after.heads, after.key_dim
    if before.decay == "none":
        return {"decay/scale": jnp.full((heads,), _ALMOST_ZERO, jnp.float32)}
    # f has a column per head: the first projection computes those, and the second repeats each over its channels.
    kernel, bias = old[f"{prefix}decay/project/kernel"], old[f"{prefix}decay/bias"]
    rank = cast(int, after.decay_rank)
    spread = np.zeros((rank, heads, channels), np.float32)
    spread[np.arange(heads), np.arange(heads)] = 1.0
    down = jnp.concatenate([jnp.asarray(kernel, jnp.float32), new["decay/down/kernel"][:, heads:]], axis=1)
    return {
        "decay/down/kernel": down.astype(kernel.dtype),
        "decay/project/kernel": jnp.asarray(spread.reshape(rank, heads * channels), kernel.dtype),
        "decay/bias": jnp.repeat(bias, channels),
    }


def _placed(name: str, value: jax.Array, like: jax.Array) -> jax.Array:
    """Return a new parameter where those of the model are; matrices have their dtype, vectors float32."""
    if value.ndim == 2 and name.endswith("kernel") and "forget" not in name:
        value = value.astype(like.dtype)
    sharding = getattr(like, "sharding", None)  # a traced array has none
    if isinstance(sharding, NamedSharding) and set(MESH_AXES) <= set(sharding.mesh.axis_names):
        return jax.device_put(value, NamedSharding(sharding.mesh, parameter_spec(name)))
    return value

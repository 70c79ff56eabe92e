"""flash-linear-attention's DeltaNet, Gated DeltaNet and KDA, and their preconditioned forms (arXiv 2604.21100).

Read from version 0.6.0 (github.com/fla-org/flash-linear-attention).
"""

import functools
from collections.abc import Mapping
from typing import Any

from osdn_jax.interop.families.fla_frame import LIBRARY, describe_model, express_frame, model_rows
from osdn_jax.interop.family import Family
from osdn_jax.interop.mapping import Row, fused, linear, same
from osdn_jax.interop.options import LARGEST, Options
from osdn_jax.nn.config import GramConfig, MixerConfig, ModelConfig

_GATES = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}  # {name in config.json: name here}
_GRAM_EPSILON = 1e-6  # the one that `ops.gram_preconditioner` has

GRAM_NAMES = {"gram_decay": "a_atk_proj", "gram_gain": "b_atk_proj"}
"""Names of the projections to the gates of the Gram preconditioner; KDA calls the first one a_proj."""


def short_convolution(options: Options) -> int:
    """Return the taps of the short convolution, 0 for none."""
    taps = options.integer("conv_size", 4)
    return taps if options.flag("use_short_conv", True) else 0


def delta_net_mixer(options: Options, width: int, epsilon: float, **changes: Any) -> MixerConfig:
    """Return the mixer of DeltaNet (arXiv 2406.06484)."""
    options.without_effect("use_output_norm")  # the layer ignores it
    options.require("qk_norm", "l2")
    options.require("qk_activation", "silu")
    heads = options.integer("num_heads", 16)
    key_dim, value_dim = (_head_dim(options, name, width, heads) for name in ("expand_k", "expand_v"))
    negative = options.flag("allow_neg_eigval", False)
    learned = options.flag("use_beta", True)
    fields: dict[str, Any] = {
        "conv_size": short_convolution(options),
        "output_gate": options.flag("use_gate", False),
        "negative_eigenvalues": negative and learned,
        "fixed_beta": None if learned else 2.0 if negative else 1.0,
        "norm_epsilon": epsilon,
    }
    return MixerConfig(width, heads, key_dim, value_dim, **fields | changes)


def gated_deltanet_mixer(
    options: Options, width: int, epsilon: float, *, gates: bool = False, **changes: Any
) -> MixerConfig:
    """Return the mixer of Gated DeltaNet (arXiv 2412.06464); `gates`: output_gate_activation is an option."""
    gated = options.flag("use_gate", True)
    activation = options.choice("output_gate_activation", "swish", _GATES) if gates else "swish"
    fields: dict[str, Any] = {
        **_heads(options, heads=6, head_dim=256, expand_v=2.0),
        "decay": "scalar",
        "conv_size": short_convolution(options),
        "output_gate": gated,
        "output_gate_activation": _GATES.get(activation, "silu") if gated else "silu",
        "negative_eigenvalues": options.flag("allow_neg_eigval", False),
        "norm_epsilon": epsilon,
    }
    return MixerConfig(width, **fields | changes)


def kda_mixer(options: Options, width: int, epsilon: float, **changes: Any) -> MixerConfig:
    """Return the mixer of KDA (arXiv 2510.26692), whose low-rank projections have the channels of a value head."""
    heads = _heads(options, heads=16, head_dim=128, expand_v=1.0)
    bound = options.number("lower_bound", None, above=-LARGEST, below=0.0)
    if options.flag("safe_gate", False) and bound is None:
        options.problem("safe_gate", True, "it with a lower_bound")
    fields: dict[str, Any] = {
        **heads,
        "decay": "channel",
        "decay_rank": heads["value_dim"],
        "decay_bound": bound,
        "conv_size": short_convolution(options),
        "output_gate": True,
        "output_gate_rank": heads["value_dim"],
        "output_gate_bias": True,
        "output_gate_activation": "sigmoid",
        "negative_eigenvalues": options.flag("allow_neg_eigval", False),
        "norm_epsilon": epsilon,
    }
    return MixerConfig(width, **fields | changes)


def mixer_rows(config: MixerConfig, tensors: str, parameters: str, gram: Mapping[str, str] = GRAM_NAMES) -> list[Row]:
    """Return the rows of a mixer without the OSDN authors' preconditioners.

    Args:
        config: the mixer.
        tensors: prefix of the names of its tensors.
        parameters: prefix of the paths of its parameters.
        gram: names of the projections to the gates of the Gram preconditioner.
    """
    keys, values = config.num_key_heads * config.key_dim, config.heads * config.value_dim
    widths = {"q": keys, "k": keys, "v": values}
    rows = [
        fused({f"{tensors}{x}_proj.weight": size for x, size in widths.items()}, f"{parameters}project/kernel"),
        same(f"{tensors}o_norm.weight", f"{parameters}norm/scale"),
        linear(f"{tensors}o_proj.weight", f"{parameters}output/kernel"),
    ]
    if config.conv_size:
        taps = {f"{tensors}{x}_conv1d.weight": size for x, size in widths.items()}
        rows.append(fused(taps, f"{parameters}convolution/kernel", convolution=True))
    if config.fixed_beta is None:
        rows.append(linear(f"{tensors}b_proj.weight", f"{parameters}beta/kernel"))
    if config.decay != "none":
        rows += [
            same(f"{tensors}A_log", f"{parameters}decay/log_rate"),
            same(f"{tensors}dt_bias", f"{parameters}decay/bias"),
        ]
    if config.decay == "scalar":
        rows.append(linear(f"{tensors}a_proj.weight", f"{parameters}decay/project/kernel"))
    elif config.decay == "channel":
        rows += [
            linear(f"{tensors}f_proj.0.weight", f"{parameters}decay/down/kernel"),
            linear(f"{tensors}f_proj.1.weight", f"{parameters}decay/project/kernel"),
        ]
    if config.output_gate_rank is not None:
        rows += [
            linear(f"{tensors}g_proj.0.weight", f"{parameters}gate/down/kernel"),
            linear(f"{tensors}g_proj.1.weight", f"{parameters}gate/project/kernel"),
            same(f"{tensors}g_proj.1.bias", f"{parameters}gate/project/bias"),
        ]
    elif config.output_gate:
        rows.append(linear(f"{tensors}g_proj.weight", f"{parameters}gate/kernel"))
    if config.preconditioner == "gram":
        rows += [
            linear(f"{tensors}{gram['gram_decay']}.weight", f"{parameters}gram_decay/project/kernel"),
            linear(f"{tensors}{gram['gram_gain']}.weight", f"{parameters}gram_gain/kernel"),
            same(f"{tensors}A_log_atk", f"{parameters}gram_decay/log_rate"),
            same(f"{tensors}dt_bias_atk", f"{parameters}gram_decay/bias"),
            same(f"{tensors}log_atk_scale", f"{parameters}gram_center"),
        ]
    return rows


def express_mixer(config: MixerConfig) -> dict[str, Any]:
    """Return the entries of config.json of a mixer, those that only some families have included."""
    return {
        "use_short_conv": config.conv_size > 0,
        "conv_size": config.conv_size or 4,
        "allow_neg_eigval": config.negative_eigenvalues or config.fixed_beta == 2.0,
    }


def _express_heads(config: MixerConfig) -> dict[str, Any]:
    return {
        "num_heads": config.num_key_heads,
        "num_v_heads": config.heads,
        "head_dim": config.key_dim,
        "expand_v": config.value_dim / config.key_dim,
    }


def express_delta_net(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of the config.json of a DeltaNet."""
    entries, mixer = express_frame(config)
    return {
        "model_type": "delta_net",
        "architectures": ["DeltaNetForCausalLM"],
        **entries,
        **express_mixer(mixer),
        "num_heads": mixer.heads,
        "expand_k": mixer.heads * mixer.key_dim / config.width,
        "expand_v": mixer.heads * mixer.value_dim / config.width,
        "use_beta": mixer.fixed_beta is None,
        "use_gate": mixer.output_gate,
    }


def express_gated_deltanet(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of the config.json of a Gated DeltaNet."""
    entries, mixer = express_frame(config)
    return {
        "model_type": "gated_deltanet",
        "architectures": ["GatedDeltaNetForCausalLM"],
        **entries,
        **express_mixer(mixer),
        **_express_heads(mixer),
        "use_gate": mixer.output_gate,
        "output_gate_activation": {"silu": "swish"}.get(mixer.output_gate_activation, mixer.output_gate_activation),
    }


def express_kda(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of the config.json of a KDA."""
    entries, mixer = express_frame(config)
    return {
        "model_type": "kda",
        "architectures": ["KDAForCausalLM"],
        **entries,
        **express_mixer(mixer),
        **_express_heads(mixer),
        "lower_bound": mixer.decay_bound,
        "safe_gate": False,
    }


def _express_gram(
    config: ModelConfig, base: Any = None, model_type: str = "", architecture: str = "", drop: tuple[str, ...] = ()
) -> dict[str, Any]:
    _, mixer = express_frame(config)
    changes = {"model_type": model_type, "architectures": [architecture], "squash_x": mixer.gram.squash}
    return {name: value for name, value in base(config).items() if name not in drop} | changes


def _head_dim(options: Options, name: str, width: int, heads: int) -> int:
    """Return the channels of a head, of a width that is a multiple of hidden_size."""
    ratio = options.number(name, 1.0)
    channels = round(width * ratio)
    if abs(width * ratio - channels) > 1e-9 * channels or channels % heads or channels < heads:
        options.problem(name, ratio, f"hidden_size * {name} to be a multiple of num_heads = {heads}")
        return 1
    return channels // heads


def _heads(options: Options, *, heads: int, head_dim: int, expand_v: float) -> dict[str, Any]:
    """Return the fields of heads: key heads, value heads and their channels."""
    key_heads = options.integer("num_heads", heads)
    value_heads = options.integer("num_v_heads", key_heads)
    channels, ratio = options.integer("head_dim", head_dim), options.number("expand_v", expand_v)
    if value_heads % key_heads:
        options.problem("num_v_heads", value_heads, f"a multiple of num_heads = {key_heads}")
        value_heads = key_heads
    value_dim = int(channels * ratio)
    if value_dim < 1 or abs(channels * ratio - value_dim) > 1e-5 * value_dim:
        options.problem(
            "expand_v", ratio, f"head_dim * expand_v to be a whole number of channels, head_dim is {channels}"
        )
        value_dim = channels
    return {"heads": value_heads, "key_heads": key_heads, "key_dim": channels, "value_dim": value_dim}


def _gram(options: Options) -> dict[str, Any]:
    options.require("squash_eps", _GRAM_EPSILON)
    return {"preconditioner": "gram", "gram": GramConfig(squash=options.number("squash_x", 1.5))}


def _precond_gated_deltanet_mixer(options: Options, width: int, epsilon: float) -> MixerConfig:
    return gated_deltanet_mixer(options, width, epsilon, **_gram(options))


def _precond_kda_mixer(options: Options, width: int, epsilon: float) -> MixerConfig:
    shared = options.integer("num_v_heads", 0) > options.integer("num_heads", 16)  # several value heads per key head
    per_head = {"beta_per_key_head": shared, "preconditioner_per_value_head": shared}
    return kda_mixer(options, width, epsilon, **_gram(options), **per_head)


_GRAM_INITIALISATION = ("log_atk_scale_init", "a_log_init_lower")

DELTA_NET = Family(
    "delta_net",
    LIBRARY,
    functools.partial(describe_model, mixer=delta_net_mixer, layers=24, attention_lists=True),
    model_rows(mixer_rows),
    express=express_delta_net,
)
GATED_DELTANET = Family(
    "gated_deltanet",
    LIBRARY,
    functools.partial(
        describe_model, mixer=functools.partial(gated_deltanet_mixer, gates=True), layers=21, attention_lists=True
    ),
    model_rows(mixer_rows),
    express=express_gated_deltanet,
)
KDA = Family(
    "kda",
    LIBRARY,
    functools.partial(describe_model, mixer=kda_mixer, layers=24, attention_lists=True),
    model_rows(mixer_rows),
    express=express_kda,
)
PRECOND_GATED_DELTANET = Family(
    "precond_gated_deltanet",
    LIBRARY,
    functools.partial(describe_model, mixer=_precond_gated_deltanet_mixer, layers=21, ignored=_GRAM_INITIALISATION),
    model_rows(mixer_rows),
    express=functools.partial(
        _express_gram,
        base=express_gated_deltanet,
        model_type="precond_gated_deltanet",
        architecture="PrecondGatedDeltaNetForCausalLM",
        drop=("output_gate_activation",),
    ),
)
PRECOND_KDA = Family(
    "precond_kda",
    LIBRARY,
    functools.partial(describe_model, mixer=_precond_kda_mixer, layers=24, ignored=_GRAM_INITIALISATION),
    model_rows(functools.partial(mixer_rows, gram=GRAM_NAMES | {"gram_decay": "a_proj"})),
    express=functools.partial(
        _express_gram, base=express_kda, model_type="precond_kda", architecture="PrecondKDAForCausalLM"
    ),
)

"""The models of OSDN's authors: DeltaNet, Gated DeltaNet and KDA with preconditioners (arXiv 2605.13473).

Read from github.com/Lhongpei/OSLA, a fork of flash-linear-attention whose models have its frame. Where its kernels and
its loops in Python differ, this is what the kernels compute: they read the state with the key itself.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from osdn_jax.interop.families import fla
from osdn_jax.interop.families.fla_frame import describe_model, express_frame, model_rows
from osdn_jax.interop.family import Family
from osdn_jax.interop.mapping import Row, linear, same
from osdn_jax.interop.options import LARGEST, Options
from osdn_jax.nn.config import HypergradientConfig, MixerConfig, ModelConfig, SquaresConfig

_LIBRARY = "the OSDN authors' flash-linear-attention"
_BOUNDS = ("osgm_d_min", "osgm_d_max")
_AVERAGES = ("ema", "ema_norm")
_GATES = {"learnable": "head", "constant": "head", "data_dependent": "token"}  # {osgm_decay_mode: forget_gate}

# Entries of other experiments of theirs on Gated DeltaNet: {name: the value at which it changes nothing}.
_VARIANTS: dict[str, Any] = {
    "gate_aware_hypergradient": False,
    "osgm_d_decay_source": "osgm",
    "osgm_post_gate_residual": False,
    "osgm_post_gate_use_remaining": False,
}


def mixer_rows(config: MixerConfig, tensors: str, parameters: str) -> list[Row]:
    """Return the rows of a mixer, as `fla.mixer_rows`."""
    rows = fla.mixer_rows(config, tensors, parameters)
    if config.preconditioner != "none":
        rows.append(same(f"{tensors}initial_scale", f"{parameters}initial"))
    settings = config.hypergradient
    if config.preconditioner == "hypergradient" and settings.forget:
        if settings.forget_gate == "head":
            rows.append(same(f"{tensors}osgm_gamma_log", f"{parameters}forget/bias"))
        elif settings.forget_gate == "token":
            rows += [
                linear(f"{tensors}osgm_a_proj.weight", f"{parameters}forget/kernel"),
                same(f"{tensors}osgm_a_proj.bias", f"{parameters}forget/bias"),
            ]
    return rows


def _delta_net_mixer(options: Options, width: int, epsilon: float) -> MixerConfig:
    options.require("allow_neg_eigval", False)  # their model has no such option: it would ignore it
    mode = options.choice("osgm_decay_mode", "none", ("none", *_GATES, *_AVERAGES))
    if options.flag("osgm_decay", False) and mode == "none":  # the name in their earlier versions
        mode = "learnable"
    options.without_effect("osgm_ema_normalize")  # the mode decides
    average = options.number("osgm_ema_alpha", 0.999, below=1.0)
    feedback = _hypergradient(options, mode, bounded=True)
    if not options.flag("use_osgm", False):
        changes: dict[str, Any] = {"preconditioner": "squares"}
    elif mode in _AVERAGES:
        squares = SquaresConfig(average=average, normalize=mode == "ema_norm")
        changes = {"preconditioner": "squares", "squares": squares}
    else:
        changes = {"preconditioner": "hypergradient", "hypergradient": feedback}
    return fla.delta_net_mixer(options, width, epsilon, **changes)


def _gated_deltanet_mixer(options: Options, width: int, epsilon: float) -> MixerConfig:
    for name, value in _VARIANTS.items():
        options.require(name, value)
    options.require("osgm_post_gate_clamp_min")
    options.without_effect("osgm_freeze", "osgm_post_gate_regret_chunk_size")
    mode = options.choice("osgm_decay_mode", "none", ("none", *_GATES))
    # In their last version (a1351e3) this is the feedback that knows beta; in earlier ones it was another.
    aware = options.flag("osgm_post_gate_regret", False)
    if aware:
        options.require("osgm_use_denominator", False)
    # Its form for gates that do not depend on the token has no default bounds.
    bounded = not aware or mode in ("none", "data_dependent") or all(name in options for name in _BOUNDS)
    feedback = _hypergradient(options, mode, bounded=bounded, beta_aware=aware)
    return _preconditioned(options, fla.gated_deltanet_mixer(options, width, epsilon), feedback)


def _kda_mixer(options: Options, width: int, epsilon: float) -> MixerConfig:
    mode = options.choice("osgm_decay_mode", "constant", ("none", "constant", "data_dependent"))
    aware = options.flag("osgm_beta_aware", True)
    # Its constant is a number of config.json, not a tensor; a bound that is null there is the default only if absent.
    bounded = all(name not in options.config or name in options for name in _BOUNDS)
    feedback = _hypergradient(options, mode, bounded=bounded, in_file=False, beta_aware=aware)
    return _preconditioned(options, fla.kda_mixer(options, width, epsilon), feedback)


def _preconditioned(options: Options, mixer: MixerConfig, feedback: HypergradientConfig) -> MixerConfig:
    """Return the mixer with one preconditioner per value head, if it has them."""
    if not options.flag("use_osgm", True):
        return mixer
    shared = mixer.heads != mixer.num_key_heads and not feedback.beta_aware  # which is per value head in any case
    return dataclasses.replace(
        mixer, preconditioner="hypergradient", hypergradient=feedback, preconditioner_per_value_head=shared
    )


def _hypergradient(
    options: Options, mode: str, *, bounded: bool, in_file: bool = True, beta_aware: bool = False
) -> HypergradientConfig:
    """Return the settings of the feedback.

    Args:
        options: entries of config.json.
        mode: osgm_decay_mode.
        bounded: clip d, to [0, 1e9] where a bound is null.
        in_file: the constant gate is a tensor of the files, the inverse logistic function of what is kept.
        beta_aware: update by what beta leaves of the residual.
    """
    eta = options.number("osgm_eta", 1.0, above=-LARGEST)
    low = options.number("osgm_d_min", 0.0, above=-LARGEST)
    high = options.number("osgm_d_max", 1e9, above=-LARGEST)
    kept = options.number("osgm_decay_gamma", 0.999)
    if low > high:
        options.problem("osgm_d_min", low, f"at most osgm_d_max = {high:g}")
    if kept > 1:
        options.problem("osgm_decay_gamma", kept, "a number above 0 and at most 1")
    normalize = options.flag("osgm_use_denominator", False)
    if options.problems:
        return HypergradientConfig()
    constant = mode == "constant" and not in_file
    return HypergradientConfig(
        eta=eta,
        bounds=(low, high) if bounded else None,
        initial=0.0,
        forget=mode in _GATES,
        forget_gate="constant" if constant else _GATES.get(mode, "token"),  # type: ignore[arg-type]  # by the mode
        forget_constant=kept if constant else 0.999,
        normalize=normalize,
        beta_aware=beta_aware,
    )


def _express(
    config: ModelConfig, base: Callable[[ModelConfig], dict[str, Any]], model_type: str, architecture: str
) -> dict[str, Any]:
    """Return the entries of config.json, those of the same model without preconditioner included."""
    _, mixer = express_frame(config)
    changes: dict[str, Any] = {"model_type": model_type, "architectures": [architecture], "use_osgm": False}
    if mixer.preconditioner == "hypergradient":
        changes |= {"use_osgm": True} | _express_hypergradient(mixer.hypergradient)
    elif mixer.preconditioner == "squares" and mixer.squares.average is not None:
        mode = "ema_norm" if mixer.squares.normalize else "ema"
        changes |= {"use_osgm": True, "osgm_decay_mode": mode, "osgm_ema_alpha": mixer.squares.average}
    aware = {"os_kda": "osgm_beta_aware", "os_gated_deltanet": "osgm_post_gate_regret"}
    if model_type in aware:
        changes[aware[model_type]] = mixer.hypergradient.beta_aware
    unknown = _ABSENT[model_type]
    return {name: value for name, value in base(config).items() if name not in unknown} | changes


_ABSENT = {  # entries of the models without preconditioner that theirs do not have
    "osla_delta_net": ("allow_neg_eigval",),
    "os_gated_deltanet": ("output_gate_activation",),
    "os_kda": (),
}


def _express_hypergradient(settings: HypergradientConfig) -> dict[str, Any]:
    modes = {"token": "data_dependent", "head": "learnable", "constant": "constant"}
    low, high = settings.bounds or (None, None)
    return {
        "osgm_eta": settings.eta,
        "osgm_d_min": low,
        "osgm_d_max": high,
        "osgm_use_denominator": settings.normalize,
        "osgm_decay_mode": modes[settings.forget_gate] if settings.forget else "none",
        "osgm_decay_gamma": settings.forget_constant,
    }


def _family(
    model_type: str, architecture: str, mixer: Any, layers: int, base: Callable[[ModelConfig], dict[str, Any]]
) -> Family:
    return Family(
        model_type,
        _LIBRARY,
        functools.partial(describe_model, mixer=mixer, layers=layers),
        model_rows(mixer_rows),
        express=functools.partial(_express, base=base, model_type=model_type, architecture=architecture),
    )


OSLA_DELTA_NET = _family("osla_delta_net", "OSDNForCausalLM", _delta_net_mixer, 24, fla.express_delta_net)
OS_GATED_DELTANET = _family(
    "os_gated_deltanet", "OSGDNForCausalLM", _gated_deltanet_mixer, 21, fla.express_gated_deltanet
)
OS_KDA = _family("os_kda", "OSKDAForCausalLM", _kda_mixer, 24, fla.express_kda)

"""Diagnostics of a trained model's delta rules, layer by layer: residuals, preconditioners, keys, regret."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Int

from osdn_jax.evaluation.hindsight import STEPS
from osdn_jax.evaluation.layer_diagnostics import LayerDiagnostics, bin_positions, diagnose_layer
from osdn_jax.nn.config import MixerConfig, ModelConfig
from osdn_jax.nn.mixer import WriteInputs
from osdn_jax.nn.model import CausalLM
from osdn_jax.ops import checks


class Diagnostics(NamedTuple):
    """Diagnostics of a model.

    Attributes:
        layers: one for each block.
        positions: the first position in its segment of each bin, [bins].
        tokens: number of valid tokens.
    """

    layers: tuple[LayerDiagnostics, ...]
    positions: Int[np.ndarray, " bins"]
    tokens: int


def check_delta_rule(model: ModelConfig) -> MixerConfig:
    """Return the configuration of a model's mixers if they are one delta rule.

    Args:
        model: the configuration of the model.

    Raises:
        ValueError: a mixer is softmax attention or does not erase, so that there is no residual to look at; or the
            mixers differ.
    """
    mixers = [block.mixer for block in model.stack]
    delta_rules = [mixer for mixer in mixers if isinstance(mixer, MixerConfig)]
    if len(delta_rules) < len(mixers):
        raise ValueError("model: got softmax attention, expected a delta rule: it keeps no state that it corrects")
    if any(not mixer.erase for mixer in delta_rules):
        raise ValueError("model: got linear attention (erase=False), expected a delta rule: it writes no residuals")
    if any(mixer != delta_rules[0] for mixer in delta_rules):
        raise ValueError("model: got blocks with different mixers, expected one delta rule in all of them")
    return delta_rules[0]


def diagnose_model(
    model: CausalLM,
    tokens: ArrayLike,
    segment_ids: ArrayLike | None = None,
    valid: ArrayLike | None = None,
    *,
    bins: int = 64,
    hindsight_steps: int = STEPS,
    on_layer: Callable[[int], None] = lambda number: None,
) -> Diagnostics:
    """Compute the diagnostics of every layer of a model on some sequences.

    Args:
        model: a language model whose mixers are delta rules.
        tokens: [B, T] integers.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes. Default: one
            segment per sequence.
        valid: [B, T] bools, which tokens count; the others, such as padding, belong after the valid tokens of their
            segment or into other segments. Default: all.
        bins: number of bins of positions, counted from the start of the segment; at most T. Default: 64.
        hindsight_steps: gradient steps of each search for the best fixed c and d; 0 for none, which saves most of the
            time. Default: 100.
        on_layer: called with the number of layers that are done, for a progress bar.

    Returns:
        The diagnostics; docs/diagnostics.md says what each number means.

    Raises:
        ValueError: the model has no delta rule, no token is valid, a number is out of range, or an array has another
            shape.
        TypeError: an argument is of another type.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> mixer = nn.mixer_config("osdn", width=16, heads=2, key_dim=8, value_dim=8)
        >>> model = nn.CausalLM(nn.ModelConfig(32, layers=1, mixer=mixer, mlp_dim=16), rngs=nnx.Rngs(0))
        >>> found = diagnose_model(model, np.arange(24).reshape(2, 12), hindsight_steps=0)
        >>> list(found.layers[0].writes), found.tokens
        (['actual', 'one', 'mean', 'matched'], 24)
        >>> found.layers[0].identity_error < 1e-5
        True
    """
    if not isinstance(model, CausalLM):
        raise TypeError(f"model: got {type(model).__name__}, expected an nn.CausalLM")
    mixer = check_delta_rule(model.config)
    for name, value, least in (("bins", bins, 1), ("hindsight_steps", hindsight_steps, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name}: got {value!r}, expected an int")
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    shape = np.shape(tokens)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"tokens: got shape {shape}, expected [B, T], at least one token")
    tokens = checks.indices("tokens", jnp.asarray(tokens), shape, "[B, T]", model.config.vocab_size)
    ids = None if segment_ids is None else checks.segment_ids(jnp.asarray(segment_ids), shape)
    counted = np.ones(shape, bool) if valid is None else np.asarray(valid)
    if counted.shape != shape or counted.dtype != bool:
        raise ValueError(f"valid: got {counted.dtype} {counted.shape}, expected bool {shape}, as tokens")
    if not np.any(counted):
        raise ValueError("valid: got no valid token, expected at least one")

    layers = []
    for inputs in write_inputs(model, tokens, ids):
        found = diagnose_layer(
            inputs,
            None if ids is None else np.asarray(ids),
            counted,
            bounds=_bounds(mixer),
            bins=bins,
            hindsight_steps=hindsight_steps,
        )
        layers.append(found)
        on_layer(len(layers))
    positions = bin_positions(np.ones(shape, np.int32), bins)
    return Diagnostics(tuple(layers), positions.first, int(np.sum(counted)))


def _bounds(mixer: MixerConfig) -> tuple[float, float] | None:
    clipped = mixer.preconditioner == "hypergradient" and not mixer.match_step
    return mixer.hypergradient.bounds if clipped else None


def write_inputs(model: CausalLM, tokens: jax.Array, segment_ids: jax.Array | None = None) -> Iterator[WriteInputs]:
    """Yield what the recurrence of each layer is computed from, one layer in memory at a time.

    Args:
        model: a language model whose mixers are delta rules.
        tokens: [B, T] integers of the vocabulary.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
    """
    x = model.embedding(tokens)
    for block in model.blocks:
        graph, parameters = nnx.split(block)
        inputs, x = _run_block(parameters, x, segment_ids, graph=graph)
        yield inputs


# All blocks have the same graph, so they are compiled once.
@functools.partial(jax.jit, static_argnames="graph")
def _run_block(
    parameters: Any, x: jax.Array, segment_ids: jax.Array | None, *, graph: nnx.GraphDef
) -> tuple[WriteInputs, jax.Array]:
    block = nnx.merge(graph, parameters)
    return block.mixer.write_inputs(block.mixed(x), segment_ids), block(x, None, segment_ids)[0]

"""A description of a folder: what would be loaded, and every reason why not, from its headers alone."""

import math
import os
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from osdn_jax._errors import joined_lines
from osdn_jax.interop.families import describe, family_of
from osdn_jax.interop.family import Family
from osdn_jax.interop.folder import CONFIG_FILE, Weights, read_config, read_weights, unserved
from osdn_jax.interop.loading import parameter_shapes
from osdn_jax.interop.options import ConfigProblems
from osdn_jax.interop.paths import existing_folder
from osdn_jax.interop.plan import Plan, match
from osdn_jax.interop.tokens import TOKENIZER_FILES
from osdn_jax.nn.config import AttentionConfig, LatentAttentionConfig, Mixer, MixerConfig, MixtureConfig, ModelConfig

_WIDTH, _INDENT = 80, 13


class Inspection(NamedTuple):
    """The result of `inspect`.

    Attributes:
        lines: the description, for a terminal of 80 columns.
        problems: a line for each reason why the folder cannot be loaded; empty if it can.
    """

    lines: list[str]
    problems: list[str]


def inspect(path: str | os.PathLike[str], *, ignore_remote_code: bool = False) -> Inspection:
    """Describe a folder without reading its tensors.

    Args:
        path: the folder.
        ignore_remote_code: as in `load_pretrained`. Default: False.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        TypeError, ValueError: `path` is no path of a folder on this machine.
    """
    folder = existing_folder(path)
    rows: list[tuple[str, str]] = []
    problems: list[str] = []
    weights = read_weights(folder)
    family: Family | None = None
    config: ModelConfig | None = None
    plan: Plan | None = None
    try:
        _, entries = read_config(folder)
        problems += unserved(folder / CONFIG_FILE, entries, ignore_remote_code=ignore_remote_code)
        family = family_of(entries)
        config = describe(family, entries)
        found = {name: tensor.shape for name, tensor in weights.tensors.items()}
        if not weights.problems:
            plan = match(
                family.rows(config, entries, found.keys()), parameter_shapes(config), found, [*family.left_out]
            )
            problems += plan.problems
    except ConfigProblems as error:
        problems += [f"{CONFIG_FILE}: {problem}" for problem in error.problems]
    except (ValueError, TypeError, OSError) as error:
        problems.append(joined_lines(error))
    problems += [joined_lines(error) for error in weights.problems]
    if family is not None:
        rows.append(("family", f"{family.name} ({family.library})"))
    if config is not None:
        rows += _model(config)
    rows += _files(folder, weights)
    if plan is not None and plan.left_out and family is not None:
        rows.append(("left out", _parts(family, plan.left_out)))
    rows.append(("problems", str(len(problems)) if problems else "none: load_pretrained loads this folder"))
    lines = [str(folder)]
    for name, text in rows:
        start = f"  {name}".ljust(_INDENT)
        lines += textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=" " * _INDENT)
    return Inspection(lines, [" ".join(problem.split()) for problem in problems])


def _model(config: ModelConfig) -> list[tuple[str, str]]:
    names = [_short_name(block.mixer) for block in config.stack]
    shapes = parameter_shapes(config)
    count = sum(math.prod(shape) for shape in shapes.values())
    tied = "tied to the head" if config.tied_embeddings else "a head apart"
    rows = [("layers", f"{config.depth}: {pattern(names)}")]
    mixers = {_short_name(block.mixer): block.mixer for block in config.stack}
    rows += [(name, _described(mixer)) for name, mixer in mixers.items()]
    for mlp, layers in Counter(block.mlp for block in config.stack).items():
        if isinstance(mlp, MixtureConfig):
            shared = f", a shared one of {mlp.shared_hidden:,}" if mlp.shared_hidden else ""
            text = f"{mlp.experts} experts of {mlp.hidden:,} hidden units, {mlp.active} per token{shared}"
        else:
            text = f"{mlp.hidden:,} hidden units"
        rows.append(("MLP", f"{text}; in {layers} layers"))
    return [
        *rows,
        ("width", f"{config.width:,}"),
        ("vocabulary", f"{config.vocab_size:,}, the embedding {tied}"),
        ("parameters", f"{count:,}"),
    ]


def _short_name(mixer: Mixer) -> str:
    if isinstance(mixer, AttentionConfig):
        return "window" if mixer.window else "attention"
    return "latent" if isinstance(mixer, LatentAttentionConfig) else "delta"


def _described(mixer: Mixer) -> str:
    if isinstance(mixer, LatentAttentionConfig):
        return f"{mixer.heads} heads of {mixer.key_dim} + {mixer.shared_key_dim} channels, latent of {mixer.rank}"
    heads = f"{mixer.heads} heads"
    if mixer.num_key_heads != mixer.heads:
        heads = f"{mixer.num_key_heads} key heads, {mixer.heads} {'query' if _is_softmax(mixer) else 'value'} heads"
    sizes = f"{mixer.key_dim} key and {mixer.value_dim} value channels"
    if isinstance(mixer, AttentionConfig):
        positions = "no positions" if mixer.rotary_base is None else f"rotary base {mixer.rotary_base:,.0f}"
        window = f", window of {mixer.window:,}" if mixer.window else ""
        return f"{heads}, {sizes}, {positions}{window}"
    decay = {"none": "no decay", "scalar": "a decay per head", "channel": "a decay per channel"}[mixer.decay]
    preconditioner = "" if mixer.preconditioner == "none" else f", preconditioner {mixer.preconditioner}"
    return f"{heads}, {sizes}, {decay}{preconditioner}"


def _is_softmax(mixer: Mixer) -> bool:
    return not isinstance(mixer, MixerConfig)


def pattern(names: list[str]) -> str:
    """Return the kinds of layers, in the shortest repetition: "12 x (3 delta, 1 attention)"."""
    count = len(names)
    period = next(p for p in range(1, count + 1) if count % p == 0 and names == names[:p] * (count // p))
    runs: list[list[str]] = []
    for name in names[:period]:
        if runs and runs[-1][0] == name:
            runs[-1].append(name)
        else:
            runs.append([name])
    inner = ", ".join(f"{len(run)} {run[0]}" for run in runs)
    if period == 1:
        return f"{count} {names[0]}"
    return inner if period == count else f"{count // period} x ({inner})"


def _files(folder: Path, weights: Weights) -> list[tuple[str, str]]:
    types = Counter(tensor.type for tensor in weights.tensors.values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in types.most_common())
    rows = [("tensors", f"{kinds or 'none'}; {weights.size:,} bytes in {len(weights.files)} files")]
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return [*rows, ("tokenizer", found[0] if found else "none")]


def _parts(family: Family, names: list[str]) -> str:
    parts = Counter(part for name in names for pattern, part in family.left_out.items() if re.match(pattern, name))
    listed = ", ".join(f"{part} ({count:,} tensors)" for part, count in parts.items())
    return f"{listed}; the original layout cannot be saved without it"

"""Validation: bits per byte on the held-out text, and statistics of the preconditioners."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from osdn_jax.data import ValidationBatches, Window
from osdn_jax.evaluation import make_evaluate, make_recall_accuracy
from osdn_jax.nn.config import ModelConfig
from osdn_jax.nn.split import Parameters
from osdn_jax.training.data import Data
from osdn_jax.training.interruption import Watchdog
from osdn_jax.training.mesh import Layout
from osdn_jax.training.step import StepConfig

# Keys in metrics.jsonl. A task has bits per answer under the first, and the accuracy.
BITS_PER_BYTE, ACCURACY = "validation/bits_per_byte", "validation/accuracy"
_STATISTICS_TOKENS = 1024  # tokens that the preconditioners' statistics are computed over


class HeldOut(NamedTuple):
    """Batches of this process's share of the held-out windows."""

    everything: ValidationBatches  # for the last step
    some: ValidationBatches  # for the others


def make_validate(
    apply: Callable[..., Any],
    model: ModelConfig,
    step_config: StepConfig,
    data: Data,
    held_out: HeldOut,
    layout: Layout,
    watchdog: Watchdog,
) -> Callable[[Parameters, bool], dict[str, float]]:
    """Return the function (parameters, on all windows?) -> the metrics of a validation."""
    evaluate = make_evaluate(apply, step_config.chunks)
    # Over a mesh the positions that are asked lie on several devices; all logits need no rearrangement.
    recall = make_recall_accuracy(apply, questions=data.questions if layout.mesh is None else None)
    statistics = _make_statistics(apply, model, layout)

    def validate(parameters: Parameters, everything: bool) -> dict[str, float]:
        chosen = held_out.everything if everything else held_out.some
        placed = lambda: _placed(chosen, layout, watchdog)
        with layout.active():
            # With some windows only, this is an estimate: their tokens may be longer or shorter than the average.
            row = {BITS_PER_BYTE: evaluate(parameters, placed()) * data.held_out_tokens_per_byte}
            if data.questions is not None:
                row[ACCURACY] = recall(parameters, placed())
        return row | statistics(parameters, data.held_out[0])

    return validate


def _placed(batches: Iterable[Window], layout: Layout, watchdog: Watchdog) -> Iterator[Any]:
    for batch in batches:
        watchdog.beat()
        yield layout.batch(batch)


def _make_statistics(
    apply: Callable[..., Any], model: ModelConfig, layout: Layout
) -> Callable[[Parameters, Window], dict[str, float]]:
    """Return the function (parameters, window) -> statistics of the preconditioners; {} for a rule without one."""
    if all(getattr(block.mixer, "preconditioner", "none") == "none" for block in model.stack):
        return lambda parameters, window: {}
    embedding, rows = "embedding/embedding", layout.sharding("vocabulary", None)

    @functools.partial(jax.jit, out_shardings=layout.sharding())
    def call(parameters: Parameters, tokens: jax.Array, ids: jax.Array) -> dict[str, jax.Array]:
        # jaxlib 0.11.2 can abort when it partitions a lookup in a table whose rows are split. The table is cast first:
        # the result of a cast in the model would be split again.
        table = jax.lax.with_sharding_constraint(parameters[embedding].astype(model.dtype), rows)
        return apply(parameters | {embedding: table}, tokens, ids, method="preconditioners")

    across: dict[str, Any] = {"mean": np.mean, "min": np.min, "max": np.max, "clipped": np.mean}

    def statistics(parameters: Parameters, window: Window) -> dict[str, float]:
        tokens, ids = (window[name][None, :_STATISTICS_TOKENS] for name in ("inputs", "segment_ids"))
        blocks = call(parameters, tokens, ids)
        return {f"preconditioner/{name}": float(across[name](np.asarray(x))) for name, x in blocks.items()}

    return statistics

"""Bits per token of a model on held-out text."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from osdn_jax.data import Window
from osdn_jax.nn import Chunks, likelihood_sums
from osdn_jax.nn.chunked_loss import DEFAULT_CHUNKS
from osdn_jax.nn.split import Parameters


def make_evaluate(
    apply: Callable[..., Any], chunks: Chunks = DEFAULT_CHUNKS
) -> Callable[[Parameters, Iterable[Window]], float]:
    """Return a function of (parameters, batches) that computes the mean bits per target token.

    Multiply by tokens per byte for bits per byte; with a byte tokenizer they are the same. Every window starts from an
    empty state, so longer windows give lower numbers.

    Args:
        apply: the model, as returned by `nn.split_model`.
        chunks: sizes of the logits computed at a time, as in `nn.cross_entropy`.

    Returns:
        evaluate(parameters, batches), which goes through all batches once.
    """
    step = jax.jit(lambda params, batch: likelihood_sums(apply, params, batch, chunks=chunks))

    def evaluate(params: Parameters, batches: Iterable[Window]) -> float:
        sums = [step(params, batch) for batch in batches]
        nats, targets = np.sum([[float(x.nats), float(x.targets)] for x in sums], axis=0)
        return float(nats / targets / np.log(2.0))

    return evaluate

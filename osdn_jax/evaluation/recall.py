"""Accuracy of a model on a recall task."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.nn.likelihood import hidden_at
from osdn_jax.nn.split import Parameters


def recall_accuracy(
    apply: Callable[..., Any],
    parameters: Parameters,
    tokens: Int[Array, "N L"],
    targets: Int[Array, "N L"],
    *,
    questions: int | None = None,
) -> Float[Array, ""]:
    """Return the share of questions that a model answers right, per example, averaged over the examples.

    An answer is right if the target has the largest of all logits. Examples without a question do not count. The
    function is traceable: it works under `jax.jit` and `jax.vmap`. It holds the logits of all examples at a time, so
    evaluate many examples in parts.

    Args:
        apply: the model, as `nn.split_model` returns it.
        parameters: its parameters.
        tokens: examples, as the generators of `osdn_jax.data.recall` return them.
        targets: the answers; negative (-100) where nothing is asked.
        questions: static; an upper bound of the questions in an example. It saves the logits of all other positions.
            Default: None, the logits of every position are computed.

    Returns:
        The accuracy, 0 to 1, float32; NaN if nothing is asked.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> from osdn_jax.data.recall import mqar
        >>> mixer = nn.mixer_config("delta_net", width=8, heads=1, key_dim=8, value_dim=8)
        >>> config = nn.ModelConfig(vocab_size=16, layers=1, mixer=mixer, mlp_dim=8)
        >>> apply, parameters = nn.split_model(nn.CausalLM(config, rngs=nnx.Rngs(0)))
        >>> tokens, targets = mqar(200, length=16, pairs=2, vocabulary=16, seed=0)
        >>> accuracy = recall_accuracy(apply, parameters, tokens, targets, questions=2)
        >>> bool(0 <= accuracy < 0.5)  # random parameters
        True
    """
    shares, examples = recall_sums(apply, parameters, tokens, targets, questions=questions)
    return shares / examples


def recall_sums(
    apply: Callable[..., Any],
    parameters: Parameters,
    tokens: Int[Array, "N L"],
    targets: Int[Array, "N L"],
    *,
    questions: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return (sum over examples of the share of questions answered, number of examples with a question).

    The arguments are those of `recall_accuracy`; these sums of several batches, added, give the accuracy over all.
    """
    tokens, targets = jnp.asarray(tokens), jnp.asarray(targets)
    if questions is None:
        logits = apply(parameters, tokens)[0]
    else:
        hidden = apply(parameters, tokens, method="features")[0]
        chosen = jnp.argsort(targets < 0, axis=1, stable=True)[:, :questions]  # the positions that are asked come first
        targets = jnp.take_along_axis(targets, chosen, axis=1)
        hidden = hidden_at(hidden, chosen)
        unembedding = apply(parameters, method="unembedding").astype(hidden.dtype)
        logits = jnp.einsum("nqd,vd->nqv", hidden, unembedding, preferred_element_type=jnp.float32)
    asked = targets >= 0
    right = (jnp.argmax(logits, axis=-1) == targets) & asked
    count = jnp.sum(asked, axis=1)
    shares = jnp.sum(right, axis=1) / jnp.maximum(count, 1)
    return jnp.sum(shares, dtype=jnp.float32), jnp.sum(count > 0, dtype=jnp.float32)


def make_recall_accuracy(
    apply: Callable[..., Any], *, questions: int | None = None
) -> Callable[[Parameters, Any], float]:
    """Return a function of (parameters, batches) that computes the accuracy over all batches, compiled once.

    Args:
        apply: the model, as `nn.split_model` returns it.
        questions: as in `recall_accuracy`.

    Returns:
        accuracy(parameters, batches), which goes through all batches of windows once, such as `validation_batches` of
        `TaskWindows`; questions are the targets of weight above 0.
    """

    @jax.jit
    def step(parameters: Parameters, batch: Any) -> tuple[jax.Array, jax.Array]:
        targets = jnp.where(jnp.asarray(batch["weights"]) > 0, batch["targets"], -1)
        return recall_sums(apply, parameters, batch["inputs"], targets, questions=questions)

    def accuracy(parameters: Parameters, batches: Any) -> float:
        sums = [step(parameters, batch) for batch in batches]
        shares, examples = (sum(float(part[i]) for part in sums) for i in (0, 1))
        return shares / examples

    return accuracy

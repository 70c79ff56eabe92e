"""A small model of bytes, and its logits from one call for a whole sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from support import jit
from support.models import model_config, parameters_of

LENGTH = 128


@functools.cache
def byte_model(rule="osdn", **mixer):
    """Return (apply, parameters) of a model with 260 vocabulary entries: 256 of bytes, and four that no text has."""
    config = dataclasses.replace(model_config(rule, **mixer), vocab_size=260)
    return parameters_of(config, seed=3)


@functools.cache
def _forward(rule, mixer):
    apply, _ = byte_model(rule, **dict(mixer))
    return jit(lambda parameters, tokens: apply(parameters, jnp.asarray(tokens))[0])


def logits_of(tokens, rule="osdn", **mixer):
    """Return the logits [T, vocabulary] of one sequence of at most 128 tokens, computed alone.

    Zeros that follow it make all sequences one length, and so one program; no logits depend on what follows them.
    """
    _, parameters = byte_model(rule, **mixer)
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(rule, tuple(mixer.items()))(parameters, padded))[0, : len(tokens)]


def log_likelihoods(tokens, rule="osdn", **mixer):
    """Return (log-likelihoods, greedy) of the tokens after the first."""
    logits = logits_of(tokens[:-1], rule, **mixer)
    chosen = np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(len(tokens) - 1), tokens[1:]]
    return chosen, logits.argmax(axis=-1) == np.asarray(tokens[1:])


def continued(tokens, count, rule="osdn", **mixer):
    """Return the most likely tokens after a sequence, each from one call for everything before it."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(logits_of(tokens, rule, **mixer)[-1, :256].argmax()))
    return tokens[-count:]

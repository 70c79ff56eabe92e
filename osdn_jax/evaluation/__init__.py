"""Evaluation of trained models: bits per token, and general compressors to compare with."""

from osdn_jax.evaluation.bits_per_token import make_evaluate
from osdn_jax.evaluation.compressors import compressed_bits_per_byte
from osdn_jax.evaluation.recall import make_recall_accuracy, recall_accuracy, recall_sums

__all__ = ["compressed_bits_per_byte", "make_evaluate", "make_recall_accuracy", "recall_accuracy", "recall_sums"]

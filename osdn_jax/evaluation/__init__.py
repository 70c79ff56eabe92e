"""Evaluation of trained models: likelihood of texts, continuations, perplexity by position, recall, bits per byte.

`lm_eval_adaptor`, `harness` and `task_files` need the extra `eval` and are imported by their own names.
"""

from osdn_jax.evaluation.bits_per_token import make_evaluate
from osdn_jax.evaluation.compressors import compressed_bits_per_byte
from osdn_jax.evaluation.generation import BatchGenerator
from osdn_jax.evaluation.position_data import position_windows
from osdn_jax.evaluation.positions import Bucket, perplexity_by_position
from osdn_jax.evaluation.recall import make_recall_accuracy, recall_accuracy, recall_sums
from osdn_jax.evaluation.scoring import Score, TokenScorer, TokenScores, token_scores
from osdn_jax.evaluation.text_model import TextModel

__all__ = [
    "BatchGenerator",
    "Bucket",
    "Score",
    "TextModel",
    "TokenScorer",
    "TokenScores",
    "compressed_bits_per_byte",
    "make_evaluate",
    "make_recall_accuracy",
    "perplexity_by_position",
    "position_windows",
    "recall_accuracy",
    "recall_sums",
    "token_scores",
]

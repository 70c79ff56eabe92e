"""Evaluation of trained models: likelihood of texts, continuations, perplexity by position, recall, bits per byte.

`diagnose_model` looks into the delta rule of every layer of a model; `diagnose_layer` does so for the arrays of one
recurrence. `lm_eval_adaptor`, `harness` and `task_files` need the extra `eval` and are imported by their own names.
"""

from osdn_jax.evaluation.bits_per_token import make_evaluate
from osdn_jax.evaluation.compressors import compressed_bits_per_byte
from osdn_jax.evaluation.diagnostics import Diagnostics, diagnose_model, write_inputs
from osdn_jax.evaluation.generation import BatchGenerator
from osdn_jax.evaluation.hindsight import Hindsight, best_fixed_multipliers
from osdn_jax.evaluation.key_gram import KeyGram, gram_of_keys
from osdn_jax.evaluation.layer_diagnostics import LayerDiagnostics, Writes, diagnose_layer
from osdn_jax.evaluation.multiplier_statistics import MultiplierStatistics, describe_multipliers
from osdn_jax.evaluation.position_data import position_windows
from osdn_jax.evaluation.positions import Bucket, perplexity_by_position
from osdn_jax.evaluation.recall import make_recall_accuracy, recall_accuracy, recall_sums
from osdn_jax.evaluation.recall_tasks import RecallTask, parse_recall_task, recall_prompts, run_recall_task
from osdn_jax.evaluation.residuals import Residuals, geometric_ratio, write_keys, write_residuals
from osdn_jax.evaluation.results import Result
from osdn_jax.evaluation.scoring import Score, TokenScorer, TokenScores, token_scores
from osdn_jax.evaluation.text_model import TextModel

__all__ = [
    "BatchGenerator",
    "Bucket",
    "Diagnostics",
    "Hindsight",
    "KeyGram",
    "LayerDiagnostics",
    "MultiplierStatistics",
    "RecallTask",
    "Residuals",
    "Result",
    "Score",
    "TextModel",
    "TokenScorer",
    "TokenScores",
    "Writes",
    "best_fixed_multipliers",
    "compressed_bits_per_byte",
    "describe_multipliers",
    "diagnose_layer",
    "diagnose_model",
    "geometric_ratio",
    "gram_of_keys",
    "make_evaluate",
    "make_recall_accuracy",
    "parse_recall_task",
    "perplexity_by_position",
    "position_windows",
    "recall_accuracy",
    "recall_prompts",
    "recall_sums",
    "run_recall_task",
    "token_scores",
    "write_inputs",
    "write_keys",
    "write_residuals",
]

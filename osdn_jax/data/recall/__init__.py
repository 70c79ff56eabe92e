"""Recall tasks, in NumPy: what a recurrent state has to remember, with the right answer of every question."""

from osdn_jax.data.recall.arguments import IGNORE
from osdn_jax.data.recall.multi_query import Recall, mqar

__all__ = ["IGNORE", "Recall", "mqar"]

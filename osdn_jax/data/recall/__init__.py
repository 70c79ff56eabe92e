"""Recall tasks, in NumPy: what a recurrent state has to remember, with the right answer of every question."""

from osdn_jax.data.recall.arguments import IGNORE
from osdn_jax.data.recall.changes import drifting_mqar, forgetting_mqar
from osdn_jax.data.recall.completions import read_completions
from osdn_jax.data.recall.copying import compression, memorization, memorized_map, selective_copying
from osdn_jax.data.recall.fuzzy import fuzzy_in_context_recall
from osdn_jax.data.recall.in_context import in_context_recall, noisy_in_context_recall
from osdn_jax.data.recall.multi_query import Recall, mqar
from osdn_jax.data.recall.needles import s_niah
from osdn_jax.data.recall.prompts import Prompt, contains, contains_accuracy
from osdn_jax.data.recall.task import TASKS, Task, TaskWindows, parse_task

__all__ = [
    "IGNORE",
    "TASKS",
    "Prompt",
    "Recall",
    "Task",
    "TaskWindows",
    "compression",
    "contains",
    "contains_accuracy",
    "drifting_mqar",
    "forgetting_mqar",
    "fuzzy_in_context_recall",
    "in_context_recall",
    "memorization",
    "memorized_map",
    "mqar",
    "noisy_in_context_recall",
    "parse_task",
    "read_completions",
    "s_niah",
    "selective_copying",
]

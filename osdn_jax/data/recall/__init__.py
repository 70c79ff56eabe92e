"""Recall tasks, in NumPy: what a recurrent state has to remember, with the right answer of every question."""

from osdn_jax.data.recall.arguments import IGNORE
from osdn_jax.data.recall.multi_query import Recall, mqar
from osdn_jax.data.recall.task import TASKS, Task, TaskWindows, parse_task

__all__ = ["IGNORE", "TASKS", "Recall", "Task", "TaskWindows", "mqar", "parse_task"]

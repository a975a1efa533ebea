"""Tasks: examples, templates, answer parsers and metrics."""

from fastppo.errors import UserError
from fastppo.tasks.cola import COLA
from fastppo.tasks.data import Dataset, load_data
from fastppo.tasks.task import Example, Task

__all__ = ["TASKS", "Dataset", "Example", "Task", "get_task", "load_data"]

TASKS = {task.name: task for task in (COLA,)}


def get_task(name: str) -> Task:
    """The task of that name. Raises UserError, listing the known names."""
    if name not in TASKS:
        raise UserError(f"task {name!r} is not known: choose from {', '.join(sorted(TASKS))}")
    return TASKS[name]

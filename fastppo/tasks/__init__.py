"""Tasks: examples, templates, answer parsers and metrics."""

from fastppo.errors import UserError
from fastppo.tasks import glue, superglue
from fastppo.tasks.cola import COLA
from fastppo.tasks.data import Dataset, Unlabelled, data_of, load_data, load_sets, load_test
from fastppo.tasks.example import Example
from fastppo.tasks.task import Task

__all__ = [
    "TASKS", "Dataset", "Example", "Task", "Unlabelled", "data_of", "get_task", "get_task_to_train", "get_tasks", "load_data",
    "load_sets", "load_test",
]  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in (COLA, *glue.TASKS, *superglue.TASKS)}


def get_task(name: str, template: str = "short") -> Task:
    """The task of that name, asked with the prompt ``short`` or ``tagged``. Raises UserError, listing the known names."""
    if name not in TASKS:
        raise UserError(f"task {name!r} is not known: choose from {', '.join(sorted(TASKS))}")
    return TASKS[name].with_template(template)


def get_task_to_train(name: str, template: str = "short") -> Task:
    """The same, for training. Raises UserError for a diagnostic set too, which has no train split."""
    task = get_task(name, template)
    if task.train_on:
        raise UserError(
            f"task {name} is a diagnostic set without a train split: train on {task.train_on}, then "
            f"fastppo eval RUN --task {name} --data DATA"
        )
    return task


def get_tasks(names: str, template: str = "short", *, to_train: bool = False) -> list[Task]:
    """The tasks of these names, which commas separate; as `get_task`, or as `get_task_to_train`. Raises UserError for a task
    that is given twice, too."""
    get = get_task_to_train if to_train else get_task
    tasks = [get(name, template) for name in names.split(",")]
    found = [task.name for task in tasks]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"task {twice} is given twice: {names}")
    return tasks

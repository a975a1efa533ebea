"""Tasks: examples, templates, answer parsers and metrics. ``Task`` and ``Example`` are what a task of your own needs."""

from fastppo.errors import UserError
from fastppo.tasks import glue, own, superglue
from fastppo.tasks.cola import COLA
from fastppo.tasks.data import Dataset, Unlabelled, data_of, found_in, load_data, load_sets, load_test
from fastppo.tasks.example import Example
from fastppo.tasks.task import Task

__all__ = [
    "TASKS", "Dataset", "Example", "Task", "Unlabelled", "changed", "data_of", "found_in", "get_task", "get_task_to_train",
    "get_tasks",
    "load_data", "load_sets", "load_test", "sources",
]  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in (COLA, *glue.TASKS, *superglue.TASKS)}


def get_task(name: str, template: str = "short") -> Task:
    """The task of that name or in that file, asked with the prompt ``short`` or ``tagged``.

    Raises:
        UserError: the name is not known (it lists those that are), the file is damaged, or has no such prompt.
    """
    if name not in TASKS and not own.is_file(name):
        endings = ", ".join(own.ENDINGS)
        known = ", ".join(sorted(TASKS))
        raise UserError(f"task {name!r} is not known: choose from {known}, or give a file that ends in {endings}")
    task = TASKS[name] if name in TASKS else own.read_task(name, TASKS)
    if template == "tagged" and not task.tagged:
        raise UserError(f"--template: tagged is not allowed with task {task.name}, which has no tagged prompt")
    return task.with_template(template)


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
    tasks = [get(name, template) for name in own.names_in(names)]
    found = [task.name for task in tasks]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"task {twice} is given twice: {names}")
    return tasks


def changed(names: str, tasks: list[Task], known: str) -> list[str]:
    """The files among ``names`` (with commas) that are not as they were when `sources` of these tasks said ``known``."""
    now = [(name, task.source) for name, task in zip(own.names_in(names), tasks, strict=True) if task.source]
    was = known.split(",") if known else []
    return [name for i, (name, source) in enumerate(now) if was[i : i + 1] != [source]]


def sources(tasks: list[Task]) -> str:
    """`Task.source` of those that come from files, with commas: what says whether one changed."""
    return ",".join(task.source for task in tasks if task.source)

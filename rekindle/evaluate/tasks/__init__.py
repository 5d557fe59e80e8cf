"""Evaluation tasks, one file each. To add one, implement `Task` and add a line to `TASKS`.

Does not import torch, because the command line has a flag for each name.
"""

from importlib import import_module

from rekindle.evaluate.tasks.base import Item, Task

__all__ = ["TASKS", "Item", "Task", "get_task"]

TASKS = {
    "hellaswag": "rekindle.evaluate.tasks.hellaswag.HellaSwag",
}


def get_task(name: str) -> Task:
    """The task called `name` in `TASKS`."""
    module, _, class_name = TASKS[name].rpartition(".")
    return getattr(import_module(module), class_name)()

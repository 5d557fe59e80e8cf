"""Evaluations, one file each. A new one needs a class as `Task` describes it, and a line here.

Imports no torch: the command line has a flag for each name.
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

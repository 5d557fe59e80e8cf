"""Evaluations, one file each. A new one needs a class as `Task` describes it, and a line here."""

from rekindle.evaluate.tasks.base import Item, Task
from rekindle.evaluate.tasks.hellaswag import HellaSwag

__all__ = ["TASKS", "Item", "Task"]

TASKS: dict[str, type[Task]] = {
    "hellaswag": HellaSwag,
}

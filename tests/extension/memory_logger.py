"""A logger written outside the package: a list."""

from collections.abc import Callable
from typing import Any


class MemoryLogger(list[dict[str, Any]]):
    """Keeps the records of a run in memory."""

    closed = False

    def write(self, record: dict[str, Any]) -> None:
        self.append(record)

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        self[:] = filter(keep, self)

    def close(self) -> None:
        self.closed = True

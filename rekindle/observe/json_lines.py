"""The logger that every run has: `metrics.jsonl`."""

from collections.abc import Callable
from typing import Any

from rekindle.storage import JsonLines


class JsonLinesLogger:
    """Writes records to a log of JSON lines, and reports when they cannot be written."""

    def __init__(self, log: JsonLines, report: Callable[[str], None]) -> None:
        self._log, self._report = log, report
        self._waiting = False  # whether lines wait in memory

    def write(self, record: dict[str, Any]) -> None:
        error = self._log.append(record)
        if error and not self._waiting:
            self._report(
                f"metrics.jsonl cannot be written ({error.strerror}): lines are kept in memory"
            )
        elif self._waiting and not error:
            self._report("metrics.jsonl can be written again; no lines were lost")
        self._waiting = error is not None

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Raises `UserError` if the file cannot be written."""
        self._log.rewind(keep)

    def close(self) -> None:
        if error := self._log.close():
            self._report(f"the last lines of metrics.jsonl are lost ({error.strerror})")

"""The logger that every run has: `metrics.jsonl`."""

from collections.abc import Callable
from typing import Any

from rekindle.storage import JsonLines


class JsonLinesLogger:
    """Writes records to a log of JSON lines, and says when the disk takes none."""

    def __init__(self, log: JsonLines, say: Callable[[str], None]) -> None:
        self._log, self._say = log, say
        self._waiting = False  # lines that the disk did not take

    def write(self, record: dict[str, Any]) -> None:
        error = self._log.append(record)
        if error and not self._waiting:
            self._say(f"metrics.jsonl cannot be written ({error.strerror}): lines wait")
        elif self._waiting and not error:
            self._say("metrics.jsonl is written again, with every line that waited")
        self._waiting = error is not None

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Raises `UserError` if the disk takes no file."""
        self._log.rewind(keep)

    def close(self) -> None:
        if error := self._log.close():
            self._say(f"the last lines of metrics.jsonl are lost ({error.strerror})")

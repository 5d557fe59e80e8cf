"""Logs of one JSON object a line, which a full disk or a kill does not damage."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rekindle.errors import UserError
from rekindle.storage.files import parse_json, write_file


class JsonLines:
    """A log of one JSON object a line. Appended to, never rewritten but to go back in time.

    A disk that takes nothing more does not stop whoever logs: lines wait in memory for the next.
    """

    def __init__(
        self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None, form: Any = dict
    ) -> None:
        """Open `path` for appending. With `keep`, first drop every record it refuses, and a last
        line cut short by a kill, so that a resumed run logs each step once."""
        self._path, self._form = path, form
        self._waiting = bytearray()
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        if path.exists():
            self.rewind(keep)
        self._write()

    def rewind(self, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Drop every record that `keep` refuses. Raises `UserError` if the disk takes no file."""
        self.close()
        kept = [r for r in read_json_lines(self._path, self._form) if keep is None or keep(r)]
        try:
            write_file(self._path, [(json.dumps(record) + "\n").encode() for record in kept])
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written anew ({error.strerror}): make room or see that it "
                "may be written to, then give the same command again"
            ) from None

    def append(self, record: Mapping[str, Any]) -> OSError | None:
        """Add a line, from any thread; return what kept it from being written now, if anything."""
        with self._lock:
            self._waiting += json.dumps(record).encode() + b"\n"
            return self._write()

    def _write(self) -> OSError | None:
        try:
            if self._descriptor is not None and not os.fstat(self._descriptor).st_nlink:
                os.close(self._descriptor)  # somebody removed the file
                self._descriptor = None
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._descriptor = os.open(self._path, flags, 0o666)
            while self._waiting:
                del self._waiting[: os.write(self._descriptor, self._waiting)]
        except OSError as error:
            return error
        return None

    def close(self) -> OSError | None:
        """Write what waits, and close; return what kept lines from being written, if anything."""
        with self._lock:
            error = self._write() if self._waiting else None
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            return error


def read_json_lines(path: Path, form: Any = dict) -> list[dict[str, Any]]:
    """All whole records of a log; a last line cut short by a kill is left out.

    Raises `UserError` that names a line which is no record of this `form` (see `schema`).
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            if line:
                records.append(parse_json(line, form))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged ({error}): remove it") from None
    return records

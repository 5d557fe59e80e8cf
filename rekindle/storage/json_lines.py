"""Logs with one JSON object per line, which survive a full disk and a kill."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rekindle.errors import UserError
from rekindle.storage.files import parse_json, write_file


class JsonLines:
    """A log with one JSON object per line. It is append-only, except for `rewind`.

    A full disk does not interrupt the caller: lines stay in memory until the next write succeeds.
    """

    def __init__(
        self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None, schema: Any = dict
    ) -> None:
        """Open `path` for appending. First drop a truncated last line and, with `keep`, every
        record for which it returns false, so that a resumed run logs each step once."""
        self._path, self._schema = path, schema
        self._waiting = bytearray()
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        if path.exists():
            self.rewind(keep)
        self._write()

    def rewind(self, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Drop every record for which `keep` is false. Raises `UserError` if writing fails."""
        self.close()
        kept = [r for r in read_json_lines(self._path, self._schema) if keep is None or keep(r)]
        try:
            write_file(self._path, [(json.dumps(record) + "\n").encode() for record in kept])
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be rewritten ({error.strerror}): free disk space or fix its "
                "permissions, then run the same command again"
            ) from None

    def append(self, record: Mapping[str, Any]) -> OSError | None:
        """Append a line, from any thread. If it cannot be written now, keep it in memory and
        return the error."""
        with self._lock:
            self._waiting += json.dumps(record).encode() + b"\n"
            return self._write()

    def _write(self) -> OSError | None:
        try:
            if self._descriptor is not None and not os.fstat(self._descriptor).st_nlink:
                os.close(self._descriptor)  # the file was removed
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
        """Write the remaining lines and close the file; return the error if writing failed."""
        with self._lock:
            error = self._write() if self._waiting else None
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            return error


def read_json_lines(path: Path, schema: Any = dict) -> list[dict[str, Any]]:
    """All complete records of a log, without a last line truncated by a kill.

    Raises `UserError` with the number of the first line that is invalid or does not match `schema`
    (see `rekindle.schema.mismatch`).
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            if line:
                records.append(parse_json(line, schema))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged ({error}): remove it") from None
    return records

"""What must last is written here, and nowhere else.

A reader sees a file or folder whole or not at all: everything is written under a temporary name,
flushed to disk, hashed, renamed into place, and the folder that holds it is flushed as well.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.errors import UserError

TEMPORARY = ".tmp-"  # names that start so are unfinished and may be removed by whoever comes next


def write_file(path: Path, chunks: Iterable[Any]) -> str:
    """Write `chunks` (anything with the buffer protocol) to `path`; return the SHA-256 as hex."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    digest = hashlib.sha256()
    with open(temporary, "wb") as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)
            file.write(view)
        _flush(file.fileno())
    os.replace(temporary, path)
    _flush_folder(path.parent)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> str:
    """Write `value` as indented JSON; return the SHA-256 of the file."""
    return write_file(path, [json.dumps(value, indent=2).encode() + b"\n"])


def move_file(source: Path, path: Path) -> None:
    """Give a finished file, on the same disk, its lasting name, once its content is on disk."""
    with open(source, "rb+") as file:
        _flush(file.fileno())
    os.replace(source, path)
    _flush_folder(path.parent)


class Folder:
    """A folder being written; `new_folder` renames it into place when all of it is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}  # name -> {"sha256", "bytes"}

    def write_tensors(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        from safetensors.numpy import save_file

        file = self.path / name
        save_file(dict(arrays), file)
        file.chmod(0o666 & ~_umask())  # safetensors creates the file for its owner alone
        with open(file, "rb+") as handle:
            _flush(handle.fileno())
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        self.files[name] = {"sha256": digest, "bytes": file.stat().st_size}

    def write_json(self, name: str, value: Any) -> None:
        digest = write_json(self.path / name, value)
        self.files[name] = {"sha256": digest, "bytes": (self.path / name).stat().st_size}


@contextmanager
def new_folder(path: Path) -> Iterator[Folder]:
    """Write a folder that appears at `path` whole, or not at all if the body raises."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield Folder(temporary)
        _flush_folder(temporary)
        if path.exists():  # only ever a copy of the same step: the newer one takes its place
            remove_folder(path)
        os.rename(temporary, path)
        _flush_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is never seen half-removed: rename first, then delete."""
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left under temporary names."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class JsonLines:
    """A log of one JSON object a line. Appended to, never rewritten but to go back in time."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Open `path` for appending. With `keep`, first drop every record it refuses, and a last
        line cut short by a kill, so that a resumed run logs each step once."""
        if path.exists():
            kept = [r for r in read_json_lines(path) if keep is None or keep(r)]
            write_file(path, [(json.dumps(record) + "\n").encode() for record in kept])
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)

    def append(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records of a log; a last line cut short by a kill is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it or make it again") from None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(descriptor: int) -> None:
    os.fsync(descriptor)


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its renames are journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

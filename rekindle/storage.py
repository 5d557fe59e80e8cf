"""What must last is written here, and nowhere else.

A reader sees a file or folder whole or not at all: everything is written under a temporary name,
flushed to disk, hashed, renamed into place, and the folder that holds it is flushed as well.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from rekindle.errors import UserError

TEMPORARY = ".tmp-"  # names that start so are unfinished and may be removed by whoever comes next
SAFETENSORS = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}  # what the format calls NumPy's types


def write_file(path: Path, chunks: Iterable[Any]) -> str:
    """Write `chunks` (anything with the buffer protocol) to `path`; return the SHA-256 as hex.

    A thread hashes the same memory while it is being written and flushed, each of which takes about
    as long as the other: nobody may change it before this returns.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    views = [memoryview(chunk).cast("B") for chunk in chunks]
    digest = hashlib.sha256()

    def hash_all() -> None:
        for view in views:
            digest.update(view)

    hashing = threading.Thread(target=hash_all)
    hashing.start()
    try:
        with open(temporary, "wb") as file:
            for view in views:
                file.write(view)
            _flush(file)
    finally:
        hashing.join()
    os.replace(temporary, path)
    _flush_folder(path.parent)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> str:
    """Write `value` as indented JSON; return the SHA-256 of the file."""
    return write_file(path, [json.dumps(value, indent=2).encode() + b"\n"])


def move_file(source: Path, path: Path) -> None:
    """Give a finished file, on the same disk, its lasting name, once its content is on disk."""
    with open(source, "rb+") as file:
        _flush(file)
    os.replace(source, path)
    _flush_folder(path.parent)


class Folder:
    """A folder being written; `new_folder` renames it into place when all of it is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}  # name -> {"sha256", "bytes"}

    def write_tensors(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write `arrays` as safetensors, straight from the memory they are in."""
        ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))  # aligned
        header, end = {}, 0
        for key, array in ordered:
            start, end = end, end + array.nbytes
            header[key] = {
                "dtype": SAFETENSORS[array.dtype.str],
                "shape": list(array.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        flat = [array.reshape(-1) for _, array in ordered]
        self._note(
            name, write_file(self.path / name, [len(text).to_bytes(8, "little"), text, *flat])
        )

    def write_json(self, name: str, value: Any) -> None:
        self._note(name, write_json(self.path / name, value))

    def _note(self, name: str, sha256: str) -> None:
        self.files[name] = {"sha256": sha256, "bytes": (self.path / name).stat().st_size}


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
        self._lock = threading.Lock()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, from any thread."""
        with self._lock:
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


def _flush(file: IO[bytes]) -> None:
    """What was written to `file` is on the disk, not in Python's buffer and not in the system's."""
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its renames are journalled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

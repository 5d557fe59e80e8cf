"""Files and folders that appear complete or not at all."""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from rekindle.errors import UserError
from rekindle.schema import mismatch
from rekindle.storage.lock import LOCK

TEMPORARY = ".tmp-"  # prefix of unfinished files, which any later process may remove
# NumPy types → their names in the safetensors format.
SAFETENSORS = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "|b1": "BOOL", "|u1": "U8", "|i1": "I8",
    "<i2": "I16", "<i4": "I32", "<i8": "I64",
}  # fmt: skip


def write_file(path: Path, chunks: Iterable[Any]) -> str:
    """Write `chunks` (anything with the buffer protocol) to `path`; return the SHA-256 as hex.

    A thread hashes the memory while it is written and flushed, since both take about equally long.
    The caller must not change the memory before this returns.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    views = [memoryview(chunk).cast("B") for chunk in chunks]
    digest = hashlib.sha256()

    def hash_all() -> None:
        for view in views:
            digest.update(view)

    hashing = threading.Thread(target=hash_all)
    finish_hash = hashing.join
    try:
        hashing.start()
    except RuntimeError:  # from Python 3.12 on, no thread can be started while the process exits
        finish_hash = hash_all
    try:
        with open(temporary, "wb") as file:
            for view in views:
                file.write(view)
            _flush(file)
    finally:
        finish_hash()
    os.replace(temporary, path)
    _flush_folder(path.parent)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> str:
    """Write `value` as indented JSON; return the SHA-256 of the file."""
    return write_file(path, [json.dumps(value, indent=2).encode() + b"\n"])


def read_json(path: Path, schema: Any = object) -> Any:
    """Read a JSON file. Raises `UserError` if it is missing, damaged, or does not match `schema`
    (see `rekindle.schema.mismatch`)."""
    try:
        return parse_json(path.read_bytes(), schema)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it or create it again") from None


def parse_json(text: bytes, schema: Any = object) -> Any:
    """The JSON value in `text`. Raises `ValueError` if it is invalid or does not match `schema`."""
    try:
        value = json.loads(text.decode())
        if b"\\ud" in text.lower():  # a lone surrogate cannot be encoded, so reject it here
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if wrong := mismatch(value, schema):
        raise ValueError(wrong)
    return value


def move_file(source: Path, path: Path) -> None:
    """Flush a finished file to disk, then rename it to `path` on the same file system."""
    with open(source, "rb+") as file:
        _flush(file)
    os.replace(source, path)
    _flush_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and flush them to disk."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for created in missing:
        _flush_folder(created.parent)


class Folder:
    """A folder being written; `new_folder` renames it into place when all its files are on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Any]] = {}  # name -> {"sha256", "bytes"}

    def write_tensors(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write `arrays` as safetensors, directly from their memory."""
        # Sorted by element size, so that every array is aligned.
        ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
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
    """Write a folder that appears at `path` complete, or not at all if the body raises."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield Folder(temporary)
        _flush_folder(temporary)
        if path.exists():  # a checkpoint of the same step; the new one replaces it
            remove_folder(path)
        os.rename(temporary, path)
        _flush_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder, renaming it first, so that a half-removed folder is never visible. If `path`
    is a symbolic link, remove only the link."""
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder so that it is not used as a complete one; return the new path."""
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    _flush_folder(folder.parent)
    return aside


def printable(path: Path | str) -> str:
    """A path as text that JSON can hold: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def is_empty(folder: Path, ignoring: str | None = None) -> bool:
    """Whether a folder contains nothing but a lock, unfinished files of a killed process, and
    the entry named `ignoring`."""
    own = (LOCK, ignoring)
    return all(p.name in own or p.name.startswith(TEMPORARY) for p in folder.iterdir())


def has_unfinished(folder: Path) -> bool:
    """Whether `remove_unfinished` would remove anything."""
    return any(folder.glob(f"{TEMPORARY}*"))


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files and folders left by a killed process."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: IO[bytes]) -> None:
    """Flush `file` to disk, through Python's buffer and the operating system's cache."""
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and NTFS journals renames
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)

"""What must last is written here, and nowhere else.

A reader sees a file or folder whole or not at all: everything is written under a temporary name,
flushed to disk, hashed, renamed into place, and the folder that holds it is flushed as well.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from rekindle.errors import UserError
from rekindle.schema import mismatch

TEMPORARY = ".tmp-"  # names that start so are unfinished and may be removed by whoever comes next
LOCK = ".lock"
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


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are not there, so that they stay."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _flush_folder(made.parent)


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
    """Remove a folder so that it is never seen half-removed: rename first, then delete. Of a link,
    only the link."""
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


class Lock:
    """Keeps a folder for one process. The system takes the lock back when the process ends, however
    it ends; the file only says who it was. Entered, it is not taken yet; left, it is given back."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor: int | None = None
        self._named = False

    @property
    def held(self) -> bool:
        """Whether it is ours."""
        return self._descriptor is not None

    def take(self, *, create: bool = True) -> None:
        """Take the lock, if it is not ours already; without `create`, only if its file is there,
        and without writing to it.

        Raises `UserError` that names the process which has it.
        """
        if self._descriptor is None and (create or self._path.exists()):
            self._descriptor = self._open()
        if self._descriptor and create and not self._named and os.name != "nt":
            who = f"process {os.getpid()} on {socket.gethostname()}".encode()
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, who, 0)
            self._named = True

    def _open(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"{self._path.parent} may not be written to ({error.strerror}): give another --out"
            ) from None
        if not _lock_file(descriptor):
            holder = (
                os.pread(descriptor, 200, 0).decode(errors="replace") if os.name != "nt" else ""
            )
            os.close(descriptor)
            raise UserError(
                f"{self._path.parent} is in use by {holder or 'another process'}: wait until that "
                "is done, or give another --out"
            )
        return descriptor

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back, if it was taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _lock_file(descriptor: int) -> bool:
    """Lock an open file; False if another process has. Some file systems of clusters have no locks:
    there everybody gets one."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


def set_aside(folder: Path) -> Path:
    """Give a damaged folder a name under which nobody takes it for a whole one; return it."""
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    _flush_folder(folder.parent)
    return aside


def spelled(path: Path | str) -> str:
    """A path as JSON can hold it: bytes that are no UTF-8 are written out."""
    return os.fsencode(path).decode(errors="backslashreplace")


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a process left that was killed at its beginning."""
    return all(p.name == LOCK or p.name.startswith(TEMPORARY) for p in folder.iterdir())


def has_unfinished(folder: Path) -> bool:
    """Whether there is anything that `remove_unfinished` would remove."""
    return any(folder.glob(f"{TEMPORARY}*"))


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left under temporary names."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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


def read_json(path: Path, form: Any = object) -> Any:
    """Read a JSON file. Raises `UserError` when it is missing, damaged, or not of this `form`."""
    try:
        return parse_json(path.read_bytes(), form)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it or make it again") from None


def parse_json(text: bytes, form: Any = object) -> Any:
    """The value in `text`. Raises `ValueError` if there is none, or not one of this `form`."""
    try:
        value = json.loads(text.decode())
        if b"\\ud" in text.lower():  # half a surrogate pair is no text: nothing could print it
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if wrong := mismatch(value, form):
        raise ValueError(wrong)
    return value


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
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks know no flushing of folders
            raise
    finally:
        os.close(descriptor)

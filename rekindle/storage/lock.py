"""A lock that lets only one process at a time write to a folder."""

import errno
import os
import socket
from pathlib import Path

from rekindle.errors import UserError

LOCK = ".lock"


class Lock:
    """An exclusive lock on a folder. The system releases it when the process ends for any reason;
    the content of the lock file only names the holder. As a context manager, entering does not take
    the lock (call `take`), and leaving releases it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._descriptor: int | None = None
        self._named = False

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def take(self, *, create: bool = True) -> None:
        """Take the lock if this object does not hold it yet. Without `create`, take it only if the
        lock file exists, and do not write to the file.

        Raises `UserError` that names the process holding the lock.
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
                f"{self._path.parent} is not writable ({error.strerror}): choose another --out"
            ) from None
        locked = lock_file(descriptor)
        if locked and os.fstat(descriptor).st_nlink == 0:  # another process removed it just now
            os.close(descriptor)
            return self._open()
        if not locked:
            holder = (
                os.pread(descriptor, 200, 0).decode(errors="replace") if os.name != "nt" else ""
            )
            os.close(descriptor)
            raise UserError(
                f"{self._path.parent} is in use by {holder or 'another process'}: wait until it "
                "has finished, or choose another --out"
            )
        return descriptor

    def __enter__(self) -> "Lock":
        return self

    def remove_file(self) -> None:
        """Remove the lock file, while the lock is held."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        """Release the lock, if it was taken."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_file(descriptor: int) -> bool:
    """Lock an open file; False if another process holds the lock. On file systems without locks,
    as on some clusters, this always succeeds."""
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

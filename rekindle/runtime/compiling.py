"""The cache of compiled code, which a killed process may have left damaged."""

import os
import struct
from pathlib import Path

from rekindle.storage.lock import lock_file

ELF = b"\x7fELF"
HEADER_BYTES = 64


def repair_cache() -> None:
    """Remove libraries that were cut short from Inductor's cache; they are compiled again.

    Inductor's compiler writes a library under its final name. If it is killed, every later process
    with the same code would load the partial file, and fail or crash.
    """
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    for library in Path(cache).glob("*/*.so") if cache else ():
        if _is_cut_short(library):
            _remove(library, Path(str(cache), "locks", f"{library.name.partition('.')[0]}.lock"))


def _is_cut_short(library: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section headers or one of its segments does."""
    try:
        content = library.read_bytes()
    except OSError:
        return False  # removed in the meantime
    if len(content) < HEADER_BYTES or not any(content[:HEADER_BYTES]):
        return True
    if not content.startswith(ELF):  # another system's format
        return False
    segments, sections = struct.unpack_from("<QQ", content, 32)
    segment_bytes, segment_count, section_bytes, section_count = struct.unpack_from(
        "<HHHH", content, 54
    )
    ends = [sections + section_bytes * section_count, segments + segment_bytes * segment_count]
    if max(ends) <= len(content):
        for i in range(segment_count):
            offset, _, _, size = struct.unpack_from(
                "<QQQQ", content, segments + i * segment_bytes + 8
            )
            ends.append(offset + size)
    return max(ends) > len(content)


def _remove(library: Path, lock: Path) -> None:
    """Remove a damaged library, unless another process holds its lock: it is writing the file."""
    lock.parent.mkdir(exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if lock_file(descriptor) and _is_cut_short(library):
            library.unlink(missing_ok=True)
    finally:
        os.close(descriptor)

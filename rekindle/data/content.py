"""Detect the type of a file from its first bytes, regardless of its name.

Used when a file does not have the expected format, so that the error can name the actual one.
"""

import codecs
import re
from pathlib import Path

HEAD = 1024  # bytes that are inspected

LFS, GZIP, ZSTD, PAGE, PARQUET = "lfs", "gzip", "zstd", "page", "parquet"
_UNPACK = "unpack it first"
KINDS: dict[str, tuple[bytes, str]] = {  # name → pattern of the first bytes; description and fix
    LFS: (
        rb"version https://git-lfs\.github\.com/spec/",
        "a Git LFS pointer, not the data: download the data with `git lfs pull`",
    ),
    GZIP: (rb"\x1f\x8b\x08", "gzip data: decompress it first (`gunzip`)"),
    ZSTD: (rb"\x28\xb5\x2f\xfd", "Zstandard data: decompress it first (`unzstd`)"),
    "bzip2": (rb"BZh[1-9]1AY&SY", "bzip2 data: decompress it first (`bunzip2`)"),
    "xz": (rb"\xfd7zXZ\0", "xz data: decompress it first (`unxz`)"),
    "lz4": (rb"\x04\x22\x4d\x18", "LZ4 data: decompress it first (`unlz4`)"),
    "zip": (rb"PK\x03\x04", f"a ZIP archive: {_UNPACK}"),
    "7z": (rb"7z\xbc\xaf\x27\x1c", f"a 7-Zip archive: {_UNPACK}"),
    "tar": (rb"(?s).{257}ustar", f"a tar archive: {_UNPACK}"),
    PARQUET: (rb"PAR1", "a Parquet file: use --parquet"),
    "arrow": (rb"ARROW1", "an Arrow file: convert it to Parquet and use --parquet"),
    "pdf": (rb"%PDF-", "a PDF: extract its text first"),
    "sqlite": (rb"SQLite format 3\0", "an SQLite database: extract its text first"),
    PAGE: (
        rb"\s*<(?i:!doctype html|html|head|body|\?xml)",
        "a web page (HTML or XML), perhaps a server's error page: download the file again",
    ),
}
_PATTERNS = {name: re.compile(start) for name, (start, _) in KINDS.items()}
_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # first: it starts with UTF-16's mark
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def kind_of(head: bytes) -> str:
    """The kind of a file that starts with `head`: a key of `KINDS`, "UTF-16" or "UTF-32", or
    empty if it is none of them."""
    head = head[:HEAD]
    for name, pattern in _PATTERNS.items():
        if pattern.match(head):
            return name
    return _wide(head)


def _wide(head: bytes) -> str:
    """Detect UTF-16 or UTF-32 by its byte order mark, or by the zero bytes of ASCII characters."""
    for name, marks in _MARKS.items():
        if head.startswith(marks):
            return name
    for name, width in (("UTF-32", 4), ("UTF-16", 2)):
        units = [head[i : i + width] for i in range(0, len(head) - width + 1, width)]
        one_byte = sum(unit.count(0) == width - 1 for unit in units)
        if len(units) >= 4 and one_byte > 0.7 * len(units):
            return name
    return ""


def describe(kind: str) -> str:
    """Describe a file of this kind and how to convert it, worded to follow "FILE is"."""
    if kind in KINDS:
        return KINDS[kind][1]
    return f"{kind} text: convert it to UTF-8 first (`iconv -f {kind} -t UTF-8`)"


def head_of(path: Path) -> bytes:
    """The first `HEAD` bytes of a file."""
    with open(path, "rb") as file:
        return file.read(HEAD)

"""What a file holds by its first bytes, whatever its name says.

Looked at where a file cannot be what it is taken for, so that the error says what it is.
"""

import codecs
import re
from pathlib import Path

HEAD = 1024  # bytes that are looked at

LFS, GZIP, ZSTD, PAGE, PARQUET = "lfs", "gzip", "zstd", "page", "parquet"
_UNPACK = "unpack it first"
KINDS: dict[str, tuple[bytes, str]] = {  # name → what the file begins with; what it is, what to do
    LFS: (
        rb"version https://git-lfs\.github\.com/spec/",
        "a Git LFS pointer, not the data: get them with `git lfs pull`",
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
    "arrow": (rb"ARROW1", "an Arrow file: write it as Parquet, and use --parquet"),
    "pdf": (rb"%PDF-", "a PDF: take its text out first"),
    "sqlite": (rb"SQLite format 3\0", "an SQLite database: take its text out first"),
    PAGE: (
        rb"\s*<(?i:!doctype html|html|head|body|\?xml)",
        "a web page (HTML or XML), such as a server sends in place of a file: download it again",
    ),
}
_PATTERNS = {name: re.compile(start) for name, (start, _) in KINDS.items()}
_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # before UTF-16, whose mark begins it
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def what_is(head: bytes) -> str:
    """The kind in `KINDS` of a file that begins with `head`, or UTF-16 or UTF-32; else empty."""
    head = head[:HEAD]
    for name, pattern in _PATTERNS.items():
        if pattern.match(head):
            return name
    return _wide(head)


def _wide(head: bytes) -> str:
    """UTF-16 or UTF-32 by its mark, or by the zeros that most Western letters have there."""
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
    """What a file of this kind is and what to do, to follow "is"."""
    if kind in KINDS:
        return KINDS[kind][1]
    return f"{kind} text: convert it to UTF-8 first (`iconv -f {kind} -t UTF-8`)"


def head_of(path: Path) -> bytes:
    """The first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(HEAD)

"""The contract of a source: documents in a fixed order, in files.

A source is a fixed list of files. Each file is a sequence of documents that is the same each time
it is read. So two integers are enough to resume: the file, and how many of its documents are done.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rekindle.observe.console import Console

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. `split` is None if its documents are split by hash."""

    name: str
    size: int  # of the file on disk, in bytes
    split: str | None = None


@dataclass(frozen=True)
class Part:
    """Marks a block whose only text is a part of a document that is too long for one block."""

    begins: bool  # whether this is the first part of the document
    ends: bool  # whether this is the last part
    hash: int | None  # `validation_hash` of the whole document; None if it is too long for memory


@dataclass(frozen=True)
class Block:
    """Some consecutive documents of one file, or a part of one."""

    texts: "pa.StringArray"  # no nulls, valid UTF-8
    file: int
    first: int  # number of the first document within its file
    done: float  # fraction of the file read at the end of this block, 0 to 1
    part: Part | None = None


def validation_hash(text: bytes | memoryview) -> int:
    """A 64-bit hash of a document's text, which decides whether the document is held out."""
    digest = hashlib.blake2b(text, digest_size=8, key=b"rekindle validation")
    return int.from_bytes(digest.digest(), "little")


class Source(Protocol):
    """Documents in a fixed order, and their description for the manifest.

    The name is known from the start, everything else only after `open`.
    """

    name: str
    revision: str
    licence: str
    files: Sequence[SourceFile]
    left_out: Sequence[tuple[str, str]] = ()  # files that are not read: (name, reason)

    @property
    @abstractmethod
    def text_bytes(self) -> int:
        """An estimate of the total text in bytes, available before reading."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the content, so that a folder is not resumed with other text. Hex."""

    def identities(self, count: int) -> list[dict[str, Any]] | None:
        """The identity of each of the first `count` files, as JSON, so that a changed file does not
        invalidate the others. None for a source that is identified only as a whole."""
        return None

    @abstractmethod
    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        """Yield the documents of one file, without the first `skip`."""

    def record(self) -> dict[str, Any]:
        """The description of this source in the manifest."""
        return {
            "name": self.name,
            "revision": self.revision,
            "licence": self.licence,
            "fingerprint": self.fingerprint,
        }

    def is_same(self, record: dict[str, Any]) -> bool:
        """Whether `record`, from an earlier run, describes this source."""
        return record.get("fingerprint") == self.fingerprint

    def open(self, folder: Path, console: Console) -> None:
        """Find the files. `folder` can be used for downloads until `close`."""

    def release(self, file: int) -> None:
        """Called when files before number `file` are in finished shards and not needed again."""

    def close(self) -> None:
        """Called when reading has ended."""

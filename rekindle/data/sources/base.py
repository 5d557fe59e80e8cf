"""The contract of a source: documents in a fixed order, in files.

A source is a fixed list of files, each a sequence of documents that is the same on every reading.
So a position to resume from is two integers: the file, and how many of its documents are done.
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
    """One file of a source. `split` is None where documents are split by their hash."""

    name: str
    size: int  # bytes of the file itself
    split: str | None = None


@dataclass(frozen=True)
class Part:
    """Says that a block holds one text, which is a part of a document too long for one block."""

    begins: bool  # the document
    ends: bool
    hash: int | None  # `validation_hash` of the whole document; None if it is too long to be held


@dataclass(frozen=True)
class Block:
    """Some consecutive documents of one file, or a part of one."""

    texts: "pa.StringArray"  # no nulls, valid UTF-8
    file: int
    first: int  # number of the first document within its file
    done: float  # part of the file that has been read when this block ends, 0 to 1
    part: Part | None = None


def validation_hash(text: bytes | memoryview) -> int:
    """What decides whether a document is held out: 64 bits that depend on its text alone."""
    digest = hashlib.blake2b(text, digest_size=8, key=b"rekindle validation")
    return int.from_bytes(digest.digest(), "little")


class Source(Protocol):
    """Documents in a fixed order, and what the manifest says of them.

    The name is known at once; all else only after `open`.
    """

    name: str
    revision: str
    licence: str
    files: Sequence[SourceFile]
    left_out: Sequence[tuple[str, str]] = ()  # files that are not read: name, reason

    @property
    @abstractmethod
    def text_bytes(self) -> int:
        """About how much text there is in all, known before it is read."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the content, so that a folder is not continued with other text. Hex."""

    def identities(self, count: int) -> list[dict[str, Any]] | None:
        """What identifies each of the first `count` files, as JSON, so that a change of one of them
        concerns that one alone. None for a source that is identified as a whole."""
        return None

    @abstractmethod
    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        """The documents of one file, without the first `skip`."""

    def record(self) -> dict[str, Any]:
        """What the manifest keeps of this source."""
        return {
            "name": self.name,
            "revision": self.revision,
            "licence": self.licence,
            "fingerprint": self.fingerprint,
        }

    def is_same(self, record: dict[str, Any]) -> bool:
        """Whether `record`, from an earlier run, is of this source."""
        return record.get("fingerprint") == self.fingerprint

    def open(self, folder: Path, console: Console) -> None:
        """Find out which files there are. `folder` is lent for downloads until `close`."""

    def release(self, file: int) -> None:
        """Files before number `file` are in finished shards and will not be read again."""

    def close(self) -> None:
        """Nothing more will be read."""

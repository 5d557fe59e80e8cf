"""The contract of a source: documents in a fixed order, in files.

A source is a fixed list of files, each a sequence of documents that is the same on every reading.
So a position to resume from is two integers: the file, and how many of its documents are done.
"""

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
class Block:
    """Some consecutive documents of one file."""

    texts: "pa.StringArray"  # no nulls, valid UTF-8
    file: int
    first: int  # number of the first document within its file
    done: float  # part of the file that has been read when this block ends, 0 to 1


class Source(Protocol):
    """Documents in a fixed order, and what the manifest says of them.

    The name is known at once; all else only after `open`.
    """

    name: str
    revision: str
    licence: str
    files: Sequence[SourceFile]

    @property
    @abstractmethod
    def text_bytes(self) -> int:
        """About how much text there is in all, known before it is read."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the content, so that a folder is not continued with other text. Hex."""

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


def splits_of(names: Sequence[str]) -> list[str | None]:
    """The split of each file of a set. Files named `val*` are validation, and then all others are
    training; without one, each split is None: documents are split by their hash."""
    held_out = [name.startswith("val") for name in names]
    return [("val" if held else "train") if any(held_out) else None for held in held_out]

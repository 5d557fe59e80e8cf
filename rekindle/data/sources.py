"""Where text comes from: Parquet, JSON Lines, text files, the embedded default, the hub.

A source is a fixed list of files, each a sequence of documents that is the same on every reading.
So "go on from here" is two integers: the file, and how many of its documents are done.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekindle.data.progress import Say
from rekindle.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from rekindle.data.readymade import ReadyMade


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


class Source(ABC):
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

    def open(self, folder: Path, say: Say) -> None:
        """Find out which files there are. `folder` is lent for downloads until `close`."""

    def release(self, file: int) -> None:
        """Files before number `file` are in finished shards and will not be read again."""

    def close(self) -> None:
        """Nothing more will be read."""


def from_arguments(
    dataset: str | None = None,
    embedded: bool = False,
    parquet: Sequence[Path | str] = (),
    jsonl: Sequence[Path | str] = (),
    text: Sequence[Path | str] = (),
    shards: Path | str | None = None,
) -> "Source | ReadyMade":
    """The source that a command line names.

    Raises `UserError` unless exactly one is named, and when it does not exist.
    """
    from rekindle.data import local

    if sum(map(bool, (dataset, embedded, parquet, jsonl, text, shards))) != 1:
        raise UserError(
            "name exactly one source: a dataset (such as fineweb-edu-10bt), --embedded, "
            "--parquet DIR, --jsonl FILES, --text FILES or --shards DIR"
        )
    if embedded:
        from rekindle.data.embedded import EmbeddedSource

        return EmbeddedSource()
    if parquet:
        return local.ParquetSource(parquet)
    if jsonl:
        return local.JsonLinesSource(jsonl)
    if text:
        return local.TextSource(text)
    if shards:
        from rekindle.data.readymade import ShardFolder

        return ShardFolder(Path(shards))
    assert dataset
    return _dataset(dataset)


def _dataset(name: str) -> "Source | ReadyMade":
    """A source on the hub, by a short name or by `owner/name[:folder]`."""
    from rekindle.data import readymade, remote

    if name == readymade.DATASET:
        return readymade.PublishedShards()
    if name in remote.DATASETS:
        return remote.HubSource(*remote.DATASETS[name])
    if "/" in name:
        repository, _, folder = name.partition(":")
        return remote.HubSource(repository, folder)
    known = [*remote.DATASETS, readymade.DATASET]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise UserError(
        f"unknown dataset {name!r}: did you mean {' or '.join(near)}? "
        "(any dataset of the hub: owner/name; your own files: --parquet DIR)"
    )

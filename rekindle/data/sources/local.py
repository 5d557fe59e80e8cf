"""The common base of sources that read local files."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle import storage
from rekindle.data.cores import usable_cores
from rekindle.data.cutting import character
from rekindle.data.sources.base import Block, Part, Source, SourceFile, validation_hash
from rekindle.data.sources.find import find
from rekindle.data.sources.splits import LEFT_OUT, splits_of
from rekindle.errors import UserError

BLOCK_BYTES = 8 << 20  # text per encoding task, large enough to amortize the overhead of a task
PART_BYTES = 8 << 20  # a longer document is encoded in parts
LONG_BYTES = 100_000_000  # a longer document is never in memory as a whole, and never held out
SAMPLE_BYTES = 1 << 16  # read from both ends of a local file for the fingerprint


class LocalSource(Source):
    """Local files of one kind."""

    revision = "local"
    licence = "unknown"  # the user's own files
    suffixes: tuple[str, ...]

    def __init__(self, paths: Iterable[Path | str]) -> None:
        named = [Path(path) for path in paths]
        found = find(named, self.suffixes)
        splits = splits_of([file.location for file in found.files])
        pairs = list(zip(found.files, splits, strict=True))
        self.left_out = [(f.name, LEFT_OUT) for f, split in pairs if split == "test"]
        self.left_out += found.left_out
        kept = [(file, split) for file, split in pairs if split != "test"]
        self.paths = [file.path for file, _ in kept]
        self.files = [SourceFile(f.name, f.path.stat().st_size, split) for f, split in kept]
        folder = storage.printable(found.files[0].path.parent.name)
        self.name = f"{self.suffixes[0].lstrip('.') or 'text'}: {folder}"
        self._seen = [_stamp(path) for path in self.paths]
        self._hashes: list[Future[str]] = []

    @property
    def text_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Hash of the names, sizes and both ends of all files. Earlier versions identified a source
        only by this."""
        digest = hashlib.sha256()
        for path, file in zip(self.paths, self.files, strict=True):
            digest.update(f"{file.name} {file.size}\n".encode(errors="surrogateescape"))
            with open(path, "rb") as handle:
                digest.update(handle.read(SAMPLE_BYTES))
                handle.seek(max(0, file.size - SAMPLE_BYTES))
                digest.update(handle.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def identities(self, count: int) -> list[dict[str, Any]]:
        """The name, size, split and SHA-256 of each file. Raises `UserError` if a file has changed
        since this source was created."""
        if not self._hashes:
            # Runs during encoding, which takes many times longer.
            pool = ThreadPoolExecutor(usable_cores())
            self._hashes = [pool.submit(storage.file_sha256, path) for path in self.paths]
            pool.shutdown(wait=False)
        return [self._identity(file) for file in range(min(count, len(self.files)))]

    def _identity(self, number: int) -> dict[str, Any]:
        file, sha256 = self.files[number], self._hashes[number].result()
        self._check_unchanged(number)
        name = storage.printable(file.name)
        return {"name": name, "bytes": file.size, "split": file.split, "sha256": sha256}

    def close(self) -> None:
        for sha256 in self._hashes:
            sha256.cancel()

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        """Yield the documents of one file, without the first `skip`. Raises `UserError` if the file
        has changed since this source was created."""
        try:
            yield from self.read(file, skip)
        except UserError:
            self._check_unchanged(file)  # a change may be the cause of the error
            raise
        self._check_unchanged(file)

    @abstractmethod
    def read(self, file: int, skip: int) -> Iterator[Block]:
        """Yield the documents of one file, without the first `skip`."""

    def _check_unchanged(self, file: int) -> None:
        path = self.paths[file]
        if not path.exists() or _stamp(path) != self._seen[file]:
            raise UserError(
                f"{path} changed while it was being read: make sure that nothing writes to it, "
                "then run the same command again"
            )


def _stamp(path: Path) -> tuple[int, ...]:
    """Device, inode, size and modification time: at least one changes when a file is written or
    replaced."""
    status: os.stat_result = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that is longer than `LONG_BYTES`."""

    text: bytes  # UTF-8, cut between characters
    done: float  # fraction of the file that has been read, 0 to 1
    begins: bool = True  # whether this is the first part of the document
    ends: bool = True  # whether this is the last part


def gather(pieces: Iterable[Piece], file: int, skip: int) -> Iterator[Block]:
    """Group documents into blocks, and split long documents into parts of one block each; without
    the first `skip` documents."""
    texts: list[bytes] = []
    size, done, number = 0, 0.0, 0  # of the block; number of documents started
    for piece in pieces:
        number += piece.begins
        if number <= skip:
            continue
        complete = piece.begins and piece.ends and len(piece.text) <= PART_BYTES
        if texts and (not complete or size >= BLOCK_BYTES):
            yield _block(texts, file, number - 1 - len(texts), done)
            texts, size = [], 0
        if complete:
            texts.append(piece.text)
            size, done = size + len(piece.text), piece.done
        else:
            yield from parts(piece, file, number - 1)
    if texts:
        yield _block(texts, file, number - len(texts), done)


def _block(texts: list[bytes], file: int, first: int, done: float, part: Part | None = None) -> Any:
    import pyarrow as pa

    return Block(pa.array(texts, pa.string()), file, first, done, part)


def parts(piece: Piece, file: int, number: int) -> Iterator[Block]:
    """Split a long document, or a piece of one, into parts of one block each. `number` is the
    document's number in its file."""
    text, start = piece.text, 0
    held = piece.begins and piece.ends and len(text) <= LONG_BYTES
    hash = validation_hash(text) if held else None
    while True:  # runs once for an empty piece, which may start or end a document
        end = character(text, start + PART_BYTES)
        part = Part(piece.begins and start == 0, piece.ends and end == len(text), hash)
        yield _block([text[start:end]], file, number, piece.done, part)
        if (start := end) == len(text):
            return

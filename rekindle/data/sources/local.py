"""What sources of files on this machine have in common."""

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

BLOCK_BYTES = 8 << 20  # text handed to one encoding task: long enough to pay for its start
PART_BYTES = 8 << 20  # a longer document is handed over in parts
LONG_BYTES = 100_000_000  # a longer document is not held in memory, and never held out
SAMPLE_BYTES = 1 << 16  # read from either end of a local file for the fingerprint


class LocalSource(Source):
    """Files of one kind on this machine."""

    revision = "local"
    licence = "unknown"  # the user's own files: only they know
    suffixes: tuple[str, ...]

    def __init__(self, paths: Iterable[Path | str]) -> None:
        named = [Path(path) for path in paths]
        found = find(named, self.suffixes)
        splits = splits_of([file.place for file in found.files])
        pairs = list(zip(found.files, splits, strict=True))
        self.left_out = [(f.name, LEFT_OUT) for f, split in pairs if split == "test"]
        self.left_out += found.left_out
        kept = [(file, split) for file, split in pairs if split != "test"]
        self.paths = [file.path for file, _ in kept]
        self.files = [SourceFile(f.name, f.path.stat().st_size, split) for f, split in kept]
        folder = storage.spelled(found.files[0].path.parent.name)
        self.name = f"{self.suffixes[0].lstrip('.') or 'text'}: {folder}"
        self._seen = [_stamp(path) for path in self.paths]
        self._hashes: list[Future[str]] = []

    @property
    def text_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and both ends of every file: earlier versions knew a source by it."""
        digest = hashlib.sha256()
        for path, file in zip(self.paths, self.files, strict=True):
            digest.update(f"{file.name} {file.size}\n".encode(errors="surrogateescape"))
            with open(path, "rb") as handle:
                digest.update(handle.read(SAMPLE_BYTES))
                handle.seek(max(0, file.size - SAMPLE_BYTES))
                digest.update(handle.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def identities(self, count: int) -> list[dict[str, Any]]:
        """Of each file its name, size, split, and the SHA-256 of all of it. Raises `UserError` if
        one is not the same as at the first look at it."""
        if not self._hashes:
            # Beside the encoding, which takes many times as long as this.
            pool = ThreadPoolExecutor(usable_cores())
            self._hashes = [pool.submit(storage.file_sha256, path) for path in self.paths]
            pool.shutdown(wait=False)
        return [self._identity(file) for file in range(min(count, len(self.files)))]

    def _identity(self, number: int) -> dict[str, Any]:
        file, sha256 = self.files[number], self._hashes[number].result()
        self._check_unchanged(number)
        name = storage.spelled(file.name)
        return {"name": name, "bytes": file.size, "split": file.split, "sha256": sha256}

    def close(self) -> None:
        for sha256 in self._hashes:
            sha256.cancel()

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        """The documents of one file, without the first `skip`. Raises `UserError` if the file is
        not the same from the first look at it to the end."""
        try:
            yield from self.read(file, skip)
        except UserError:
            self._check_unchanged(file)  # what is wrong may come from that
            raise
        self._check_unchanged(file)

    @abstractmethod
    def read(self, file: int, skip: int) -> Iterator[Block]:
        """The documents of one file, without the first `skip`."""

    def _check_unchanged(self, file: int) -> None:
        path = self.paths[file]
        if not path.exists() or _stamp(path) != self._seen[file]:
            raise UserError(
                f"{path} was changed while it was read: see that nothing writes there, and run "
                "the same command again"
            )


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when somebody writes to a file or puts another in its place."""
    status: os.stat_result = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that is longer than `LONG_BYTES`."""

    text: bytes  # UTF-8, cut between characters
    done: float  # part of the file that has been read, 0 to 1
    begins: bool = True  # the document
    ends: bool = True


def gather(pieces: Iterable[Piece], file: int, skip: int) -> Iterator[Block]:
    """Blocks of several documents, and of parts of long ones; without the first `skip`."""
    texts: list[bytes] = []
    size, done, number = 0, 0.0, 0  # of the block; documents that have begun
    for piece in pieces:
        number += piece.begins
        if number <= skip:
            continue
        whole = piece.begins and piece.ends and len(piece.text) <= PART_BYTES
        if texts and (not whole or size >= BLOCK_BYTES):
            yield _block(texts, file, number - 1 - len(texts), done)
            texts, size = [], 0
        if whole:
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
    """A long document, number `number` of its file, or a piece of one, in parts."""
    text, start = piece.text, 0
    held = piece.begins and piece.ends and len(text) <= LONG_BYTES
    hash = validation_hash(text) if held else None
    while True:  # once for an empty piece, which may begin or end a document
        end = character(text, start + PART_BYTES)
        part = Part(piece.begins and start == 0, piece.ends and end == len(text), hash)
        yield _block([text[start:end]], file, number, piece.done, part)
        if (start := end) == len(text):
            return

"""What sources of files on this machine have in common."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from rekindle import storage
from rekindle.data.sources.base import Block, Source, SourceFile
from rekindle.errors import UserError

BLOCK_BYTES = 8 << 20  # text handed to one encoding task: long enough to pay for its start
SAMPLE_BYTES = 1 << 16  # read from either end of a local file to recognise it again


class LocalSource(Source):
    """Files of one kind on this machine."""

    revision = "local"
    licence = "unknown"  # the user's own files: only they know
    suffixes: tuple[str, ...]

    def __init__(self, paths: Iterable[Path | str]) -> None:
        self.paths = self._find([Path(path) for path in paths])
        folder = storage.spelled(self.paths[0].parent.name)
        self.name = f"{self.suffixes[0].lstrip('.') or 'text'}: {folder}"
        self.files = [
            SourceFile(path.name, path.stat().st_size, split)
            for path, split in zip(self.paths, self.splits(), strict=True)
        ]

    def splits(self) -> list[str | None]:
        """The split of each file; None where its documents are split by their hash."""
        return [None] * len(self.paths)

    def _find(self, paths: list[Path]) -> list[Path]:
        """The files that `paths` name: a folder stands for those in it with a known suffix."""
        found: list[Path] = []
        for path in paths:
            if path.is_dir():
                inside = sorted(p for p in path.iterdir() if p.name.endswith(self.suffixes))
                inside = [p for p in inside if p.is_file() and not p.name.startswith(".")]
                if not inside:
                    raise UserError(f"{path} holds no {' or '.join(self.suffixes)} file")
                found += inside
            elif path.is_file():
                found.append(path)
            else:
                raise UserError(f"there is no file or folder {path}")
        if len(set(found)) != len(found):
            raise UserError(f"a file is named twice among {', '.join(map(str, paths))}")
        return found

    @property
    def text_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and both ends of every file: enough to notice another data set without
        reading all of it."""
        digest = hashlib.sha256()
        for path, file in zip(self.paths, self.files, strict=True):
            digest.update(f"{file.name} {file.size}\n".encode(errors="surrogateescape"))
            with open(path, "rb") as handle:
                digest.update(handle.read(SAMPLE_BYTES))
                handle.seek(max(0, file.size - SAMPLE_BYTES))
                digest.update(handle.read(SAMPLE_BYTES))
        return digest.hexdigest()


def gather(documents: Iterable[tuple[bytes, float]], file: int, skip: int) -> Iterator[Block]:
    """Blocks from single documents, each with the part of the file read so far."""
    import pyarrow as pa

    texts: list[bytes] = []
    size, done, number = 0, 0.0, 0
    for number, (text, done) in enumerate(documents, 1):
        if number <= skip:
            continue
        texts.append(text)
        size += len(text)
        if size >= BLOCK_BYTES:
            yield Block(pa.array(texts, pa.string()), file, number - len(texts), done)
            texts, size = [], 0
    if texts:
        yield Block(pa.array(texts, pa.string()), file, number - len(texts), done)

"""Datasets on the Hugging Face hub, read file by file.

The revision is pinned when a dataset is first listed, and every file is checked against the size
and hash that the hub lists. The next file is downloaded while one is encoded, and a file is removed
once its documents are in finished shards, so the disk never holds a whole dataset as text.
"""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rekindle import hub
from rekindle.data.sources.base import Block, Source, SourceFile
from rekindle.data.sources.parquet import parquet_blocks
from rekindle.data.sources.splits import LEFT_OUT, splits_of
from rekindle.errors import UserError
from rekindle.observe.console import Console
from rekindle.observe.progress import Progress

# Short name → repository, and the folder in it.
DATASETS = {
    "fineweb-edu-10bt": ("HuggingFaceFW/fineweb-edu", "sample/10BT"),
    "fineweb-10bt": ("HuggingFaceFW/fineweb", "sample/10BT"),
}
TEXT_RATIO = 1.6  # bytes of text per byte of Parquet, as in FineWeb; used only for estimates
INSTEAD = "without network access, download the files elsewhere and use --parquet DIR"


class HubSource(Source):
    """All Parquet files below a folder of a dataset, with a `text` column.

    The names of files and subfolders determine which files are validation and which are left out.
    """

    def __init__(self, repository: str, folder: str = "") -> None:
        self._repository, self._folder = repository, folder.strip("/")
        self.name = f"{repository}:{self._folder}" if self._folder else repository
        self._pinned: str | None = None
        self._coming: dict[int, Future[Path]] = {}
        self._received = 0  # bytes, summed over all downloads
        self._closed = False

    def is_same(self, record: dict[str, Any]) -> bool:
        """Compare by name and pin the revision in `record`: a folder keeps its revision even if a
        newer one is published, and a finished folder is recognized without network access."""
        if record.get("name") != self.name:
            return False
        self._pinned = record["revision"]
        return True

    def open(self, folder: Path, console: Console) -> None:
        hub.remove_partial(folder)
        self._downloads, self._console = folder, console
        listing = hub.list_files(
            self._repository, self._folder, ".parquet", self._pinned, instead=INSTEAD
        )
        splits = splits_of([self._relative(file) for file in listing.files])
        pairs = list(zip(listing.files, splits, strict=True))
        self.left_out = [(file.path, LEFT_OUT) for file, split in pairs if split == "test"]
        kept = [(file, split) for file, split in pairs if split != "test"]
        if not kept:
            raise UserError(f"{self.name} on the hub has no *.parquet file to train on")
        self._listing = dataclasses.replace(listing, files=tuple(file for file, _ in kept))
        self.revision, self.licence = listing.revision, listing.licence
        self.files = [SourceFile(file.path, file.size, split) for file, split in kept]
        self._pool = ThreadPoolExecutor(1)

    @property
    def text_bytes(self) -> int:
        return int(TEXT_RATIO * sum(file.size for file in self.files))

    @property
    def fingerprint(self) -> str:
        return self._listing.fingerprint

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        for number in (file, file + 1):  # download the next file while this one is encoded
            if number < len(self.files) and number not in self._coming:
                remote = self._listing.files[number]
                self._coming[number] = self._pool.submit(
                    hub.fetch, self._listing, remote, self._downloads, self._count
                )
        yield from parquet_blocks(self._wait(file), file, skip)

    def release(self, file: int) -> None:
        for number in sorted(self._coming):  # sorted copies it: the reading thread adds to it
            if number < file:
                self._coming.pop(number).result().unlink(missing_ok=True)

    def close(self) -> None:
        self._closed = True
        if hasattr(self, "_pool"):
            self._pool.shutdown(cancel_futures=True)

    def _wait(self, file: int) -> Path:
        """Wait for the download of a file, showing its progress; return the local copy."""
        coming, remote = self._coming[file], self._listing.files[file]
        if coming.done():
            return coming.result()
        progress = Progress(self._console, "bytes", "downloading")
        self._console.print(f"downloading {remote.path} ({remote.size:,} bytes)")
        before = self._received
        while not coming.done():
            received = self._received - before
            progress.update(received, received / max(1, remote.size))
            time.sleep(0.05)
        return coming.result()

    def _count(self, received: int) -> None:
        if self._closed:
            raise hub.StoppedError
        self._received += received

    def _relative(self, file: hub.RemoteFile) -> str:
        """The path relative to the given folder."""
        folder = f"{self._folder}/" if self._folder else ""
        return file.path.removeprefix(folder)

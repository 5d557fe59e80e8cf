"""Datasets on the Hugging Face hub, read file by file.

A revision is fixed when a data set is first listed, and every file is checked against the size and
hash that the hub states for it. One file is downloaded while another is encoded, and removed when
its documents are in finished shards, so the disk never holds a whole data set of text.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from rekindle import storage
from rekindle.data.local import parquet_blocks
from rekindle.data.progress import Progress, Say
from rekindle.data.sources import Block, Source, SourceFile
from rekindle.errors import UserError

# Short names: repository and the folder in it.
DATASETS = {
    "fineweb-edu-10bt": ("HuggingFaceFW/fineweb-edu", "sample/10BT"),
    "fineweb-10bt": ("HuggingFaceFW/fineweb", "sample/10BT"),
}
TEXT_RATIO = 1.6  # bytes of text in a byte of Parquet, as in FineWeb; only estimates need it
ALTERNATIVE = "where there is no network: download the files elsewhere and use --parquet DIR"


T = TypeVar("T")


class StoppedError(Exception):
    """Nobody waits for this download any more."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub, as the hub describes it."""

    path: str
    size: int
    sha256: str | None  # None for small files, of which the hub states only a git hash


@dataclass(frozen=True)
class Listing:
    """The files of a repository's folder at one revision."""

    repository: str
    revision: str
    licence: str
    files: tuple[RemoteFile, ...]

    @property
    def fingerprint(self) -> str:
        lines = (f"{file.path} {file.size} {file.sha256}" for file in self.files)
        return hashlib.sha256("\n".join([self.repository, *lines]).encode()).hexdigest()


def list_files(repository: str, folder: str, suffix: str, revision: str | None) -> Listing:
    """All files below `folder` that end in `suffix`, sorted; at the newest revision if None.

    Raises `UserError` when there is no such repository, no such file, or no network.
    """
    from huggingface_hub.hf_api import HfApi, RepoFile

    api = HfApi(endpoint=_endpoint())
    what = f"the list of files of {repository}" + (f"/{folder}" if folder else "")

    def ask() -> tuple[str, str, list[RemoteFile]]:
        info = api.dataset_info(repository, revision=revision, expand=["sha", "cardData"])
        commit = str(info.sha)
        entries = api.list_repo_tree(
            repository, folder or None, recursive=True, revision=commit, repo_type="dataset"
        )
        files = [
            RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile) and entry.path.endswith(suffix)
        ]
        return commit, _licence(info.card_data), files

    commit, licence, files = _from_hub(what, repository, ask)
    if not files:
        raise UserError(
            f"{repository} on the hub has no *{suffix} file" + (f" in {folder}" if folder else "")
        )
    ordered = tuple(sorted(files, key=lambda file: file.path))
    return Listing(repository, commit, licence, ordered)


def download(
    listing: Listing, file: RemoteFile, folder: Path, count: Callable[[int], None]
) -> Path:
    """Download one file below `folder`, unless it is there, and check it.

    `count` is told of bytes as they arrive; what it raises ends the download. Raises `UserError`
    when the file does not arrive or is not what the hub said it would be.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):
        """Stands where the hub's client wants a progress bar."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            count(int(n or 0))

    def fetch() -> str:
        return hf_hub_download(
            listing.repository,
            file.path,
            repo_type="dataset",
            revision=listing.revision,
            local_dir=folder,
            endpoint=_endpoint(),
            tqdm_class=Counter,
        )

    what = f"{file.path} of {listing.repository}"
    path = Path(_from_hub(what, listing.repository, fetch))
    if path.stat().st_size != file.size or (
        file.sha256 and storage.file_sha256(path) != file.sha256
    ):
        path.unlink()
        raise UserError(
            f"{what} arrived damaged (its size or SHA-256 is not what the hub states) and was "
            "removed: run the same command again"
        )
    return path


def remove_partial(folder: Path) -> None:
    """Remove what killed downloads left: the hub's client never continues them."""
    for path in folder.rglob("*.incomplete"):
        path.unlink(missing_ok=True)


class HubSource(Source):
    """All Parquet files below a folder of a dataset, with a column `text`.

    Files named `val*` are validation; files named `test*` are left out.
    """

    def __init__(self, repository: str, folder: str = "") -> None:
        self._repository, self._folder = repository, folder.strip("/")
        self.name = f"{repository}:{self._folder}" if self._folder else repository
        self._pinned: str | None = None
        self._coming: dict[int, Future[Path]] = {}
        self._received = 0  # bytes, by all downloads
        self._closed = False

    def is_same(self, record: dict[str, Any]) -> bool:
        """A folder once begun keeps its revision, whatever is published meanwhile, so what was
        prepared is recognised without a network."""
        if record.get("name") != self.name:
            return False
        self._pinned = record["revision"]
        return True

    def open(self, folder: Path, say: Say) -> None:
        remove_partial(folder)
        self._downloads, self._say = folder, say
        listing = list_files(self._repository, self._folder, ".parquet", self._pinned)
        kept = [file for file in listing.files if not _base(file).startswith("test")]
        if not kept:
            raise UserError(f"{self.name} on the hub has no *.parquet file to train on")
        self._listing = Listing(listing.repository, listing.revision, listing.licence, tuple(kept))
        self.revision, self.licence = listing.revision, listing.licence
        splits = ["val" if _base(file).startswith("val") else "train" for file in kept]
        explicit = "val" in splits
        self.files = [
            SourceFile(file.path, file.size, split if explicit else None)
            for file, split in zip(kept, splits, strict=True)
        ]
        self._pool = ThreadPoolExecutor(1)

    @property
    def text_bytes(self) -> int:
        return int(TEXT_RATIO * sum(file.size for file in self.files))

    @property
    def fingerprint(self) -> str:
        return self._listing.fingerprint

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        for number in (file, file + 1):  # the next one comes while this one is encoded
            if number < len(self.files) and number not in self._coming:
                remote = self._listing.files[number]
                self._coming[number] = self._pool.submit(
                    download, self._listing, remote, self._downloads, self._count
                )
        yield from parquet_blocks(self._wait(file), file, skip)

    def release(self, file: int) -> None:
        for number in sorted(self._coming):  # sorted: a copy, since the reading thread adds to it
            if number < file:
                self._coming.pop(number).result().unlink(missing_ok=True)

    def close(self) -> None:
        self._closed = True
        if hasattr(self, "_pool"):
            self._pool.shutdown(cancel_futures=True)

    def _wait(self, file: int) -> Path:
        """The local copy of a file; shows how its download goes."""
        coming, remote = self._coming[file], self._listing.files[file]
        if coming.done():
            return coming.result()
        progress = Progress(self._say, "bytes")
        progress.say(f"downloading {remote.path} ({remote.size:,} bytes)")
        before = self._received
        while not coming.done():
            received = self._received - before
            progress.update(received, received / max(1, remote.size))
            time.sleep(0.05)
        return coming.result()

    def _count(self, received: int) -> None:
        if self._closed:
            raise StoppedError
        self._received += received


def _base(file: RemoteFile) -> str:
    return PurePosixPath(file.path).name


def _endpoint() -> str:
    """The hub's address; read at each call, so that a mirror can be set at any time."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _licence(card: Any) -> str:
    """The licence a dataset card states."""
    stated = getattr(card, "license", None) or "unknown"
    return stated if isinstance(stated, str) else ", ".join(map(str, stated))


def _from_hub(what: str, repository: str, ask: Callable[[], T]) -> T:
    """Call the hub's client, and say in one line what was wanted when it fails."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # one line of ours instead of one for each retry
    try:
        return ask()
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no dataset {repository} on the hub ({_endpoint()}), or it is not public: "
            "check the name owner/name, or log in with `hf auth login`"
        ) from None
    except StoppedError:
        raise
    except Exception as error:  # the client's kinds of errors change between its versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"could not get {what} from {_endpoint()} ({reason}); {ALTERNATIVE}"
        ) from None

"""Files on the Hugging Face hub: one by name, or all files of a folder at one revision.

`HF_ENDPOINT` selects another server, as it does for the `huggingface_hub` client.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rekindle import storage
from rekindle.errors import UserError

T = TypeVar("T")


def download(
    repo: str, file: str, *, instead: str, kind: str = "model", revision: str = "main"
) -> Path:
    """The local path of `file` in a repository on the hub, from the client's cache or the network.

    `kind` is model or dataset. Raises `UserError` that names the file, with `instead` as the advice
    on how to continue without network access.
    """
    from huggingface_hub import hf_hub_download

    def get() -> str:
        return hf_hub_download(repo, file, repo_type=kind, revision=revision, endpoint=_endpoint())

    return Path(_from_hub(f"{file} of {repo}", f"{kind} {repo}", instead, get))


class StoppedError(Exception):
    """Raised inside a download to cancel it."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub, with the size and hash that the hub lists."""

    path: str
    size: int
    sha256: str | None  # None for small files, for which the hub lists only a git hash


@dataclass(frozen=True)
class Listing:
    """The files of a repository's folder at one revision."""

    repository: str
    revision: str
    licence: str
    files: tuple[RemoteFile, ...]
    instead: str  # advice on how to continue without access to the hub

    @property
    def fingerprint(self) -> str:
        lines = (f"{file.path} {file.size} {file.sha256}" for file in self.files)
        return hashlib.sha256("\n".join([self.repository, *lines]).encode()).hexdigest()


def list_files(
    repository: str, folder: str, suffix: str, revision: str | None, instead: str
) -> Listing:
    """All files below `folder` that end in `suffix`, sorted. `revision` None means the newest.

    Raises `UserError` if there is no such repository, no such file, or no network access.
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

    commit, licence, files = _from_hub(what, f"dataset {repository}", instead, ask)
    if not files:
        raise UserError(
            f"{repository} on the hub has no *{suffix} file" + (f" in {folder}" if folder else "")
        )
    ordered = tuple(sorted(files, key=lambda file: file.path))
    return Listing(repository, commit, licence, ordered, instead)


def fetch(listing: Listing, file: RemoteFile, folder: Path, count: Callable[[int], None]) -> Path:
    """Download one file into `folder`, unless it exists, and check it.

    `count` is called with the number of bytes of each chunk received; an exception that it raises
    ends the download. Raises `UserError` if the download fails or the file does not match the
    hub's listing.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):
        """Counts bytes in place of the progress bar of the hub's client."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            count(int(n or 0))

    def get() -> str:
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
    path = Path(_from_hub(what, f"dataset {listing.repository}", listing.instead, get))
    if path.stat().st_size != file.size or (
        file.sha256 and storage.file_sha256(path) != file.sha256
    ):
        path.unlink()
        raise UserError(
            f"{what} was damaged in download (its size or SHA-256 differs from the hub's listing) "
            "and has been removed: run the same command again"
        )
    return path


def remove_partial(folder: Path) -> None:
    """Remove partial downloads of killed processes: the hub's client never resumes them."""
    for path in folder.rglob("*.incomplete"):
        path.unlink(missing_ok=True)


def _endpoint() -> str:
    """The hub's address, read at each call, so that a mirror can be set at any time."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _licence(card: Any) -> str:
    """The licence in a dataset card."""
    stated = getattr(card, "license", None) or "unknown"
    return stated if isinstance(stated, str) else ", ".join(map(str, stated))


def _from_hub(what: str, repository: str, instead: str, ask: Callable[[], T]) -> T:
    """Call the hub's client and turn its errors into a one-line `UserError`."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # our one line replaces a warning for each retry
    try:
        return ask()
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no {repository} on the hub ({_endpoint()}), or it is not public: "
            "check the name (owner/name), or log in with `hf auth login`"
        ) from None
    except StoppedError:
        raise
    except Exception as error:  # the client's error types differ between its versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"could not get {what} from {_endpoint()} ({reason}): {instead}") from None

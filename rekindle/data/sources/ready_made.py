"""Ready-made shards in llm.c's format, used unchanged: they are checked and get a manifest."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rekindle import hub, storage
from rekindle.data import shards
from rekindle.data.cores import usable_cores
from rekindle.data.shards import Manifest, Shard
from rekindle.data.sources.splits import LEFT_OUT, split_lines, split_of
from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError
from rekindle.observe.console import Console
from rekindle.observe.progress import Progress

DATASET = "fineweb-10bt-tokenized"
REPOSITORY = "kjj0/fineweb10B-gpt2"  # modded-nanogpt's tokens of FineWeb's 10BT sample
INSTEAD = "without network access, download the files elsewhere and use --shards DIR"
DOWNLOADS = 4  # at the same time: one connection rarely uses the full bandwidth


class ReadyMade(ABC):
    """A set of shards that is already encoded."""

    @abstractmethod
    def take(
        self, out: Path, tokenizer: Tokenizer, console: Console, lock: storage.Lock
    ) -> Manifest:
        """Make `out` a folder with these shards and a manifest. Does nothing if it already is one;
        otherwise takes `lock` before writing."""


class ShardFolder(ReadyMade):
    """A local folder of shards; the manifest is written into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: check --shards")
        self.paths = sorted(path for path in folder.glob("*.bin") if path.name[0] != ".")
        if not self.paths:
            raise UserError(f"{folder} contains no shards (*.bin): check --shards")
        self.kept = [path for path in self.paths if split_of(path.name) != "test"]

    def take(
        self, out: Path, tokenizer: Tokenizer, console: Console, lock: storage.Lock
    ) -> Manifest:
        if out.resolve() != self.folder.resolve():
            raise UserError(f"ready-made shards are used in place: give --out {self.folder}")
        if (out / shards.MANIFEST).exists():
            manifest = shards.read_manifest(out)
            shards.check_sizes(out, manifest)
            named = {shard.name for shard in manifest.shards}
            kept, every = ({path.name for path in paths} for paths in (self.kept, self.paths))
            if named not in (kept, every):  # earlier versions used all shards
                raise UserError(f"{out / shards.MANIFEST} lists other shards: remove it first")
            console.print(f"{out} is already prepared: {manifest.summary()}; nothing to do")
            return manifest
        _print_splits([path.name for path in self.paths], f"the folder {out}", console)
        lock.take()
        with ThreadPoolExecutor(usable_cores()) as pool:
            entries = list(pool.map(lambda path: _describe(path, tokenizer), self.kept))
        source = {
            "name": f"shards: {storage.printable(self.folder.resolve().name)}",
            "revision": "local",
            "licence": "unknown",
        }
        return _write_manifest(out, tokenizer, source, entries, console)


class PublishedShards(ReadyMade):
    """Shards on the hub, downloaded into the folder."""

    def __init__(self, repository: str = REPOSITORY) -> None:
        self.repository = repository

    def take(
        self, out: Path, tokenizer: Tokenizer, console: Console, lock: storage.Lock
    ) -> Manifest:
        if tokenizer.name != "gpt2":
            raise UserError(f"{self.repository} contains GPT-2 tokens: use --tokenizer gpt2")
        out.mkdir(parents=True, exist_ok=True)
        if (out / shards.MANIFEST).exists():
            manifest = shards.read_manifest(out)
            self._check_origin(out, manifest.source)
            shards.check_sizes(out, manifest)
            console.print(f"{out} is already prepared: {manifest.summary()}; nothing to do")
            return manifest
        lock.take()
        source, entries = _Fetch(self, out, tokenizer, console).run()
        manifest = _write_manifest(out, tokenizer, source, entries, console)
        storage.remove_folder(out / shards.UNFINISHED)
        return manifest

    def read_state(self, out: Path) -> dict[str, Any]:
        """The state of an earlier call: the source, and the shards that were checked."""
        path = out / shards.UNFINISHED / shards.STATE
        if not path.exists():
            return {"source": {}, "shards": []}
        state = storage.read_json(path, {"source": dict, "shards": [shards.SHARD]})
        self._check_origin(out, state["source"])
        return state

    def _check_origin(self, out: Path, record: dict[str, Any]) -> None:
        if record.get("name") != self.repository:
            raise UserError(
                f"{out} was prepared from {record.get('name')!r}, not {self.repository!r}: "
                "choose another --out, or remove it"
            )


class _Fetch:
    """The downloads of one call. Each shard is checked before it is moved into the folder."""

    def __init__(
        self, published: PublishedShards, out: Path, tokenizer: Tokenizer, console: Console
    ) -> None:
        self.out, self.tokenizer = out, tokenizer
        self.folder = out / shards.UNFINISHED
        state = published.read_state(out)
        listing = hub.list_files(
            published.repository, "", ".bin", state["source"].get("revision"), instead=INSTEAD
        )
        self.folder.mkdir(exist_ok=True)
        storage.remove_unfinished(self.folder)
        hub.remove_partial(self.folder)
        self.listing = listing
        files = [file for file in listing.files if "/" not in file.path]
        _print_splits([file.path for file in files], listing.repository, console)
        self.files = [file for file in files if split_of(file.path) != "test"]
        self.entries = {entry["name"]: Shard(**entry) for entry in state["shards"]}
        self.source = {
            "name": published.repository,
            "revision": listing.revision,
            "licence": listing.licence,
            "fingerprint": listing.fingerprint,
        }
        self.console, self.progress = console, Progress(console, "bytes")
        self.total = max(1, sum(file.size for file in self.files))
        self.received = self.before = 0
        self.cancelled = False

    def run(self) -> tuple[dict[str, Any], list[Shard]]:
        missing = [file for file in self.files if not self._is_done(file)]
        self.before = self.total - sum(file.size for file in missing)
        self.progress.update(0, self.before / self.total)
        pool = ThreadPoolExecutor(DOWNLOADS)
        try:
            for shard in pool.map(self._fetch, missing):
                self.entries[shard.name] = shard
                finished = [asdict(entry) for entry in self.entries.values()]
                state = {"source": self.source, "shards": finished}
                storage.write_json(self.folder / shards.STATE, state)
                self.console.print(f"{shard.name}: {shard.tokens:,} tokens")
        finally:
            self.cancelled = True  # matters only if a download failed: it stops the others
            pool.shutdown(cancel_futures=True)
        return self.source, [self.entries[file.path] for file in self.files]

    def _is_done(self, file: hub.RemoteFile) -> bool:
        path = self.out / file.path
        return file.path in self.entries and path.exists() and path.stat().st_size == file.size

    def _fetch(self, file: hub.RemoteFile) -> Shard:
        target = self.out / file.path
        if target.exists() and file.sha256 and storage.file_sha256(target) == file.sha256:
            return _describe(target, self.tokenizer)
        path = hub.fetch(self.listing, file, self.folder / "downloads", self._count)
        shard = _describe(path, self.tokenizer)
        storage.move_file(path, target)
        return shard

    def _count(self, received: int) -> None:
        if self.cancelled:
            raise hub.StoppedError
        self.received += received
        self.progress.update(self.received, (self.before + self.received) / self.total)


def _print_splits(names: Sequence[str], where: str, console: Console) -> None:
    """Print which shards belong to which split. Raises `UserError` if none is for training."""
    splits = {name: split_of(name) or "train" for name in names}
    left_out = [(name, LEFT_OUT) for name in names if splits[name] == "test"]
    kept = [(name, splits[name]) for name in names if splits[name] != "test"]
    lines = split_lines(kept, left_out)
    if "train" not in splits.values():
        raise UserError(f"{where} has nothing to train on: {'; '.join(lines)}")
    for line in lines:
        console.print(line)


def _describe(path: Path, tokenizer: Tokenizer) -> Shard:
    split = split_of(path.name) or "train"
    return shards.describe_shard(path, split, tokenizer.end_of_text, tokenizer.vocab_size)


def _write_manifest(
    out: Path,
    tokenizer: Tokenizer,
    source: dict[str, Any],
    entries: Sequence[Shard],
    console: Console,
) -> Manifest:
    ordered = tuple(sorted(entries, key=lambda shard: (shard.split, shard.name)))
    manifest = Manifest(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, source, ordered)
    manifest.write(out)
    console.print(f"{out}: {manifest.summary()}")
    return manifest

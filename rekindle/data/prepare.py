"""Source → shards, on every core, in bounded memory, resumable.

Blocks of documents are encoded on a pool of threads (the encoder releases the interpreter lock),
returned in order, and collected into shards by the layout (`rekindle.data.layout`). The position in
the source is saved with each finished shard: after a kill, the next call resumes from the last
finished shard and produces the same bytes.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rekindle import storage
from rekindle.data import shards
from rekindle.data.earlier import (
    compare_vocabulary,
    finished,
    pieces_of,
    remove_others,
    saved_state,
    without_changed_files,
)
from rekindle.data.encoding import encoded_blocks
from rekindle.data.layout import LAYOUTS, Pending
from rekindle.data.samples import Samples
from rekindle.data.shards import Manifest, Shard
from rekindle.data.sources.base import Source
from rekindle.data.sources.ready_made import ReadyMade
from rekindle.data.sources.splits import split_lines
from rekindle.data.tokenizer import Tokenizer, get_tokenizer
from rekindle.errors import UserError
from rekindle.observe.console import Console
from rekindle.observe.progress import Progress

VAL_TOKENS = 10_485_760  # validation loss covers 20 batches of 524,288 tokens, as in the lecture
SHARD_TOKENS = 100_000_000  # as in the lecture and in llm.c
LARGEST_SHARD = 1_000_000_000  # the header's count is an int32; the last document may exceed this


def prepare(
    source: Source | ReadyMade,
    out: Path,
    tokenizer: str | Tokenizer = "gpt2",
    val_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    console: Console | None = None,
    layout: str = "documents",
) -> Manifest:
    """Write the documents of `source` as shards into the folder `out`; return its manifest.

    `tokenizer` is a tokenizer or a name in `TOKENIZERS`.

    Does nothing if `out` is already complete, and resumes if an earlier call was stopped. About
    `val_tokens` tokens (None: `VAL_TOKENS`) become validation, unless the names of the source's
    files determine the split or the layout is `lecture`, whose first shard is validation. Raises
    `UserError`, and writes no manifest, if the source or the folder cannot be used.
    """
    if isinstance(tokenizer, str):
        tokenizer = get_tokenizer(tokenizer)
    console = console or Console()
    settings = _settings(tokenizer.name, layout, val_tokens, shard_tokens)
    if isinstance(source, ReadyMade) and layout != "documents":
        raise UserError(f"ready-made shards are used unchanged: remove --layout {layout}")
    out = Path(out)
    if (out / "run.json").exists():
        raise UserError(f"{out} is a run folder: choose another --out for the shards")
    new = not out.exists()
    try:
        with storage.Lock(out) as lock:
            try:
                if isinstance(source, ReadyMade):
                    return source.take(out, tokenizer, console, lock)
                return _prepare(source, out, tokenizer, settings, console, lock)
            except UserError:
                if new:
                    _remove_if_empty(out, lock)
                raise
    except MemoryError:
        raise UserError(
            f"out of memory while preparing {out}: close other programs or use fewer cores "
            "(such as `taskset -c 0,1 rekindle ...`), then run the same command again to resume"
        ) from None
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; fix this and run the same "
            "command again: it resumes where it stopped"
        ) from None


def _remove_if_empty(out: Path, lock: storage.Lock) -> None:
    """Remove a folder that this call created, if it made no shard."""
    folder = out / shards.UNFINISHED
    if lock.held and {path.name for path in out.iterdir()} <= {storage.LOCK, folder.name}:
        if (folder / shards.STATE).exists():
            return
        storage.remove_folder(folder)
        lock.remove_file()
        out.rmdir()


def _settings(
    tokenizer: str, layout: str, val_tokens: int | None, shard_tokens: int
) -> dict[str, Any]:
    """The settings that determine the shards for a given source, as recorded in the manifest."""
    if layout not in LAYOUTS:
        raise UserError(f"--layout must be {' or '.join(LAYOUTS)}, not {layout!r}")
    if (val_tokens or 0) < 0 or not 1 <= shard_tokens <= LARGEST_SHARD:
        raise UserError(
            f"--val-tokens {val_tokens} --shard-tokens {shard_tokens}: the first must not be "
            f"negative, the second must be between 1 and {LARGEST_SHARD}"
        )
    settings = {"layout": layout, "tokenizer": tokenizer, "shard_tokens": shard_tokens}
    if layout != "lecture":
        return settings | {"val_tokens": VAL_TOKENS if val_tokens is None else val_tokens}
    if val_tokens is not None:
        raise UserError(
            f"--val-tokens {val_tokens} cannot be combined with --layout lecture, whose first "
            "shard is validation: remove it"
        )
    return settings


def _prepare(
    source: Source,
    out: Path,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    console: Console,
    lock: storage.Lock,
) -> Manifest:
    if manifest := finished(source, out, settings, lock):
        compare_vocabulary(out, manifest.tokenizer_sha256, tokenizer)
        console.print(f"{out} is already prepared: {manifest.summary()}; nothing to do")
        return manifest
    lock.take(create=False)
    state = saved_state(source, out, settings)
    if state:
        compare_vocabulary(out, state.get("tokenizer_sha256", tokenizer.sha256), tokenizer)
    folder = out / shards.UNFINISHED
    folder.mkdir(parents=True, exist_ok=True)
    lock.take()
    storage.remove_unfinished(out)
    storage.remove_unfinished(folder)
    try:
        source.open(folder / "downloads", console)
        preparation = _Preparation(source, out, tokenizer, settings, console)
        if state:
            preparation.restore(_resumable(state, source, out, console))
        _print_splits(source, preparation.layout.undecided, console)
        return preparation.run()
    finally:
        source.close()


def _resumable(state: Any, source: Source, out: Path, console: Console) -> dict[str, Any]:
    """The state to resume from, without the shards of files that have changed."""
    state, change = without_changed_files(state, source)
    if change:
        console.print(change)
        storage.write_json(out / shards.UNFINISHED / shards.STATE, state)
    remove_others(out, state)
    console.print(f"resuming in {out} after {len(state['shards'])} finished shards")
    return state


def _print_splits(source: Source, undecided: str, console: Console) -> None:
    """Print which files belong to which split. Raises `UserError` if none is for training."""
    files = [(file.name, file.split) for file in source.files]
    lines = split_lines(files, source.left_out, undecided)
    if all(file.split == "val" for file in source.files):
        raise UserError(f"{source.name} has nothing to train on: {'; '.join(lines)}")
    for line in lines:
        console.print(line)


class _Preparation:
    """The work of one call. This thread reads the documents and assigns them to shards, a pool
    encodes them, and another thread writes, so that encoding does not wait for the disk."""

    def __init__(
        self,
        source: Source,
        out: Path,
        tokenizer: Tokenizer,
        settings: dict[str, Any],
        console: Console,
    ) -> None:
        self.source, self.out, self.folder = source, out, out / shards.UNFINISHED
        self.tokenizer = tokenizer
        self.record = source.record() | {"settings": settings}
        self.layout = LAYOUTS[settings["layout"]](source, tokenizer, settings)
        self.sizes = np.cumsum([0, *(file.size for file in source.files)])
        self.shards: list[Shard] = []
        self.history: list[dict[str, Any]] = []  # the last position in each file, to resume from
        self.tokens = 0  # encoded by this call
        self.console, self.progress = console, Progress(console, "tokens", "preparing")
        self.disk = ThreadPoolExecutor(1)
        self.writing: Future[Shard] | None = None

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the state that `_commit` wrote."""
        self.shards = [Shard(**entry) for entry in state["shards"]]
        self.history = state.get("history", [])
        self.layout.fraction = state.get("fraction", self.layout.fraction)
        self.layout.restore(state, self.folder)

    def run(self) -> Manifest:
        self._show(0.0)
        try:
            for encoded in encoded_blocks(
                self.source, self.tokenizer, self.layout.cursor, self.layout.fraction
            ):
                for split in self.layout.add(encoded):
                    self._commit(split)
                self.tokens += len(encoded.tokens)
                self._show(encoded.block.done)
            return self._finish()
        finally:
            self.disk.shutdown()

    def _show(self, done: float) -> None:
        file = self.layout.cursor[0]
        before, after = self.sizes[file], self.sizes[file + 1]
        part = before + done * (after - before)
        self.progress.update(self.tokens, float(part / max(1, self.sizes[-1])))

    def _commit(self, split: str) -> None:
        """Have the writing thread write all pending tokens of `split` as a shard."""
        self._written()
        full = self.layout.take(split)
        other = "val" if split == "train" else "train"
        rest = self.layout.pending[other]
        pieces, rest.unsaved = rest.pieces[rest.unsaved :], len(rest.pieces)
        samples, rest.samples = rest.samples, Samples(self.tokenizer)
        name = f"{other}-{len(self.shards):06d}.bin"  # unique: each commit adds a shard
        saved = [*rest.saved, name] if pieces else rest.saved
        file = self.layout.cursor[0]
        position = {
            "cursor": list(self.layout.cursor),
            "offset": self.layout.offset,
            "pending": {other: {"documents": rest.documents, "pieces": saved}},
        }
        if self.history and self.history[-1]["cursor"][0] == file:
            self.history.pop()
        self.history.append(position | {"finished": len(self.shards) + 1})
        state = position | {
            "tokenizer_sha256": self.tokenizer.sha256,
            "fraction": self.layout.fraction,
            "history": list(self.history),
        }
        rest.saved = saved

        def write() -> Shard:
            shard = self._write_shard(split, full)
            if pieces:
                samples.check(str(self.folder / name))
                shards.write_shard(self.folder / name, pieces)
            entries = [asdict(entry) for entry in self.shards]
            complete = state | {"source": self._record(file + 1), "shards": entries}
            storage.write_json(self.folder / shards.STATE, complete)
            # From now on a resume starts after this shard or another position in the history.
            # Pieces that only earlier positions needed can be removed.
            for path in set(self.folder.glob("*.bin")):
                if path.name not in pieces_of(complete):
                    path.unlink()
            self.source.release(file)
            return shard

        self.writing = self.disk.submit(write)

    def _record(self, count: int) -> dict[str, Any]:
        """The record of the source after its first `count` files were read."""
        files = self.source.identities(count)
        return self.record if files is None else self.record | {"files": files}

    def _written(self) -> None:
        """Wait for the shard being written, if any, and raise its error if it failed."""
        if self.writing:
            shard, self.writing = self.writing.result(), None
            self.console.print(f"{shard.name}: {shard.tokens:,} tokens")

    def _write_shard(self, split: str, pending: Pending) -> Shard:
        number = sum(shard.split == split for shard in self.shards)
        name = f"{split}_{number:06d}.bin"
        pending.samples.check(name)
        shard = shards.write_shard(self.out / name, pending.pieces, split, pending.documents)
        self.shards.append(shard)
        return shard

    def _finish(self) -> Manifest:
        """Write the remaining tokens, then the manifest, which marks the set as complete."""
        self._written()
        for split, pending in self.layout.leftover(len(self.shards)).items():
            if pending.pieces:
                self._write_shard(split, pending)
        if not self.shards:
            names = ", ".join(file.name for file in self.source.files[:3])
            raise UserError(f"{names} contains no documents: nothing was prepared")
        if all(shard.split == "val" for shard in self.shards):
            raise UserError(
                f"{self.source.name} has nothing to train on: all its documents are validation"
            )
        manifest = Manifest(
            self.tokenizer.name,
            self.tokenizer.sha256,
            self.tokenizer.vocab_size,
            self._record(len(self.source.files)),
            tuple(sorted(self.shards, key=lambda shard: (shard.split, shard.name))),
        )
        manifest.write(self.out)
        storage.remove_folder(self.folder)
        self.console.print(f"{self.out}: {manifest.summary()} ({self.progress.summary()})")
        if self.layout.fraction and not manifest.tokens("val"):
            self.console.print("no documents for validation: there will be no validation loss")
        return manifest

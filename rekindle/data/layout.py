"""Which tokens go into which shard.

`documents`: a hash of each document's text assigns it to training or validation. A shard ends with
the document that fills it; only a document that fills a shard on its own is cut.

`lecture`: the shards that the lecture's script writes for the same text (fineweb.py of
karpathy/build-nanogpt). One stream of tokens in the source's order is cut every `shard_tokens`
tokens, even inside a document. The first shard is validation, all others are training.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.data import shards
from rekindle.data.encoding import Encoded
from rekindle.data.samples import Samples
from rekindle.data.sources.base import Part, Source
from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError

TOLERANCE = 1.5  # validation may be this many times smaller or larger than asked for
VAL_MARGIN = 1.15  # the amount of text is an estimate; the margin avoids too little validation
LONG_TOKENS = 100_000_000  # a document is cut when it fills a shard of this size or a larger one
MOST_VALIDATION = 0.1  # of all documents, so that most of a small source is left for training
SPLITS = ("train", "val")


class Pending:
    """Tokens of one split that are not yet in a shard."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pieces: list[np.ndarray] = []
        self.tokens = self.documents = 0
        self.saved: list[str] = []  # files with pieces, needed to resume after a kill
        self.unsaved = 0  # index of the first piece that is in none of these files
        self.samples, self.end_of_text = Samples(tokenizer), tokenizer.end_of_text

    def append(self, tokens: np.ndarray, documents: int) -> None:
        self.pieces.append(tokens)
        self.tokens += len(tokens)
        self.documents += documents

    def move_tail(self, tokens: int, to: "Pending") -> None:
        """Move about the last `tokens` tokens to another split: whole documents if that comes close
        enough, or else the end of a long one, which then counts for the split it starts in."""
        every = np.concatenate(self.pieces)
        cut = len(every) - tokens
        starts = np.flatnonzero(every == self.end_of_text)
        nearest = int(starts[np.argmin(abs(starts - cut))]) if len(starts) else 0
        if len(every) - nearest < TOLERANCE * tokens and tokens < TOLERANCE * (
            len(every) - nearest
        ):
            cut = nearest
        moved = int(np.count_nonzero(starts >= cut))
        self.pieces, self.tokens = [every[:cut]], cut
        self.documents -= moved
        to.append(every[cut:], moved)


class Layout(ABC):
    """The tokens that are not yet in a shard, and the position in the source after them."""

    fraction = 0.0  # of all documents: the share assigned to validation by hash
    undecided = "training"  # the use of files whose names do not determine a split

    def __init__(self, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.shard_tokens: int = settings["shard_tokens"]
        self.cursor = (0, 0)  # file, and how many of its documents are done
        self.offset = 0  # tokens of the document at the cursor that are done
        self.position = 0  # tokens of that document read by this call
        self.pending = {split: Pending(tokenizer) for split in SPLITS}
        self.full: dict[str, int] = dict.fromkeys(SPLITS, 0)  # tokens in finished shards

    @abstractmethod
    def add(self, encoded: Encoded) -> Iterator[str]:
        """Add a block. Yields a split each time its pending tokens fill a shard; the caller must
        call `take` before it resumes the iteration."""

    def _part(self, encoded: Encoded, part: Part) -> np.ndarray:
        """The tokens of a part of a document that are not yet done."""
        tokens = encoded.tokens if part.begins else encoded.tokens[1:]
        start = 0 if part.begins else self.position
        self.position = start + len(tokens)
        return tokens[max(0, self.offset - start) :]

    def _done(self, encoded: Encoded, count: int, end: bool) -> None:
        """Record that `count` more tokens of the document at the cursor are done; with `end`, the
        whole document is done."""
        self.cursor = (encoded.block.file, encoded.block.first + end)
        self.offset = 0 if end else self.offset + count

    def take(self, split: str) -> Pending:
        """Remove and return the pending tokens of a split."""
        full, self.pending[split] = self.pending[split], Pending(self.tokenizer)
        self.full[split] += full.tokens
        return full

    def leftover(self, made: int) -> dict[str, Pending]:
        """The last, partial shard of each split, once the source has ended after `made` shards."""
        return self.pending

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Resume from the state of an earlier call and the pieces it saved in `folder`."""
        self.cursor, self.offset = tuple(state["cursor"]), state.get("offset", 0)
        for entry in state["shards"]:
            self.full[entry["split"]] += entry["tokens"]
        for split, entry in state["pending"].items():
            pending = self.pending[split]
            pending.saved = entry["pieces"]
            for name in pending.saved:
                # A copy, because the file is removed before its tokens are in a shard.
                pending.append(np.array(shards.open_shard(folder / name)), 0)
            pending.documents, pending.unsaved = entry["documents"], len(pending.pieces)


class Documents(Layout):
    """Whole documents, each in the split given by its hash or by its file's name."""

    def __init__(self, source: Source, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
        super().__init__(tokenizer, settings)
        self.val_tokens: int = settings["val_tokens"]
        self.fraction = _validation_fraction(source, tokenizer, self.val_tokens)
        if self.fraction:
            self.undecided = "training, and validation by a hash of each document"
        self.cut = 0  # tokens of the document at the cursor that are in earlier shards

    def add(self, encoded: Encoded) -> Iterator[str]:
        if part := encoded.block.part:
            yield from self._add_part(encoded, part)
            return
        documents, start = len(encoded.validation), 0
        while start < documents:
            end = min(self._filled_by(split, encoded, start) for split in SPLITS)
            for split in SPLITS:
                self._append(split, encoded, start, end)
            self.cursor = (encoded.block.file, encoded.block.first + end)
            for split in SPLITS:
                if self.pending[split].tokens >= self.shard_tokens:
                    yield split
            start = end

    def _add_part(self, encoded: Encoded, part: Part) -> Iterator[str]:
        split = "val" if encoded.validation[0] else "train"
        tokens, pending = self._part(encoded, part), self.pending[split]
        if len(tokens):
            pending.append(tokens, int(self.offset == 0))
            pending.samples.offer(encoded.block.texts, np.arange(1), encoded.tokens, encoded.starts)
        self._done(encoded, len(tokens), part.ends)
        if part.ends:
            self.cut = 0
            if pending.tokens >= self.shard_tokens:
                yield split
        elif self.offset - self.cut >= max(self.shard_tokens, LONG_TOKENS):
            self.cut = self.offset
            yield split

    def _filled_by(self, split: str, encoded: Encoded, start: int) -> int:
        """One past the document that fills a shard of `split`, or past the last of the block."""
        chosen = encoded.validation[start:] == (split == "val")
        lengths = np.diff(encoded.starts[start:]) * chosen
        full = self.pending[split].tokens + np.cumsum(lengths) >= self.shard_tokens
        return start + int(np.argmax(full)) + 1 if full.any() else len(encoded.validation)

    def _append(self, split: str, encoded: Encoded, start: int, end: int) -> None:
        """Add the documents from `start` to `end` of a block that belong to `split`."""
        chosen = encoded.validation[start:end] == (split == "val")
        if not chosen.any():
            return
        pending, starts = self.pending[split], encoded.starts
        tokens = encoded.tokens[starts[start] : starts[end]]
        if not chosen.all():
            tokens = tokens[np.repeat(chosen, np.diff(starts[start : end + 1]))]
        numbers = start + np.flatnonzero(chosen)
        pending.append(tokens, len(numbers))
        pending.samples.offer(encoded.block.texts, numbers, encoded.tokens, starts)

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        super().restore(state, folder)
        self.cut = self.offset

    def leftover(self, made: int) -> dict[str, Pending]:
        """The last, partial shard of each split. Where the hash chose far fewer or far more
        validation tokens than asked for, as it may with few, long documents, text is moved."""
        train, val = self.pending["train"], self.pending["val"]
        if not self.fraction or self.full["val"]:
            return self.pending
        if not made and not train.pieces:
            train, val = val, train  # all documents of a tiny source hashed to validation
        total = self.full["train"] + train.tokens + val.tokens
        asked = min(self.val_tokens, int(MOST_VALIDATION * total))
        if val.tokens < asked / TOLERANCE:
            missing = min(asked - val.tokens, train.tokens)
            if missing:
                train.move_tail(missing, val)
        elif val.tokens > asked * TOLERANCE:
            val.move_tail(val.tokens - asked, train)
        return {"train": train, "val": val}


class Lecture(Layout):
    """One stream, cut at exactly `shard_tokens`. A document counts for the shard it starts in.

    The rest of a cut document is not saved: a resumed call encodes the document again and skips
    the tokens that are done.
    """

    undecided = "validation in the first shard, then training"

    def __init__(self, source: Source, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
        super().__init__(tokenizer, settings)
        self.split = "val"  # the split of the shard being filled
        if named := [file.name for file in source.files if file.split == "val"]:
            raise UserError(
                f"{source.name} has its own validation files ({named[0]}), which --layout lecture "
                "would train on: remove them from the source, or use --layout documents"
            )

    def add(self, encoded: Encoded) -> Iterator[str]:
        if part := encoded.block.part:
            yield from self._add_part(encoded, part)
            return
        start, starts = self.offset, encoded.starts
        while start < len(encoded.tokens):
            room = self.shard_tokens - self.pending[self.split].tokens
            end = min(start + room, len(encoded.tokens))
            self._append(encoded, start, end)
            document = int(np.searchsorted(starts, end, side="right")) - 1  # the one at `end`
            self.cursor = (encoded.block.file, encoded.block.first + document)
            self.offset = end - int(starts[document])
            if end - start == room:
                yield self.split
                self.split = "train"
            start = end

    def _add_part(self, encoded: Encoded, part: Part) -> Iterator[str]:
        tokens = self._part(encoded, part)
        texts, starts = encoded.block.texts, encoded.starts
        if not len(tokens):
            self._done(encoded, 0, part.ends)
        while len(tokens):
            pending = self.pending[self.split]
            now, tokens = np.split(tokens, [self.shard_tokens - pending.tokens])
            pending.append(now, int(self.offset == 0))
            pending.samples.offer(texts, np.arange(1), encoded.tokens, starts)
            self._done(encoded, len(now), part.ends and not len(tokens))
            if pending.tokens == self.shard_tokens:
                yield self.split
                self.split = "train"

    def _append(self, encoded: Encoded, start: int, end: int) -> None:
        """Add the tokens from `start` to `end` of a block."""
        # The documents that start in this range.
        numbers = np.arange(*np.searchsorted(encoded.starts[:-1], [start, end]))
        pending = self.pending[self.split]
        pending.append(encoded.tokens[start:end], len(numbers))
        pending.samples.offer(encoded.block.texts, numbers, encoded.tokens, encoded.starts)

    def leftover(self, made: int) -> dict[str, Pending]:
        if not self.pending["train"].pieces and made + bool(self.pending["val"].pieces) == 1:
            raise UserError(
                f"all the text fits in the first shard of {self.shard_tokens:,} tokens, which "
                "--layout lecture reserves for validation: lower --shard-tokens"
            )
        return self.pending

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        super().restore(state, folder)
        if state["shards"]:
            self.split = "train"


LAYOUTS = {"documents": Documents, "lecture": Lecture}


def _validation_fraction(source: Source, tokenizer: Tokenizer, val_tokens: int) -> float:
    """The share of documents that gives about `val_tokens` validation tokens, or a little more."""
    if any(file.split for file in source.files):
        return 0.0
    tokens = source.text_bytes / tokenizer.bytes_per_token
    return min(MOST_VALIDATION, VAL_MARGIN * val_tokens / max(1.0, tokens))

"""A batch is a pure function of (data, seed, step).

The tokens are cut into windows of T + 1 at stride T, so each target is predicted once. An epoch is
a permutation of all windows. The permutation is computed per position, without a list in memory:
resuming needs only the step, and changing the number of ranks only changes which rank reads which
rows.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rekindle.data.shards import check_ids
from rekindle.errors import UserError

ROUNDS = 6  # of the Feistel network; even, so that both halves end at their original widths
IGNORED = -100  # a target that is not scored (PyTorch's default `ignore_index`)


def permute(index: np.ndarray, size: int, key: bytes) -> np.ndarray:
    """Apply the permutation of range(`size`) selected by `key` to each `index` < `size`.

    A Feistel network permutes the next power of two. Results outside range(`size`) are permuted
    again until they fall inside (cycle walking).
    """
    bits = max(2, (size - 1).bit_length())
    digest = hashlib.blake2b(key, digest_size=8 * ROUNDS).digest()
    round_keys = np.frombuffer(digest, "<u8")
    out = np.array(index, np.uint64)
    outside = np.ones(len(out), bool)
    while outside.any():
        out[outside] = _feistel(out[outside], bits, round_keys)
        outside = out >= size
    return out.astype(np.int64)


def _feistel(value: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass over numbers of `bits` bits: each round mixes one half into the other."""
    low_bits = bits // 2
    for round_key in round_keys:
        high_bits = bits - low_bits
        low, high = value & _mask(low_bits), value >> np.uint64(low_bits)
        mixed = high ^ (_scramble(low ^ round_key) & _mask(high_bits))
        value = low << np.uint64(high_bits) | mixed  # the halves swap positions and widths
        low_bits = high_bits
    return value


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _scramble(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): every bit depends on every other."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Windows:
    """All windows of T + 1 tokens at stride T in a list of shards, numbered from 0.

    Windows never cross shards. Only a multiple of `unit` tokens of each shard is used, and the
    remainder at its end is dropped. `unit` is a multiple of T; the default is T.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        T: int,
        vocab_size: int = 2**16,
        unit: int | None = None,
    ) -> None:
        self.shards, self.T, self.vocab_size = shards, T, vocab_size
        self.unit = unit or T
        counts = [max(0, len(shard) - 1) // self.unit * (self.unit // T) for shard in shards]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """The windows with these numbers: (n, T + 1) uint16.

        Raises `UserError`, with the file and position, if an id is outside the vocabulary.
        """
        out = np.empty((len(numbers), self.T + 1), np.uint16)
        for row, number in enumerate(numbers):
            shard, start = self._locate(int(number))
            out[row] = self.shards[shard][start : start + self.T + 1]
        if out.size and out.max() >= self.vocab_size:
            row = int(np.argmax(out.max(1) >= self.vocab_size))
            shard, start = self._locate(int(numbers[row]))
            _check_ids(out[row], self.shards[shard], start, self.vocab_size)
        return out

    def _locate(self, number: int) -> tuple[int, int]:
        """The shard of a window and the position of its first token there."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, (number - (int(self._ends[shard - 1]) if shard else 0)) * self.T


def _check_ids(tokens: np.ndarray, shard: np.ndarray, start: int, vocab_size: int) -> None:
    """Check `tokens`, read from `shard` at `start`. The run has checked the whole file before, so
    an error here means that the file changed since."""
    note = ", but passed the check when the run started"
    check_ids(tokens, vocab_size, getattr(shard, "filename", "a shard"), start, note)


@dataclass(frozen=True)
class Partition:
    """How one global batch is divided: each rank accumulates gradients over `accumulation`
    micro-batches of `micro_batch` rows."""

    micro_batch: int
    accumulation: int
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of(cls, rows: int, micro_batch: int, rank: int = 0, ranks: int = 1) -> "Partition":
        """Divide `rows` rows. Raises `UserError` if they do not divide evenly."""
        if micro_batch < 1 or rows % (micro_batch * ranks):
            raise UserError(
                f"a batch of {rows} rows does not divide into micro-batches of {micro_batch} rows "
                f"on {ranks} ranks: change --micro-batch, --batch.tokens or the number of ranks"
            )
        return cls(micro_batch, rows // (micro_batch * ranks), rank, ranks)


class Batches:
    """The training batches of a run. Stateless: `batch(step, partition)` depends only on its
    arguments."""

    def __init__(self, windows: Windows, rows: int, seed: int, order: str) -> None:
        """`order` is "shuffled", "sequential" or "lecture"; the last two use the windows in the
        order of their numbers. Raises `UserError` if the data is smaller than one step."""
        if len(windows) < rows:
            lecture = order == "lecture"
            pieces = "micro-batches" if lecture else "windows"
            flags = "--batch.tokens" + " or --batch.lecture-micro-tokens" * lecture
            raise UserError(
                f"one step needs {rows * windows.T:,} tokens, but the training split has "
                f"{len(windows) * windows.T:,} in whole {pieces} of {windows.unit}: prepare more "
                f"data or lower {flags}"
            )
        self.windows, self.rows, self.seed, self.order = windows, rows, seed, order

    def numbers(self, step: int) -> np.ndarray:
        """The window numbers of the global batch of `step`, in order: (rows,) int64."""
        position = step * self.rows + np.arange(self.rows)
        if self.order != "shuffled":
            return position % len(self.windows)
        epoch, index = np.divmod(position, len(self.windows))
        numbers = np.empty_like(index)
        for e in np.unique(epoch):  # a batch may start in one epoch and end in the next
            key = f"{self.seed} {e}".encode()
            numbers[epoch == e] = permute(index[epoch == e], len(self.windows), key)
        return numbers

    def batch(self, step: int, partition: Partition) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one rank at one step: two (accumulation, micro_batch, T)
        int64.

        Micro-batch m of rank r starts at row (m·ranks + r)·micro_batch of the global batch, as in
        the lecture's loader.
        """
        p = partition
        numbers = self.numbers(step).reshape(p.accumulation, p.ranks, p.micro_batch)
        tokens = self.windows.read(numbers[:, p.rank].ravel()).astype(np.int64)
        tokens = tokens.reshape(p.accumulation, p.micro_batch, self.windows.T + 1)
        return tokens[..., :-1], tokens[..., 1:]


def validation_batches(
    shards: Sequence[np.ndarray], T: int, limit: int, rows: int, rank: int = 0, ranks: int = 1,
    vocab_size: int = 2**16,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Yield the first `limit` targets of a split, each exactly once, in batches of shape (rows, T).

    Which targets are scored, and with which context, depends only on `T`. Padding in the last
    window or batch has the target -100. All ranks get the same number of batches.

    Raises `UserError`, with the file and position, if an id is outside the vocabulary.
    """
    spans: list[tuple[int, int, int]] = []  # shard, first input, inputs
    for number, shard in enumerate(shards):
        for start in range(0, len(shard) - 1, T):
            size = min(T, len(shard) - 1 - start, limit)
            limit -= size
            if size:
                spans.append((number, start, size))
    for first in range(0, len(spans), rows * ranks):
        x = np.zeros((rows, T), np.int64)
        y = np.full((rows, T), IGNORED, np.int64)
        mine = spans[first + rank * rows : first + (rank + 1) * rows]
        for row, (number, start, size) in enumerate(mine):
            tokens = shards[number][start : start + size + 1]
            _check_ids(tokens, shards[number], start, vocab_size)
            x[row, :size], y[row, :size] = tokens[:-1], tokens[1:]
        yield x, y


class Prefetcher:
    """Prepares the batches of the next steps in a thread and copies them to the device.

    `waited` is the total time that `next` has waited for data, in seconds.
    """

    def __init__(
        self, make: Callable[[int], tuple[np.ndarray, np.ndarray]], first: int, last: int,
        device: torch.device, depth: int = 2,
    ) -> None:  # fmt: skip
        self._make, self._device = make, device
        self._ready: queue.Queue[tuple[Tensor, Tensor] | Exception] = queue.Queue(depth)
        self._stop = threading.Event()
        self.waited = 0.0
        self._thread = threading.Thread(target=self._work, args=(first, last), daemon=True)
        self._thread.start()

    def _work(self, first: int, last: int) -> None:
        try:
            if self._device.type == "cuda":  # a new thread starts on the first GPU
                torch.cuda.set_device(self._device)
            for step in range(first, last):
                x, y = (torch.from_numpy(np.ascontiguousarray(a)) for a in self._make(step))
                if self._device.type == "cuda":  # copies are asynchronous only from pinned memory
                    x, y = x.pin_memory(), y.pin_memory()
                if not self._put((x, y)):
                    return
        except Exception as error:  # `next` raises it in the training thread
            self._put(error)

    def _put(self, item: tuple[Tensor, Tensor] | Exception) -> bool:
        """Queue an item; False if the prefetcher was closed."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step on the device: (accumulation, micro_batch, T)."""
        began = time.perf_counter()
        item = self._ready.get()
        self.waited += time.perf_counter() - began
        if isinstance(item, Exception):
            raise item
        x, y = item
        return x.to(self._device, non_blocking=True), y.to(self._device, non_blocking=True)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

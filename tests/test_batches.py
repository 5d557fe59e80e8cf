"""A batch is a pure function of (data, seed, step), with every window once per epoch."""

import queue
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rekindle.data import batches
from rekindle.data.batches import (
    IGNORED,
    Batches,
    Partition,
    Prefetcher,
    Windows,
    permute,
    validation_batches,
)
from rekindle.errors import UserError

CPU = torch.device("cpu")
T = 4


def numbered_shards(*sizes: int) -> list[np.ndarray]:
    """Shards in which all tokens are different, so that a token identifies its position."""
    ends = np.cumsum(sizes)
    pairs = zip(sizes, ends, strict=True)
    return [np.arange(end - size, end, dtype=np.uint16) for size, end in pairs]


def make_batches(rows: int = 8, order: str = "shuffled", seed: int = 1, T: int = T) -> Batches:
    """Batches over 37 windows in three shards, each with leftover tokens. The first shard has
    18 x T tokens, one too few for an 18th window."""
    return Batches(Windows(numbered_shards(72, 51, 34), T), rows, seed, order)


# -- the permutation ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 12))
def test_feistel_network_is_a_permutation(bits: int) -> None:
    """This test comes first: cycle walking might never end otherwise."""
    keys = np.random.default_rng(bits).integers(0, 2**64, batches.ROUNDS, np.uint64)
    out = batches._feistel(np.arange(2**bits, dtype=np.uint64), bits, keys)
    assert np.array_equal(np.sort(out), np.arange(2**bits))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 100, 1000, 1024, 1025, 4097, 65_536])
def test_permute_is_a_permutation(size: int) -> None:
    for key in (b"", b"a", b"1337 0", b"1337 1"):
        out = permute(np.arange(size), size, key)
        assert out.dtype == np.int64
        assert np.array_equal(np.sort(out), np.arange(size))


def test_permute_of_a_subset_matches_the_full_permutation() -> None:
    whole = permute(np.arange(1000), 1000, b"key")
    some = np.array([999, 3, 500])
    assert np.array_equal(permute(some, 1000, b"key"), whole[some])


def test_permute_needs_no_list_of_positions() -> None:
    size = 10**10
    some = np.unique(np.random.default_rng(0).integers(0, size, 20_000))
    tracemalloc.start()
    out = permute(some, size, b"key")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(out)) == len(some)
    assert out.min() >= 0
    assert out.max() < size
    assert peak < 10e6  # a list of all positions would need 80 GB


def test_permutation_looks_random() -> None:
    size = 20_000
    out = permute(np.arange(size), size, b"key")
    assert abs(np.corrcoef(np.arange(size), out)[0, 1]) < 0.03  # 1/sqrt(size) is 0.007
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.03
    assert np.mean(np.abs(np.diff(out)) == 1) < 0.002  # neighbors rarely stay neighbors


@pytest.mark.parametrize(
    ("size", "key", "first"),
    [
        (2, "1337 0", [1, 0]),
        (5, "7 0", [2, 0, 4, 1, 3]),  # 3 bits
        (17, "7 1", [0, 9, 16, 8, 3, 5]),  # 5
        (100, "1337 1", [81, 41, 25, 70, 65, 1]),  # 7
        (1000, "1337 0", [902, 11, 366, 319, 43, 666]),  # 10
        (2000, "1337 0", [1610, 1208, 366, 1020, 1987, 1682]),  # 11
        (33_000, "0 0", [2793, 19_368, 19_601, 13_587, 18_763, 26_234]),  # 16
        (10_000_019, "1337 0", [8857707, 7358908, 8852984, 6960884, 1225108, 4487147]),  # 24
        (2**33 + 9, "1337 2",
         [4798466807, 3302610088, 2785272099, 1177525689, 329417309, 7587617145]),  # 34
    ],
)  # fmt: skip
def test_order_of_a_seed_never_changes(size: int, key: str, first: list[int]) -> None:
    """A resumed run must read the windows that it has not read yet, even under a newer version."""
    assert permute(np.arange(min(size, 6)), size, key.encode()).tolist() == first


def test_seeds_and_epochs_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        b = make_batches(rows=37, seed=seed)
        return b.numbers(number).tolist()

    orders = [epoch(seed, number) for seed in (1, 2) for number in (0, 1)]
    orders += [epoch(12, 0), epoch(1, 20)]  # "12 0" and "1 20" must not be confused
    assert len({tuple(order) for order in orders}) == 6
    assert epoch(1, 1) == epoch(1, 1)


# -- training batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("rows", [1, 5, 8, 36, 37])
def test_every_window_once_per_epoch(rows: int, order: str) -> None:
    b = make_batches(rows, order)
    assert len(b.windows) == 37
    numbers = np.concatenate([b.numbers(step) for step in range(-(-37 * 3 // rows))])
    for epoch in range(3):  # most epochs start and end inside a batch
        seen = numbers[epoch * 37 : (epoch + 1) * 37]
        assert sorted(seen) == list(range(37))


@pytest.mark.parametrize(("micro", "ranks"), [(8, 1), (4, 2), (2, 2), (2, 4), (1, 1), (1, 4)])
def test_global_batch_is_the_same_for_every_partition(micro: int, ranks: int) -> None:
    b = make_batches()
    for step in (0, 3, 4, 9):  # step 4 starts in one epoch and ends in the next
        whole_x, whole_y = b.batch(step, Partition.of(8, 8))
        parts = [b.batch(step, Partition.of(8, micro, rank, ranks)) for rank in range(ranks)]
        for part in parts:
            assert part[0].shape == part[1].shape == (8 // (micro * ranks), micro, T)
        # (accumulation, ranks, micro, T): micro-batch by micro-batch, rank by rank
        x, y = (np.stack([p[i] for p in parts], axis=1).reshape(8, T) for i in (0, 1))
        assert np.array_equal(x, whole_x[0])
        assert np.array_equal(y, whole_y[0])


def test_batch_does_not_depend_on_earlier_batches() -> None:
    fresh = make_batches().batch(11, Partition.of(8, 4))
    used = make_batches()
    for step in (0, 30, 5, 11, 2):
        used.batch(step, Partition.of(8, 2, 1, 2))
    again = used.batch(11, Partition.of(8, 4))
    assert np.array_equal(fresh[0], again[0])
    assert np.array_equal(fresh[1], again[1])


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_no_target_is_skipped_or_repeated_at_a_shard_boundary(order: str) -> None:
    shards = numbered_shards(72, 51, 34, 3, 0, 1)  # the last ones are too short for a window
    b = Batches(Windows(shards, T), 37, 7, order)
    x, y = b.batch(0, Partition.of(37, 37))
    assert np.array_equal(x[0, :, 1:], y[0, :, :-1])
    assert np.array_equal(y, x + 1)  # the numbers also continue across shard boundaries ...
    starts = np.cumsum([0, 72, 51])
    counts = [(72 - 1) // T * T, (51 - 1) // T * T, (34 - 1) // T * T]
    expected = [np.arange(s + 1, s + 1 + n) for s, n in zip(starts, counts, strict=True)]
    # ... but those targets are never used: no window crosses a boundary.
    assert np.array_equal(np.sort(y.ravel()), np.concatenate(expected))


def test_windows_never_cross_shards() -> None:
    shards = [np.full(n, i, np.uint16) for i, n in enumerate((70, 51, 34))]
    windows = Windows(shards, T).read(np.arange(37))
    assert all(len(set(window)) == 1 for window in windows.tolist())


def lecture_loader(tokens: np.ndarray, B: int, T: int, rank: int, ranks: int) -> Iterator:
    """The indexing of the lecture's `DataLoaderLite`, within its first shard."""
    position = B * T * rank
    while position + B * T + 1 <= len(tokens):
        buffer = tokens[position : position + B * T + 1].astype(np.int64)
        yield buffer[:-1].reshape(B, T), buffer[1:].reshape(B, T)
        position += B * T * ranks


@pytest.mark.parametrize(("B", "ranks", "accumulation"), [(2, 1, 4), (4, 2, 1), (2, 2, 2)])
def test_sequential_order_matches_the_lecture(B: int, ranks: int, accumulation: int) -> None:
    shards = numbered_shards(70, 51)
    b = Batches(Windows(shards, T), 8, 0, "sequential")
    for rank in range(ranks):
        lecture = lecture_loader(shards[0], B, T, rank, ranks)
        split = Partition.of(8, B, rank, ranks)
        assert split.accumulation == accumulation
        for step in range(2):  # 16 of the first shard's 17 windows
            x, y = b.batch(step, split)
            for micro_x, micro_y in zip(x, y, strict=True):
                expected_x, expected_y = next(lecture)
                assert np.array_equal(micro_x, expected_x)
                assert np.array_equal(micro_y, expected_y)


def test_huge_dataset_needs_no_memory() -> None:
    shard = np.broadcast_to(np.uint16(7), (10**13,))  # 20 TB of tokens that take no memory
    tracemalloc.start()
    b = Batches(Windows([shard, shard], 1024), 512, 1337, "shuffled")
    x, _ = b.batch(10**7, Partition.of(512, 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.shape == (32, 16, 1024)
    assert peak < 30e6


def test_too_little_data() -> None:
    with pytest.raises(UserError, match=r"needs 152 tokens.* has 148 in whole windows of 4"):
        make_batches(rows=38)
    with pytest.raises(UserError, match="needs 4 tokens"):
        Batches(Windows([], T), 1, 0, "shuffled")


@pytest.mark.parametrize(("micro", "ranks"), [(3, 1), (8, 2), (0, 1), (1, 3), (16, 1)])
def test_batch_that_does_not_divide_evenly(micro: int, ranks: int) -> None:
    with pytest.raises(
        UserError, match=rf"8 rows does not divide .* {micro} rows on {ranks} ranks"
    ):
        Partition.of(8, micro, 0, ranks)


# -- validation batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 10, 150, 152, 10_000])
@pytest.mark.parametrize(("rows", "ranks"), [(1, 1), (4, 1), (3, 2), (16, 1), (2, 4)])
def test_each_validation_target_once(rows: int, ranks: int, limit: int) -> None:
    shards = numbered_shards(70, 51, 34)
    scored: list[int] = []
    context: dict[int, tuple] = {}
    numbers = set()
    for rank in range(ranks):
        mine = list(validation_batches(shards, T, limit, rows, rank, ranks))
        numbers.add(len(mine))
        for x, y in mine:
            assert x.shape == y.shape == (rows, T)
            for row_x, row_y in zip(x.tolist(), y.tolist(), strict=True):
                for i, target in enumerate(row_y):
                    if target != IGNORED:
                        scored.append(target)
                        context[target] = tuple(row_x[: i + 1])
    every = [t for s in shards for t in s[1:].tolist()]  # the first of a shard has no context
    assert sorted(scored) == every[:limit]
    assert len(numbers) == 1  # otherwise ranks would wait for each other in the all-reduce
    for target, before in context.items():
        assert before[-1] == target - 1
        assert list(before) == list(range(target - len(before), target))
        start = max(s[0] for s in shards if s[0] < target)
        assert len(before) == (target - 1 - start) % T + 1  # for any rows and ranks


def test_no_validation_data_gives_no_batches() -> None:
    assert list(validation_batches([], T, 100, 4)) == []


# -- the prefetch thread --------------------------------------------------------------------------


def open_prefetcher(make: Callable, first: int = 0, last: int = 100, depth: int = 2) -> Prefetcher:
    return Prefetcher(make, first, last, CPU, depth)


def test_prefetched_batches_match_direct_batches() -> None:
    b, split = make_batches(), Partition.of(8, 2)
    prefetcher = open_prefetcher(lambda step: b.batch(step, split), 3, 9)
    for step in range(3, 9):
        x, y = prefetcher.next()
        expected_x, expected_y = b.batch(step, split)
        assert torch.equal(x, torch.from_numpy(expected_x))
        assert torch.equal(y, torch.from_numpy(expected_y.copy()))
    prefetcher.close()


def test_error_in_the_prefetch_thread_is_raised_by_next() -> None:
    def make(step: int) -> tuple[np.ndarray, np.ndarray]:
        if step == 2:
            raise UserError("the disk is gone")
        return np.zeros(1), np.zeros(1)

    prefetcher = open_prefetcher(make)
    prefetcher.next()
    prefetcher.next()
    with pytest.raises(UserError, match="the disk is gone"):
        prefetcher.next()
    prefetcher.close()


def test_prefetcher_stops_on_close() -> None:
    made = threading.Semaphore(0)

    def make(step: int) -> tuple[np.ndarray, np.ndarray]:
        made.release()
        return np.zeros(1), np.zeros(1)

    prefetcher = open_prefetcher(make)
    for _ in range(3):  # two in the queue, and one held by the waiting thread
        assert made.acquire(timeout=60)
    prefetcher.close()
    assert not prefetcher._thread.is_alive()


def test_prefetcher_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays constant when training is slower than the data pipeline."""
    full, made = threading.Event(), []

    class Queue(queue.Queue):
        def put(self, *arguments: Any, **options: Any) -> None:
            try:
                super().put(*arguments, **options)
            except queue.Full:
                full.set()
                raise

    def make(step: int) -> tuple[np.ndarray, np.ndarray]:
        made.append(step)
        return np.zeros(1), np.zeros(1)

    monkeypatch.setattr(batches.queue, "Queue", Queue)
    prefetcher = open_prefetcher(make, depth=3)
    for consumed in range(3):
        full.clear()
        while not full.wait(timeout=0.01):
            assert prefetcher._thread.is_alive()  # otherwise it has prepared all 100
        assert len(made) == consumed + 3 + 1  # three in the queue, and one held by the thread
        prefetcher.next()
    prefetcher.close()


def test_waiting_for_data_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake clock: the first batch takes 5 s, the second is ready."""
    clock, waiting = [100.0], threading.Event()

    def now() -> float:
        waiting.set()
        return clock[0]

    def make(step: int) -> tuple[np.ndarray, np.ndarray]:
        if step == 0:
            assert waiting.wait(timeout=60)  # `next` has started to wait
            clock[0] += 5
        return np.zeros(1), np.zeros(1)

    monkeypatch.setattr(batches.time, "perf_counter", now)
    prefetcher = open_prefetcher(make, 0, 2)
    prefetcher.next()
    assert prefetcher.waited == 5
    prefetcher.next()
    assert prefetcher.waited == 5
    prefetcher.close()

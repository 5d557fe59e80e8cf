"""`--batch.order lecture` reads the tokens in the order of the lecture's `DataLoaderLite`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.data.batches import Batches, Partition, Windows
from rekindle.errors import UserError
from rekindle.recipes import RECIPES

T, M = 4, 24  # a window, and a micro-batch of the lecture's loader: 6 windows
SIZES = (97, 96, 120, 49, 25, 71)  # of shards; 97, 49 and 25 are complete micro-batches + 1 token
MICRO_BATCHES = (4, 3, 4, 2, 1, 2)  # complete ones per shard


def numbered(sizes: tuple[int, ...] | list[int]) -> list[np.ndarray]:
    """Shards in which all tokens are different."""
    ends = np.cumsum(sizes)
    return [np.arange(end - n, end, dtype=np.uint16) for n, end in zip(sizes, ends, strict=True)]


def lecture_loader(shards: list[np.ndarray], B: int, T: int) -> Iterator[tuple[Any, Any]]:
    """The loader of one process: an endless stream of inputs and targets (B, T)."""
    shard = position = 0
    while True:
        tokens = shards[shard][position : position + B * T + 1].astype(np.int64)
        yield tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T)
        position += B * T
        if position + B * T + 1 > len(shards[shard]):
            shard, position = shard + 1, 0
            if shard == len(shards):
                shard = 0


def lecture_rows(shards: list[np.ndarray], M: int, T: int) -> Iterator[tuple[list, list]]:
    """The loader's rows, one by one."""
    for x, y in lecture_loader(shards, M // T, T):
        yield from zip(x.tolist(), y.tolist(), strict=True)


def lecture_batches(shards: list[np.ndarray], rows: int, M: int = M, T: int = T) -> Batches:
    return Batches(Windows(shards, T, unit=M), rows, 1337, "lecture")


@pytest.mark.parametrize(
    ("rows", "micro", "ranks"),
    [(6, 6, 1), (12, 6, 1), (8, 8, 1), (8, 2, 1), (8, 2, 2), (8, 1, 4), (20, 5, 2), (96, 4, 3)],
)
def test_order_matches_the_lecture_for_any_partition(rows: int, micro: int, ranks: int) -> None:
    """Across all shard boundaries, for three epochs."""
    shards = numbered(SIZES)
    lecture = lecture_rows(shards, M, T)
    batches = lecture_batches(shards, rows)
    splits = [Partition.of(rows, micro, rank, ranks) for rank in range(ranks)]
    for step in range(3 * sum(MICRO_BATCHES) * 6 // rows + 2):
        parts = [batches.batch(step, split) for split in splits]
        for m in range(splits[0].accumulation):
            for x, y in parts:  # rank by rank
                for row in range(micro):
                    assert (x[m, row].tolist(), y[m, row].tolist()) == next(lecture)


def test_only_complete_micro_batches_of_a_shard_are_used() -> None:
    for size, count in zip(SIZES, MICRO_BATCHES, strict=True):
        assert len(Windows([np.zeros(size, np.uint16)], T, unit=M)) == 6 * count
    # A shard that is too short for a micro-batch gives none. The lecture's loader would fail.
    shards = numbered([24, 0, 49, 3, 25])
    assert len(Windows(shards, T, unit=M)) == 18
    starts = Windows(shards, T, unit=M).read(np.arange(18))[:, 0]
    assert starts.tolist() == [*range(24, 72, 4), *range(76, 100, 4)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_shards(data: st.DataObject) -> None:
    T = data.draw(st.integers(1, 7), "T")
    M = T * data.draw(st.integers(1, 6), "windows")
    sizes = data.draw(st.lists(st.integers(M + 1, 6 * M), min_size=1, max_size=5), "sizes")
    rows = data.draw(st.integers(1, M // T), "rows")
    shards = numbered(sizes)
    batches, lecture = lecture_batches(shards, rows, M, T), lecture_rows(shards, M, T)
    assert len(batches.windows) == sum((size - 1) // M for size in sizes) * (M // T)
    for step in range(2 * len(batches.windows) // rows + 2):
        x, y = batches.batch(step, Partition.of(rows, rows))
        for row in range(rows):
            assert (x[0, row].tolist(), y[0, row].tolist()) == next(lecture)


def test_windows_of_the_published_run() -> None:
    """100M tokens give 1,525 micro-batches of 65,536, which leaves 56 windows unused."""
    batch = RECIPES["gpt2-124m"].batch
    shards = [np.broadcast_to(np.uint16(i), (100_000_000,)) for i in range(3)]
    windows = Windows(shards, batch.length, unit=batch.unit)
    assert len(windows) == 3 * 1525 * 64
    assert len(Windows(shards, batch.length)) == 3 * (1525 * 64 + 56)
    batches = Batches(windows, batch.rows, 1337, batch.order)
    x, _ = batches.batch(
        190, Partition.of(512, 64)
    )  # its 6th micro-batch is the first one of the next shard
    assert x[:, 0, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]


def test_too_little_data() -> None:
    with pytest.raises(UserError, match=r"has 0 in whole micro-batches of 24: .*lecture-micro"):
        lecture_batches(numbered([24, 20]), 1)
    with pytest.raises(UserError, match="needs 28 tokens, but the training split has 24"):
        lecture_batches(numbered([47]), 7)

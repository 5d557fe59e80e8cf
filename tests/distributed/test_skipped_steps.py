"""If a step is not finite on one rank, all ranks skip it."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle.data import shards
from rekindle.data.batches import Batches, Windows
from rekindle.recipes import Recipe
from tests.distributed.conftest import (
    End,
    global_batches,
    hash_rows,
    notes_by_rank,
    read_notes,
    saved,
)


@pytest.fixture
def batch_hash(shard_set: Path, tiny: Recipe) -> Callable[[int], str]:
    """`batch_hash(20)`: a hash of the rows of the global batch with this number."""
    manifest = shards.read_manifest(shard_set)
    windows = Windows(shards.open_split(shard_set, manifest, "train"), tiny.batch.length)
    batches = Batches(windows, tiny.batch.rows, tiny.seed, tiny.batch.order)
    return lambda number: hash_rows(windows.read(batches.numbers(number)))


def test_all_ranks_skip_the_same_steps_and_roll_back_together(
    tmp_path: Path, ranks: Callable[..., End], records: Callable[..., list[dict[str, Any]]],
    batch_hash: Callable[[int], str],
) -> None:  # fmt: skip
    """A loss and a gradient of rank 1 are not finite before the run is stopped after step 6. After
    that, a loss of rank 0, and ten of rank 1 in a row: the run rolls back to step 8 and continues
    with batch 20."""
    out, flags = tmp_path / "run", ("--steps", 24)
    end = ranks(
        2, out, {"rank": 1, "step": 2, "do": "nan"},
        {"rank": 1, "step": 5, "do": "infinite_gradient"},
        {"rank": 0, "step": 6, "do": "send_signal", "number": signal.SIGTERM, "target": "rank"},
        flags=flags,
    )  # fmt: skip
    assert "stopped by SIGTERM after step 6" in end.err
    many = [{"rank": 1, "step": step, "do": "nan"} for step in range(10, 20)]
    end = ranks(2, out, {"rank": 0, "step": 8, "do": "nan"}, *many, flags=flags)
    assert end.status == 0, end.err
    assert (
        "rolled back to step 8, continuing with batch 20 (batches 8 to 19 are skipped)" in end.out
    )

    noted = notes_by_rank(out)
    for notes in noted.values():
        assert [n["step"] for n in notes] == [*range(20), *range(8, 24)]
        skipped = [n["step"] for n in notes if n["skipped"]]
        assert skipped == [2, 5, 8, *range(10, 20)]
        for n in notes:
            assert (n["before"] == n["after"]) == n["skipped"]
    assert [n["after"] for n in noted[0]] == [n["after"] for n in noted[1]]

    batches = {step: step if step < 8 else step + 12 for step in range(24)}
    expected = {step: batch_hash(number) for step, number in batches.items()}
    assert global_batches(read_notes(out)) == expected

    logged = records(out, "train")
    assert [r["step"] for r in logged] == list(range(24))
    assert [r["step"] for r in logged if r["skipped"]] == [2, 5]
    assert logged[2]["loss"] is logged[2]["grad_norm"] is logged[5]["grad_norm"] is None
    assert logged[5]["loss"] is not None  # only the gradient was not finite
    rollback = {"kind": "rollback", "step": 8, "skipped_at": 19, "next_batch": 20}
    assert records(out, "rollback") == [rollback]
    assert saved(out)[-1] == "step-000024"

"""A run may resume with any number of ranks: every step trains on the tokens of one process."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.conftest import End, assert_close, global_batches, read_notes, saved

MICRO = ("--micro-batch", 1)


def test_token_order_is_the_same_for_any_number_of_ranks(
    tmp_path: Path, ranks: Callable[..., End], uninterrupted: Callable[..., Path],
    records: Callable[..., list[dict[str, Any]]],
) -> None:  # fmt: skip
    """One rank, then two, four and one, each time stopped by SIGTERM to torchrun; with 8, 4 and 2
    micro-batches per step, whereas the reference process has one."""
    out = tmp_path / "run"
    for count, stop in ((1, 1), (2, 4), (4, 7)):
        fault = {"step": stop, "do": "send_signal", "number": signal.SIGTERM, "target": "torchrun"}
        end = ranks(count, out, {"rank": count - 1, **fault}, flags=MICRO)
        assert end.status != 0
        assert [line.partition(";")[0] for line in end.errors] == [
            f"rekindle: stopped by SIGTERM after step {stop}"
        ], end.err
        assert saved(out)[-1] == f"step-{stop + 1:06d}"
        assert end.seconds < 60
    assert ranks(1, out, flags=MICRO).status == 0

    notes, like = read_notes(out), read_notes(uninterrupted(1))
    assert [len(notes[step]) for step in range(12)] == [1, 1, 2, 2, 2, 4, 4, 4, 1, 1, 1, 1]
    assert global_batches(notes) == global_batches(like)
    assert len(set(global_batches(like).values())) == 12
    assert_close(out, uninterrupted(1), records)

"""Several ranks that are told to stop agree on the step, save once, and go on to the same end."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rekindle.runtime.distributed import World
from rekindle.runtime.readback import Readback
from rekindle.session import Session
from rekindle.train import StepResult
from tests.distributed.conftest import End, read_notes, same_bits, saved

Ranks = Callable[..., End]
Records = Callable[..., list[dict[str, Any]]]
SAID = (
    "rekindle: stopped by {} after step {}, and everything is saved: the same command resumes the "
    "run"
)
KINDS = ("train", "validation", "samples")


def test_a_process_alone_stops_at_once_and_several_when_all_know() -> None:
    """A signal that comes after the ranks have exchanged theirs waits for the next step's."""
    step = StepResult(Readback(torch.tensor([2.5, 1.0, 0.0, 0.0])), lr=0.1)
    told = SimpleNamespace(signals=SimpleNamespace(signal=signal.SIGTERM), world=World())
    assert Session.stop_requested(told, step) == signal.SIGTERM  # type: ignore[arg-type]
    told.world = World(size=2)
    assert Session.stop_requested(told, step) == 0  # type: ignore[arg-type]
    step = StepResult(Readback(torch.tensor([2.5, 1.0, 0.0, 2.0])), lr=0.1)
    assert Session.stop_requested(told, step) == signal.SIGINT  # type: ignore[arg-type]


def test_one_rank_or_all_of_them_may_be_told(
    tmp_path: Path, ranks: Ranks, undisturbed: Callable[..., Path], records: Records
) -> None:
    """First one rank of two alone; then Ctrl-C, of which each hears twice."""
    out = tmp_path / "run"
    end = ranks(
        2, out, {"rank": 1, "step": 2, "do": "tell", "number": signal.SIGTERM, "who": "rank"}
    )
    assert end.status != 0
    assert end.errors == [SAID.format("SIGTERM", 2)], end.err
    assert saved(out) == ["step-000003"]
    assert [sorted(by_rank) for by_rank in read_notes(out).values()] == [[0, 1]] * 3

    end = ranks(2, out, {"rank": 0, "step": 6, "do": "interrupt"})
    assert end.errors == [SAID.format("SIGINT", 6)], end.err
    assert saved(out) == ["step-000003", "step-000004", "step-000007"]
    assert sorted(read_notes(out)) == list(range(7))

    end = ranks(2, out)
    assert end.status == 0, end.err
    assert same_bits(out, undisturbed(2))
    assert records(out, *KINDS) == records(undisturbed(2), *KINDS)

"""Ranks that receive a stop signal agree on the step, save once, and resume to the same result."""

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
STOPPED = (
    "rekindle: stopped by {} after step {}; a checkpoint was saved: run the same command to resume"
)
KINDS = ("train", "validation", "samples")


def test_several_ranks_stop_only_once_all_know_of_the_signal() -> None:
    """A signal received after the ranks exchanged theirs waits for the next step's exchange. A
    single process stops immediately."""
    step = StepResult(Readback(torch.tensor([2.5, 1.0, 0.0, 0.0])), lr=0.1)
    session = SimpleNamespace(signals=SimpleNamespace(signal=signal.SIGTERM), world=World())
    assert Session.stop_requested(session, step) == signal.SIGTERM  # type: ignore[arg-type]
    session.world = World(size=2)
    assert Session.stop_requested(session, step) == 0  # type: ignore[arg-type]
    step = StepResult(Readback(torch.tensor([2.5, 1.0, 0.0, 2.0])), lr=0.1)
    assert Session.stop_requested(session, step) == signal.SIGINT  # type: ignore[arg-type]


def test_between_validation_batches_ranks_exchange_their_signals() -> None:
    """There is no training step that could carry them."""
    asked: list[int] = []
    world = SimpleNamespace(size=2, max=lambda number, _: asked.append(number) or signal.SIGTERM)
    session = SimpleNamespace(
        signals=SimpleNamespace(signal=0),
        world=world,
        trainer=SimpleNamespace(device=SimpleNamespace(torch=torch.device("cpu"))),
    )
    assert Session.stop_requested(session) == signal.SIGTERM  # type: ignore[arg-type]
    assert asked == [0]


def test_stop_signal_to_one_rank_or_all_ranks(
    tmp_path: Path, ranks: Ranks, uninterrupted: Callable[..., Path], records: Records
) -> None:
    """First a signal to one of two ranks; then Ctrl-C, which each rank receives twice."""
    out = tmp_path / "run"
    end = ranks(
        2,
        out,
        {"rank": 1, "step": 2, "do": "send_signal", "number": signal.SIGTERM, "target": "rank"},
    )
    assert end.status != 0
    assert end.errors == [STOPPED.format("SIGTERM", 2)], end.err
    assert saved(out) == ["step-000003"]
    assert [sorted(by_rank) for by_rank in read_notes(out).values()] == [[0, 1]] * 3

    end = ranks(2, out, {"rank": 0, "step": 6, "do": "interrupt"})
    assert end.errors == [STOPPED.format("SIGINT", 6)], end.err
    assert saved(out) == ["step-000003", "step-000004", "step-000007"]
    assert sorted(read_notes(out)) == list(range(7))

    end = ranks(2, out)
    assert end.status == 0, end.err
    assert same_bits(out, uninterrupted(2))
    assert records(out, *KINDS) == records(uninterrupted(2), *KINDS)

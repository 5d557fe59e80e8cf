"""What ranks say to each other, seen from one of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rekindle import session
from rekindle.errors import UserError
from rekindle.evaluate.questions import Question
from rekindle.observe.console import Console
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World, reason

CPU = Device(torch.device("cpu"), "CPU", "fp32")
GLOO = "[{}third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(GLOO.format("/__w/pytorch/") + ":45. This is"), "Connection closed by peer"),
        (RuntimeError(GLOO.format("../") + ":45. This is"), "Connection closed by peer"),
        (dist.DistBackendError("NCCL error: remote process exited"), "NCCL error"),
    ],
)
def test_a_lost_rank_is_told_in_a_line(error: RuntimeError, said: str) -> None:
    with (
        pytest.raises(UserError, match=rf"^lost touch with another rank \({said}"),
        World().together(),
    ):
        raise error
    assert "/" not in reason(error)


def test_what_is_no_lost_rank_is_not_taken_for_one() -> None:
    with pytest.raises(torch.OutOfMemoryError), World().together():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


def test_totals_end_the_waiting() -> None:
    """NCCL's sum alone does not."""
    world = World()
    world.place.waits()
    assert world.totals(torch.tensor([1.0, 2.5])) == [1.0, 2.5]
    assert world.place.waited() == 0


@pytest.mark.parametrize(("mine", "fewest", "found"), [(2, 2, 2), (2, 0, 0), (0, 0, 0)])
def test_hellaswag_is_asked_on_all_ranks_or_on_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mine: int,
    fewest: int, found: int,
) -> None:  # fmt: skip
    """And every rank takes part in finding out."""
    asked: list[str] = []

    def least(count: int, device: torch.device) -> int:
        asked.append("min")
        return fewest

    def agree(count: int, *_: Any) -> None:
        asked.append("agree")

    world: Any = SimpleNamespace(min=least, agree=agree)
    questions = [Question("a", ("b", "c", "d", "e"), 0)] * mine
    monkeypatch.setattr(session, "for_training", lambda *_: questions)
    assert len(session.find_questions("auto", CPU, world, Console())) == found
    assert asked == (["min", "agree"] if fewest else ["min"])
    assert ("left out: another rank has no questions" in capsys.readouterr().out) == (mine > fewest)

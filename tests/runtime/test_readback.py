"""Numbers that are read from a GPU while it works on."""

from typing import Any

import pytest
import torch

from rekindle.runtime.readback import Readback

NUMBERS = [0.5, -1.0, float("inf")]


def test_what_is_read_is_what_was_copied() -> None:
    assert Readback(torch.tensor(NUMBERS)).tolist() == NUMBERS


def test_a_gpus_copy_is_waited_for_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("synchronize")

    class OnGpu:
        is_cuda = True

        def to(self, device: str, *, non_blocking: bool) -> Any:
            assert (device, non_blocking) == ("cpu", True)
            done.append("copy")
            return torch.tensor(NUMBERS)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = Readback(OnGpu())  # type: ignore[arg-type]
    assert done == ["copy", "record"]
    assert found.tolist() == NUMBERS
    assert done == ["copy", "record", "synchronize"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is needed")
def test_what_the_gpu_does_afterwards_is_not_waited_for() -> None:
    found = Readback(torch.tensor(NUMBERS, device="cuda"))
    torch.cuda._sleep(2**31)  # cycles: about a second
    end = torch.cuda.Event()
    end.record()
    assert found.tolist() == NUMBERS
    assert not end.query()

"""Reading numbers from a GPU while it continues to work."""

from typing import Any

import pytest
import torch

from rekindle.runtime.readback import Readback

NUMBERS = [0.5, -1.0, float("inf")]


def test_cpu_tensor_is_read_unchanged() -> None:
    assert Readback(torch.tensor(NUMBERS)).tolist() == NUMBERS


def test_reading_waits_for_the_copy_from_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_reading_does_not_wait_for_later_work() -> None:
    found = Readback(torch.tensor(NUMBERS, device="cuda"))
    torch.cuda._sleep(2**31)  # cycles: about a second
    end = torch.cuda.Event()
    end.record()
    assert found.tolist() == NUMBERS
    assert not end.query()

"""The warm-up before the first step does not affect training."""

import pytest
import torch

from rekindle.model.gpt2 import GPT2
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Recipe
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World
from rekindle.runtime.warm_up import WarmUp, warm_up

pytestmark = pytest.mark.usefixtures("one_thread")


def test_warm_up_changes_no_state(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT2(tiny.model)
    optimizer = AdamW(model, AdamWConfig(lr=1e-2))
    weights = [p.detach().clone() for p in model.parameters()]
    x, y = torch.randint(257, (2, 4, 16))
    losses = []

    def forward(x: torch.Tensor, y: torch.Tensor) -> tuple[None, torch.Tensor]:
        _, loss = model(x, y)
        assert loss is not None
        losses.append(loss.item())
        torch.rand(1)  # uses random numbers, like dropout
        return None, loss

    random = torch.get_rng_state()
    ticks = iter([100.0, 110.0, 120.0, 123.0])
    monkeypatch.setattr("rekindle.runtime.warm_up.time.perf_counter", lambda: next(ticks))
    device = Device(torch.device("cpu"), "CPU", "fp32")
    found = warm_up(forward, list(model.parameters()), x, y, device, World())

    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(tensor.any() for tensor in optimizer.state_tensors().values())
    for p, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(p, before)
        assert p.grad is not None
        assert not p.grad.any()
    assert found == WarmUp(compile_s=7.0, pass_s=3.0, peak_bytes=None)

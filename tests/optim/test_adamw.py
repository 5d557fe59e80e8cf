"""AdamW: matches PyTorch's, decays only matrices, and skips steps on the device."""

import copy
import math

import pytest
import torch

from rekindle.model.gpt2 import GPT2
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Recipe

NO = torch.tensor(False)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny: Recipe) -> GPT2:
    torch.manual_seed(0)
    return GPT2(tiny.model)


def test_matches_pytorchs_adamw_with_decay_on_matrices_only(model: GPT2) -> None:
    """Non-default hyperparameters, over three steps with different learning rates."""
    config = AdamWConfig(lr=0.02, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.3)
    plain = copy.deepcopy(model)
    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    vectors = [p for p in plain.parameters() if p.dim() < 2]
    assert len(matrices) + len(vectors) == len(list(model.parameters()))
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.7), eps=1e-3, foreach=False)
    ours = AdamW(model, config)
    for lr in (0.02, 0.01, 0.03):
        for p, like in zip(model.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            like.grad = p.grad.clone()
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        ours.set_lr(lr)
        ours.step(NO)
    for (name, p), like in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, like, rtol=1e-5, atol=1e-7, msg=name)
    assert (ours.state_tensors()["updates"] == 3).all()


def test_zero_gradient_decays_only_matrices(model: GPT2) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    AdamW(model, AdamWConfig(lr=0.5)).step(NO)
    for name, p in model.named_parameters():
        is_matrix = name.endswith("weight") and "ln_" not in name
        factor = 1 - 0.5 * 0.1 if is_matrix else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


@pytest.mark.parametrize("fused", [True, False])
def test_skipped_step_changes_nothing(model: GPT2, fused: bool) -> None:
    optimizer = AdamW(model, AdamWConfig(lr=0.5), fused=fused)
    tensors = {**dict(model.named_parameters()), **optimizer.state_tensors()}
    for value, skip in ((0.5, False), (math.nan, True), (1.0, True), (0.25, False)):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        before = {name: t.detach().clone() for name, t in tensors.items()}
        optimizer.step(torch.tensor(skip))
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[name]) == skip, name
    assert (tensors["updates"] == 2).all()


def test_state_can_be_copied_into_another_optimizer(model: GPT2) -> None:
    """Copied state takes effect, including the number of updates."""
    other = copy.deepcopy(model)
    ours, theirs = AdamW(model, AdamWConfig()), AdamW(other, AdamWConfig())

    def step(model: GPT2, optimizer: AdamW) -> None:
        for p in model.parameters():
            p.grad = torch.sin(p.detach() * 100)
        optimizer.step(NO)

    for _ in range(3):
        step(model, ours)
    with torch.no_grad():
        for p, like in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(like)
        for name, tensor in theirs.state_tensors().items():
            tensor.copy_(ours.state_tensors()[name])
    step(model, ours)
    step(other, theirs)
    assert all(map(torch.equal, model.parameters(), other.parameters()))

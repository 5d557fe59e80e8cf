"""What AdamW decays, and the one buffer that holds all gradients."""

import pytest
import torch
from torch import nn

from rekindle.model.gpt2 import GPT2
from rekindle.optim.adamw import GradientBuffer, make_adamw
from rekindle.recipes import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny: Recipe) -> GPT2:
    torch.manual_seed(0)
    return GPT2(tiny.model)


def test_only_matrices_decay(model: GPT2) -> None:
    optimizer = make_adamw(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    decay = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert sorted(decay) == sorted(names.values())
    for name, strength in decay.items():
        is_matrix = name.endswith("weight") and "ln_" not in name
        assert strength == (0.1 if is_matrix else 0.0), name
    assert decay["transformer.wte.weight"] == decay["transformer.wpe.weight"] == 0.1
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-8, 1e-3)


def test_a_step_without_gradient_shrinks_matrices_and_leaves_the_rest(model: GPT2) -> None:
    gradients = GradientBuffer(model.parameters())
    gradients.reset()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_adamw(model, 0.5, (0.9, 0.95), 1e-8, 0.1).step()
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def set_random_gradients(model: nn.Module) -> GradientBuffer:
    gradients = GradientBuffer(model.parameters())
    gradients.reset()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(torch.randn_like(p))
    return gradients


def test_every_gradient_is_a_view_of_the_buffer(model: GPT2) -> None:
    gradients = set_random_gradients(model)
    parameters = list(model.parameters())  # the tied one once
    assert gradients.flat.numel() == sum(p.numel() for p in parameters)
    together = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    assert torch.equal(together, gradients.flat)
    gradients.flat.fill_(3)
    assert all((p.grad == 3).all() for p in parameters if p.grad is not None)
    gradients.reset()
    assert all((p.grad == 0).all() for p in parameters if p.grad is not None)


def test_backward_adds_to_the_buffer(model: GPT2) -> None:
    gradients = GradientBuffer(model.parameters())
    gradients.reset()
    idx = torch.randint(0, 257, (2, 8))
    for _ in range(2):
        _, loss = model(idx, idx)
        loss.backward()
    model.zero_grad(set_to_none=True)
    _, loss = model(idx, idx)
    loss.backward()
    once = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients.flat, 2 * once)


@pytest.mark.parametrize("dropped", [True, False])
def test_after_reset_every_gradient_is_a_view_again(model: GPT2, dropped: bool) -> None:
    gradients = GradientBuffer(model.parameters())
    for p in model.parameters():  # None is what the search for a micro-batch leaves
        p.grad = None if dropped else torch.zeros_like(p)
    gradients.reset()
    gradients.flat.fill_(1)
    assert all(p.grad is not None and (p.grad == 1).all() for p in model.parameters())


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e9])
def test_norm_and_clip_are_torchs(model: GPT2, limit: float) -> None:
    gradients = set_random_gradients(model)
    ours = gradients.norm()
    values = [g.clone() for g in (p.grad for p in model.parameters()) if g is not None]
    gradients.clip(ours, limit)
    clipped = gradients.flat.clone()
    for p, value in zip(model.parameters(), values, strict=True):
        p.grad = value
    theirs = nn.utils.clip_grad_norm_(model.parameters(), limit)
    torch.testing.assert_close(ours, theirs)
    together = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(clipped, torch.cat(together))

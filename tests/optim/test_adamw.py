"""What AdamW decays."""

import pytest
import torch

from rekindle.model.gpt2 import GPT2
from rekindle.optim.adamw import make_adamw
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
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_adamw(model, 0.5, (0.9, 0.95), 1e-8, 0.1).step()
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)

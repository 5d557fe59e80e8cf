"""The gradient norm against float64 at real sizes, and clipping by it."""

from collections.abc import Iterable

import pytest
import torch
from torch import nn

import rekindle.optim
from rekindle.model.gpt2 import GPT2
from rekindle.optim.gradients import BLOCK, clip_gradients, grad_norm
from rekindle.recipes import get_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters_with(gradients: Iterable[torch.Tensor]) -> list[nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.empty(gradient.shape))
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def exact(parameters: list[nn.Parameter]) -> float:
    """The norm in float64, computed in pieces, because all at once would take gigabytes."""
    total = 0.0
    for p in parameters:
        assert p.grad is not None
        for piece in p.grad.flatten().split(2**20):
            total += float(piece.double().square().sum())
    return total**0.5


@pytest.mark.parametrize(
    "recipe",
    ["gpt2-124m", pytest.param("gpt2-medium", marks=pytest.mark.slow)],
)
def test_norm_is_exact_at_full_size(recipe: str) -> None:
    """Each tensor of GPT-2 has its own scale; the embedding is the largest and dominates."""
    with torch.device("meta"):
        model = GPT2(get_recipe(recipe).model)
    torch.manual_seed(0)
    scales = torch.rand(len(list(model.parameters())))
    parameters = parameters_with(
        torch.randn(p.shape) * 10 ** (-4 * scale)
        for p, scale in zip(model.parameters(), [0.0, *scales.tolist()[1:]], strict=True)
    )
    assert rekindle.optim.grad_norm(parameters).item() == pytest.approx(exact(parameters), rel=3e-6)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17])
def test_norm_includes_every_element(size: int) -> None:
    parameters = parameters_with([torch.ones(size), torch.ones(3, 5)])
    assert grad_norm(parameters).item() == pytest.approx((size + 15) ** 0.5, rel=1e-6)
    last = parameters[0].grad
    assert last is not None
    last[-1] = 1e6
    assert grad_norm(parameters).item() == pytest.approx(1e6, rel=1e-6)


def test_parameters_without_a_gradient_count_as_zero() -> None:
    parameters = [nn.Parameter(torch.ones(3)), *parameters_with([torch.full((4,), 2.0)])]
    assert grad_norm(parameters).item() == 4
    clip_gradients(parameters, 1.0, torch.tensor(4.0))
    assert parameters[0].grad is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_non_finite_element_makes_the_norm_non_finite(value: float) -> None:
    parameters = parameters_with([torch.ones(2 * BLOCK), torch.ones(10)])
    assert parameters[0].grad is not None
    parameters[0].grad[BLOCK + 3] = value
    assert not grad_norm(parameters).isfinite()


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e9])
def test_norm_and_clipping_match_torch(limit: float) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(7, 11), torch.randn(13), torch.randn(2, 3, 4)]
    ours, theirs = (parameters_with(g.clone() for g in gradients) for _ in range(2))
    norm = grad_norm(ours)
    clip_gradients(ours, limit, norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, limit))
    for p, like in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, like.grad)

"""The FP8 head, on a CPU: it has no FP8 units, but computes the same numbers."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rekindle.errors import UserError
from rekindle.machine import MachineOptions, resolve
from rekindle.model import fp8
from rekindle.model.compute import Compute
from rekindle.model.fp8 import E4M3, E5M2, fp8_linear, matmul, quantize
from rekindle.model.modern import Modern
from rekindle.model.modern_config import ModernConfig
from rekindle.recipes import Recipe, with_vocabulary
from rekindle.trainer import build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("dtype", "error"), [(E4M3, 2**-4), (E5M2, 2**-3)])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e5])
def test_quantization_error_is_bounded(dtype: torch.dtype, error: float, size: float) -> None:
    """Half a unit in the last place for numbers down to 1/2^10 of the largest, which is exact."""
    torch.manual_seed(0)
    x = torch.randn(64, 32) * size
    q, scale = quantize(x, dtype)
    assert q.dtype == dtype
    assert q.float().abs().max() == torch.finfo(dtype).max
    back = q.float() * scale
    large = x.abs() > x.abs().max() / 2**10
    assert ((back - x).abs() <= error * x.abs())[large].all()
    assert back.abs().max().item() == pytest.approx(x.abs().max().item(), rel=1e-6)


def test_zeros_stay_zeros_and_nan_stays_nan() -> None:
    q, scale = quantize(torch.zeros(16, 16), E4M3)
    assert not (q.float() * scale).any()
    for bad in (torch.nan, torch.inf):
        x = torch.ones(16, 16)
        x[3, 4] = bad
        q, scale = quantize(x, E5M2)
        assert (q.float() * scale).isnan().any()


def test_matmul_multiplies_the_quantized_numbers() -> None:
    torch.manual_seed(0)
    (a, sa), (b, sb) = quantize(torch.randn(32, 64), E4M3), quantize(torch.randn(48, 64), E4M3)
    expected = (a.double() * sa) @ (b.double() * sb).T
    torch.testing.assert_close(
        matmul(a, b, (sa, sb), torch.float32).double(), expected, rtol=1e-5, atol=1e-4
    )


def relative(mine: Tensor | None, like: Tensor | None) -> float:
    assert mine is not None
    assert like is not None
    return ((mine - like).norm() / like.norm()).item()


def test_output_and_gradients_match_a_linear_layer_up_to_rounding() -> None:
    """The average rounding error is 2^-5 with 3 bits of mantissa and 2^-4 with 2. Those of the two
    operands of a matmul are independent: 0.04 forward, 0.06 backward."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 16, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    g = torch.randn(2, 16, 48) * 1e-6  # as small as the gradient of a mean
    fp8_linear(x, w).backward(g)
    mine, x.grad, w.grad = (x.grad, w.grad), None, None
    F.linear(x, w).backward(g)
    assert 1e-3 < relative(fp8_linear(x, w), F.linear(x, w)) < 0.045
    for gradient, like in zip(mine, (x.grad, w.grad), strict=True):
        assert 1e-3 < relative(gradient, like) < 0.07


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model = Modern(ModernConfig(n_layer=2, n_embd=32, head_size=16, block_size=16, vocab_size=50,
                                value_embeddings=0).for_training())  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_is_used_for_training_but_not_for_evaluation(model: Any, compiled: bool) -> None:
    idx = torch.randint(50, (2, 16))
    with torch.no_grad():
        exact = model(idx, idx)[1]
        evaluated = model.use(Compute(fp8_head=True))(idx, idx)[1]
    assert torch.equal(evaluated, exact)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss = forward(idx, idx)[1]
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    loss.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.use(Compute())(idx, idx)[1].backward()
    for name, p in model.named_parameters():
        assert relative(mine[name], p.grad) < 0.1, name


def test_output_has_autocasts_dtype() -> None:
    x, w = torch.randn(16, 32), torch.randn(48, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fp8_linear(x, w).dtype == torch.bfloat16
    assert fp8_linear(x, w).dtype == torch.float32


def test_fp8_needs_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert fp8.why_not(torch.device("cpu"))
    for capability, can in (((9, 0), True), ((10, 0), True), ((8, 9), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert (fp8.why_not(gpu) is None) == can


def test_unsupported_model_is_rejected(model: Any, tiny: Recipe) -> None:
    assert fp8.unsupported(model, 16) is None
    assert fp8.unsupported(model, 24) == "batch.length 24 is not a multiple of 16"
    machine = dataclasses.replace(resolve(MachineOptions(device="cpu")), fp8_head=True)
    tokens = [np.zeros(700, np.uint16)]
    with pytest.raises(UserError, match="--fp8-head: GPT2 does not support it; leave it out"):
        build(tiny, tokens, machine)
    config = ModernConfig(n_layer=2, n_embd=24, head_size=8, block_size=16, vocab_size=257,
                          value_embeddings=0).for_training()  # fmt: skip
    with pytest.raises(UserError, match="n_embd 24 is not a multiple of 16"):
        build(dataclasses.replace(tiny, model=config), tokens, machine)


def test_with_vocabulary_pads_for_fp8(tiny: Recipe, model: Any) -> None:
    config = dataclasses.replace(model.config, vocab_size=50, padded_vocab_size=50)
    recipe, tokens = dataclasses.replace(tiny, model=config), [np.zeros(700, np.uint16)]
    machine = dataclasses.replace(resolve(MachineOptions(device="cpu")), fp8_head=True)
    message = r"padded_vocab_size 50 is not a multiple of 16 \(recipes.with_vocabulary pads it\)"
    with pytest.raises(UserError, match=message):
        build(recipe, tokens, machine)
    with build(with_vocabulary(recipe, 50), tokens, machine) as trainer:
        assert trainer.recipe.model == dataclasses.replace(config, padded_vocab_size=128)


def test_trainer_uses_fp8(tiny: Recipe, model: Any) -> None:
    machine = resolve(MachineOptions(device="cpu", compile=False, precision="fp32"))
    recipe = dataclasses.replace(tiny, model=dataclasses.replace(model.config, vocab_size=60))
    tokens = [np.arange(700, dtype=np.uint16) % 60]
    losses = []
    for fp8_head in (False, True):
        with build(recipe, tokens, dataclasses.replace(machine, fp8_head=fp8_head)) as trainer:
            losses.append([trainer.train_step().loss for _ in range(4)])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)

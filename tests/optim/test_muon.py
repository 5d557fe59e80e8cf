"""Muon: matches PyTorch's without the extras, the extras against plain loops, steps that are
skipped on the device, and AdamW for the other parameters."""

import copy
import dataclasses
import math
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.model.modern import Modern
from rekindle.model.modern_config import ModernConfig
from rekindle.optim import OPTIMIZERS, muon
from rekindle.optim.muon import Muon, orthogonalize
from rekindle.optim.muon_config import MuonConfig, warmup_steps
from rekindle.recipes import Recipe

NO, YES = torch.tensor(False), torch.tensor(True)
BARE = MuonConfig(lr=0.02, momentum=0.9, momentum_warmup=0, weight_decay=0.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return Modern(
        ModernConfig(n_layer=2, n_embd=32, head_size=16, block_size=16, vocab_size=50,
                     value_embeddings=1, zero_init=False)
    )  # fmt: skip


def matrices(model: Any) -> dict[str, Tensor]:
    roles = model.parameter_roles()
    return {n: p for n, p in model.named_parameters() if roles[n] == "matrix"}


def draw_gradients(*models: Any) -> None:
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        gradient = torch.randn_like(parameters[0])
        for p in parameters:
            p.grad = gradient.clone()


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 20, 20), (2, 40, 16), (2, 16, 40)):
        stack = torch.randn(shape) * 100
        result = orthogonalize(stack)
        s = torch.linalg.svdvals(result)
        assert s.min() > 0.6
        assert s.max() < 1.25
        # The singular vectors are the matrix's own.
        U, _, V = torch.linalg.svd(stack, full_matrices=False)
        near = U.mT @ result @ V.mT
        off_diagonal = near - near.diagonal(dim1=1, dim2=2).diag_embed()
        assert off_diagonal.abs().max() < 1e-3
    assert not orthogonalize(torch.zeros(1, 4, 4)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_matches_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's version takes one matrix and always computes in `torch.bfloat16`."""
    torch.manual_seed(0)
    for shape in ((3, 24, 24), (2, 32, 8), (2, 8, 32)):
        stack = torch.randn(shape)
        seen = orthogonalize(stack.to(dtype))
        assert seen.dtype == dtype
        with monkeypatch.context() as patch:
            pytorchs_muon_in(dtype, patch)
            expected = torch.stack([pytorchs_orthogonalize(m) for m in stack])
        error = (seen.float() - expected.float()).norm() / expected.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.03)


def pytorchs_muon_in(dtype: torch.dtype, patch: pytest.MonkeyPatch) -> None:
    """Make PyTorch's Muon compute in `dtype`: torch 2.11 calls the method, newer ones `to`."""
    patch.setattr(torch, "bfloat16", dtype)
    patch.setattr(Tensor, "bfloat16", lambda tensor: tensor.to(dtype, copy=True))


def pytorchs_orthogonalize(matrix: Tensor) -> Tensor:
    from torch.optim import _muon

    coefficients = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C)
    return _muon._zeropower_via_newtonschulz(matrix, coefficients, 5, _muon.EPS)


@pytest.mark.parametrize("nesterov", [True, False])
def test_without_extras_it_matches_pytorchs_muon_and_adamw(
    model: Any, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over four steps with different rates; PyTorch's version is patched to use float32."""
    rates = {"embedding": 0.3, "value_embedding": 0.1, "head": 0.024, "vector": 0.01,
             "scalar": 0.005}  # fmt: skip
    config = dataclasses.replace(
        BARE, nesterov=nesterov, weight_decay=0.3, cautious=False, embedding_lr=0.3, value_lr=0.1,
        head_lr=0.024, vector_lr=0.01, scalar_lr=0.005,
    )  # fmt: skip
    plain = copy.deepcopy(model)
    roles = plain.parameter_roles()
    theirs: list[Any] = [
        torch.optim.Muon(list(matrices(plain).values()), lr=0.02, momentum=0.9, nesterov=nesterov,
                         weight_decay=0.3),
        torch.optim.AdamW(
            [{"params": [p], "lr": rates[roles[n]]} for n, p in plain.named_parameters()
             if roles[n] != "matrix"],
            betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0,
        ),
    ]  # fmt: skip
    ours = Muon(model, config)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in theirs]
    for factor in (1.0, 0.5, 1.5, 0.1):
        draw_gradients(model, plain)
        ours.set_lr(0.02 * factor)
        ours.step(NO)
        with monkeypatch.context() as patch:
            pytorchs_muon_in(torch.float32, patch)
            for optimizer, lrs in zip(theirs, peaks, strict=True):
                for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                    group["lr"] = lr * factor
                optimizer.step()
    for (name, p), like in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, like, rtol=1e-4, atol=1e-6, msg=name)
    for name, p in matrices(plain).items():
        buffer = theirs[0].state[p]["momentum_buffer"]
        torch.testing.assert_close(ours.state_tensors()[f"momentum.{name}"], buffer)
    assert ours.state_tensors()["updates"].unique().tolist() == [4]


def test_momentum_rises_only_with_steps_that_are_not_skipped(model: Any) -> None:
    """In the average and in the Nesterov update."""
    config = dataclasses.replace(BARE, momentum_start=0.5, momentum_warmup=4)
    ours, weight = Muon(model, config), model.h[1].attn.k.weight
    average, expected = torch.zeros(32, 32), weight.detach().clone()
    for momentum, skip in ((0.6, NO), (0.7, YES), (0.7, NO), (0.8, NO), (0.9, NO), (0.9, NO)):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        weight.grad = torch.randn(32, 32)
        ours.step(skip)
        if not skip:
            average = momentum * average + (1 - momentum) * weight.grad
            ahead = momentum * average + (1 - momentum) * weight.grad
            expected -= 0.02 * orthogonalize(ahead[None])[0]
        seen = ours.state_tensors()["momentum.h.1.attn.k.weight"]
        torch.testing.assert_close(seen, average)
        torch.testing.assert_close(weight.detach(), expected)


def test_cautious_decay_applies_only_where_the_update_shrinks_a_weight(model: Any) -> None:
    other = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw_gradients(model, other)
    Muon(model, dataclasses.replace(BARE, weight_decay=0.25)).step(NO)
    Muon(other, BARE).step(NO)
    roles = model.parameter_roles()
    for (name, p), plain in zip(model.named_parameters(), other.parameters(), strict=True):
        old = before[name]
        shrinks = (plain - old) * old < 0
        expected = torch.where(shrinks, plain - 0.02 * 0.25 * old, plain)
        if roles[name] != "matrix":
            expected = plain
        else:
            assert 0.3 < shrinks.float().mean() < 0.7
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7, msg=name)


def test_skipped_step_changes_nothing(model: Any) -> None:
    """No bit of any weight or state changes, even if gradients are NaN."""
    ours = Muon(model, dataclasses.replace(BARE, momentum_warmup=3, weight_decay=0.1))
    tensors = {**dict(model.named_parameters()), **ours.state_tensors()}
    for value, skip in ((0.5, False), (math.nan, True), (1.0, True), (math.inf, True), (1, False)):
        draw_gradients(model)
        for p in model.parameters():
            p.grad *= value
        before = {name: t.detach().clone() for name, t in tensors.items()}
        ours.step(torch.tensor(skip))
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[name]) == skip, name
    assert tensors["updates"].unique().tolist() == [2]
    assert all(t.isfinite().all() for t in tensors.values())


def test_step_does_not_synchronize_with_the_device(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is converted to a Python number, which would wait for a GPU."""
    ours = Muon(model, dataclasses.replace(BARE, momentum_warmup=3, weight_decay=0.1))
    draw_gradients(model)
    monkeypatch.setattr(ours._adamw, "step", lambda: None)  # PyTorch's own, fused

    def fail(*_: Any) -> Any:
        raise AssertionError("the host waits")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, fail)
    ours.step(NO)


def test_state_can_be_copied_into_another_optimizer(model: Any) -> None:
    """With a copied state, the two optimizers give the same weights bit for bit."""
    other = copy.deepcopy(model)
    config = dataclasses.replace(BARE, momentum_warmup=9, weight_decay=0.1)
    ours, theirs = Muon(model, config), Muon(other, config)
    for _ in range(3):
        draw_gradients(model)
        ours.step(NO)
    with torch.no_grad():
        for p, like in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(like)
        for name, tensor in theirs.state_tensors().items():
            tensor.copy_(ours.state_tensors()[name])
    for _ in range(2):
        draw_gradients(model, other)
        ours.step(NO)
        theirs.step(NO)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_state_has_the_names_and_shapes_of_the_parameters(model: Any) -> None:
    state = Muon(model, BARE).state_tensors()
    named, roles = dict(model.named_parameters()), model.parameter_roles()
    expected = {"updates": (1 + sum(role != "matrix" for role in roles.values()),)}
    for name, role in roles.items():
        for key in ("momentum",) if role == "matrix" else ("exp_avg", "exp_avg_sq"):
            expected[f"{key}.{name}"] = tuple(named[name].shape)
    assert {name: tuple(t.shape) for name, t in state.items()} == expected


def test_matrices_of_one_shape_are_batched(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[tuple[int, ...]] = []

    def note(stack: Tensor) -> Tensor:
        stacks.append(tuple(stack.shape))
        return orthogonalize(stack)

    monkeypatch.setattr(muon, "orthogonalize", note)
    draw_gradients(model)
    Muon(model, BARE).step(NO)
    assert sorted(stacks) == [(2, 32, 128), (2, 128, 32), (8, 32, 32)]


def moved_by_one_step(C: int) -> dict[str, float]:
    """How much one step with the rules' hyperparameters changes the output of each kind of layer
    for an input of unit size: root mean square, relative to the matrices' learning rate."""
    torch.manual_seed(0)
    model: Any = Modern(
        ModernConfig(n_layer=1, n_embd=C, head_size=16, block_size=16, vocab_size=500,
                     value_embeddings=0)
    )  # fmt: skip
    config = MuonConfig.by_rule(C, 1_000)
    x = {size: torch.randn(size) for size in (C, 4 * C)}
    draw_gradients(model)
    model.lm_head.weight.grad = (
        torch.randn(500, 1) * x[C]
    )  # a head's gradient is proportional to its input
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Muon(model, dataclasses.replace(config, weight_decay=0.0)).step(NO)
    layers = {"square": "h.0.attn.q", "tall": "h.0.mlp.fc", "wide": "h.0.mlp.proj",
              "head": "lm_head"}  # fmt: skip
    moved = {}
    for kind, name in layers.items():
        change = dict(model.named_parameters())[f"{name}.weight"] - before[f"{name}.weight"]
        moved[kind] = (change @ x[change.shape[1]]).square().mean().sqrt().item() / config.lr
    return moved


def test_rules_give_equal_output_changes_at_two_widths() -> None:
    narrow, wide = moved_by_one_step(32), moved_by_one_step(128)
    for kind in ("square", "tall", "wide"):
        assert narrow[kind] == pytest.approx(1, rel=0.25), kind  # singular values are 0.7 to 1.2
        assert wide[kind] == pytest.approx(1, rel=0.25), kind
    assert narrow["head"] == pytest.approx(wide["head"], rel=0.2)


def test_rules_reproduce_the_sources() -> None:
    full, small = MuonConfig.by_rule(768, 3_250), MuonConfig.by_rule(128, 150)
    assert (full.lr, full.head_lr, full.momentum_warmup) == pytest.approx(
        (0.0257, 0.004, 325), 0.01
    )
    assert full.weight_decay == pytest.approx(0.05, rel=0.05)
    assert (small.lr, small.head_lr, small.momentum_warmup) == pytest.approx((0.04, 0.024, 15))
    assert MuonConfig.by_rule(128, 75).lr == pytest.approx(0.055)
    # Weight decay alone shrinks a weight by the same factor in both runs.
    left = [(1 - c.lr * c.weight_decay) ** n for c, n in ((full, 3_250), (small, 150))]
    assert left[0] == pytest.approx(left[1], rel=0.1)
    assert [warmup_steps(n) for n in (0, 74, 150, 3_250)] == [0, 0, 2, 43]
    shortest = MuonConfig.by_rule(128, 0)
    assert (shortest.lr, shortest.momentum_warmup) == (0.06, 0)


def test_muon_trains_gpt2(tiny: Recipe) -> None:
    """Muon works with any model whose parameters have roles."""
    torch.manual_seed(0)
    model = GPT2(tiny.model)
    ours = Muon(model, BARE)
    x = torch.randint(257, (4, 16))
    losses = []
    for _ in range(5):
        model.zero_grad()
        _, loss = model(x, x)
        assert loss is not None
        loss.backward()
        losses.append(loss.item())
        ours.step(NO)
    assert losses[-1] < losses[0] - 1


def test_sharded_model_is_rejected(model: Any) -> None:
    model.wte.weight.full_tensor = None  # the attribute that identifies a DTensor
    with pytest.raises(UserError, match="leave out --shard"):
        Muon(model, BARE)


@pytest.mark.parametrize("lr", [0.0, -0.01, math.nan])
def test_learning_rate_must_be_positive(lr: float) -> None:
    with pytest.raises(UserError, match="lr must be above 0"):
        MuonConfig(lr=lr)


def test_muon_is_registered_and_its_config_does_not_import_torch(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert OPTIMIZERS["muon"] == f"{Muon.__module__}.{Muon.__qualname__}"
    script = (
        "import sys, rekindle.optim.muon_config, rekindle.model.modern_config\n"
        "assert 'torch' not in sys.modules"
    )
    child = python("-c", script)
    assert child.returncode == 0, child.stderr

"""Every model implements `LanguageModel` consistently."""

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rekindle import lookup
from rekindle.model import MODELS
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.model.linear import HEAD_ROWS
from rekindle.model.modern import Modern
from rekindle.model.modern_config import ModernConfig

SIZES: dict[str, Any] = {
    "n_layer": 2,
    "n_embd": 32,
    "block_size": 24,
    "vocab_size": 50,
    "padded_vocab_size": 64,
}
CONFIGS = {
    "gpt2": GPT2Config(n_head=2, **SIZES),
    "modern": ModernConfig(head_size=16, value_embeddings=1, **SIZES),
}
EMBEDDINGS = {"embedding", "value_embedding"}
ROLES = {*EMBEDDINGS, "head", "matrix", "vector", "scalar"}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny model with weights so large that every part of it shows in the logits."""
    torch.manual_seed(0)
    model: Any = lookup.models()[request.param](CONFIGS[request.param])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


@pytest.fixture
def idx() -> Tensor:
    return torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(1))


def test_interfaces_do_not_import_torch(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    script = """
import sys
import rekindle.model, rekindle.optim, rekindle.recipes, rekindle.machine, rekindle.lookup
assert "torch" not in sys.modules
"""
    child = python("-c", script)
    assert child.returncode == 0, child.stderr


def test_head_of_body_equals_logits(model: Any, idx: Tensor) -> None:
    logits, _ = model(idx)
    result = model.head(model.body(idx))
    assert result.shape == (3, 17, model.config.padded_vocab_size)
    assert torch.equal(result[..., : model.config.vocab_size], logits)


def test_mean_of_losses_equals_loss(model: Any, idx: Tensor) -> None:
    y = idx.roll(-1, 1)
    y[:, 5:9] = -100
    _, loss = model(idx, y)
    losses = model.losses(model.body(idx).flatten(0, 1), y.flatten())
    assert losses.shape == (51,)
    assert losses.dtype == torch.float32
    assert not losses.view(3, 17)[:, 5:9].any()
    torch.testing.assert_close(losses.sum() / (y != -100).sum(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("N", [0, 1, HEAD_ROWS + 1, 2 * HEAD_ROWS])
def test_losses_call_the_head_in_pieces(model: Any, N: int, monkeypatch: Any) -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(N, 32, generator=random)
    y = torch.randint(50, (N,), generator=random)
    expected = -model.head(x).log_softmax(-1).gather(1, y[:, None])[:, 0]
    rows, head = [], model.head
    monkeypatch.setattr(model, "head", lambda x: rows.append(len(x)) or head(x))
    losses = model.losses(x, y)
    assert max(rows) <= HEAD_ROWS
    assert sum(rows) == N
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_losses_are_float32_for_a_bf16_model(model: Any, idx: Tensor) -> None:
    model.use(Compute(dtype=torch.bfloat16))
    x = model.body(idx).flatten(0, 1)
    assert x.dtype == torch.bfloat16
    losses = model.losses(x, idx.flatten())
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, losses.bfloat16().float())


def test_roles_cover_exactly_the_parameters(model: Any) -> None:
    roles, parameters = model.parameter_roles(), dict(model.named_parameters())
    assert roles.keys() == parameters.keys()
    assert set(roles.values()) <= ROLES
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    embedding = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, role in roles.items():
        p = parameters[name]
        assert role in EMBEDDINGS or id(p) not in embedding, name
        assert (role in {*EMBEDDINGS, "head"}) == (p.shape[0] in (64, 24)), name  # ids, positions
        assert p.dim() == 2 if role in {*EMBEDDINGS, "head", "matrix"} else p.numel() < 32**2, name
        assert role != "matrix" or id(p) in linear, name


def test_blocks_contain_all_matrices(model: Any) -> None:
    assert len(model.blocks) == model.config.n_layer
    inside = [id(p) for block in model.blocks for p in block.parameters()]
    assert len(inside) == len(set(inside))
    roles = model.parameter_roles()
    matrices = {id(p) for n, p in model.named_parameters() if roles[n] == "matrix"}
    assert matrices <= set(inside)


def test_padding_rows_are_not_counted(model: Any) -> None:
    padding = (64 - 50) * 32 * sum(p.shape[0] == 64 for p in model.parameters())
    assert model.parameter_count() == sum(p.numel() for p in model.parameters()) - padding


def test_cached_body_matches_a_full_pass(model: Any, idx: Tensor) -> None:
    cache = model.new_cache(3, 17)
    assert cache.length == 0
    with torch.no_grad():
        parts = [model.body(idx[:, :9], cache)]
        cache.advance(9)
        for t in range(9, 17):
            parts.append(model.body(idx[:, t : t + 1], cache))
            cache.advance(1)
        torch.testing.assert_close(torch.cat(parts, 1), model.body(idx), rtol=1e-4, atol=1e-5)


def test_positions_and_mask_separate_two_texts(model: Any, idx: Tensor) -> None:
    """Two texts in one row, where the second does not see the first."""
    T = idx.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[4:, :4] = False  # the second text does not see the first
    positions = torch.cat([torch.arange(4), torch.arange(T - 4)])
    with torch.no_grad():
        both = model.body(idx, positions=positions, mask=mask.view(1, 1, T, T))
        torch.testing.assert_close(both[:, :4], model.body(idx[:, :4]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[:, 4:], model.body(idx[:, 4:]), rtol=1e-4, atol=1e-5)


def test_lookup_finds_the_models() -> None:
    assert lookup.models() == {"gpt2": GPT2, "modern": Modern}
    assert lookup.model_for(GPT2Config()) is GPT2
    assert lookup.model_for(ModernConfig()) is Modern

"""Our GPT-2 equals the one in `transformers` for all four sizes; `verify` detects differences."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from rekindle.errors import UserError
from rekindle.interop import huggingface
from rekindle.interop.verify import Report, Row, verify
from rekindle.model import gpt2

Break = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("size", "layers"),
    [
        ("gpt2", 2),
        pytest.param("gpt2-medium", 2, marks=pytest.mark.slow),
        pytest.param("gpt2-large", 1, marks=pytest.mark.slow),
        pytest.param("gpt2-xl", 1, marks=pytest.mark.slow),
    ],
)
def test_random_weights_of_every_size_agree(size: str, layers: int) -> None:
    """With the real width, but fewer blocks to save time and memory."""
    report = verify(size, random_weights=True, layers=layers)
    assert report.passed, report.table()
    assert [row.what for row in report.rows] == ["logits", "loss", "text", "gradients"]
    assert report.rows[0].difference > 0  # the two implementations really are different ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny `transformers` model, random in every tensor, as `save_pretrained` writes it."""
    import transformers

    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=128, vocab_size=211)
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    path = tmp_path_factory.mktemp("tiny")
    theirs.save_pretrained(path)
    return path


def test_folder_with_another_depth_agrees(folder: Path) -> None:
    report = verify(str(folder))
    assert report.passed, report.table()
    assert report.as_dict()["passed"] is True
    assert "verdict: the same function" in report.table()


def wrong_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: gpt2.MLP, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))

    monkeypatch.setattr(gpt2.MLP, "forward", forward)


def square_weight_not_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(name for name in huggingface._CONV1D if name != "attn.c_proj.weight")
    monkeypatch.setattr(huggingface, "_CONV1D", names)


def changed_after_loading(change: Callable[[gpt2.GPT2], Any]) -> Break:
    """Load a model correctly, then apply `change` to it."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        right = huggingface.from_pretrained

        def wrong(name: str) -> gpt2.GPT2:
            model = right(name)
            with torch.no_grad():
                change(model)
            return model

        monkeypatch.setattr(huggingface, "from_pretrained", wrong)

    return apply


def block(model: gpt2.GPT2, i: int) -> gpt2.Block:
    found = model.transformer.h[i]
    assert isinstance(found, gpt2.Block)
    return found


def wrong_eps(model: gpt2.GPT2) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6


def queries_and_keys_exchanged(model: gpt2.GPT2) -> None:
    c_attn = block(model, 0).attn.c_attn
    for p in (c_attn.weight, c_attn.bias):
        q, k, v = p.chunk(3)
        p.copy_(torch.cat([k, q, v]))


def head_untied(model: gpt2.GPT2) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())


def norms_exchanged(model: gpt2.GPT2) -> None:
    second = block(model, 1)
    second.ln_1, second.ln_2 = second.ln_2, second.ln_1


def bias_forgotten(model: gpt2.GPT2) -> None:
    block(model, 2).mlp.c_proj.bias.zero_()


def heads_wrong(model: gpt2.GPT2) -> None:
    model.config = replace(model.config, n_head=2)  # the cache uses this value
    for i in range(model.config.n_layer):
        block(model, i).attn.n_head = 2


def everywhere_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that also sees later tokens."""
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        gpt2.F, "scaled_dot_product_attention", lambda q, k, v, **how: plain(q, k, v)
    )


def frozen(model: gpt2.GPT2) -> None:
    """The forward pass is right; only a gradient is wrong."""
    model.transformer.wpe.weight.register_hook(lambda grad: grad * 1.01)


def wrong_cache_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only text generation uses the cache, so only the text differs."""
    from rekindle.model.cache import KVCache

    def advance(self: KVCache, positions: int) -> None:
        self.length += positions
        if positions > 1:  # the prompt: its last position is overwritten
            self.length -= 1

    monkeypatch.setattr(KVCache, "advance", advance)


@pytest.mark.parametrize(
    ("break_it", "shows_in"),
    [
        (wrong_gelu, "logits"),
        (square_weight_not_transposed, "logits"),
        (everywhere_causal, "logits"),
        (changed_after_loading(wrong_eps), "logits"),
        (changed_after_loading(queries_and_keys_exchanged), "logits"),
        (changed_after_loading(norms_exchanged), "logits"),
        (changed_after_loading(bias_forgotten), "logits"),
        (changed_after_loading(heads_wrong), "logits"),
        (changed_after_loading(frozen), "gradients"),
        (wrong_cache_positions, "text"),
    ],
    ids=[
        "erf GELU", "transpose", "causality", "eps", "queries and keys", "norms", "bias", "heads",
        "gradient", "cache",
    ],
)  # fmt: skip
def test_wrong_model_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, break_it: Break, shows_in: str
) -> None:
    break_it(monkeypatch)
    report = verify(str(folder))
    assert not report.passed
    assert not next(row for row in report.rows if row.what == shows_in).passed
    assert "NOT the same function" in report.table()


def test_untied_head_is_detected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are right, but the head has a separate gradient, which the embedding lacks."""
    changed_after_loading(head_untied)(monkeypatch)
    with pytest.raises(UserError, match=r"no gradient for lm_head\.weight"):
        verify(str(folder))


def test_nan_does_not_pass() -> None:
    assert Row("logits", 1e-5, 1e-4, "").passed
    assert not Row("logits", 2e-4, 1e-4, "").passed
    assert not Row("logits", math.nan, 1e-4, "").passed
    assert not Report("x", (Row("a", 0, 1, ""), Row("b", math.nan, 1, ""))).passed


def test_exit_status_of_verify(
    folder: Path, rekindle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rekindle("verify", folder).status == 0
    wrong_gelu(monkeypatch)
    assert rekindle("verify", folder).status == 1


def test_invalid_requests_to_verify_are_user_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--layers needs --random-weights"):
        verify(str(folder), layers=2)
    with pytest.raises(UserError, match="needs a size"):
        verify("gpt3", random_weights=True)
    with pytest.raises(UserError, match="is not a run or a checkpoint"):
        verify(str(tmp_path))


def test_missing_transformers_names_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'rekindle\[verify\]'"):
        verify("gpt2", random_weights=True)

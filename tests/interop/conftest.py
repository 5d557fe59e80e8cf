"""A tiny GPT-2, saved in Hugging Face's layout without `transformers`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # OpenAI's Conv1D: (in, out)


@pytest.fixture(scope="session")
def model() -> GPT2:
    """Random in every tensor, so that swapped tensors are detected."""
    torch.manual_seed(0)
    model = GPT2(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=101, padded_vocab_size=101
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def describe(model: GPT2) -> dict[str, Any]:
    """The `config.json` of `model`."""
    c = model.config
    return {
        "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05,
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
        "n_positions": c.block_size, "n_ctx": c.block_size, "vocab_size": c.vocab_size,
    }  # fmt: skip


def export(
    model: GPT2, prefix: str = "", dtype: torch.dtype = torch.float32, buffers: bool = False
) -> dict[str, Tensor]:
    """The tensors of `model` with the names and orientation of Hugging Face's files."""
    tensors = {}
    for name, p in model.named_parameters():
        tensor = p.detach().t() if name.endswith(TRANSPOSED) else p.detach()
        tensors[prefix + name.removeprefix("transformer.")] = tensor.to(dtype).contiguous()
    for i in range(model.config.n_layer if buffers else 0):
        mask = torch.ones(1, 1, 64, 64).tril()
        tensors[f"{prefix}h.{i}.attn.bias"] = mask.clone()
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


@pytest.fixture
def folder(tmp_path: Path, model: GPT2) -> Callable[..., Path]:
    """`folder(config={...}, tensors={...}, prefix=..., dtype=...)`: a folder in that layout, with
    the given configuration fields and tensors replaced (None removes one)."""

    def make(
        config: Any = None, tensors: dict[str, Tensor | None] | None = None, **how: Any
    ) -> Path:
        path = tmp_path / "exported"
        path.mkdir()
        described = {**describe(model), **(config or {})}
        (path / "config.json").write_text(
            json.dumps({key: value for key, value in described.items() if value is not None})
        )
        weights = {**export(model, **how), **(tensors or {})}
        save_file(
            {name: t for name, t in weights.items() if t is not None}, path / "model.safetensors"
        )
        return path

    return make

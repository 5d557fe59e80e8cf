"""Weights that contradict GPT-2 or each other are rejected, and nothing is silently dropped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rekindle.errors import UserError
from rekindle.interop.huggingface import from_pretrained
from rekindle.loading import load
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device
from tests.interop.conftest import describe, export

CPU = Device(torch.device("cpu"), "CPU", "fp32")
TIED = "transformer.wte.weight"


def embedding(model: GPT2) -> Tensor:
    return model.lm_head.weight.detach().clone()


def change_one_element(head: Tensor) -> Tensor:
    head[100, 31] += 1e-3
    return head


@pytest.mark.parametrize(
    "change",
    [change_one_element, lambda head: head * 2, lambda head: head.half(), lambda head: head[:90]],
    ids=["one element", "scaled", "rounded", "fewer rows"],
)
def test_separate_head_is_rejected_with_that_reason(
    folder: Callable[..., Path], model: GPT2, change: Callable[[Tensor], Tensor]
) -> None:
    """Regardless of config.json, which does not mention tying here."""
    path = folder(prefix="transformer.", tensors={"lm_head.weight": change(embedding(model))})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from .*wte\.weight.*tied") as e:
        from_pretrained(path)
    assert str(path) in str(e.value)


def test_tied_head_may_contain_nan(folder: Callable[..., Path], model: GPT2) -> None:
    """nan is not equal to nan, but equal tensors with nan are still tied."""
    broken = embedding(model)
    broken[3, 4] = float("nan")
    read = from_pretrained(folder(tensors={"wte.weight": broken, "lm_head.weight": broken.clone()}))
    assert torch.equal(read.lm_head.weight, broken) is False
    assert read.lm_head.weight.isnan().sum() == 1


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_tied_weight_may_be_stored_as_the_head(
    folder: Callable[..., Path], model: GPT2, prefix: str
) -> None:
    path = folder(
        prefix=prefix, tensors={f"{prefix}wte.weight": None, "lm_head.weight": embedding(model)}
    )
    read = from_pretrained(path)
    assert torch.equal(read.transformer.wte.weight, embedding(model))
    assert read.lm_head.weight is read.transformer.wte.weight


@pytest.mark.parametrize("name", ["wpe.weight", "h.1.attn.c_attn.bias", "ln_f.bias"])
def test_two_tensors_for_one_weight_are_rejected(
    folder: Callable[..., Path], model: GPT2, name: str
) -> None:
    own = export(model)[name]
    path = folder(prefix="transformer.", tensors={name: own + 1})
    with pytest.raises(UserError, match=f"transformer.{name} twice"):
        from_pretrained(path)


@pytest.mark.parametrize(
    "name",
    ["h.2.attn.bias", "transformer.h.9.attn.masked_bias", "vision.attn.bias", "h.x.attn.bias"],
)
def test_mask_of_a_missing_block_is_rejected(folder: Callable[..., Path], name: str) -> None:
    with pytest.raises(UserError, match="is missing or unknown"):
        from_pretrained(folder(tensors={name: torch.ones(1, 1, 64, 64)}))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "mine.Model"}}, "auto_map"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"n_ctx": 32}, "n_ctx"),
    ],
)
def test_config_fields_that_contradict_gpt2_are_rejected(
    folder: Callable[..., Path], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=f"config.json: {reason} is"):
        from_pretrained(folder(config))


def test_error_in_weights_names_their_file(folder: Callable[..., Path]) -> None:
    path = folder(tensors={"h.1.ln_2.bias": None, "score.weight": torch.zeros(2, 32)})
    with pytest.raises(UserError) as caught:
        from_pretrained(path)
    assert str(path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "in several files"),
        (["pytorch_model.bin"], "pytorch_model.bin, a pickle"),
        (["adapter_model.safetensors"], "adapter_model.safetensors"),
    ],
)
def test_weights_in_another_format_are_rejected_with_advice(
    folder: Callable[..., Path], files: list[str], words: str
) -> None:
    path = folder()
    (path / "model.safetensors").unlink()
    for name in files:
        (path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=words) as caught:
        from_pretrained(path)
    assert "save_pretrained" in str(caught.value)


@pytest.mark.parametrize("rows", [50304, 50258, 50260])
def test_more_rows_than_the_tokenizer_has_ids(tmp_path: Path, rows: int) -> None:
    """The extra rows may be padding or ids of a larger vocabulary, so the model is rejected."""
    from rekindle.model.gpt2_config import GPT2Config

    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=2, block_size=4, vocab_size=rows))
    (tmp_path / "config.json").write_text(json.dumps(describe(model)))
    save_file(export(model), tmp_path / "model.safetensors")
    words = rf"{rows} rows.*50257 ids.*{rows - 50257} extra"
    with pytest.raises(UserError, match=words):
        load(str(tmp_path), CPU)


def test_folder_with_a_non_utf8_name_is_read(folder: Callable[..., Path], model: GPT2) -> None:
    import os

    path = folder()
    strange = path.rename(path.with_name(os.fsdecode(b"r\xe9sultat")))
    assert torch.equal(from_pretrained(strange).lm_head.weight, model.lm_head.weight)

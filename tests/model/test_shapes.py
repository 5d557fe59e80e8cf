"""Expected shapes come from the model itself, whatever sizes a file claims."""

import dataclasses
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.model.shapes import check_shapes, expected_shapes, on_meta

TINY = GPT2Config(
    n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=50, padded_vocab_size=64
)


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in GPT2(TINY).named_parameters()}


def test_expected_shapes_match_a_real_model(shapes: dict[str, tuple[int, ...]]) -> None:
    expected = expected_shapes(GPT2, TINY, shapes)
    assert expected == shapes
    check_shapes(shapes, expected)


def test_meta_model_uses_no_memory_and_no_random_numbers() -> None:
    before = torch.get_rng_state()
    model = on_meta(GPT2, TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.is_meta and p.requires_grad for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_meta_model_does_not_import_the_compiler(
    python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """It would take 2 seconds, even to load a model."""
    script = """
import sys
from rekindle.model.gpt2 import GPT2, GPT2Config
from rekindle.model.shapes import on_meta
on_meta(GPT2, GPT2Config())
assert "sympy" not in sys.modules
"""
    child = python("-c", script)
    assert child.returncode == 0, child.stderr


def test_differing_tensors_are_named(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(UserError, match=r"transformer\.h\.2\.ln_1\.weight is missing or unknown"):
        check_shapes(shapes, expected_shapes(GPT2, dataclasses.replace(TINY, n_layer=3), shapes))
    expected = expected_shapes(GPT2, TINY, shapes)
    with pytest.raises(UserError, match="more is missing or unknown"):
        check_shapes({**shapes, "more": (1,)}, expected)
    with pytest.raises(UserError, match=r"ln_f\.bias has shape \(1,\), not \(32,\)"):
        check_shapes({**shapes, "transformer.ln_f.bias": (1,)}, expected)


@pytest.mark.parametrize("n_layer", [29, 10**9, 10**40])
def test_more_layers_than_tensors_are_rejected_before_building(
    shapes: dict[str, tuple[int, ...]], n_layer: int
) -> None:
    def built(config: GPT2Config) -> nn.Module:
        pytest.fail("a model was built")

    config = dataclasses.replace(TINY, n_layer=n_layer)
    with pytest.raises(UserError, match=f"n_layer is {n_layer}, but there are only 28 tensors"):
        expected_shapes(built, config, shapes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": 2**40}, {"n_embd": 2**70}, {"block_size": 10**40},
        {"vocab_size": 2**62, "padded_vocab_size": 2**62},
    ],
)  # fmt: skip
def test_impossible_tensor_sizes_are_rejected(
    shapes: dict[str, tuple[int, ...]], sizes: dict[str, int]
) -> None:
    with pytest.raises(UserError, match="of these sizes cannot be built") as caught:
        expected_shapes(GPT2, dataclasses.replace(TINY, **sizes), shapes)
    assert "\n" not in str(caught.value)

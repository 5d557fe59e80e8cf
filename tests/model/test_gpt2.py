"""The model is GPT-2: its parameters, their initialization, and what it computes."""

import dataclasses
import hashlib
import math
import platform
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import rekindle
from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import SIZES, GPT2Config
from rekindle.model.shapes import on_meta

# Hash of the initial weights of the lecture's own script, on torch 2.13 and 2.15.
LECTURE_SHA256 = "5343694de440a599e5c15ef21e00f484bc2b7246a91d01ac221160724bce3c56"
TINY = GPT2Config(
    n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=50, padded_vocab_size=64
)


def expected_shapes(c: GPT2Config) -> dict[str, tuple[int, ...]]:
    """The tensors of OpenAI's checkpoint, with linear weights in PyTorch's layout, (out, in)."""
    C = c.n_embd
    shapes = {
        "transformer.wte.weight": (c.padded_vocab_size, C),
        "transformer.wpe.weight": (c.block_size, C),
        "transformer.ln_f.weight": (C,),
        "transformer.ln_f.bias": (C,),
    }
    for i in range(c.n_layer):
        h = f"transformer.h.{i}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{h}.{norm}.weight": (C,), f"{h}.{norm}.bias": (C,)}
        for linear, out, into in (
            ("attn.c_attn", 3 * C, C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", 4 * C, C),
            ("mlp.c_proj", C, 4 * C),
        ):
            shapes |= {f"{h}.{linear}.weight": (out, into), f"{h}.{linear}.bias": (out,)}
    return shapes


@pytest.fixture(scope="module")
def lecture_model() -> GPT2:
    """GPT-2 124M, initialized as in the lecture's script."""
    torch.manual_seed(1337)
    return GPT2(SIZES["gpt2"].for_training())


@pytest.fixture
def model() -> GPT2:
    """A tiny GPT-2 with weights so large that every part affects the logits."""
    torch.manual_seed(0)
    model = GPT2(TINY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


@pytest.fixture
def idx() -> torch.Tensor:
    return torch.randint(TINY.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))


SAME_NUMBERS = platform.machine() in (
    "x86_64", "AMD64",
) and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # fmt: skip


@pytest.mark.skipif(not SAME_NUMBERS, reason="PyTorch draws other normal numbers")
def test_initial_weights_match_the_lecture_byte_for_byte(lecture_model: GPT2) -> None:
    digest = hashlib.sha256()
    for p in lecture_model.parameters():
        digest.update(p.detach().numpy().tobytes())
    assert digest.hexdigest() == LECTURE_SHA256


@pytest.mark.skipif(not SAME_NUMBERS, reason="PyTorch draws other normal numbers")
def test_initial_weights_of_a_tiny_model_never_change() -> None:
    """The seed of an old run must still give the same run, for any model shape."""
    torch.manual_seed(1337)
    model = GPT2(GPT2Config(2, 2, 16, 32, vocab_size=257, padded_vocab_size=384))
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode() + p.detach().numpy().tobytes())
    assert digest.hexdigest() == "22905886cf7e7720157de983bc5858b13ee5664d8b40d58516ff5847b59b91dc"
    layer = dict(model.named_parameters())["transformer.h.1.mlp.c_proj.weight"]
    seen = layer.detach().flatten()[:3].tolist()
    assert seen == pytest.approx([0.0030479454, 0.0078486791, 0.0108168209], rel=1e-6)


def test_initial_statistics_of_every_parameter(lecture_model: GPT2) -> None:
    residual = 0.02 / math.sqrt(2 * 12)
    for name, p in lecture_model.named_parameters():
        if ".ln_" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        else:
            std = residual if "c_proj" in name else 0.02
            # For n normal numbers, the standard error is std/√n for the mean and std/√(2n) for the
            # standard deviation; allow 6 of them.
            assert p.mean().item() == pytest.approx(0, abs=6 * std / math.sqrt(p.numel())), name
            assert p.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * p.numel())), name


@pytest.mark.parametrize("size", SIZES)
def test_parameters_have_gpt2_names_and_shapes(size: str) -> None:
    config = SIZES[size]
    model = on_meta(GPT2, config)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == expected_shapes(config)
    assert model.state_dict().keys() == expected_shapes(config).keys() | {"lm_head.weight"}


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts_of_the_published_sizes(size: str, count: int) -> None:
    assert on_meta(GPT2, SIZES[size]).parameter_count() == count
    assert on_meta(GPT2, SIZES[size].for_training()).parameter_count() == count


def test_training_pads_the_vocabulary_to_a_multiple_of_128() -> None:
    assert SIZES["gpt2"].padded_vocab_size == 50257
    padded = SIZES["gpt2"].for_training()
    assert (padded.vocab_size, padded.padded_vocab_size) == (50257, 50304)
    for vocabulary, rows in ((256, 256), (257, 384)):
        assert GPT2Config(vocab_size=vocabulary).for_training().padded_vocab_size == rows


def test_head_and_token_embedding_share_one_parameter(model: GPT2, idx: torch.Tensor) -> None:
    assert model.lm_head.weight is model.transformer.wte.weight
    unused = int(idx.max()) + 1  # not in the input, so its gradient can only come from the head
    _, loss = model(idx, idx)
    loss.backward()
    gradient = model.transformer.wte.weight.grad
    assert gradient is not None
    assert gradient[unused].abs().max() > 0


def test_logits_without_targets_and_a_loss_with_them(model: GPT2, idx: torch.Tensor) -> None:
    logits, loss = model(idx)
    assert logits.shape == (3, 17, TINY.vocab_size)  # without padding rows
    assert loss is None
    logits, loss = model(idx, idx)
    assert logits is None
    assert loss.shape == ()
    assert loss.requires_grad


def test_loss_is_the_mean_cross_entropy_over_padded_logits(model: GPT2, idx: torch.Tensor) -> None:
    x, y = idx[:, :-1], idx[:, 1:]
    _, loss = model(x, y)
    logits = model.transformer(x) @ model.transformer.wte.weight.t()  # (B, T, padded)
    assert logits.shape[-1] == TINY.padded_vocab_size
    expected = -logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    visible, _ = model(x)
    assert torch.equal(visible, logits[..., : TINY.vocab_size])
    without_padding = F.cross_entropy(visible.flatten(0, 1), y.flatten())
    assert loss.item() > without_padding.item() + 1e-3  # the padding makes a difference


def test_ignored_targets_do_not_affect_the_loss(model: GPT2, idx: torch.Tensor) -> None:
    y = idx.roll(-1, 1)
    half = y.clone()
    half[:, 9:] = -100
    _, loss = model(idx, half)
    _, alone = model(idx[:, :9], y[:, :9])
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)


def test_attention_is_causal(model: GPT2, idx: torch.Tensor) -> None:
    other = idx.clone()
    other[:, 10] = (other[:, 10] + 1) % TINY.vocab_size
    with torch.no_grad():
        before, after = model(idx)[0], model(other)[0]
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-5)
    assert ((before - after)[:, 10:].abs().amax(-1) > 1e-3).all()  # and changes all later positions


def test_position_changes_the_logits(model: GPT2) -> None:
    with torch.no_grad():
        logits, _ = model(torch.full((1, 5), 7))
    assert (logits[0, 1:] - logits[0, :-1]).abs().amax(-1).min() > 1e-3


def test_context_longer_than_block_size_is_rejected(model: GPT2) -> None:
    model(torch.zeros(1, TINY.block_size, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size = 24"):
        model(torch.zeros(1, TINY.block_size + 1, dtype=torch.long))


def test_flops_per_token_match_pytorchs_counter() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    T = 16
    with torch.device("meta"):
        model = GPT2(TINY)
        x = torch.zeros(2, T, dtype=torch.long)
    # Plain attention, whose backward pass does not recompute anything.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, loss = model(x, x)
        loss.backward()
    assert counter.get_total_flops() == model.flops_per_token(T) * x.numel()


@pytest.mark.parametrize(
    ("config", "rows"), [(SIZES["gpt2"], 50_257), (SIZES["gpt2"].for_training(), 50_304)]
)
def test_flops_per_token_match_the_palm_paper(config: GPT2Config, rows: int) -> None:
    """6 N + 12 L C T, where N are GPT-2's 124M weights in matmuls: 0.85 GFLOPs per token."""
    weights = 12 * 12 * 768**2 + rows * 768
    flops = on_meta(GPT2, config).flops_per_token(1024)
    assert flops == 6 * weights + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"n_embd": 100}, "n_embd 100 is not a multiple of n_head 12"),
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1, but is 0"),
        ({"n_head": -12}, "n_head must be a whole number of at least 1, but is -12"),
        ({"block_size": 1024.0}, "block_size must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"padded_vocab_size": 50_256}, "padded_vocab_size 50256 is less than vocab_size 50257"),
    ],
)
def test_invalid_sizes_are_rejected(sizes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        GPT2Config(**sizes)
    assert "\n" not in str(caught.value)


def test_embedding_has_vocab_size_rows_unless_padded() -> None:
    assert GPT2Config(vocab_size=257).padded_vocab_size == 257
    assert GPT2Config(vocab_size=257, padded_vocab_size=384).padded_vocab_size == 384
    assert GPT2Config() == SIZES["gpt2"]


def test_from_dict_requires_every_field() -> None:
    described = dataclasses.asdict(TINY)
    assert GPT2Config.from_dict({**described, "more": 1}) == TINY
    for name in described:
        for wrong in (None, 0, "2", True):
            with pytest.raises(UserError, match=f"^{name} is missing or not a positive whole"):
                GPT2Config.from_dict({**described, name: wrong})
    with pytest.raises(UserError, match="not a multiple of n_head"):
        GPT2Config.from_dict({**described, "n_head": 3})


def test_package_exports_the_model() -> None:
    assert rekindle.GPT2 is GPT2
    assert rekindle.GPT2Config is GPT2Config

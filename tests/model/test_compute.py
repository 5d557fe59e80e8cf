"""All compute settings give the same losses and gradients as the plainest one; masks and positions
that do not change the meaning do not change the result."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rekindle.model.attention import attend
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2, LayerNorm
from rekindle.model.gpt2_config import GPT2Config

CONFIG = GPT2Config(
    n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=257, padded_vocab_size=384
)
PLAINEST = Compute(attention="plain")


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(257, (3, 33), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_and_gradients(model: GPT2, batch: tuple[Tensor, Tensor]) -> tuple[float, dict]:
    model.zero_grad()
    _, loss = model(*batch)
    assert loss is not None
    assert loss.dtype == torch.float32
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.named_parameters()))
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("compute", "tolerance"),
    [
        (Compute(), 1e-5),
        (Compute(separate_qkv=True), 1e-5),
        (Compute(recompute=True), 1e-5),
        (Compute(loss_kernel=True, mlp_kernel=True), 1e-5),  # on a CPU: their PyTorch reference
        (Compute(dtype=torch.bfloat16), 4e-2),
        (Compute(dtype=torch.bfloat16, loss_kernel=True), 4e-2),
        (Compute(dtype=torch.bfloat16, attention="plain", separate_qkv=True), 4e-2),
    ],
    ids=[
        "fused attention",
        "separate qkv",
        "recompute",
        "kernels",
        "bf16",
        "bf16 loss kernel",
        "bf16 plain",
    ],
)
def test_all_compute_settings_agree(
    model: GPT2, batch: tuple[Tensor, Tensor], compute: Compute, tolerance: float
) -> None:
    loss, gradients = loss_and_gradients(model.use(PLAINEST), batch)
    other, others = loss_and_gradients(model.use(compute), batch)
    assert other == pytest.approx(loss, rel=tolerance / 10)
    for name, expected in gradients.items():
        assert others[name].dtype == torch.float32
        error = (others[name] - expected).norm() / expected.norm()
        assert error < tolerance, (name, error)


def test_bf16_activations_with_float32_weights(model: GPT2, batch: tuple[Tensor, Tensor]) -> None:
    seen = []
    model.transformer.h[1].register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    model.use(Compute(dtype=torch.bfloat16))(*batch)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bf16_does_not_round_layer_norm_weights_or_gradients() -> None:
    torch.manual_seed(0)
    norm, x = LayerNorm(64), torch.randn(50, 64).bfloat16()
    with torch.no_grad():
        norm.weight.fill_(1 + 2**-9)  # bf16 would round it to 1
        norm.bias.fill_(2**-12)
    with torch.no_grad():
        inference = norm(x)
    y = norm(x)
    exact = F.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double(), norm.eps)
    for found in (inference, y):
        assert found.dtype == torch.bfloat16
        assert (found == exact.bfloat16()).float().mean() > 0.99
    upstream = torch.randn(50, 64).bfloat16()
    y.backward(upstream)
    normed = F.layer_norm(x.double(), (64,), eps=norm.eps)
    assert norm.weight.grad is not None
    exact = (upstream * normed).sum(0)
    torch.testing.assert_close(norm.weight.grad.double(), exact, rtol=1e-4, atol=1e-4)


def test_training_passes_no_mask(
    model: GPT2, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's backward pass with a mask is NaN at some lengths (pytorch#196678)."""
    masks, fused = [], F.scaled_dot_product_attention

    def watch(*qkv: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        masks.append((attn_mask, is_causal))
        return fused(*qkv, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    loss_and_gradients(model, batch)
    assert masks == CONFIG.n_layer * [(None, True)]


def test_recompute_saves_less_for_the_backward_pass(
    model: GPT2, batch: tuple[Tensor, Tensor]
) -> None:
    def kept(compute: Compute) -> int:
        sizes: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model.use(compute)(*batch)
        return sum(sizes.values())

    assert kept(Compute(recompute=True)) < kept(Compute()) / 2


@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_mask_separates_two_texts_in_one_row(model: GPT2, attention: str) -> None:
    """Two texts in one row that cannot see each other give the results of separate rows."""
    model.use(Compute(attention=attention))
    a, b = torch.randint(257, (1, 7)), torch.randint(257, (1, 9))
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., :7, :7] = torch.ones(7, 7).tril()
    mask[..., 7:, 7:] = torch.ones(9, 9).tril()
    positions = torch.cat([torch.arange(7), torch.arange(9)])
    both = model.transformer(torch.cat([a, b], 1), positions=positions, mask=mask)
    torch.testing.assert_close(both[:, :7], model.transformer(a), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[:, 7:], model.transformer(b), rtol=1e-4, atol=1e-5)


def test_plain_attention_matches_fused_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, None, causal=True), expected)

"""The cache with fixed shapes, compiled or not, matches the growing one; weights cast once give the
same results as weights cast each time."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from rekindle.model.attention import attend, attend_once, prefer_attend_once
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.model.modern import Modern
from rekindle.model.modern_config import ModernConfig
from rekindle.runtime.device import why_not_compile
from rekindle.sampling import decoding as sampling
from rekindle.sampling import generate, predict

CONFIG = GPT2Config(
    n_layer=3, n_head=4, n_embd=48, block_size=64, vocab_size=257, padded_vocab_size=384
)
PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are compiled. They run as traced, without Inductor."""
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(predict, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(sampling, "compile_step", lambda: step)
    monkeypatch.setattr(sampling, "SLOTS", 16)
    return seen


def fixed(model: GPT2, idx: Tensor, prompt: int, capacity: int, fill: float = 0.0) -> Tensor:
    """Logits after each token of `idx` (B, T) from the end of the prompt on, with a fixed cache.
    `fill` is added to its unused slots."""
    cache = model.new_cache(idx.shape[0], capacity)
    with torch.no_grad():
        parts = [predict(model, idx[:, :prompt], cache)]
        cache.advance(prompt)
        cache.fix()
        for layer in range(CONFIG.n_layer):
            cache[layer].k[:, :, prompt:] += fill
            cache[layer].v[:, :, prompt:] += fill
        for i in range(prompt, idx.shape[1]):
            parts.append(predict(model, idx[:, i : i + 1], cache))
            cache.advance(1)
    return torch.stack(parts, 1)


@pytest.mark.parametrize("attention", ["fused", "plain"])
@pytest.mark.parametrize(("prompt", "capacity"), [(1, 20), (7, 20), (7, 48), (19, 64), (20, 20)])
def test_fixed_cache_matches_a_full_pass(
    model: GPT2, prompt: int, capacity: int, attention: str
) -> None:
    """Also at full capacity. The content of unused slots does not matter."""
    model.use(Compute(attention=attention))
    idx = torch.randint(CONFIG.vocab_size, (3, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full, _ = model(idx)
    steps = fixed(model, idx, prompt, capacity)
    torch.testing.assert_close(steps, full[:, prompt - 1 :], rtol=1e-4, atol=1e-4)
    assert torch.equal(steps, fixed(model, idx, prompt, capacity, fill=1e4))


def test_single_query_attention_matches_attention(model: GPT2) -> None:
    """Exactly in float32, and up to rounding in bf16, where the model uses it."""
    q, k, v = torch.randn(3, 4, 1, 8), torch.randn(3, 4, 10, 8), torch.randn(3, 4, 10, 8)
    mask = (torch.arange(10) <= 6).view(1, 1, 1, 10)
    for m in (None, mask):
        torch.testing.assert_close(attend_once(q, k, v, m), attend(q, k, v, m, causal=False))
    idx = torch.randint(CONFIG.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))
    model.use(Compute(dtype=torch.bfloat16)).cast(torch.bfloat16)
    with torch.no_grad():
        full = model(idx)[0][:, 6:].float()
    error = (fixed(model, idx, 7, 48, fill=1e4).float() - full).norm() / full.norm()
    assert error < 0.03


def test_single_query_attention_computes_softmax_in_float32() -> None:
    """Products of small integers are exact in bf16, so only the rounding of the weights remains.
    Scores of 60 in bf16 would be off by up to 1/8."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-4, 5, (1, 2, T, 8), generator=random) for T in (1, 16))
    k[..., 0, :] = q[..., 0, :]  # one large score, so that the scores differ
    scores = (k.double() @ q.double().transpose(-2, -1)).squeeze(-1) / 8**0.5
    v = torch.eye(16).expand(1, 2, 16, 16)
    seen = attend_once(q.bfloat16(), k.bfloat16(), v.bfloat16(), None).squeeze(-2)
    torch.testing.assert_close(seen.double(), scores.softmax(-1), rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize(
    ("device", "dtype", "T", "once"),
    [
        ("cpu", torch.bfloat16, 1, True),
        ("cpu", torch.bfloat16, 2, False),
        ("cpu", torch.float32, 1, False),
        ("cuda", torch.bfloat16, 1, True),
        ("cuda", torch.float32, 1, True),
        ("cuda", torch.bfloat16, 2, False),
    ],
)
def test_when_one_query_uses_explicit_attention(
    device: str, dtype: torch.dtype, T: int, once: bool
) -> None:
    """On a GPU, cuDNN would build a plan for every length of a growing cache."""
    with FakeTensorMode():
        assert prefer_attend_once(torch.empty(2, 3, T, 8, dtype=dtype, device=device)) == once


def test_compiled_decoding_keeps_fused_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        assert not prefer_attend_once(torch.empty(2, 3, 1, 8, device="cuda"))


MODERN = ModernConfig(
    n_layer=3, head_size=16, n_embd=48, block_size=64, vocab_size=257, padded_vocab_size=384,
    value_embeddings=1, window=4,
)  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), [(GPT2, CONFIG), (Modern, MODERN)])
def test_on_a_gpu_only_the_prompt_uses_fused_attention(
    kind: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def fused(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        lengths.append(q.shape[2])
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model = kind(config)
        cache = model.new_cache(2, 16)
        for T in (5, 1, 1):
            logits = predict(model, torch.zeros(2, T, dtype=torch.long), cache)
            cache.advance(T)
            assert logits.shape == (2, 257)
    assert lengths == [5] * config.n_layer


def test_unfilled_slots_contain_zeros(model: GPT2) -> None:
    """Their attention weight is zero, but zero times NaN in uninitialized memory would be NaN."""
    cache = model.new_cache(2, 32)
    with torch.no_grad():
        predict(model, torch.tensor([PROMPT]), cache)
    for layer in range(CONFIG.n_layer):
        assert cache[layer].k.shape[0] == 2  # the single row was copied to both
        assert torch.equal(cache[layer].v[0], cache[layer].v[1])
        assert not cache[layer].k[:, :, len(PROMPT) :].any()
        assert not cache[layer].v[:, :, len(PROMPT) :].any()


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("length", [1, 5, 33])
def test_compiled_text_matches_eager(model: GPT2, graphs: list[Any], num: int, length: int) -> None:
    prompt = list(range(40, 40 + length))
    for tokens in (1, 2, CONFIG.block_size - length):
        for temperature in (0, 1):
            text = functools.partial(
                generate, model, prompt, tokens, num=num, temperature=temperature
            )
            compiled = text(compile=True)
            assert torch.equal(compiled, text())
            plain = text(use_cache=False)
            assert torch.equal(compiled, plain)
    assert graphs


@pytest.mark.parametrize("num", [1, 2])
def test_step_is_compiled_once_for_texts_of_similar_length(
    model: GPT2, graphs: list[Any], num: int
) -> None:
    for tokens in (20, 23, 27, 20):  # at most 32 with the prompt
        generate(model, PROMPT, tokens, num=num, compile=True)
    assert len(graphs) == 1
    generate(model, PROMPT, 40, num=num, compile=True)
    assert len(graphs) == 2


@pytest.mark.timeout(600)
def test_inductors_text_matches_eager(model: GPT2) -> None:
    if reason := why_not_compile(torch.device("cpu")):
        pytest.skip(reason)
    torch._dynamo.reset()
    expected = generate(model, PROMPT, 50, num=2, temperature=0)
    assert torch.equal(generate(model, PROMPT, 50, num=2, temperature=0, compile=True), expected)


def test_weights_cast_once_match_autocast(model: GPT2) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, PROMPT, 50, num=2)
        assert torch.equal(generate(model.cast(torch.bfloat16), PROMPT, 50, num=2), expected)
    assert torch.equal(generate(model, PROMPT, 50, num=2), expected)  # without autocast, too


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_weights_cast_once_are_not_cast_again(
    model: GPT2, monkeypatch: pytest.MonkeyPatch, stream: torch.dtype
) -> None:
    embedding = model.transformer.wte.weight
    model.use(Compute(dtype=stream)).cast(torch.bfloat16)
    own = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Linear)}
    used = []
    linear = F.linear

    def note(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        used.append(weight.data_ptr())
        assert input.dtype == weight.dtype == torch.bfloat16
        return linear(input, weight, bias)

    monkeypatch.setattr(F, "linear", note)
    generate(model, PROMPT, 4)
    assert len(used) == 4 * (4 * CONFIG.n_layer + 1)
    assert set(used) == own
    assert model.transformer.wte.weight is embedding  # the token embedding stays float32
    assert embedding.dtype == torch.float32


def test_bf16_text_is_the_same_without_a_cast(model: GPT2) -> None:
    model.use(Compute(dtype=torch.bfloat16))
    expected = generate(model, PROMPT, 30, temperature=0)
    assert torch.equal(generate(model.cast(torch.bfloat16), PROMPT, 30, temperature=0), expected)


def test_column_layout_keeps_the_weights(model: GPT2) -> None:
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = generate(model, PROMPT, 50)
    model.cast(torch.float32, rows=1)
    assert not model.lm_head.weight.is_contiguous()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(generate(model, PROMPT, 50), expected)


def test_draw_matches_multinomial_exactly() -> None:
    logits = torch.randn(64, 257)
    for top_k in (0, 50):
        drawn, total = sampling.draw(logits, 0.8, top_k, torch.Generator().manual_seed(5))
        assert float(total) == pytest.approx(64)
        values, ids = (logits / 0.8).topk(top_k or 257)
        if not top_k:
            values, ids = logits / 0.8, torch.arange(257).expand(64, -1)
        random = torch.Generator().manual_seed(5)
        expected = ids.gather(1, torch.multinomial(values.softmax(-1), 1, generator=random))
        assert torch.equal(drawn, expected.squeeze(1))

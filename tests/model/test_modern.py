"""The modern model against its definition, implemented here in float64 for one token and one head
at a time; its switches, its cache and its gradients."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rekindle.errors import UserError
from rekindle.evaluate.scoring import tree_mask
from rekindle.model import kernels, modern
from rekindle.model.attention import attend_blocks
from rekindle.model.compute import Compute
from rekindle.model.modern import Modern
from rekindle.model.modern_config import ModernConfig
from rekindle.runtime.device import why_not_compile
from rekindle.sampling import decoding as sampling
from rekindle.sampling import generate, predict

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ModernConfig(
    n_layer=5, n_embd=24, head_size=8, block_size=24, vocab_size=50, padded_vocab_size=64,
    rotary_base=10, soft_cap=5.0, value_embeddings=2, window=4, document_token=7,
)  # fmt: skip
PLAIN: dict[str, Any] = {
    "rotary_base": 0, "qk_norm": False, "relu_squared": False, "zero_init": False, "untied": False,
    "soft_cap": 0.0, "value_embeddings": 0, "value_gates": False, "embedding_shortcut": False,
    "window": 0, "document_token": -1,
}  # fmt: skip
OFF = [{}, *({name: value} for name, value in PLAIN.items()), PLAIN]


def make_model(config: ModernConfig, **changes: Any) -> Any:
    """A model with weights so large that every part affects the logits."""
    torch.manual_seed(0)
    model = Modern(dataclasses.replace(config, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


@pytest.fixture
def model() -> Modern:
    return make_model(TINY)


@pytest.fixture
def idx() -> Tensor:
    """Documents begin inside rows; one row starts with a document, one has no document start."""
    idx = torch.randint(8, 50, (3, 17), generator=torch.Generator().manual_seed(1))
    idx[0, 0] = idx[0, 9] = idx[1, 5] = idx[1, 6] = TINY.document_token
    return idx


# ---- The definition ------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean() + 1e-6).sqrt()


def rotated(x: Tensor, position: int, base: int) -> Tensor:
    """One head's query or key: pair i is channels i and i + D / 2, as one complex number."""
    D = len(x)
    if not base:
        return x
    y = x.clone()
    for i in range(D // 4):
        angle = position * base ** (-i / (D // 4 - 1))
        z = complex(x[i], x[i + D // 2]) * complex(math.cos(angle), -math.sin(angle))
        y[i], y[i + D // 2] = z.real, z.imag
    return y


def reference(model: Modern, tokens: list[int]) -> Tensor:
    """Logits (T, V) of one row, in float64."""
    c = model.config
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    head = w["lm_head.weight"] if c.untied else w["wte.weight"]
    D, T = c.head_size, len(tokens)
    first = [unit(w["wte.weight"][t]) for t in tokens]
    stream = list(first)
    for layer in range(c.n_layer):
        name = f"h.{layer}."
        tables = [*range(c.value_embeddings), *[None] * (c.n_layer - 2 * c.value_embeddings)]
        table = [*tables, *range(c.value_embeddings)][layer]
        if c.embedding_shortcut:
            a, b = w[name + "shortcut"]
            stream = [a * x + b * e for x, e in zip(stream, first, strict=True)]
        read = [unit(x) for x in stream]
        q, k, v = ([w[f"{name}attn.{part}.weight"] @ x for x in read] for part in "qkv")
        if table is not None:
            for t in range(T):
                for h in range(c.n_embd // D):
                    gate = torch.tensor(1.0)
                    if c.value_gates:
                        gate = w[name + "attn.gate.weight"][h] @ read[t][:12]
                        gate = 2 / (1 + torch.exp(-gate))
                    span = slice(h * D, (h + 1) * D)
                    v[t][span] += gate * w[f"values.{table}.weight"][tokens[t]][span]
        written = []
        for t in range(T):
            begin = max([0] + [s for s in range(t + 1) if tokens[s] == c.document_token])
            if c.window and layer in (0, 1, 2):  # of five; the fourth and the last have no window
                begin = max(begin, t - c.window + 1)
            parts = []
            for h in range(c.n_embd // D):
                span = slice(h * D, (h + 1) * D)
                query = unit(q[t][span]) if c.qk_norm else q[t][span]
                keys = [unit(k[s][span]) if c.qk_norm else k[s][span] for s in range(begin, t + 1)]
                scale = 15.36 / D if c.qk_norm else 1 / math.sqrt(D)
                query = rotated(query, t, c.rotary_base)
                scores = torch.stack(
                    [scale * (query @ rotated(key, begin + s, c.rotary_base))
                     for s, key in enumerate(keys)]
                )  # fmt: skip
                weights = scores.exp() / scores.exp().sum()
                parts.append(sum(p * v[begin + s][span] for s, p in enumerate(weights)))
            written.append(w[name + "attn.proj.weight"] @ torch.cat(parts))
        stream = [x + y for x, y in zip(stream, written, strict=True)]
        for t in range(T):
            hidden = w[name + "mlp.fc.weight"] @ unit(stream[t])
            hidden = (
                hidden.clamp(min=0) ** 2 if c.relu_squared else F.gelu(hidden, approximate="tanh")
            )
            stream[t] = stream[t] + w[name + "mlp.proj.weight"] @ hidden
    logits = torch.stack([head @ unit(x) for x in stream])
    return logits * c.soft_cap / (logits**2 + c.soft_cap**2).sqrt() if c.soft_cap else logits


@pytest.mark.parametrize("off", OFF, ids=lambda off: ", ".join(off) if len(off) < 2 else "plain")
def test_logits_match_the_definition(off: dict[str, Any], idx: Tensor) -> None:
    idx = idx[:2, :11]
    model = make_model(TINY, **off).double()
    expected = torch.stack([reference(model, row) for row in idx.tolist()])
    for attention in ("plain", "fused"):
        model.use(Compute(torch.float64, attention=attention))
        logits = model.head(model.body(idx)).detach().double()
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_rotary_positions_rotate_the_first_half_of_the_pairs(model: Any) -> None:
    x = torch.randn(1, 2, 1, 8, dtype=torch.float64)
    rotation = model._rotation(torch.tensor([0, 3]))
    assert rotation is not None
    seen = modern.rotate(x, rotation)
    torch.testing.assert_close(seen[:, 0], x[:, 0])  # position 0
    for channels, still in (([0, 4], False), ([1, 5], False), ([2, 6], True), ([3, 7], True)):
        before, after = x[0, 1, 0, channels], seen[0, 1, 0, channels]
        assert after.norm().item() == pytest.approx(before.norm().item(), rel=1e-6)
        assert torch.equal(before, after) == still


def test_attention_depends_only_on_relative_positions(idx: Tensor) -> None:
    """Shifting all positions does not change the result."""
    model = make_model(TINY).double().use(Compute(torch.float64))
    near, far = (model.body(idx, positions=torch.arange(17) + start) for start in (0, 400))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("off", OFF, ids=lambda off: ", ".join(off) if len(off) < 2 else "plain")
def test_every_switch_changes_the_logits(off: dict[str, Any], idx: Tensor) -> None:
    model, other = make_model(TINY), make_model(TINY, **off)
    same = {n: p for n, p in model.named_parameters() if n in other.state_dict()}
    other.load_state_dict(same, strict=False)
    with torch.no_grad():
        changed = not torch.allclose(model(idx)[0], other(idx)[0], atol=1e-3)
    # Zero initialization only changes the initial weights, which are overwritten here.
    assert changed == (off not in ({}, {"zero_init": False}))


def test_gradients_match_finite_differences(idx: Tensor) -> None:
    """For every parameter of the body and for the soft-cap, in a random direction."""
    model = make_model(TINY).double().use(Compute(torch.float64))
    upstream = torch.randn(3, 17, 24, dtype=torch.float64)
    random = torch.Generator().manual_seed(5)

    def value() -> Tensor:
        x = model.body(idx) * upstream
        return kernels.soft_cap(3 * x, 5.0).sum()

    value().backward()
    for name, p in model.named_parameters():
        if name == "lm_head.weight":
            continue
        assert p.grad is not None, name
        way = torch.randn(p.shape, generator=random, dtype=torch.float64)
        expected = (p.grad * way).sum().item()
        sides = []
        for h in (1e-6, -2e-6):
            with torch.no_grad():
                p.add_(way, alpha=h)
                sides.append(value().item())
        with torch.no_grad():
            p.add_(way, alpha=1e-6)
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(expected, rel=1e-4, abs=1e-4), name


def test_logits_are_capped_in_float32() -> None:
    model = make_model(TINY, soft_cap=2.0).use(Compute(dtype=torch.bfloat16))
    x = torch.randn(7, 24).bfloat16()
    plain = model.lm_head(x).float()
    logits = model.head(x)
    assert logits.dtype == torch.float32
    assert logits.abs().max() < 2 < plain.abs().max()
    torch.testing.assert_close(logits, 2 * plain / (plain**2 + 4).sqrt())


# ---- Windows, documents, caches ------------------------------------------------------------------


def changed_by(model: Any, idx: Tensor, position: int) -> list[bool]:
    """Which positions of a single row change when the token at `position` changes."""
    other = idx.clone()
    other[0, position] = 49 if idx[0, position] != 49 else 48
    with torch.no_grad():
        difference = (model(idx)[0] - model(other)[0]).abs().amax(-1)
    return (difference[0] > 1e-5).tolist()


def test_window_limits_the_reach_of_attention(idx: Tensor) -> None:
    """Three layers with a window of 3 tokens, and a last layer without. With attention disabled in
    the last layer, a token reaches at most 6 positions ahead."""
    model = make_model(TINY, n_layer=4, window=3, document_token=-1)
    row = idx[2:]
    assert changed_by(model, row, 2) == [t >= 2 for t in range(17)]
    with torch.no_grad():
        model.h[3].attn.proj.weight.zero_()
    assert changed_by(model, row, 2) == [2 <= t <= 2 + 3 * 2 for t in range(17)]


def test_attention_stays_within_documents(model: Any, idx: Tensor) -> None:
    assert changed_by(model, idx[:1], 4) == [4 <= t < 9 for t in range(17)]
    assert changed_by(model, idx[:1], 12) == [t >= 12 for t in range(17)]
    with torch.no_grad():
        full = model(idx[:1])[0]
        parts = [model(idx[:1, :9])[0], model(idx[:1, 9:])[0]]
    torch.testing.assert_close(full, torch.cat(parts, 1), rtol=1e-4, atol=1e-4)


CACHED = [{}, {"window": 0}, {"document_token": -1}, {"window": 0, "document_token": -1}]


@pytest.mark.parametrize("changes", CACHED, ids=["both", "documents", "window", "neither"])
@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize("prompt", [1, 7, 11])
def test_cached_logits_match_uncached(
    changes: dict[str, Any], fix: bool, prompt: int, idx: Tensor
) -> None:
    """The single row of the prompt becomes three, which then differ in tokens and documents."""
    model = make_model(TINY, **changes)
    idx = idx.clone()
    idx[:, :prompt] = idx[0, :prompt]
    cache = model.new_cache(3, 20)
    with torch.no_grad():
        full = model(idx)[0][:, prompt - 1 :]
        logits = [predict(model, idx[:1, :prompt], cache).expand(3, -1)]
        cache.advance(prompt)
        if fix:
            cache.fix()
        for t in range(prompt, 17):
            logits.append(predict(model, idx[:, t : t + 1], cache))
            cache.advance(1)
    torch.testing.assert_close(torch.stack(logits, 1), full, rtol=1e-4, atol=1e-4)


def test_compiled_text_matches_eager_with_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step has fixed shapes and its position is a tensor, so it is compiled only once."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = make_model(TINY, block_size=64, document_token=16)
    expected = generate(model, [8, 9, 10], 40, num=3, use_cache=False)
    assert (expected[:, 3:] == 16).any(1).all()
    assert torch.equal(generate(model, [8, 9, 10], 40, num=3), expected)
    torch._dynamo.reset()
    step = torch.compile(predict, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(sampling, "compile_step", lambda: step)
    assert torch.equal(generate(model, [8, 9, 10], 40, num=3, compile=True), expected)
    assert len(graphs) == 1


def test_prompt_in_parts_is_rejected(idx: Tensor) -> None:
    model = make_model(TINY, window=0, document_token=-1)
    cache = model.new_cache(3, 20)
    model.body(idx[:, :5], cache)
    cache.advance(5)
    with pytest.raises(ValueError, match="the prompt at once"):
        model.body(idx[:, 5:7], cache)
    with pytest.raises(ValueError, match="block_size = 24"):
        model(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize("attention", ["plain", "fused", "flex"])
def test_packed_rows_match_separate_texts(model: Any, idx: Tensor, attention: str) -> None:
    """A context and two candidates in one row, as evaluation packs them. Windows reach into the
    context, and a document that begins in the first candidate does not affect the second."""
    model.use(Compute(attention=attention))
    context, first, second = idx[0, :10], idx[1, 3:8], idx[2, :6]
    assert (first == TINY.document_token).any()
    segments = torch.tensor([[0] * 10 + [1] * 5 + [2] * 6])
    positions = torch.tensor([[*range(10), *range(10, 15), *range(10, 16)]])
    row = torch.cat([context, first, second])[None]
    with torch.no_grad():
        packed = model.body(row, positions=positions, mask=tree_mask(segments))[0]
        apart = [model.body(torch.cat([context, c])[None])[0] for c in (first, second)]
    expected = torch.cat([apart[0], apart[1][10:]])
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


# ---- Ways to compute -----------------------------------------------------------------------------


def gradients(forward: Any, model: Any, idx: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    _, loss = forward(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of its norm; tiny ones within 1 % of the total norm."""
    assert found.keys() == expected.keys()
    size = torch.stack([tensor.norm() for tensor in expected.values()]).norm()
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / max(tensor.norm(), size / 100)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize(
    ("compute", "tolerance"),
    [
        (Compute(attention="plain"), 1e-5),
        (Compute(recompute=True), 1e-5),
        (Compute(dtype=torch.bfloat16), 0.2),
        (Compute(loss_kernel=True), 1e-5),
    ],
    ids=["plain attention", "recompute", "bf16", "loss kernel"],
)
def test_all_compute_settings_agree(
    model: Any, idx: Tensor, compute: Compute, tolerance: float
) -> None:
    expected = gradients(model, model, idx)
    assert len(expected) == len(list(model.parameters())) + 1
    assert_near(gradients(model.use(compute), model, idx), expected, tolerance)


@torch.no_grad()  # FlexAttention has no backward on a CPU
@pytest.mark.parametrize("changes", [{}, {"window": 0}, {"document_token": -1}, PLAIN])
def test_flex_attention_matches(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several of its blocks of 128. It is used only if windows or documents mask tokens."""
    calls: list[float] = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(1 - arguments[3].to_dense().float().mean().item())
        return attend_blocks(*arguments)

    monkeypatch.setattr(modern, "attend_blocks", counted)
    model = make_model(TINY, **{"block_size": 300, "window": 40, **changes})
    idx = torch.randint(8, 50, (2, 300), generator=torch.Generator().manual_seed(1))
    idx[0, 140] = idx[1, 10] = TINY.document_token
    expected = model(idx)[0]
    assert not calls
    found = model.use(Compute(attention="flex"))(idx)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == (0 if changes is PLAIN else 5)
    if "window" not in changes:
        assert calls[0] > calls[3] > 0.3  # of the blocks are skipped
    cache = model.new_cache(2, 300)
    predict(model, idx[:, :299], cache)
    cache.advance(299)
    found = predict(model, idx[:, 299:], cache)
    torch.testing.assert_close(found, expected[:, -1], rtol=1e-4, atol=1e-4)


def test_autocast_multiplies_in_bf16(model: Any, idx: Tensor) -> None:
    """As by default on a CPU. Attention is bf16 too, although rotary angles are float32."""
    expected, seen = gradients(model, model, idx), []
    attend = model.h[0].attn._attend

    def note(*qkv: Tensor | None) -> Tensor:
        seen.extend(t.dtype for t in qkv[:3] if t is not None)
        return attend(*qkv)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(model.h[0].attn, "_attend", note)
        assert_near(gradients(model, model, idx), expected, 0.2)
        assert model.body(idx).dtype == torch.float32
    assert set(seen) == {torch.bfloat16}


def test_bf16_activations_with_float32_weights(model: Any, idx: Tensor) -> None:
    seen = []
    model.h[1].register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    model.use(Compute(dtype=torch.bfloat16))(idx)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_recompute_saves_less_for_the_backward_pass(model: Any, idx: Tensor) -> None:
    def kept(compute: Compute) -> int:
        sizes: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model.use(compute)(idx, idx)
        return sum(sizes.values())

    assert kept(Compute(recompute=True)) < kept(Compute()) / 2


@pytest.mark.parametrize(
    "compute",
    [
        Compute(),
        Compute(attention="plain", recompute=True),
        Compute(dtype=torch.bfloat16, loss_kernel=True),
    ],
    ids=["default", "plain attention, recompute", "bf16, plain form of the loss kernel"],
)
def test_training_is_one_graph(idx: Tensor, compute: Compute) -> None:
    """Windows and documents included. What can be traced depends on the version of torch: see
    `make test-oldest`."""
    model = make_model(TINY, n_layer=2, value_embeddings=1).use(compute)
    expected = gradients(model, model, idx)
    torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    assert_near(gradients(traced, model, idx), expected, 1e-5)


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.timeout(600)
def test_compiled_matches_eager(idx: Tensor) -> None:
    if reason := why_not_compile(torch.device("cpu")):
        pytest.skip(reason)
    model = make_model(TINY, n_layer=2, value_embeddings=1)
    expected = gradients(model, model, idx)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    assert_near(gradients(compiled, model, idx), expected, 1e-4)


# ---- Configuration, roles, counts ----------------------------------------------------------------


def test_largest_score_does_not_depend_on_head_size() -> None:
    """15.36 for equal normalized queries and keys; the scale is 0.12 for heads of 128."""
    assert ModernConfig(head_size=128).attention_scale == pytest.approx(0.12)
    assert ModernConfig(head_size=32).attention_scale == pytest.approx(0.48)
    assert ModernConfig(head_size=64, qk_norm=False).attention_scale == 1 / 8
    for D in (8, 24):
        model = make_model(TINY, head_size=D, rotary_base=0)
        scores = []
        query = model.h[0].attn.k.weight  # makes queries equal to keys
        model.h[0].attn.q.weight = query
        model.h[0].attn._attend = lambda q, k, v, mask, to=scores: to.append((q, k)) or v
        model.body(torch.tensor([[3]]))
        ((q, k),) = scores
        assert (q * k).sum(-1).flatten().tolist() == pytest.approx(
            [15.36 * D**0.5] * (24 // D), rel=1e-4
        )  # attention then divides by sqrt(D)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, n_embd=96, head_size=32)
    model = Modern(config)
    std = {"embedding": 1.0, "value_embedding": 0.33**0.5 / 96**0.5, "matrix": 0.33**0.5 / 96**0.5}
    for name, p in model.named_parameters():
        role = model.parameter_roles()[name]
        if "proj" in name or role in ("head", "vector"):
            assert not p.any(), name
        elif role == "scalar":
            assert p.tolist() == [1, 0]
        else:
            assert p.std().item() == pytest.approx(std[role], rel=0.1), name
    _, loss = model(torch.arange(20)[None], torch.arange(20)[None])
    assert loss.item() == pytest.approx(math.log(64), rel=1e-5)  # all tokens are equally likely
    for name, p in Modern(dataclasses.replace(config, zero_init=False)).named_parameters():
        assert "proj" not in name or p.std() > 0.03
    tied = Modern(dataclasses.replace(config, untied=False, soft_cap=0.0))
    assert tied.lm_head.weight is tied.wte.weight
    assert tied.wte.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_roles(model: Any) -> None:
    roles = model.parameter_roles()
    assert roles["wte.weight"] == "embedding"
    assert roles["values.1.weight"] == "value_embedding"
    assert roles["lm_head.weight"] == "head"
    assert roles["h.0.shortcut"] == "scalar"
    assert roles["h.0.attn.gate.weight"] == "vector"
    assert "h.2.attn.gate.weight" not in roles  # the layer in the middle has no value embedding
    matrices = [name for name, role in roles.items() if role == "matrix"]
    assert len(matrices) == 5 * 6
    assert "lm_head.weight" not in make_model(TINY, untied=False).parameter_roles()


def test_padding_rows_are_not_counted(model: Any) -> None:
    everything = sum(p.numel() for p in model.parameters())
    assert model.parameter_count() == everything - 4 * 14 * 24
    tied = make_model(TINY, untied=False)
    assert tied.parameter_count() == model.parameter_count() - 50 * 24
    full = Modern(ModernConfig(n_layer=1, value_embeddings=0))
    assert full.parameter_count() == 12 * 768**2 + 2 * 50257 * 768 + 2


@pytest.mark.parametrize("window", [0, 4, 20])
def test_flops_per_token_match_pytorchs_counter(window: int) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    T = 16
    with torch.device("meta"):
        model = Modern(dataclasses.replace(TINY, window=window, document_token=-1))
        x = torch.zeros(2, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, loss = model(x, x)
        loss.backward()
    hidden = 12 * TINY.n_embd * 3 * (T - window) if window == 4 else 0  # computed although masked
    assert counter.get_total_flops() == (model.flops_per_token(T) + hidden) * x.numel()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"n_embd": 100}, "head_size 128 must be a multiple of 4 that divides n_embd 100"),
        ({"n_embd": 60, "head_size": 6}, "head_size 6 must be a multiple of 4"),
        ({"n_layer": 0}, "n_layer must be a whole number of at least 1, but is 0"),
        ({"block_size": 1024.0}, "block_size must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"qk_norm": 1}, "qk_norm must be true or false, but is 1"),
        ({"soft_cap": -1.0}, "soft_cap must be a number of at least 0, but is -1.0"),
        ({"soft_cap": math.nan}, "soft_cap must be a number"),
        ({"soft_cap": math.inf}, "soft_cap must be a number"),
        ({"window": -1}, "window must be a whole number of at least 0, but is -1"),
        ({"document_token": -2}, "document_token must be a whole number of at least -1"),
        ({"document_token": 50257}, "document_token 50257 is not in the vocabulary"),
        ({"value_embeddings": 7}, "value_embeddings 7 is more than half of n_layer 12"),
        ({"padded_vocab_size": 50_256}, "padded_vocab_size 50256 is less than vocab_size 50257"),
    ],
)
def test_invalid_values_are_rejected(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        ModernConfig(**values)
    assert "\n" not in str(caught.value)


def test_from_dict_requires_every_field() -> None:
    described = json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert ModernConfig.from_dict({**described, "more": 1}) == TINY
    for name in described:
        with pytest.raises(UserError, match=f"^{name} is missing"):
            ModernConfig.from_dict({k: v for k, v in described.items() if k != name})
        for wrong in (None, "2", []):
            with pytest.raises(UserError, match=f"^{name} must be"):
                ModernConfig.from_dict({**described, name: wrong})


def test_vocabulary_is_padded_for_training() -> None:
    assert ModernConfig().for_training().padded_vocab_size == 50_304
    assert ModernConfig(vocab_size=257).padded_vocab_size == 257
    assert ModernConfig(vocab_size=257).for_training().padded_vocab_size == 384

"""The modern model: GPT-2 with the improvements of public training speed records.

Each idea has a switch in `ModernConfig`, next to its source and its measured benefit.

Shapes in comments: B sequences in a batch, T positions, S keys, C = n_embd channels,
H heads of size D, V rows of the (padded) vocabulary.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rekindle.model import kernels
from rekindle.model.attention import attend, attend_blocks, attend_once, prefer_attend_once
from rekindle.model.cache import KVCache, LayerCache
from rekindle.model.compute import Compute
from rekindle.model.fp8 import fp8_linear
from rekindle.model.linear import Linear, cast_linears, losses_in_pieces
from rekindle.model.masks import visible_tokens
from rekindle.model.modern_config import ModernConfig

GATE_CHANNELS = 12  # of the residual stream, read by the gates of value embeddings
ROLES = {
    "wte": "embedding",  # and the head, if it is tied
    "values": "value_embedding",
    "lm_head": "head",
    "gate": "vector",
    "shortcut": "scalar",
}

Rotation = tuple[Tensor, Tensor]  # cosines and sines, (B or 1, T, 1, D / 2)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters: unit mean square over the channels. The next matrix can learn any
    scale [modded-nanogpt]."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions: rotate each pair of channels of (B, T, H, D). Keeps the type of `x`."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-head attention; each position attends to itself and all earlier ones."""

    compute: Compute = Compute()

    def __init__(self, config: ModernConfig, has_value: bool) -> None:
        super().__init__()
        self.config = config
        C = config.n_embd
        # Three matrices, not one with three times the rows: Muon orthogonalizes each separately.
        self.q, self.k, self.v = (Linear(C, C, bias=False) for _ in range(3))
        self.proj = Linear(C, C, bias=False)
        gated = has_value and config.value_gates
        channels = min(GATE_CHANNELS, C)
        self.gate = Linear(channels, C // config.head_size, bias=False) if gated else None

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        value: Tensor | None,  # (B, T, C) value embedding of each token
        rotation: Rotation | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        c, (B, T, C) = self.config, x.shape
        heads = (B, T, C // c.head_size, c.head_size)
        q, k, v = (linear(x).view(heads) for linear in (self.q, self.k, self.v))
        if value is not None:
            value = value.view(heads).type_as(v)
            if self.gate is not None:
                gate = 2 * self.gate(x[..., : self.gate.in_features]).sigmoid()  # (B, T, H)
                value = value * gate.unsqueeze(-1)
            v = v + value
        if c.qk_norm:
            q, k = norm(q).type_as(v), norm(k).type_as(v)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q = q * (c.attention_scale * c.head_size**0.5)  # attention itself divides by sqrt(D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        if mask is None and k.shape[2] > T > 1:
            raise ValueError("a cache takes the prompt at once, then one token at a time")
        return self.proj(self._attend(q, k, v, mask).transpose(1, 2).reshape(B, T, C))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        causal = mask is None and q.shape[2] > 1  # a single new position attends to all
        if mask is not None and not torch.is_tensor(mask):  # FlexAttention's block mask
            return attend_blocks(q, k, v, mask)
        if prefer_attend_once(q):
            return attend_once(q, k, v, mask)
        if self.compute.attention == "plain":
            return attend(q, k, v, mask, causal)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class MLP(nn.Module):
    """Two linear layers with the square of ReLU in between."""

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.relu_squared = config.relu_squared
        self.fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.proj(F.relu(x).square() if self.relu_squared else F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModernConfig, has_value: bool) -> None:
        super().__init__()
        self.shortcut = nn.Parameter(torch.empty(2)) if config.embedding_shortcut else None
        self.attn = Attention(config, has_value)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, first: Tensor, *attention: Any) -> Tensor:
        """`first` (B, T, C): the normalized embedding. `attention`: more inputs of `Attention`."""
        if self.shortcut is not None:
            stream, embedding = self.shortcut.to(x.dtype).unbind()
            x = stream * x + embedding * first
        x = x + self.attn(norm(x), *attention)
        return x + self.mlp(norm(x))


class Modern(nn.Module):
    """The modern language model."""

    Config: ClassVar = ModernConfig
    has_fp8_head: ClassVar = True  # supports `Compute(fp8_head=True)`
    compute: Compute = Compute()

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        self.config = config
        V, C, tables = config.padded_vocab_size, config.n_embd, config.value_embeddings
        self.wte = nn.Embedding(V, C)
        self.values = nn.ModuleList(nn.Embedding(V, C) for _ in range(tables))
        self.h = nn.ModuleList(
            Block(config, self._table(i) is not None) for i in range(config.n_layer)
        )
        self.lm_head = Linear(C, V, bias=False)
        if not config.untied:
            self.lm_head.weight = self.wte.weight
        self._init_weights()

    def _table(self, layer: int) -> int | None:
        """The value embedding of a layer, if any; the first and the last layers share them."""
        tables, from_end = self.config.value_embeddings, self.config.n_layer - 1 - layer
        return layer if layer < tables else tables - 1 - from_end if from_end < tables else None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The residual blocks in order: the units of sharding and activation checkpointing."""
        return list(self.h)

    def use(self, compute: Compute) -> "Modern":
        """Set how the model computes; returns the model. The weights do not change."""
        for module in self.modules():
            if isinstance(module, Attention | Modern):
                module.compute = compute
        return self

    def cast(self, dtype: torch.dtype, rows: int = 0) -> "Modern":
        """Cast the weights of all matmuls once, for sampling; returns the model."""
        cast_linears(self, dtype, rows)
        return self

    def _init_weights(self) -> None:
        c = self.config
        for name, p in self.named_parameters():
            if name == "wte.weight":  # also of a tied head
                nn.init.normal_(p, std=1.0 if c.untied else 0.02)
            elif "shortcut" in name:
                nn.init.zeros_(p[1:])
                nn.init.ones_(p[:1])
            elif "gate" in name or (c.zero_init and ("proj" in name or "lm_head" in name)):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=(0.33 / c.n_embd) ** 0.5)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) → logits or, with `targets`, the loss, as in `LanguageModel`. Raises
        `ValueError` if T plus the length of the cache exceeds `block_size`."""
        if idx.shape[1] + (0 if cache is None else cache.length) > self.config.block_size:
            raise ValueError(f"the context is longer than block_size = {self.config.block_size}")
        x = self.body(idx, cache)  # (B, T, C)
        if targets is not None and self.compute.loss_kernel:
            x, y, weight = x.flatten(0, 1), targets.flatten(), self.lm_head.weight.to(x.dtype)
            return None, kernels.linear_cross_entropy(x, weight, y, cap=self.config.soft_cap)
        logits = self.head(x)  # (B, T, V)
        if targets is None:
            return logits[..., : self.config.vocab_size], None
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def body(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids → the head's input (B, T, C). `positions` (T,) or (B, T) and `mask`
        (B or 1, 1, T, S) as in `LanguageModel`; windows and documents mask further tokens."""
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + idx.shape[1], device=idx.device)
        rotation = self._rotation(positions)
        flex = self.compute.attention == "flex"
        full, near = visible_tokens(self.config, idx, cache, positions, mask, flex=flex)
        x = first = norm(self.wte(idx)).to(self.compute.dtype)  # (B, T, C)
        values = [table(idx) for table in self.values]
        for i, block in enumerate(self.h):
            value = None if (table := self._table(i)) is None else values[table]
            visible = near if self.config.is_windowed(i) else full
            inputs = (x, first, value, rotation, visible)
            if self.compute.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs, None if cache is None else cache[i])
        return norm(x)

    def _rotation(self, positions: Tensor) -> Rotation | None:
        """Cosines and sines of the rotary angles. Half of the pairs rotate, by 1 to 1 / rotary_base
        radians per token; the others do not depend on the position."""
        base, pairs = self.config.rotary_base, self.config.head_size // 4
        if not base:
            return None
        exponents = torch.linspace(0, -1, pairs, device=positions.device)
        rates = torch.cat([base**exponents, torch.zeros_like(exponents)])  # (D / 2,)
        angles = (positions.unsqueeze(-1) * rates).unsqueeze(-2)  # (T, 1, D / 2)
        return angles.cos(), angles.sin()

    def head(self, x: Tensor) -> Tensor:
        """(..., C) → logits (..., V) in float32, padding rows included."""
        fp8 = self.compute.fp8_head and torch.is_grad_enabled()
        logits = fp8_linear(x, self.lm_head.weight) if fp8 else self.lm_head(x)
        return kernels.soft_cap(logits.float(), self.config.soft_cap)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """(N, C), (N,) targets → the cross-entropy of each in nats, (N,) float32, 0 where it is
        -100. Without gradients, only the logits of `HEAD_ROWS` rows are held at a time."""
        return losses_in_pieces(self.head, x, targets)

    def parameter_roles(self) -> dict[str, str]:
        """Role of each parameter; those without an entry in `ROLES` are matrices."""
        return {
            name: next((ROLES[part] for part in name.split(".") if part in ROLES), "matrix")
            for name, _ in self.named_parameters()
        }

    def parameter_count(self) -> int:
        """Number of weights, without the padding rows of the embeddings and the head."""
        c = self.config
        padding = (c.padded_vocab_size - c.vocab_size) * c.n_embd
        padded = 1 + c.value_embeddings + c.untied
        return sum(p.numel() for p in self.parameters()) - padded * padding

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations per training token in a context of T tokens: 6 for every weight
        of a matmul, plus 12·n_embd per layer and token in its window."""
        c, roles = self.config, self.parameter_roles()
        in_matmuls = ("matrix", "vector")
        weights = sum(p.numel() for n, p in self.named_parameters() if roles[n] in in_matmuls)
        spans = [min(T, c.window) if c.is_windowed(i) else T for i in range(c.n_layer)]
        return 6 * (weights + self.lm_head.weight.numel()) + 12 * c.n_embd * sum(spans)

    def new_cache(self, B: int, capacity: int) -> KVCache:
        """An empty cache. With document masks, an extra last layer holds document numbers."""
        return KVCache(self.config.n_layer + (self.config.document_token >= 0), B, capacity)

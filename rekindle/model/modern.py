"""The modern model: GPT-2's shape with what the public speed records have found since.

Each idea has a switch in `ModernConfig`, where its source and its measured worth stand.

Shapes in comments: B sequences in a batch, T positions, S of them looked at, C = n_embd channels,
H heads of size D, V rows of the (padded) vocabulary.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rekindle.model import kernels
from rekindle.model.attention import attend, attend_blocks, attend_once
from rekindle.model.cache import KVCache, LayerCache
from rekindle.model.compute import Compute
from rekindle.model.fp8 import fp8_linear
from rekindle.model.linear import Linear, cast_linears, losses_in_pieces
from rekindle.model.masks import visible_tokens
from rekindle.model.modern_config import ModernConfig

GATE_CHANNELS = 12  # of the stream, that the gates of the value embeddings read
ROLES = {
    "wte": "embedding",  # and the head, if they are tied
    "values": "value_embedding",
    "lm_head": "head",
    "gate": "vector",
    "shortcut": "scalar",
}

Rotation = tuple[Tensor, Tensor]  # cosines and sines, (B or 1, T, 1, D / 2)


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters: unit mean square over the channels. The matrices that follow
    learn any scale [modded-nanogpt]."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary positions: turn (B, T, H, D) by an angle for each pair of channels, in its type."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    """Every position looks at itself and those before it, in H heads side by side."""

    compute: Compute = Compute()

    def __init__(self, config: ModernConfig, has_value: bool) -> None:
        super().__init__()
        self.config = config
        C = config.n_embd
        # Three matrices, not one of three times the rows: Muon makes each orthogonal by itself.
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
        causal = mask is None and q.shape[2] > 1  # one new position may look at all of them
        if q.shape[2] == 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            return attend_once(q, k, v, mask)
        if mask is not None and not torch.is_tensor(mask):
            return attend_blocks(q, k, v, mask)
        if self.compute.attention == "plain":
            return attend(q, k, v, mask, causal)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class MLP(nn.Module):
    """Two linear layers around the square of ReLU."""

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
        """`first` (B, T, C): the normalised embedding. `attention`: what else attention takes."""
        if self.shortcut is not None:
            stream, embedding = self.shortcut.to(x.dtype).unbind()
            x = stream * x + embedding * first
        x = x + self.attn(norm(x), *attention)
        return x + self.mlp(norm(x))


class Modern(nn.Module):
    """The language model."""

    Config: ClassVar = ModernConfig
    has_fp8_head: ClassVar = True  # if `compute` asks for it
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
        """Which value embedding a layer has, if any: the first and the last layers share them."""
        tables, from_end = self.config.value_embeddings, self.config.n_layer - 1 - layer
        return layer if layer < tables else tables - 1 - from_end if from_end < tables else None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The residual blocks in order: the units of sharding and of recomputation."""
        return list(self.h)

    def use(self, compute: Compute) -> "Modern":
        """Compute like this from now on; returns the model. The weights stay as they are."""
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
            if name == "wte.weight":  # the head's too, if they are tied
                nn.init.normal_(p, std=1.0 if c.untied else 0.02)
            elif "shortcut" in name:
                nn.init.eye_(p[None])  # 1 and 0
            elif "gate" in name or (c.zero_init and ("proj" in name or "lm_head" in name)):
                nn.init.zeros_(p)
            else:
                nn.init.normal_(p, std=(0.33 / c.n_embd) ** 0.5)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) → logits or, with `targets`, the loss, as in `LanguageModel`. Raises
        `ValueError` if T and what the cache holds pass `block_size`."""
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
        """(B, T) token ids → (B, T, C), what the head reads. `positions` (T,) or (B, T) and `mask`
        (B or 1, 1, T, S) as in `LanguageModel`; windows and documents hide more than `mask`."""
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + idx.shape[1], device=idx.device)
        rotation = self._rotation(positions)
        flex = self.compute.attention == "flex"
        masks = visible_tokens(self.config, idx, cache, positions, mask, flex=flex)
        x = first = norm(self.wte(idx)).to(self.compute.dtype)  # (B, T, C)
        values = [table(idx) for table in self.values]
        for i, block in enumerate(self.h):
            value = None if (table := self._table(i)) is None else values[table]
            inputs = (x, first, value, rotation, masks[self.config.is_windowed(i)])
            if self.compute.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs, None if cache is None else cache[i])
        return norm(x)

    def _rotation(self, positions: Tensor) -> Rotation | None:
        """Angles of the rotary positions. Half of the pairs turn, from one radian a token to one
        in `rotary_base`; the others stand still and compare contents alone."""
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
        -100. Without gradients, the logits of at most `HEAD_ROWS` rows exist at a time."""
        return losses_in_pieces(self.head, x, targets)

    def parameter_roles(self) -> dict[str, str]:
        """What each parameter is; those without a line in `ROLES` are matrices."""
        return {
            name: next((ROLES[part] for part in name.split(".") if part in ROLES), "matrix")
            for name, _ in self.named_parameters()
        }

    def parameter_count(self) -> int:
        """Numbers in all parameters, without the padding rows of the embeddings and the head."""
        c = self.config
        padded = (1 + c.value_embeddings + c.untied) * (c.padded_vocab_size - c.vocab_size)
        return sum(p.numel() for p in self.parameters()) - padded * c.n_embd

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations per trained token in a context of T tokens: 6 for every weight
        of a matmul, and 12·n_embd for each token that a layer's window spans."""
        c, roles = self.config, self.parameter_roles()
        in_matmuls = ("matrix", "vector")
        weights = sum(p.numel() for n, p in self.named_parameters() if roles[n] in in_matmuls)
        spans = [min(T, c.window) if c.is_windowed(i) else T for i in range(c.n_layer)]
        return 6 * (weights + self.lm_head.weight.numel()) + 12 * c.n_embd * sum(spans)

    def new_cache(self, B: int, capacity: int) -> KVCache:
        """A key-value cache; with document masks its last layer holds the documents' numbers."""
        return KVCache(self.config.n_layer + (self.config.document_token >= 0), B, capacity)

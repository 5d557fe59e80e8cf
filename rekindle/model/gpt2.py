"""GPT-2: exactly the architecture of Radford et al. 2019, with OpenAI's parameter names.

Shapes in comments: B sequences in a batch, T positions, C = n_embd channels, H heads of size
D = C / H, V rows of the (padded) vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rekindle.model import kernels
from rekindle.model.attention import attend, attend_once, prefer_attend_once
from rekindle.model.cache import KVCache, LayerCache
from rekindle.model.compute import Compute
from rekindle.model.gpt2_config import GPT2Config
from rekindle.model.linear import Linear, cast_linears, losses_in_pieces


class LayerNorm(nn.LayerNorm):
    """Returns its input's type but computes in float32: weights and gradients are not rounded."""

    def forward(self, input: Tensor) -> Tensor:
        # The CPU's kernel accepts bf16 input with float32 weights, but rounds their gradients.
        copied = input.device.type != "cpu" or torch.is_grad_enabled()
        x = input.to(self.weight.dtype) if copied else input
        return super().forward(x).to(input.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention; each position attends to itself and all earlier ones."""

    compute: Compute = Compute()

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self._qkv(x))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D)
        S = k.shape[2]
        if mask is None and S > T > 1:
            raise ValueError("with a cache, pass the prompt at once, then one token at a time")
        causal = mask is None and T > 1  # a single new position attends to all
        if prefer_attend_once(q):
            y = attend_once(q, k, v, mask)
        elif self.compute.attention == "plain":
            y = attend(q, k, v, mask, causal)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # from (B, H, T, D)

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, T, C) each."""
        if not self.compute.separate_qkv:
            return self.c_attn(x).chunk(3, dim=2)
        x, weight, bias = self.c_attn.cast(x)
        assert bias is not None
        return tuple(F.linear(x, w, b) for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))


class MLP(nn.Module):
    """Two linear layers with GELU in between, in the tanh form that OpenAI used."""

    compute: Compute = Compute()

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        if self.compute.mlp_kernel and torch.is_grad_enabled():
            fc, proj = self.c_fc, self.c_proj
            weights = (fc.weight, fc.bias, proj.weight, proj.bias)
            return kernels.fused_mlp(x, *(w.to(x.dtype) for w in weights))
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block: each part reads the normalized stream and adds to it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """All of GPT-2 except its head: tokens → the normalized residual stream."""

    compute: Compute = Compute()

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd)

    def forward(
        self, idx: Tensor, cache: KVCache | None = None, positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T) token ids → (B, T, C).

        `positions` (T,) or (B, T): the tokens' positions in their texts; by default consecutive,
        starting at the end of the cache. `mask` (B or 1, 1, T, S): True where a token may attend to
        one of the S keys (of the cache, or of the T tokens); by default itself and earlier ones.
        """
        if positions is None:
            past = 0 if cache is None else cache.length
            positions = torch.arange(past, past + idx.shape[1], device=idx.device)  # (T,)
        x = (self.wte(idx) + self.wpe(positions)).to(self.compute.dtype)  # (B, T, C)
        for i, block in enumerate(self.h):
            if self.compute.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache[i], mask)
        return self.ln_f(x)


class GPT2(nn.Module):
    """The language model. `state_dict()` has GPT-2's own names; linear weights are (out, in),
    transposed against OpenAI's Conv1D, and `lm_head.weight` is `transformer.wte.weight`."""

    Config: ClassVar = GPT2Config
    compute: Compute = Compute()
    # Set by `rekindle.loading`, since models do not read files: GPT2.from_pretrained("gpt2").
    from_pretrained: ClassVar[Callable[[str | Path], "GPT2"]]

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        # Constructed in the lecture's order, so that its seed gives its initial weights.
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.tie()
        self._init_weights()

    def tie(self) -> None:
        """Share one parameter between the token embedding and the head."""
        self.transformer.wte.weight = self.lm_head.weight

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The residual blocks in order: the units of sharding and activation checkpointing."""
        return list(self.transformer.h)

    def use(self, compute: Compute) -> "GPT2":
        """Set how the model computes; returns the model. The weights do not change."""
        for module in self.modules():
            if isinstance(module, CausalSelfAttention | MLP | Transformer | GPT2):
                module.compute = compute
        return self

    def cast(self, dtype: torch.dtype, rows: int = 0) -> "GPT2":
        """Cast the weights of all matmuls once, for sampling; returns the model."""
        cast_linears(self, dtype, rows)
        return self

    def _init_weights(self) -> None:
        """The lecture's initialization: std 0.02, scaled by 1/sqrt(2·n_layer) for the layers that
        add to the residual stream.

        As in the lecture, PyTorch's default initialization has used the random generator before,
        and the tied embedding is drawn twice.
        """
        residual_std = 0.02 * (2 * self.config.n_layer) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=residual_std if "c_proj" in name else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) → `(logits, loss)`.

        With `targets` (B, T): no logits, and the mean cross-entropy in nats over the targets that
        are not -100. Without: the logits (B, T, vocab_size) and no loss. Padding rows take part in
        the loss' softmax, as in the lecture, but their logits are not returned.
        Raises `ValueError` if T plus the length of the cache exceeds `block_size`.
        """
        if idx.shape[1] + (0 if cache is None else cache.length) > self.config.block_size:
            raise ValueError(f"the context is longer than block_size = {self.config.block_size}")
        x = self.body(idx, cache)  # (B, T, C)
        if targets is not None and self.compute.loss_kernel:
            weight = self.lm_head.weight.to(x.dtype)
            return None, kernels.linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())
        logits = self.head(x)  # (B, T, V)
        if targets is None:
            return logits[..., : self.config.vocab_size], None
        return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def body(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids → the head's input (B, T, C); see `Transformer.forward`."""
        return self.transformer(idx, cache, positions, mask)

    def head(self, x: Tensor) -> Tensor:
        """(..., C) → logits (..., V), padding rows included."""
        return self.lm_head(x)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """(N, C) outputs of the body, (N,) targets → the cross-entropy of each in nats, (N,)
        float32, 0 where the target is -100. Without gradients, few logits are held at a time."""
        return losses_in_pieces(self.head, x, targets)

    def parameter_roles(self) -> dict[str, str]:
        """Role of each parameter: "embedding" (also the tied head), "matrix" or "vector"."""
        embeddings = ("transformer.wte.weight", "transformer.wpe.weight")
        return {
            name: "embedding" if name in embeddings else "matrix" if p.dim() == 2 else "vector"
            for name, p in self.named_parameters()
        }

    def parameter_count(self) -> int:
        """Number of weights and biases, without the padding rows of the embedding."""
        c = self.config
        padding = (c.padded_vocab_size - c.vocab_size) * c.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations per training token in a context of T tokens: 6 for every weight
        of a matmul, including the head's padding rows, plus 12·n_layer·n_embd·T for attention
        without a causal discount, as in appendix B of the PaLM paper."""
        roles = self.parameter_roles()
        weights = sum(p.numel() for n, p in self.named_parameters() if roles[n] == "matrix")
        weights += self.lm_head.weight.numel()
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * T

    def new_cache(self, B: int, capacity: int) -> KVCache:
        """An empty key-value cache for B rows of up to `capacity` positions."""
        return KVCache(self.config.n_layer, B, capacity)

"""GPT-2, exactly: the architecture of Radford et al. 2019 with OpenAI's parameter names.

Shapes in comments: B sequences in a batch, T positions, C = n_embd channels, H heads of size
D = C / H, V rows of the (padded) vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rekindle.model.config import GPT2Config


class LayerCache(Protocol):
    """One layer's keys and values of the positions seen so far (see `generate.cache`)."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, H, T, D) keys and values; return those of all positions, (B, H, past + T, D)."""
        ...


class Cache(Protocol):
    """The key-value cache of a whole model."""

    length: int  # positions already in it

    def __getitem__(self, layer: int) -> LayerCache: ...


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and those before it, in H heads side by side."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(heads).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        causal = True
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, past + T, D)
            if k.shape[2] > T:
                if T > 1:
                    raise ValueError("a cache takes the prompt at once, then one token at a time")
                causal = False  # the newest position may look at all of them
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers around GELU in its tanh form, as OpenAI trained it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block: each part reads the stream normalised and adds to it."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Tokens → the residual stream, normalised: all of GPT-2 but its head."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) token ids → (B, T, C)."""
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + idx.shape[1], device=idx.device)  # (T,)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i])
        return self.ln_f(x)


class GPT2(nn.Module):
    """The language model. `state_dict()` has GPT-2's own names; linear weights are (out, in),
    transposed against OpenAI's Conv1D, and `lm_head.weight` is `transformer.wte.weight`."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        # The order of construction is the lecture's: with its seed it gives its initial weights.
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.tie()
        self._init_weights()

    def tie(self) -> None:
        """Make the table that reads tokens and the head that writes them one parameter."""
        self.transformer.wte.weight = self.lm_head.weight

    def _init_weights(self) -> None:
        """The lecture's: 0.02, and less for what adds to the residual stream 2·n_layer times.

        As there, PyTorch's own initialisers have drawn before, and the tied table is drawn twice.
        """
        residual_std = 0.02 * (2 * self.config.n_layer) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=residual_std if "c_proj" in name else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Token ids (B, T) → `(logits, loss)`.

        With `targets` (B, T), the mean cross-entropy in nats over the targets that are not -100,
        and no logits. Without, the logits (B, T, vocab_size) and no loss. The rows that only pad
        the table count in the loss' softmax, as in the lecture; nobody outside sees their logits.
        Raises `ValueError` if T (and what the cache holds) passes `block_size`.
        """
        if idx.shape[1] + (0 if cache is None else cache.length) > self.config.block_size:
            raise ValueError(f"the context is longer than block_size = {self.config.block_size}")
        logits = self.lm_head(self.transformer(idx, cache))  # (B, T, V)
        if targets is None:
            return logits[..., : self.config.vocab_size], None
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

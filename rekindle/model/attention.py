"""Attention in plain PyTorch, as an alternative to `F.scaled_dot_product_attention`.

Shapes: B sequences, H heads of size D, T queries, S keys.
"""

from typing import Any

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Explicit attention: (B, H, T, D) queries, (B, H, S, D) keys and values → (B, H, T, D).

    `mask` is True where a query may attend to a key. With `causal`, it may attend to itself and
    earlier positions.
    """
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def prefer_attend_once(q: Tensor) -> bool:
    """Whether `attend_once` is faster than fused attention for the queries `q`, (B, H, T, D).

    With bf16 on a CPU, the fused kernel is three times slower at batch size 1 and six times slower
    at 32. On a GPU, cuDNN builds a plan for every new length of the cache, about 30 ms each; a
    compiled step always sees the same length.
    """
    if q.shape[2] > 1:
        return False
    if q.is_cuda:
        return not torch.compiler.is_compiling()
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


def attend_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention for a single query, computed as keys times query: (B, H, 1, D) → (B, H, 1, D)."""
    scores = (k @ q.transpose(-2, -1)).float() * q.shape[-1] ** -0.5  # (B, H, S, 1)
    if mask is not None:
        scores = scores.masked_fill(~mask.transpose(-2, -1), -torch.inf)
    return scores.softmax(-2).to(v.dtype).transpose(-2, -1) @ v


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """The same with FlexAttention and its block `mask`. In a compiled model on a GPU it skips fully
    masked blocks. On a CPU it is slow and has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    y = flex_attention(q, k, v, block_mask=mask)
    assert isinstance(y, Tensor)
    return y

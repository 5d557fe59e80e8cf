"""Attention masks for sliding windows and documents."""

from typing import Any

import torch
from torch import Tensor

from rekindle.model.cache import KVCache
from rekindle.model.modern_config import ModernConfig


def visible_tokens(
    config: ModernConfig,
    idx: Tensor,
    cache: KVCache | None,
    positions: Tensor,
    mask: Tensor | None,
    *,
    flex: bool = False,
) -> tuple[Any, Any]:
    """Attention masks for layers without and with a window, each broadcastable to (B, 1, T, S), or
    None where each token attends to itself and all earlier ones. With `flex`, block masks for
    FlexAttention, if there is neither a `cache` nor a `mask`."""
    c, T = config, idx.shape[1]
    S = (0 if cache is None else cache.length) + T if mask is None else mask.shape[-1]
    if c.document_token < 0 and not 0 < c.window < S:
        return mask, mask
    if flex and cache is None and mask is None:
        return _block_masks(config, idx)
    slots = torch.arange(S, device=idx.device)
    visible = slots <= slots[S - T :, None] if mask is None else mask
    if c.document_token >= 0:
        queries, keys = _documents(config, idx, cache, mask)
        visible = visible & (queries.unsqueeze(2) == keys.unsqueeze(1)).unsqueeze(1)
    if not c.window:
        return visible, visible
    keys = positions if cache is None else slots  # the slots of a cache are in text order
    near = positions.unsqueeze(-1) - keys.unsqueeze(-2) < c.window  # (T, S) or (B, T, S)
    return visible, visible & near.unsqueeze(-3)


def _block_masks(config: ModernConfig, idx: Tensor) -> tuple[Any, Any]:
    """The same masks for FlexAttention, which skips fully masked blocks of 128 x 128 pairs."""
    from torch.nn.attention.flex_attention import create_block_mask  # the import takes a second

    (B, T), documents = idx.shape, (idx == config.document_token).cumsum(1)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (documents[row, query] == documents[row, key])

    def near(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(row, head, query, key) & (query - key < config.window)

    full = create_block_mask(visible, B, None, T, T, device=idx.device)
    if not config.window:
        return full, full
    return full, create_block_mask(near, B, None, T, T, device=idx.device)


def _documents(
    config: ModernConfig, idx: Tensor, cache: KVCache | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The document number of each query, (B, T), and of each key, (B, S): how many documents begin
    among the tokens that it sees."""
    begins = idx == config.document_token
    if cache is None:
        count = begins.cumsum(1) if mask is None else (mask[:, 0] & begins[:, None]).sum(-1)
        return count, count
    memory, count = cache[config.n_layer], begins.cumsum(1)
    if cache.positions is not None or cache.length:
        count = count + memory.k.amax(2)[:, 0]
    keys, _ = memory.append(count[:, None, :, None], count[:, None, :, None])
    return count, keys[:, 0, :, 0]

"""Who may look at whom, where windows and documents hide tokens."""

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
    """Who may look at whom, for layers without and with a window: broadcast to (B, 1, T, S), or
    None where each token looks at all before it. With `flex`, FlexAttention's block masks for whole
    texts, whose places in a text are those in the row."""
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
    keys = positions if cache is None else slots  # what a cache holds stands in order
    near = positions.unsqueeze(-1) - keys.unsqueeze(-2) < c.window  # (T, S) or (B, T, S)
    return visible, visible & near.unsqueeze(-3)


def _block_masks(config: ModernConfig, idx: Tensor) -> tuple[Any, Any]:
    """The same for FlexAttention, which skips blocks of 128 x 128 pairs that are all hidden."""
    from torch.nn.attention.flex_attention import create_block_mask  # takes a second

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
    """The number of the document that each token stands in, (B, T), and each one looked at,
    (B, S): how many documents begin among what it sees."""
    begins = idx == config.document_token
    if cache is None:
        count = begins.cumsum(1) if mask is None else (mask[:, 0] & begins[:, None]).sum(-1)
        return count, count
    memory, count = cache[config.n_layer], begins.cumsum(1)
    if cache.positions is not None or cache.length:
        count = count + memory.k.amax(2)[:, 0]
    keys, _ = memory.append(count[:, None, :, None], count[:, None, :, None])
    return count, keys[:, 0, :, 0]

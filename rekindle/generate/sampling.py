"""Text from a model, one token at a time."""

import torch
from torch import Tensor

from rekindle.errors import UserError
from rekindle.generate.cache import KVCache
from rekindle.model.gpt2 import GPT2


@torch.no_grad()
def generate(
    model: GPT2,
    prompt: list[int],
    tokens: int,
    *,
    num: int = 1,
    seed: int = 42,
    temperature: float = 1.0,
    top_k: int = 50,
    use_cache: bool = True,
) -> Tensor:
    """Continue `prompt` by `tokens` tokens, `num` times.

    Returns ids (num, len(prompt) + tokens), on the CPU.

    Each token is drawn from the `top_k` most likely (0: from all) at `temperature` (0: always the
    likeliest). The same seed gives the same text on the same device. Without `use_cache`, every
    position is computed anew for each token: slower, and the reference for the cache.
    Raises `UserError` if prompt and continuation do not fit into the model's context, if a
    number makes no sense, or if the model's answer is not finite.
    """
    limit = model.config.block_size
    if num < 1 or min(tokens, temperature, top_k) < 0:
        raise UserError("--num is at least 1; --tokens, --temperature and --top-k at least 0")
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    if len(prompt) + tokens > limit:
        raise UserError(
            f"the prompt of {len(prompt)} tokens and {tokens} more do not fit into the model's "
            f"context of {limit}: shorten the prompt or lower --tokens"
        )
    device = model.lm_head.weight.device
    random = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([prompt] * num, device=device)  # (num, T)
    cache = None
    for _ in range(tokens):
        if use_cache:
            new = ids if cache is None else ids[:, -1:]
            cache = cache or KVCache(model.config, num, limit, device, _compute_dtype(device))
            logits, _ = model.forward(new, cache=cache)
            cache.advance(new.shape[1])
        else:
            logits, _ = model.forward(ids)
        assert logits is not None
        if ids.shape[1] == len(prompt) and not logits[:, -1].isfinite().all():
            raise UserError("the model has no next token, only nan: its weights are broken")
        ids = torch.cat([ids, _draw(logits[:, -1], temperature, top_k, random)], dim=1)
    return ids.cpu()


def _compute_dtype(device: torch.device) -> torch.dtype:
    """What keys and values come out as: autocast's type where it is on."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else torch.float32


def _draw(logits: Tensor, temperature: float, top_k: int, random: torch.Generator) -> Tensor:
    """One id for each row of `logits` (B, vocab_size): (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if not top_k:
        return torch.multinomial(logits.softmax(-1), 1, generator=random)
    values, ids = logits.topk(min(top_k, logits.shape[-1]))
    return ids.gather(1, torch.multinomial(values.softmax(-1), 1, generator=random))


def cut_at_end(ids: list[int], end_of_text: int, start: int = 0) -> list[int]:
    """The ids up to the first end of text after `start`."""
    stop = next((i for i in range(start, len(ids)) if ids[i] == end_of_text), len(ids))
    return ids[:stop]

"""Text from a model, one token at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from rekindle.errors import UserError
from rekindle.model import Cache, LanguageModel

# A compiled step attends over as many slots as its cache has: of a few lengths, not of every one.
SLOTS = 128


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: list[int],
    tokens: int,
    *,
    num: int = 1,
    seed: int = 42,
    temperature: float = 1.0,
    top_k: int = 50,
    use_cache: bool = True,
    compile: bool = False,
) -> Tensor:
    """Continue `prompt` by `tokens` tokens, `num` times.

    Returns ids (num, len(prompt) + tokens), on the CPU.

    Each token is drawn from the `top_k` most likely (0: from all) at `temperature` (0: always the
    likeliest). The same seed gives the same text on the same device. Without `use_cache`, every
    position is computed anew for each token: slower, and the reference for the cache. With
    `compile`, the step from token to token is compiled, once for a `num` and a length rounded up;
    on a GPU it becomes one CUDA graph.
    Raises `UserError` if prompt and continuation do not fit into the model's context, if a
    number makes no sense, or if the model's answer is not finite.
    """
    T, limit = len(prompt), model.config.block_size
    if num < 1 or min(tokens, temperature, top_k) < 0:
        raise UserError("--num is at least 1; --tokens, --temperature and --top-k at least 0")
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    if T + tokens > limit:
        raise UserError(
            f"the prompt of {T} tokens and {tokens} more do not fit into the model's "
            f"context of {limit}: shorten the prompt or lower --tokens"
        )
    device = next(iter(model.parameters())).device
    random = torch.Generator(device).manual_seed(seed)
    ids = torch.empty(num, T + tokens, dtype=torch.long, device=device)
    ids[:, :T] = torch.tensor(prompt)
    capacity = min(limit, -(-(T + tokens) // SLOTS) * SLOTS) if compile else T + tokens
    cache = model.new_cache(num, capacity) if use_cache else None
    step, drawn = predict, ids[:, -1]
    for end in range(T, T + tokens):
        if cache is None:
            logits = predict(model, ids[:, :end])
        elif end == T:
            logits = predict(model, ids[:1, :T], cache).expand(num, -1)  # all begin alike
            cache.advance(T)
            if compile:
                cache.fix()
                step = compile_step()
        else:
            if compile:  # a CUDA graph may now overwrite the logits it gave before
                torch.compiler.cudagraph_mark_step_begin()
            logits = step(model, drawn[:, None], cache)
            cache.advance(1)
        if end == T and not logits.isfinite().all():
            raise UserError("the model has no next token, only nan: its weights are broken")
        ids[:, end] = drawn = draw(logits, temperature, top_k, random)
    return ids.cpu()


def predict(model: LanguageModel, idx: Tensor, cache: Cache | None = None) -> Tensor:
    """Logits (B, vocab_size) of what follows `idx` (B, T), which itself follows the cache."""
    positions, mask = (None, None) if cache is None else (cache.positions, cache.mask)
    hidden = model.body(idx, cache, positions, mask)  # (B, T, C)
    return model.head(hidden[:, -1])[:, : model.config.vocab_size]


def compile_step() -> Callable[[LanguageModel, Tensor, Cache], Tensor]:
    """`predict` for a fixed cache; "reduce-overhead" makes it a CUDA graph."""
    return torch.compile(predict, fullgraph=True, dynamic=False, mode="reduce-overhead")


def draw(logits: Tensor, temperature: float, top_k: int, random: torch.Generator) -> Tensor:
    """One id for each row of `logits` (B, vocab_size): (B,).

    The likeliest of p / e with e exponentially distributed is distributed as p. This is
    `torch.multinomial`, number for number, without its checks, for which a GPU would have to wait.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    ids = None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]))
    p = logits.softmax(-1)
    drawn = (p / torch.empty_like(p).exponential_(generator=random)).argmax(-1, keepdim=True)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def cut_at_end(ids: list[int], end_of_text: int, start: int = 0) -> list[int]:
    """The ids up to the first end of text after `start`."""
    stop = next((i for i in range(start, len(ids)) if ids[i] == end_of_text), len(ids))
    return ids[:stop]

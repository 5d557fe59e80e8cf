"""Text from a model, one token at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rekindle.errors import UserError
from rekindle.model import Cache, LanguageModel
from rekindle.model.finite import why_not_finite
from rekindle.sampling.room import check_room

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
    Raises `UserError` if prompt and continuation do not fit into the model's context or the
    texts into memory, if a number makes no sense, or if the model's answer is not finite at any
    token.
    """
    check_numbers(tokens=tokens, num=num, seed=seed, temperature=temperature, top_k=top_k)
    T, limit = len(prompt), model.config.block_size
    if not prompt:
        raise UserError("the prompt is empty: give at least one token")
    if T + tokens > limit:
        raise UserError(
            f"the prompt of {T} tokens and {tokens} more do not fit into the model's "
            f"context of {limit}: shorten the prompt or lower --tokens"
        )
    check_room(model, num, T + tokens, top_k)
    try:
        ids, sums = _generate(
            model, prompt, tokens, num, seed, temperature, top_k, use_cache, compile
        )
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        raise UserError(
            f"out of memory ({str(error).splitlines()[0]}): lower --num or --tokens"
        ) from None
    _check_finite(model, sums.isfinite().cpu(), temperature)
    return ids.cpu()


def check_numbers(*, tokens: int, num: int, seed: int, temperature: float, top_k: int) -> None:
    """Refuse numbers that make no text. Raises `UserError` that names the first of them.

    A temperature is judged here only by whether it is a number: whether it leaves a distribution
    depends on the logits, and shows at the first token.
    """
    for flag, value, least in (("num", num, 1), ("tokens", tokens, 0), ("top-k", top_k, 0)):
        if type(value) is not int or value < least:
            raise UserError(f"--{flag} must be a whole number of at least {least}, but is {value}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"--seed must be a whole number from 0 to 2^63 - 1, but is {seed}")
    if not temperature >= 0:  # nor is nan
        raise UserError(f"--temperature must be a number of at least 0, but is {temperature}")
    if math.isinf(torch.tensor(temperature, dtype=torch.float32)):
        raise UserError(
            f"--temperature must be a number that float32 can hold, but is {temperature}"
        )


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that is no text: bytes of a command line that were no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--prompt is no UTF-8 (its character {error.start + 1} is a stray byte): save the "
            "script in UTF-8, or set the terminal to it"
        ) from None


def _generate(
    model: LanguageModel, prompt: list[int], tokens: int, num: int, seed: int,
    temperature: float, top_k: int, use_cache: bool, compile: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ids, (num, T + tokens), and the sums of each token's logits and probabilities,
    (2, tokens), which are not finite if one of them is not; on the model's device, which is waited
    for only at the first token."""
    T, limit = len(prompt), model.config.block_size
    device = next(iter(model.parameters())).device
    random = torch.Generator(device).manual_seed(seed)
    ids = torch.empty(num, T + tokens, dtype=torch.long, device=device)
    ids[:, :T] = torch.tensor(prompt)
    sums = torch.zeros(2, tokens, device=device)
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
        sums[0, end - T] = logits.sum(dtype=torch.float32)
        drawn, sums[1, end - T] = draw(logits, temperature, top_k, random)
        ids[:, end] = drawn
        if end == T and not sums[:, 0].isfinite().all():  # no need to wait for the others
            break
    return ids, sums


def _check_finite(model: LanguageModel, finite: Tensor, temperature: float) -> None:
    """Raise `UserError` for the first token whose logits or probabilities were not finite."""
    tokens = finite.shape[1]
    logits, p = (row.tolist().index(False) if not row.all() else tokens for row in finite)
    if logits < tokens and logits <= p:
        raise UserError(
            f"the model has no token {logits + 1} after the prompt, only nan or inf: "
            f"{why_not_finite(model)}"
        )
    if p < tokens:
        raise UserError(
            f"--temperature {temperature} leaves no probabilities at token {p + 1}: the logits "
            "overflow when they are divided by it; 0 takes the likeliest token"
        )


def predict(model: LanguageModel, idx: Tensor, cache: Cache | None = None) -> Tensor:
    """Logits (B, vocab_size) of what follows `idx` (B, T), which itself follows the cache."""
    positions, mask = (None, None) if cache is None else (cache.positions, cache.mask)
    hidden = model.body(idx, cache, positions, mask)  # (B, T, C)
    return model.head(hidden[:, -1])[:, : model.config.vocab_size]


def compile_step() -> Callable[[LanguageModel, Tensor, Cache], Tensor]:
    """`predict` for a fixed cache; "reduce-overhead" makes it a CUDA graph."""
    return torch.compile(predict, fullgraph=True, dynamic=False, mode="reduce-overhead")


def draw(
    logits: Tensor, temperature: float, top_k: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One id for each row of `logits` (B, vocab_size): (B,), and the sum of all probabilities that
    they were drawn by, (): not finite if one of them is not, and 0 without any.

    The likeliest of p / e with e exponentially distributed is distributed as p. This is
    `torch.multinomial`, number for number, without its checks, for which a GPU would have to wait.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(())
    logits = logits.float() / temperature
    ids = None
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]))
    p = logits.softmax(-1)
    drawn = (p / torch.empty_like(p).exponential_(generator=random)).argmax(-1, keepdim=True)
    chosen = (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)
    return chosen, p.sum()


def cut_at_end(ids: list[int], end_of_text: int, start: int = 0) -> list[int]:
    """The ids up to the first end of text after `start`."""
    stop = next((i for i in range(start, len(ids)) if ids[i] == end_of_text), len(ids))
    return ids[:stop]

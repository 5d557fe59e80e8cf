"""Text generation, one token at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rekindle.errors import UserError
from rekindle.model import Cache, LanguageModel
from rekindle.model.finite import why_not_finite
from rekindle.sampling.room import check_room

# A compiled step attends over all slots of its cache. Their number is rounded up to a multiple of
# this, so that texts of similar length share one compiled step.
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
    most likely). The same seed gives the same text on the same device. Without `use_cache`, all
    positions are recomputed for each token: slower, and the reference for the cache. With
    `compile`, the step from token to token is compiled once per `num` and rounded-up length; on a
    GPU it becomes one CUDA graph.
    Raises `UserError` if prompt and continuation exceed the model's context, if the texts do not
    fit into memory, if a number is invalid, or if the logits of any token are not finite.
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
    """Check the numbers of a request. Raises `UserError` that names the first invalid one.

    Whether a small temperature makes the logits overflow depends on the logits, so `generate`
    checks that.
    """
    for flag, value, least in (("num", num, 1), ("tokens", tokens, 0), ("top-k", top_k, 0)):
        if type(value) is not int or value < least:
            raise UserError(f"--{flag} must be a whole number of at least {least}, but is {value}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"--seed must be a whole number from 0 to 2^63 - 1, but is {seed}")
    if not temperature >= 0:  # also rejects nan
        raise UserError(f"--temperature must be a number of at least 0, but is {temperature}")
    if math.isinf(torch.tensor(temperature, dtype=torch.float32)):
        raise UserError(f"--temperature must be in the range of float32, but is {temperature}")


def check_prompt(prompt: str) -> None:
    """Raise `UserError` if the prompt holds bytes of the command line that are not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--prompt is not UTF-8 (its character {error.start + 1} is a stray byte): save the "
            "script as UTF-8, or set the terminal to UTF-8"
        ) from None


def _generate(
    model: LanguageModel, prompt: list[int], tokens: int, num: int, seed: int,
    temperature: float, top_k: int, use_cache: bool, compile: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ids (num, T + tokens), and for each token the sum of its logits and the sum of its
    probabilities (2, tokens); a sum is not finite if any of its terms is not. Both are on the
    model's device, and the host waits for it only at the first token."""
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
            logits = predict(model, ids[:1, :T], cache).expand(num, -1)  # one prompt for all texts
            cache.advance(T)
            if compile:
                cache.fix()
                step = compile_step()
        else:
            if compile:  # lets a CUDA graph overwrite its last output
                torch.compiler.cudagraph_mark_step_begin()
            logits = step(model, drawn[:, None], cache)
            cache.advance(1)
        sums[0, end - T] = logits.sum(dtype=torch.float32)
        drawn, sums[1, end - T] = draw(logits, temperature, top_k, random)
        ids[:, end] = drawn
        if end == T and not sums[:, 0].isfinite().all():  # the later tokens would fail too
            break
    return ids, sums


def _check_finite(model: LanguageModel, finite: Tensor, temperature: float) -> None:
    """Raise `UserError` for the first token whose logits or probabilities were not finite."""
    tokens = finite.shape[1]
    logits, p = (row.tolist().index(False) if not row.all() else tokens for row in finite)
    if logits < tokens and logits <= p:
        raise UserError(
            f"the model's logits are not finite at token {logits + 1} after the prompt: "
            f"{why_not_finite(model)}"
        )
    if p < tokens:
        raise UserError(
            f"--temperature {temperature} is too small: the logits of token {p + 1} overflow when "
            "divided by it; raise it, or use 0 to always take the most likely token"
        )


def predict(model: LanguageModel, idx: Tensor, cache: Cache | None = None) -> Tensor:
    """Logits (B, vocab_size) of the token after `idx` (B, T), which follows the cached tokens."""
    positions, mask = (None, None) if cache is None else (cache.positions, cache.mask)
    hidden = model.body(idx, cache, positions, mask)  # (B, T, C)
    return model.head(hidden[:, -1])[:, : model.config.vocab_size]


def compile_step() -> Callable[[LanguageModel, Tensor, Cache], Tensor]:
    """`predict`, compiled for a fixed cache. "reduce-overhead" turns it into a CUDA graph."""
    return torch.compile(predict, fullgraph=True, dynamic=False, mode="reduce-overhead")


def draw(
    logits: Tensor, temperature: float, top_k: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one id for each row of `logits` (B, vocab_size). Returns the ids (B,), and the sum () of
    all probabilities: not finite if any of them is not, and 0 if `temperature` is 0.

    If e is exponentially distributed, the argmax of p / e is distributed as p. This gives the
    same ids as `torch.multinomial`, whose checks would make the host wait for a GPU.
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
    """The ids before the first end-of-text token at or after index `start`."""
    stop = next((i for i in range(start, len(ids)) if ids[i] == end_of_text), len(ids))
    return ids[:stop]

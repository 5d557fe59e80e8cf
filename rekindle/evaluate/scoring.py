"""Scores the candidate continuations of a context by their loss under a model.

Each context is computed only once: a row holds an item's context followed by all its candidates.
The positions of every candidate start right after the context, and an attention mask hides the
candidates from each other. `pack` builds the rows once; `evaluate` can then score them repeatedly.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from rekindle.errors import UserError
from rekindle.evaluate.loss import Progress, no_progress
from rekindle.evaluate.tasks.base import Item, Task
from rekindle.model import LanguageModel
from rekindle.model.finite import first_not_finite, why_not_finite
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World

SHAPES = 7  # torch.compile falls back to eager after 8 graphs of a function
TOKENS, CPU_TOKENS = 16_384, 2_048  # per batch; larger batches are not faster on a CPU
HEAD_TOKENS = 2_048  # per call of the head: their float32 logits take 0.4 GB


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, on the device."""

    idx: Tensor  # (B, T) token ids
    positions: Tensor  # (B, T): position of each token in its own text
    segments: Tensor  # (B, T): 0 in the context and in padding, n in the row's nth candidate
    predictors: Tensor  # (N,): indices among the B·T tokens of those that predict a target
    targets: Tensor  # (N,): the tokens that are scored
    owners: Tensor  # (N,) on the CPU: number of each target's candidate, over all items


@dataclass(frozen=True)
class Packed:
    """A task's items, and this rank's share of them as batches."""

    task: Task
    items: Sequence[Item]  # all of them, on every rank
    batches: list[Batch]  # this rank's share
    world: World  # the ranks that the items are divided among


@dataclass(frozen=True)
class _Row:
    """A context and its candidate continuations, as tokens."""

    context: list[int]
    candidates: dict[int, list[int]]  # by candidate number

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.candidates.values()))


def pack(
    work: Sequence[tuple[Task, Sequence[Item]]],
    limit: int,
    device: Device,
    world: World | None = None,
    *,
    compiled: bool = False,
    sharded: bool = False,
    tokens_per_batch: int | None = None,
) -> list[Packed]:
    """Pack this rank's share of each task's items into batches of rows of similar length.

    `limit` is the model's block size; the batches are on the device. For a compiled model, and on
    a GPU, all tasks together use at most `SHAPES` shapes (B, T). `sharded`: give every rank the
    same number of batches, because all ranks run a sharded model together; every rank must then
    call `pack`.
    """
    world = world or World()
    rows = [_share(items, limit, world) for _, items in work]
    eager_cpu = device.torch.type == "cpu" and not compiled
    lengths = _padded_lengths([r for rs in rows for r in rs], most=None if eager_cpu else SHAPES)
    tokens = tokens_per_batch or (CPU_TOKENS if device.torch.type == "cpu" else TOKENS)
    packed = []
    for (task, items), left in zip(work, rows, strict=True):
        batches = []
        while left:
            T = next(T for T in lengths if len(left[0]) <= T)
            B = max(1, tokens // T)
            chosen, left = left[:B], left[B:]
            batches.append(_batch(chosen, len(chosen) if eager_cpu else B, T, device.torch))
        if sharded:
            missing = world.max(len(batches), device.torch) - len(batches)
            batches += [_batch([], 1, 8, device.torch)] * missing
        packed.append(Packed(task, items, batches, world))
    return packed


def _share(items: Sequence[Item], limit: int, world: World) -> list[_Row]:
    """This rank's rows, longest first, so that the first batch shows the peak memory."""
    numbers = [0, *accumulate(len(item.candidates) for item in items)]
    rows = [
        row
        for i in range(world.rank, len(items), world.size)
        for row in _rows(items[i], numbers[i], limit)
    ]
    return sorted(rows, key=len, reverse=True)


def _rows(item: Item, number: int, limit: int) -> list[_Row]:
    """The rows of an item whose first candidate has this `number`: usually one. If any of its texts
    is longer than `limit`, one row per candidate, since each drops a different part of the context.
    """
    context, candidates = item.context, dict(enumerate(item.candidates, number))
    if len(context) + max(map(len, candidates.values())) <= limit:
        return [_Row(context, candidates)]
    return [
        _Row(context[max(0, len(context) + len(tokens) - limit) :], {n: tokens[-limit:]})
        for n, tokens in candidates.items()
    ]


def _padded_lengths(rows: list[_Row], most: int | None) -> list[int]:
    """The lengths T that rows are padded to: multiples of 8, at most `most` of them."""
    counts = Counter(-(-len(row) // 8) * 8 for row in rows)
    while most and len(counts) > most:  # drop the length that adds the least padding
        pairs = pairwise(sorted(counts))
        short, longer = min(pairs, key=lambda pair: counts[pair[0]] * (pair[1] - pair[0]))
        counts[longer] += counts.pop(short)
    return sorted(counts)


def _batch(rows: list[_Row], B: int, T: int, device: torch.device) -> Batch:
    """`rows`, filled up with padding rows to B. Padding comes last and belongs to the context's
    segment: it attends to itself, because softmax needs a key, and no candidate attends to it."""
    idx, positions, segments = torch.zeros(3, B, T, dtype=torch.long)
    predictors, targets, owners = [], [], []
    for i, row in enumerate(rows):
        C = len(row.context)
        tokens, places, parts = list(row.context), list(range(C)), [0] * C
        for n, (owner, candidate) in enumerate(row.candidates.items(), 1):
            start = i * T + len(tokens)
            before = [i * T + C - 1] if C else []  # predicts the candidate's first token
            before += range(start, start + len(candidate) - 1)
            predictors += before
            targets += candidate[len(candidate) - len(before) :]
            owners += [owner] * len(before)
            tokens += candidate
            places += range(C, C + len(candidate))
            parts += [n] * len(candidate)
        for tensor, values in ((idx, tokens), (positions, places), (segments, parts)):
            tensor[i, : len(row)] = torch.tensor(values)
    scored = torch.tensor([predictors, targets, owners], dtype=torch.long)
    return Batch(
        idx.to(device), positions.to(device), segments.to(device),
        scored[0].to(device), scored[1].to(device), scored[2],
    )  # fmt: skip


def tree_mask(segments: Tensor) -> Tensor:
    """(B, T) → (B, 1, T, T): a token attends to the context and its own segment, up to itself."""
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    return ((key == 0) | (key == query)).tril()


@dataclass(frozen=True)
class Losses:
    """A model's losses on candidates: one tensor per item, with one value per candidate."""

    sums: Sequence[Tensor]  # summed loss of the scored tokens in nats, float64
    counts: Sequence[Tensor]  # number of scored tokens, float64
    greedy: Sequence[Tensor] | None  # whether every scored token was the model's first choice


def evaluate(
    model: LanguageModel,
    packed: Packed,
    device: Device,
    *,
    body: Callable[..., Tensor] | None = None,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Score all items of a task, divided among the ranks; return its scores on every rank.

    `body` is the compiled form of the model's body, if there is one. `progress` is called after
    each batch, with the candidates scored. Raises `UserError` on every rank if a loss is not
    finite, naming the first such candidate: a score computed from it would look valid.
    """
    losses = candidate_losses(model, packed, device, body=body, progress=progress)
    _check_finite(model, packed, losses)
    return packed.task.score(packed.items, losses.sums, losses.counts, losses.greedy)


def _check_finite(model: LanguageModel, packed: Packed, losses: Losses) -> None:
    for number, sums in enumerate(losses.sums, 1):
        candidate = first_not_finite(sums)
        if candidate is not None:
            raise UserError(
                f"{packed.task.title}: the loss of item {number}, candidate {candidate + 1} is "
                f"{float(sums[candidate])}: {why_not_finite(model)}"
            )


@torch.no_grad()
def candidate_losses(
    model: LanguageModel,
    packed: Packed,
    device: Device,
    *,
    body: Callable[..., Tensor] | None = None,
    progress: Progress = no_progress,
) -> Losses:
    """Score the candidates of all items, divided among the ranks; return all losses on each."""
    body = model.body if body is None else body
    world, sizes = packed.world, [len(item.candidates) for item in packed.items]
    mine = sum(sizes[world.rank :: world.size])
    found, done = [], 0
    for batch in packed.batches:  # this loop does not synchronize with the GPU
        found.append(_score_tokens(model, body, batch, device, greedy=packed.task.needs_greedy))
        done += len(batch.owners.unique())
        progress(done, done / max(1, mine))
    totals = torch.zeros(3, sum(sizes), dtype=torch.float64)
    for batch, (losses, hits) in zip(packed.batches, found, strict=True):
        totals[0].index_add_(0, batch.owners, losses.cpu().double())
        totals[1] += batch.owners.bincount(minlength=totals.shape[1])
        totals[2].index_add_(0, batch.owners, hits.cpu().double())
    if world.size > 1:  # ranks have zeros for the others' candidates: the sum is exact
        totals = torch.tensor(world.totals(totals.to(device.torch)), dtype=torch.float64)
    sums, counts, hits = totals
    greedy = (hits == counts).split(sizes) if packed.task.needs_greedy else None
    return Losses(sums.split(sizes), counts.split(sizes), greedy)


def _score_tokens(
    model: LanguageModel, body: Callable[..., Tensor], batch: Batch, device: Device, *, greedy: bool
) -> tuple[Tensor, Tensor]:
    """The loss of every scored token of `batch`, (N,) float32, and whether the token was the
    model's first choice, (N,) bool; all False unless `greedy`."""
    losses, hits = [], []
    with device.autocast():
        mask = tree_mask(batch.segments)
        hidden = body(batch.idx, positions=batch.positions, mask=mask)  # (B, T, C)
        predictors = hidden.flatten(0, 1)[batch.predictors]  # (N, C): only these need the head
        parts = zip(predictors.split(HEAD_TOKENS), batch.targets.split(HEAD_TOKENS), strict=True)
        for x, y in parts:
            logits = model.head(x)  # (n, V), padding rows included
            losses.append(F.cross_entropy(logits.float(), y, reduction="none"))
            if greedy:
                hits.append(logits[:, : model.config.vocab_size].argmax(1) == y)
    found = torch.cat(losses)
    return found, torch.cat(hits) if greedy else torch.zeros_like(found, dtype=torch.bool)

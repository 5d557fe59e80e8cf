"""HellaSwag, completion style: which of four endings does the model find likeliest?

As in the lecture: the context and each ending are one text, the loss counts on the ending's tokens.
`acc` takes the ending with the lowest sum, `acc_norm` the one with the lowest mean per token.

Unlike there, the context is computed once: a question is one row, its context and then its four
endings. Each ending takes up the positions from the context's end on, and a mask keeps it from
seeing the others. `pack` makes these rows once, `evaluate` answers them as often as asked.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from rekindle.data.tokenizer import Tokenizer
from rekindle.evaluate.questions import Question
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World

SHAPES = 7  # torch.compile gives a function up after 8 graphs
TOKENS, CPU_TOKENS = 16_384, 2_048  # of a batch; on a CPU more is not faster
HEAD_TOKENS = 2_048  # that the head is applied to at once: their logits take 0.4 GB in float32


@dataclass(frozen=True)
class Score:
    """How many of `total` questions were answered rightly, by sum and by mean of the losses."""

    total: int
    correct: int
    correct_norm: int

    @property
    def acc(self) -> float:
        return self.correct / self.total

    @property
    def acc_norm(self) -> float:
        return self.correct_norm / self.total


@dataclass(frozen=True)
class Batch:
    """Rows of like length, on the device."""

    idx: Tensor  # (B, T) token ids
    positions: Tensor  # (B, T): where each stands in its own text
    segments: Tensor  # (B, T): 0 in a context and in padding, n in the row's nth ending
    predictors: Tensor  # (N,): which of the B·T tokens predict one whose loss counts
    targets: Tensor  # (N,): the tokens that they should predict
    owners: Tensor  # (N,) on the CPU: whose loss it is, 4·question + ending


@dataclass(frozen=True)
class Packed:
    """The questions of one rank, ready to be answered."""

    total: int  # questions, over all ranks
    labels: Tensor  # (Q,) of this rank's, on the CPU
    batches: list[Batch]
    world: World  # that shares them out


@dataclass(frozen=True)
class _Row:
    """A context, and endings each of which goes on where it stops: as tokens."""

    context: list[int]
    endings: dict[int, list[int]]  # by 4·question + ending

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.endings.values()))


def pack(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    limit: int,
    device: Device,
    world: World | None = None,
    *,
    compiled: bool = False,
    tokens_per_batch: int | None = None,
) -> Packed:
    """Tokenize this rank's share of `questions` for a model of `limit` positions, and lay it out in
    rows of like length, on the device.

    For a compiled model, and on a GPU, there are at most `SHAPES` shapes (B, T).
    """
    world = world or World()
    mine = questions[world.rank :: world.size]
    rows = [row for n, q in enumerate(mine) for row in _rows(n, q, tokenizer, limit)]
    rows.sort(key=len, reverse=True)  # the largest first: what memory it takes is known at once
    eager_cpu = device.torch.type == "cpu" and not compiled
    lengths = _padded_lengths(rows, most=None if eager_cpu else SHAPES)
    tokens = tokens_per_batch or (CPU_TOKENS if device.torch.type == "cpu" else TOKENS)
    batches = []
    while rows:
        T = next(T for T in lengths if len(rows[0]) <= T)
        B = max(1, tokens // T)
        chosen, rows = rows[:B], rows[B:]
        batches.append(_batch(chosen, len(chosen) if eager_cpu else B, T, device.torch))
    labels = torch.tensor([question.label for question in mine], dtype=torch.long)
    return Packed(len(questions), labels, batches, world)


def keep_step(packed: Packed, device: Device) -> Packed:
    """The same, with as many batches on every rank: a sharded model is called by all together."""
    missing = packed.world.max(len(packed.batches), device.torch) - len(packed.batches)
    padding = [_batch([], 1, 8, device.torch)] * missing
    return replace(packed, batches=packed.batches + padding)


def _rows(number: int, question: Question, tokenizer: Tokenizer, limit: int) -> list[_Row]:
    """A question as one row; as four, if a text of its is longer than `limit` and so loses its
    beginning, which is then another one for each ending."""
    context = tokenizer.encode(question.context)
    # GPT-2's words begin with their space.
    endings = {4 * number + i: tokenizer.encode(" " + e) for i, e in enumerate(question.endings)}
    if len(context) + max(map(len, endings.values())) <= limit:
        return [_Row(context, endings)]
    return [
        _Row(context[max(0, len(context) + len(ending) - limit) :], {n: ending[-limit:]})
        for n, ending in endings.items()
    ]


def _padded_lengths(rows: list[_Row], most: int | None) -> list[int]:
    """The lengths T to which rows are padded: multiples of 8, at most so many of them."""
    counts = Counter(-(-len(row) // 8) * 8 for row in rows)
    while most and len(counts) > most:  # give up the length whose loss costs the least padding
        pairs = pairwise(sorted(counts))
        short, longer = min(pairs, key=lambda pair: counts[pair[0]] * (pair[1] - pair[0]))
        counts[longer] += counts.pop(short)
    return sorted(counts)


def _batch(rows: list[_Row], B: int, T: int, device: torch.device) -> Batch:
    """`rows`, and rows of padding up to B. Padding stands last and counts as context: it sees
    itself, as softmax demands, and no ending sees it."""
    idx, positions, segments = torch.zeros(3, B, T, dtype=torch.long)
    predictors, targets, owners = [], [], []
    for i, row in enumerate(rows):
        C = len(row.context)
        tokens, places, parts = list(row.context), list(range(C)), [0] * C
        for n, (owner, ending) in enumerate(row.endings.items(), 1):
            start = i * T + len(tokens)
            before = [i * T + C - 1] if C else []  # the context's last token predicts the first
            before += range(start, start + len(ending) - 1)
            predictors += before
            targets += ending[len(ending) - len(before) :]
            owners += [owner] * len(before)
            tokens += ending
            places += range(C, C + len(ending))
            parts += [n] * len(ending)
        for tensor, values in ((idx, tokens), (positions, places), (segments, parts)):
            tensor[i, : len(row)] = torch.tensor(values)
    scored = torch.tensor([predictors, targets, owners], dtype=torch.long)
    return Batch(
        idx.to(device), positions.to(device), segments.to(device),
        scored[0].to(device), scored[1].to(device), scored[2],
    )  # fmt: skip


def tree_mask(segments: Tensor) -> Tensor:
    """(B, T) → (B, 1, T, T): a token sees the context and its own segment, up to itself."""
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    return ((key == 0) | (key == query)).tril()


@torch.no_grad()
def ending_losses(
    model: GPT2,
    packed: Packed,
    device: Device,
    *,
    transformer: Callable[..., Tensor] | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum and mean of the losses of each ending's tokens in nats, (Q, 4) float64 on the CPU."""
    body = model.transformer if transformer is None else transformer  # a compiled one has no bool
    losses, done = [], 0
    for batch in packed.batches:  # nothing in here waits for a GPU
        losses.append(_token_losses(model, body, batch, device))
        done += len(batch.owners.unique())
        if say:
            say(f"HellaSwag: {done:,} of {4 * len(packed.labels):,} endings scored")
    sums = torch.zeros(4 * len(packed.labels), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for batch, loss in zip(packed.batches, losses, strict=True):
        sums.index_add_(0, batch.owners, loss.cpu().double())
        counts += batch.owners.bincount(minlength=len(counts))
    return sums.view(-1, 4), (sums / counts.clamp(min=1)).view(-1, 4)


def _token_losses(
    model: GPT2, transformer: Callable[..., Tensor], batch: Batch, device: Device
) -> Tensor:
    """The loss of every scored token of `batch`, (N,) float32."""
    with device.autocast():
        hidden = transformer(
            batch.idx, positions=batch.positions, mask=tree_mask(batch.segments)
        )  # (B, T, C)
        predictors = hidden.flatten(0, 1)[batch.predictors]  # (N, C): no others need the head
        parts = zip(predictors.split(HEAD_TOKENS), batch.targets.split(HEAD_TOKENS), strict=True)
        losses = [F.cross_entropy(model.lm_head(x).float(), y, reduction="none") for x, y in parts]
    return torch.cat(losses)


def evaluate(
    model: GPT2,
    packed: Packed,
    device: Device,
    *,
    transformer: Callable[..., Tensor] | None = None,
    say: Callable[[str], None] | None = None,
) -> Score:
    """Answer all questions, each rank those that were packed for it; `say` hears of the progress.

    `transformer` is `model.transformer` or its compiled form.
    """
    both = ending_losses(model, packed, device, transformer=transformer, say=say)
    counts = torch.tensor(
        [int((losses.argmin(1) == packed.labels).sum()) for losses in both], device=device.torch
    )
    correct, correct_norm = map(int, packed.world.totals(counts))
    return Score(packed.total, correct, correct_norm)

"""HellaSwag, completion style: which of four endings does the model find likeliest?

As in the lecture: the context and each ending are one text, the loss counts on the ending's tokens.
`acc` takes the ending with the lowest sum, `acc_norm` the one with the lowest mean per token.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rekindle import hub
from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World

# The hub converts every data set to Parquet under this revision.
HUB = {"repo": "Rowan/hellaswag", "file": "default/validation/0000.parquet",
       "revision": "refs/convert/parquet", "kind": "dataset"}  # fmt: skip
# Rows are padded to one of these, so that a compiled model sees few shapes (a graph is given up
# after 8). With GPT-2's tokenizer no row is longer than 192.
LENGTHS = (64, 96, 128, 160, 192, 512, 1024)


@dataclass(frozen=True)
class Question:
    """A context, four endings, and which of them is the real one."""

    context: str
    endings: tuple[str, ...]
    label: int


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
class _Row:
    """One ending of one question, as tokens; the loss counts on the last `scored` of them."""

    question: int
    ending: int
    tokens: list[int]
    scored: int


def read_questions(path: Path) -> list[Question]:
    """HellaSwag's JSON lines, or its Parquet file from the hub. Raises `UserError` that names the
    line of what is no question."""
    if not path.is_file():
        raise UserError(f"there is no HellaSwag file {path}")
    questions = []
    for number, row in enumerate(_read_rows(path), 1):
        try:
            question = Question(row["ctx"], tuple(row["endings"]), int(row["label"]))
            texts = (question.context, *question.endings)
            if len(texts) != 5 or not all(isinstance(t, str) for t in texts):
                raise ValueError("not a context and four endings")
            if not 0 <= question.label < 4:
                raise ValueError(f"label {question.label}")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, row {number}: not a HellaSwag question ({error!r})") from None
        questions.append(question)
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def for_training(wanted: str, device: Device, say: Callable[[str], None]) -> list[Question]:
    """The questions that a training run scores itself on, or none.

    `wanted` is a file, `hub`, `none`, or `auto`: from the hub on a GPU, while on a CPU they would
    take longer than the training. That the hub cannot be reached does not stop a training.
    """
    if wanted == "none" or (wanted == "auto" and device.torch.type == "cpu"):
        return []
    try:
        return read_questions(locate(wanted))
    except UserError as error:
        if wanted != "auto":
            raise
        say(f"HellaSwag is left out: {error}")
        return []


def locate(wanted: str) -> Path:
    """The file that `wanted` names, downloaded from the hub for `hub` and `auto`."""
    if wanted not in ("hub", "auto"):
        return Path(wanted)
    return hub.download(**HUB, instead="give a local copy with --hellaswag FILE")


def _read_rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(path).to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{path} is not a whole Parquet file ({reason})") from None
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:  # also for bytes that are not UTF-8
                raise UserError(f"{path}, row {number}: not a line of JSON") from None


@torch.no_grad()
def evaluate(
    model: GPT2,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    device: Device,
    *,
    transformer: Callable[[Tensor], Tensor] | None = None,
    tokens_per_batch: int = 16_384,
    world: World | None = None,
    say: Callable[[str], None] | None = None,
) -> Score:
    """Answer all questions, rows of like length together, shared out over the ranks.

    `transformer` is `model.transformer` or its compiled form; it sees at most one shape for each
    of `LENGTHS`. The head is applied to the endings' positions only. A text longer than
    the model's context loses its beginning. `say` hears of the progress.
    """
    world = world or World()
    body = model.transformer if transformer is None else transformer  # a compiled one has no bool
    mine = range(world.rank, len(questions), world.size)
    rows = [r for i in mine for r in _render(i, questions[i], tokenizer, model.config.block_size)]
    sums = torch.zeros(len(questions), 4, dtype=torch.float64)
    means = torch.zeros(len(questions), 4, dtype=torch.float64)
    done = 0
    for T, batch, height in _batches(rows, model.config.block_size, tokens_per_batch):
        losses = _row_losses(model, body, batch, (height, T), device)
        for row, loss in zip(batch, losses.tolist(), strict=True):
            sums[row.question, row.ending] = loss
            means[row.question, row.ending] = loss / row.scored
        done += len(batch)
        if say:
            say(f"HellaSwag: {done:,} of {len(rows):,} endings scored")
    labels = torch.tensor([question.label for question in questions])
    chosen = torch.tensor(list(mine), dtype=torch.long)
    counts = torch.tensor(
        [int((losses.argmin(1) == labels)[chosen].sum()) for losses in (sums, means)],
        device=device.torch,
    )
    world.sum_(counts)
    return Score(len(questions), *counts.tolist())


def _render(number: int, question: Question, tokenizer: Tokenizer, limit: int) -> Iterator[_Row]:
    context = tokenizer.encode(question.context)
    for i, ending in enumerate(question.endings):
        tokens = tokenizer.encode(" " + ending)  # GPT-2's words begin with their space
        whole = (context + tokens)[-limit:]
        yield _Row(number, i, whole, min(len(tokens), len(whole) - 1))


def _batches(
    rows: list[_Row], limit: int, tokens_per_batch: int
) -> Iterator[tuple[int, list[_Row], int]]:
    """Rows of like length together, as (T, rows, height); for each T there is one height."""
    by_length: dict[int, list[_Row]] = {}
    for row in rows:
        T = min(limit, next((n for n in LENGTHS if n >= len(row.tokens)), limit))
        by_length.setdefault(T, []).append(row)
    for T, group in sorted(by_length.items(), reverse=True):  # the largest first: memory is known
        height = max(1, tokens_per_batch // T)
        for i in range(0, len(group), height):
            yield T, group[i : i + height], height


def _row_losses(
    model: GPT2,
    transformer: Callable[[Tensor], Tensor],
    rows: list[_Row],
    shape: tuple[int, int],
    device: Device,
) -> Tensor:
    """Summed loss of each row's ending, (len(rows),) float64 on the CPU."""
    idx = torch.zeros(shape, dtype=torch.long)  # (height, T); causality keeps the padding out
    owner, position, target = [], [], []
    for i, row in enumerate(rows):
        end = len(row.tokens)
        idx[i, :end] = torch.tensor(row.tokens)
        owner += [i] * row.scored
        position += range(end - row.scored - 1, end - 1)
        target += row.tokens[end - row.scored :]
    with device.autocast():
        hidden = transformer(idx.to(device.torch))[owner, position]  # (scored tokens, C)
        logits = model.lm_head(hidden)
    losses = F.cross_entropy(
        logits.float(), torch.tensor(target).to(device.torch), reduction="none"
    )
    total = torch.zeros(len(rows), dtype=torch.float64)
    return total.index_add_(0, torch.tensor(owner), losses.cpu().double())

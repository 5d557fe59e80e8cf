"""HellaSwag, completion style: which of four endings is the most likely under the model?

As in the lecture, context and ending form one text, and only the ending's tokens are scored. `acc`
picks the ending with the lowest total loss, `acc_norm` the one with the lowest loss per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rekindle import hub
from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError
from rekindle.evaluate.tasks.base import Item
from rekindle.storage import parse_json

# At this revision, the hub has a Parquet version of every dataset.
HUB = {"repo": "Rowan/hellaswag", "file": "default/validation/0000.parquet",
       "revision": "refs/convert/parquet", "kind": "dataset"}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A context, four endings, and the index of the real one."""

    context: str
    endings: tuple[str, ...]
    label: int


class HellaSwag:
    """The HellaSwag task."""

    name = "hellaswag"
    title = "HellaSwag"
    metric = "acc_norm"
    chance = 0.25
    needs_greedy = False

    def load(self, where: str, tokenizer: Tokenizer) -> list[Item]:
        """Items from `where`: a JSON lines file, a Parquet file, or "hub" to download it."""
        if where == "hub":
            path = hub.download(**HUB, instead="give a local copy with --hellaswag FILE")
        else:
            path = Path(where)
        return [tokenize(question, tokenizer) for question in read_questions(path)]

    def score(
        self,
        items: Sequence[Item],
        sums: Sequence[Tensor],
        counts: Sequence[Tensor],
        greedy: Sequence[Tensor] | None,
    ) -> dict[str, float]:
        labels = torch.tensor([item.label for item in items])
        losses, tokens = torch.stack(list(sums)), torch.stack(list(counts))  # (Q, 4)
        correct = int((losses.argmin(1) == labels).sum())
        correct_norm = int(((losses / tokens.clamp(min=1)).argmin(1) == labels).sum())
        total = len(items)
        return {
            "total": total,
            "correct": correct,
            "correct_norm": correct_norm,
            "acc": correct / total,
            "acc_norm": correct_norm / total,
        }


def tokenize(question: Question, tokenizer: Tokenizer) -> Item:
    """Tokenize a question. Endings get a leading space, which GPT-2's word tokens include."""
    context = tokenizer.encode(question.context)
    endings = [tokenizer.encode(" " + ending) for ending in question.endings]
    return Item(context, endings, question.label)


def read_questions(path: Path) -> list[Question]:
    """Read HellaSwag's JSON lines, or its Parquet file from the hub. Raises `UserError` that names
    the row of a malformed question."""
    if not path.is_file():
        raise UserError(f"HellaSwag file not found: {path}")
    questions = []
    for number, row in enumerate(_read_rows(path), 1):
        try:
            question = Question(row["ctx"], tuple(row["endings"]), int(row["label"]))
            texts = (question.context, *question.endings)
            if len(texts) != 5 or not all(isinstance(t, str) for t in texts):
                raise ValueError("not a context and four endings")
            if not 0 <= question.label < 4:
                raise ValueError(f"label {question.label}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}, row {number}: not a HellaSwag question ({error!r})") from None
        questions.append(question)
    if not questions:
        raise UserError(f"{path} contains no questions")
    return questions


def _read_rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(path).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{path} is not a complete Parquet file ({reason})") from None
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield parse_json(line)
            except ValueError:  # also for bytes that are not UTF-8
                raise UserError(f"{path}, row {number}: not a line of JSON") from None

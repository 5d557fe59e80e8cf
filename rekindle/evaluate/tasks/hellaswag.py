"""HellaSwag, completion style: which of four endings does the model find most likely?

As in the lecture, context and ending are one text, and the loss counts on the ending's tokens.
`acc` takes the ending with the lowest sum, `acc_norm` the one with the lowest mean per token.
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

# The hub converts every data set to Parquet under this revision.
HUB = {"repo": "Rowan/hellaswag", "file": "default/validation/0000.parquet",
       "revision": "refs/convert/parquet", "kind": "dataset"}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A context, four endings, and which of them is the real one."""

    context: str
    endings: tuple[str, ...]
    label: int


class HellaSwag:
    """The task."""

    name = "hellaswag"
    title = "HellaSwag"
    metric = "acc_norm"
    chance = 0.25
    needs_greedy = False

    def load(self, where: str, tokenizer: Tokenizer) -> list[Item]:
        """Items from `where`: JSON lines, the hub's Parquet file, or "hub" to download that."""
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
    """A question as the model reads it: GPT-2's words begin with their space."""
    context = tokenizer.encode(question.context)
    endings = [tokenizer.encode(" " + ending) for ending in question.endings]
    return Item(context, endings, question.label)


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
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}, row {number}: not a HellaSwag question ({error!r})") from None
        questions.append(question)
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def _read_rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(path).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{path} is not a whole Parquet file ({reason})") from None
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield parse_json(line)
            except ValueError:  # also for bytes that are not UTF-8
                raise UserError(f"{path}, row {number}: not a line of JSON") from None

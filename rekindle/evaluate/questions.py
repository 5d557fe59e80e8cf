"""HellaSwag's questions: from a file, or from the hub."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle import hub
from rekindle.errors import UserError
from rekindle.runtime.device import Device
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

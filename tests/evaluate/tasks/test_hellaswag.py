"""HellaSwag: reading questions from files and the hub, and scoring."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rekindle import hub
from rekindle.data.tokenizer import ByteTokenizer
from rekindle.errors import UserError
from rekindle.evaluate.tasks import Item
from rekindle.evaluate.tasks.hellaswag import HellaSwag, Question, read_questions, tokenize


def row(**changes: Any) -> dict[str, Any]:
    return {"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "2", "ind": 4, **changes}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


EXPECTED = Question("A man", ("a", "b", "c", "d"), 2)


def test_questions_are_read_from_json_lines_and_from_parquet(tmp_path: Path) -> None:
    rows = [row(), row(ctx="Ein Mädchen", label="0")]
    expected = [EXPECTED, replace(EXPECTED, context="Ein Mädchen", label=0)]
    assert read_questions(write(tmp_path / "q.jsonl", rows)) == expected
    assert read_questions(write(tmp_path / "int.jsonl", [row(label=2)])) == [EXPECTED]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet") == expected


@pytest.mark.parametrize(
    "bad",
    [
        row(endings=["a", "b", "c"]),
        row(endings=["a", "b", "c", 4]),
        row(endings=None),
        row(label="4"),
        row(label="-1"),
        row(label=""),  # as in the test split, which has no labels
        row(label=float("inf")),
        row(ctx=None),
        {"text": "no question at all"},
        ["a", "list"],
        None,
    ],
)
def test_malformed_question_is_named(tmp_path: Path, bad: Any) -> None:
    file = write(tmp_path / "q.jsonl", [row(), row(), bad])
    with pytest.raises(UserError, match="row 3: not a HellaSwag question") as caught:
        read_questions(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b'{"ctx": "A', b"\xff\xfe\n", b"\n"])
def test_malformed_json_line_is_named(tmp_path: Path, content: bytes) -> None:
    file = write(tmp_path / "q.jsonl", [row()])
    file.write_bytes(file.read_bytes() + content)
    with pytest.raises(UserError, match="row 2: not a line of JSON"):
        read_questions(file)


def test_missing_empty_and_truncated_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="HellaSwag file not found"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="contains no questions"):
        read_questions(write(tmp_path / "empty.jsonl", []))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="not a complete Parquet file"):
        read_questions(tmp_path / "cut.parquet")


def test_hellaswag_is_downloaded_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(**wanted: Any) -> Path:
        asked.append(wanted["repo"])
        return write(tmp_path / "q.jsonl", [row()])

    monkeypatch.setattr(hub, "download", download)
    items = HellaSwag().load("hub", ByteTokenizer())
    assert asked == ["Rowan/hellaswag"]
    assert items == HellaSwag().load(str(tmp_path / "q.jsonl"), ByteTokenizer())
    assert items == [tokenize(EXPECTED, ByteTokenizer())]


def test_endings_are_tokenized_with_a_leading_space() -> None:
    endings = [[32, letter] for letter in b"abcd"]
    assert tokenize(EXPECTED, ByteTokenizer()) == Item(list(b"A man"), endings, 2)


def test_score_by_hand() -> None:
    """Lowest sum against lowest mean; a candidate without scored tokens has a count of 0."""
    sums = torch.tensor([[4.0, 3.0, 9.0, 9.0], [5.0, 6.0, 7.0, 8.0], [3.0, 2.0, 0.0, 1.0]])
    counts = torch.tensor([[4.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 8.0], [1.0, 1.0, 0.0, 1.0]])
    items = [Item([], [[1]] * 4, label) for label in (0, 3, 2)]
    score = HellaSwag().score(items, sums.double().unbind(), counts.double().unbind(), None)
    assert score == {"total": 3, "correct": 1, "correct_norm": 3, "acc": 1 / 3, "acc_norm": 1.0}


def test_limit_uses_the_first_questions(
    tmp_path: Path, train: Callable[..., Any], rekindle: Callable[..., Any], asked: Any
) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [{"ctx": q.context, "endings": list(q.endings), "label": 0} for q in asked.questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(tmp_path / "run", "--steps", 1)
    arguments = ("eval", tmp_path / "run", "--hellaswag", file, "--device", "cpu", "--json")
    for limit, total in (("7", 7), ("99", 40)):
        outcome = rekindle(*arguments, "--limit", limit)
        assert outcome.status == 0, outcome.err
        results = json.loads(outcome.out)
        assert results.keys() == {"model", "hellaswag"}
        score = results["hellaswag"]
        assert score["total"] == total
        assert score["acc"] == score["correct"] / total
        assert score["acc_norm"] == score["correct_norm"] / total

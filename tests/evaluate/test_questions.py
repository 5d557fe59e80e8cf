"""HellaSwag's questions: read from a file or the hub, and what is none is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rekindle import hub
from rekindle.errors import UserError
from rekindle.evaluate.questions import Question, for_training, read_questions
from rekindle.runtime.device import Device


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
        row(label=""),  # as in the test split, which has no answers
        row(label=float("inf")),
        row(ctx=None),
        {"text": "no question at all"},
        ["a", "list"],
        None,
    ],
)
def test_a_row_that_is_no_question_is_named(tmp_path: Path, bad: Any) -> None:
    file = write(tmp_path / "q.jsonl", [row(), row(), bad])
    with pytest.raises(UserError, match="row 3: not a HellaSwag question") as caught:
        read_questions(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b'{"ctx": "A', b"\xff\xfe\n", b"\n"])
def test_a_line_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    file = write(tmp_path / "q.jsonl", [row()])
    file.write_bytes(file.read_bytes() + content)
    with pytest.raises(UserError, match="row 2: not a line of JSON"):
        read_questions(file)


def test_files_that_hold_nothing_to_ask(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no HellaSwag file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(write(tmp_path / "empty.jsonl", []))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        read_questions(tmp_path / "cut.parquet")


def test_which_questions_a_training_run_asks(
    tmp_path: Path, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "q.jsonl", [row()])
    asked: list[str] = []
    gpu = Device(torch.device("cuda"), "GPU", "autocast")

    def unreachable(**wanted: Any) -> Path:
        asked.append(wanted["repo"])
        raise UserError("no network")

    monkeypatch.setattr(hub, "download", unreachable)
    said: list[str] = []
    assert for_training(str(file), cpu, said.append) == [EXPECTED]
    assert for_training("none", gpu, said.append) == []
    assert for_training("auto", cpu, said.append) == []
    assert not asked
    assert not said
    assert for_training("auto", gpu, said.append) == []  # the training goes on without
    assert asked == ["Rowan/hellaswag"]
    assert said == ["HellaSwag is left out: no network"]
    with pytest.raises(UserError, match="no network"):
        for_training("hub", cpu, said.append)
    monkeypatch.setattr(hub, "download", lambda **wanted: file)
    assert for_training("auto", gpu, said.append) == [EXPECTED]

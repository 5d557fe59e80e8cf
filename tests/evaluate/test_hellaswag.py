"""HellaSwag: batched scoring gives what a row at a time gives, on any number of ranks."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rekindle import hub
from rekindle.data.tokenizer import ByteTokenizer
from rekindle.errors import UserError
from rekindle.evaluate import hellaswag
from rekindle.evaluate.hellaswag import Question, Score, evaluate, read_questions
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World


@pytest.mark.parametrize("tokens_per_batch", [1, 700, 16_384], ids=["rows", "few", "many"])
def test_batched_choices_are_those_of_a_question_at_a_time(
    model: GPT2, asked: Any, cpu: Device, tokens_per_batch: int
) -> None:
    """With the reference's choices as labels, every single question has to come out right."""
    for labels in (asked.by_sum, asked.by_mean):
        score = evaluate(
            model, asked.labelled(labels), ByteTokenizer(), cpu, tokens_per_batch=tokens_per_batch
        )
        both = (asked.by_sum, asked.by_mean)
        expected = [sum(a == b for a, b in zip(labels, by, strict=True)) for by in both]
        assert score == Score(40, *expected)
        assert 40 in expected
        assert min(expected) < 30


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_ranks_gives_the_score_of_one(
    model: GPT2, asked: Any, cpu: Device, ranks: int,
    on_ranks: Callable[[int, Callable[[World], Score]], list[Score]],
) -> None:  # fmt: skip
    questions = asked.labelled(asked.by_mean)
    alone = evaluate(model, questions, ByteTokenizer(), cpu)
    together = on_ranks(ranks, lambda w: evaluate(model, questions, ByteTokenizer(), cpu, world=w))
    assert together == [alone] * ranks
    assert alone.correct_norm == 40


def test_more_ranks_than_questions(
    model: GPT2, asked: Any, cpu: Device,
    on_ranks: Callable[[int, Callable[[World], Score]], list[Score]],
) -> None:  # fmt: skip
    questions = asked.labelled(asked.by_mean)[:2]
    scores = on_ranks(3, lambda w: evaluate(model, questions, ByteTokenizer(), cpu, world=w))
    assert {(s.total, s.correct_norm) for s in scores} == {(2, 2)}


def test_a_model_sees_few_shapes_whatever_the_lengths(model: GPT2, cpu: Device) -> None:
    seen = set()

    def transformer(idx: torch.Tensor) -> torch.Tensor:
        seen.add(tuple(idx.shape))
        return model.transformer(idx)

    questions = [Question("x" * n, ("a", "bb", "ccc", "dddd"), 0) for n in range(1, 400, 3)]
    evaluate(model, questions, ByteTokenizer(), cpu, transformer=transformer)
    assert len(seen) == len({T for _, T in seen}) <= 8  # what torch.compile keeps of one function
    assert max(T for _, T in seen) == model.config.block_size
    assert max(rows * T for rows, T in seen) <= 16_384


def test_a_text_longer_than_the_context_loses_its_beginning(model: GPT2, cpu: Device) -> None:
    """What is cut off counts for nothing; what is left decides."""
    endings = ("ij" * 50, "kl" * 50, "mn" * 50, "op" * 50)
    kept = model.config.block_size - 101  # room beside an ending and its space
    tail = ("abcdefgh" * 30)[:kept]

    def choice(context: str, endings: tuple[str, ...]) -> int:
        answers = [Question(context, endings, label) for label in range(4)]
        scores = [evaluate(model, [answer], ByteTokenizer(), cpu) for answer in answers]
        return [score.correct for score in scores].index(1)

    expected = choice(tail, endings)
    for before in ("", "entirely different ", "z" * 500):
        assert choice(before + tail, endings) == expected
        assert choice(before + tail, endings[::-1]) == 3 - expected


def test_an_ending_longer_than_the_context_is_scored_as_far_as_it_goes(
    model: GPT2, cpu: Device
) -> None:
    endings = tuple(c * 300 for c in "abcd")
    scores = [evaluate(model, [Question("x", endings, n)], ByteTokenizer(), cpu) for n in range(4)]
    assert sum(score.correct for score in scores) == 1
    assert sum(score.correct_norm for score in scores) == 1


def test_progress_is_told(model: GPT2, asked: Any, cpu: Device) -> None:
    said: list[str] = []
    evaluate(model, asked.questions, ByteTokenizer(), cpu, say=said.append)
    assert said[-1] == "HellaSwag: 160 of 160 endings scored"


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
    assert hellaswag.for_training(str(file), cpu, said.append) == [EXPECTED]
    assert hellaswag.for_training("none", gpu, said.append) == []
    assert hellaswag.for_training("auto", cpu, said.append) == []
    assert not asked
    assert not said
    assert hellaswag.for_training("auto", gpu, said.append) == []  # the training goes on without
    assert asked == ["Rowan/hellaswag"]
    assert said == ["HellaSwag is left out: no network"]
    with pytest.raises(UserError, match="no network"):
        hellaswag.for_training("hub", cpu, said.append)
    monkeypatch.setattr(hub, "download", lambda **wanted: file)
    assert hellaswag.for_training("auto", gpu, said.append) == [EXPECTED]


def test_limit_takes_the_first_questions(
    tmp_path: Path, train: Callable[..., Any], rekindle: Callable[..., Any], asked: Any
) -> None:
    file = write(
        tmp_path / "q.jsonl",
        [row(ctx=q.context, endings=list(q.endings), label=0) for q in asked.questions],
    )
    train(tmp_path / "run", "--steps", 1)
    arguments = ("eval", tmp_path / "run", "--hellaswag", file, "--device", "cpu", "--json")
    for limit, total in (("7", 7), ("99", 40)):
        outcome = rekindle(*arguments, "--limit", limit)
        assert outcome.status == 0, outcome.err
        score = json.loads(outcome.out)["hellaswag"]
        assert score["total"] == total
        assert score["acc"] == score["correct"] / total
        assert score["acc_norm"] == score["correct_norm"] / total


def test_accuracy_is_a_share_of_all() -> None:
    score = Score(total=8, correct=2, correct_norm=6)
    assert (score.acc, score.acc_norm) == (0.25, 0.75)
    assert asdict(score) == {"total": 8, "correct": 2, "correct_norm": 6}

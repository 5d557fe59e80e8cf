"""`--layout lecture` gives the same shards as the lecture's script, even after a kill."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle import storage
from rekindle.data import shards
from rekindle.data.encoding import Encoded
from rekindle.data.layout import Lecture
from rekindle.data.prepare import prepare
from rekindle.data.sources import from_arguments, local
from rekindle.data.sources.base import Block, SourceFile
from rekindle.data.tokenizer import get_tokenizer
from rekindle.errors import UserError
from rekindle.observe.console import Console
from rekindle.storage import files as storage_files
from tests.data.listening import listen

END = 256  # end of text of the byte tokenizer


def lecture_script(documents: list[list[int]], end_of_text: int, size: int) -> list[np.ndarray]:
    """The shards written by the lecture's script, which fills a buffer document by document."""
    written = []
    buffer, count = np.zeros(size, np.uint16), 0
    for ids in documents:
        tokens = np.array([end_of_text, *ids], np.uint16)
        while count + len(tokens) >= size:  # the script's `if` fails for documents over two shards
            room = size - count
            buffer[count:] = tokens[:room]
            written.append(buffer.copy())
            tokens, count = tokens[room:], 0
        buffer[count : count + len(tokens)] = tokens
        count += len(tokens)
    if count:
        written.append(buffer[:count].copy())
    return written


def expected_files(texts: list[str], tokenizer: str, size: int) -> dict[str, bytes]:
    """The shards in llm.c's format, by name: the first is validation."""
    encode, end_of_text = get_tokenizer(tokenizer).encode, get_tokenizer(tokenizer).end_of_text
    written = lecture_script([encode(text) for text in texts], end_of_text, size)
    files = {}
    for number, tokens in enumerate(written):
        header = np.array([20240520, 1, len(tokens)] + 253 * [0], "<i4")
        name = f"train_{number - 1:06d}.bin" if number else "val_000000.bin"
        files[name] = header.tobytes() + tokens.astype("<u2").tobytes()
    return files


def found_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.bin")}


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_files, "_flush", lambda descriptor: None)
    monkeypatch.setattr(storage_files, "_flush_folder", lambda path: None)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`source(texts, ...)`: one JSON Lines file for each list, read in small blocks."""
    monkeypatch.setattr(local, "BLOCK_BYTES", 900)

    def make(*files: list[str]) -> Any:
        paths = [tmp_path / f"{number}.jsonl" for number in range(len(files))]
        for path, texts in zip(paths, files, strict=True):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return from_arguments(jsonl=paths)

    return make


def run(source: Any, out: Path, **changes: Any) -> shards.Manifest:
    chosen = {"tokenizer": "bytes", "layout": "lecture", "console": Console(quiet=True)} | changes
    return prepare(source, out, **chosen)


# The lecture's tokens


@pytest.mark.parametrize(("tokenizer", "size"), [("gpt2", 500), ("gpt2", 97), ("bytes", 1000)])
def test_shards_match_the_lecture(
    tmp_path: Path, source: Callable, texts: Callable, tokenizer: str, size: int
) -> None:
    first, second = texts(80, seed=1), texts(80, seed=2)
    first[5] = ""  # an empty document counts as a document
    second[7] = "more than two shards " * (size // 4)
    out = tmp_path / "out"
    manifest = run(source(first, second), out, tokenizer=tokenizer, shard_tokens=size)
    expected = expected_files([*first, *second], tokenizer, size)
    assert found_files(out) == expected
    assert len(expected) > 10
    shards.verify(out, manifest)
    assert [shard.name for shard in manifest.split("train")] == sorted(expected)[:-1]
    assert [shard.name for shard in manifest.split("val")] == ["val_000000.bin"]
    assert sum(shard.documents for shard in manifest.shards) == 160
    for shard in manifest.shards:  # a document is counted in the shard where it starts
        tokens = shards.open_shard(out / shard.name)
        assert shard.documents == np.count_nonzero(tokens == get_tokenizer(tokenizer).end_of_text)
    assert manifest.source["settings"] == {
        "layout": "lecture", "tokenizer": tokenizer, "shard_tokens": size,
    }  # fmt: skip


@pytest.mark.parametrize(
    "lengths",
    [
        [10, 10, 10],  # each document fills a shard
        [4, 6, 3, 7, 5],  # documents end with a shard; the last shard is partial
        [6, 5, 9],  # cut, and the last shard is full
        [35, 2],  # more than three shards
        [10, 20, 10],  # exactly two
        [3, 40, 8],
        [9, 1, 1],  # a shard with only an empty document
    ],
)
def test_exact_fits_and_long_documents(
    tmp_path: Path, source: Callable, lengths: list[int]
) -> None:
    texts = [chr(97 + i) * (length - 1) for i, length in enumerate(lengths)]  # + end_of_text
    out = tmp_path / "out"
    run(source(texts), out, shard_tokens=10)
    assert found_files(out) == expected_files(texts, "bytes", 10)


def encoded(documents: list[list[int]], first: int, count: int) -> Encoded:
    """A block of some documents."""
    some = documents[first : first + count]
    tokens = np.concatenate([[END, *ids] for ids in some]).astype(np.uint16)
    starts = np.cumsum([0, *(len(ids) + 1 for ids in some)])
    texts = pa.array([bytes(ids).decode() for ids in some], pa.string())
    return Encoded(Block(texts, 0, first, 0.0), tokens, starts, np.zeros(len(some), bool))


class NoFiles:
    """The minimal source that the layout needs."""

    name, files = "none", (SourceFile("a", 1),)


def cut(
    documents: list[list[int]], layout: Lecture, block: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the shards from the layout's position on; the caller can stop after each."""
    for first in range(layout.cursor[1], len(documents), block):
        for split in layout.add(encoded(documents, first, block)):
            yield split, np.concatenate(layout.take(split).pieces)
    for split, pending in layout.pending.items():
        if pending.pieces:
            yield split, np.concatenate(pending.pieces)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    size=st.integers(1, 30),
    block=st.integers(1, 5),
    stop=st.integers(0, 500),
)
def test_any_documents_resumed_after_any_shard(
    lengths: list[int], size: int, block: int, stop: int
) -> None:
    documents = [[97 + i] * length for i, length in enumerate(lengths)]
    expected = lecture_script(documents, END, size)
    chosen = {"tokenizer": "bytes", "shard_tokens": size}
    straight = Lecture(NoFiles(), get_tokenizer("bytes"), chosen)  # type: ignore[arg-type]
    found = list(cut(documents, straight, block))
    assert [split for split, _ in found] == ["val", *["train"] * (len(expected) - 1)]
    assert [tokens.tolist() for _, tokens in found] == [tokens.tolist() for tokens in expected]

    if len(expected) == 1:
        return
    stop = 1 + stop % (len(expected) - 1)
    stopped = Lecture(NoFiles(), get_tokenizer("bytes"), chosen)  # type: ignore[arg-type]
    shards_made = cut(documents, stopped, block)
    for _ in range(stop):
        next(shards_made)
    resumed = Lecture(NoFiles(), get_tokenizer("bytes"), chosen)  # type: ignore[arg-type]
    entries = [{"split": "val", "tokens": size}]
    state = {"cursor": stopped.cursor, "offset": stopped.offset, "pending": {}, "shards": entries}
    resumed.restore(state, Path())
    rest = list(cut(documents, resumed, block))
    assert [split for split, _ in rest] == ["train"] * (len(expected) - stop)
    assert [t.tolist() for _, t in rest] == [t.tolist() for t in expected[stop:]]


# Resuming


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("write", ["write_file", "write_json"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_crash_at_any_write_gives_the_same_bytes(
    tmp_path: Path, source: Callable, monkeypatch: pytest.MonkeyPatch, write: str, after: bool
) -> None:
    """Each process crashes at its k-th write, until one of them finishes."""
    texts = [[f"{i} " * (7 * i % 40) for i in range(12)], ["long " * 90, *"abc"]]
    chosen = {"shard_tokens": 90}
    run(source(*texts), tmp_path / "complete", **chosen)
    expected = found_files(tmp_path / "complete")
    assert expected == expected_files([*texts[0], *texts[1]], "bytes", 90)
    manifest = (tmp_path / "complete" / "manifest.json").read_bytes()
    assert len(expected) > 8
    original = getattr(storage, write)

    for last in range(1, 100):
        out, stops, writes = tmp_path / str(last), 0, 0

        def crash(*arguments: Any, last: int = last) -> Any:
            nonlocal writes
            writes += 1
            if writes < last or after:
                result = original(*arguments)
                if writes < last:
                    return result
            raise Crash

        with monkeypatch.context() as patch:
            for module in (storage, storage_files):  # `write_json` calls the one in storage_files
                patch.setattr(module, write, crash)
            while stops < 3:
                writes = 0
                try:
                    run(source(*texts), out, **chosen)
                    break
                except Crash:
                    stops += 1
        run(source(*texts), out, **chosen)
        assert found_files(out) == expected
        assert (out / "manifest.json").read_bytes() == manifest
        assert not (out / shards.UNFINISHED).exists()
        if not stops:
            return
    pytest.fail("every run was stopped")


@pytest.fixture
def half_done(source: Callable, texts: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`half_done(out, layout)`: leave `out` as it is after a kill once three shards are done."""

    def make(out: Path, layout: str) -> Any:
        states, original = 0, storage.write_json

        def crash(*arguments: Any) -> None:
            nonlocal states
            original(*arguments)
            states += 1
            if states == 3:
                raise Crash

        made = source(texts(200))
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_json", crash)
            with pytest.raises(Crash):
                run(made, out, layout=layout, shard_tokens=2000)
        return made

    return make


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("before", "now"), [("documents", "lecture"), ("lecture", "documents")])
def test_changed_layout_is_rejected(
    tmp_path: Path, half_done: Callable, finished: bool, before: str, now: str
) -> None:
    out = tmp_path / "out"
    made = half_done(out, before)
    if finished:
        run(made, out, layout=before, shard_tokens=2000)
    files = found_files(out)
    with pytest.raises(UserError, match=f"was prepared with layout {before}, not {now}"):
        run(made, out, layout=now, shard_tokens=2000)
    assert found_files(out) == files


@pytest.mark.parametrize("finished", [True, False])
def test_folders_from_before_layouts_existed(
    tmp_path: Path, half_done: Callable, finished: bool
) -> None:
    """Their manifests and saved states have no layout."""
    out, complete = tmp_path / "out", tmp_path / "complete"
    made = half_done(out, "documents")
    run(made, complete, layout="documents", shard_tokens=2000)
    if finished:
        run(made, out, layout="documents", shard_tokens=2000)
    path = out / "manifest.json" if finished else out / shards.UNFINISHED / shards.STATE
    record = json.loads(path.read_text())
    del record["source"]["settings"]["layout"]
    record.pop("offset", None)
    record.pop("sha256", None)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="was prepared with layout documents, not lecture"):
        run(made, out, layout="lecture", shard_tokens=2000)
    output: list[str] = []
    run(made, out, layout="documents", shard_tokens=2000, console=listen(output))
    assert ("nothing to do" if finished else "resuming") in output[0]
    assert found_files(out) == found_files(complete)


# Rejected sources and settings


def test_validation_files_of_the_source(
    tmp_path: Path, parquet: Callable[..., Path], texts: Callable
) -> None:
    parquet("train.parquet", texts(20, seed=1))
    folder = parquet("val.parquet", texts(20, seed=2))
    with pytest.raises(UserError, match=r"its own validation files \(val\.parquet\)"):
        run(from_arguments(parquet=[folder]), tmp_path / "out", shard_tokens=100)
    assert not (tmp_path / "out" / "manifest.json").exists()
    run(from_arguments(parquet=[folder]), tmp_path / "out", shard_tokens=100, layout="documents")


@pytest.mark.parametrize("size", [12, 13, 50])
def test_text_too_short_for_a_second_shard(tmp_path: Path, source: Callable, size: int) -> None:
    made = source(["abcd", "efghij"])  # 12 tokens
    with pytest.raises(UserError, match=r"first shard of .* lower --shard-tokens"):
        run(made, tmp_path / "out", shard_tokens=size)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_no_documents(tmp_path: Path, source: Callable) -> None:
    with pytest.raises(UserError, match="contains no documents"):
        run(source([]), tmp_path / "out")


def test_settings_that_cannot_be_combined(tmp_path: Path, source: Callable) -> None:
    out = tmp_path / "out"
    for changes, words in (
        ({"val_tokens": 0}, "--val-tokens 0 cannot be combined with --layout lecture"),
        ({"layout": "stream"}, "--layout must be documents or lecture, not 'stream'"),
        ({"shard_tokens": 0}, "--shard-tokens 0"),
    ):
        with pytest.raises(UserError, match=words):
            run(source(["a"]), out, **changes)
    assert not out.exists()
    shards.write_shard(tmp_path / "train_000000.bin", [np.array([256, 1], np.uint16)])
    with pytest.raises(UserError, match="used unchanged: remove --layout lecture"):
        run(from_arguments(shards=tmp_path), tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_from_the_command_line(tmp_path: Path, rekindle: Callable[..., Any]) -> None:
    (tmp_path / "a.txt").write_text("a text of a few shards")
    begin = ["prepare", "--text", tmp_path / "a.txt", "--tokenizer", "bytes", "--layout", "lecture",
             "--shard-tokens", 9, "--out", tmp_path / "out"]  # fmt: skip
    outcome = rekindle(*begin, "--val-tokens", 5)
    assert outcome.status == 2
    assert outcome.err.startswith("rekindle: error: --val-tokens 5 cannot be combined with")
    assert rekindle(*begin).status == 0
    assert found_files(tmp_path / "out") == expected_files(["a text of a few shards"], "bytes", 9)

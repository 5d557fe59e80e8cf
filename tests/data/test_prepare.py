"""`prepare` produces the right tokens exactly once, even after crashes, kills and errors."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rekindle import storage
from rekindle.data import encoding, samples, shards
from rekindle.data import prepare as module
from rekindle.data.encoding import encoded_blocks, is_validation
from rekindle.data.prepare import prepare
from rekindle.data.shards import Manifest
from rekindle.data.sources import from_arguments
from rekindle.data.sources.base import Block, Source, SourceFile
from rekindle.data.tokenizer import get_tokenizer
from rekindle.errors import UserError
from rekindle.observe.console import Console
from rekindle.observe.progress import Progress
from rekindle.storage import files as storage_files
from tests.data.listening import listen

ROOT = Path(__file__).parents[2]
# Which of 300 texts are held out with a validation fraction of 0.1.
VALIDATION = [
    5, 15, 43, 51, 144, 152, 153, 156, 171, 190, 191, 201, 203, 208,
    212, 217, 223, 239, 249, 255, 259, 260, 276, 279, 288, 297, 299,
]  # fmt: skip


class ListSource(Source):
    """Documents from lists, in small blocks, so that even little data has many blocks."""

    name, revision, licence = "a list", "1", "none"

    def __init__(self, *files: list[str], block: int = 7, splits: str = "") -> None:
        self.lists, self.block = files, block
        names = splits.split() or [None] * len(files)
        self.files = [
            SourceFile(str(i), len(texts), split)
            for i, (texts, split) in enumerate(zip(files, names, strict=True))
        ]

    @property
    def text_bytes(self) -> int:
        return sum(len(text.encode()) for texts in self.lists for text in texts)

    @property
    def fingerprint(self) -> str:
        return str(hash(tuple(map(tuple, self.lists))))

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        texts = self.lists[file]
        for i in range(skip, len(texts), self.block):
            some = texts[i : i + self.block]
            yield Block(pa.array(some, pa.string()), file, i, (i + len(some)) / len(texts))


def run(source: Any, out: Path, **settings: Any) -> Manifest:
    return prepare(
        source, out, **({"console": Console(quiet=True), "tokenizer": "bytes"} | settings)
    )


def read_documents(out: Path, split: str) -> list[list[int]]:
    """The documents of one split; also checks the layout."""
    manifest = shards.read_manifest(out)
    shards.verify(out, manifest)
    end_of_text = get_tokenizer(manifest.tokenizer).end_of_text
    found: list[list[int]] = []
    for shard, tokens in zip(
        manifest.split(split), shards.open_split(out, manifest, split), strict=True
    ):
        assert tokens[0] == end_of_text  # a shard starts with a document
        starts = np.flatnonzero(tokens == end_of_text)
        assert len(starts) == shard.documents
        found += [part[1:].tolist() for part in np.split(tokens, starts[1:])]
    return found


def contents(out: Path) -> dict[str, bytes]:
    """All files except the lock, which names a process."""
    files = [path for path in sorted(out.iterdir()) if path.name != storage.LOCK]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests kill processes, not machines; flushing the disk would only make them slow."""
    monkeypatch.setattr(storage_files, "_flush", lambda descriptor: None)
    monkeypatch.setattr(storage_files, "_flush_folder", lambda path: None)


# The right tokens


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_every_document_appears_once_and_in_order(
    tmp_path: Path, texts: Callable[..., list[str]], tokenizer: str
) -> None:
    documents = texts(300)
    documents[5] = ""  # an empty document counts as a document
    run(ListSource(documents[:100], documents[100:]), tmp_path, tokenizer=tokenizer)
    mask = is_validation(pa.array(documents), 0.1)  # so little text that MOST_VALIDATION applies
    encode = get_tokenizer(tokenizer).encode
    for split, chosen in (("train", ~mask), ("val", mask)):
        expected = [encode(text) for text, c in zip(documents, chosen, strict=True) if c]
        assert read_documents(tmp_path, split) == expected
    # Hard-coded, because a changed rule would change the expectation above as well.
    assert np.flatnonzero(mask).tolist() == VALIDATION


def test_parquet_with_validation_files(
    tmp_path: Path, parquet: Callable[..., Path], texts: Callable[..., list[str]]
) -> None:
    train, val = texts(100, seed=1), texts(20, seed=2)
    parquet("train.parquet", train)
    folder = parquet("val.parquet", val)
    manifest = run(from_arguments(parquet=[folder]), tmp_path / "out", val_tokens=5)
    assert read_documents(tmp_path / "out", "train") == [list(t.encode()) for t in train]
    assert read_documents(tmp_path / "out", "val") == [list(t.encode()) for t in val]
    assert manifest.tokenizer == "bytes"
    assert manifest.source["name"] == "parquet: source"
    assert {"revision", "licence", "fingerprint"} <= manifest.source.keys()
    assert not (tmp_path / "out" / ".progress").exists()


def test_split_given_by_the_source_is_used(tmp_path: Path, texts: Callable[..., list[str]]) -> None:
    """If the source assigns everything to training, nothing is held out."""
    output: list[str] = []
    source = ListSource(texts(9), splits="train")
    manifest = run(source, tmp_path, val_tokens=10**9, console=listen(output))
    assert {shard.split for shard in manifest.shards} == {"train"}
    assert not any("no documents for validation" in line for line in output)


def test_shards_end_with_the_document_that_fills_them(
    tmp_path: Path, texts: Callable[..., list[str]]
) -> None:
    documents = texts(400)
    manifest = run(ListSource(documents, block=150), tmp_path, shard_tokens=3000)
    for split in ("train", "val"):
        made = manifest.split(split)
        assert [shard.name for shard in made] == [f"{split}_{i:06d}.bin" for i in range(len(made))]
        tokens = shards.open_split(tmp_path, manifest, split)
        for shard in tokens[:-1]:
            last = len(shard) - int(np.flatnonzero(shard == 256)[-1])
            assert len(shard) - last < 3000 <= len(shard)
    assert len(manifest.split("train")) > 10
    assert len(manifest.split("val")) >= 2


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_result_does_not_depend_on_blocks_and_threads(
    tmp_path: Path,
    texts: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: str,
) -> None:
    documents = texts(200)
    made = []
    for threads, block in ((1, 200), (2, 7), (8, 1)):
        monkeypatch.setattr(encoding, "usable_cores", lambda threads=threads: threads)
        out = tmp_path / str(threads)
        source = ListSource(documents, block=block)
        run(source, out, tokenizer=tokenizer, shard_tokens=2000)
        made.append(contents(out))
    assert made[0] == made[1] == made[2]


def test_which_documents_are_validation_never_changes() -> None:
    """A newer version that prepares the same text again must not train on held-out documents."""
    documents = pa.array([f"document {i}" for i in range(200)])
    half = is_validation(documents, 0.5).astype(int)[:12].tolist()
    assert half == [0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert np.flatnonzero(is_validation(documents, 0.02)).tolist() == [19, 172]
    assert is_validation(pa.array(["", "東京", "a\n"]), 0.5).tolist() == [True, False, False]


def test_copies_of_a_text_are_in_the_same_split(
    tmp_path: Path, texts: Callable[..., list[str]]
) -> None:
    """Copies of a document are never in both splits, regardless of their order."""
    documents = texts(300) * 3
    random.Random(0).shuffle(documents)
    run(ListSource(documents), tmp_path / "a")
    run(ListSource(documents[::-1]), tmp_path / "b")
    train, val = (
        {tuple(document) for document in read_documents(tmp_path / "a", split)}
        for split in ("train", "val")
    )
    assert train
    assert val
    assert not train & val
    assert val == {tuple(document) for document in read_documents(tmp_path / "b", "val")}


def test_amount_of_validation_matches_the_request(
    tmp_path: Path, texts: Callable[..., list[str]]
) -> None:
    documents = texts(3000, words=10)
    asked = sum(map(len, documents)) // 20
    manifest = run(ListSource(documents, block=500), tmp_path / "a", val_tokens=asked)
    assert asked < manifest.tokens("val") < 1.5 * asked
    assert run(ListSource(documents), tmp_path / "b", val_tokens=0).tokens("val") == 0
    # Most of a small source stays training data.
    manifest = run(ListSource(documents), tmp_path / "c", val_tokens=10**9)
    assert 0.05 < manifest.tokens("val") / manifest.tokens("train") < 0.2


def test_single_document_is_training_data(tmp_path: Path) -> None:
    for i in range(60):
        manifest = run(ListSource([f"only one, number {i}"]), tmp_path / str(i))
        assert manifest.tokens("train") > 0


# Resuming


def test_finished_folder_is_not_prepared_again(
    tmp_path: Path, texts: Callable[..., list[str]]
) -> None:
    output: list[str] = []
    documents = texts(50)
    first = run(ListSource(documents), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    class Unreadable(ListSource):
        def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
            raise AssertionError("it was read again")

    assert run(Unreadable(documents), tmp_path, console=listen(output)) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert len(output) == 1
    assert "nothing to do" in output[0]


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_crash_at_any_write_gives_the_same_result(
    tmp_path: Path,
    texts: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    after: bool,
) -> None:
    """Before and after each rename; every run is stopped several times."""
    documents = [texts(35, seed=1), texts(35, seed=2)]
    settings = {"shard_tokens": 700, "val_tokens": 10**6}
    run(ListSource(*documents), tmp_path / "complete", **settings)
    expected = contents(tmp_path / "complete")
    assert {"train_000006.bin", "val_000001.bin"} <= expected.keys()
    replace = os.replace

    for last in range(1, 100):  # the write at which each process crashes
        out = tmp_path / f"crash-{last}"
        writes = 0

        def crash(source: Any, target: Any, last: int = last) -> None:
            nonlocal writes
            writes += 1
            if writes < last or after:
                replace(source, target)
            if writes == last:
                raise Crash

        stops = 0
        while stops < 3:
            writes = 0
            monkeypatch.setattr(os, "replace", crash)
            try:
                run(ListSource(*documents), out, **settings)
                break
            except Crash:
                stops += 1
        monkeypatch.setattr(os, "replace", replace)
        run(ListSource(*documents), out, **settings)
        assert contents(out) == expected
        if not stops:
            return
    pytest.fail("every run was stopped")


KILLED = """
import sys
from pathlib import Path
from rekindle import storage
from rekindle.data.prepare import prepare
from rekindle.data.sources import from_arguments, local

local.BLOCK_BYTES = 4000
storage.files._flush = storage.files._flush_folder = lambda _: None
source = from_arguments(parquet=[sys.argv[1]])
prepare(source, Path(sys.argv[2]), "bytes", shard_tokens=5000, val_tokens=10**6)
"""


def test_kill_at_any_moment_gives_the_same_bytes(
    tmp_path: Path, parquet: Callable[..., Path], texts: Callable[..., list[str]]
) -> None:
    parquet("b.parquet", texts(1200, seed=2))
    folder = parquet("a.parquet", texts(1200, seed=1))
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(tmp_path / "complete")], env=environment, check=True)

    rng = random.Random(time.time_ns())
    kills = 0
    while kills < 12:
        process = subprocess.Popen(
            [*command, str(out)], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        for _ in range(rng.randint(0, 12)):
            if not process.stdout.readline():
                break
        time.sleep(rng.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            if kills >= 3:
                break
            shutil.rmtree(out)  # on a busy machine it may finish before it is killed
            continue
        assert process.returncode == -signal.SIGKILL
        kills += 1
        for path in out.glob("[tv]*.bin"):
            shards.open_shard(path)  # raises if it is half-written
    else:
        subprocess.run([*command, str(out)], env=environment, check=True)
    assert contents(out) == contents(tmp_path / "complete")


def interrupted(out: Path, documents: list[str], **settings: Any) -> None:
    """Leave `out` as a killed process does: with some shards, but no manifest."""

    class Ends(ListSource):
        def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
            for block in super().blocks(file, skip):
                if block.first > len(documents) * 2 // 3:
                    raise Crash
                yield block

    with pytest.raises(Crash):
        run(Ends(documents), out, **settings)
    assert (out / ".progress" / "state.json").exists()
    assert not (out / "manifest.json").exists()


def test_resuming_skips_finished_documents(tmp_path: Path, texts: Callable[..., list[str]]) -> None:
    documents = texts(300)
    interrupted(tmp_path, documents, shard_tokens=2000)
    seen: list[int] = []

    class Watched(ListSource):
        def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
            seen.append(skip)
            return super().blocks(file, skip)

    output: list[str] = []
    run(Watched(documents), tmp_path, shard_tokens=2000, console=listen(output))
    assert seen[0] > 100
    assert "resuming" in output[0]
    assert len(read_documents(tmp_path, "train") + read_documents(tmp_path, "val")) == 300


# Existing data is never overwritten


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": "gpt2"}, "with tokenizer bytes, not gpt2"),
        ({"val_tokens": 7}, "with val_tokens 10485760, not 7"),
        ({"shard_tokens": 1999}, "with shard_tokens 2000, not 1999"),
        ({"source": ["other text"]}, "is not the same text"),
    ],
)
def test_other_data_is_rejected(
    tmp_path: Path,
    texts: Callable[..., list[str]],
    changed: dict[str, Any],
    message: str,
    finished: bool,
) -> None:
    documents = texts(100)
    if finished:
        run(ListSource(documents), tmp_path, shard_tokens=2000)
    else:
        interrupted(tmp_path, documents, shard_tokens=2000)
    before = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    settings: dict[str, Any] = {"shard_tokens": 2000} | changed
    source = ListSource(settings.pop("source", documents))
    with pytest.raises(UserError, match=message):
        run(source, tmp_path, **settings)
    assert [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


@pytest.mark.parametrize("finished", [True, False])
def test_damaged_shard_is_reported(
    tmp_path: Path, texts: Callable[..., list[str]], finished: bool
) -> None:
    documents = texts(100)
    if finished:
        run(ListSource(documents), tmp_path, shard_tokens=2000)
    else:
        interrupted(tmp_path, documents, shard_tokens=2000)
    path = tmp_path / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train_000000\.bin"):
        run(ListSource(documents), tmp_path, shard_tokens=2000)


# Rejected sources and settings


@pytest.mark.parametrize("files", [[[]], [[], []]])
def test_no_documents(tmp_path: Path, files: list[list[str]]) -> None:
    with pytest.raises(UserError, match="no documents"):
        run(ListSource(*files), tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "settings", [{"val_tokens": -1}, {"shard_tokens": 0}, {"shard_tokens": 2**31}]
)
def test_settings_out_of_range(tmp_path: Path, settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match="--shard-tokens"):
        run(ListSource(["a"]), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_manifest_and_can_be_resumed(
    tmp_path: Path, texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = texts(200)
    run(ListSource(documents), tmp_path / "complete", shard_tokens=2000)
    write, writes = storage.write_file, 0

    def full(path: Path, chunks: Any) -> str:
        nonlocal writes
        writes += 1
        if writes == 6:
            (path.parent / ".tmp-part").write_bytes(b"what a full disk leaves")
            raise OSError(28, "No space left on device", str(path))
        return write(path, chunks)

    for target in (storage, storage_files):  # `write_json` calls the one in storage_files
        monkeypatch.setattr(target, "write_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*resumes where it stopped"):
        run(ListSource(documents), tmp_path / "full", shard_tokens=2000)
    assert not (tmp_path / "full" / "manifest.json").exists()
    run(ListSource(documents), tmp_path / "full", shard_tokens=2000)
    assert contents(tmp_path / "full") == contents(tmp_path / "complete")


def test_unknown_tokenizer_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown tokenizer 'gpt3': use gpt2 or bytes"):
        run(ListSource(["a"]), tmp_path / "out", tokenizer="gpt3")
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        run(ListSource(["a"]), tmp_path / "file")


def test_failing_source_leaves_no_manifest(tmp_path: Path, texts: Callable[..., list[str]]) -> None:
    lines = [json.dumps({"text": text}) for text in texts(50)] + ["{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"a\.jsonl:51"):
        run(from_arguments(jsonl=[tmp_path / "a.jsonl"]), out, shard_tokens=500)
    assert not (out / "manifest.json").exists()


# The check against the reference


@pytest.mark.parametrize("wrong", [0, 31, 40, 77])
def test_wrong_token_stops_and_shows_both_encodings(
    tmp_path: Path,
    texts: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    wrong: int,
) -> None:
    """An encoder that is wrong for every document from some point on is detected."""
    tokenizer = get_tokenizer("gpt2")
    original = type(tokenizer).encode_documents

    def faulty(self: Any, array: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = original(self, array)
        tokens = tokens.copy()
        if int(array[0].as_py().split()[0].split("-")[1]) >= wrong:
            tokens[tokens == tokenizer.encode("-")[0]] = 11
        return tokens, lengths

    monkeypatch.setattr(type(tokenizer), "encode_documents", faulty)
    with pytest.raises(
        UserError, match=r"train_000000\.bin: .*['\"]0-\d+ .*\[15, 11,.*\[15, 12,"
    ) as e:
        run(ListSource(texts(90), block=1), tmp_path, tokenizer="gpt2", val_tokens=0)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.glob("*.bin"))


def test_wrong_token_is_found_in_pending_documents(
    tmp_path: Path, texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pending validation documents are saved whenever a training shard is finished. They are not
    read again after that, so their sample must be compared before."""
    tokenizer = get_tokenizer("bytes")
    original = type(tokenizer).encode_documents

    def faulty(self: Any, array: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens, starts = original(self, array)
        if array[0].as_py().startswith("1-"):
            tokens[starts[0] + 1] += 1
        return tokens, starts

    monkeypatch.setattr(type(tokenizer), "encode_documents", faulty)
    source = ListSource(texts(5, seed=1), texts(90, seed=2), splits="val train")
    with pytest.raises(UserError, match=r"val-000000\.bin: the fast encoder and the reference"):
        run(source, tmp_path, shard_tokens=2000)
    assert not list(tmp_path.glob(".progress/*.bin"))


def test_samples_are_spread_over_the_shard() -> None:
    tokenizer = get_tokenizer("bytes")
    for count in (1, 32, 33, 100, 1000, 5000):
        kept = samples.Samples(tokenizer)
        for start in range(0, count, 13):
            texts = [f"document {i}" for i in range(start, min(start + 13, count))]
            lengths = np.array([len(text) + 1 for text in texts])
            starts = np.concatenate([[0], np.cumsum(lengths)])
            tokens = np.concatenate([[256, *tokenizer.encode(text)] for text in texts])
            kept.offer(pa.array(texts), np.arange(len(texts)), tokens, starts)
        numbers = [sample.number for sample in kept._kept]
        assert [sample.text for sample in kept._kept] == [f"document {i}" for i in numbers]
        assert min(count, 16) <= len(numbers) <= 32
        assert numbers[0] == 0
        assert max(np.diff([*numbers, count])) <= max(1, count // 8)
        kept.check("here")


def test_long_documents_are_compared_up_to_a_safe_cut() -> None:
    """The beginning of a text, cut before a space between words, has the same tokens as in the
    whole text."""
    tokenizer = get_tokenizer("gpt2")
    text = ("It's 3.14  spaces\n\n 東京 and more words, " * 2000)[: samples.LONGEST + 5000]
    tokens = np.array([tokenizer.end_of_text, *tokenizer.encode(text)])
    for wrong in (False, True):
        kept = samples.Samples(tokenizer)
        tokens[5000] += wrong
        kept.offer(pa.array([text]), np.array([0]), tokens, np.array([0, len(tokens)]))
        if wrong:
            with pytest.raises(UserError, match="differ at token 4999"):
                kept.check("here")
        else:
            kept.check("here")


# Memory, progress


def test_number_of_blocks_in_flight_is_bounded(texts: Callable[..., list[str]]) -> None:
    """Even with a slow consumer: memory does not depend on the size of the source."""
    read = 0

    class Counted(ListSource):
        def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
            nonlocal read
            for block in super().blocks(file, skip):
                read += 1
                yield block

    source = Counted(texts(500), block=1)
    stream = encoded_blocks(source, get_tokenizer("bytes"), (0, 0), 0.0)
    for consumed, _ in enumerate(stream, 1):
        assert read - consumed <= encoding.usable_cores() + encoding.AHEAD
    assert read == 500


def test_no_threads_are_left_running(tmp_path: Path, texts: Callable[..., list[str]]) -> None:
    before = threading.active_count()
    run(ListSource(texts(50)), tmp_path / "a")
    with pytest.raises(UserError):
        run(ListSource([]), tmp_path / "b")
    assert threading.active_count() == before


def test_progress_lines(
    tmp_path: Path, texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates and times are valid numbers from the first line to the last, even after a resume."""
    documents = texts(300)
    interrupted(tmp_path, documents, shard_tokens=2000)
    output: list[str] = []
    ticks = iter(range(100_000))
    monkeypatch.setattr("rekindle.observe.progress.time.monotonic", lambda: next(ticks) * 11.0)
    run(ListSource(documents), tmp_path, shard_tokens=2000, console=listen(output))
    text = "\n".join(output)
    assert "tokens/s | " in text
    assert "left" in text
    assert f"train_{len(shards.read_manifest(tmp_path).split('train')) - 2:06d}.bin: " in text
    for strange in ("nan", "inf", "-", "101%"):
        assert strange not in text.replace(str(tmp_path), "")
    assert "tokens to train on" in output[-1]
    counted = [
        int(line.split(" | ")[-1].removesuffix(" tokens").replace(",", ""))
        for line in output
        if line.startswith("preparing")
    ]
    assert counted == sorted(counted)
    assert 0 < counted[-1] < sum(map(len, documents)) + len(documents)  # only this call's tokens


def test_progress_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first progress line is delayed, and a printed line overwrites it."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    output: list[str] = []
    console = listen(output, terminal=True)
    progress = Progress(console, "tokens")
    progress.update(0, 0.0)
    assert output == []
    now[0] += 2
    progress.update(1000, 0.5)
    progress.update(1001, 0.5)
    console.print("done")
    console.print("and over")
    progress_line = "50% | 2.0 s left | 500 tokens/s | 1,000 tokens"
    assert "".join(output) == f"\r\033[K{progress_line}\r\033[Kdone\nand over\n"


# Ready-made shards in a folder


def write_shards(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        shards.write_shard(folder / name, [np.array([50256, i, 50255, 50256, 7], np.uint16)])


def test_folder_of_shards_gets_a_manifest(tmp_path: Path) -> None:
    write_shards(tmp_path, ["fineweb_train_000001.bin", "fineweb_val_000000.bin"])
    (tmp_path / ".tmp-fineweb_train_000002.bin").write_bytes(b"an unfinished download")
    output: list[str] = []
    source = from_arguments(shards=tmp_path)
    manifest = run(source, tmp_path, tokenizer="gpt2", console=listen(output))
    assert manifest == shards.read_manifest(tmp_path)
    assert [(s.split, s.tokens, s.documents) for s in manifest.shards] == [
        ("train", 5, 2),
        ("val", 5, 2),
    ]
    shards.verify(tmp_path, manifest)
    assert run(from_arguments(shards=tmp_path), tmp_path, tokenizer="gpt2", console=listen(output))
    assert "nothing to do" in output[-1]


def test_unusable_folder_of_shards_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no shards"):
        from_arguments(shards=tmp_path)
    write_shards(tmp_path, ["train_000001.bin"])
    with pytest.raises(UserError, match="used in place"):
        run(from_arguments(shards=tmp_path), tmp_path / "other", tokenizer="gpt2")
    with pytest.raises(UserError, match="id 50256, outside the vocabulary of 257"):
        run(from_arguments(shards=tmp_path), tmp_path, tokenizer="bytes")
    (tmp_path / "train_000002.bin").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"train_000002\.bin does not start with the header"):
        run(from_arguments(shards=tmp_path), tmp_path, tokenizer="gpt2")
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / "train_000002.bin").unlink()
    run(from_arguments(shards=tmp_path), tmp_path, tokenizer="gpt2")
    write_shards(tmp_path, ["train_000001.bin", "train_000003.bin"])
    with pytest.raises(UserError, match="lists other shards"):
        run(from_arguments(shards=tmp_path), tmp_path, tokenizer="gpt2")


def test_defaults_match_the_lecture() -> None:
    assert (module.VAL_TOKENS, module.SHARD_TOKENS) == (20 * 524_288, 100_000_000)

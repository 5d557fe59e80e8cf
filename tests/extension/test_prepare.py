"""Preparing data with a source and a tokenizer from outside the package."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rekindle.data import encoding, shards
from rekindle.data.prepare import prepare
from rekindle.data.shards import Manifest
from rekindle.data.sources.base import Block, Source
from rekindle.errors import UserError
from rekindle.storage import LOCK, files, read_json
from tests.extension.counter_source import CounterSource
from tests.extension.digit_tokenizer import DigitTokenizer

DIGITS = DigitTokenizer()


def run(source: Source, out: Path, tokenizer: DigitTokenizer = DIGITS) -> Manifest:
    return prepare(source, out, tokenizer=tokenizer, shard_tokens=400)


def texts(out: Path, split: str) -> list[str]:
    """The documents of a split, decoded."""
    manifest = shards.read_manifest(out)
    shards.verify(out, manifest)
    tokens = np.concatenate(shards.open_split(out, manifest, split))
    starts = np.flatnonzero(tokens == DIGITS.end_of_text)
    return [DIGITS.decode(part[1:].tolist()) for part in np.split(tokens, starts)[1:]]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != LOCK}


def test_tokens_decode_to_every_document(tmp_path: Path) -> None:
    source = CounterSource(40, 25)
    manifest = run(source, tmp_path)
    train, val = texts(tmp_path, "train"), texts(tmp_path, "val")
    assert val
    assert sorted([*train, *val], key=len) == [*source.texts(0), *source.texts(1)]
    assert (manifest.tokenizer, manifest.tokenizer_sha256) == ("digits", DIGITS.sha256)
    assert manifest.vocab_size == 12
    assert len(manifest.split("train")) > 5


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests interrupt calls, not machines, so flushing the disk would only slow them down."""
    monkeypatch.setattr(files, "_flush", lambda descriptor: None)
    monkeypatch.setattr(files, "_flush_folder", lambda path: None)


class Crash(Exception):
    """Simulates the end of the process."""


class CrashingSource(CounterSource):
    """Crashes instead of reading block number `last`."""

    def __init__(self, first: int, second: int, last: int) -> None:
        super().__init__(first, second)
        self.left = last

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        for block in super().blocks(file, skip):
            if not self.left:
                raise Crash
            self.left -= 1
            yield block


def test_killed_preparation_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encoding, "usable_cores", lambda: 1
    )  # no reading ahead, which would be lost
    run(CounterSource(40, 25), tmp_path / "straight")
    resumed_in = set()  # the file
    for last in (0, 9, 12):
        out = tmp_path / str(last)
        with pytest.raises(Crash):
            run(CrashingSource(40, 25, last), out)
        if (state := out / shards.UNFINISHED / shards.STATE).exists():
            resumed_in.add(read_json(state)["cursor"][0])
        run(CounterSource(40, 25), out)
        assert contents(out) == contents(tmp_path / "straight")
    assert resumed_in == {0, 1}


def test_different_vocabulary_of_the_same_name_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "usable_cores", lambda: 1)
    other = DigitTokenizer(" 9876543210")
    with pytest.raises(Crash):
        run(CrashingSource(40, 25, 12), tmp_path)
    for _ in range(2):  # unfinished, then finished
        with pytest.raises(UserError, match="another vocabulary named 'digits'"):
            run(CounterSource(40, 25), tmp_path, other)
        run(CounterSource(40, 25), tmp_path)

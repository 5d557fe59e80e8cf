"""The split of a file is decided by the words in its name, in the same way for every source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle.data import shards
from rekindle.data.prepare import prepare
from rekindle.data.shards import Manifest
from rekindle.data.sources import from_arguments
from rekindle.data.sources.hub import HubSource
from rekindle.errors import UserError
from rekindle.observe.console import Console
from tests.data.listening import listen
from tests.data.naming import source_of

SUFFIX = {"parquet": ".parquet", "jsonl": ".jsonl", "text": ".txt"}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        path.write_text(json.dumps({"text": text}) if path.suffix == ".jsonl" else text)
    return path


def run(source: Any, out: Path, output: list[str] | None = None, **settings: Any) -> Manifest:
    console = Console(quiet=True) if output is None else listen(output)
    return prepare(source, out, **({"tokenizer": "bytes", "console": console} | settings))


def text_of(out: Path, split: str) -> list[str]:
    manifest = shards.read_manifest(out)
    parts = shards.open_split(out, manifest, split)
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
    documents = np.split(tokens, np.flatnonzero(tokens == 256)[1:]) if len(tokens) else []
    return [bytes(part[1:].astype(np.uint8)).decode() for part in documents]


# File name → its split in a source with validation files; "" means left out.
NAMES = {
    "train-00000-of-00001": "train", "0000": "train", "values_0000": "train", "valence": "train",
    "medieval_train": "train", "testimony": "train", "devices": "train", "evaluated": "train",
    "latest": "train", "contest": "train", "évalué": "train", "trainval2": "train",
    "val": "val", "validation-00000-of-00001": "val", "c4-VALIDATION.00000": "val",
    "wiki.valid": "val", "dev": "val", "x_dev_1": "val", "val000001": "val", "wikiValid": "val",
    "test": "", "TEST_3": "", "wiki.test.raw": "", "eval": "", "my-eval-2": "", "test_of_dev": "",
}  # fmt: skip


@pytest.mark.parametrize("kind", SUFFIX)
def test_words_of_a_name(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "source"
    for name in NAMES:
        write(folder / f"{name}{SUFFIX[kind]}", name)
    run(source_of(kind, [folder]), tmp_path / "out")
    for split in ("train", "val"):
        expected = {name for name, found in NAMES.items() if found == split}
        assert set(text_of(tmp_path / "out", split)) == expected


@pytest.mark.parametrize("kind", SUFFIX)
def test_words_of_a_folder(tmp_path: Path, kind: str) -> None:
    """Folders below a given path count, and given folders if there are several; folders above do
    not."""
    above = tmp_path / "test" / "val"
    for name in ("train/0", "validation/0", "test/0", "dev/train/1", "eval/x/2"):
        write(above / "all" / f"{name}{SUFFIX[kind]}", name)
    run(source_of(kind, [above / "all"]), tmp_path / "out")
    assert set(text_of(tmp_path / "out", "train")) == {"train/0", "dev/train/1"}
    assert text_of(tmp_path / "out", "val") == ["validation/0"]
    named = [above / "all" / folder for folder in ("train", "test", "validation")]
    run(source_of(kind, named), tmp_path / "out2")
    assert text_of(tmp_path / "out2", "train") == ["train/0"]
    assert text_of(tmp_path / "out2", "val") == ["validation/0"]
    file = above / "all" / "eval" / "x" / f"2{SUFFIX[kind]}"
    run(source_of(kind, [file]), tmp_path / "out3")
    assert text_of(tmp_path / "out3", "train") == ["eval/x/2"]


def test_words_on_the_hub(hub: Any, as_parquet: Callable[..., bytes], tmp_path: Path) -> None:
    names = ("train/0000", "validation/0000", "test/0000", "train/testimony", "valence/1")
    hub.add("a/b", {f"test/default/{name}.parquet": as_parquet([name]) for name in names})
    source = HubSource("a/b", "test/default")
    output: list[str] = []
    run(source, tmp_path / "out", output)
    assert text_of(tmp_path / "out", "train") == ["train/0000", "train/testimony", "valence/1"]
    assert text_of(tmp_path / "out", "val") == ["validation/0000"]
    assert not any("test/0000" in name for name in hub.downloads)
    assert any("left out" in line and "test/0000.parquet" in line for line in output)


def test_words_of_ready_made_shards(tmp_path: Path) -> None:
    names = ("values_000001", "medieval_train_1", "x_val_000000", "x_test_000000", "VAL_2", "dev3")
    for i, name in enumerate(names):
        shards.write_shard(tmp_path / f"{name}.bin", [np.array([50256, i], np.uint16)])
    output: list[str] = []
    manifest = run(from_arguments(shards=tmp_path), tmp_path, output, tokenizer="gpt2")
    assert {(s.split, s.name.removesuffix(".bin")) for s in manifest.shards} == {
        ("train", "values_000001"), ("train", "medieval_train_1"), ("val", "x_val_000000"),
        ("val", "VAL_2"), ("val", "dev3"),
    }  # fmt: skip
    assert any("left out" in line and "x_test_000000.bin" in line for line in output)
    output.clear()
    run(from_arguments(shards=tmp_path), tmp_path, output, tokenizer="gpt2")
    assert "nothing to do" in output[-1]


def test_one_line_is_printed_per_split(tmp_path: Path) -> None:
    for name in ("train", "more", "val", "test"):
        write(tmp_path / "source" / f"{name}.jsonl", name)
    output: list[str] = []
    run(source_of("jsonl", [tmp_path / "source"]), tmp_path / "out", output)
    assert output[:3] == [
        "training: 2 files (more.jsonl, train.jsonl)",
        "validation: 1 file (val.jsonl)",
        "left out, test data by name: 1 file (test.jsonl)",
    ]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "training, and validation by a hash of each document: 1 file (a.txt)"),
        ({"val_tokens": 0}, "training: 1 file (a.txt)"),
        (
            {"layout": "lecture", "shard_tokens": 3},
            "validation in the first shard, then training: 1 file (a.txt)",
        ),
    ],
)
def test_files_without_a_split_are_described(
    tmp_path: Path, settings: dict[str, Any], line: str
) -> None:
    output: list[str] = []
    run(
        source_of("text", [write(tmp_path / "a.txt", "a text")]),
        tmp_path / "out",
        output,
        **settings,
    )
    assert output[0] == line


@pytest.mark.parametrize("names", [["val"], ["test"], ["dev", "eval"]])
@pytest.mark.parametrize("kind", SUFFIX)
def test_nothing_left_to_train_on(tmp_path: Path, kind: str, names: list[str]) -> None:
    paths = [write(tmp_path / f"{name}{SUFFIX[kind]}", name) for name in names]
    with pytest.raises(UserError, match=f"nothing to train on.*{names[-1]}"):
        run(source_of(kind, paths), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_training_files_without_a_document(tmp_path: Path) -> None:
    write(tmp_path / "val.txt", "held out")
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(UserError, match="nothing to train on"):
        run(source_of("text", [tmp_path / "train.txt", tmp_path / "val.txt"]), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_ready_made_shards_without_training_data(tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "val_0.bin", [np.array([50256, 1], np.uint16)])
    with pytest.raises(UserError, match="nothing to train on"):
        run(from_arguments(shards=tmp_path), tmp_path, tokenizer="gpt2")
    assert not (tmp_path / "manifest.json").exists()

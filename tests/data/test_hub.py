"""Downloads from a real local server: pinned, checked, bounded on disk, and resumable."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rekindle.data import shards
from rekindle.data.prepare import prepare
from rekindle.data.shards import Manifest
from rekindle.data.sources import from_arguments
from rekindle.data.sources import hub as module
from rekindle.data.sources.base import Block
from rekindle.data.sources.hub import HubSource
from rekindle.errors import UserError
from rekindle.observe.console import Console

EDU = "HuggingFaceFW/fineweb-edu"
SHARDS = "kjj0/fineweb10B-gpt2"


def run(dataset: str, out: Path, **settings: Any) -> Manifest:
    settings = {"console": Console(quiet=True), "tokenizer": "bytes"} | settings
    return prepare(from_arguments(dataset=dataset), out, **settings)


def read_text(out: Path, split: str) -> list[str]:
    manifest = shards.read_manifest(out)
    tokens = np.concatenate(shards.open_split(out, manifest, split))
    parts = np.split(tokens, np.flatnonzero(tokens == 256)[1:])
    return [bytes(part[1:].astype(np.uint8)).decode() for part in parts]


@pytest.fixture
def edu(hub: Any, texts: Callable[..., list[str]], as_parquet: Callable[..., bytes]) -> list[str]:
    """Serve FineWeb-Edu's sample in three files, among other files; return its documents."""
    files = [texts(80, seed=i) for i in range(3)]
    hub.add(EDU, {f"sample/10BT/00{i}_00000.parquet": as_parquet(f) for i, f in enumerate(files)})
    hub.add(EDU, {"README.md": b"# a card", "sample/100BT/000.parquet": b"not wanted"})
    return [text for file in files for text in file]


@pytest.fixture(autouse=True)
def no_retry_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the hub client's pause of one second before a retry."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def test_dataset_by_short_name(hub: Any, edu: list[str], tmp_path: Path) -> None:
    manifest = run("fineweb-edu-10bt", tmp_path / "out")
    both = read_text(tmp_path / "out", "train") + read_text(tmp_path / "out", "val")
    assert sorted(both) == sorted(edu)
    assert hub.downloads == [f"sample/10BT/00{i}_00000.parquet" for i in range(3)]
    source = manifest.source
    assert source["name"] == "HuggingFaceFW/fineweb-edu:sample/10BT"
    assert (source["revision"], source["licence"]) == (hub.revision, "odc-by")
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(names) == [".lock", "manifest.json", "train_000000.bin", "val_000000.bin"]


def test_hub_dataset_with_its_own_validation_files(
    hub: Any, as_parquet: Callable[..., bytes], tmp_path: Path
) -> None:
    hub.licence = ["mit", "cc0-1.0"]
    for name in ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"):
        hub.add("someone/something", {f"data/{name}.parquet": as_parquet([name])})
    manifest = run("someone/something", tmp_path)
    assert read_text(tmp_path, "train") == ["train-00000-of-00001"]
    assert read_text(tmp_path, "val") == ["validation-00000-of-00001"]
    assert manifest.source["licence"] == "mit, cc0-1.0"
    assert not any("test" in name for name in hub.downloads)


def test_hub_is_not_contacted_when_the_folder_is_complete(
    hub: Any, edu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("fineweb-edu-10bt", tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", unreachable_address())
    assert run("fineweb-edu-10bt", tmp_path) == first


def test_next_file_is_downloaded_while_one_is_read_and_read_files_are_removed(
    hub: Any, edu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk holds the files in use and the next one, never the whole dataset."""
    held: list[int] = []
    blocks = module.parquet_blocks

    def watched(path: Path, file: int, skip: int) -> Iterator[Block]:
        held.append(len(list(path.parents[2].rglob("*.parquet"))))
        yield from blocks(path, file, skip)

    monkeypatch.setattr(module, "parquet_blocks", watched)
    source = HubSource(EDU, "sample/10BT")
    source.open(tmp_path, Console(quiet=True))
    list(source.blocks(0))
    source._coming[1].result()  # requested while reading the first file
    assert len(hub.downloads) == 2
    source.release(1)
    list(source.blocks(1))
    source._coming[2].result()
    source.release(2)
    assert [path.name for path in tmp_path.rglob("*.parquet")] == ["002_00000.parquet"]
    assert max(held) <= 2
    source.close()


def test_resumed_preparation_keeps_its_revision(
    hub: Any, edu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer revision published in between neither breaks it nor gets mixed in, and files that
    were prepared are not downloaded again."""
    monkeypatch.setattr("rekindle.data.sources.local.BLOCK_BYTES", 2000)
    run("fineweb-edu-10bt", tmp_path / "complete", shard_tokens=2000)
    blocks, begun = module.parquet_blocks, hub.revision

    def stops(path: Path, file: int, skip: int) -> Iterator[Block]:
        if file == 2:
            raise KeyboardInterrupt
        yield from blocks(path, file, skip)

    monkeypatch.setattr(module, "parquet_blocks", stops)
    with pytest.raises(KeyboardInterrupt):
        run("fineweb-edu-10bt", tmp_path / "out", shard_tokens=2000)
    monkeypatch.setattr(module, "parquet_blocks", blocks)
    hub.revision = "f" * 40
    hub.downloads.clear()
    hub.revisions.clear()
    manifest = run("fineweb-edu-10bt", tmp_path / "out", shard_tokens=2000)
    assert hub.revisions == {begun}
    assert manifest.source["revision"] == begun
    assert manifest == shards.read_manifest(tmp_path / "complete")
    assert "sample/10BT/000_00000.parquet" not in hub.downloads


def test_interrupted_download_is_resumed(hub: Any, edu: list[str], tmp_path: Path) -> None:
    hub.cut["sample/10BT/001_00000.parquet"] = 2
    run("fineweb-edu-10bt", tmp_path)
    assert hub.downloads.count("sample/10BT/001_00000.parquet") == 3
    both = read_text(tmp_path, "train") + read_text(tmp_path, "val")
    assert sorted(both) == sorted(edu)


def test_damaged_download_is_not_used(hub: Any, edu: list[str], tmp_path: Path) -> None:
    hub.corrupt.add("sample/10BT/001_00000.parquet")
    with pytest.raises(UserError, match=r"001_00000\.parquet of .* was damaged") as caught:
        run("fineweb-edu-10bt", tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()
    hub.corrupt.clear()
    run("fineweb-edu-10bt", tmp_path)
    assert len(read_text(tmp_path, "train") + read_text(tmp_path, "val")) == len(edu)


def test_partial_download_of_a_killed_run_is_removed(
    hub: Any, edu: list[str], tmp_path: Path
) -> None:
    left = tmp_path / ".progress" / "downloads" / ".cache" / "huggingface" / "x.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(bytes(1000))
    source = HubSource(EDU, "sample/10BT")
    source.open(tmp_path / ".progress" / "downloads", Console(quiet=True))
    assert not left.exists()
    source.close()


def unreachable_address() -> str:
    """An address where no server listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("dataset", "repository"),
    [("fineweb-edu-10bt", EDU), ("a/b:c", "a/b/c"), ("fineweb-10bt-tokenized", SHARDS)],
)
def test_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, repository: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", unreachable_address())
    with pytest.raises(
        UserError, match=rf"{repository}.*http://127.*--(parquet|shards) DIR"
    ) as caught:
        run(dataset, tmp_path, tokenizer="gpt2")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


def test_missing_dataset_and_files_on_the_hub(hub: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset no/body on the hub"):
        run("no/body", tmp_path)
    hub.add("some/thing", {"data.csv": b"a,b", "test.parquet": b"..."})
    with pytest.raises(UserError, match=r"no \*\.parquet file to train on"):
        run("some/thing", tmp_path)
    with pytest.raises(UserError, match=r"no \*\.parquet file in folder"):
        run("some/thing:folder", tmp_path)


def test_failed_download_names_the_file(
    hub: Any, edu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: Any, **more: Any) -> str:
        raise ConnectionResetError("reset by peer\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", gone)
    with pytest.raises(UserError, match=r"000_00000\.parquet of .*reset by peer.*--parquet") as e:
        run("fineweb-edu-10bt", tmp_path)
    assert "\n" not in str(e.value)


# Ready-made shards


def shard_bytes(tokens: list[int]) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


@pytest.fixture
def published(hub: Any) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 6))]
    files = {name: shard_bytes([50256, *rng.integers(0, 50256, 2000).tolist()]) for name in names}
    hub.add(SHARDS, files | {"README.md": b"..."})
    return files


def test_published_shards_are_used_unchanged(
    hub: Any, published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = run("fineweb-10bt-tokenized", tmp_path, tokenizer="gpt2")
    for name, content in published.items():
        assert (tmp_path / name).read_bytes() == content
    shards.verify(tmp_path, manifest)
    assert [shard.name for shard in manifest.split("val")] == ["fineweb_val_000000.bin"]
    assert manifest.tokens("train") == 5 * 2001
    assert manifest.source["revision"] == hub.revision
    assert {path.name for path in tmp_path.iterdir()} == {*published, "manifest.json", ".lock"}
    monkeypatch.setenv("HF_ENDPOINT", unreachable_address())  # not contacted: all shards exist
    assert run("fineweb-10bt-tokenized", tmp_path, tokenizer="gpt2") == manifest


def test_published_shards_are_resumed(
    hub: Any, published: dict[str, bytes], tmp_path: Path
) -> None:
    hub.corrupt.add("fineweb_train_000004.bin")
    with pytest.raises(UserError, match=r"fineweb_train_000004\.bin of .* was damaged"):
        run("fineweb-10bt-tokenized", tmp_path, tokenizer="gpt2")
    assert not (tmp_path / "manifest.json").exists()
    assert not (tmp_path / "fineweb_train_000004.bin").exists()
    there = {path.name for path in tmp_path.glob("fineweb*")}
    assert len(there) >= 3
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"cut short")
    hub.corrupt.clear()
    hub.downloads.clear()
    manifest = run("fineweb-10bt-tokenized", tmp_path, tokenizer="gpt2")
    assert set(hub.downloads) == set(published) - there | {"fineweb_train_000001.bin"}
    shards.verify(tmp_path, manifest)
    assert len(manifest.shards) == 6


def test_existing_published_shard_is_not_downloaded_again(
    hub: Any, published: dict[str, bytes], tmp_path: Path
) -> None:
    """A process may die after renaming a shard but before recording it, or the user may have copied
    some of the files. The right size alone is not enough."""
    (tmp_path / "fineweb_train_000001.bin").write_bytes(published["fineweb_train_000001.bin"])
    (tmp_path / "fineweb_train_000002.bin").write_bytes(published["fineweb_train_000001.bin"])
    shards.verify(tmp_path, run("fineweb-10bt-tokenized", tmp_path, tokenizer="gpt2"))
    assert set(hub.downloads) == set(published) - {"fineweb_train_000001.bin"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (shard_bytes([50256, 50257]), "the id 50257, outside the vocabulary"),
        (shard_bytes([50256, 1])[:-2], "but its header says"),
        (b"<html>", "does not start with the header"),
    ],
)
def test_published_shards_are_checked(
    hub: Any, published: dict[str, bytes], tmp_path: Path, content: bytes, message: str
) -> None:
    hub.add(SHARDS, {"fineweb_train_000002.bin": content})
    with pytest.raises(UserError, match=message):
        run("fineweb-10bt-tokenized", tmp_path, tokenizer="gpt2")
    assert not (tmp_path / "fineweb_train_000002.bin").exists()
    assert not (tmp_path / "manifest.json").exists()


def test_published_shards_need_the_gpt2_tokenizer_and_a_new_folder(
    hub: Any, published: dict[str, bytes], edu: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--tokenizer gpt2"):
        run("fineweb-10bt-tokenized", tmp_path / "a", tokenizer="bytes")
    run("fineweb-edu-10bt", tmp_path / "b")
    with pytest.raises(UserError, match="was prepared from 'HuggingFaceFW/fineweb-edu"):
        run("fineweb-10bt-tokenized", tmp_path / "b", tokenizer="gpt2")
    run("fineweb-10bt-tokenized", tmp_path / "c", tokenizer="gpt2")
    with pytest.raises(UserError, match="was prepared "):
        run("fineweb-edu-10bt", tmp_path / "c", tokenizer="gpt2")

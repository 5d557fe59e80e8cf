"""Files are identified by content; after a change, the shards of earlier files are kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rekindle import storage
from rekindle.data import shards
from rekindle.data.encoding import is_validation
from rekindle.data.prepare import prepare
from rekindle.data.shards import Manifest
from rekindle.data.sources import from_arguments, local
from rekindle.errors import UserError
from rekindle.observe.console import Console
from rekindle.storage import files as storage_files
from tests.data.listening import listen
from tests.data.naming import source_of

BAD = "{this line is bad\n"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "BLOCK_BYTES", 500)
    monkeypatch.setattr(storage_files, "_flush", lambda descriptor: None)
    monkeypatch.setattr(storage_files, "_flush_folder", lambda path: None)


def lines(name: str, count: int = 120) -> str:
    return "".join(
        json.dumps({"text": f"{name} {i} of the words " * 3}) + "\n" for i in range(count)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four JSON Lines files; the third one ends with a bad line."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.jsonl").write_text(lines(name) + (BAD if name == "c" else ""))
    return folder


def run(folder: Path, out: Path, output: list[str] | None = None, **settings: Any) -> Manifest:
    console = Console(quiet=True) if output is None else listen(output)
    chosen = {"tokenizer": "bytes", "shard_tokens": 1500, "console": console} | settings
    return prepare(from_arguments(jsonl=[folder]), out, **chosen)


def stopped(folder: Path, out: Path, **settings: Any) -> dict[str, int]:
    """Run until the bad line fails; return the shards left behind and when each was written."""
    with pytest.raises(UserError, match=r"c\.jsonl:121"):
        run(folder, out, **settings)
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}


def texts_of(out: Path) -> list[str]:
    manifest = shards.read_manifest(out)
    shards.verify(out, manifest)
    # In the lecture's layout, the first shard is validation and may end inside a document.
    parts = [*shards.open_split(out, manifest, "val"), *shards.open_split(out, manifest, "train")]
    tokens = np.concatenate(parts)
    documents = np.split(tokens, np.flatnonzero(tokens == 256)[1:])
    return sorted(bytes(document[1:].astype(np.uint8)).decode() for document in documents)


def texts_in(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.jsonl"))
    return sorted(json.loads(line)["text"] for f in files for line in f.read_text().splitlines())


def fix(folder: Path) -> None:
    (folder / "c.jsonl").write_text(lines("c"))


def fix_and_add_at_the_end(folder: Path) -> None:
    fix(folder)
    (folder / "e.jsonl").write_text(lines("e"))


def fix_and_change_the_rest(folder: Path) -> None:
    fix(folder)
    (folder / "d.jsonl").write_text(lines("other"))


def remove_and_add_before(folder: Path) -> None:
    (folder / "c.jsonl").unlink()
    (folder / "bb.jsonl").write_text(lines("bb"))


@pytest.mark.parametrize("settings", [{}, {"val_tokens": 0}, {"layout": "lecture"}], ids=str)
@pytest.mark.parametrize(
    "change",
    [fix, fix_and_add_at_the_end, fix_and_change_the_rest, remove_and_add_before],
)
def test_shards_of_unchanged_files_are_kept(
    tmp_path: Path, folder: Path, change: Callable[[Path], None], settings: dict[str, Any]
) -> None:
    before = stopped(folder, tmp_path / "out", **settings)
    change(folder)
    output: list[str] = []
    run(folder, tmp_path / "out", output, **settings)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    kept = [name for name in before if before[name] == after.get(name)]
    assert len(kept) > len(before) // 2
    assert any("c.jsonl" in line and f"{len(kept)} of {len(before)}" in line for line in output), (
        output
    )
    assert texts_of(tmp_path / "out") == texts_in(folder)
    assert not (tmp_path / "out" / ".progress").exists()
    if "val_tokens" in settings or "layout" in settings:  # no fraction that depends on the sizes
        fresh = run(folder, tmp_path / "fresh", **settings)
        assert shards.read_manifest(tmp_path / "out") == fresh


@pytest.mark.parametrize("change", ["a middle", "a name", "the order"])
def test_change_in_the_first_file_starts_from_scratch(
    tmp_path: Path, folder: Path, change: str
) -> None:
    before = stopped(folder, tmp_path / "out")
    fix(folder)
    if change == "a middle":
        (folder / "a.jsonl").write_text(lines("a").replace("a 60 of", "A 60 of"))
    elif change == "a name":
        os.rename(folder / "a.jsonl", folder / "f.jsonl")
    else:
        os.rename(folder / "a.jsonl", folder / "x.jsonl")
        os.rename(folder / "b.jsonl", folder / "a.jsonl")
        os.rename(folder / "x.jsonl", folder / "b.jsonl")
    output: list[str] = []
    run(folder, tmp_path / "out", output)
    assert any(f"0 of {len(before)}" in line for line in output)
    assert texts_of(tmp_path / "out") == texts_in(folder)


def test_held_out_fraction_is_kept_with_the_shards(tmp_path: Path, folder: Path) -> None:
    """Even if there is more text now: otherwise a text could be in both splits."""
    stopped(folder, tmp_path / "out", val_tokens=1000)
    state = storage.read_json(tmp_path / "out" / shards.UNFINISHED / shards.STATE)
    fix(folder)
    (folder / "e.jsonl").write_text(lines("e", 1200))
    run(folder, tmp_path / "out", val_tokens=1000)
    every = texts_in(folder)
    mask = is_validation(pa.array(every), state["fraction"])
    manifest = shards.read_manifest(tmp_path / "out")
    assert mask.sum() == sum(shard.documents for shard in manifest.split("val")) > 20


def test_shards_of_removed_files_are_removed(tmp_path: Path, folder: Path) -> None:
    before = stopped(folder, tmp_path / "out")
    for name in "bcd":
        (folder / f"{name}.jsonl").unlink()
    manifest = run(folder, tmp_path / "out")
    assert len(manifest.shards) < len(before)
    assert {p.name for p in (tmp_path / "out").glob("*.bin")} == {s.name for s in manifest.shards}


def test_kill_while_changed_files_are_prepared_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill at any write, followed by another change, the documents are the same and no
    shard is left over."""
    replace = os.replace
    for last in range(1, 12, 2):
        (folder / "c.jsonl").write_text(lines("c") + BAD)
        out = tmp_path / str(last)
        stopped(folder, out)
        (folder / "c.jsonl").write_text(lines("c")[1000:].split("\n", 1)[1])
        writes = 0

        def crash(source: Any, target: Any, last: int = last) -> None:
            nonlocal writes
            writes += 1
            if writes == last:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
        monkeypatch.setattr(os, "replace", replace)
        (folder / "b.jsonl").write_text(lines("b", 100 + last))
        manifest = run(folder, out)
        assert texts_of(out) == texts_in(folder)
        assert {path.name for path in out.glob("*.bin")} == {s.name for s in manifest.shards}


@pytest.mark.parametrize("kept_time", [True, False])
@pytest.mark.parametrize("change", ["middle", "added", "removed", "swapped", "split"])
def test_change_after_finishing_is_reported(
    tmp_path: Path,
    folder: Path,
    change: str,
    kept_time: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And no file in the folder is touched."""
    monkeypatch.setattr(local, "BLOCK_BYTES", 100_000)
    for name in "abcd":  # each longer than the two ends that earlier versions compared
        (folder / f"{name}.jsonl").write_text(lines(name * 70, 700))
        assert (folder / f"{name}.jsonl").stat().st_size > 2 * local.SAMPLE_BYTES
    run(folder, tmp_path / "out", shard_tokens=200_000)
    changed, time = folder / "b.jsonl", (folder / "b.jsonl").stat().st_mtime_ns
    if change == "middle":
        content = changed.read_text()
        at = len(content) // 2
        changed.write_text(content[:at] + content[at:].replace("words", "WORDS", 1))
    elif change == "added":
        changed = folder / "e.jsonl"
        changed.write_text(lines("e"))
    elif change == "removed":
        changed.unlink()
    elif change == "swapped":
        content = changed.read_text()
        changed.write_text((folder / "c.jsonl").read_text())
        (folder / "c.jsonl").write_text(content)
    else:
        os.rename(changed, folder / "b_val.jsonl")
        changed = folder / "b_val.jsonl"
    if kept_time and changed.exists():
        os.utime(changed, ns=(time, time))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    named = "a.jsonl|b_val.jsonl" if change == "split" else changed.name
    with pytest.raises(UserError, match=rf"({named}).*--out"):
        run(folder, tmp_path / "out", shard_tokens=200_000)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_copies_of_the_files_are_the_same_source(tmp_path: Path, folder: Path) -> None:
    fix(folder)
    first = run(folder, tmp_path / "out")
    shutil.copytree(folder, tmp_path / "copy" / "in")
    output: list[str] = []
    assert run(tmp_path / "copy" / "in", tmp_path / "out", output) == first
    assert "nothing to do" in output[-1]


def without_identities(path: Path) -> None:
    """Turn a manifest or a saved state into one written by an earlier version."""
    content = json.loads(path.read_text())
    content["source"].pop("files", None)
    for key in ("history", "fraction", "sha256"):
        content.pop(key, None)
    storage.write_json(path, content)


def test_folders_of_earlier_versions_stay_usable(tmp_path: Path, folder: Path) -> None:
    fix(folder)
    first = run(folder, tmp_path / "out")
    without_identities(tmp_path / "out" / shards.MANIFEST)
    output: list[str] = []
    assert run(folder, tmp_path / "out", output).fingerprint == first.fingerprint
    assert "nothing to do" in output[-1]
    (folder / "d.jsonl").write_text(lines("d") + "\n")
    with pytest.raises(UserError, match="not the same text"):
        run(folder, tmp_path / "out")


def test_states_of_earlier_versions_stay_usable(tmp_path: Path, folder: Path) -> None:
    fix(folder)
    (folder / "d.jsonl").unlink()
    complete = run(folder, tmp_path / "complete")
    (folder / "c.jsonl").write_text(lines("c") + BAD)
    stopped(folder, tmp_path / "out")
    without_identities(tmp_path / "out" / shards.UNFINISHED / shards.STATE)
    (folder / "c.jsonl").write_text(lines("c"))
    with pytest.raises(UserError, match="not the same text"):
        run(folder, tmp_path / "out")
    state = tmp_path / "out" / shards.UNFINISHED / shards.STATE
    content = json.loads(state.read_text())
    content["source"]["fingerprint"] = source_of("jsonl", [folder]).fingerprint
    storage.write_json(state, content)
    assert run(folder, tmp_path / "out").fingerprint == complete.fingerprint


@pytest.mark.parametrize("when", ["before", "meanwhile", "after"])
def test_file_that_changes_while_being_read_is_reported(
    tmp_path: Path, folder: Path, when: str
) -> None:
    fix(folder)
    source: Any = from_arguments(jsonl=[folder])
    blocks = source.blocks

    def changing(file: int, skip: int = 0) -> Any:
        if (file, when) in ((1, "before"), (3, "after")):
            (folder / "b.jsonl").write_text(lines("BB"))
        for number, block in enumerate(blocks(file, skip)):
            if file == 1 and number == 2 and when == "meanwhile":
                (folder / "b.jsonl").write_text(lines("BB"))
            yield block

    source.blocks = changing
    with pytest.raises(UserError, match=r"b\.jsonl changed while it was being read"):
        prepare(source, tmp_path / "out", "bytes", console=Console(quiet=True))
    assert not (tmp_path / "out" / shards.MANIFEST).exists()

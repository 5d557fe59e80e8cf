"""A file is known by its content: a change is noticed, and costs what was made of that file."""

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
    """Four files of JSON lines, of which the third ends with a bad line."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.jsonl").write_text(lines(name) + (BAD if name == "c" else ""))
    return folder


def run(folder: Path, out: Path, said: list[str] | None = None, **settings: Any) -> Manifest:
    console = Console(quiet=True) if said is None else listen(said)
    chosen = {"tokenizer": "bytes", "shard_tokens": 1500, "console": console} | settings
    return prepare(from_arguments(jsonl=[folder]), out, **chosen)


def stopped(folder: Path, out: Path, **settings: Any) -> dict[str, int]:
    """What a call leaves that meets the bad line: its shards, and when each was written."""
    with pytest.raises(UserError, match=r"c\.jsonl:121"):
        run(folder, out, **settings)
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}


def texts_of(out: Path) -> list[str]:
    manifest = shards.read_manifest(out)
    shards.verify(out, manifest)
    # The first shard of the lecture's layout, which ends within a document, is validation.
    parts = [*shards.open_split(out, manifest, "val"), *shards.open_split(out, manifest, "train")]
    tokens = np.concatenate(parts)
    documents = np.split(tokens, np.flatnonzero(tokens == 256)[1:])
    return sorted(bytes(document[1:].astype(np.uint8)).decode() for document in documents)


def texts_in(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.jsonl"))
    return sorted(json.loads(line)["text"] for f in files for line in f.read_text().splitlines())


def mend(folder: Path) -> None:
    (folder / "c.jsonl").write_text(lines("c"))


def mend_and_add_at_the_end(folder: Path) -> None:
    mend(folder)
    (folder / "e.jsonl").write_text(lines("e"))


def mend_and_change_what_follows(folder: Path) -> None:
    mend(folder)
    (folder / "d.jsonl").write_text(lines("other"))


def remove_and_add_before(folder: Path) -> None:
    (folder / "c.jsonl").unlink()
    (folder / "bb.jsonl").write_text(lines("bb"))


@pytest.mark.parametrize("settings", [{}, {"val_tokens": 0}, {"layout": "lecture"}], ids=str)
@pytest.mark.parametrize(
    "change",
    [mend, mend_and_add_at_the_end, mend_and_change_what_follows, remove_and_add_before],
)
def test_shards_of_files_that_stay_are_kept(
    tmp_path: Path, folder: Path, change: Callable[[Path], None], settings: dict[str, Any]
) -> None:
    before = stopped(folder, tmp_path / "out", **settings)
    change(folder)
    said: list[str] = []
    run(folder, tmp_path / "out", said, **settings)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    kept = [name for name in before if before[name] == after.get(name)]
    assert len(kept) > len(before) // 2
    assert any("c.jsonl" in line and f"{len(kept)} of {len(before)}" in line for line in said), said
    assert texts_of(tmp_path / "out") == texts_in(folder)
    assert not (tmp_path / "out" / ".progress").exists()
    if "val_tokens" in settings or "layout" in settings:  # no share that depends on the sizes
        whole = run(folder, tmp_path / "anew", **settings)
        assert shards.read_manifest(tmp_path / "out") == whole


@pytest.mark.parametrize("change", ["a middle", "a name", "the order"])
def test_a_change_in_the_first_file_begins_anew(tmp_path: Path, folder: Path, change: str) -> None:
    before = stopped(folder, tmp_path / "out")
    mend(folder)
    if change == "a middle":
        (folder / "a.jsonl").write_text(lines("a").replace("a 60 of", "A 60 of"))
    elif change == "a name":
        os.rename(folder / "a.jsonl", folder / "f.jsonl")
    else:
        os.rename(folder / "a.jsonl", folder / "x.jsonl")
        os.rename(folder / "b.jsonl", folder / "a.jsonl")
        os.rename(folder / "x.jsonl", folder / "b.jsonl")
    said: list[str] = []
    run(folder, tmp_path / "out", said)
    assert any(f"0 of {len(before)}" in line for line in said)
    assert texts_of(tmp_path / "out") == texts_in(folder)


def test_the_share_held_out_stays_where_shards_are_kept(tmp_path: Path, folder: Path) -> None:
    """Though there is more text now: else one document might lie on both sides."""
    stopped(folder, tmp_path / "out", val_tokens=1000)
    state = storage.read_json(tmp_path / "out" / shards.UNFINISHED / shards.STATE)
    mend(folder)
    (folder / "e.jsonl").write_text(lines("e", 1200))
    run(folder, tmp_path / "out", val_tokens=1000)
    every = texts_in(folder)
    mask = is_validation(pa.array(every), state["fraction"])
    manifest = shards.read_manifest(tmp_path / "out")
    assert mask.sum() == sum(shard.documents for shard in manifest.split("val")) > 20


def test_shards_of_files_that_are_gone_are_removed(tmp_path: Path, folder: Path) -> None:
    before = stopped(folder, tmp_path / "out")
    for name in "bcd":
        (folder / f"{name}.jsonl").unlink()
    manifest = run(folder, tmp_path / "out")
    assert len(manifest.shards) < len(before)
    assert {p.name for p in (tmp_path / "out").glob("*.bin")} == {s.name for s in manifest.shards}


def test_killed_while_the_rest_is_made_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any write, and then with another change: the same documents, and no shard left over."""
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
def test_a_change_of_what_is_finished_is_named(
    tmp_path: Path,
    folder: Path,
    change: str,
    kept_time: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is touched."""
    monkeypatch.setattr(local, "BLOCK_BYTES", 100_000)
    for name in "abcd":  # each longer than the two ends that earlier versions looked at
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


def test_the_same_files_elsewhere_are_the_same(tmp_path: Path, folder: Path) -> None:
    mend(folder)
    first = run(folder, tmp_path / "out")
    shutil.copytree(folder, tmp_path / "copy" / "in")
    said: list[str] = []
    assert run(tmp_path / "copy" / "in", tmp_path / "out", said) == first
    assert "nothing to do" in said[-1]


def without_identities(path: Path) -> None:
    """Make a manifest, or a saved state, what an earlier version wrote."""
    content = json.loads(path.read_text())
    content["source"].pop("files", None)
    for key in ("history", "fraction"):
        content.pop(key, None)
    storage.write_json(path, content)


def test_folders_of_earlier_versions_stay_usable(tmp_path: Path, folder: Path) -> None:
    mend(folder)
    first = run(folder, tmp_path / "out")
    without_identities(tmp_path / "out" / shards.MANIFEST)
    said: list[str] = []
    assert run(folder, tmp_path / "out", said).fingerprint == first.fingerprint
    assert "nothing to do" in said[-1]
    (folder / "d.jsonl").write_text(lines("d") + "\n")
    with pytest.raises(UserError, match="not the same text"):
        run(folder, tmp_path / "out")


def test_states_of_earlier_versions_stay_usable(tmp_path: Path, folder: Path) -> None:
    mend(folder)
    (folder / "d.jsonl").unlink()
    whole = run(folder, tmp_path / "whole")
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
    assert run(folder, tmp_path / "out").fingerprint == whole.fingerprint


@pytest.mark.parametrize("when", ["before", "meanwhile", "after"])
def test_a_file_that_changes_while_it_is_read_is_named(
    tmp_path: Path, folder: Path, when: str
) -> None:
    mend(folder)
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
    with pytest.raises(UserError, match=r"b\.jsonl was changed while it was read"):
        prepare(source, tmp_path / "out", "bytes", console=Console(quiet=True))
    assert not (tmp_path / "out" / shards.MANIFEST).exists()

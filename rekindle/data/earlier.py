"""What an earlier `prepare` left in a folder: all shards, some of them, or other data.

A source whose files have identities is compared file by file. If a file changed before preparation
finished, the shards of the files before it are kept and preparation resumes after them.
"""

import re
from pathlib import Path
from typing import Any

from rekindle import storage
from rekindle.data import shards
from rekindle.data.layout import SPLITS
from rekindle.data.shards import Manifest
from rekindle.data.sources.base import Source
from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError
from rekindle.schema import mismatch

PENDING = {"documents": int, "pieces": [str]}
POSITION = {  # in the source, after a finished shard; the other split has pending tokens
    "cursor": [int],
    "offset?": int,
    "pending": tuple({split: PENDING} for split in SPLITS),
}
SCHEMA = POSITION | {  # of the state that `prepare` saves with each shard
    "source": dict,
    "shards": [shards.SHARD],
    "tokenizer_sha256?": str,
    "fraction?": float,
    # The last position in each file, and how many shards were finished by then.
    "history?": [POSITION | {"finished": int}],
}
FILE = {"name": str, "bytes": int, "split": (str, None), "sha256": str}
START: dict[str, Any] = {
    "cursor": [0, 0],
    "offset": 0,
    "pending": {"val": {"documents": 0, "pieces": []}},
}


def finished(
    source: Source, out: Path, settings: dict[str, Any], lock: storage.Lock
) -> Manifest | None:
    """The manifest in `out`, or None if there is none.

    Raises `UserError` if it belongs to another source or other settings."""
    if not (out / shards.MANIFEST).exists():
        return None
    manifest = shards.read_manifest(out)
    _compare(out, source, manifest.source, settings)
    shards.check_sizes(out, manifest)
    if (out / shards.UNFINISHED).exists():  # killed after writing the manifest
        lock.take()
        storage.remove_folder(out / shards.UNFINISHED)
    if storage.has_unfinished(out):  # killed while removing that folder
        lock.take()
        storage.remove_unfinished(out)
    return manifest


def saved_state(source: Source, out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state in which an earlier call stopped; None for a fresh start."""
    path = out / shards.UNFINISHED / shards.STATE
    if not path.exists():
        return None
    state = storage.read_json(path, SCHEMA)
    if any(len(entry["cursor"]) != 2 for entry in (state, *state.get("history", []))):
        raise UserError(f"{path} is damaged: remove {out} and prepare again")
    names = [*(entry["name"] for entry in state["shards"]), *pieces_of(state)]
    if not all(map(shards.is_name, names)):  # these files get deleted later
        raise UserError(f"{path} names files in other folders: remove {out} and prepare again")
    if _files(state["source"]) is None:
        _compare(out, source, state["source"], settings)
    else:  # after a changed file, the shards before it are still valid
        _compare_settings(out, state["source"], settings)
    for entry in state["shards"]:
        if len(shards.open_shard(out / entry["name"])) != entry["tokens"]:
            raise UserError(
                f"{out / entry['name']} has changed since it was written: "
                f"remove the folder {out} and prepare again"
            )
    return state


def pieces_of(state: dict[str, Any]) -> set[str]:
    """The files of pending tokens needed to resume from this state."""
    positions = [state, *state.get("history", [])]
    pending = [entry for position in positions for entry in position["pending"].values()]
    return {name for entry in pending for name in entry["pieces"]}


def without_changed_files(state: dict[str, Any], source: Source) -> tuple[dict[str, Any], str]:
    """The state before the first changed file, and a message about the change; the same state and
    an empty message if no file changed."""
    before = _files(state["source"])
    if before is None or (now := source.identities(len(before))) is None:
        return state, ""
    same = [_content(a) == _content(b) for a, b in zip(before, now, strict=False)]
    if all(same) and len(same) == len(before):
        return state, ""
    changed = same.index(False) if False in same else len(same)
    history = [entry for entry in state.get("history", []) if entry["cursor"][0] < changed]
    entry: dict[str, Any] = history[-1] if history else START
    kept = entry.get("finished", 0)
    back = state | {"cursor": entry["cursor"], "pending": entry["pending"]}
    back["offset"] = entry.get("offset", 0)
    back |= {"history": history, "shards": state["shards"][:kept]}
    back["source"] = state["source"] | {"files": before[: entry["cursor"][0] + 1]}
    if not history:  # no shard is kept, so another validation fraction is fine
        back.pop("fraction", None)
    difference = _difference(before, source.identities(len(source.files)) or now)
    reused = f"{kept} of {len(state['shards'])} finished shards are kept"
    return back, f"{difference}: {reused}, the rest is prepared again"


def remove_others(out: Path, state: dict[str, Any]) -> None:
    """Remove shards that do not belong to this unfinished preparation."""
    kept = {entry["name"] for entry in state["shards"]}
    for path in out.glob("*.bin"):
        if re.fullmatch(r"(train|val)_\d{6}\.bin", path.name) and path.name not in kept:
            path.unlink()


def _files(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The file identities in the source record of a manifest or state, or None if it has none."""
    files = record.get("files")
    return None if mismatch(files, [FILE]) else files


def _content(identity: dict[str, Any]) -> tuple[Any, ...]:
    return identity["bytes"], identity["sha256"], identity["split"]


def _difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Describe the first file that differs."""
    old = {entry["name"]: entry for entry in before}
    new = {entry["name"]: entry for entry in now}
    for name in [*old, *new]:
        if name not in new:
            return f"{name} no longer exists"
        if name not in old:
            return f"{name} is new"
        if old[name]["split"] != new[name]["split"]:
            return f"{name} now belongs to another split"
        if _content(old[name]) != _content(new[name]):
            return f"{name} has changed"
    return "the files are in another order"


def _compare(out: Path, source: Source, record: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise `UserError` unless `record`, found in `out`, has this source and these settings."""
    _compare_settings(out, record, settings)
    before = _files(record)
    if before is not None and (now := source.identities(len(source.files))) is not None:
        if list(map(_content, before)) != list(map(_content, now)):
            raise UserError(
                f"{out} was prepared from other text: {_difference(before, now)}; choose another "
                "--out, or remove it"
            )
    elif not source.is_same(record):
        raise UserError(
            f"{out} was prepared from {record.get('name')!r} (revision {record.get('revision')}), "
            f"and {source.name!r} is not the same text: choose another --out, or remove it"
        )


def _compare_settings(out: Path, record: dict[str, Any], settings: dict[str, Any]) -> None:
    earlier = {"layout": "documents"} | record.get("settings", {})  # old records have no layout
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise UserError(
                f"{out} was prepared with {key} {earlier.get(key)}, not {value}: "
                "choose another --out, or remove it"
            )


def compare_vocabulary(out: Path, sha256: str, tokenizer: Tokenizer) -> None:
    """Raise `UserError` if `out` was prepared with another tokenizer of the same name."""
    if sha256 != tokenizer.sha256:
        raise UserError(
            f"{out} was prepared with another vocabulary named {tokenizer.name!r} (its SHA-256 "
            "differs): choose another --out, or remove it"
        )

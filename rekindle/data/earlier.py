"""What an earlier `prepare` left in a folder: all shards, some of them, or other data."""

from pathlib import Path
from typing import Any

from rekindle import storage
from rekindle.data import shards
from rekindle.data.layout import SPLITS
from rekindle.data.shards import Manifest
from rekindle.data.sources.base import Source
from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError

PENDING = {"documents": int, "pieces": [str]}
FORM = {  # of what `prepare` saves with each shard; one of the splits is pending
    "source": dict, "cursor": [int], "offset?": int, "shards": [shards.SHARD],
    "tokenizer_sha256?": str,
    "pending": tuple({split: PENDING} for split in SPLITS),
}  # fmt: skip


def finished(
    source: Source, out: Path, settings: dict[str, Any], lock: storage.Lock
) -> Manifest | None:
    """The manifest in `out` if it is of this source and these settings; None if there is none."""
    if not (out / shards.MANIFEST).exists():
        return None
    manifest = shards.read_manifest(out)
    _compare(out, source, manifest.source, settings)
    shards.check_sizes(out, manifest)
    if (out / shards.UNFINISHED).exists():  # killed between the manifest and this
        lock.take()
        storage.remove_folder(out / shards.UNFINISHED)
    if storage.has_unfinished(out):  # or while that was removed
        lock.take()
        storage.remove_unfinished(out)
    return manifest


def saved_state(source: Source, out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Where an earlier call was stopped; None for a fresh start."""
    path = out / shards.UNFINISHED / shards.STATE
    if not path.exists():
        return None
    state = storage.read_json(path, FORM)
    pieces = [name for entry in state["pending"].values() for name in entry["pieces"]]
    names = [*(entry["name"] for entry in state["shards"]), *pieces]
    if not all(map(shards.is_name, names)):  # pieces are removed when they are in a shard
        raise UserError(f"{path} names files of other folders: remove {out} and prepare again")
    _compare(out, source, state["source"], settings)
    for entry in state["shards"]:
        if len(shards.open_shard(out / entry["name"])) != entry["tokens"]:
            raise UserError(
                f"{out / entry['name']} has changed since it was made: "
                f"remove the folder {out} and prepare again"
            )
    return state


def _compare(out: Path, source: Source, record: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise `UserError` unless `record`, found in `out`, is of this source and these settings."""
    earlier = {"layout": "documents"} | record.get("settings", {})  # older ones name no layout
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise UserError(
                f"{out} was prepared with {key} {earlier.get(key)}, not {value}: "
                "give another --out, or remove it"
            )
    if not source.is_same(record):
        raise UserError(
            f"{out} was prepared from {record.get('name')!r} (revision {record.get('revision')}), "
            f"and {source.name!r} is not the same text: give another --out, or remove it"
        )


def compare_vocabulary(out: Path, sha256: str, tokenizer: Tokenizer) -> None:
    """Raise `UserError` if what is in `out` was made with another tokenizer of the same name."""
    if sha256 != tokenizer.sha256:
        raise UserError(
            f"{out} was prepared with another vocabulary of the name {tokenizer.name!r} (its "
            "SHA-256 differs): give another --out, or remove it"
        )

"""Whether a folder holds a new run, one to resume, or a fork; and whether this command fits it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from rekindle import checkpoint, lookup, recipes, storage
from rekindle.checkpoint import Checkpoint
from rekindle.data.shards import Manifest
from rekindle.errors import UserError
from rekindle.model import LanguageModel
from rekindle.observe.metrics import RECORD
from rekindle.optim import Optimizer
from rekindle.recipes import Recipe
from rekindle.run import Run, RunOptions

# What every reader may rely on in run.json.
SCHEMA = {
    "recipe": recipes.SCHEMA,
    "data": {"path": str, "fingerprint": str},
    "tokenizer": {"name": str, "sha256": str},
    "forked_from": (None, str),
}


def open_run(
    recipe: Recipe,
    manifest: Manifest,
    data: Path,
    out: Path,
    options: RunOptions,
    model: type[LanguageModel] | None = None,
    optimizer: type[Optimizer] | None = None,
) -> Run:
    """Decide whether the run in `out` is new, resumed or a fork. Writes nothing.

    Raises `UserError` if the folder holds something else, or a run with another recipe (field by
    field) or other data.
    """
    recipe = recipes.with_vocabulary(recipe, manifest.vocab_size)
    recipes.check(recipe)
    model = model or lookup.model_for(recipe.model)
    optimizer = optimizer or lookup.optimizer_for(recipe.optim)
    forked_from = None
    _check_can_be_written(out)
    if before := _identity_of(out, model):
        forked_from = _check_same_run(recipe, manifest, out, before)
        if options.fork and not forked_from:
            raise UserError(f"{out} was not begun as a fork: give --fork a new --out")
        if options.fork and forked_from:
            _check_same_parent(out, Path(forked_from), options.fork)
    elif out.exists() and not _is_vacant(out, data):
        raise UserError(f"{out} exists but is not a run folder: choose a new --out")
    elif options.fork:  # only now: a run that has begun no longer needs its parent
        forked_from = storage.printable(os.path.abspath(checkpoint.find(options.fork)))
    loaded, damaged = checkpoint.newest_whole(out / "checkpoints", model)
    if not loaded and _has_saved(out / "metrics.jsonl"):
        raise UserError(
            f"{out} has saved checkpoints and there is none: see that the disk with them is there, "
            "or give another --out"
        )
    if not loaded and forked_from:
        loaded = checkpoint.load(_find_parent(out, Path(forked_from), options.fork), model)
    if loaded:
        loaded.check_same(recipe.model, model, optimizer)
        _check_same_tokenizer(manifest, loaded)
    return Run(out, recipe, data, manifest, options, model, optimizer, loaded, damaged, forked_from)


def _is_vacant(out: Path, data: Path) -> bool:
    """Whether a folder is empty but for the shards that were just prepared in it."""
    own = data.name if data.parent == out else None
    return out.is_dir() and storage.is_empty(out, but_for=own)


def _has_saved(log: Path) -> bool:
    """Whether a run's log tells of a checkpoint, of which the newest is never removed."""
    records = storage.read_json_lines(log, RECORD) if log.exists() else []
    return any(record["kind"] == "checkpoint" for record in records)


def _check_can_be_written(out: Path) -> None:
    """Refuse a folder that is beneath a file, or where this user may not write."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if there != out and not there.is_dir():
        raise UserError(f"{out} cannot be made, for {there} is no folder: give another --out")
    if not os.access(there, os.W_OK):
        raise UserError(f"{there} may not be written to by this user: give another --out")


def _identity_of(out: Path, model: type[LanguageModel]) -> dict[str, Any] | None:
    """What the run in `out` was begun with; a checkpoint tells if run.json was lost."""
    if (out / "run.json").is_file():
        return storage.read_json(out / "run.json", SCHEMA)
    found, _ = checkpoint.newest_whole(out / "checkpoints", model)
    return dataclasses.asdict(found.description) if found else None


def _check_same_run(
    recipe: Recipe, manifest: Manifest, out: Path, before: dict[str, Any]
) -> str | None:
    """Refuse to resume with another recipe or other data; return what the run was forked from."""
    if different := recipes.differences(before["recipe"], recipes.flatten(recipe)):
        raise UserError(
            f"{out} was begun with another recipe ({'; '.join(different)}): "
            "give the same flags, or a new --out (with --fork to start from this run's weights)"
        )
    data = before["data"] or {"path": "arrays in memory", "fingerprint": ""}
    if data["fingerprint"] != manifest.fingerprint:
        raise UserError(
            f"{out} was begun on other data ({data['path']}, fingerprint "
            f"{data['fingerprint'][:12]}, now {manifest.fingerprint[:12]}): "
            "give the same --data, or a new --out (with --fork to start from this run's weights)"
        )
    return before["forked_from"]


def _check_same_parent(out: Path, forked_from: Path, fork: Path) -> None:
    """Refuse another run or checkpoint than the one that `out` was forked from; it may have been
    moved, so that its own name decides."""
    named = Path(os.path.abspath(fork))
    if forked_from.is_relative_to(named):
        return
    step, run = forked_from.name, forked_from.parent.parent.name
    moved = named.name == run or (named.name == step and named.parent.parent.name == run)
    if not moved or forked_from.exists():
        raise UserError(f"{out} was forked from {forked_from}: give --fork {fork} a new --out")


def _find_parent(out: Path, forked_from: Path, fork: Path | None) -> Path:
    """The checkpoint that a fork starts from, which has none of its own yet: where it was, or in
    the run that `--fork` names now. Raises `UserError` if it is gone."""
    if forked_from.exists():
        return forked_from
    moved = Path(os.path.abspath(fork)) if fork else forked_from
    for path in (moved, moved / "checkpoints" / forked_from.name):
        if path.name == forked_from.name and path.exists():
            return path
    raise UserError(
        f"{forked_from}, which {out} was forked from, is gone, and {out} has saved nothing yet: "
        "start the fork anew in another --out, with --fork and a checkpoint that is there (or, if "
        "the run was moved, name it with --fork)"
    )


def _check_same_tokenizer(manifest: Manifest, start: Checkpoint) -> None:
    """Refuse a checkpoint of another tokenizer, as a fork may name one."""
    tokenizer = start.description.tokenizer
    if tokenizer and tokenizer["sha256"] != manifest.tokenizer_sha256:
        raise UserError(
            f"{start.path} was trained with the tokenizer {tokenizer['name']}, "
            f"the data is made with {manifest.tokenizer}: prepare it with the same --tokenizer"
        )

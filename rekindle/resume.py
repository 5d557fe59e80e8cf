"""Decides whether to start, resume or fork a run, and checks that the command matches the run."""

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

# The schema of run.json.
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
    """Decide whether to start, resume or fork a run in the folder `out`. Writes nothing.

    Raises `UserError` if the folder is not a run folder, or if its run has a different recipe
    (naming the fields) or different data.
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
            raise UserError(f"{out} was not started as a fork: use --fork with a new --out")
        if options.fork and forked_from:
            _check_same_parent(out, Path(forked_from), options.fork)
    elif out.exists() and not _is_vacant(out, data):
        raise UserError(f"{out} exists but is not a run folder: choose a new --out")
    elif options.fork:  # checked last: a fork that exists no longer needs its parent
        forked_from = storage.printable(os.path.abspath(checkpoint.find(options.fork)))
    loaded, damaged = checkpoint.newest_complete(out / "checkpoints", model)
    if not loaded and _has_saved(out / "metrics.jsonl"):
        raise UserError(
            f"the log of {out} lists checkpoints, but none is there: check that their disk is "
            "mounted, or choose another --out"
        )
    if not loaded and forked_from:
        loaded = checkpoint.load(_find_parent(out, Path(forked_from), options.fork), model)
    if loaded:
        loaded.check_same(recipe.model, model, optimizer)
        _check_same_tokenizer(manifest, loaded)
    return Run(out, recipe, data, manifest, options, model, optimizer, loaded, damaged, forked_from)


def _is_vacant(out: Path, data: Path) -> bool:
    """Whether a folder is empty, except for the shards that were just prepared in it."""
    own = data.name if data.parent == out else None
    return out.is_dir() and storage.is_empty(out, ignoring=own)


def _has_saved(log: Path) -> bool:
    """Whether a run's log contains a checkpoint. At least the newest one should then exist."""
    records = storage.read_json_lines(log, RECORD) if log.exists() else []
    return any(record["kind"] == "checkpoint" for record in records)


def _check_can_be_written(out: Path) -> None:
    """Raise `UserError` if a parent of `out` is a file, or if there is no permission to write."""
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a link to {os.readlink(out)}, which does not exist: create it")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if nearest != out and not nearest.is_dir():
        raise UserError(f"cannot create {out}: {nearest} is not a folder; choose another --out")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"no permission to write to {nearest}: choose another --out")


def _identity_of(out: Path, model: type[LanguageModel]) -> dict[str, Any] | None:
    """The contents of run.json in `out`, or of the newest checkpoint if run.json is missing."""
    if (out / "run.json").is_file():
        try:
            return storage.read_json(out / "run.json", SCHEMA)
        except UserError as error:
            advice = "remove run.json, and the newest checkpoint replaces it"
            raise UserError(f"{str(error).partition(': restore')[0]}: {advice}") from None
    found, _ = checkpoint.newest_complete(out / "checkpoints", model)
    return dataclasses.asdict(found.description) if found else None


def _check_same_run(
    recipe: Recipe, manifest: Manifest, out: Path, before: dict[str, Any]
) -> str | None:
    """Raise `UserError` if recipe or data differ; return what the run was forked from."""
    if different := recipes.differences(before["recipe"], recipes.flatten(recipe)):
        raise UserError(
            f"{out} was started with a different recipe ({'; '.join(different)}): "
            "use the same flags, or a new --out (with --fork to start from this run's weights)"
        )
    data = before["data"] or {"path": "arrays in memory", "fingerprint": ""}
    if data["fingerprint"] != manifest.fingerprint:
        raise UserError(
            f"{out} was started on different data ({data['path']}, fingerprint "
            f"{data['fingerprint'][:12]}, now {manifest.fingerprint[:12]}): "
            "use the same --data, or a new --out (with --fork to start from this run's weights)"
        )
    return before["forked_from"]


def _check_same_parent(out: Path, forked_from: Path, fork: Path) -> None:
    """Raise `UserError` if `fork` is not what `out` was forked from. The parent may have been
    moved, in which case its name must match."""
    named = Path(os.path.abspath(fork))
    if forked_from.is_relative_to(named):
        return
    step, run = forked_from.name, forked_from.parent.parent.name
    moved = named.name == run or (named.name == step and named.parent.parent.name == run)
    if not moved or forked_from.exists():
        raise UserError(f"{out} was forked from {forked_from}: use --fork {fork} with a new --out")


def _find_parent(out: Path, forked_from: Path, fork: Path | None) -> Path:
    """The parent's checkpoint, for a fork without a checkpoint of its own: at its original path, or
    in the run that `--fork` names now. Raises `UserError` if it is gone."""
    if forked_from.exists():
        return forked_from
    moved = Path(os.path.abspath(fork)) if fork else forked_from
    for path in (moved, moved / "checkpoints" / forked_from.name):
        if path.name == forked_from.name and path.exists():
            return path
    raise UserError(
        f"{forked_from}, from which {out} was forked, is gone, and {out} has no checkpoint yet: "
        "start the fork again in a new --out from a checkpoint that exists (or, if the parent run "
        "was moved, give its new path with --fork)"
    )


def _check_same_tokenizer(manifest: Manifest, start: Checkpoint) -> None:
    """Raise `UserError` if the checkpoint, which may belong to another run, used a different
    tokenizer."""
    tokenizer = start.description.tokenizer
    if tokenizer and tokenizer["sha256"] != manifest.tokenizer_sha256:
        raise UserError(
            f"{start.path} was trained with the tokenizer {tokenizer['name']}, "
            f"but the data was prepared with {manifest.tokenizer}: use the same --tokenizer"
        )

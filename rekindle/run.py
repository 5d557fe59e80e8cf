"""A run: its folder, what it was started with, and whether it may go on.

RUN/run.json          recipe, data and fingerprint, written once at the start
RUN/metrics.jsonl     one object a line, for machines
RUN/checkpoints/      see `runtime.checkpoint`
"""

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rekindle import __version__, recipes, storage
from rekindle.data.batches import Split
from rekindle.data.shards import Manifest
from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.observe.console import Console
from rekindle.observe.metrics import RECORD, Metrics
from rekindle.optim import Optimizer
from rekindle.recipes import Recipe
from rekindle.runtime import checkpoint
from rekindle.runtime.checkpoint import Checkpoint, DamagedError, Keep
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import PATIENCE, World
from rekindle.runtime.guard import Guard
from rekindle.runtime.saving import Saver

# What everybody may rely on in run.json.
FORM = {key: checkpoint.FORM[key] for key in ("recipe", "data", "tokenizer", "forked_from")}
SHARE = "give a folder that all hosts share"
OF_STEPS = ("train", "return")  # records of steps; those of other kinds come after one


@dataclass(frozen=True)
class RunOptions:
    """What belongs to the machine and the moment, not to the recipe. None: decided here, or as
    the run was begun."""

    device: str = "auto"
    precision: str | None = None
    compile: bool | None = None
    kernels: bool | None = None  # Triton's, for bf16 on a GPU
    recompute: bool | None = None  # None: if only so a few rows fit into the GPU's memory
    deterministic: bool | None = None  # the same bits again; always so on a CPU
    shard: bool | None = None  # weights, gradients and moments over the ranks
    hellaswag: str = "auto"  # a file, "hub", "none", or "auto": from the hub on a GPU
    timeout: float = PATIENCE  # seconds that a rank may wait for the others; 0: for ever
    fork: Path | None = None  # run or checkpoint whose weights and optimizer state to start from


@dataclass
class Run:
    """A run that may begin or go on; `open_run` has checked it."""

    folder: Path
    recipe: Recipe
    data: Path
    manifest: Manifest
    options: RunOptions
    checkpoint: Checkpoint | None  # where it goes on
    damaged: dict[Path, str]  # newer checkpoints, to be set aside, and what ails them
    forked_from: str | None
    precision: str
    compile: bool
    kernels: bool
    recompute: bool | None  # None: to be found
    deterministic: bool
    shard: bool  # where there is more than one rank
    threads: int | None  # of the CPU, as the run was begun
    micro: int  # rows per forward pass, or 0: to be found
    split: dict[str, Any] = field(default_factory=dict)  # as it is recorded; known from `begin` on

    @property
    def step(self) -> int:
        """Optimizer steps already taken."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def batch(self) -> int:
        """Number of the next batch: that of the next step, unless batches were stepped over."""
        if not self.checkpoint:
            return 0
        return self.checkpoint.description["data_position"]["windows"] // self.recipe.batch.rows

    @property
    def examined(self) -> bool:
        """Whether what comes after this step (validation and so on) has been done."""
        return bool(self.checkpoint and self.checkpoint.description["examined"])

    def agree(self, world: World, device: torch.device) -> None:
        """Raise `UserError` if another rank was started with anything else than this one."""
        world.agree(self.step, "the newest whole checkpoint is that of step", SHARE, device)
        same = (
            recipes.flatten(self.recipe), self.manifest.fingerprint, self.batch, self.precision,
            self.compile, self.kernels, self.recompute, self.deterministic, self.shard, self.micro,
        )  # fmt: skip
        number = int(hashlib.sha256(repr(same).encode()).hexdigest()[:8], 16)
        advice = "give every rank the same command, and data that was prepared once"
        world.agree(number, "recipe, data and flags have the checksum", advice, device)

    def begin(
        self, model: GPT2, device: Device, split: Split, *, compiled: bool, console: Console,
        lock: storage.Lock,
    ) -> None:  # fmt: skip
        """Say what is about to happen, and write the run down if it is new."""
        self.split = {
            "micro": split.micro, "ranks": split.ranks, "threads": torch.get_num_threads(),
            "device": device.torch.type, "precision": device.precision, "compile": self.compile,
            "kernels": self.kernels, "recompute": model.compute.recompute,
            "shard": self.shard, "deterministic": self.deterministic,
        }  # fmt: skip
        if split.rank == 0:
            storage.make_folder(self.folder)
            new = not lock.held
            lock.take()
            if new and is_begun(self.folder):
                raise UserError(
                    f"another process has begun {self.folder} meanwhile: give the same command "
                    "again, or another --out"
                )
            storage.remove_unfinished(self.folder)
            if not (self.folder / "run.json").exists():
                storage.write_json(self.folder / "run.json", self._identity())
            checkpoints = self.folder / "checkpoints"
            storage.make_folder(checkpoints)
            storage.remove_unfinished(checkpoints)
            for path, what in self.damaged.items():
                console.say(f"{what}: it is now {storage.set_aside(path)}")
        r, m = self.recipe, self.recipe.model
        console.say(
            f"model: {m.n_layer} layers, {m.n_head} heads, {m.n_embd} wide, "
            f"{model.parameter_count():,} parameters, vocabulary {m.vocab_size:,}"
        )
        console.say(
            f"device: {split.ranks} x {device.name}, {device.precision}"
            f"{', compiled' if compiled else ''}{', kernels' if self.kernels else ''}"
            f"{', recomputing' if model.compute.recompute else ''}"
            f"{', sharded' if self.shard and split.ranks > 1 else ''}; "
            f"{r.batch.tokens:,} tokens a step = {split.micro} rows x {r.batch.length} x "
            f"{split.accumulation} micro-steps x {split.ranks} ranks"
        )
        console.say(self._opening(split))

    def _opening(self, split: Split) -> str:
        if not self.checkpoint:
            return f"run: {self.folder}, {self.recipe.steps:,} steps from the beginning"
        if self.forked_from and not (self.folder / "metrics.jsonl").exists():
            return f"run: {self.folder}, forked at step {self.step} of {self.forked_from}"
        before = self.checkpoint.description["split"]["ranks"]
        note = "" if before == split.ranks else f" (on {split.ranks} ranks instead of {before})"
        if self.step >= self.recipe.steps:
            return f"run: {self.folder} has all its {self.step} steps; --steps takes it further"
        return f"run: {self.folder} goes on at step {self.step} of {self.recipe.steps}{note}"

    def _identity(self) -> dict[str, Any]:
        return {
            "recipe": recipes.flatten(self.recipe),
            "data": {
                "path": storage.spelled(os.path.abspath(self.data)),
                "fingerprint": self.manifest.fingerprint,
            },
            "tokenizer": {
                "name": self.manifest.tokenizer, "sha256": self.manifest.tokenizer_sha256,
            },
            "forked_from": self.forked_from,
        }  # fmt: skip

    def open_metrics(self, model: GPT2, device: Device, console: Console, world: World) -> Metrics:
        """The run's log, without what was logged after the checkpoint it goes on from."""
        log = None
        if world.is_main:
            log = storage.JsonLines(self.folder / "metrics.jsonl", self.is_past, RECORD)
        peak = device.peak_flops
        metrics = Metrics(
            log, console, steps=self.recipe.steps, tokens_per_step=self.recipe.batch.tokens,
            flops_per_token=model.flops_per_token(self.recipe.batch.length),
            peak_flops=peak * world.size if peak else None,
        )  # fmt: skip
        if log and self._checkpoint_is_untold():
            metrics.record("checkpoint", self.step)
        return metrics

    def _has_own_checkpoint(self) -> bool:
        """Whether it goes on from a checkpoint of its own, and not from another run's."""
        return bool(self.checkpoint and self.checkpoint.path.parent == self.folder / "checkpoints")

    def _checkpoint_is_untold(self) -> bool:
        """Whether the process was killed after it wrote the checkpoint and before it said so."""
        if not self._has_own_checkpoint():
            return False
        log = self.folder / "metrics.jsonl"
        records = storage.read_json_lines(log, RECORD) if log.exists() else []
        return not any(r["kind"] == "checkpoint" and r["step"] == self.step for r in records)

    def is_past(self, record: dict[str, Any]) -> bool:
        """Whether a record describes what the checkpoint already contains."""
        done = self.step
        if record["kind"] == "checkpoint" or (record["kind"] not in OF_STEPS and self.examined):
            done += 1
        return record["step"] < done  # a step is numbered from 0, what comes after it from 1

    def open_saver(
        self, model: GPT2, optimizer: Optimizer, metrics: Metrics, world: World
    ) -> Saver:
        """What writes the run's checkpoints."""
        return Saver(
            self.folder / "checkpoints",
            Keep(self.recipe.keep_checkpoints, self.recipe.keep_best, self.recipe.keep_every),
            model, optimizer, metrics, world,
        )  # fmt: skip

    def describe(
        self, step: int, batch: int, guard: Guard, *, examined: bool, validation: float | None
    ) -> dict[str, Any]:
        """What a checkpoint says of itself, beside its weights. `batch`: number of the next one."""
        return {
            "step": step,
            **self._identity(),
            "data_position": {"windows": batch * self.recipe.batch.rows},
            "guard": guard.state(),
            "examined": examined,
            "validation_loss": validation,
            "model": dataclasses.asdict(self.recipe.model),
            "split": self.split,
            "versions": {"rekindle": __version__, "torch": torch.__version__},
        }

    def amend(self, **changes: Any) -> None:
        """Change the description of the checkpoint gone on from, if it is this run's."""
        if self._has_own_checkpoint():
            assert self.checkpoint
            checkpoint.amend(self.checkpoint, changes)

    def go_back(self, world: World, device: torch.device) -> bool:
        """Go on from the newest checkpoint that was saved before the steps that are now refused;
        False if there is none. On every rank; the last checkpoint must be whole."""
        later, found = [], None
        for path in reversed(checkpoint.list_checkpoints(self.folder / "checkpoints")):
            try:
                found = checkpoint.load(path)
            except DamagedError:  # to be set aside by the next start
                continue
            if not found.description["guard"]["refused"]:
                break
            later.append(path)
            found = None
        step = found.step if found else -1
        world.agree(step, "the checkpoint to go back to is that of step", SHARE, device)
        if not found:
            return False
        self.checkpoint = found
        for path in later if world.is_main else []:
            storage.remove_folder(path)
        return True


def is_begun(out: Path) -> bool:
    """Whether there is a run in `out`, whole or not."""
    return (out / "run.json").exists() or bool(checkpoint.list_checkpoints(out / "checkpoints"))


def open_run(
    recipe: Recipe, manifest: Manifest, data: Path, out: Path, options: RunOptions, ranks: int
) -> Run:
    """Decide whether `out` is begun, gone on with, or forked into. Writes nothing.

    Raises `UserError` if the folder holds something else, or a run with another recipe (field by
    field) or other data.
    """
    model = dataclasses.replace(recipe.model, vocab_size=manifest.vocab_size, padded_vocab_size=0)
    recipe = dataclasses.replace(recipe, model=model.for_training())
    recipes.check(recipe)
    forked_from = None
    _check_can_be_written(out)
    if before := _identity_of(out):
        forked_from = _check_same_run(recipe, manifest, out, before)
        if options.fork and not forked_from:
            raise UserError(f"{out} was not begun as a fork: give --fork a new --out")
        if options.fork and forked_from:
            _check_same_parent(out, Path(forked_from), options.fork)
    elif out.exists() and not (out.is_dir() and storage.is_empty(out)):
        raise UserError(f"{out} exists and is no run: give --out a new folder")
    elif options.fork:  # only now: a run that has begun no longer needs its parent
        forked_from = storage.spelled(os.path.abspath(checkpoint.find(options.fork)))
    loaded, damaged = checkpoint.newest_whole(out / "checkpoints")
    if not loaded and _has_saved(out / "metrics.jsonl"):
        raise UserError(
            f"{out} has saved checkpoints and there is none: see that the disk with them is there, "
            "or give another --out"
        )
    if not loaded and forked_from:
        loaded = checkpoint.load(Path(forked_from))
    split: dict[str, Any] = {}
    if loaded:
        _check_same_model(recipe, manifest, loaded)
        split = loaded.description["split"]

    def as_begun(name: str, default: Any) -> Any:
        given = getattr(options, name)
        return split.get(name, default) if given is None else given

    return Run(
        folder=out,
        recipe=recipe,
        data=data,
        manifest=manifest,
        options=options,
        checkpoint=loaded,
        damaged=damaged,
        forked_from=forked_from,
        precision=as_begun("precision", "auto"),
        compile=as_begun("compile", True),
        kernels=as_begun("kernels", False),
        recompute=as_begun("recompute", None),
        deterministic=as_begun("deterministic", False),
        shard=as_begun("shard", False),
        threads=split.get("threads"),
        micro=recipe.batch.micro or _fitting_micro(recipe, split, ranks),
    )


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


def _identity_of(out: Path) -> dict[str, Any] | None:
    """What the run in `out` was begun with; a checkpoint tells if its folder was lost meanwhile."""
    if (out / "run.json").is_file():
        return storage.read_json(out / "run.json", FORM)
    found, _ = checkpoint.newest_whole(out / "checkpoints")
    return found.description if found else None


def _check_same_run(
    recipe: Recipe, manifest: Manifest, out: Path, before: dict[str, Any]
) -> str | None:
    """Refuse to go on with another recipe or other data; return what the run was forked from."""
    if different := recipes.differences(before["recipe"], recipes.flatten(recipe)):
        raise UserError(
            f"{out} was begun with another recipe ({'; '.join(different)}): "
            "give the same flags, or a new --out (with --fork to start from this run's weights)"
        )
    if before["data"]["fingerprint"] != manifest.fingerprint:
        raise UserError(
            f"{out} was begun on other data ({before['data']['path']}, fingerprint "
            f"{before['data']['fingerprint'][:12]}, now {manifest.fingerprint[:12]}): "
            "give the same --data, or a new --out (with --fork to start from this run's weights)"
        )
    return before["forked_from"]


def _check_same_parent(out: Path, forked_from: Path, fork: Path) -> None:
    """Refuse another run or checkpoint than the one that `out` was forked from."""
    if not forked_from.is_relative_to(os.path.abspath(fork)):
        raise UserError(f"{out} was forked from {forked_from}: give --fork {fork} a new --out")


def _check_same_model(recipe: Recipe, manifest: Manifest, start: Checkpoint) -> None:
    """Refuse a checkpoint of another shape or tokenizer, as a fork may name one."""
    before, now = start.description["model"], dataclasses.asdict(recipe.model)
    different = [k for k in now if before.get(k) != now[k]]
    if different:
        fields = "; ".join(f"{k} is {before.get(k)}, not {now[k]}" for k in different)
        raise UserError(f"{start.path} holds another model ({fields})")
    tokenizer = start.description["tokenizer"]
    if tokenizer["sha256"] != manifest.tokenizer_sha256:
        raise UserError(
            f"{start.path} was trained with the tokenizer {tokenizer['name']}, "
            f"the data is made with {manifest.tokenizer}: prepare it with the same --tokenizer"
        )


def _fitting_micro(recipe: Recipe, split: dict[str, Any], ranks: int) -> int:
    """The micro-batch of the run so far, if it still divides the batch; 0 asks for a new one."""
    micro = split.get("micro", 0)
    return micro if micro and recipe.batch.rows % (micro * ranks) == 0 else 0

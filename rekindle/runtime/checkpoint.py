"""Checkpoints: a folder of safetensors and JSON, whole or absent.

RUN/checkpoints/step-000250/
    model.safetensors      the parameters, under GPT-2's names
    optimizer.safetensors  what the optimizer names as its state (AdamW: exp_avg.NAME, ..., updates)
    checkpoint.json        step, recipe, data, split, versions; each file's SHA-256 and its own
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rekindle import storage
from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.model.shapes import check_shapes, expected_shapes
from rekindle.optim import Optimizer
from rekindle.runtime.sharding import laid_out_as, whole
from rekindle.schema import mismatch

FORMAT = 3
READABLE = (2, FORMAT)  # 2 had the number of updates in its description
DESCRIPTION = "checkpoint.json"
FILES = ("model.safetensors", "optimizer.safetensors")
# What everybody may rely on in a description. `Run.describe` makes it.
FORM = {
    "step": int, "updates?": int, "examined": bool, "forked_from": (None, str), "model": dict,
    "recipe": {"batch.length": range(1, 2**31), "eval_tokens": int},
    "data": {"path": str, "fingerprint": str}, "data_position": {"windows": int},
    "tokenizer": {"name": str, "sha256": str}, "guard": {"losses": [float], "refused": int},
    "split": {
        "micro": int, "ranks": int, "threads": range(1, 4096), "precision": str, "compile": bool,
        "kernels": bool, "recompute": bool,
    },
    "files": {name: {"bytes": int, "sha256": str} for name in FILES},
}  # fmt: skip
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read from disk; its hashes have been checked."""

    path: Path
    description: dict[str, Any]
    model: dict[str, Tensor]
    config: GPT2Config

    @property
    def step(self) -> int:
        return self.description["step"]

    @torch.no_grad()
    def restore_model(self, model: nn.Module) -> None:
        """Give `model` the weights it had."""
        for name, p in model.named_parameters():
            p.copy_(laid_out_as(p, self.model[name]))

    @torch.no_grad()
    def restore_optimizer(self, optimizer: Optimizer) -> None:
        """Give `optimizer` the state it had."""
        tensors = optimizer.state_tensors()
        saved: dict[str, Tensor] = {}
        if (updates := self.description.get("updates")) is not None:  # format 2
            saved["updates"] = torch.full_like(tensors["updates"], updates, device="cpu")
        shapes = {name: tuple(t.shape) for name, t in tensors.items() if name not in saved}
        saved |= _read_tensors(self.path / "optimizer.safetensors", lambda _: shapes)
        for name, tensor in tensors.items():
            tensor.copy_(laid_out_as(tensor, saved[name]))


class Snapshot:
    """A model's parameters and its optimizer's state at one moment, in the CPU's memory.

    With AdamW it takes 12 bytes a parameter (1.5 GB for 124M) beside what training on a CPU needs.
    It is allocated when this is made, so that a lack of memory shows before the first step, and
    used again by every `take`. For a GPU it is pinned: only so does a copy run beside other work.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        parameters = dict(model.named_parameters())
        self._pinned = next(iter(parameters.values())).is_cuda
        self.model = self._allocate(parameters)
        self.optimizer = self._allocate(optimizer.state_tensors())
        self._copied: torch.cuda.Event | None = None

    def _allocate(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Memory for tensors of these shapes and types: one piece a type, as pinning rounds up."""
        made: dict[str, Tensor] = {}
        for dtype in {tensor.dtype for tensor in named.values()}:
            same = {name: t for name, t in named.items() if t.dtype == dtype}
            sizes = [t.numel() for t in same.values()]
            flat = torch.empty(sum(sizes), dtype=dtype, pin_memory=self._pinned)
            flat.zero_()  # touched now, and not at a save
            pieces = zip(same.items(), flat.split(sizes), strict=True)
            made |= {name: piece.view(tensor.shape) for (name, tensor), piece in pieces}
        return made

    def take(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Copy what is to be saved. On a GPU the copies are only begun, before whatever the GPU is
        given to do next; after `wait` they are whole. If the model is sharded, the other ranks run
        through `whole_tensors` meanwhile."""
        targets = {**self.model, **self.optimizer}
        for name, tensor in whole_tensors(model, optimizer):
            targets[name].copy_(tensor, non_blocking=self._pinned)
        if self._pinned:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> None:
        if self._copied:
            self._copied.synchronize()


def whole_tensors(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, under its names there: one after the other, each of them whole."""
    for name, p in model.named_parameters():
        yield name, whole(p.detach())
    for name, tensor in optimizer.state_tensors().items():
        yield name, whole(tensor)


def write(folder: Path, description: dict[str, Any], snapshot: Snapshot) -> Path:
    """Write the checkpoint of `description["step"]` under `folder`; return its path."""
    snapshot.wait()
    path = folder / f"step-{description['step']:06d}"
    with storage.new_folder(path) as new:
        for name, tensors in (("model", snapshot.model), ("optimizer", snapshot.optimizer)):
            arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
            new.write_tensors(f"{name}.safetensors", arrays)
        whole = {"format": FORMAT, **description, "files": dict(new.files)}
        new.write_json(DESCRIPTION, {**whole, "sha256": _description_sha256(whole)})
    return path


def amend(saved: Checkpoint, changes: dict[str, Any]) -> None:
    """Change what a checkpoint says of itself, on disk and here; it stays whole meanwhile."""
    saved.description.update(changes)
    whole = saved.description
    storage.write_json(saved.path / DESCRIPTION, {**whole, "sha256": _description_sha256(whole)})


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first. Unfinished ones have other names."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step)


def newest_whole(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint under `folder` that is whole, if any, and what ails those after it.

    Raises `UserError` if there are checkpoints, but not one that is whole.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            return load(path), damaged
        except DamagedError as error:
            damaged[path] = error.what
    if damaged:
        raise UserError(
            f"no checkpoint in {folder} is whole ({'; '.join(damaged.values())}): restore one from "
            "a copy, or start anew in another --out"
        )
    return None, damaged


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `newest` so many (0: all), the `best` so many of all by
    validation loss, and those at multiples of `every` steps (0: none)."""

    newest: int = 0
    best: int = 0
    every: int = 0


def prune(folder: Path, keep: Keep) -> None:
    """Remove what `keep` does not name. The newest one, just written, always stays."""
    found = list_checkpoints(folder)
    old = found[: -keep.newest] if keep.newest else []
    losses = {path: _validation_loss(path) for path in found} if old and keep.best else {}
    best = sorted((p for p, loss in losses.items() if loss < math.inf), key=lambda p: losses[p])
    for path in old:
        if path in best[: keep.best] or (keep.every and _step(path) % keep.every == 0):
            continue
        storage.remove_folder(path)


def _validation_loss(path: Path) -> float:
    """As its description has it; infinite if it was not measured or cannot be read."""
    try:
        return storage.read_json(path / DESCRIPTION, {"validation_loss": float})["validation_loss"]
    except UserError:
        return math.inf


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def find(path: Path) -> Path:
    """The checkpoint that a run folder or a checkpoint folder stands for: itself, or the newest.

    Raises `UserError` if it is neither.
    """
    if (path / DESCRIPTION).is_file():
        return path
    if found := list_checkpoints(path / "checkpoints"):
        return found[-1]
    if not path.exists():
        raise UserError(f"there is no {path}")
    if (path / "checkpoints").is_dir():
        raise UserError(f"the run {path} has no checkpoint yet: train it further")
    raise UserError(f"{path} is no run and no checkpoint: it has neither checkpoints/ nor "
                    f"{DESCRIPTION}")  # fmt: skip


class DamagedError(UserError):
    """A checkpoint that is not what was written."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: name another checkpoint; `rekindle train` sets this one aside")
        self.what = what


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and check every byte. Raises `DamagedError` that names the damaged file."""
    try:
        description = storage.read_json(path / DESCRIPTION)
    except UserError as error:
        raise DamagedError(f"{path / DESCRIPTION} is missing or damaged") from error
    if not isinstance(description, dict):
        raise DamagedError(f"{path / DESCRIPTION} is not the description of a checkpoint")
    if description.pop("sha256", None) != _description_sha256(description):
        raise DamagedError(f"{path / DESCRIPTION} is damaged (it is not what was written)")
    if description.get("format") not in READABLE:
        raise UserError(f"{path / DESCRIPTION} is not a checkpoint of format {FORMAT}")
    if wrong := mismatch(description, FORM):
        raise DamagedError(f"{path / DESCRIPTION} is not the description of a checkpoint ({wrong})")
    for name in FILES:
        file, entry = path / name, description["files"][name]
        try:
            whole = file.stat().st_size == entry["bytes"]
            whole = whole and storage.file_sha256(file) == entry["sha256"]
        except OSError as error:
            raise DamagedError(f"{file} cannot be read ({error.strerror})") from None
        if not whole:
            raise DamagedError(
                f"{file} is damaged (it is not the {entry['bytes']} bytes that were written)"
            )
    try:
        config = GPT2Config.from_dict(description["model"])
    except UserError as error:
        raise DamagedError(f"{path / DESCRIPTION} describes no GPT-2 ({error})") from None
    model = _read_tensors(
        path / "model.safetensors", lambda found: expected_shapes(GPT2, config, found)
    )
    return Checkpoint(path, description, model, config)


def _description_sha256(description: dict[str, Any]) -> str:
    """Identifies what a description says, its own hash apart."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _read_tensors(
    file: Path, shapes: Callable[[Collection[str]], Mapping[str, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """The tensors of a file, which are float32 and have the names and shapes that `shapes` expects
    of a file with these names; otherwise `DamagedError`, before memory is taken for them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            if any(tensor.get_dtype() != "F32" for tensor in found.values()):
                raise UserError("not all tensors are float32")
            check_shapes({name: t.get_shape() for name, t in found.items()}, shapes(found))
            return {name: opened.get_tensor(name) for name in found}
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{file} is not a safetensors file ({error})") from None
    except UserError as error:
        raise DamagedError(f"{file}: {error}") from None

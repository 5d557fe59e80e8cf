"""Checkpoints: a folder of safetensors and JSON, whole or absent.

RUN/checkpoints/step-000250/
    model.safetensors      the parameters, under GPT-2's names
    optimizer.safetensors  AdamW's moments, as exp_avg.NAME and exp_avg_sq.NAME
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
from rekindle.runtime.sharding import laid_out_as, whole
from rekindle.schema import mismatch

FORMAT = 2
DESCRIPTION = "checkpoint.json"
FILES = ("model.safetensors", "optimizer.safetensors")
# What everybody may rely on in a description. `Run.describe` makes it.
FORM = {
    "step": int, "updates": int, "examined": bool, "forked_from": (None, str), "model": dict,
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
_MOMENTS = ("exp_avg", "exp_avg_sq")


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

    def restore_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give `optimizer` the moments and the count of updates it had."""
        shapes = {
            f"{key}.{name}": tuple(t.shape) for key in _MOMENTS for name, t in self.model.items()
        }
        moments = _read_tensors(self.path / "optimizer.safetensors", lambda _: shapes)
        for name, p in model.named_parameters():
            state = {key: laid_out_as(p, moments[f"{key}.{name}"]) for key in _MOMENTS}
            count = torch.tensor(float(self.description["updates"]))
            fused = optimizer.defaults.get("fused")  # whose kernels count on the device
            optimizer.state[p] = {"step": count.to(p.device) if fused else count, **state}


class Snapshot:
    """A model's parameters and AdamW's moments as they were at one moment, in the CPU's memory.

    Takes 12 bytes for each parameter (1.5 GB for 124M) beside what training on a CPU needs. It is
    taken when this is made, so that a lack of it shows before the first step, and used again by
    every `take`. For a GPU it is pinned: only then can a copy go on while the CPU does else.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        sizes = [p.numel() for p in parameters.values()]
        self._pinned = next(iter(parameters.values())).is_cuda
        views = []
        for _ in range(1 + len(_MOMENTS)):  # a few large pieces: pinning rounds each one up
            flat = torch.empty(sum(sizes), pin_memory=self._pinned).zero_()  # now, not at a save
            pieces = zip(parameters.items(), flat.split(sizes), strict=True)
            views.append({name: piece.view(p.shape) for (name, p), piece in pieces})
        self.model: dict[str, Tensor] = views[0]
        self.optimizer = {
            f"{key}.{name}": view
            for key, named in zip(_MOMENTS, views[1:], strict=True)
            for name, view in named.items()
        }
        self._updates = torch.zeros((), pin_memory=self._pinned)
        self._copied: torch.cuda.Event | None = None

    @property
    def updates(self) -> int:
        """Optimizer steps that were not refused."""
        return int(self._updates)

    def take(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy what is to be saved. On a GPU the copies are only begun, before whatever the GPU is
        given to do next; after `wait` they are whole. If the model is sharded, the other ranks run
        through `whole_tensors` meanwhile."""
        targets = {**self.model, **self.optimizer}
        for name, tensor in whole_tensors(model, optimizer):
            self._copy(tensor, targets[name])
        for state in [*optimizer.state.values()][:1]:  # none before the first update
            self._copy(state["step"], self._updates)
        if self._pinned:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> None:
        if self._copied:
            self._copied.synchronize()

    def _copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=self._pinned)


def whole_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, under its names there: one after the other, each of them whole."""
    for name, p in model.named_parameters():
        yield name, whole(p.detach())
        for key in _MOMENTS if optimizer.state.get(p) else ():
            yield f"{key}.{name}", whole(optimizer.state[p][key])


def write(folder: Path, description: dict[str, Any], snapshot: Snapshot) -> Path:
    """Write the checkpoint of `description["step"]` under `folder`; return its path."""
    snapshot.wait()
    path = folder / f"step-{description['step']:06d}"
    with storage.new_folder(path) as new:
        for name, tensors in (("model", snapshot.model), ("optimizer", snapshot.optimizer)):
            arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
            new.write_tensors(f"{name}.safetensors", arrays)
        whole = {
            "format": FORMAT, **description, "updates": snapshot.updates, "files": dict(new.files),
        }  # fmt: skip
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
    if description.get("format") != FORMAT:
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

"""The checkpoint format, and reading a checkpoint."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rekindle import lookup, recipes, schema, storage
from rekindle.errors import UserError
from rekindle.machine import Machine
from rekindle.model import HasParameters, LanguageModel, ModelConfig
from rekindle.model.shapes import check_shapes, expected_shapes
from rekindle.optim import Optimizer
from rekindle.runtime.sharding import shard_like

FORMAT = 5
READABLE = (2, 3, 4, FORMAT)
DESCRIPTION = "checkpoint.json"
FILES = ("model.safetensors", "optimizer.safetensors")
_FILES_SCHEMA = {"files": {name: {"bytes": int, "sha256": str} for name in FILES}}


@dataclass(frozen=True)
class Description:
    """The contents of checkpoint.json: everything but the tensors and the hashes."""

    step: int  # optimizer steps taken
    recipe: dict[str, Any] = field(metadata={"schema": recipes.SCHEMA})
    model: dict[str, Any]  # the model's configuration
    model_class: str  # its name in MODELS, or else the name of the class
    optimizer_class: str  # its name in OPTIMIZERS, or else the name of the class
    data_position: dict[str, int] = field(metadata={"schema": {"windows": int}})
    guard: dict[str, Any] = field(metadata={"schema": {"losses": [float], "skipped": int}})
    machine: Machine
    ranks: int = field(metadata={"schema": range(1, 2**31)})
    versions: dict[str, str]
    # Set only by a run, not by a `Trainer` without a run folder:
    data: dict[str, str] | None = field(
        default=None, metadata={"schema": (None, {"path": str, "fingerprint": str})}
    )
    tokenizer: dict[str, str] | None = field(
        default=None, metadata={"schema": (None, {"name": str, "sha256": str})}
    )
    forked_from: str | None = None
    evaluated: bool = False  # whether the evaluation due after this step was done
    validation_loss: float | None = None
    updates: int | None = None  # format 2 only; later formats store it as a tensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk, with its hashes checked."""

    path: Path
    description: Description
    model: dict[str, Tensor]
    config: ModelConfig
    model_class: type[LanguageModel]

    @property
    def step(self) -> int:
        return self.description.step

    @property
    def tokens_read(self) -> int:
        """Position in the training data, in tokens; a fork may use another sequence length."""
        d = self.description
        return d.data_position["windows"] * d.recipe["batch.length"]

    def check_same(self, config: ModelConfig, model: type, optimizer: type) -> None:
        """Raise `UserError` if the checkpoint belongs to a different model or optimizer."""
        before, now = self.description.model, dataclasses.asdict(config)
        if different := [k for k in now if before.get(k) != now[k]]:
            fields = "; ".join(f"{k} is {before.get(k)}, not {now[k]}" for k in different)
            raise UserError(f"{self.path} holds a different model ({fields})")
        for was, name in (
            (self.description.model_class, lookup.name_of(model, lookup.models())),
            (self.description.optimizer_class, lookup.name_of(optimizer, lookup.optimizers())),
        ):
            if was != name:
                raise UserError(f"{self.path} was trained with {was}, not with {name}")

    @torch.no_grad()
    def restore_model(self, model: HasParameters) -> None:
        """Copy the saved weights into `model`."""
        for name, p in model.named_parameters():
            p.copy_(shard_like(p, self.model[name]))

    @torch.no_grad()
    def restore_optimizer(self, optimizer: Optimizer) -> None:
        """Copy the saved state into `optimizer`."""
        tensors = optimizer.state_tensors()
        saved: dict[str, Tensor] = {}
        if (updates := self.description.updates) is not None:
            saved["updates"] = torch.full_like(tensors["updates"], updates, device="cpu")
        missing = {name: tensor for name, tensor in tensors.items() if name not in saved}
        saved |= _read_tensors(
            self.path / "optimizer.safetensors",
            lambda _: {name: tuple(t.shape) for name, t in missing.items()},
            {name: t.dtype for name, t in missing.items()},
        )
        for name, tensor in tensors.items():
            tensor.copy_(shard_like(tensor, saved[name]))


class DamagedError(UserError):
    """A checkpoint whose files are missing, damaged or invalid."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: use another checkpoint; `rekindle train` sets this one aside")
        self.what = what


def load(path: Path, model_class: type[LanguageModel] | None = None) -> Checkpoint:
    """Read a checkpoint and check the hash of every file. `model_class` is needed if the model is
    not in `MODELS`.

    Raises `DamagedError`, which names the damaged file, and `UserError` if the model's class is
    unknown.
    """
    found = _read_description(path / DESCRIPTION)
    _check_files(path, found["files"])
    try:
        description = schema.parse(Description, found)
    except ValueError as wrong:
        raise DamagedError(
            f"{path / DESCRIPTION} is not a valid checkpoint description ({wrong})"
        ) from None
    known = lookup.models().get(description.model_class)
    if (chosen := model_class or known) is None:
        raise UserError(
            f"{path} holds a {description.model_class}, which is not one of Rekindle's models: "
            "load it from Python with its class"
        )
    try:
        config = chosen.Config.from_dict(description.model)
    except UserError as error:
        raise DamagedError(
            f"{path / DESCRIPTION} does not describe a valid {chosen.__name__} ({error})"
        ) from None
    model = _read_tensors(
        path / "model.safetensors", lambda found: expected_shapes(chosen, config, found)
    )
    return Checkpoint(path, description, model, config, chosen)


def _read_description(file: Path) -> dict[str, Any]:
    """The contents of `file`, converted to the newest format."""
    try:
        found = storage.read_json(file)
    except UserError as error:
        raise DamagedError(f"{file} is missing or damaged") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{file} is not a valid checkpoint description")
    if found.pop("sha256", None) != description_sha256(found):
        raise DamagedError(f"{file} is damaged (its SHA-256 does not match)")
    if found.get("format") not in READABLE:
        raise UserError(
            f"{file} does not have checkpoint format {FORMAT}: use another version of Rekindle"
        )
    if wrong := schema.mismatch(found, _FILES_SCHEMA):
        raise DamagedError(f"{file} is not a valid checkpoint description ({wrong})")
    return found if found["format"] == FORMAT else _upgraded(found)


def _upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """Convert a description of an older format to format 5; `kernels` was a bool before."""
    new = old if old["format"] == 4 else _from_0_1(old)
    machine = new.get("machine")
    if isinstance(machine, dict) and isinstance(kernels := machine.get("kernels"), bool):
        new = {**new, "machine": {**machine, "kernels": "all" if kernels else "none"}}
    return new


def _from_0_1(old: dict[str, Any]) -> dict[str, Any]:
    """Convert a description from format 2 or 3 (version 0.1) to format 4."""
    new = {**old, "model_class": "gpt2", "optimizer_class": "adamw"}
    new["evaluated"] = new.pop("examined", None)
    if isinstance(guard := old.get("guard"), dict):
        new["guard"] = {"losses": guard.get("losses"), "skipped": guard.get("refused")}
    if isinstance(split := new.pop("split", None), dict):
        defaults = {"device": "", "deterministic": False, "shard": False}
        new["machine"] = {**defaults, **split, "micro_batch": split.get("micro")}
        new["ranks"] = split.get("ranks")
    return new


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    for name in FILES:
        file, entry = folder / name, files[name]
        try:
            intact = file.stat().st_size == entry["bytes"]
            intact = intact and storage.file_sha256(file) == entry["sha256"]
        except OSError as error:
            raise DamagedError(f"{file} cannot be read ({error.strerror})") from None
        if not intact:
            raise DamagedError(f"{file} is damaged (its size or SHA-256 does not match)")


def description_sha256(description: dict[str, Any]) -> str:
    """The SHA-256 of a description, which must not contain its own hash."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


_DTYPES = {  # by the names that safetensors uses
    "F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


@contextmanager
def _openable(file: Path) -> Iterator[Path]:
    """A path at which safetensors can open `file`, even if its real path is not valid UTF-8."""
    if os.fsencode(file).isascii() or storage.printable(file) == str(file):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "tensors.safetensors")
        link.symlink_to(file.absolute())
        yield link


def _read_tensors(
    file: Path,
    shapes: Callable[[Collection[str]], Mapping[str, tuple[int, ...]]],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """Read the tensors of a file.

    `shapes` maps the names found in the file to the expected names and shapes; `dtypes` gives the
    expected types, by default float32. Raises `DamagedError` on a mismatch, before allocating any
    tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with _openable(file) as path, safe_open(path, "pt") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            check_shapes({name: t.get_shape() for name, t in found.items()}, shapes(found))
            for name, tensor in found.items():
                wanted = dtypes[name] if dtypes else torch.float32
                if _DTYPES.get(tensor.get_dtype()) != wanted:
                    raise UserError(f"{name} is {tensor.get_dtype()}, not {wanted}")
            return {name: opened.get_tensor(name) for name in found}
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{file} is not a safetensors file ({error})") from None
    except UserError as error:
        raise DamagedError(f"{file}: {error}") from None

"""RUN_OR_MODEL: whatever a person may name, as a model ready to evaluate or to speak."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from torch import nn

from rekindle import checkpoint
from rekindle.checkpoint import Checkpoint, DamagedError, Description
from rekindle.data.tokenizer import Tokenizer, get_tokenizer
from rekindle.errors import UserError
from rekindle.interop import huggingface
from rekindle.model import LanguageModel
from rekindle.model.gpt2 import GPT2
from rekindle.model.shapes import without_init
from rekindle.runtime.device import Device, choose_compute


@dataclass(frozen=True)
class Loaded:
    """A model on its device, its tokenizer, and where it came from."""

    model: LanguageModel
    tokenizer: Tokenizer
    name: str
    run: Description | None = None  # the checkpoint's description, if it is one of ours


def load(name: str, device: Device) -> Loaded:
    """Load a run folder (its newest checkpoint), a checkpoint, a model of the hub, or a folder in
    Hugging Face's layout. Raises `UserError` that says what `name` is not."""
    loaded = _load(name)
    cast(nn.Module, loaded.model).to(device.torch)
    loaded.model.use(choose_compute(device, loaded.model.config.block_size))
    return loaded


def _newest(path: Path) -> Checkpoint:
    """The checkpoint that `path` stands for, while training may remove it for a newer one."""
    for _ in range(9):
        found = checkpoint.find(path)
        try:
            return checkpoint.load(found)
        except DamagedError:
            if found.exists():
                raise
    raise UserError(f"the checkpoints of {path} are removed faster than they can be read")


def from_pretrained(name_or_folder: str | Path) -> GPT2:
    """The model alone, float32 and on the CPU, of anything that `load` takes; the tokenizer may be
    unknown. This is `GPT2.from_pretrained`.

    The model of a run keeps the padding rows of its embedding. Raises `UserError` that says what
    `name_or_folder` is not.
    """
    name = str(name_or_folder)
    if _is_published(name):
        return huggingface.from_pretrained(name)
    model = _model(_saved(name))
    if not isinstance(model, GPT2):
        raise UserError(f"{name} holds a {type(model).__name__}, not a GPT-2")
    return model


GPT2.from_pretrained = staticmethod(from_pretrained)


def _is_published(name: str) -> bool:
    """Whether `name` is a model of the hub, or a folder in Hugging Face's layout."""
    return name in huggingface.HUB or Path(name, "config.json").is_file()


def _load(name: str) -> Loaded:
    if _is_published(name):
        model = huggingface.from_pretrained(name)
        if model.config.vocab_size != 50257:
            raise UserError(f"{name} has {model.config.vocab_size} ids, GPT-2's tokenizer 50257")
        return Loaded(model, get_tokenizer("gpt2"), name)
    saved = _saved(name)
    if saved.description.tokenizer is None:
        raise UserError(f"{saved.path} was trained on arrays: it does not say which tokenizer")
    tokenizer = get_tokenizer(saved.description.tokenizer["name"])
    if saved.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{saved.path} has {saved.config.vocab_size} ids, its tokenizer {tokenizer.vocab_size}"
        )
    return Loaded(_model(saved), tokenizer, str(saved.path), saved.description)


def _saved(name: str) -> Checkpoint:
    """The checkpoint of a run or checkpoint folder."""
    path = Path(name)
    if not path.exists():
        near = get_close_matches(name, huggingface.HUB, n=2)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"{name} is no folder and none of the models {', '.join(huggingface.HUB)}{hint}"
        )
    return _newest(path)


def _model(saved: Checkpoint) -> LanguageModel:
    """The model of a checkpoint, on the CPU."""
    model = without_init(saved.model_class, saved.config)
    saved.restore_model(model)
    return model

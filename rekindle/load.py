"""RUN_OR_MODEL: whatever a person may name, as a model ready to evaluate or to speak."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rekindle.data.tokenizer import Tokenizer, get_tokenizer
from rekindle.errors import UserError
from rekindle.interop import huggingface
from rekindle.model.gpt2 import GPT2
from rekindle.model.shapes import on_meta
from rekindle.runtime import checkpoint
from rekindle.runtime.checkpoint import Checkpoint, DamagedError
from rekindle.runtime.device import Device
from rekindle.runtime.fit import choose_compute


@dataclass(frozen=True)
class Loaded:
    """A model on its device, its tokenizer, and where it came from."""

    model: GPT2
    tokenizer: Tokenizer
    name: str
    run: dict[str, Any] | None = None  # the checkpoint's description, if it is one of ours


def load(name: str, device: Device) -> Loaded:
    """Load a run folder (its newest checkpoint), a checkpoint, a model of the hub, or a folder in
    Hugging Face's layout. Raises `UserError` that says what `name` is not."""
    loaded = _load(name)
    loaded.model.to(device.torch)
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
    return huggingface.from_pretrained(name) if _is_published(name) else _model(_saved(name))


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
    tokenizer = get_tokenizer(saved.description["tokenizer"]["name"])
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


def _model(saved: Checkpoint) -> GPT2:
    """The model of a checkpoint, on the CPU."""
    model = on_meta(GPT2, saved.config)  # shapes only: the weights come from the file
    model.load_state_dict(
        {**saved.model, "lm_head.weight": saved.model["transformer.wte.weight"]}, assign=True
    )
    model.tie()
    return model.requires_grad_(True)

"""GPT-2 weights in Hugging Face's layout: a folder, or a model on the hub.

OpenAI stored linear weights as (in, out), for its `Conv1D`; ours are (out, in), so they are
transposed on the way in.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rekindle import hub, storage
from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import SIZES, GPT2Config
from rekindle.model.shapes import check_shapes, expected_shapes, on_meta

HUB = {name: f"openai-community/{name}" for name in SIZES}
FILES = ("config.json", "model.safetensors")
HOLDS = {FILES[0]: "sizes", FILES[1]: "weights"}
OTHER_FORMS = {
    "model.safetensors.index.json": "its weights in several files (model.safetensors.index.json)",
    "pytorch_model.bin": "pytorch_model.bin, a pickle",
    "pytorch_model.bin.index.json": "several pytorch_model-*.bin, pickles",
    "adapter_model.safetensors": "only changes to another model (adapter_model.safetensors)",
    "tf_model.h5": "tf_model.h5 of TensorFlow",
    "flax_model.msgpack": "flax_model.msgpack of Flax",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFER = re.compile(r"(?:transformer\.)?h\.(\d+)\.attn\.(?:masked_)?bias")  # of a causal mask
HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"

# What decides a GPT-2's function beside its sizes, where a config.json states it.
EXPECTED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
    "add_cross_attention": False, "is_encoder_decoder": False, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
# And what would change it. `auto_map` names code of the model's own.
FOREIGN = ("pruned_heads", "quantization_config", "auto_map")


def from_pretrained(name_or_folder: str | Path) -> GPT2:
    """`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl` from the hub (or its cache), or a folder with
    `config.json` and `model.safetensors`. Float32, on the CPU, not padded.

    Raises `UserError` if it cannot be had or is no GPT-2.
    """
    name = str(name_or_folder)
    if name in HUB and not Path(name).is_dir():
        return from_files(*hub_files(name))
    return from_files(*folder_files(Path(name)))


def from_files(config_file: Path, weights_file: Path) -> GPT2:
    """The model that these two files describe. Raises `UserError` if it is no GPT-2."""
    config = read_config(config_file)
    try:
        weights = convert(_read_weights(weights_file), config)
    except UserError as error:
        raise UserError(f"{weights_file}: {error}") from None
    model = on_meta(GPT2, config)  # shapes only: the weights come from the file
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(True)


def read_config(file: Path) -> GPT2Config:
    """Hugging Face's `config.json` as ours. Raises `UserError` for anything but a plain GPT-2."""
    raw: Any = storage.read_json(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds no JSON object: it is not the config.json of a GPT-2")
    for key, value in EXPECTED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{file}: {key} is {raw[key]!r}, which is not GPT-2's {value!r}")
    for key in FOREIGN:
        if raw.get(key):
            raise UserError(f"{file}: {key} is {raw[key]!r}, which a plain GPT-2 does not have")
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if type(raw.get(key)) is not int or raw[key] < 1:
            raise UserError(f"{file}: {key} is missing or not a positive whole number")
    try:
        config = GPT2Config(
            n_layer=raw["n_layer"],
            n_head=raw["n_head"],
            n_embd=raw["n_embd"],
            block_size=raw["n_positions"],
            vocab_size=raw["vocab_size"],
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if raw.get("n_ctx", config.block_size) != config.block_size:
        raise UserError(f"{file}: n_ctx is {raw['n_ctx']}, but n_positions {config.block_size}")
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{file}: n_inner is {raw['n_inner']}, GPT-2's is 4 x n_embd")
    return config


def convert(weights: dict[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names and shapes, float32.

    Raises `UserError` if one is missing, unknown, there twice or of another shape, or if the head
    is not the embedding.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        buffer = _BUFFER.fullmatch(name)
        if name == HEAD or (buffer and int(buffer[1]) < config.n_layer):
            continue
        if tensor.dtype not in FLOATS or (name.endswith(_CONV1D) and tensor.dim() != 2):
            raise UserError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, no weight of ours")
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        if name in ours:
            raise UserError(f"it holds {name} twice, with and without transformer. before its name")
        ours[name] = tensor.t() if name.endswith(_CONV1D) else tensor
    _tie(ours, weights.get(HEAD))
    found = {name: tensor.shape for name, tensor in ours.items()}
    check_shapes(found, expected_shapes(GPT2, config, found))
    ours = {name: tensor.float().contiguous() for name, tensor in ours.items()}
    # The table is one parameter; both of its names are given, so that none stays on `meta`.
    return {**ours, HEAD: ours[TABLE]}


def _tie(ours: dict[str, Tensor], head: Tensor | None) -> None:
    """Take the head for the embedding where a file has stored the tied pair under the head's name.
    Raises `UserError` if they are two."""
    if head is None:
        return
    if TABLE not in ours and head.dtype in FLOATS:
        ours[TABLE] = head
    table = ours.get(TABLE)
    if table is None or table.shape != head.shape or not _same(table, head):
        raise UserError(
            f"{HEAD} differs from {TABLE}: this model has a head of its own, and GPT-2's is tied "
            "to its embedding"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; nan is the same as nan."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def hub_files(name: str) -> tuple[Path, Path]:
    """config.json and model.safetensors of a model of the hub, downloaded if need be."""
    config, weights = (
        hub.download(HUB[name], file, instead="name a folder that holds " + " and ".join(FILES))
        for file in FILES
    )
    return config, weights


def folder_files(folder: Path) -> tuple[Path, Path]:
    """config.json and model.safetensors of a folder. Raises `UserError` that says what is there
    instead, and how to make them of it."""
    config, weights = (folder / file for file in FILES)
    if not weights.is_file():
        for name, what in OTHER_FORMS.items():
            if (folder / name).is_file():
                raise UserError(
                    f"{folder} has no {FILES[1]}, but {what}, which is not read: load it with "
                    "transformers and write it with model.save_pretrained(FOLDER)"
                )
    for file in (config, weights):
        if not file.is_file():
            raise UserError(
                f"{folder} has no {file.name}, which holds a model's {HOLDS[file.name]}"
            )
    return config, weights


def _read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        if storage.spelled(file) == str(file):
            return load_file(file)
        return load(file.read_bytes())  # its library opens no path that is not UTF-8
    except (OSError, SafetensorError) as error:
        raise UserError(f"it is not a whole safetensors file ({error})") from None

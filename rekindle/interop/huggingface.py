"""GPT-2 weights in Hugging Face's layout: a folder, or a model on the hub.

OpenAI stored linear weights as (in, out), for its `Conv1D`; ours are (out, in), so they are
transposed when read.
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
CONTAINS = {FILES[0]: "sizes", FILES[1]: "weights"}
OTHER_FORMATS = {
    "model.safetensors.index.json": "weights in several files (model.safetensors.index.json)",
    "pytorch_model.bin": "pytorch_model.bin, a pickle",
    "pytorch_model.bin.index.json": "several pytorch_model-*.bin files, which are pickles",
    "adapter_model.safetensors": "an adapter for another model (adapter_model.safetensors)",
    "tf_model.h5": "tf_model.h5, for TensorFlow",
    "flax_model.msgpack": "flax_model.msgpack, for Flax",
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFER = re.compile(r"(?:transformer\.)?h\.(\d+)\.attn\.(?:masked_)?bias")  # of a causal mask
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"

# Fields of a config.json, other than sizes, that GPT-2's function depends on: if present, they
# must have these values.
EXPECTED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
    "add_cross_attention": False, "is_encoder_decoder": False, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
# Fields that would change the function. `auto_map` refers to custom code of the model.
FOREIGN = ("pruned_heads", "quantization_config", "auto_map")


def from_pretrained(name_or_folder: str | Path) -> GPT2:
    """Read `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl` from the hub (or its cache), or a
    folder with `config.json` and `model.safetensors`. Float32, on the CPU, without padding rows.

    Raises `UserError` if the model is not available or is not a GPT-2.
    """
    name = str(name_or_folder)
    if name in HUB and not Path(name).is_dir():
        return from_files(*hub_files(name))
    return from_files(*folder_files(Path(name)))


def from_files(config_file: Path, weights_file: Path) -> GPT2:
    """Build the model from its two files. Raises `UserError` if it is not a GPT-2."""
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
    """Convert Hugging Face's `config.json` to our configuration. Raises `UserError` for anything
    but a plain GPT-2."""
    raw: Any = storage.read_json(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file} is not a JSON object, so not the config.json of a GPT-2")
    for key, value in EXPECTED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{file}: {key} is {raw[key]!r}, but GPT-2's is {value!r}")
    for key in FOREIGN:
        if raw.get(key):
            raise UserError(f"{file}: {key} is {raw[key]!r}, which a plain GPT-2 does not have")
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if type(raw.get(key)) is not int or raw[key] < 1:
            raise UserError(f"{file}: {key} is missing or not a positive integer")
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
        raise UserError(f"{file}: n_ctx is {raw['n_ctx']}, but n_positions is {config.block_size}")
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{file}: n_inner is {raw['n_inner']}, but GPT-2's is 4 x n_embd")
    return config


def convert(weights: dict[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """Convert Hugging Face's tensors to our names and shapes, in float32.

    Raises `UserError` if a tensor is missing, unknown, duplicated or has the wrong shape, or if the
    head differs from the embedding.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        buffer = _BUFFER.fullmatch(name)
        if name == HEAD or (buffer and int(buffer[1]) < config.n_layer):
            continue
        if tensor.dtype not in FLOATS or (name.endswith(_CONV1D) and tensor.dim() != 2):
            shape = tuple(tensor.shape)
            raise UserError(f"{name} has shape {shape} and {tensor.dtype}: not a GPT-2 weight")
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        if name in ours:
            raise UserError(f"it contains {name} twice, with and without the prefix transformer.")
        ours[name] = tensor.t() if name.endswith(_CONV1D) else tensor
    _tie(ours, weights.get(HEAD))
    found = {name: tensor.shape for name, tensor in ours.items()}
    check_shapes(found, expected_shapes(GPT2, config, found))
    ours = {name: tensor.float().contiguous() for name, tensor in ours.items()}
    # The tied weight has two names. Return both, so that neither stays on the meta device.
    return {**ours, HEAD: ours[EMBEDDING]}


def _tie(ours: dict[str, Tensor], head: Tensor | None) -> None:
    """Use the head as the embedding if a file stores the tied weight only under the head's name.
    Raises `UserError` if head and embedding differ."""
    if head is None:
        return
    if EMBEDDING not in ours and head.dtype in FLOATS:
        ours[EMBEDDING] = head
    embedding = ours.get(EMBEDDING)
    if embedding is None or embedding.shape != head.shape or not _same(embedding, head):
        raise UserError(
            f"{HEAD} differs from {EMBEDDING}: this model has a separate head, but GPT-2's head is "
            "tied to its embedding"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same shape are equal, counting nan as equal to nan."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def hub_files(name: str) -> tuple[Path, Path]:
    """config.json and model.safetensors of a model on the hub, downloaded if necessary."""
    config, weights = (
        hub.download(HUB[name], file, instead="give a folder with " + " and ".join(FILES))
        for file in FILES
    )
    return config, weights


def folder_files(folder: Path) -> tuple[Path, Path]:
    """config.json and model.safetensors in a folder. If one is missing, raises `UserError` that
    names the format found instead and how to convert it."""
    config, weights = (folder / file for file in FILES)
    if not weights.is_file():
        for name, found in OTHER_FORMATS.items():
            if (folder / name).is_file():
                raise UserError(
                    f"{folder} has no {FILES[1]}, but {found}, which is not supported: load it "
                    "with transformers and save it with model.save_pretrained(FOLDER)"
                )
    for file in (config, weights):
        if not file.is_file():
            raise UserError(
                f"{folder} has no {file.name}, which contains a model's {CONTAINS[file.name]}: "
                "give a folder with both files"
            )
    return config, weights


def _read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        if storage.printable(file) == str(file):
            return load_file(file)
        return load(file.read_bytes())  # safetensors cannot open a path that is not UTF-8
    except (OSError, SafetensorError) as error:
        raise UserError(f"it is not a complete safetensors file ({error})") from None

"""GPT-2 weights in Hugging Face's layout: a folder, or a model on the hub.

OpenAI stored linear weights as (in, out), for its `Conv1D`; ours are (out, in), so they are
transposed on the way in.
"""

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
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, not parameters


def from_pretrained(name_or_folder: str | Path) -> GPT2:
    """`gpt2`, `gpt2-medium`, `gpt2-large`, `gpt2-xl` from the hub (or its cache), or a folder with
    `config.json` and `model.safetensors`. Float32, on the CPU, not padded.

    Raises `UserError` if it cannot be had or is no GPT-2.
    """
    config_file, weights_file = _locate(str(name_or_folder))
    config = read_config(config_file)
    weights = convert(_read_weights(weights_file), config)
    model = on_meta(GPT2, config)  # shapes only: the weights come from the file
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(True)


def read_config(file: Path) -> GPT2Config:
    """Hugging Face's `config.json` as ours. Raises `UserError` for anything but a plain GPT-2."""
    raw: Any = storage.read_json(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds no JSON object: it is not the config.json of a GPT-2")
    expected = {"model_type": "gpt2", "activation_function": "gelu_new",
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                "tie_word_embeddings": True, "add_cross_attention": False,
                "layer_norm_epsilon": 1e-5}  # fmt: skip
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise UserError(f"{file}: {key} is {raw[key]!r}, which is not GPT-2's {value!r}")
    for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if type(raw.get(key)) is not int or raw[key] < 1:
            raise UserError(f"{file}: {key} is missing or no positive whole number")
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
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{file}: n_inner is {raw['n_inner']}, GPT-2's is 4 x n_embd")
    return config


def convert(weights: dict[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names and shapes, float32.

    Raises `UserError` if one is missing, unknown or of another shape.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith(_BUFFERS) or name == "lm_head.weight":
            continue
        if tensor.dtype not in FLOATS or (name.endswith(_CONV1D) and tensor.dim() != 2):
            raise UserError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, no weight of ours")
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        tensor = tensor.t() if name.endswith(_CONV1D) else tensor
        ours[name] = tensor
    found = {name: tensor.shape for name, tensor in ours.items()}
    check_shapes(found, expected_shapes(GPT2, config, found))
    ours = {name: tensor.float().contiguous() for name, tensor in ours.items()}
    # The table is one parameter; both of its names are given, so that none stays on `meta`.
    return {**ours, "lm_head.weight": ours["transformer.wte.weight"]}


def _locate(name: str) -> tuple[Path, Path]:
    """The files config.json and model.safetensors of a folder, or of a model of the hub."""
    files = "config.json", "model.safetensors"
    if name in HUB and not Path(name).is_dir():
        instead = "name a folder that holds " + " and ".join(files)
        config, weights = (hub.download(HUB[name], file, instead=instead) for file in files)
        return config, weights
    for file in files:
        if not Path(name, file).is_file():
            raise UserError(f"{name} has no {file} (pickled weights are not read)")
    return Path(name, files[0]), Path(name, files[1])


def _read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error})") from None

"""RUN_OR_MODEL arguments: runs, checkpoints, folders and hub names load, or fail in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rekindle.errors import UserError
from rekindle.loading import load
from rekindle.runtime.device import Device

CPU = Device(torch.device("cpu"), "CPU", "fp32")


@pytest.fixture
def run(tmp_path: Path, train: Callable[..., Any]) -> Path:
    """A run of 8 steps with checkpoints at 4 and at 8."""
    train(tmp_path / "run", "--steps", 8)
    return tmp_path / "run"


def test_run_folder_loads_its_newest_checkpoint(run: Path) -> None:
    newest = run / "checkpoints" / "step-000008"
    by_run, by_checkpoint = load(str(run), CPU), load(str(newest), CPU)
    assert by_run.name == by_checkpoint.name == str(newest)
    assert by_run.run is not None
    assert by_run.run.step == 8
    older = load(str(newest.with_name("step-000004")), CPU)
    assert older.run is not None
    assert older.run.step == 4
    for p, q, r in zip(
        by_run.model.parameters(), by_checkpoint.model.parameters(), older.model.parameters(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(p, q)
        assert not torch.equal(p, r)


def test_loaded_model_is_complete(run: Path) -> None:
    loaded = load(str(run), CPU)
    model = loaded.model
    assert loaded.tokenizer.name == "bytes"
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (257, 384)
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    logits, _ = model(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 257)  # type: ignore


def test_eval_matches_the_validation_loss_logged_in_training(
    run: Path, records: Callable[..., list[dict[str, Any]]], rekindle: Callable[..., Any]
) -> None:
    outcome = rekindle("eval", run, "--device", "cpu", "--precision", "fp32", "--json")
    assert outcome.status == 0, outcome.err
    scored, logged = json.loads(outcome.out)["validation"], records(run, "validation")[-1]
    assert logged["step"] == 8
    assert scored["tokens"] == logged["tokens"] == 300
    assert scored["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert scored["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-6)


def export(folder: Path, vocab_size: int) -> Path:
    """Write a tiny GPT-2 with one block in Hugging Face's layout."""
    C = 8
    shapes = {
        "wte.weight": (vocab_size, C), "wpe.weight": (16, C),
        "ln_f.weight": (C,), "ln_f.bias": (C,),
        "h.0.ln_1.weight": (C,), "h.0.ln_1.bias": (C,),
        "h.0.ln_2.weight": (C,), "h.0.ln_2.bias": (C,),
        "h.0.attn.c_attn.weight": (C, 3 * C), "h.0.attn.c_attn.bias": (3 * C,),
        "h.0.attn.c_proj.weight": (C, C), "h.0.attn.c_proj.bias": (C,),
        "h.0.mlp.c_fc.weight": (C, 4 * C), "h.0.mlp.c_fc.bias": (4 * C,),
        "h.0.mlp.c_proj.weight": (4 * C, C), "h.0.mlp.c_proj.bias": (C,),
    }  # fmt: skip
    folder.mkdir()
    save_file({name: torch.randn(s) for name, s in shapes.items()}, folder / "model.safetensors")
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": C, "n_positions": 16}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    return folder


def test_hugging_face_folder(tmp_path: Path) -> None:
    folder = export(tmp_path / "exported", 50257)
    loaded = load(str(folder), CPU)
    assert (loaded.name, loaded.run, loaded.tokenizer.name) == (str(folder), None, "gpt2")
    assert loaded.model.config.padded_vocab_size == 50257


def test_hugging_face_folder_with_another_vocabulary_is_an_error(tmp_path: Path) -> None:
    folder = export(tmp_path / "exported", 300)
    with pytest.raises(
        UserError, match=r"the embedding of .* has 300 rows, but GPT-2's tokenizer has 50257 ids"
    ):
        load(str(folder), CPU)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("gpt2-mediun", "did you mean gpt2-medium"),
        ("gpt2xl", "did you mean gpt2-xl"),
        ("runs/nothing-like-it", "neither a folder nor one of the models gpt2, gpt2-medium"),
    ],
)
def test_unknown_name_suggests_similar_ones(refuses: Callable[..., str], name: str, near: str):
    error = refuses(["sample", name, "--device", "cpu"], f"{name} is neither a folder", near)
    assert ("did you mean" in error) == ("did you mean" in near)


def test_folder_without_a_checkpoint(refuses: Callable[..., str], tmp_path: Path) -> None:
    refuses(["eval", tmp_path, "--device", "cpu"], str(tmp_path), "is not a run or a checkpoint")
    (tmp_path / "checkpoints").mkdir()
    refuses(["eval", tmp_path, "--device", "cpu"], "has no checkpoint yet")


def test_file_instead_of_a_folder(refuses: Callable[..., str], run: Path) -> None:
    file = run / "checkpoints" / "step-000008" / "model.safetensors"
    refuses(
        ["sample", file, "--device", "cpu"], f"{file} is a file: give its folder, {file.parent}"
    )


@pytest.mark.parametrize("keep", ["all but a byte", "a kilobyte", "nothing"])
def test_truncated_checkpoint(refuses: Callable[..., str], run: Path, keep: str) -> None:
    file = run / "checkpoints" / "step-000008" / "model.safetensors"
    size = {"all but a byte": file.stat().st_size - 1, "a kilobyte": 1024, "nothing": 0}[keep]
    with open(file, "r+b") as opened:
        opened.truncate(size)
    refuses(["sample", run, "--device", "cpu"], str(file), "is damaged")


def test_checkpoint_with_a_flipped_bit(refuses: Callable[..., str], run: Path) -> None:
    file = run / "checkpoints" / "step-000008" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refuses(["sample", run, "--device", "cpu"], str(file), "is damaged")


@pytest.mark.parametrize("content", ["", '{"format": 1, "st', "{}", "[]", '{"format": 99}'])
def test_damaged_description(refuses: Callable[..., str], run: Path, content: str) -> None:
    file = run / "checkpoints" / "step-000008" / "checkpoint.json"
    file.write_text(content)
    refuses(["sample", run, "--device", "cpu"], str(file))


def test_checkpoint_without_weights(refuses: Callable[..., str], run: Path) -> None:
    file = run / "checkpoints" / "step-000008" / "model.safetensors"
    file.unlink()
    refuses(["sample", run, "--device", "cpu"], "model.safetensors cannot be read")


def test_gpt2_from_pretrained_reads_runs_and_folders(run: Path, tmp_path: Path) -> None:
    from rekindle import GPT2

    model, loaded = GPT2.from_pretrained(run), load(str(run), CPU).model
    assert type(model) is GPT2
    assert model.config == loaded.config
    for p, q in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.requires_grad
    older = GPT2.from_pretrained(str(run / "checkpoints" / "step-000004"))
    assert not torch.equal(older.lm_head.weight, model.lm_head.weight)
    folder = export(tmp_path / "exported", 300)  # a vocabulary without a known tokenizer
    assert type(GPT2.from_pretrained(folder)) is GPT2
    assert GPT2.from_pretrained(folder).config.vocab_size == 300


def test_gpt2_from_pretrained_errors_are_one_line(tmp_path: Path) -> None:
    from rekindle import GPT2

    for name, reason in (
        (tmp_path, "is not a run or a checkpoint"),
        (tmp_path / "nothing", "is neither a folder nor one of the models"),
        ("gpt2-mediun", "did you mean gpt2-medium"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            GPT2.from_pretrained(name)
        assert "\n" not in str(caught.value)

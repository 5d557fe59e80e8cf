"""An evaluation that meets nan or inf ends with an error that names the item and the weight."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rekindle.errors import UserError
from rekindle.evaluate.scoring import evaluate, pack
from rekindle.evaluate.tasks import Item
from rekindle.evaluate.tasks.hellaswag import HellaSwag
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.runtime.device import Device
from tests.interop.conftest import describe, export

CPU = Device(torch.device("cpu"), "CPU", "fp32")
CONFIG = GPT2Config(
    n_layer=2, n_head=2, n_embd=16, block_size=48, vocab_size=257, padded_vocab_size=384
)


@pytest.fixture
def model() -> GPT2:
    torch.manual_seed(3)
    return GPT2(CONFIG)


def items() -> list[Item]:
    return [Item([10 + i, 40], [[50 + i, 1], [60 + i], [70 + i, 2, 3], [80 + i]]) for i in range(6)]


@pytest.mark.parametrize(
    ("token", "place"),
    [(14, "item 5"), (52, "item 3, candidate 1"), (81, "item 2, candidate 4")],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_non_finite_loss_is_an_error(model: GPT2, token: int, place: str, value: float) -> None:
    """One item holds an id with a non-finite embedding: in its context or as a candidate."""
    with torch.no_grad():
        model.transformer.wte.weight[token, 3] = value
        model.tie()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num(0, 0, 0))
        if token > 20:  # only the head is affected, for that target
            model.lm_head.weight[token] = value
    (packed,) = pack([(HellaSwag(), items())], 48, CPU)
    with pytest.raises(UserError, match=f"HellaSwag: .*{place}|HellaSwag: .*item 1") as caught:
        evaluate(model, packed, CPU)
    assert "transformer.wte.weight is" in str(caught.value)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_rank_raises_the_same_error(
    model: GPT2, on_ranks: Callable[..., list[Any]], ranks: int
) -> None:
    """Even if only one rank meets it, so that no rank waits for another."""
    with torch.no_grad():
        model.transformer.wpe.weight[1, 0] = math.nan

    def work(world: Any) -> str:
        (packed,) = pack([(HellaSwag(), items())], 48, CPU, world)
        with pytest.raises(UserError) as caught:
            evaluate(model, packed, CPU)
        return str(caught.value)

    messages = on_ranks(ranks, work)
    assert len(set(messages)) == 1
    assert "transformer.wpe.weight is nan at [1, 0]" in messages[0]


def test_finite_weights_are_not_blamed(model: GPT2) -> None:
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(3e38)
        model.lm_head.weight.mul_(1000)
    (packed,) = pack([(HellaSwag(), items())], 48, CPU)
    with pytest.raises(UserError, match="every weight is finite"):
        evaluate(model, packed, CPU)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"ctx": f"The lamp number {i} is", "endings": ["lit.", "out.", "blue.", "old."], "label": 1}
        for i in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    """`exported(name, place, value)`: a GPT-2 in Hugging Face's layout with one number changed."""

    def make(name: str, place: tuple[int, ...], value: float) -> Path:
        torch.manual_seed(0)
        model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=4, block_size=64))
        with torch.no_grad():
            model.get_parameter(name)[place] = value
        path = tmp_path / "exported"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(describe(model)))
        save_file(export(model), path / "model.safetensors")
        return path

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("transformer.h.0.mlp.c_fc.weight", (0, 0), math.nan),
        ("transformer.ln_f.weight", (3,), math.inf),
        ("transformer.wte.weight", (50256, 1), -math.inf),
    ],
)
def test_hellaswag_of_a_model_with_non_finite_weights(
    exported: Callable[..., Path], questions: Path, refuses: Callable[..., str], precision: str,
    name: str, place: tuple[int, ...], value: float,
) -> None:  # fmt: skip
    model = exported(name, place, value)
    flags = ["--device", "cpu", "--precision", precision, "--json", "--hellaswag", questions]
    refuses(["eval", model, *flags], "HellaSwag", f"{name} is {value} at {list(place)}")


@pytest.fixture
def run(tmp_path: Path, train: Callable[..., Any]) -> Path:
    train(tmp_path / "run", "--steps", 1)
    return tmp_path / "run"


def corrupt(run: Path, name: str, value: float) -> None:
    """Change one number in a run's checkpoint and update its hashes."""
    from rekindle import storage
    from rekindle.checkpoint import format

    saved = run / "checkpoints" / "step-000001"
    weights = load_file(saved / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, saved / "model.safetensors")
    description = storage.read_json(saved / "checkpoint.json")
    description.pop("sha256")
    file = saved / "model.safetensors"
    entry = {"bytes": file.stat().st_size, "sha256": storage.file_sha256(file)}
    description["files"]["model.safetensors"] = entry
    sha256 = format.description_sha256(description)
    storage.write_json(saved / "checkpoint.json", {**description, "sha256": sha256})


@pytest.mark.parametrize("json_flag", [["--json"], []])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformer.h.1.attn.c_proj.bias", math.nan),
        ("transformer.ln_f.weight", math.inf),
        ("transformer.wpe.weight", math.nan),
    ],
)
def test_validation_loss_of_a_run_with_non_finite_weights(
    run: Path, rekindle: Callable[..., Any], name: str, value: float, json_flag: list[str]
) -> None:
    corrupt(run, name, value)
    outcome = rekindle("eval", run, "--device", "cpu", *json_flag)
    assert outcome.status == 2
    assert "validation loss" in outcome.err
    assert f"{name} is {value}" in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_bits_per_byte_of_a_text_without_bytes_is_null(
    run: Path, tmp_path: Path, rekindle: Callable[..., Any], tokens: int
) -> None:
    """An end-of-text token stands for no byte, but its loss is finite."""
    import numpy as np

    from rekindle.data.shards import Manifest, write_shard
    from rekindle.data.tokenizer import ByteTokenizer

    folder = tmp_path / "empty"
    folder.mkdir()
    ids = np.full(9, ByteTokenizer.end_of_text, np.uint16)
    entries = tuple(write_shard(folder / f"{s}.bin", [ids], s, 9) for s in ("train", "val"))
    Manifest(ByteTokenizer.name, ByteTokenizer.sha256, 257, {}, entries).write(folder)
    flags = ["--device", "cpu", "--data", folder, "--tokens", tokens]
    outcome = rekindle("eval", run, *flags, "--json")
    assert outcome.status == 0, outcome.err

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    values = json.loads(outcome.out, parse_constant=fail)["validation"]
    assert values["bits_per_byte"] is None
    assert math.isfinite(values["loss"])
    assert "nan" not in rekindle("eval", run, *flags).out


@pytest.mark.parametrize("moved", ["removed", "renamed", "a file"])
def test_eval_of_a_run_whose_data_was_moved(
    tmp_path: Path, train: Callable[..., Any], write_shards: Callable[..., Any],
    refuses: Callable[..., str], moved: str,
) -> None:  # fmt: skip
    import shutil

    data = tmp_path / "data"
    write_shards(data, [700], [201])
    train(tmp_path / "run", "--steps", 1, data=data)
    data.rename(tmp_path / "elsewhere")
    if moved == "removed":
        shutil.rmtree(tmp_path / "elsewhere")
    if moved == "a file":
        data.write_text("")
    refuses(["eval", tmp_path / "run", "--device", "cpu"], str(data), "give --data DIR")


@pytest.mark.parametrize("flags", [("--steps", 1), ("--steps", 3), ("--optim.eps", 1e-30)])
def test_training_never_logs_a_score_computed_from_nan(
    tmp_path: Path, command: Callable[..., list[str]], rekindle: Callable[..., Any],
    records: Callable[..., Any], questions: Path, flags: tuple[Any, ...], one_thread: None,
) -> None:  # fmt: skip
    """After the first step, all losses are non-finite."""
    huge = ["--optim.lr", 1e30, "--schedule.warmup", 0, "--eval-every", 1, "--hellaswag", questions]
    context = ["--model.block-size", 64]
    outcome = rekindle(*command(tmp_path / "run"), *context, *huge, *flags)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "HellaSwag: the loss of item 1, candidate 1 is nan" in outcome.err
    assert [r["step"] for r in records(tmp_path / "run", "hellaswag")] == [0]  # before it

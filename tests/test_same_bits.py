"""The comparison of two versions finds a single changed bit, and ignores renamed fields."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.same_bits import FailedError, differences, read_run

Change = Callable[[dict[str, Any]], Any]


def older() -> dict[str, Any]:
    """The contents of a run folder, with the first version's names."""
    return {
        "log": [
            {"kind": "train", "step": 0, "loss": 5.5, "lr": 0.1, "norm": 2.0, "accepted": True},
            {"kind": "train", "step": 1, "loss": 9.5, "lr": 0.2, "norm": 3.0, "accepted": False},
            {"kind": "return", "step": 0, "next_batch": 2},
            {"kind": "validation", "step": 4, "loss": 5.25, "bits_per_byte": 7.5},
            {"kind": "samples", "step": 4, "texts": ["only compared through its weights"]},
        ],
        "model": {"wte": torch.tensor([[0.0, 1.0]])},
        "optimizer": {"exp_avg.wte": torch.tensor([[float("nan"), 2.0]])},
        "checkpoint": {"step": 4, "data_position": {"windows": 32}, "updates": 3},
    }


def write(run: Path, contents: dict[str, Any], step: int = 4) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    lines = (json.dumps(record) + "\n" for record in contents["log"])
    (run / "metrics.jsonl").write_text("".join(lines))
    for file in ("model", "optimizer"):
        save_file(contents[file], folder / f"{file}.safetensors")
    (folder / "checkpoint.json").write_text(json.dumps(contents["checkpoint"]))
    return run


def test_renamed_fields_are_equal(tmp_path: Path) -> None:
    contents = older()
    for record in contents["log"][:2]:
        record |= {"grad_norm": record.pop("norm"), "skipped": not record.pop("accepted")}
    contents["log"][2]["kind"] = "rollback"
    contents["optimizer"]["updates"] = torch.tensor(contents["checkpoint"].pop("updates"))
    before, after = write(tmp_path / "a", older()), write(tmp_path / "b", contents)
    assert list(differences(read_run(before), read_run(after))) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s["log"][0].update(loss=5.5000000000000009), "train 0: loss: 5.5, now 5.5000"),
        (lambda s: s["log"][0].update(lr=0.2), "train 0: lr: 0.1, now 0.2"),
        (lambda s: s["log"][1].update(accepted=True), "train 1: skipped: True, now False"),
        (lambda s: s["log"].pop(1), "records logged: 4, now 3"),
        (lambda s: s["log"].append(s["log"][0]), "records logged: 4, now 5"),
        (lambda s: s["log"][2].update(next_batch=3), "rollback 0: next_batch: 2, now 3"),
        (lambda s: s["log"][3].update(loss=None), "validation 4: loss: 5.25, now None"),
        (lambda s: s["model"]["wte"].mul_(-1), "model: wte: by up to 2"),
        (lambda s: s["model"]["wte"][0, 0].neg_(), "model: wte: by up to 0"),  # now -0.0
        (lambda s: s["optimizer"]["exp_avg.wte"].add_(1), "optimizer: exp_avg.wte: by up to nan"),
        (lambda s: s.update(model={"wte": torch.zeros(2)}), "now torch.float32 (2,)"),
        (lambda s: s.update(model={"other": torch.zeros(2)}), "model: wte: tensor"),
        (lambda s: s["checkpoint"].update(updates=4), "step-000004: updates: 3, now 4"),
        (lambda s: s["checkpoint"]["data_position"].update(windows=8), "data_position: {'win"),
    ],
)  # fmt: skip
def test_difference_is_named(tmp_path: Path, change: Change, expected: str) -> None:
    changed = older()
    change(changed)
    before, after = write(tmp_path / "a", older()), write(tmp_path / "b", changed)
    assert expected in next(differences(read_run(before), read_run(after)))


def test_checkpoint_of_only_one_version_is_a_difference(tmp_path: Path) -> None:
    """Except for the checkpoint saved because of a stop signal, whose step is random."""
    before, after = write(tmp_path / "a", older()), write(tmp_path / "b", older())
    write(tmp_path / "c", older(), step=7)
    (tmp_path / "c/checkpoints/step-000007").rename(after / "checkpoints/step-000007")
    assert list(differences(read_run(before), read_run(after))) == []
    (after / "checkpoints/step-000007").rename(after / "checkpoints/step-000008")
    found = list(differences(read_run(before), read_run(after)))
    assert [name.split(": ")[0] for name in found] == ["step-000008"] * 5


@pytest.mark.parametrize("key", ["loss", "norm"])
def test_unknown_field_is_an_error(tmp_path: Path, key: str) -> None:
    """Otherwise a field that both versions log under an unknown name would not be compared."""
    contents = older()
    contents["log"][0]["renamed"] = contents["log"][0].pop(key)
    with pytest.raises(FailedError, match=r"'renamed'.*: add it to KEYS"):
        read_run(write(tmp_path / "a", contents))

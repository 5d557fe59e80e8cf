"""`verify` accepts every model that `sample` accepts, with any context length, and rejects nan."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def save(folder: Path, **sizes: Any) -> Path:
    """A tiny `transformers` model, random in every tensor, as `save_pretrained` writes it."""
    import transformers

    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{
                "n_layer": 2,
                "n_head": 2,
                "n_embd": 16,
                "n_positions": 64,
                "vocab_size": 97,
                **sizes,
            }
        )
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("length", [1, 2, 3, 9, 31, 63])
def test_context_shorter_than_the_comparison(
    tmp_path: Path, rekindle: Callable[..., Any], length: int
) -> None:
    outcome = rekindle("verify", save(tmp_path / "m", n_positions=length), "--json")
    assert outcome.status == 0, outcome.err
    rows = json.loads(outcome.out)["rows"]
    assert [r["what"] for r in rows if r["what"] != "text"] == ["logits", "loss", "gradients"]
    assert len(rows) == (4 if length > 1 else 3)  # one position has no room for a continuation


def test_context_as_long_as_the_comparison(tmp_path: Path, rekindle: Callable[..., Any]) -> None:
    for length in (64, 65):
        assert rekindle("verify", save(tmp_path / str(length), n_positions=length)).status == 0


@pytest.mark.parametrize("what", ["run", "checkpoint", "checkpoint of another name"])
def test_runs_and_checkpoints_are_verified(
    tmp_path: Path, train: Callable[..., Any], rekindle: Callable[..., Any], what: str
) -> None:
    """257 ids in an embedding of 384 rows: the padding rows count in the loss, but are never
    sampled."""
    train(tmp_path / "run", "--steps", 3)
    name = tmp_path / "run"
    if what != "run":
        name = name / "checkpoints" / "step-000003"
    if what == "checkpoint of another name":
        name = Path(shutil.copytree(name, tmp_path / "mine"))
    outcome = rekindle("verify", name, "--json")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["passed"] is True
    assert len(result["rows"]) == 4
    assert 0 < result["rows"][0]["difference"] < 1e-4


@pytest.mark.parametrize("what", ["bias", "transpose", "embedding"])
def test_run_with_a_wrong_forward_pass_fails(
    tmp_path: Path, train: Callable[..., Any], rekindle: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, what: str,
) -> None:  # fmt: skip
    """`transformers` gets only the weights, so it does not share our wrong forward pass."""
    from rekindle.model import gpt2

    train(tmp_path / "run", "--steps", 1)
    forward = gpt2.CausalSelfAttention.forward

    def wrong(self: gpt2.CausalSelfAttention, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        y = forward(self, x, *rest)
        if what == "bias":
            return y - self.c_proj.bias + 0.01
        return y.flip(-1) if what == "transpose" else y + x

    monkeypatch.setattr(gpt2.CausalSelfAttention, "forward", wrong)
    outcome = rekindle("verify", tmp_path / "run")
    assert outcome.status == 1, outcome.err
    assert "NOT the same function" in outcome.out


@pytest.mark.parametrize("name", ["GPT2", "gpt2-small", "openai-community/gpt2-large"])
def test_unknown_name_gets_a_suggestion(refuses: Callable[..., str], name: str) -> None:
    assert "did you mean gpt2" in refuses(["verify", name])


def test_folder_named_like_a_hub_model_is_reported(
    tmp_path: Path, rekindle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    outcome = rekindle("verify", "gpt2")
    assert outcome.status == 0, outcome.err
    assert "a model on the hub" in outcome.err


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_separate_head_is_rejected_even_if_the_config_says_tied(
    tmp_path: Path, refuses: Callable[..., str], factor: float
) -> None:
    """`transformers` loads such a model with the head from the file."""
    path = save(tmp_path / "m", tie_word_embeddings=False)
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * factor
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    for tied in (True, None):
        changed = {**config, "tie_word_embeddings": tied}
        (path / "config.json").write_text(
            json.dumps({k: v for k, v in changed.items() if v is not None})
        )
        refuses(["verify", path], "lm_head.weight differs from", "tied")


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("transformer.h.0.mlp.c_fc.weight", (0, 0), float("nan")),
        ("transformer.wte.weight", (96, 15), float("inf")),
        ("transformer.ln_f.bias", (3,), float("-inf")),
        ("transformer.h.1.attn.c_attn.weight", (1, 40), float("nan")),
    ],
)
def test_weights_that_are_not_finite_are_reported(
    tmp_path: Path, refuses: Callable[..., str], name: str, index: tuple[int, ...], value: float
) -> None:
    from safetensors.torch import load_file, save_file

    path = save(tmp_path / "m")
    weights = load_file(path / "model.safetensors")
    weights[name][index] = value
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    refuses(["verify", path, "--json"], f"{name} is {value}")


def test_non_finite_differences_are_null_in_json() -> None:
    from rekindle.interop.verify import Report, Row

    report = Report("x", (Row("logits", float("nan"), 1e-4, ""), Row("loss", 0.5, 1e-4, "")))
    described = report.as_dict()
    assert json.loads(json.dumps(described, allow_nan=False))["rows"][0]["difference"] is None
    assert described["rows"][1]["difference"] == 0.5
    assert described["passed"] is False


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["gpt2", "--random-weights", "--layers", 0], "--layers must be from 1 to 12, but is 0"),
        (["gpt2", "--random-weights", "--layers", -1], "--layers must be from 1 to 12, but is -1"),
        (["gpt2-xl", "--random-weights", "--layers", 49], "from 1 to 48, but is 49"),
        (["gpt2", "--layers", 0], "--layers needs --random-weights"),
    ],
)
def test_layers_are_checked(refuses: Callable[..., str], flags: list[Any], words: str) -> None:
    refuses(["verify", *flags], words)


def test_folder_with_a_non_utf8_name(tmp_path: Path, rekindle: Callable[..., Any]) -> None:
    path = save(tmp_path / "m").rename(tmp_path / os.fsdecode(b"m\xe9"))
    outcome = rekindle("verify", path, "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["model"].endswith("m\\xe9")


@pytest.mark.parametrize(
    "generation_config",
    [{"repetition_penalty": 9.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": [*range(90)]}],
)
def test_generation_config_of_a_folder_is_ignored(
    tmp_path: Path, rekindle: Callable[..., Any], generation_config: dict[str, Any]
) -> None:
    """Greedy text is compared regardless of it."""
    path = save(tmp_path / "m")
    (path / "generation_config.json").write_text(json.dumps(generation_config))
    outcome = rekindle("verify", path)
    assert outcome.status == 0, outcome.out


@pytest.mark.parametrize("scale", [1.0, 30.0, -30.0])
def test_padding_rows_count_in_the_loss_and_are_not_sampled(scale: float) -> None:
    """Even if they have a high probability."""
    from rekindle.interop.verify import _compare, _copy_to_theirs
    from rekindle.model.gpt2 import GPT2
    from rekindle.model.gpt2_config import GPT2Config

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 40}
    model = GPT2(GPT2Config(**sizes, vocab_size=90, padded_vocab_size=128))
    with torch.no_grad():
        model.lm_head.weight[90:] *= scale
    rows = _compare(model, _copy_to_theirs(model))
    assert [row.what for row in rows if not row.passed] == []


@pytest.mark.parametrize("factor", [1e30, -1e30, 3e38])
def test_overflowing_weights_are_reported_as_not_comparable(
    tmp_path: Path, refuses: Callable[..., str], factor: float
) -> None:
    from safetensors.torch import load_file, save_file

    path = save(tmp_path / "m")
    weights = load_file(path / "model.safetensors")
    weights["transformer.h.0.mlp.c_proj.bias"][0] = factor
    weights["transformer.ln_f.weight"][:] = 3e38
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    refuses(["verify", path], "every weight is finite")

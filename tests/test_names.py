"""Resolving model names: a local folder, then a model on the hub; ambiguous names get a note."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle import GPT2
from rekindle.errors import UserError
from rekindle.interop import huggingface
from rekindle.loading import load
from rekindle.model.gpt2_config import GPT2Config
from rekindle.runtime.device import Device

CPU = Device(torch.device("cpu"), "CPU", "fp32")
SAMPLE = ["--device", "cpu", "--prompt", "ab", "--tokens", 3, "--num", 1, "--json"]


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any]) -> Path:
    """A current directory with a run of two steps in it, called `mine`."""
    train(tmp_path / "mine", "--steps", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-xl"])
def test_local_run_takes_precedence_over_a_hub_model(
    cwd: Path, rekindle: Callable[..., Any], name: str
) -> None:
    (cwd / "mine").rename(cwd / name)
    for command in (["sample", name, *SAMPLE], ["eval", name, "--device", "cpu", "--json"]):
        outcome = rekindle(*command)
        assert outcome.status == 0, outcome.err
        assert json.loads(outcome.out)["model"] == str(Path(name, "checkpoints", "step-000002"))
        assert outcome.err.count("\n") == 1  # stdout is JSON, so the note goes to stderr
        assert f"{name} is the run {cwd / name} and a model on the hub" in outcome.err


@pytest.mark.parametrize("name", ["gpt2", "gpt2-large"])
def test_local_checkpoint_takes_precedence_over_a_hub_model(cwd: Path, name: str) -> None:
    shutil.copytree(cwd / "mine" / "checkpoints" / "step-000002", cwd / name)
    loaded = load(name, CPU)
    assert loaded.run is not None
    assert f"{name} is the checkpoint {cwd / name} and a model on the hub" in loaded.note
    with pytest.warns(UserWarning, match=f"{name} is the checkpoint .* a model on the hub"):
        GPT2.from_pretrained(name)


def test_folder_that_is_not_a_model_does_not_hide_the_hub_model(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, a folder with notes that has the same name."""
    (cwd / "gpt2").mkdir()
    (cwd / "gpt2" / "notes.txt").write_text("")
    requests = []

    def download(repo: str, file: str, **_: Any) -> Path:
        requests.append((repo, file))
        raise UserError("no network")

    monkeypatch.setattr(huggingface.hub, "download", download)
    with pytest.raises(UserError, match="no network"):
        load("gpt2", CPU)
    assert requests == [("openai-community/gpt2", "config.json")]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "run.json"])
def test_incomplete_model_folder_is_not_replaced_by_the_hub_model(cwd: Path, file: str) -> None:
    """A folder with some of a model's files is used, not silently replaced by the hub's model."""
    (cwd / "gpt2").mkdir()
    (cwd / "gpt2" / file).write_text("{}")
    with pytest.raises(UserError) as caught:
        load("gpt2", CPU)
    assert "gpt2 " in str(caught.value) or "gpt2/" in str(caught.value)
    assert "pickled" not in str(caught.value) or "bin" in file


@pytest.mark.parametrize("inside", ["", "checkpoints/step-000002"], ids=["run", "checkpoint"])
def test_run_takes_precedence_over_an_export_in_its_folder(cwd: Path, inside: str) -> None:
    from tests.test_load import export

    made = export(cwd / "exported", 300)
    shutil.copy(made / "config.json", cwd / "mine" / inside)
    loaded = load(str(Path("mine") / inside), CPU)
    assert loaded.run is not None
    assert loaded.run.step == 2
    assert "config.json" in loaded.note


def test_unambiguous_name_has_no_note(cwd: Path) -> None:
    assert load("mine", CPU).note == ""
    assert load("mine/checkpoints/step-000002", CPU).note == ""


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GPT2", "gpt2"), ("gpt2-small", "gpt2"), ("openai-community/gpt2", "gpt2"),
        ("openai/gpt2", "gpt2"), ("gpt2-124M", "gpt2"), ("gpt-2", "gpt2"), ("Gpt2_Small", "gpt2"),
        ("gpt2-base", "gpt2"), ("openai-community/gpt2-xl", "gpt2-xl"), ("GPT2-XL", "gpt2-xl"),
        ("GPT2-LARGE", "gpt2-large"), ("gpt2-355M", "gpt2-medium"), ("gpt2-774m", "gpt2-large"),
        ("gpt2-1.5B", "gpt2-xl"), ("gpt2-1558m", "gpt2-xl"), ("gpt2large", "gpt2-large"),
        ("https://huggingface.co/openai-community/gpt2", "gpt2"),
    ],
)  # fmt: skip
def test_similar_name_is_suggested(name: str, meant: str) -> None:
    for read in (lambda: load(name, CPU), lambda: GPT2.from_pretrained(name)):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("name", ["runs/nothing-like-it", "llama", "distilgpt2", "xl"])
def test_dissimilar_name_gets_no_suggestion(name: str) -> None:
    with pytest.raises(UserError, match="neither a folder nor one of the models") as caught:
        load(name, CPU)
    assert "did you mean" not in str(caught.value)


def test_file_error_suggests_its_folder(cwd: Path) -> None:
    file = Path("mine", "checkpoints", "step-000002", "model.safetensors")
    with pytest.raises(UserError, match=f"{file} is a file: give its folder, {file.parent}"):
        load(str(file), CPU)


@pytest.mark.parametrize("changed", [{"vocab_size": 257}, {"n_head": 5}, {"n_head": 7}])
def test_sizes_that_contradict_each_other(changed: dict[str, int]) -> None:
    """The embedding is padded for the vocabulary, and the heads must divide the width."""
    if "n_head" in changed:
        with pytest.raises(UserError, match="not a multiple of n_head"):
            GPT2Config(**changed)
        return
    assert GPT2Config(**changed).padded_vocab_size == 257


def test_checkpoint_copied_without_its_optimizer_is_reported(
    cwd: Path, refuses: Callable[..., str]
) -> None:
    copied = cwd / "weights"
    shutil.copytree(cwd / "mine" / "checkpoints" / "step-000002", copied)
    (copied / "optimizer.safetensors").unlink()
    missing = "optimizer.safetensors does not exist"
    error = refuses(["sample", "weights", "--device", "cpu"], missing)
    assert "copy" in error
    assert "sets this one aside" not in error


@pytest.mark.parametrize("called", [b"r\xe9sultat", b"\xff", b"a\xc3"])
def test_non_utf8_name_is_printed_readably(
    tmp_path: Path, rekindle: Callable[..., Any], called: bytes
) -> None:
    """Python keeps such bytes as lone surrogates, which would make the JSON invalid."""
    from rekindle import storage
    from tests.test_load import export

    folder = export(tmp_path / "exported", 50257).rename(tmp_path / os.fsdecode(called))
    outcome = rekindle("sample", folder, *SAMPLE)
    assert outcome.status == 0, outcome.err
    assert storage.parse_json(outcome.out.encode())["model"] == storage.printable(folder)

"""What a name stands for: a folder here, then a model of the hub; where two fit, it is said."""

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
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any]) -> Path:
    """A current directory with a run of two steps in it, called `mine`."""
    train(tmp_path / "mine", "--steps", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-xl"])
def test_a_run_here_goes_before_a_model_of_the_hub(
    here: Path, rekindle: Callable[..., Any], name: str
) -> None:
    (here / "mine").rename(here / name)
    for command in (["sample", name, *SAMPLE], ["eval", name, "--device", "cpu", "--json"]):
        outcome = rekindle(*command)
        assert outcome.status == 0, outcome.err
        assert json.loads(outcome.out)["model"] == str(Path(name, "checkpoints", "step-000002"))
        assert outcome.err.count("\n") == 1  # stdout is JSON, so it is said here
        assert f"{name} is the run {here / name} and a model of the hub" in outcome.err


@pytest.mark.parametrize("name", ["gpt2", "gpt2-large"])
def test_so_does_a_checkpoint(here: Path, name: str) -> None:
    shutil.copytree(here / "mine" / "checkpoints" / "step-000002", here / name)
    loaded = load(name, CPU)
    assert loaded.run is not None
    assert f"{name} is the checkpoint {here / name} and a model of the hub" in loaded.note
    with pytest.warns(UserWarning, match=f"{name} is the checkpoint .* a model of the hub"):
        GPT2.from_pretrained(name)


def test_a_folder_that_is_no_model_does_not_hide_the_hubs(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where somebody keeps notes under that name."""
    (here / "gpt2").mkdir()
    (here / "gpt2" / "notes.txt").write_text("")
    asked = []

    def download(repo: str, file: str, **_: Any) -> Path:
        asked.append((repo, file))
        raise UserError("no network")

    monkeypatch.setattr(huggingface.hub, "download", download)
    with pytest.raises(UserError, match="no network"):
        load("gpt2", CPU)
    assert asked == [("openai-community/gpt2", "config.json")]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "run.json"])
def test_half_a_model_does(here: Path, file: str) -> None:
    """What begins as one is meant, and is not replaced by another in silence."""
    (here / "gpt2").mkdir()
    (here / "gpt2" / file).write_text("{}")
    with pytest.raises(UserError) as caught:
        load("gpt2", CPU)
    assert "gpt2 " in str(caught.value) or "gpt2/" in str(caught.value)
    assert "pickled" not in str(caught.value) or "bin" in file


@pytest.mark.parametrize("inside", ["", "checkpoints/step-000002"], ids=["run", "checkpoint"])
def test_a_run_with_an_export_in_its_folder_is_the_run(here: Path, inside: str) -> None:
    from tests.test_load import export

    made = export(here / "exported", 300)
    shutil.copy(made / "config.json", here / "mine" / inside)
    loaded = load(str(Path("mine") / inside), CPU)
    assert loaded.run is not None
    assert loaded.run.step == 2
    assert "config.json" in loaded.note


def test_where_one_fits_nothing_is_said(here: Path) -> None:
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
def test_a_near_miss_gets_the_name_that_was_meant(name: str, meant: str) -> None:
    for read in (lambda: load(name, CPU), lambda: GPT2.from_pretrained(name)):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("name", ["runs/nothing-like-it", "llama", "distilgpt2", "xl"])
def test_what_is_not_near_gets_no_hint(name: str) -> None:
    with pytest.raises(UserError, match="no folder and none of the models") as caught:
        load(name, CPU)
    assert "did you mean" not in str(caught.value)


def test_a_file_gets_the_folder_it_is_in(here: Path) -> None:
    file = Path("mine", "checkpoints", "step-000002", "model.safetensors")
    with pytest.raises(UserError, match=f"{file} is a file: name the folder {file.parent}"):
        load(str(file), CPU)


@pytest.mark.parametrize("changed", [{"vocab_size": 257}, {"n_head": 5}, {"n_head": 7}])
def test_sizes_that_contradict_each_other(changed: dict[str, int]) -> None:
    """A configuration has the rows that its ids ask for, and heads that divide its width."""
    if "n_head" in changed:
        with pytest.raises(UserError, match="not a multiple of n_head"):
            GPT2Config(**changed)
        return
    assert GPT2Config(**changed).padded_vocab_size == 257


def test_a_checkpoint_copied_without_its_optimizer_says_so(
    here: Path, refuses: Callable[..., str]
) -> None:
    copied = here / "weights"
    shutil.copytree(here / "mine" / "checkpoints" / "step-000002", copied)
    (copied / "optimizer.safetensors").unlink()
    error = refuses(["sample", "weights", "--device", "cpu"], "optimizer.safetensors is not there")
    assert "copy" in error
    assert "sets this one aside" not in error


@pytest.mark.parametrize("called", [b"r\xe9sultat", b"\xff", b"a\xc3"])
def test_a_name_that_is_no_utf8_stays_readable(
    tmp_path: Path, rekindle: Callable[..., Any], called: bytes
) -> None:
    """Python's own way to keep such bytes is no text: nothing could read the JSON."""
    from rekindle import storage
    from tests.test_load import export

    folder = export(tmp_path / "exported", 50257).rename(tmp_path / os.fsdecode(called))
    outcome = rekindle("sample", folder, *SAMPLE)
    assert outcome.status == 0, outcome.err
    assert storage.parse_json(outcome.out.encode())["model"] == storage.spelled(folder)

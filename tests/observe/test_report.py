"""The picture of a run's loss curve."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle import storage
from rekindle.storage import JsonLines


@pytest.fixture
def run(tmp_path: Path, tiny: Any) -> Path:
    """A run folder with only a log and a description."""
    from rekindle.recipes import flatten

    folder = tmp_path / "run"
    folder.mkdir()
    storage.write_json(folder / "run.json", {"recipe": flatten(tiny)})
    log = JsonLines(folder / "metrics.jsonl")
    for step in range(5):
        log.append({"kind": "train", "step": step, "loss": 5.0 - step})
    log.append({"kind": "train", "step": 5, "loss": None})  # not finite
    log.append({"kind": "validation", "step": 5, "loss": 1.25})
    log.append({"kind": "validation", "step": 6, "loss": None})
    log.close()
    return folder


def test_report_draws_a_picture(rekindle: Callable, run: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = rekindle("report", run)
    assert outcome.status == 0
    assert outcome.out == f"wrote {run / 'loss.png'}\n"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_picture_shows_the_run(rekindle: Callable, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):  # keep text as text
        assert rekindle("report", run, "--picture", tmp_path / "loss.svg").status == 0
    picture = (tmp_path / "loss.svg").read_text()
    for words in ("1.250", "demo: 2 layers, 16 wide", "optimizer steps", "validation"):
        assert words in picture


def test_nothing_to_draw(refuses: Callable, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    refuses(["report", tmp_path / "nowhere"], "has no metrics.jsonl")
    (run / "metrics.jsonl").write_text("")
    refuses(["report", run], "has not completed a step yet")


def test_without_matplotlib_the_error_says_how_to_install_it(
    refuses: Callable, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refuses(["report", run], "pip install 'rekindle[plot]'")


@pytest.mark.parametrize("name", ["x.xyz", "loss", "curve.png.bak", "metrics.jsonl", "x."])
def test_unsupported_picture_format_is_rejected(
    refuses: Callable, run: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("matplotlib")
    refuses(["report", run, "--picture", run / name], str(run / name), ".png, .svg or .pdf")


@pytest.mark.parametrize("name", ["pictures", "loss.png", "run"])
def test_folder_as_picture_is_rejected(
    refuses: Callable, run: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / name).mkdir(exist_ok=True)
    refuses(["report", run, "--picture", tmp_path / name], f"{tmp_path / name} is a folder")


@pytest.mark.parametrize("name", ["loss.PNG", "loss.svg", "loss.pdf"])
def test_picture_is_written_to_the_given_name(
    rekindle: Callable, run: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("matplotlib")
    before = set(tmp_path.rglob("*"))
    assert rekindle("report", run, "--picture", tmp_path / name).status == 0
    assert set(tmp_path.rglob("*")) - before == {tmp_path / name}

"""The launcher's environment variables must be complete, and waiting for ranks has a timeout."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle.errors import UserError
from rekindle.runtime.distributed import World, get_world

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COMPLETE = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "9",
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], World]:
    def call(variables: dict[str, str]) -> World:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return get_world()

    return call


def test_all_launcher_variables_or_none(launched: Callable) -> None:
    assert launched({}) == World()
    assert launched({"MASTER_ADDR": "host", "MASTER_PORT": "29500"}) == World()  # set by a cluster
    assert launched(COMPLETE) == World(rank=1, size=2, local_rank=1)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert launched(alone) == World()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, ""])
def test_missing_or_empty_variable_is_named(
    launched: Callable, name: str, value: str | None
) -> None:
    variables = {k: v for k, v in COMPLETE.items() if k != name} | (
        {name: value} if value == "" else {}
    )
    with pytest.raises(UserError, match=f"{name} is {'empty' if value == '' else 'missing'}: "):
        launched(variables)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "2"}, "RANK 2 and LOCAL_RANK 1 must be below WORLD_SIZE 2"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK 5 must be below"),
        ({"WORLD_SIZE": "0"}, "must be below WORLD_SIZE 0"),
        ({"RANK": "-1"}, "RANK is '-1', which is not a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"MASTER_PORT": "29x"}, "MASTER_PORT is '29x'"),
    ],
)
def test_invalid_variable_is_named(launched: Callable, change: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        launched({**COMPLETE, **change})


def test_leftover_variable_of_another_launcher_is_an_error(
    rekindle: Callable, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LOCAL_RANK alone would make it the second process on its machine, which verifies no data."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    outcome = rekindle(*command(tmp_path / "run"))
    assert outcome.status == 2
    assert "RANK is missing" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        number = listening.getsockname()[1]
    return number


def start(
    python: Callable, command: Callable, out: Path, monkeypatch: pytest.MonkeyPatch, rank: int,
    port: int,
) -> Any:  # fmt: skip
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    return python("-m", "rekindle", *command(out), "--timeout", 3)


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "waited 3 s for all 2 ranks to connect: 1 did not come;"),
        pytest.param(
            1, "could not reach rank 0 at MASTER_ADDR 127.0.0.1, MASTER_PORT",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_missing_rank_is_an_error_after_the_timeout(
    python: Callable, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    port: int, rank: int, words: str,
) -> None:  # fmt: skip
    done = start(python, command, tmp_path / "run", monkeypatch, rank, port)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


def test_port_in_use_is_named(
    python: Callable, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        number = listening.getsockname()[1]
        done = start(python, command, tmp_path / "run", monkeypatch, 0, number)
    assert done.returncode == 2, done.stderr
    assert f"MASTER_PORT {number} (" in done.stderr
    assert "give all ranks another MASTER_PORT" in done.stderr

"""If a rank dies, hangs or is cut off, the others stop waiting and name it."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from rekindle.errors import UserError
from rekindle.runtime.distributed import rendezvous
from tests.distributed.conftest import FLAGS, End, notes_by_rank, notes_of, same_bits, saved

Ranks = Callable[..., End]
HASTE = ("--timeout", 3)


@pytest.mark.parametrize("flags", [(), ("--shard",)], ids=["parallel", "sharded"])
def test_torchrun_restarts_when_a_rank_dies(
    tmp_path: Path, ranks: Ranks, uninterrupted: Callable[..., Path],
    records: Callable[..., list[dict[str, Any]]], flags: tuple[str, ...],
) -> None:  # fmt: skip
    """First rank 1 after the first checkpoint, then rank 0, which writes the checkpoints."""
    out = tmp_path / "run"
    end = ranks(
        2, out, {"rank": 1, "step": 6, "do": "die", "after": "step-000004"},
        {"rank": 0, "step": 9, "do": "die", "after": "step-000008", "life": 1},
        torchrun=["--max-restarts", "2"], flags=flags,
    )  # fmt: skip
    assert end.status == 0, end.err
    assert "Traceback" not in end.err
    steps = [(note["life"], note["step"]) for note in notes_by_rank(out)[0]]
    expected = [range(6), range(4, 9), range(8, 12)]
    assert steps == [(life, step) for life, steps in enumerate(expected) for step in steps]
    for line in end.errors:
        assert "lost the connection to another rank" in line
        assert line.endswith("the same command resumes from the newest checkpoint")
    assert same_bits(out, uninterrupted(2, *flags))
    kinds = ("train", "validation", "samples")
    assert records(out, *kinds) == records(uninterrupted(2, *flags), *kinds)


ASLEEP = {"rank": 1, "seconds": 600}


@pytest.mark.parametrize(
    ("fault", "flags", "message"),
    [
        (
            {"rank": 1, "step": 6, "do": "freeze"}, (),
            "rank 1 does not respond (last at the data of step 6)",
        ),
        pytest.param(
            {"step": 6, "do": "sleep_in_batch", **ASLEEP}, (),
            "rank 1 is stuck at the data of step 6", marks=pytest.mark.slow,
        ),
        pytest.param(
            {"step": 8, "do": "sleep_in_save", **ASLEEP}, ("--shard",),
            "rank 1 is stuck at the checkpoint of step 8", marks=pytest.mark.slow,
        ),
    ],
    ids=["frozen", "asleep", "asleep while a checkpoint is gathered"],
)  # fmt: skip
def test_hanging_rank_is_named(
    tmp_path: Path, ranks: Ranks, uninterrupted: Callable[..., Path], fault: dict[str, Any],
    flags: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    # Only SIGKILL ends a hanging rank, and torchrun would wait 30 s before sending it.
    end = ranks(2, out, fault, flags=(*HASTE, *flags), patience=1)
    [line] = end.errors
    assert line.startswith("rekindle: error (rank 0): waited ")
    assert line.endswith(
        f" s for the other ranks: {message}; the same command resumes from the newest checkpoint"
    )
    assert "failed (exitcode: 3) local_rank: 0" in end.err
    assert end.seconds < 60
    assert saved(out) == ["step-000004"]
    assert ranks(2, out).status == 0
    assert same_bits(out, uninterrupted(2, *flags))


def test_a_rank_that_does_not_come_is_named() -> None:
    """In the first generation of ranks, and in one that finds keys of the previous generation."""
    store = HashStore()
    for others in ({0: "a"}, {0: "a", 1: "b"}):
        for rank, token in others.items():
            store.set(f"rekindle/{rank}", token)
        with pytest.raises(
            UserError, match=r"waited 0 s for all 3 ranks to connect: (0, )?1 did not"
        ):
            rendezvous(store, 2, 3, 0.2)


def test_ranks_with_different_folders_are_rejected(tmp_path: Path, ranks: Ranks) -> None:
    """As when a host does not share the folder with the others."""
    assert ranks(1, tmp_path / "run-0").status == 0
    (tmp_path / "run-1").mkdir()
    end = ranks(2, tmp_path / "run-{rank}")
    advice = "; use a folder that all hosts share"
    assert sorted(end.errors) == [
        f"rekindle: error (rank {rank}): the ranks disagree: on this rank the step of the newest "
        f"complete checkpoint is {mine}, on another {other}{advice}"
        for rank, mine, other in ((0, 12, 0), (1, 0, 12))
    ], end.err
    assert not list((tmp_path / "run-1").iterdir())


def test_ranks_with_different_recipes_are_rejected(tmp_path: Path, ranks: Ranks) -> None:
    """Or different data or flags: each rank alone could train, but their average is useless."""
    end = ranks(2, tmp_path / "run", flags=("--seed", "{rank}"))
    assert len(end.errors) == 2, end.err
    for line in end.errors:
        assert "the ranks disagree: on this rank the checksum of recipe, data and flags" in line
        assert line.endswith("; give every rank the same command, and data that was prepared once")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # 10 s, most of them waiting
def test_disconnected_host_is_named(
    tmp_path: Path, fork_server: Callable[..., list[End]], command: Callable[[Path], list[str]],
    two_networks: tuple[str, str], uninterrupted: Callable[..., Path],
) -> None:  # fmt: skip
    """Two connected hosts: when the link is down, both end in time; when it is up, they resume."""
    out = tmp_path / "run"

    def train(*faults: dict[str, Any]) -> list[End]:
        rank = [json.dumps(faults), str(notes_of(out)), *command(out), *FLAGS, "--timeout", "3"]
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "10.77.0.1"]
        return fork_server(
            [
                {"torchrun": [*options, "--node-rank", str(n)], "rank": rank, "network": network}
                for n, network in enumerate(two_networks)
            ],
            limit=60,
        )

    ends = train({"rank": 1, "step": 6, "do": "shell", "command": "ip link set eth0 down"})
    expected = ("rank 1 does not respond", "rank 0's host cannot be reached")
    for end, words in zip(ends, expected, strict=True):
        [line] = end.errors
        assert words in line
        assert line.endswith("the same command resumes from the newest checkpoint")
        assert "failed (exitcode: 3)" in end.err
        assert end.seconds < 60
    assert saved(out) == ["step-000004"]
    subprocess.run(["ip", "-n", two_networks[1], "link", "set", "eth0", "up"], check=True)
    assert [end.status for end in train()] == [0, 0]
    assert same_bits(out, uninterrupted(2))


@pytest.fixture
def two_networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces, each with an eth0: 10.77.0.1 and 10.77.0.2."""
    a, b = names = tuple(f"rekindle-{os.getpid()}-{n}" for n in (1, 2))
    commands = [f"netns add {a}", f"netns add {b}"]
    commands += [f"link add eth0 netns {a} type veth peer name eth0 netns {b}"]
    for n, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{n}/24 dev eth0"]
        commands += [f"-n {name} link set {device} up" for device in ("lo", "eth0")]
    try:
        for text in commands:
            try:
                subprocess.run(["ip", *text.split()], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", "") or str(error)
                pytest.skip(f"no network namespaces here: ip {text}: {reason.strip()}")
        yield a, b
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

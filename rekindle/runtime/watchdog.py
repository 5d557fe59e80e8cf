"""Ends the run with an error that names the rank which hangs, instead of waiting for it forever.

Every rank regularly posts its location in the program to torchrun's store. A rank that has waited
too long for the others reads their posts, names the ranks that are not waiting, and exits. torchrun
then ends the other ranks, and restarts all of them if `--max-restarts` allows it.
"""

import os
import sys
import threading
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rekindle.runtime.distributed import World, reason

STATUS = 3  # exit status of a rank that gives up waiting
TICK = 2.0  # seconds between two posts
SILENT = 5  # a rank that has not posted for this many ticks is gone: process, host or network


class Watchdog:
    """A thread that checks how long this rank has been waiting for the others."""

    def __init__(self, world: World, limit: float, generation: str) -> None:
        """`limit`: seconds that a rank may wait for the others; 0: no limit. `generation`: the
        name that `distributed.connect` returned."""
        self._world, self._limit, self._generation = world, limit, generation
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if world.size > 1 and limit:
            # A second connection to the store that the ranks used for their rendezvous.
            self._store = TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                timeout=timedelta(seconds=30), wait_for_workers=False,
            )  # fmt: skip
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._done.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        location, beat = self._world.location, 0
        tick = min(TICK, self._limit / 4)
        while not self._done.wait(tick if beat else 0):
            beat += 1
            try:
                self._store.set(self._key(self._world.rank), f"{beat} {location.now()}")
                if location.waited() > self._limit:
                    self._give_up(tick)
            except RuntimeError as error:  # from the store: its host is gone, or the run is over
                if location.waited() > self._limit:
                    self._end(f"rank 0's host cannot be reached ({reason(error)})")

    def _give_up(self, tick: float) -> None:
        # Over a broken network, a request to the store never returns.
        late = threading.Timer(2 * SILENT * tick, self._end, ["rank 0's host cannot be reached"])
        late.daemon = True
        late.start()
        try:
            before = self._posts()
            if self._done.wait(SILENT * tick) or self._world.location.waited() < self._limit:
                return  # the other ranks arrived after all
            culprits = self._culprits(before, self._posts())
        finally:
            late.cancel()
        self._end(" and ".join(culprits) or "all ranks are waiting, so their network is broken")

    def _culprits(self, before: dict[int, str], now: dict[int, str]) -> list[str]:
        """The ranks that are not waiting, with what their posts say about them."""
        culprits = []
        for rank, post in now.items():
            beat, _, where = post.partition(" ")
            if not beat:
                culprits.append(f"rank {rank} never reported")
            elif rank != self._world.rank and post == before[rank]:
                culprits.append(f"rank {rank} does not respond (last at {where})")
            elif not where.startswith("waiting"):
                culprits.append(f"rank {rank} is stuck at {where}")
        return culprits

    def _posts(self) -> dict[int, str]:
        """The latest post of every rank; empty if there is none."""
        posts = {}
        for rank in range(self._world.size):
            posted = self._store.check([self._key(rank)])
            posts[rank] = self._store.get(self._key(rank)).decode() if posted else ""
        return posts

    def _key(self, rank: int) -> str:
        return f"{self._generation}/location/{rank}"

    def _end(self, what: str) -> None:
        waited = self._world.location.waited()
        print(
            f"rekindle: error (rank {self._world.rank}): waited {waited:.0f} s for "
            f"the other ranks: {what}; the same command resumes from the newest checkpoint\n",
            end="", file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(STATUS)

"""When ranks wait for one that does not come, one of them says which, and ends.

Every rank posts where it stands to the store that torchrun keeps. A rank that has waited too long
for the others reads what they posted, names those that are not waiting, and exits; torchrun then
ends the rest, and begins anew if it was told to (`--max-restarts`).
"""

import os
import sys
import threading
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rekindle.runtime.distributed import World, reason

STATUS = 3  # exit status of a rank that gives up waiting
TICK = 2.0  # seconds between two posts
SILENT = 5  # ticks without a post: the process, its host or the network is gone


class Watchdog:
    """A thread that watches how long this rank has been waiting for the others."""

    def __init__(self, world: World, limit: float, life: str) -> None:
        """`limit`: seconds that a rank may wait for the others; 0: for ever. `life`: the name that
        `distributed.connect` gave to this life of the ranks."""
        self._world, self._limit, self._life = world, limit, life
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if world.size > 1 and limit:
            # One more connection to the store through which the ranks have met.
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
            except RuntimeError as error:  # of the store: its host is gone, or the run is over
                if location.waited() > self._limit:
                    self._end(f"rank 0's host cannot be reached ({reason(error)})")

    def _give_up(self, tick: float) -> None:
        # Asked over a broken network, the store never answers.
        late = threading.Timer(2 * SILENT * tick, self._end, ["rank 0's host cannot be reached"])
        late.daemon = True
        late.start()
        try:
            before = self._posts()
            if self._done.wait(SILENT * tick) or self._world.location.waited() < self._limit:
                return  # it came after all
            culprits = self._culprits(before, self._posts())
        finally:
            late.cancel()
        self._end(" and ".join(culprits) or "every rank waits: the network between them is broken")

    def _culprits(self, before: dict[int, str], now: dict[int, str]) -> list[str]:
        """Which ranks do not wait as they should, by what they posted."""
        culprits = []
        for rank, post in now.items():
            beat, _, where = post.partition(" ")
            if not beat:
                culprits.append(f"rank {rank} has never been heard of")
            elif rank != self._world.rank and post == before[rank]:
                culprits.append(f"rank {rank} is gone (last at {where})")
            elif not where.startswith("waiting"):
                culprits.append(f"rank {rank} stands still at {where}")
        return culprits

    def _posts(self) -> dict[int, str]:
        """What every rank posted last; empty for one that never did."""
        posts = {}
        for rank in range(self._world.size):
            there = self._store.check([self._key(rank)])
            posts[rank] = self._store.get(self._key(rank)).decode() if there else ""
        return posts

    def _key(self, rank: int) -> str:
        return f"{self._life}/stands/{rank}"

    def _end(self, what: str) -> None:
        waited = self._world.location.waited()
        print(
            f"rekindle: error (rank {self._world.rank}): waited {waited:.0f} s for "
            f"the other ranks: {what}; the same command resumes from the newest checkpoint\n",
            end="", file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(STATUS)

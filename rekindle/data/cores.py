"""How many threads to use for encoding and checking data."""

import os


def usable_cores() -> int:
    """The number of cores this process may use; in a container, often fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

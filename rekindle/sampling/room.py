"""Checks that the requested texts fit into memory."""

import os
from pathlib import Path

import torch

from rekindle.errors import UserError
from rekindle.model import LanguageModel

# float32 copies of one step's logits that `sampling.draw` holds at once. Without top-k, there are
# also the probabilities of all ids, the random numbers and their quotient.
COPIES, COPIES_OF_ALL = 2, 5


def bytes_for(model: LanguageModel, num: int, length: int, top_k: int) -> int:
    """Bytes for `num` texts of `length` tokens: the ids, one step's logits, keys and values."""
    c = model.config
    size = min(p.element_size() for p in model.parameters())  # 2 where the weights are bf16
    embedding = next(n for n, role in model.parameter_roles().items() if role == "embedding")
    width = dict(model.named_parameters())[embedding].shape[-1]
    cache = 2 * c.n_layer * width * length * size
    logits = c.padded_vocab_size * (size + 4 * (COPIES if top_k else COPIES_OF_ALL))
    return num * (cache + logits + 8 * length)


def check_room(model: LanguageModel, num: int, length: int, top_k: int) -> None:
    """Raise `UserError` if `num` texts of `length` tokens do not fit into the free memory of the
    model's device. Does nothing if the free memory is unknown."""
    device = next(iter(model.parameters())).device
    free, needed = _free(device), bytes_for(model, num, length, top_k)
    if free is not None and needed > free:
        fits = free // bytes_for(model, 1, length, top_k)
        raise UserError(
            f"--num {num} texts of {length} tokens need {needed / 2**30:,.1f} GiB of memory, but "
            f"{free / 2**30:,.1f} GiB are free: lower --num to {max(1, fits):,}, or --tokens"
        )


def _free(device: torch.device) -> int | None:
    """Free bytes of `device`; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    return min(_of_machine(), _of_container()) if device.type == "cpu" else None


def _of_machine() -> int:
    """Linux's MemAvailable, or else all physical memory; 2^63 if neither is known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        if hasattr(os, "sysconf"):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return 2**63


def _of_container(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a container may still allocate (cgroup v2), counting cached files as free; 2^63 if
    there is no limit."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
        cached = stat.get("active_file", 0) + stat.get("inactive_file", 0)
        return max(0, limit - used + cached)
    except (OSError, ValueError):  # no cgroup, or the limit is "max"
        return 2**63

"""How many rows a device takes at once, and whether to recompute activations.

The global batch never changes, only how it is divided.
"""

import torch

from rekindle.errors import UserError
from rekindle.model import LanguageModel, ModelConfig
from rekindle.runtime.device import Device, memory_of
from rekindle.runtime.distributed import World
from rekindle.runtime.sharding import is_sharded

MOST_ROWS = 64  # the lecture's; more gives less than 1 % on an H200
FEW_ROWS = 4  # with fewer, kernels are too small to fill a GPU, and recomputing costs less
# The largest part of a micro-batch are its logits in float32. More than this gains nothing on a CPU
# (benchmarks/LOG.md), and all that comes with it is some ten times as much.
CPU_LOGITS_BYTES, GPU_LOGITS_BYTES = 2**30, 2 * 2**30
CPU_LOGITS_SHARE = 1 / 16  # of the machine's memory


def must_recompute(
    model: LanguageModel, T: int, device: Device, world: World, *, compiled: bool
) -> bool:
    """Whether too few rows fit into any rank's GPU unless activations are recomputed. A sharded
    model is not measured: for it they are recomputed if somebody says so."""
    if device.torch.type != "cuda" or is_sharded(model):
        return False
    return world.min(_rows_in_gpu_memory(model, T, device, compiled), device.torch) < FEW_ROWS


def choose_micro_batch(
    model: LanguageModel, rows: int, T: int, device: Device, world: World, *, compiled: bool
) -> int:
    """Rows per forward pass: the most that fit and that divide the batch evenly over the ranks.
    `compiled`: whether the model will be.

    Raises `UserError` if the batch does not divide, if not even one row fits, or if the model is
    sharded over GPUs: a rank that runs out of memory would leave the others waiting.
    """
    if rows % world.size:
        raise UserError(f"a batch of {rows} rows does not divide over {world.size} ranks")
    if device.torch.type == "cuda" and is_sharded(model):
        raise UserError("with --shard nobody measures how many rows fit: give --micro-batch")
    if device.torch.type == "cuda":
        fits = min(MOST_ROWS, _rows_in_gpu_memory(model, T, device, compiled))
    else:
        fits = rows_for(model.config, T, device)
    fits = world.min(fits, device.torch)
    if not fits:
        raise UserError(
            f"the {device.name} has no memory for one row of {T} tokens: use a smaller model or "
            "--batch.length"
        )
    share = rows // world.size
    return next(n for n in range(min(fits, share), 0, -1) if share % n == 0)


def rows_for(config: ModelConfig, T: int, device: Device) -> int:
    """A safe number of rows without measuring: by the size of their logits."""
    budget = GPU_LOGITS_BYTES
    if device.torch.type == "cpu":
        budget = min(CPU_LOGITS_BYTES, int(CPU_LOGITS_SHARE * memory_of(device.torch)))
    return max(1, min(MOST_ROWS, budget // (T * config.padded_vocab_size * 4)))


def _rows_in_gpu_memory(model: LanguageModel, T: int, device: Device, compiled: bool) -> int:
    """Measure the memory of one and of two rows, and reckon how many fit; 0: not even one.

    Runs uncompiled. For a model that will be compiled, head and loss are counted instead: eager,
    they keep the logits in float32 several times; compiled, once and once their gradient, in the
    type of the matmuls (`benchmarks.traffic`). That eager blocks keep half as much again is a
    margin (benchmarks/LOG.md). The optimizer's state is there already.
    """
    counted = 2 * T * model.config.padded_vocab_size * device.product_dtype.itemsize  # a row
    peaks = []
    for rows in (1, 2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device.torch)
        idx = torch.zeros(rows, T, dtype=torch.long, device=device.torch)
        try:
            with device.autocast():
                loss = model.body(idx).float().mean() if compiled else model.forward(idx, idx)[1]
            assert loss is not None
            loss.backward()
        except torch.OutOfMemoryError:
            return rows - 1
        finally:
            for p in model.parameters():
                p.grad = None
        peak = torch.cuda.max_memory_allocated(device.torch)
        peaks.append(peak + rows * counted if compiled else peak)
    _, total = torch.cuda.mem_get_info(device.torch)
    room = 0.9 * total - peaks[0]
    return 1 + max(0, int(room / max(1, peaks[1] - peaks[0])))

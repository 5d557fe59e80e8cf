"""How a run computes: the user's choices (`MachineOptions`) and the final settings (`Machine`).

A recipe defines what to compute, a machine how. Another machine gives the same result up to
rounding; the same machine gives the same bits. torch is imported only inside the functions.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rekindle.errors import UserError
from rekindle.flags import flag

if TYPE_CHECKING:
    from rekindle.runtime.device import Device
    from rekindle.runtime.distributed import World

KERNELS = ("none", "loss", "all")
SAME_MEMORY = 0.05  # relative difference in memory up to which two machines count as the same


DEVICE = "auto, cpu, cuda or mps"
PRECISION = "auto, autocast (matmuls in bf16), bf16 (the residual stream too), tf32 or fp32"


@dataclass(frozen=True)
class MachineOptions:
    """The user's choices. None: as the run was started, or else the best for this machine."""

    device: str | None = flag(None, f"{DEVICE} (default: auto)", "NAME")
    precision: str | None = flag(None, f"{PRECISION} (default: auto)", "NAME")
    compile: bool | None = flag(None, "torch.compile the model (default: yes, where possible)")
    kernels: str | None = flag(
        None,
        "use Triton kernels for head and loss (loss), or for the MLP too (all, on a Hopper GPU); "
        "needs autocast or bf16 on an NVIDIA GPU (default: loss for bf16 on Hopper GPUs unless "
        "sharded, else none)",
        "NAME",
        choices=KERNELS,
    )
    fp8_head: bool | None = flag(
        None,
        "compute the head's matmuls in FP8 while training; needs the modern model and an NVIDIA "
        "Hopper GPU or newer; not measured yet (default: no)",
    )
    recompute: bool | None = flag(
        None,
        "keep only each block's input for the backward pass (activation checkpointing): less "
        "memory, but slower (default: only if few rows fit without it)",
    )
    deterministic: bool | None = flag(
        None,
        "bitwise reproducible results on a GPU, at some cost in speed; a CPU is always "
        "deterministic (default: no)",
    )
    shard: bool | None = flag(
        None,
        "shard weights, gradients and optimizer state over the ranks, for a model too large for "
        "one GPU; not compiled, and needs --micro-batch on a GPU (default: no)",
    )
    micro_batch: int | None = flag(
        None, "rows per forward pass on each rank (default: chosen to fit the device)"
    )
    threads: int | None = flag(None, "CPU threads (default: PyTorch's, one per core)")

    def __post_init__(self) -> None:
        for name in ("micro_batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, but is {value}")
        if self.kernels not in (None, *KERNELS):
            raise UserError(f"--kernels must be none, loss or all, not {self.kernels!r}")


@dataclass(frozen=True)
class Machine:
    """The final settings, recorded in every checkpoint. All ranks have the same ones, except for
    the device's name and memory, `threads` and `keep_memory`."""

    device: str  # cpu, cuda or mps
    precision: str
    compile: bool
    kernels: str  # one of KERNELS
    deterministic: bool
    shard: bool  # no effect with one rank
    threads: int = field(metadata={"schema": range(1, 4096)})  # CPU threads
    recompute: bool | None = None  # None until `trainer.build` decides
    micro_batch: int | None = field(  # None until `trainer.build` decides
        default=None, metadata={"schema": (None, range(1, 2**31))}
    )
    fp8_head: bool = False
    keep_memory: bool = True  # on a CPU, reuse freed memory instead of returning it to the system
    name: str = ""  # human-readable name of the device
    memory: int = 0  # memory of the device in bytes; 0: unknown

    def agreed(self) -> dict[str, Any]:
        """The settings that must be the same on every rank."""
        own = ("name", "memory", "threads", "keep_memory")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in own}

    def open(self, local_rank: int = 0) -> "Device":
        """The device, after setting up this process: threads, matmul precision, deterministic
        algorithms and the CPU's memory allocator."""
        import torch

        from rekindle.runtime import device as devices

        torch.set_num_threads(self.threads)
        device = devices.get_device(self.device, self.precision, local_rank)
        devices.make_deterministic(device, on_gpu=self.deterministic)
        if self.keep_memory:
            devices.keep_freed_memory(device)
        return device


def resolve(
    options: MachineOptions | None = None,
    recorded: Machine | None = None,
    world: "World | None" = None,
    *,
    rows: int | None = None,
) -> Machine:
    """Combine the user's options, the settings recorded in the run's checkpoint, and the defaults.

    A recorded setting is kept if this device supports it. The micro-batch size, recomputation and
    the number of threads depend on memory and cores, so they are kept only if the device has the
    same memory (and enough cores); the micro-batch size must also divide a global batch of `rows`
    rows. Raises `UserError` if an option is not available on this machine.
    """
    import torch

    from rekindle.data.cores import usable_cores
    from rekindle.model import fp8
    from rekindle.runtime import device as devices

    options = options or MachineOptions()
    rank, ranks = (world.local_rank, world.size) if world else (0, 1)
    device = devices.get_device(options.device or "auto", "auto", rank)
    kind, memory = device.torch.type, devices.memory_of(device.torch)
    same = recorded is not None and _same_device(recorded, kind, memory)

    def decide(name: str, default: Any, *, can: bool = True) -> Any:
        """The user's choice, else the recorded setting if it `can` be used here, else `default`."""
        value = getattr(options, name)
        if value is None and recorded is not None and can:
            value = getattr(recorded, name)
        return default if value is None else value

    usable = recorded is not None and devices.can_use(recorded.precision, device.torch)
    device = devices.get_device(kind, decide("precision", "auto", can=usable), rank)
    shard = decide("shard", False)
    why = "it is sharded" if shard and ranks > 1 else devices.why_not_compile(device.torch)
    no_fp8 = fp8.why_not(device.torch)
    if options.fp8_head and no_fp8:
        raise UserError(f"--fp8-head: {no_fp8}; leave it out")
    micro_batch = recorded.micro_batch if recorded else None
    divides = bool(micro_batch) and not (rows and rows % (micro_batch * ranks))
    fewer_cores = recorded is not None and recorded.threads > usable_cores()
    return Machine(
        device=kind,
        precision=device.precision,
        compile=decide("compile", True) and not why,
        kernels=_kernels(device, options.kernels, recorded and recorded.kernels, shard),
        fp8_head=decide("fp8_head", False) and not no_fp8,
        deterministic=decide("deterministic", False),
        shard=shard,
        threads=decide("threads", torch.get_num_threads(), can=same and not fewer_cores),
        recompute=decide("recompute", None if kind == "cuda" else False, can=same),
        micro_batch=decide("micro_batch", None, can=same and divides),
        name="CPU" if kind == "cpu" else device.name,
        memory=memory,
    )


def _kernels(device: "Device", wanted: str | None, recorded: str | None, shard: bool) -> str:
    """The kernels to use: those `wanted`, else the recorded ones, as far as the device runs them,
    else those that made steps of GPT-2 124M faster on an H200 (benchmarks/README.md)."""
    from rekindle.model import kernels

    no_kernels = kernels.why_not(device.torch, device.product_dtype)
    no_mlp = no_kernels or kernels.why_not_mlp(device.torch)
    if reason := {"loss": no_kernels, "all": no_mlp}.get(wanted or "none"):
        instead = "none" if no_kernels else "loss"
        raise UserError(f"--kernels {wanted}: {reason}; use --kernels {instead}")
    if no_kernels:
        return "none"
    is_measured = device.precision == "bf16" and kernels.is_hopper(device.torch) and not shard
    chosen = wanted or recorded or ("loss" if is_measured else "none")
    return "loss" if chosen == "all" and no_mlp else chosen


def _same_device(recorded: Machine, kind: str, memory: int) -> bool:
    """Whether this device is of the recorded kind with the same memory. Checkpoints from version
    0.1 may not record these; they are then assumed to match."""
    if recorded.device not in ("", kind):
        return False
    return not recorded.memory or abs(memory / recorded.memory - 1) < SAME_MEMORY


def changes(recorded: Machine, now: Machine, options: MachineOptions) -> str:
    """One line that lists settings which differ from the recorded ones without the user having
    asked for it; empty if there are none."""
    found = [
        f"{name.replace('_', '-')} {getattr(now, name)} instead of {before}"
        for name in (item.name for item in dataclasses.fields(MachineOptions))
        if getattr(options, name) is None
        and (before := getattr(recorded, name)) not in (None, "")
        and before != getattr(now, name)
    ]
    return ", ".join(found).replace("True", "yes").replace("False", "no")

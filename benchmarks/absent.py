"""A simulated GPU: Triton and Inductor compile for it on a machine without one.

Triton can compile for any card, and Inductor generates kernels from shapes alone. Both only query
the card's properties: its architecture, its number of SMs, its shared memory.
"""

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class Card:
    """The properties of a GPU that a compiler queries. Sources: NVIDIA's data sheets, and the table
    of compute capabilities in the CUDA C++ programming guide."""

    name: str
    capability: int  # 90 is sm_90
    sms: int
    sm_threads: int  # at most, resident on an SM
    block_shared: int  # bytes of shared memory, at most, that a block can use
    sm_shared: int  # bytes of shared memory on an SM
    memory_gib: int
    l2_mib: int


CARDS = {
    "sm_80": Card("NVIDIA A100", 80, 108, 2048, 166_912, 167_936, 80, 40),
    "sm_89": Card("NVIDIA GeForce RTX 4090", 89, 128, 1536, 101_376, 102_400, 24, 72),
    "sm_90": Card("NVIDIA H200", 90, 132, 2048, 232_448, 233_472, 139, 60),
}


def pretend_to_triton(card: Card) -> None:
    """Make Triton compile for this card. Kernels cannot be launched."""
    # Imported by name, because Triton is not installed on every system that is type-checked.
    runtime: Any = importlib.import_module("triton.runtime")
    compiler: Any = importlib.import_module("triton.backends.compiler")
    target = compiler.GPUTarget("cuda", card.capability, 32)
    properties = {
        "max_shared_mem": card.block_shared,
        "multiprocessor_count": card.sms,
        "warpSize": 32,
        "max_num_regs": 65_536,
    }
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: card.capability,  # Triton caches a target per device number
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_stream=lambda device=None: 0,
        get_device_interface=lambda: torch.cuda,
        map_python_to_cpp_type=lambda name: name,
        get_benchmarker=lambda: lambda *_, **__: [1.0],
        is_active=lambda: True,
        utils=SimpleNamespace(get_device_properties=lambda device=None: properties),
    )
    runtime.driver.set_active(driver)


def pretend_to_torch(card: Card) -> None:
    """Make Inductor generate kernels for this card, until the process ends. Kernels cannot be
    launched, and tensors on the card have no memory: use `FakeTensorMode`."""
    pretend_to_triton(card)
    torch._C._ensureCUDADeviceGuardSet()  # before CUDA is reported as available
    properties = _properties(card)
    capability = divmod(card.capability, 10)
    cuda_functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device=None: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: card.name,
        "get_rng_state": lambda device=None: torch.zeros(1),
        "set_rng_state": lambda state, device=None: None,
    }
    for name, function in cuda_functions.items():
        setattr(torch.cuda, name, function)
    interface: Any = importlib.import_module("torch._dynamo.device_interface").CudaInterface
    interface_functions: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "set_device": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
        "get_compute_capability": lambda device=None: card.capability,
        "get_raw_stream": lambda device=None: 0,
    }
    for name, function in interface_functions.items():
        setattr(interface, name, staticmethod(function))
    interface.Worker.get_device_properties = staticmethod(lambda device=None: properties)
    interface.Worker.current_device = staticmethod(lambda: 0)
    importlib.import_module("torch.utils._triton").has_triton.cache_clear()


def _properties(card: Card) -> SimpleNamespace:
    """The fields of `torch.cuda.get_device_properties` that the compilers read."""
    major, minor = divmod(card.capability, 10)
    return SimpleNamespace(
        name=card.name,
        major=major,
        minor=minor,
        total_memory=card.memory_gib << 30,
        multi_processor_count=card.sms,
        max_threads_per_multi_processor=card.sm_threads,
        max_threads_per_block=1024,
        warp_size=32,
        regs_per_multiprocessor=65_536,
        L2_cache_size=card.l2_mib << 20,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=card.block_shared,
        shared_memory_per_multiprocessor=card.sm_shared,
        gcnArchName="",
    )

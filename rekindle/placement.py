"""Putting a model on its machine: device, sharding, micro-batch size, compilation, DDP."""

import dataclasses
import logging
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from rekindle.errors import UserError
from rekindle.machine import Machine
from rekindle.model import LanguageModel, fp8
from rekindle.model.compute import Compute, Forward
from rekindle.runtime import distributed
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World
from rekindle.runtime.micro_batch import choose_micro_batch, must_recompute
from rekindle.runtime.sharding import is_sharded, shard


def move(model: LanguageModel, machine: Machine, device: Device, world: World) -> None:
    """To the device, whole or sharded: from the CPU, as a GPU may not have room for all of it."""
    if machine.shard and world.size > 1:
        shard(model, device.torch, world)
    else:
        cast(nn.Module, model).to(device.torch)


def data_parallel(model: LanguageModel, compiled: Forward, device: Device, world: World) -> Forward:
    """The compiled model in DDP, if there are several ranks and each holds all of it: a sharded
    model averages its gradients itself."""
    if is_sharded(model):
        return compiled
    return distributed.data_parallel(cast(nn.Module, compiled), world, device.torch)


def fit(
    machine: Machine,
    model: LanguageModel,
    compute: Compute,
    rows: int,
    T: int,
    device: Device,
    world: World,
) -> Machine:
    """The machine with what only its memory decides: recomputation and micro-batch size. Raises
    `UserError` if the model cannot compute as was asked."""
    if compute.fp8_head and (wrong := fp8.unfit(model, T)):
        raise UserError(f"--fp8-head: {wrong}; leave it out")
    recompute = machine.recompute
    if recompute is None:
        recompute = must_recompute(model, T, device, world)
    model.use(dataclasses.replace(compute, recompute=recompute))
    micro_batch = machine.micro_batch or choose_micro_batch(model, rows, T, device, world)
    return dataclasses.replace(machine, recompute=recompute, micro_batch=micro_batch)


def compile_model(
    model: LanguageModel, machine: Machine
) -> tuple[Forward, Callable[..., Tensor] | None]:
    """The model and its body, compiled if the machine says so. They share their parameters with
    `model`, whose names stay clean."""
    if not machine.compile:
        return model, None
    # It warns of a CUDA toolkit without a GPU, which does not matter on a CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return (
        torch.compile(cast(nn.Module, model), fullgraph=True, dynamic=False),
        torch.compile(model.body, fullgraph=True, dynamic=False),
    )

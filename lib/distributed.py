"""The ranks (processes) of a training that torchrun has started.

Without torchrun there is one rank and no process group. All ranks call the collective functions in the same order. If a
rank fails, the others find its connection closed, and their collectives raise an error.
"""

import contextlib
import inspect
import os
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn


class WrongEnvironment(ValueError):
    """torchrun's environment variables are wrong. Each process reports its own, which rank 0 does not know."""


class World(NamedTuple):
    rank: int = 0
    size: int = 1  # number of ranks
    local_rank: int = 0  # among the ranks of this machine
    local_size: int = 1  # number of ranks on this machine


def start() -> World:
    """Starts the process group: gloo for tensors on the CPU, NCCL for those on GPUs. -> this rank

    Raises:
        WrongEnvironment: if torchrun's environment variables are incomplete or contradict each other.
    """
    if "MASTER_ADDR" not in os.environ:  # RANK and the like alone can be from another program
        return World()
    values = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if not all(value and value.isdecimal() for value in values.values()):
        raise WrongEnvironment(f"the environment has MASTER_ADDR={os.environ['MASTER_ADDR']}, but {values}; several "
                               "processes are started by torchrun, for a single one unset MASTER_ADDR")
    world = World(*map(int, values.values()))
    if world.rank >= world.size or world.local_rank >= world.local_size:
        raise WrongEnvironment(f"the environment has {values}; valid ranks are below the number of processes")
    if world.size > 1 and not dist.is_initialized():
        # a group that torchrun has restarted would wait in the old store for keys of its dead predecessors
        store = next(dist.rendezvous("env://"))[0]
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", rank=world.rank, world_size=world.size,
                                store=store)
    return world


def end() -> None:
    """Ends the process group, if there is one. Without this call a failing process may be killed by a signal."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the other ranks may be gone
            dist.destroy_process_group()


def broadcast(value: Any, world: World) -> Any:
    """-> rank 0's value, on every rank. Other ranks' values are ignored."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def barrier(world: World) -> None:
    """Waits for all ranks, by a collective on the CPU: its backend, gloo, notices a rank that has failed."""
    if world.size > 1:
        dist.all_reduce(torch.zeros(1))


def sum_over_ranks(values: torch.Tensor, world: World) -> torch.Tensor:
    """Sums the values over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def average_gradients(net: nn.Module, world: World) -> nn.Module:
    """-> ``net`` wrapped in DDP, which averages the gradients during the backward pass; with one rank ``net`` itself.
    Buffers, such as running statistics, stay each rank's own; see broadcast_buffers."""
    if world.size == 1:
        return net
    ddp = nn.parallel.DistributedDataParallel
    is_renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # since torch 2.15
    no_sync = {"forward_sync_buffers" if is_renamed else "broadcast_buffers": False}
    warnings.filterwarnings("ignore", "Grad strides do not match")  # for 1x1 weights the order in memory is the same
    return ddp(net, gradient_as_bucket_view=True, **no_sync)


def broadcast_buffers(net: nn.Module, world: World) -> None:
    """Gives all ranks the running statistics of rank 0, so that all evaluate the network that rank 0 saves."""
    if world.size > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective failed because another rank has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))

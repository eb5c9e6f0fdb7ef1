"""The ranks (processes) of a training that torchrun has started, and batch norm over all of them.

Without torchrun there is one rank and no process group. All ranks must call the collective functions in the same
order. If a rank fails, the others find its connection closed: over gloo, their collectives then raise an error that
``is_peer_failure`` recognises.
"""

import contextlib
import inspect
import os
import secrets
import time
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn


class World(NamedTuple):
    rank: int = 0
    size: int = 1  # number of ranks
    local_rank: int = 0  # among the ranks of this machine
    local_size: int = 1  # number of ranks on this machine


def read_world() -> World:
    """-> this rank, from torchrun's environment variables. Raises ValueError if these are incomplete or no numbers."""
    if "MASTER_ADDR" not in os.environ:  # RANK and the like alone can be from another program
        return World()
    variables = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    for name, value in variables.items():
        if value is None:
            raise ValueError(f"the environment has MASTER_ADDR={os.environ['MASTER_ADDR']} but no {name}; several "
                             "processes are started by torchrun, for a single one unset MASTER_ADDR")
        if not value.isdecimal():
            raise ValueError(f"the environment has {name}={value}; several processes are started by torchrun")
    return World(*map(int, variables.values()))


def start(world: World) -> None:
    """Starts the process group, if there are several ranks: gloo for tensors on the CPU, NCCL for those on GPUs."""
    if world.size == 1:
        return
    store = next(dist.rendezvous("env://"))[0]
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", rank=world.rank, world_size=world.size,
                            store=dist.PrefixStore(agree_on_prefix(store, world), store))


def agree_on_prefix(store: dist.Store, world: World) -> str:
    """-> a new prefix for the process group's keys, the same on all ranks

    After a restart torchrun's store still has the keys of the previous processes, and a rank that reads those waits for
    a dead process (pytorch #135712). Every key that a rank waits for holds a new random token, so no stale key matches.
    """
    token = secrets.token_hex(8)
    store.set(f"hello {world.rank}", token)
    if world.rank > 0:
        prefix = store.get(f"answer {token}").decode()  # waits until rank 0 has set it
        store.set(f"{prefix} {world.rank}", "seen")
        return prefix
    for rank in range(1, world.size):
        while not store.check([f"{token} {rank}"]):  # its hello may be stale at first: read it again
            store.set(f"answer {store.get(f'hello {rank}').decode()}", token)
            time.sleep(0.01)
    return token


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


def is_peer_failure(error: Exception) -> bool:
    """Whether a collective failed because another rank has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the batch statistics of all ranks, on any device: torch's SyncBatchNorm refuses CPU tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        n = x.numel() // x.shape[1]  # values per channel on this rank
        var, mean = torch.var_mean(x.to(self.weight.dtype), (0, 2, 3), correction=0)
        var, mean = var.double(), mean.double()  # float64: the difference of squares below loses digits
        sums = torch.cat((mean * n, (var + mean.square()) * n, mean.new_tensor([n])))
        total, squares, m = AllReduce.apply(sums).split([self.num_features, self.num_features, 1])
        mean, var = total / m, squares / m - (total / m).square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * m / (m - 1)).to(self.running_var.dtype), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        scale, shift = (v.to(self.weight.dtype)[:, None, None] for v in (scale, shift))  # (C, 1, 1)
        return torch.addcmul(shift, x, scale).to(x.dtype)

    @staticmethod
    def replace_all(net: nn.Module) -> None:
        """Replaces all batch norms, in place. The parameters are new ones, so this comes before the optimizer."""
        for module in [*net.modules()]:
            for name, norm in module.named_children():
                if type(norm) is nn.BatchNorm2d:
                    new = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum).to(norm.weight)
                    new.load_state_dict(norm.state_dict())
                    setattr(module, name, new)


class AllReduce(torch.autograd.Function):
    """The sum over all ranks. All ranks' losses depend on it, so the backward pass sums their gradients, too."""

    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return AllReduce.forward(ctx, grad.contiguous())

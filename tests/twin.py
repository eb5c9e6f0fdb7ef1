"""A stand-in for the CUDA graph on a CPU: it records a step's operations, then replays them without the step's Python.

Like a graph, it keeps every tensor of the recorded step and replays each operation on the same memory. Like a capture,
it refuses an operation that reads a value, and leaves weights, optimizer and random numbers as they were.
"""

from importlib import import_module

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from lib.cuda_graph import GraphedStep

READS = ("_local_scalar_dense", "equal", "nonzero", "item", "is_nonzero")  # on a GPU they synchronise


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors(*values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if torch.is_tensor(value)]


class Tape(TorchDispatchMode):
    """Records operations. ``outside`` has the tensors that they read but did not create."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.made: dict[int, torch.Tensor] = {}  # by storage; kept alive, so that no address is used again
        self.outside: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        read = {storage(tensor): tensor for tensor in tensors(args, kwargs)}
        self.outside |= {key: tensor for key, tensor in read.items() if key not in self.made}
        out = func(*args, **kwargs)
        new = [tensor if storage(tensor) not in read else None for tensor in tensors(out)]
        self.made |= {storage(tensor): tensor for tensor in new if tensor is not None}
        if not func.is_view:
            self.calls.append((func, args, kwargs, new))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, new in self.calls:
            for target, value in zip(new, tensors(func(*args, **kwargs)), strict=True):
                if target is not None:
                    target.copy_(value)


class Twin(GraphedStep):
    """GraphedStep on a CPU, with a Tape in place of the graph."""

    captures = 0

    def on_side_stream(self):
        self.step()

    def capture(self):
        self.captures += 1
        self.optimizer.zero_grad(set_to_none=True)
        before = [(tensor, tensor.detach().clone()) for tensor in self.state()]
        with torch.random.fork_rng([]), Tape() as tape:
            self.step()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        return tape


def allow_capturable(monkeypatch) -> None:
    """Lets Adam and RMSprop run with capturable=True, their step count a tensor, on a CPU as on a GPU."""
    for name in ("torch.optim.adam", "torch.optim.rmsprop"):
        monkeypatch.setattr(import_module(name), "_get_capturable_supported_devices", lambda *_, **__: ["cpu", "cuda"])


def use_twin(monkeypatch) -> None:
    """Trainings in this process use the twin wherever a GPU would use a graph, except if a test has replaced
    train_step, whose Python must then run in every step."""
    train_step = train.train_step

    def uses_graph(args, device, world):
        return world.size == 1 and not args.no_graph and train.train_step is train_step

    allow_capturable(monkeypatch)
    monkeypatch.setattr(train, "GraphedStep", Twin)
    monkeypatch.setattr(train, "uses_graph", uses_graph)

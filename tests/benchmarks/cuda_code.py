#!/usr/bin/env python3
"""Kernels, and bytes read and written, of a training step on CUDA: counted without a GPU.

    tests/benchmarks/cuda_code.py                  BC 100-12, batches of 64, in float32 and bf16
    tests/benchmarks/cuda_code.py --code FILE.py   also writes the code of the functions that torch.compile compiles

Each operation of a step on the CPU, with settings as on a GPU (all images as one tile, our weights in channels_last,
the optimizer on lists of tensors), counts as one kernel, a convolution's gradients as two. It reads and writes each of
its tensors once. The steps have 2 and 4 images, and bytes are extrapolated linearly to the batch size. A function that
``DenseNet.compile_block`` compiles counts as the kernels in the code that Inductor makes for an H100, and their bytes
for the full batch. For that the function is traced on fake tensors with symbolic shapes, as ``compile_block`` compiles
it, and torch is told of a GPU. Takes 3 minutes. Triton must be installed; it comes with PyPI's torch for Linux.
"""

import argparse
import contextlib
import functools
import math
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 0)]
import step

import densenet
from lib.files import new_file

H100 = types.SimpleNamespace(  # as of torch.cuda.get_device_properties
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, gcnArchName="", clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
    uuid="", is_integrated=0, is_multi_gpu_board=0)
ROWS = {  # name: (implementation of step.py, whether the block's functions are compiled)
    "torchvision": ("torchvision", False), "torchvision memory_efficient": ("torchvision memory_efficient", False),
    "ours plain": ("ours plain", False), "ours efficient": ("ours efficient", False), "ours max": ("ours max", False),
    "ours compiled": ("ours efficient", True), "ours compiled max": ("ours max", True)}
codes = {}  # name of a function: the longest code for it


class TritonDriver:
    """Triton's driver for the made-up GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def made_up_gpu():
    """A context in which torch reports an H100."""
    properties, one, zero = lambda device=None: H100, lambda: 1, lambda: 0
    with contextlib.ExitStack() as stack:
        for place, wrap in ((torch.cuda, lambda f: f), (CudaInterface, staticmethod),
                            (CudaInterface.Worker, staticmethod)):
            stack.enter_context(patch.object(place, "get_device_properties", wrap(properties)))
            stack.enter_context(patch.object(place, "current_device", wrap(zero)))
        for place, wrap in ((torch.cuda, lambda f: f), (CudaInterface, staticmethod)):
            stack.enter_context(patch.object(place, "is_available", wrap(lambda: True)))
            stack.enter_context(patch.object(place, "device_count", wrap(one)))
        stack.enter_context(patch.object(CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        stack.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
        yield


@functools.cache
def lowered(function: Callable, signature: tuple) -> tuple[int, int]:
    """-> kernels and bytes of Inductor's CUDA code for the function; ``signature``: its arguments, tensors as (shape,
    strides, dtype)"""
    flags = [a for a in signature if not isinstance(a, tuple)]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    on_cpu = [mode.from_tensor(torch.empty_strided(*a[:2], dtype=a[2]), source=ConstantSource(f"tensor{i}"),
                               symbolic_context=StatelessSymbolicContext([DimDynamic.DUCK] * len(a[0])))
              for i, a in enumerate(a for a in signature if isinstance(a, tuple))]
    with mode, enable_python_dispatcher(), made_up_gpu(), inductor_config.patch(densenet.COMPILE_OPTIONS):
        with patch.object(torch.compiler, "is_compiling", lambda: True):
            traced = make_fx(torch.func.functionalize(lambda *tensors: function(*tensors, *flags)),
                             select_decomp_table())(*on_cpu)
        tensors = [torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cuda:0") for t in on_cpu]
        FakeTensorProp(traced, mode).propagate_dont_convert_inputs(*tensors)
        graph = GraphLowering(traced, example_inputs=tensors, shape_env=mode.shape_env)
        with (tracing(TracingContext(mode)), V.set_graph_handler(graph), V.set_fake_mode(mode),
              V.set_debug_handler(DebugContext())):
            graph.run(*tensors)
            code = graph.codegen()[0].value
            moved = graph.count_bytes()[0]
    codes[function.__name__] = max(codes.get(function.__name__, ""), code, key=len)
    return len(re.findall(r"^ +triton_\w+\.run\(", code, re.MULTILINE)), moved


def size(t: torch.Tensor) -> int:
    """Bytes in memory: an expanded dimension (stride 0) counts once."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)


class Count(TorchDispatchMode):
    """Counts the operations within the context, and what ``compiled`` functions would launch for ``batchSz`` images."""

    def __init__(self, batchSz: int):
        super().__init__()
        self.batchSz, self.paused = batchSz, False
        self.kernels = self.bytes = self.compiled_kernels = self.compiled_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        out = func(*args, **kwargs)
        if self.paused or func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "resize",
                                                           "alias")):
            return out
        written = [kwargs.get(key) for key in ("out", "grad_input")]
        if name.endswith(("copy_", "zero_", "fill_")):
            written.append(args[0])
        read = [] if name in ("zeros_like", "ones_like", "new_zeros") else tree_leaves((args, kwargs))
        tensors = [t for t in read if torch.is_tensor(t) and not any(t is w for w in written)]
        tensors += args[0] if name.startswith("_foreach") and name.endswith("_") else tree_leaves(out)
        twice = name == "convolution_backward" and args[-1][0]  # kernels for input and weight; both read the gradient
        self.kernels += 2 if twice else 1
        self.bytes += sum(size(t) for t in tensors if torch.is_tensor(t)) + (size(args[0]) if twice else 0)
        return out

    def compiled(self, function: Callable) -> Callable:
        def run(*args):
            signature = []
            for a in args:
                if torch.is_tensor(a):
                    shape = (self.batchSz, *a.shape[1:]) if a.dim() == 4 else tuple(a.shape)
                    a = shape, a.stride(), a.dtype
                signature.append(a)
            self.paused = True
            result = function(*args)
            kernels, moved = lowered(function, tuple(signature))
            self.paused = False
            self.compiled_kernels += kernels
            self.compiled_bytes += moved
            return result
        return run


def count(name: str, compiled: bool, precision: str) -> tuple[int, float]:
    """-> kernels, GB of a training step"""
    full, counts = step.SIZES["bc100-64"], []
    functions = vars(densenet.tile_functions(False))
    for batchSz in (2, 4):
        net, train = step.make_step(step.IMPLEMENTATIONS[name], full._replace(batchSz=batchSz), precision,
                                    torch.device("cpu"))
        if name.startswith("ours"):
            net.to(memory_format=torch.channels_last)  # as on a GPU
        train(), train()
        counter = Count(full.batchSz)
        own = types.SimpleNamespace(**{key: counter.compiled(f) for key, f in functions.items() if callable(f)})
        own.compiled = True
        change = patch.object(densenet, "tile_functions", return_value=own) if compiled else contextlib.nullcontext()
        with counter, change:
            train()
        counts.append(counter)
    two, four = counts
    moved = two.bytes + (four.bytes - two.bytes) / 2 * (full.batchSz - 2) + two.compiled_bytes
    return two.kernels + two.compiled_kernels, moved / 1e9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), metavar="NAME", default=tuple(ROWS),
                        help=f"count only these: {', '.join(ROWS)}")
    parser.add_argument("--code", metavar="FILE.py", type=new_file(".py"),
                        help="write Inductor's code of the compiled functions")
    args = parser.parse_args(argv)
    triton.runtime.driver.set_active(TritonDriver())
    print(f"BC 100-12, batch 64, torch {torch.__version__}\n"
          f"{'':32}{'fp32: kernels':>14}{'GB':>7}{'bf16: kernels':>15}{'GB':>7}")
    with (patch.object(densenet, "TILE", 2**62),
          patch.dict(torch.optim.SGD.__init__.__kwdefaults__, foreach=True)):
        for name in args.only:
            (kernels, moved), (kernels16, moved16) = (count(*ROWS[name], precision) for precision in ("fp32", "bf16"))
            print(f"{name:32}{kernels:14,}{moved:7.1f}{kernels16:15,}{moved16:7.1f}", flush=True)
    if args.code:
        args.code.write_text("\n".join(f"# {name}\n{code}" for name, code in codes.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

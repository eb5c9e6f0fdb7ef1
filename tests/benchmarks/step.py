#!/usr/bin/env python3
"""Time, memory and kernels of whole training steps (forward, loss, backward, SGD with Nesterov momentum), side by side.

    tests/benchmarks/step.py --size bc100-64 bc100-256 --json step.jsonl --plot step.png
    tests/benchmarks/step.py --size bc100-64 --precision fp32 --only "ours plain" "ours efficient" --json step.jsonl
    tests/benchmarks/step.py                       on a CPU: a small size, for the ratios alone

torchvision's DenseNet is as shipped, with CIFAR's stem for small images, and in channels_last for bf16. Ours runs
train.py's own step, with images and, on a GPU, weights in channels_last. One implementation is in memory at a time.

--json gets a line as soon as a row has been measured. A row that the file already holds (same size, precision, hardware
and torch) is not measured again. No row begins after --minutes: repeat the command until all rows are there.

Columns: median seconds; images/s; ratio to torchvision's images/s in the same precision; peak memory of a step; on a
GPU launching calls and the kernels that they run, on a CPU aten's outermost operations without views and allocations;
"must move", the bytes of must_move.py; "of copy", the rate of these bytes as a share of the rate at which tensor.copy_
reads and writes. Peak memory is measured after the warm-up, in which libraries try out workspaces; for a graph of ours
it is that of a second capture, for torch.compile's graphs that of all steps.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keeps the profiler's own messages off stderr
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 0)]
import block
import step_plot
from must_move import SIZES, Size, bytes_to_move, classes

import densenet
import train
from lib.cli import Parser, number
from lib.cuda_graph import CaptureFailed, GraphedStep
from lib.device import is_out_of_memory, keep_freed_memory

MIB = 2**20
OUT_OF_MEMORY = "out of memory"
PRECISIONS = ("fp32", "tf32", "bf16")
NO_KERNEL = {f"aten::{name}" for name in (  # views, allocations, queries
    "alias", "as_strided", "chunk", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand", "expand_as",
    "narrow", "new_empty", "new_empty_strided", "permute", "promote_types", "resize_", "select", "slice", "split",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "view_as")}
MAY_COPY = ("aten::contiguous", "aten::flatten", "aten::reshape", "aten::to")  # they call a kernel only for a copy


class Implementation(NamedTuple):
    library: str
    option: bool | str  # memory_efficient or efficient
    graph: bool = False  # torchvision: torch.compile with CUDA graphs; ours: GraphedStep
    compiled: bool = False  # ours: DenseNet.compile_block


IMPLEMENTATIONS = {
    "torchvision": Implementation("torchvision", False),
    "torchvision memory_efficient": Implementation("torchvision", True),
    "torchvision compiled": Implementation("torchvision", False, graph=True),
    "torchvision memory_efficient compiled": Implementation("torchvision", True, graph=True),
    "ours plain": Implementation("ours", False),
    "ours efficient": Implementation("ours", True),
    "ours max": Implementation("ours", "max"),
    "ours plain graph": Implementation("ours", False, graph=True),
    "ours efficient graph": Implementation("ours", True, graph=True),
    "ours compiled graph": Implementation("ours", True, graph=True, compiled=True),
}


# --- steps ------------------------------------------------------------------------------------------------------

def build(implementation: Implementation, size: Size) -> nn.Module:
    library, option, *_ = implementation
    if size.smallInputs:
        return block.build(library, option, 6 * size.layers[0] + 4, size.growthRate)
    if library == "ours":
        return densenet.DenseNet(size.growthRate, blockConfig=size.layers, smallInputs=False, nClasses=classes(size),
                                 efficient=option)
    from torchvision.models import DenseNet
    return DenseNet(size.growthRate, size.layers, 2 * size.growthRate, num_classes=classes(size),
                    memory_efficient=option)


def torchvision_step(net: nn.Module, optimizer: torch.optim.Optimizer, precision: str, images: torch.Tensor,
                     labels: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    with train.autocast(images.device, precision):
        logits = net(images)
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def make_step(implementation: Implementation, size: Size, precision: str,
              device: torch.device) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """-> the network, a function that makes one training step on a batch of random images"""
    torch.manual_seed(0)
    net = build(implementation, size).to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images = torch.randn(size.batchSz, 3, size.imageSize, size.imageSize, device=device)
    labels = torch.randint(classes(size), (size.batchSz,), device=device)
    if implementation.library == "ours":
        images = images.contiguous(memory_format=torch.channels_last)
        if device.type == "cuda":
            net.to(memory_format=torch.channels_last)
        if implementation.compiled:
            with train.autocast(device, precision):
                if not net.compile_block():
                    raise RuntimeError("the block could not be compiled")
        step = functools.partial(train.train_step, net, optimizer, precision)
        if implementation.graph:
            step = GraphedStep(step, net, optimizer, size.batchSz)
        return net, functools.partial(step, images, labels, size.batchSz)
    if precision == "bf16":
        net, images = net.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    if not implementation.graph:
        return net, functools.partial(torchvision_step, net, optimizer, precision, images, labels)
    compiled = torch.compile(net, mode="reduce-overhead")

    def step():
        torch.compiler.cudagraph_mark_step_begin()
        return torchvision_step(compiled, optimizer, precision, images, labels)
    return net, step


# --- measuring --------------------------------------------------------------------------------------------------

def times(step: Callable[[], Any], device: torch.device, steps: int, warmup: int) -> list[float]:
    """-> seconds of each step. On a GPU the steps are not synchronised, as in training."""
    for _ in range(warmup):
        step()
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(marks)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]


def copy_bandwidth(device: torch.device) -> float:
    """-> bytes per second, read and written, when a tensor that is far larger than any cache is copied"""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = times(lambda: target.copy_(source), device, steps=10, warmup=3)
    return 2 * source.numel() / statistics.median(seconds)


def count_kernels(step: Callable[[], Any], device: torch.device) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profile.events()
    if device.type == "cpu":
        return {"operations": sum(is_operation(e) for e in events)}
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    launches = [e for e in events if e.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch"))]
    return {"launches": len(launches),
            "kernels": sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)}


def is_operation(event) -> bool:
    """True for an aten operation that no other operation calls, and for which a GPU would run a kernel."""
    if not event.name.startswith("aten::") or event.name in NO_KERNEL:
        return False
    if event.name in MAY_COPY and not any(child.name not in NO_KERNEL | {*MAY_COPY} for child in descendants(event)):
        return False
    caller = event
    while caller := caller.cpu_parent:
        if caller.name.startswith("aten::"):
            return False
    return True


def descendants(event) -> Iterator:
    for child in event.cpu_children:
        yield child
        yield from descendants(child)


@contextlib.contextmanager
def backends_for(precision: str) -> Iterator[None]:
    """A context with the same settings as train.py's: TF32 for this precision only, although cuDNN's default is to use
    it; cuDNN tries out its algorithms during the warm-up."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_on_cpu(net: nn.Module, step: Callable[[], Any]) -> int:
    """-> the peak of the bytes of tensors, minus those before the step

    The process's own peak would be up to twice as large, because of the heap that earlier networks have left behind.
    """
    net.zero_grad(set_to_none=True)  # the profiler does not know the size of tensors that were allocated before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


def measure(implementation: Implementation, size: Size, precision: str, device: torch.device,
            args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    graphed = implementation.library == "ours" and implementation.graph
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    net, step = make_step(implementation, size, precision, device)
    times(step, device, 1, args.warmup)
    if graphed and not step.func.can_capture:
        raise RuntimeError("no CUDA graph could be captured")
    if on_gpu and (graphed or not implementation.graph):  # torch.compile's graphs allocate only in the warm-up
        torch.cuda.reset_peak_memory_stats(device)
    if graphed:  # our graph allocates only when it is captured: another learning rate makes it capture again
        step.func.optimizer.param_groups[0]["lr"] /= 2
    seconds = times(step, device, args.steps, warmup=1)
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else peak_on_cpu(net, step)
    row = {"seconds": statistics.median(seconds), "steps": seconds, "peak": peak, **count_kernels(step, device)}
    return row | ({"path": net.dense1.last_path} if implementation.library == "ours" else {})


def try_to_measure(name: str, *rest) -> dict[str, Any]:
    try:
        return measure(IMPLEMENTATIONS[name], *rest)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return {"error": OUT_OF_MEMORY}
        lost = {"lost": True} if isinstance(error, (CaptureFailed, torch.AcceleratorError)) else {}
        return {"error": " ".join(str(error).split())[:100] or type(error).__name__, **lost}


class Rows:
    """The measured rows: in memory and, with a path, in a file of JSON lines."""

    def __init__(self, path: str | None):
        self.path, self.rows = path, []
        lines = Path(path).read_text().splitlines() if path and Path(path).exists() else []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # a killed process may leave an incomplete last line
                self.rows.append(json.loads(line))

    def find(self, **key) -> dict[str, Any] | None:
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path:
            with open(self.path, "a+b") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                last_byte = file.read()
                if last_byte not in (b"", b"\n"):  # the last line is incomplete
                    file.write(b"\n")
                file.write(json.dumps(row).encode() + b"\n")


def measure_all(names: list[str], size_name: str, device: torch.device, args: argparse.Namespace, rows: Rows,
                about: dict[str, Any], end: float) -> bool:
    """-> False if it stopped early, because the time was over or the GPU can no longer be used"""
    size = SIZES[size_name]
    for precision in args.precision:
        must_move = bytes_to_move(size, precision)
        for name in names:
            key = {"size": size_name, "precision": precision, "hardware": about["hardware"], "torch": about["torch"]}
            row = rows.find(implementation=name, **key)
            if row is None:
                if time.monotonic() > end:
                    return False
                with backends_for(precision):
                    row = try_to_measure(name, size, precision, device, args)
                if name.endswith("compiled"):
                    torch._dynamo.reset()  # the compiled code holds its CUDA graphs' memory
                free_memory(device)
                row = {"implementation": name, **key, **about, "bytes": must_move, **row}
                if "error" not in row:
                    row |= {"imagesPerSecond": size.batchSz / row["seconds"],
                            "shareOfCopy": must_move / row["seconds"] / about["copyBytesPerSecond"]}
                rows.add(row)
            reference = rows.find(implementation="torchvision", **key) or {}
            print_row(row, reference.get("seconds"), device)
            if "lost" in row and rows.rows[-1] is row:  # every later measurement in this process would fail, too
                return False
    return True


# --- the table --------------------------------------------------------------------------------------------------

def print_header(name: str, size: Size, device: torch.device) -> None:
    print(f"\n{name}: k={size.growthRate}, layers {size.layers}, batch {size.batchSz}, "
          f"{size.imageSize}x{size.imageSize}")
    counts = f"{'launches':>10}{'kernels':>9}" if device.type == "cuda" else f"{'aten ops':>10}"
    print(f"{'':44}{'s/step':>9}{'images/s':>10}{'ratio':>7}{'peak MiB':>10}{counts}{'must move MB':>14}{'of copy':>9}")


def print_row(row: dict[str, Any], reference: float | None, device: torch.device) -> None:
    """``reference`` is torchvision's seconds in this precision, or None."""
    label = f"{row['implementation']} {row['precision']}"
    if "error" in row:
        print(f"{label:44} {row['error']}", flush=True)
        return
    counts = (f"{row['launches']:10,}{row['kernels']:9,}" if device.type == "cuda" else f"{row['operations']:10,}")
    ratio = f"{reference / row['seconds']:.2f}" if reference else "-"
    print(f"{label:44}{row['seconds']:9.4f}{row['imagesPerSecond']:10.1f}{ratio:>7}{row['peak'] / MIB:10.0f}{counts}"
          f"{row['bytes'] / 1e6:14.1f}{row['shareOfCopy']:9.1%}", flush=True)


# --- the command ------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device, list[str]]:
    """-> flags, device, names of the implementations to measure. Raises ValueError for bad input."""
    count = number(int, 1, 10**6)
    parser = Parser("step.py", __doc__)
    parser.add_argument("--size", nargs="+", choices=tuple(SIZES), metavar="SIZE",
                        help=f"network and batch: {', '.join(SIZES)} (default: bc100-64; on a CPU bc40-16)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS,
                        help="(default: all three; on a CPU fp32)")
    parser.add_argument("--only", metavar="PART", nargs="+", default=[""],
                        help="measure only implementations whose name contains one of these")
    parser.add_argument("--steps", metavar="N", type=count, help="timed steps (default: 30; on a CPU 5)")
    parser.add_argument("--warmup", metavar="N", type=count, help="steps before these (default: 10; on a CPU 2)")
    parser.add_argument("--threads", metavar="N", type=count, help="CPU threads (default: torch's own)")
    parser.add_argument("--minutes", metavar="M", type=number(float, 0, 10**6), default=5,
                        help="no row begins after this time; a row takes up to 3 minutes (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE.jsonl", help="add the rows to this file, and skip rows that it holds")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the rows")
    args = parser.parse_args(argv)

    gpus = torch.cuda.device_count()
    valid = ["cpu", "cuda", *(f"cuda:{i}" for i in range(gpus))] if gpus else ["cpu"]
    args.device = args.device or ("cuda" if gpus else "cpu")
    if args.device not in valid:
        raise ValueError(f"--device {args.device!r} does not exist here; valid are {', '.join(valid)}")
    device = torch.device("cuda:0" if args.device == "cuda" else args.device)
    on_gpu = device.type == "cuda"
    args.size = args.size or ["bc100-64" if on_gpu else "bc40-16"]
    args.precision = args.precision or list(PRECISIONS if on_gpu else PRECISIONS[:1])
    args.steps = args.steps or (30 if on_gpu else 5)
    args.warmup = args.warmup or (10 if on_gpu else 2)
    if "tf32" in args.precision and not on_gpu:
        raise ValueError(f"--precision tf32 needs a CUDA GPU; valid on {device} are fp32, bf16")
    possible = [name for name, implementation in IMPLEMENTATIONS.items() if on_gpu or not implementation.graph]
    names = [name for name in possible if any(part in name for part in args.only)]
    if not names:
        raise ValueError(f"--only {' '.join(args.only)} is in no name; valid on {device} are parts of "
                         f"{', '.join(possible)}")
    for path in (args.json, args.plot):  # check before minutes of measuring
        if path and (not Path(path).parent.is_dir() or Path(path).is_dir()):
            raise ValueError(f"{path} cannot be written; valid is the path of a file in an existing directory")
    if args.plot and not args.plot.endswith(".png"):
        raise ValueError(f"--plot {args.plot}; valid is a name that ends in .png")
    return args, device, names


def run(args: argparse.Namespace, device: torch.device, names: list[str]) -> list[dict[str, Any]]:
    end = time.monotonic() + 60 * args.minutes
    hardware = (torch.cuda.get_device_name(device) if device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} threads")
    bandwidth = copy_bandwidth(device)
    free_memory(device)
    print(f"{hardware}, torch {torch.__version__}, copies move {bandwidth / 1e9:.1f} GB/s; "
          f"median of {args.steps} steps after {args.warmup}")
    if device.type == "cpu":
        left_out = [name for name, implementation in IMPLEMENTATIONS.items()
                    if implementation.graph and any(part in name for part in args.only)]
        if left_out:
            print(f"left out: {', '.join(left_out)} (CUDA graphs need a GPU)")
        print("ratios only: on a CPU, seconds, images/s and shares depend on the machine's load; on a machine with\n"
              "other load measure ratios with block.py, where the implementations take turns after each step")
    about = {"device": device.type, "hardware": hardware, "torch": str(torch.__version__), "nSteps": args.steps,
             "warmup": args.warmup, "copyBytesPerSecond": bandwidth}
    rows = Rows(args.json)
    for name in dict.fromkeys(args.size):
        print_header(name, SIZES[name], device)
        if not measure_all(names, name, device, args, rows, about, end):
            print("stopped before the end; repeat the command with --json to measure the remaining rows")
            break
    return rows.rows


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 done, 1 a row failed for another reason than lack of memory, 2 bad input"""
    threads = torch.get_num_threads()
    try:
        args, device, names = parse_args(argv)
        if args.threads:
            torch.set_num_threads(args.threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()  # as train.py does
        rows = run(args, device, names)
        if args.plot and rows:
            step_plot.draw(rows, args.plot)
        errors = [row["error"] for row in rows if "error" in row]
        return int(any(error != OUT_OF_MEMORY for error in errors))
    except (ValueError, OSError) as error:
        print(f"step.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Time, memory and kernels of whole training steps (forward, loss, backward, SGD with Nesterov momentum), side by side.

    tests/benchmarks/step.py --size bc100-64 bc100-256 --json step.json --plot step.png
    tests/benchmarks/step.py --size bc100-64 --precision bf16 --only ours
    tests/benchmarks/step.py                       on a CPU: a small size, for the ratios alone

Torchvision's DenseNet (CIFAR's stem where the images are small) is as shipped, in bf16 in channels_last; ours takes
images in channels_last, as data.py makes them, and train.py's own step. One implementation is in memory at a time.

Columns: seconds (median); images/s; their ratio to torchvision's in the same precision; peak memory from the first step
on, so with what a capture holds; on a GPU the calls that launch something and the kernels they run, on a CPU the
operations of aten that no other one calls, but for views and allocations; "must move": the bytes of every
tensor that a step has to read or write, each fused into as few kernels as its data dependences allow; "of copy": these
over the time, as a share of what a large tensor.copy_ moves (reads and writes) in the same run.

Must move, in values a pixel, for batch norm as in densenet.EfficientBlock (xhat is made once a channel, G collects its
gradient; affine and ReLU belong to the kernel that reads, statistics and sums to the one that writes):

    layer of C_l channels   4 C_l    xhat read forward and backward, G read and written
                          + 8 k      forward: the 4k channels between the convolutions, written and read
                          + 3 k      forward: the k new ones written, read and written normalised
                          + 18 k     backward: G and xhat of the k new ones read; of the 4k between, xhat read, the
                                     gradient written, both read again once the sums are known
    block of input C_0      5 C_0    x read, xhat written; G and xhat read, dx written
    behind a block of C     3 C      xhat read forward and backward, G written for the first time
                          + 2 C'/4   transition to C' channels: pooled output written, its gradient read
                            2 C      after the last block, an image: pooled features written, their gradient read
    stem, 3x3, to C_0       2 C_0    output written, its gradient read
    stem, 7x7, to C_0       4 C_0    at half the side: written, read by batch norm and pooling, twice in its backward
                          + 3 C_0    at a quarter: pooled output written, its gradient read twice

Each value is 4 bytes, with bf16 2. The images (4 bytes) are read twice. Each parameter is 8 times 4 bytes: weight read
forward, backward and by SGD, gradient written and read, momentum read and written, weight written.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes its own lines to stderr
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 0)]
import block
import runs

import densenet
import train

MIB = 2**20
OUT_OF_MEMORY = "out of memory"
PRECISIONS = ("fp32", "tf32", "bf16")
NO_KERNEL = {f"aten::{name}" for name in (  # views, allocations, questions
    "alias", "as_strided", "chunk", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand", "expand_as",
    "narrow", "new_empty", "new_empty_strided", "permute", "promote_types", "resize_", "select", "slice", "split",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "view_as")}
MAY_COPY = ("aten::contiguous", "aten::flatten", "aten::reshape", "aten::to")


class Size(NamedTuple):
    growthRate: int
    layers: tuple[int, ...]  # of each block
    batchSz: int
    imageSize: int = 32
    smallInputs: bool = True


SIZES = {
    "bc40-16": Size(12, (6, 6, 6), 16),
    "bc100-64": Size(12, (16, 16, 16), 64),
    "bc100-256": Size(12, (16, 16, 16), 256),
    "bc190-64": Size(40, (31, 31, 31), 64),
    "densenet121-64": Size(32, (6, 12, 24, 16), 64, 224, smallInputs=False),
}


class Implementation(NamedTuple):
    library: str
    option: bool | str  # memory_efficient or efficient
    graph: bool = False  # torchvision: torch.compile with CUDA graphs; ours: runs.GraphedStep


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
}


# --- what must move ---------------------------------------------------------------------------------------------

def values_to_move(size: Size) -> int:
    """Activations read or written, as the table above counts them."""
    k, n = size.growthRate, size.batchSz
    c, side = 2 * k, size.imageSize
    if size.smallInputs:
        values = 2 * c * n * side**2
    else:
        half, side = math.ceil(side / 2), math.ceil(side / 4)
        values = 4 * c * n * half**2 + 3 * c * n * side**2
    for b, layers in enumerate(size.layers, 1):
        pixels = n * side**2
        values += 5 * c * pixels
        for _ in range(layers):
            values += (4 * c + 29 * k) * pixels
            c += k
        values += 3 * c * pixels
        if b < len(size.layers):
            c, side = c // 2, side // 2
            values += 2 * c * n * side**2
        else:
            values += 2 * c * n
    return values


def bytes_to_move(size: Size, precision: str) -> int:
    with torch.device("meta"):
        parameters = train.count(densenet.DenseNet(size.growthRate, blockConfig=size.layers, nClasses=classes(size),
                                                   smallInputs=size.smallInputs))
    images = size.batchSz * 3 * size.imageSize**2
    return (2 if precision == "bf16" else 4) * values_to_move(size) + 4 * 2 * images + 4 * 8 * parameters


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying a tensor far larger than any cache."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = times(lambda: target.copy_(source), device, steps=10, warmup=3)
    return 2 * source.numel() / statistics.median(seconds)


# --- steps ------------------------------------------------------------------------------------------------------

def classes(size: Size) -> int:
    return 10 if size.smallInputs else 1000


def build(implementation: Implementation, size: Size) -> nn.Module:
    library, option, _ = implementation
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
    """-> the network, and the step on one batch of random images"""
    torch.manual_seed(0)
    net = build(implementation, size).to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images = torch.randn(size.batchSz, 3, size.imageSize, size.imageSize, device=device)
    labels = torch.randint(classes(size), (size.batchSz,), device=device)
    if implementation.library == "ours":
        images = images.contiguous(memory_format=torch.channels_last)
        step = functools.partial(train.train_step, net, optimizer, precision)
        if implementation.graph:
            step = runs.GraphedStep(step, net, optimizer, size.batchSz)
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
    """Seconds of each step. A GPU is not waited for in between, as in training."""
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
    """Whether it is an operation of aten that no other one calls and that a GPU would have a kernel for."""
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
    """As train.py sets them: TF32 for this precision alone (cuDNN's own default is to use it), cuDNN's fastest
    algorithms found by trial, in the warm-up."""
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
    """Bytes of tensors over what is there before the step. Not the process's: the heap that earlier networks have
    left behind made that up to twice as large."""
    net.zero_grad(set_to_none=True)  # the profiler does not know the size of what is older than itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


def measure(implementation: Implementation, size: Size, precision: str, device: torch.device,
            args: argparse.Namespace) -> dict[str, Any]:
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    net, step = make_step(implementation, size, precision, device)
    seconds = times(step, device, args.steps, args.warmup)
    if implementation.library == "ours" and implementation.graph and not step.func.possible:
        raise RuntimeError("no CUDA graph could be captured")
    # a replay allocates nothing: what its graph holds was counted during the capture
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else peak_on_cpu(net, step)
    row = {"seconds": statistics.median(seconds), "steps": seconds, "peak": peak, **count_kernels(step, device)}
    return row | ({"path": net.dense1.last_path} if implementation.library == "ours" else {})


def try_to_measure(name: str, *rest) -> dict[str, Any]:
    try:
        return measure(IMPLEMENTATIONS[name], *rest)
    except RuntimeError as error:
        if runs.is_out_of_memory(error):
            return {"error": OUT_OF_MEMORY}
        return {"error": " ".join(str(error).split())[:100] or type(error).__name__}


def measure_all(names: list[str], size: Size, device: torch.device, args: argparse.Namespace,
                bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for precision in args.precision:
        must_move, reference = bytes_to_move(size, precision), None
        for name in names:
            with backends_for(precision):
                row = try_to_measure(name, size, precision, device, args)
            if name.endswith("compiled"):
                torch._dynamo.reset()  # the compiled code holds its CUDA graphs' memory
            free_memory(device)
            row = {"implementation": name, "precision": precision, "bytes": must_move, **row}
            if "error" not in row:
                reference = row["seconds"] if name == "torchvision" else reference
                row |= {"imagesPerSecond": size.batchSz / row["seconds"],
                        "ratio": reference and reference / row["seconds"],
                        "shareOfCopy": must_move / row["seconds"] / bandwidth}
            print_row(row, device)
            rows.append(row)
    return rows


# --- what it shows ----------------------------------------------------------------------------------------------

def print_header(name: str, size: Size, device: torch.device) -> None:
    print(f"\n{name}: k={size.growthRate}, layers {size.layers}, batch {size.batchSz}, "
          f"{size.imageSize}x{size.imageSize}")
    counts = f"{'launches':>10}{'kernels':>9}" if device.type == "cuda" else f"{'aten ops':>10}"
    print(f"{'':44}{'s/step':>9}{'images/s':>10}{'ratio':>7}{'peak MiB':>10}{counts}{'must move MB':>14}{'of copy':>9}")


def print_row(row: dict[str, Any], device: torch.device) -> None:
    label = f"{row['implementation']} {row['precision']}"
    if "error" in row:
        print(f"{label:44} {row['error']}", flush=True)
        return
    counts = (f"{row['launches']:10,}{row['kernels']:9,}" if device.type == "cuda" else f"{row['operations']:10,}")
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    print(f"{label:44}{row['seconds']:9.4f}{row['imagesPerSecond']:10.1f}{ratio:>7}{row['peak'] / MIB:10.0f}{counts}"
          f"{row['bytes'] / 1e6:14.1f}{row['shareOfCopy']:9.1%}", flush=True)


def draw(result: dict[str, Any], path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = result["sizes"]
    heights = [len(size["rows"]) + 2 for size in sizes.values()]
    figure, axes = plt.subplots(len(sizes), 2, figsize=(11, 0.5 + 0.34 * sum(heights)), squeeze=False, sharey="row",
                                layout="constrained", height_ratios=heights)
    for (name, size), (left, right) in zip(sizes.items(), axes, strict=True):
        rows = size["rows"]
        labels = [f"{row['implementation']}  {row['precision']}" for row in rows]
        colors = ["#0072B2" if row["implementation"].startswith("ours") else "#999999" for row in rows]
        speeds, peaks = ([row.get(key, 0) / unit for row in rows] for key, unit in (("imagesPerSecond", 1),
                                                                                   ("peak", MIB)))
        for ax, values in ((left, speeds), (right, peaks)):
            ax.barh(range(len(rows)), values, color=colors)
            for y, (row, value) in enumerate(zip(rows, values, strict=True)):
                ax.annotate(row.get("error", "")[:40] or f"{value:,.0f}", (value, y), xytext=(4, 0), fontsize=8,
                            textcoords="offset points", va="center")
            ax.set_xlim(0, 1.18 * max(values) or 1)
            ax.spines[["top", "right"]].set_visible(False)
        left.set_yticks(range(len(rows)), labels, fontsize=9)
        left.invert_yaxis()
        left.set(xlabel="images/s" + " (on a CPU: ratios only)" * (result["device"] == "cpu"),
                 title=f"{name}, training step")
        right.set(xlabel="MiB peak memory", title=result["hardware"])
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- the command ------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device, list[str]]:
    """-> flags, device and the implementations to measure; ValueError for nonsense"""
    count = runs.number(int, 1, 10**6)
    parser = runs.Parser("step.py", __doc__)
    parser.add_argument("--size", nargs="+", choices=tuple(SIZES), metavar="SIZE",
                        help=f"network and batch: {', '.join(SIZES)} (default: bc100-64; on a CPU bc40-16)")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS,
                        help="(default: all three; on a CPU fp32)")
    parser.add_argument("--only", metavar="PART", default="", help="the implementations whose name contains this")
    parser.add_argument("--steps", metavar="N", type=count, help="counted steps (default: 30; on a CPU 5)")
    parser.add_argument("--warmup", metavar="N", type=count, help="steps before these (default: 10; on a CPU 2)")
    parser.add_argument("--threads", metavar="N", type=count, help="of the CPU (default: torch's own)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args(argv)

    gpus = torch.cuda.device_count()
    valid = ["cpu"] + ["cuda"] * bool(gpus) + [f"cuda:{i}" for i in range(gpus)]
    args.device = args.device or ("cuda" if gpus else "cpu")
    if args.device not in valid:
        raise ValueError(f"--device {args.device!r} does not exist here; valid are {', '.join(valid)}")
    device = torch.device("cuda:0" if args.device == "cuda" else args.device)
    on_gpu = device.type == "cuda"
    args.size = args.size or ["bc100-64" if on_gpu else "bc40-16"]
    args.precision = args.precision or list(PRECISIONS if on_gpu else PRECISIONS[:1])
    args.steps, args.warmup = args.steps or (30 if on_gpu else 5), args.warmup or (10 if on_gpu else 2)
    if "tf32" in args.precision and not on_gpu:
        raise ValueError(f"--precision tf32 is a GPU's; valid on {device} are fp32, bf16")
    possible = [name for name, implementation in IMPLEMENTATIONS.items() if on_gpu or not implementation.graph]
    names = [name for name in possible if args.only in name]
    if not names:
        raise ValueError(f"--only {args.only!r} is in no name; on {device} there are {', '.join(possible)}")
    for path in filter(None, (args.json, args.plot)):  # before minutes of measuring
        if not Path(path).parent.is_dir() or Path(path).is_dir():
            raise ValueError(f"{path} cannot be written: valid is a file in a directory that exists")
    if args.plot and not args.plot.endswith(".png"):
        raise ValueError(f"--plot {args.plot}; valid is a name that ends in .png")
    return args, device, names


def run(args: argparse.Namespace, device: torch.device, names: list[str]) -> dict[str, Any]:
    hardware = (torch.cuda.get_device_name(device) if device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} threads")
    bandwidth = copy_bandwidth(device)
    free_memory(device)
    print(f"{hardware}, torch {torch.__version__}, copies move {bandwidth / 1e9:.1f} GB/s; "
          f"median of {args.steps} steps after {args.warmup}")
    if device.type == "cpu":
        left_out = [name for name, implementation in IMPLEMENTATIONS.items()
                    if implementation.graph and args.only in name]
        if left_out:
            print(f"left out: {', '.join(left_out)} (CUDA graphs are a GPU's)")
        print("ratios only: on a CPU seconds, images/s and shares hold for this machine and moment; where others\n"
              "work on it, even ratios are block.py's to tell, whose implementations take turns, a step each")
    sizes = {}
    for name in dict.fromkeys(args.size):
        size = SIZES[name]
        print_header(name, size, device)
        sizes[name] = {**size._asdict(), "rows": measure_all(names, size, device, args, bandwidth)}
    return {"device": device.type, "hardware": hardware, "torch": torch.__version__, "steps": args.steps,
            "warmup": args.warmup, "copyBytesPerSecond": bandwidth, "sizes": sizes}


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 done, 1 a row failed otherwise than for want of memory, 2 refused"""
    threads = torch.get_num_threads()
    try:
        args, device, names = parse_args(argv)
        if args.threads:
            torch.set_num_threads(args.threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            runs.keep_freed_memory()  # as train.py does
        result = run(args, device, names)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
        if args.plot:
            draw(result, args.plot)
        errors = [row["error"] for size in result["sizes"].values() for row in size["rows"] if "error" in row]
        return int(any(error != OUT_OF_MEMORY for error in errors))
    except (ValueError, OSError) as error:
        print(f"step.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())

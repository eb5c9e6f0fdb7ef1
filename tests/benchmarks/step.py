#!/usr/bin/env python3
"""Time and memory of a training step of DenseNet-BC: our implementation beside torchvision's and timm's.

    tests/benchmarks/step.py                                          BC 100-12, batches of 64, float32
    tests/benchmarks/step.py --precision bf16 --json bf16.json
    tests/benchmarks/step.py --only torchvision "ours block"          these rows; a wrong name lists all
    tests/benchmarks/step.py --depths 40 100 190 --plot depths.png    textbook, block and max at several depths
    tests/benchmarks/step.py --imagenet                               DenseNet-121, 161 and 201 at 224 pixels

A step is train.py's: forward, loss, backward, SGD with Nesterov momentum. Each row has its own process, and the rows
take turns of one step (on a GPU of ten), so that a busy moment hits all. All are in memory at once: BC 100-12 takes
about 24 GB on a CPU; choose rows by --only where that is too much. "compiled" is torch.compile of the whole network (on
a GPU with mode="reduce-overhead"); "graph" is train.py's CUDA graph.

    s/step     median over the turns          ratio    to torchvision's median
    first s    the first step, in which libraries load and torch.compile compiles (less if its cache on disk has it)
    kept       what autograd keeps from the forward to the backward pass, by saved-tensor hooks
    peak       what a step needs beyond weights and images: on a CPU the growth of the resident set, on a GPU that of
               torch's allocator (for a CUDA graph that of its capture)
"""

import argparse
import ctypes
import datetime
import functools
import gc
import importlib.util
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import train
from densenet import DenseNet
from lib.cli import Parser, fail, first_line, number
from lib.cuda_graph import GraphedStep
from lib.device import keep_freed_memory

MIB = 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Row(NamedTuple):
    library: str
    option: bool | str = False  # memory_efficient, or our efficient
    channels_last: bool = False
    compiled: bool = False
    graph: bool = False


class Network(NamedTuple):
    name: str
    growthRate: int
    layers: tuple[int, ...]  # of each block
    small: bool = True  # CIFAR's first convolution and 10 classes, or ImageNet's and 1,000


ROWS = {
    "torchvision": Row("torchvision"),
    "torchvision channels_last": Row("torchvision", channels_last=True),
    "torchvision memory_efficient": Row("torchvision", True),
    "torchvision compiled": Row("torchvision", compiled=True),
    "torchvision channels_last compiled": Row("torchvision", channels_last=True, compiled=True),
    "timm": Row("timm"),
    "timm memory_efficient": Row("timm", True),
    "ours textbook": Row("ours"),
    "ours textbook channels_last": Row("ours", channels_last=True),
    "ours block": Row("ours", True, channels_last=True),
    "ours max": Row("ours", "max", channels_last=True),
}
OF_DEPTHS = ["ours textbook channels_last", "ours block", "ours max"]
OF_IMAGENET = ["torchvision", "torchvision channels_last", *OF_DEPTHS]
IMAGENET = [Network("DenseNet-121", 32, (6, 12, 24, 16), small=False),
            Network("DenseNet-161", 48, (6, 12, 36, 24), small=False),
            Network("DenseNet-201", 32, (6, 12, 48, 32), small=False)]


def possible_rows() -> dict[str, Row]:
    """-> the rows that can be measured here"""
    rows = {name: row for name, row in ROWS.items() if row.library != "timm" or importlib.util.find_spec("timm")}
    if DEVICE == "cuda":
        rows |= {f"{name} graph": row._replace(graph=True) for name, row in rows.items() if row.library == "ours"}
    return rows


# --- a row, in its own process ----------------------------------------------------------------------------------

def build(row: Row, network: Network) -> nn.Module:
    """-> the network of this library; its output are log-probabilities"""
    k, layers, classes = network.growthRate, network.layers, 10 if network.small else 1000
    if row.library == "ours":
        return DenseNet(k, blockConfig=layers, nClasses=classes, smallInputs=network.small, efficient=row.option)
    if row.library == "torchvision":
        net = torchvision.models.DenseNet(k, layers, 2 * k, num_classes=classes, memory_efficient=row.option)
    else:
        from timm.models.densenet import DenseNet as Timm
        net = Timm(k, layers, num_classes=classes, memory_efficient=row.option)
    if network.small:
        net.features.conv0 = nn.Conv2d(3, 2 * k, 3, padding=1, bias=False)
        for name in {"norm0", "relu0", "pool0"} & {name for name, _ in net.features.named_children()}:
            delattr(net.features, name)
    return nn.Sequential(net, nn.LogSoftmax(1))


def make_step(row: Row, net: nn.Module, optimizer: torch.optim.Optimizer, precision: str, images: torch.Tensor,
              labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    step = functools.partial(train.train_step, net, optimizer, precision)
    if row.graph:
        step = GraphedStep(step, net, optimizer, len(images))

    def one_step():
        if row.compiled and images.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        result = step(images, labels, len(images))
        if row.graph and step.graph is None:
            raise RuntimeError("no CUDA graph could be captured")
        return result
    return one_step


def prepare(row: Row, network: Network, args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], float]]:
    """-> the row's memory and first step, and a function that takes a turn: seconds a step"""
    device, on_gpu = torch.device(DEVICE), DEVICE == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    else:
        keep_freed_memory()  # as train.py does
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    torch.manual_seed(0)
    net = build(row, network).to(device)
    images = torch.randn(args.batchSz, 3, args.imageSize, args.imageSize, device=device)
    labels = torch.randint(10, (args.batchSz,), device=device)
    if row.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        if row.library != "ours" or on_gpu:  # train.py leaves weights on a CPU as they are
            net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    resting = torch.cuda.memory_allocated() if on_gpu else 0

    start = time.perf_counter()
    if row.compiled:
        net = torch.compile(net, mode="reduce-overhead" if on_gpu else None)
    parts = row, net, optimizer, args.precision, images, labels
    step = make_step(*parts)
    step()
    wait()
    result = {"first": time.perf_counter() - start, "kept": kept_bytes(net, images, labels, args.precision)}
    if on_gpu:
        for _ in range(4):  # libraries choose their kernels, reduce-overhead captures
            step()
        if row.graph:
            step = make_step(*parts)  # a second graph: in the first one's capture libraries tried out workspaces
        if row.graph or not row.compiled:  # reduce-overhead allocates in its first steps only
            torch.cuda.reset_peak_memory_stats()
        step()
        result["peak"] = torch.cuda.max_memory_allocated() - resting
    else:
        result["peak"] = peak_on_cpu(step)

    def turn() -> float:
        n = 10 if on_gpu else 1
        if on_gpu:
            step()
        wait()
        start = time.perf_counter()
        for _ in range(n):
            step()
        wait()
        return (time.perf_counter() - start) / n
    turn()
    return result, turn


def kept_bytes(net: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> int:
    """Bytes that autograd keeps for the backward pass, without the parameters. A storage counts once."""
    storages, parameters = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held: a freed address may be used again

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
        with train.autocast(images.device, precision):
            output = net(images)
        F.nll_loss(output, labels)
    return sum(storage.nbytes() for storage in storages.values())


def peak_on_cpu(step: Callable[[], Any]) -> int | None:
    """-> the resident set's growth in a step, in bytes; None where the system is not Linux"""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier steps have freed
    clear.write_text("5")  # resets VmHWM, the peak
    before = process_memory("VmRSS")
    step()
    return process_memory("VmHWM") - before


def process_memory(field: str) -> int:
    """-> bytes, from /proc/self/status"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def worker(pipe, row: Row, network: Network, args: argparse.Namespace) -> None:
    """Sends what ``prepare`` finds out, or an error, and then the seconds of a turn for each True that it receives."""
    pipe.recv()
    try:
        result, turn = prepare(row, network, args)
    except Exception as error:
        pipe.send({"error": first_line(error)})
        return
    pipe.send(result)
    while pipe.recv():  # False ends it
        pipe.send(turn())


# --- all rows ---------------------------------------------------------------------------------------------------

def measure(rows: dict[str, Row], network: Network, args: argparse.Namespace) -> list[dict[str, Any]]:
    """-> for each row its network, name, memory, seconds of each turn and their median; or the error"""
    context = multiprocessing.get_context("spawn")
    pipes, results, processes = {}, {}, []
    for name, row in rows.items():  # all import torch at the same time
        pipes[name], there = context.Pipe()
        processes.append(context.Process(target=worker, args=(there, row, network, args), daemon=True))
        processes[-1].start()
        there.close()
    for name, pipe in pipes.items():
        results[name] = {"network": network.name, "name": name, "turns": []} | ask(pipe, {})
    for _ in range(args.steps):
        for name, result in results.items():
            if "error" not in result:
                answer = ask(pipes[name])
                if isinstance(answer, float):
                    result["turns"].append(answer)
                else:
                    result |= answer
    for name, result in results.items():
        if "error" not in result:
            pipes[name].send(False)
            result["seconds"] = statistics.median(result["turns"])
    for process in processes:
        process.join()
    return list(results.values())


def ask(pipe, message: Any = True) -> Any:
    try:
        pipe.send(message)
        return pipe.recv()
    except (EOFError, OSError):
        return {"error": "its process ended: no memory, or see above"}


def print_table(results: list[dict[str, Any]], batchSz: int) -> None:
    reference = next((r["seconds"] for r in results if r["name"] == "torchvision" and "seconds" in r), None)
    print(f"\n{results[0]['network']:36}{'s/step':>9}{'ratio':>7}{'first s':>9}{'kept MiB':>10}{'peak MiB':>10}"
          f"{'kept MB an image':>18}")
    for r in results:
        if "error" in r:
            print(f"{r['name']:36} {r['error']}")
            continue
        ratio = f"{r['seconds'] / reference:.2f}" if reference else "-"
        peak = "-" if r["peak"] is None else f"{r['peak'] / MIB:.0f}"
        print(f"{r['name']:36}{r['seconds']:9.4f}{ratio:>7}{r['first']:9.1f}{r['kept'] / MIB:10.0f}{peak:>10}"
              f"{r['kept'] / batchSz / 1e6:18.1f}")
    sys.stdout.flush()


def draw(results: list[dict[str, Any]], depths: list[int], path: str) -> None:
    """Draws the rows' kept memory and time against the depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (("kept", "MiB kept for backward", MIB), ("seconds", "seconds a step", 1))
    for ax, (key, label, unit) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(r["name"] for r in results):
            ax.plot(depths, [r.get(key, math.nan) / unit for r in results if r["name"] == name], "o-", label=name)
        ax.set(xlabel="depth L", ylabel=label, ylim=(0, None), xticks=depths)
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


# --- the command ------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[Network], dict[str, Row]]:
    """-> flags, networks and rows to measure. Raises ValueError for bad input."""
    count = number(int, 1, 10**6)
    parser = Parser("step.py", __doc__)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="measure these rows, by their whole names")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--depths", metavar="L", type=count, nargs="+", default=[100], help="(default: 100)")
    several.add_argument("--imagenet", action="store_true", help="DenseNet-121, 161 and 201")
    parser.add_argument("--growthRate", metavar="K", type=count, default=12, help="(default: %(default)s)")
    parser.add_argument("--batchSz", metavar="N", type=count, help="images (default: 64, with --imagenet 4)")
    parser.add_argument("--imageSize", metavar="N", type=count, help="pixels (default: 32, with --imagenet 224)")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--steps", metavar="N", type=count, default=7, help="turns of each row (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write what was measured, each turn's seconds too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the rows against --depths")
    args = parser.parse_args(argv)
    if args.precision == "tf32" and DEVICE == "cpu":
        raise ValueError("--precision tf32 needs a CUDA GPU; valid on a CPU are fp32, bf16")
    if args.plot and args.imagenet:
        raise ValueError("--plot draws depths; it is not possible with --imagenet")
    for path in (args.json, args.plot):  # before minutes of measuring
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written; valid is a file in an existing directory")
    rows = possible_rows()
    if unknown := [name for name in args.only or () if name not in rows]:
        raise ValueError(f"--only {unknown[0]!r} is no row here; valid are {', '.join(map(repr, rows))}")
    args.batchSz = args.batchSz or (4 if args.imagenet else 64)
    args.imageSize = args.imageSize or (224 if args.imagenet else 32)
    if args.imagenet:
        return args, IMAGENET, {name: rows[name] for name in args.only or OF_IMAGENET}
    with torch.device("meta"):
        for depth in args.depths:
            DenseNet(args.growthRate, depth)  # ValueError for a depth that does not exist
    networks = [Network(f"BC {depth}-{args.growthRate}", args.growthRate, ((depth - 4) // 6,) * 3)
                for depth in args.depths]
    return args, networks, {name: rows[name] for name in args.only or (OF_DEPTHS if len(networks) > 1 else rows)}


def about(args: argparse.Namespace) -> dict[str, Any]:
    """-> where, when and with what the rows are measured; without avx512_bf16 or amx_bf16, times of bf16 on a CPU have
    no meaning"""
    if DEVICE == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        text = info.read_text() if info.exists() else ""
        models = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
        bf16 = [name for name in ("avx512_bf16", "amx_bf16") if name in text.split()]
        processor = " ".join([models[0] if models else platform.processor() or platform.machine(), *bf16])
    return {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__), "processor": processor,
            "threads": torch.get_num_threads(), "date": str(datetime.date.today()), "precision": args.precision,
            "batchSz": args.batchSz, "imageSize": args.imageSize}


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 all rows were measured, 1 one failed, 2 bad input"""
    try:
        args, networks, rows = parse_args(argv)
    except ValueError as error:
        return fail(error, 2, "step.py")
    facts = about(args)
    print("torch {torch}, torchvision {torchvision}, {processor}, {threads} threads, {date}: {precision}, batches of "
          "{batchSz} images of {imageSize} pixels".format_map(facts), flush=True)
    results = []
    for network in networks:
        results += measure(rows, network, args)
        print_table(results[-len(rows):], args.batchSz)
    if args.json:
        Path(args.json).write_text(json.dumps(facts | {"rows": results}, indent=2) + "\n")
    if args.plot:
        draw(results, args.depths, args.plot)
    return int(any("error" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Time and memory of a training step of DenseNet-BC: our implementation beside torchvision's and timm's.

    tests/benchmarks/block.py                          the table; --json FILE, --plot FILE.png
    tests/benchmarks/block.py --depths 40 100 190 250  our paths and the textbook layers at several depths
    tests/benchmarks/block.py --depth 190 --growthRate 40 --only "ours efficient" --steps 1
    tests/benchmarks/block.py --bf16                   the same under bfloat16 autocast
    tests/benchmarks/block.py --imagenet               DenseNet-121, 161 and 201 at 224 pixels: bytes kept, and time

Each implementation has its own process. They take turns, one step each, so that a change in the machine's speed affects
all of them. "first s" is the first step of the process, in which libraries load their code; for the compiled block it
includes the compilation (less with TORCHINDUCTOR_CACHE_DIR's files, by default in /tmp). On a CPU without bfloat16
instructions (avx512_bf16, amx_bf16 in /proc/cpuinfo) the times of --bf16 have no meaning.
"""

import argparse
import gc
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import densenet
from densenet import DenseNet

MIB = 2**20
IMPLEMENTATIONS = {  # name: (library, option, memory format)
    "torchvision": ("torchvision", False, "nchw"),
    "torchvision memory_efficient": ("torchvision", True, "nchw"),
    "torchvision channels_last": ("torchvision", False, "channels_last"),
    "ours efficient": ("ours", True, "channels_last"),
    "ours max": ("ours", "max", "channels_last"),
    "ours compiled": ("ours", True, "channels_last"),
    "ours compiled max": ("ours", "max", "channels_last"),
    "torchvision memory_efficient channels_last": ("torchvision", True, "channels_last"),
    "timm": ("timm", False, "nchw"),
    "timm memory_efficient": ("timm", True, "nchw"),
    "ours textbook": ("ours", False, "nchw"),
    "ours textbook channels_last": ("ours", False, "channels_last"),
}
# the implementations of a group take turns; all at once would need over 20 GB
GROUPS = (list(IMPLEMENTATIONS)[:7], ["torchvision", *list(IMPLEMENTATIONS)[7:]])
REFERENCES = ("torchvision", "torchvision memory_efficient", "torchvision channels_last")
# network: batch size; published MB of activations without and with optimal checkpoints; their extra time in percent
# (Feng and Huang, "Optimal Gradient Checkpoint Search", CVPR 2021, arXiv 1808.00079)
IMAGENET = {
    "densenet121": (32, 4027, 898, 34), "densenet161": (16, 3751, 666, 36), "densenet201": (16, 3146, 474, 53)}


def build(library: str, option, depth: int, growthRate: int, network: str | None = None) -> nn.Module:
    """The same network from each library: torchvision's and timm's with a CIFAR stem, or an ImageNet network."""
    if network:
        if library == "ours":
            return getattr(densenet, network)(efficient=option)
        return getattr(__import__("torchvision").models, network)(memory_efficient=option)
    layers = (depth - 4) // 6
    if library == "ours":
        return DenseNet(growthRate=growthRate, depth=depth, efficient=option)
    if library == "torchvision":
        from torchvision.models import DenseNet as Peer
        net = Peer(growthRate, (layers,) * 3, 2 * growthRate, num_classes=10, memory_efficient=option)
        stem = ("norm0", "relu0", "pool0")
    else:
        from timm.models.densenet import DenseNet as Peer
        net = Peer(growthRate, (layers,) * 3, num_classes=10, memory_efficient=option)
        stem = ("norm0", "pool0")
    net.features.conv0 = nn.Conv2d(3, 2 * growthRate, 3, padding=1, bias=False)
    for name in stem:
        delattr(net.features, name)
    return net


def worker(pipe, name: str, args) -> None:
    """Sends the first step's seconds and the memory, then the seconds of one step for each True that it receives.

    If the library is missing, it sends the error text instead and ends.
    """
    library, option, layout = IMPLEMENTATIONS[name]
    torch.manual_seed(0)
    try:
        net = build(library, option, args.depth, args.growthRate, args.network).to(args.device)
    except ImportError as error:
        pipe.send(str(error))
        return
    images = torch.randn(args.batchSz, 3, args.imageSize, args.imageSize, device=args.device)
    labels = torch.randint(10, (args.batchSz,), device=args.device)
    if layout == "channels_last":
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)

    def loss_of(n=args.batchSz):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            out = net(images[:n])
        return F.nll_loss(out, labels[:n]) if library == "ours" else F.cross_entropy(out.float(), labels[:n])

    start = time.perf_counter()
    if "ours compiled" in name:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            if not net.compile_block():
                raise RuntimeError("the block could not be compiled")
    loss_of().backward()  # includes loading of the libraries' code and allocation of the gradients
    first = time.perf_counter() - start
    pipe.send(kept_bytes(net, loss_of) | {"first": first, "peak": peak_bytes(args.device, lambda: loss_of().backward()),
                                          "parameters": sum(p.numel() for p in net.parameters())})
    while pipe.recv():
        start = time.perf_counter()
        loss_of().backward()
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        net.zero_grad(set_to_none=False)
        pipe.send(seconds)


def kept_bytes(net: nn.Module, loss_of) -> dict[str, int]:
    """Bytes that autograd keeps between forward and backward pass. Parameters do not count; a storage counts once."""
    storages, parameters = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}
    alive = []  # the address of a freed storage could be used again

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of()
    return {"kept": sum(storages.values())}


def peak_bytes(device: str, step) -> int:
    """The step's peak memory in bytes, minus the memory in use before it."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":  # there is only the peak of the whole process
        step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = process_memory("VmRSS")
    step()
    return process_memory("VmHWM") - before


def process_memory(field: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(names: list[str], args) -> dict[str, dict]:
    """-> for each implementation what its worker sent, the seconds of each step, and their median"""
    context = multiprocessing.get_context("spawn")
    workers, results = {}, {}
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(there, name, args), daemon=True)
        process.start()
        answer = here.recv()
        if isinstance(answer, str):
            print(f"left out: {name} ({answer})", file=sys.stderr)
        else:
            workers[name], results[name] = (here, process), answer | {"seconds": []}
    for i in range(args.steps + 1):
        for name, (pipe, _) in workers.items():
            pipe.send(True)
            seconds = pipe.recv()
            if i:  # the first is a warm-up
                results[name]["seconds"].append(seconds)
    for pipe, process in workers.values():
        pipe.send(False)
        process.join()
    for r in results.values():
        r["median"] = sorted(r["seconds"])[len(r["seconds"]) // 2]
    return results


def print_table(results: dict[str, dict], batchSz: int) -> None:
    references = [name for name in REFERENCES if name in results]
    print(f"\n{'':44}{'s/step':>8}{'images/s':>10}{'first s':>9}{'kept MiB':>10}{'peak MiB':>10}" +
          ("   step's ratio to " + " | ".join(references) if references else ""))
    for name, r in results.items():
        ratios = " | ".join(f"{r['median'] / results[ref]['median']:.2f}" for ref in references)
        print(f"{name:44}{r['median']:8.3f}{batchSz / r['median']:10.1f}{r['first']:9.1f}{r['kept'] / MIB:10.0f}"
              f"{r['peak'] / MIB:10.0f}   {ratios}")


def draw(results: dict[str, dict], path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, r in results.items():
        is_block = name in ("ours efficient", "ours max", "ours compiled", "ours compiled max")
        ax.plot(r["median"], r["kept"] / MIB, "o" if is_block else "s", color="#0072B2" if is_block else "#777777")
        ax.annotate(name, (r["median"], r["kept"] / MIB), xytext=(7, 4), textcoords="offset points", fontsize=8)
    ax.set(xlabel="seconds a training step", ylabel="MiB kept for backward", xlim=(0, None), ylim=(0, None))
    ax.margins(x=0.3)
    ax.set_xlim(0, 1.45 * max(r["median"] for r in results.values()))
    ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def draw_depths(table: dict[int, dict], path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    depths = list(table)
    panels = (("kept", "MiB kept for backward", MIB), ("median", "seconds a step", 1))
    for ax, (key, label, unit) in zip(axes, panels, strict=True):
        for name, color in (("ours textbook", "#777777"), ("ours efficient", "#0072B2"), ("ours max", "#D55E00")):
            ax.plot(depths, [table[d][name][key] / unit for d in depths], "o-", color=color, label=name)
        ax.set(xlabel="depth L (k = 12)", ylabel=label, ylim=(0, None), xticks=depths)
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def imagenet(args) -> dict[str, dict]:
    """Counts the bytes kept for two images, and then times a step unless args.steps is 0, for each network."""
    table = {}
    for network, (batchSz, plain, optimal, extra_time) in IMAGENET.items():
        args.network = network
        counted = {}
        for name, option in (("textbook", False), ("block", True), ("max", "max")):
            net, x = build("ours", option, 0, 0, args.network), torch.randn(2, 3, 224, 224)
            counted[name] = kept_bytes(net, lambda net=net, x=x: net(x).sum())["kept"] / 2e6
        print(f"\n{args.network}, MB kept an image: " + ", ".join(f"{name} {mb:.1f}" for name, mb in counted.items()) +
              f"; at batch {batchSz}: " + ", ".join(f"{name} {mb * batchSz:.0f}" for name, mb in counted.items()) +
              f"; published: {plain}, with optimal checkpoints {optimal} at +{extra_time}% time")
        table[args.network] = {"kept": counted}
        if args.steps:
            names = ["torchvision", "torchvision channels_last", "ours textbook channels_last", "ours efficient",
                     "ours max", "ours compiled", "ours compiled max"]
            table[args.network]["steps"] = measure(args.only or names, args)
            print_table(table[args.network]["steps"], args.batchSz)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=100, help="L (default: %(default)s)")
    parser.add_argument("--growthRate", type=int, default=12, help="k (default: %(default)s)")
    parser.add_argument("--batchSz", type=int, default=None, help="images (default: 64; with --imagenet 8)")
    parser.add_argument("--imageSize", type=int, default=None, help="pixels (default: 32; with --imagenet 224)")
    parser.add_argument("--steps", type=int, default=None,
                        help="timed steps of each implementation, for the median (default: 7; with --imagenet 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=tuple(IMPLEMENTATIONS), metavar="NAME",
                        help=f"measure only these: {', '.join(IMPLEMENTATIONS)}")
    parser.add_argument("--depths", type=int, nargs="+", metavar="L", help="compare our paths at these depths")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--imagenet", action="store_true", help="measure DenseNet-121, 161 and 201")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the results; not with --imagenet")
    args = parser.parse_args(argv)
    args.network = None
    defaults = {"batchSz": 64, "imageSize": 32, "steps": 7}
    if args.imagenet:
        defaults = {"batchSz": 8, "imageSize": 224, "steps": 3}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    precision = "bfloat16 autocast" if args.bf16 else "float32"
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(f"DenseNet-BC{'' if args.imagenet else f' k={args.growthRate}'}, batch {args.batchSz}, {precision}, "
          f"torch {torch.__version__}, {args.device}{threads}")
    if args.imagenet:
        table = imagenet(args)
    elif args.depths:
        table = {}
        for depth in args.depths:
            print(f"\nL={depth}", end="")
            args.depth = depth
            table[depth] = measure(["ours textbook", "ours efficient", "ours max"], args)
            print_table(table[depth], args.batchSz)
    else:
        table = {}
        for names in [args.only] if args.only else GROUPS:
            results = measure(names, args)
            print_table(results, args.batchSz)
            table = results | table  # torchvision is in both groups: keep the first group's
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n")
    if args.plot and args.depths:
        draw_depths(table, args.plot)
    elif args.plot and not args.imagenet:
        draw(table, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

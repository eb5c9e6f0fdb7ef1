#!/usr/bin/env python3
"""Cost of data-parallel training: torchrun --nproc-per-node=2 tests/benchmarks/scale.py [--depth L --batchSz N]

Prints the bytes of the gradients, the median time of their all-reduce alone, and the median time of a training step
(forward, backward, update) with and without the all-reduce.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import torch.distributed as dist

import train
from densenet import DenseNet
from lib import distributed
from lib.device import set_up_device
from lib.memory import count_parameters


def timed(function, device: torch.device, repetitions: int) -> float:
    """-> the median seconds of a call"""
    seconds = []
    for _ in range(repetitions + 2):  # the first two warm up
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=100, help="L (default: %(default)s)")
    parser.add_argument("--growthRate", type=int, default=12, help="k (default: %(default)s)")
    parser.add_argument("--batchSz", type=int, default=64, help="global batch size (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="repetitions of each (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="default: %(default)s")
    args = parser.parse_args()
    world = distributed.read_world()
    if args.batchSz % world.size:
        parser.error(f"--batchSz {args.batchSz} is not divisible by the {world.size} processes")
    args.deterministic, args.no_cuda, args.device = False, False, None
    device = set_up_device(args, world)
    distributed.start(world)

    torch.manual_seed(0)
    net = DenseNet(args.growthRate, args.depth).to(device)
    share = args.batchSz // world.size
    images, labels = torch.randn(share, 3, 32, 32, device=device), torch.randint(10, (share,), device=device)
    images = images.to(memory_format=torch.channels_last)

    def step_of(wrap):
        wrapped = wrap(copy.deepcopy(net))
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9, nesterov=True)
        return lambda: train.train_step(wrapped, optimizer, args.precision, images, labels, share)

    alone = timed(step_of(lambda net: net), device, args.steps)  # without all-reduce
    together = timed(step_of(lambda net: distributed.average_gradients(net, world)), device, args.steps)
    gradients = torch.randn(count_parameters(net), device=device)
    reduce = timed(lambda: distributed.sum_over_ranks(gradients, world), device, 10 * args.steps)
    if world.rank == 0:
        print(f"{world.size} processes on {device.type} ({dist.get_backend() if world.size > 1 else 'alone'}), "
              f"L={args.depth} k={args.growthRate}, {share} images each, {torch.get_num_threads()} threads each\n"
              f"gradients            {gradients.numel() * 4 / 1e6:10.2f} MB\n"
              f"their all-reduce     {reduce * 1e3:10.2f} ms\n"
              f"step without it      {alone * 1e3:10.2f} ms\n"
              f"step with it         {together * 1e3:10.2f} ms, {args.batchSz / together:.1f} images/s\n"
              f"communication        {max(0, 1 - alone / together):10.1%} of the step; all-reduce alone is "
              f"{reduce / alone:.1%} of the rest")
    distributed.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Kills training at random moments, repeats the same command until it ends, and compares with the uninterrupted run.

    tests/benchmarks/kill.py --n 50

Prints a line for each run and a summary. Exit status: 0 if every tensor of the checkpoints and every byte of the CSVs
is the same in all runs, 1 otherwise. Half of the runs write slowly, so that many kills hit the middle of a save. Every
third run has validation images; after its end it continues for one more epoch, in which it is killed again. Every fifth
run overwrites an old one: after each kill the directory must hold the old run whole or a checkpoint of the new one.
"""

import argparse
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch
from common import SAMPLE, SMALL, cut_sample, differences

import train
from densenet import read_checkpoint


class Lost(RuntimeError):
    """An overwritten run is gone before the new one is there."""


def slow_writes(seconds: float) -> None:
    """Makes a checkpoint's write come in two pieces, and adds a pause of ``seconds`` around each step of a save."""
    def slowed(function):
        def call(*args, **kwargs):
            time.sleep(seconds)
            result = function(*args, **kwargs)
            time.sleep(seconds)
            return result
        return call

    def save_in_pieces(checkpoint, file):
        whole = io.BytesIO()
        save(checkpoint, whole)
        for piece in (whole.getvalue()[:9_000], whole.getvalue()[9_000:]):
            file.write(piece)
            file.flush()
            time.sleep(seconds)

    save, torch.save = torch.save, save_in_pieces
    for name in ("fsync", "replace", "link", "unlink", "ftruncate"):
        setattr(os, name, slowed(getattr(os, name)))


def start(argv: list[str], slow: float, log: Path) -> int:
    """Starts train.py in a forked process, which saves the 3 seconds of importing torch. -> its process id"""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70  # if main() raises
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if slow:
            slow_writes(slow)
        status = train.main(argv)
    finally:
        os._exit(status)


def is_saving(run: Path) -> bool:
    return any(p.name.endswith(".tmp") for p in run.iterdir()) if run.is_dir() else False


def wait_until(reached: Callable[[], bool], pid: int) -> None:
    """Waits until ``reached()`` is true or the process has ended."""
    while not reached() and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def is_old(save: Path, old: Path | None) -> bool:
    """Whether the directory still has the checkpoint of the run that is to be overwritten."""
    return old is not None and content(save / "latest.pth") == content(old / "latest.pth")


def check_overwritten(save: Path, old: Path) -> None:
    """Raises Lost unless the directory holds the old run whole, or a checkpoint of the new one."""
    if is_old(save, old):
        changed = [p.name for p in (*old.glob("*.csv"), old / "best.pth") if content(save / p.name) != p.read_bytes()]
        if changed:
            raise Lost(f"latest.pth is still the old run's, but not {', '.join(changed)}")
    else:
        try:
            read_checkpoint(save / "latest.pth")
        except (OSError, ValueError) as error:
            raise Lost(str(error)) from None


def run_killed(argv: list[str], save: Path, kills: int, sizes: tuple[int, int], slow: float,
               draw: random.Random, old: Path | None = None) -> list[str]:
    """Starts the run again after each kill, until it ends: with --resume, or with --overwrite while the directory holds
    the run ``old``.

    A kill comes during the start, or when train.csv has a random number of bytes between the two ``sizes``, or in the
    next save after that; with ``old`` also in the first save, which replaces it.

    -> for each kill the last epoch in the CSVs, and "saving" if a file was being written; "ended" if it came too late
    """
    csv = save / "train.csv"
    seen = []
    for session in range(kills + 1):
        flag = "--overwrite" if is_old(save, old) else "--resume"
        pid = start([*argv, flag, "--save", str(save)], slow, save.with_suffix(".log"))
        if session < kills:
            where = draw.choice(["start", "step", "step", "save", "save"] if slow else ["start", "step", "step"])
            if flag == "--overwrite":
                where = draw.choice(["start", "first save", "first save", "step"])
            if where in ("step", "save"):
                wait_until(lambda: not is_old(save, old), pid)
                written = 0 if flag == "--overwrite" else min(len(content(csv)), sizes[1])  # an old one may be longer
                byte = draw.randint(max(sizes[0], written), sizes[1])
                wait_until(lambda byte=byte: len(content(csv)) >= byte, pid)
            if where in ("save", "first save"):
                wait_until(lambda: is_saving(save), pid)
            time.sleep(draw.uniform(0, 8 * slow if "save" in where else 0.2))
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            return seen + (["ended"] if session < kills else [])
        if status != -signal.SIGKILL:
            raise SystemExit(f"exit status {status}: {save.with_suffix('.log').read_text()}")
        seen.append(f"{last_epoch(save)}{' saving' if is_saving(save) else ''}")
        if old:
            seen[-1] += " of the old run" if is_old(save, old) else ""
            check_overwritten(save, old)
    return seen


def last_epoch(save: Path) -> int:
    rows = [file.read_bytes().count(b"\n") - 1 for file in (save / "test.csv", save / "val.csv") if file.exists()]
    return max(rows, default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50, help="runs (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=3, help="kills per run (default: %(default)s)")
    parser.add_argument("--nEpochs", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=1000, help="training images, at most 1000 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kills' moments (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    draw = random.Random(args.seed)
    same = kills = in_save = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = str(SAMPLE) if args.images == 1000 else cut_sample(root / "images", args.images)
        argv = ["--data", images, *SMALL, "--dropRate", "0.1"]
        validated = [*argv, "--valSize", str(args.images // 10)]
        size = run_whole(argv, root / "whole", args.nEpochs)
        ended = run_whole(validated, root / "validated", args.nEpochs)
        old = shutil.copytree(root / "validated", root / "old")
        prolonged = run_whole(validated, root / "validated", args.nEpochs + 1)
        for i in range(1, args.n + 1):
            save, slow = root / f"run{i}", 0.03 * (i % 2)
            to_whole = [*argv, "--nEpochs", str(args.nEpochs)], save, args.kills, (0, size), slow, draw
            reference, different = root / "whole", []
            if i % 5 == 0:
                shutil.copytree(old, save)
                seen = ["overwriting"]
                try:
                    seen += run_killed(*to_whole, old)
                except Lost as error:
                    different = [str(error)]
            elif i % 3 == 0:
                reference = root / "validated"
                seen = run_killed([*validated, "--nEpochs", str(args.nEpochs)], save, args.kills // 2, (0, ended), slow,
                                  draw)
                seen.append("prolonged")
                seen += run_killed([*validated, "--nEpochs", str(args.nEpochs + 1)], save, args.kills - args.kills // 2,
                                   (ended + 1, prolonged), slow, draw)
            else:
                seen = run_killed(*to_whole)
            left = [name for name in ("val.csv", "best.pth") if (save / name).exists() > (reference / name).exists()]
            different = different or left or differences(reference, save)
            same += not different
            kills += sum(text[0].isdigit() for text in seen)
            in_save += sum("saving" in text for text in seen)
            result = f"different: {' '.join(different[:5])}" if different else "identical"
            print(f"run {i}: killed after epoch {', '.join(seen)}: {result}", flush=True)
    print(f"{same} of {args.n} identical, after {kills} kills, {in_save} of them in the middle of a write")
    return 0 if same == args.n else 1


def run_whole(argv: list[str], save: Path, nEpochs: int) -> int:
    """Runs train.py without a kill. -> bytes of its train.csv"""
    run_killed([*argv, "--nEpochs", str(nEpochs)], save, 0, (0, 0), 0, random.Random())
    return (save / "train.csv").stat().st_size


if __name__ == "__main__":
    sys.exit(main())

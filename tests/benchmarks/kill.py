#!/usr/bin/env python3
"""Kills training at random moments, repeats the same command until it ends, and compares with the uninterrupted run.

    tests/benchmarks/kill.py --n 50

Prints a line for each run and a summary. Exit status: 0 if every tensor of the checkpoints and every byte of the CSVs
is the same in all runs, 1 otherwise. The runs write slowly, so that many kills hit the middle of a save. Every third
run has validation images; after its end it continues for one more epoch, in which it is killed again. Every fifth run
overwrites an old one: after each kill the directory must hold the old run whole or a checkpoint of the new one.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch
from common import SAMPLE, SMALL, cut_sample, differences

import train
from densenet import read_checkpoint

EPOCHS, KILLS = 4, 3  # of each run


def write_slowly(seconds: float = 0.03) -> None:
    """Adds a pause of ``seconds`` before and after each step of a save."""
    def slowed(function):
        def call(*args, **kwargs):
            time.sleep(seconds)
            result = function(*args, **kwargs)
            time.sleep(seconds)
            return result
        return call

    for name in ("fsync", "replace"):
        setattr(os, name, slowed(getattr(os, name)))


def start(argv: list[str], log: Path) -> int:
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
        write_slowly()
        status = train.main(argv)
    finally:
        os._exit(status)


def is_saving(run: Path) -> bool:
    return any(p.name.endswith(".tmp") for p in run.iterdir()) if run.is_dir() else False


def wait_for_save(run: Path, pid: int) -> None:
    """Waits until a file is being written, or the process has ended."""
    while not is_saving(run) and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.2))


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def is_old(save: Path, old: Path | None) -> bool:
    """Whether the directory still has the checkpoint of the run that is to be overwritten."""
    return old is not None and content(save / "latest.pth") == content(old / "latest.pth")


def check_overwritten(save: Path, old: Path) -> None:
    """Ends this program unless the directory holds the old run whole, or a checkpoint of the new one."""
    if not is_old(save, old):
        read_checkpoint(save / "latest.pth")  # raises an error if it is missing or damaged
    elif changed := [p.name for p in (*old.glob("*.csv"), old / "best.pth") if content(save / p.name) != content(p)]:
        raise SystemExit(f"latest.pth is still the old run's, but not {', '.join(changed)}")


def run_killed(argv: list[str], save: Path, kills: int, seconds: float, old: Path | None = None) -> list[str]:
    """Starts the run again after each kill, until it ends: with --resume, or with --overwrite while the directory holds
    the run ``old``. A kill comes at a random moment of the first ``seconds``, half of them in the next save after that.

    -> for each kill the last epoch in the CSVs, and "saving" if a file was being written
    """
    seen = []
    while True:
        flag = "--overwrite" if is_old(save, old) else "--resume"
        pid = start([*argv, flag, "--save", str(save)], save.with_suffix(".log"))
        if len(seen) < kills:
            time.sleep(random.uniform(0, seconds))
            if random.random() < 0.5:
                wait_for_save(save, pid)
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            return seen
        if status != -signal.SIGKILL:
            raise SystemExit(f"exit status {status}: {save.with_suffix('.log').read_text()}")
        seen.append(f"{last_epoch(save)}{' saving' if is_saving(save) else ''}")
        if old:
            seen[-1] += " of the old run" if is_old(save, old) else ""
            check_overwritten(save, old)


def last_epoch(save: Path) -> int:
    rows = [file.read_bytes().count(b"\n") - 1 for file in (save / "test.csv", save / "val.csv") if file.exists()]
    return max(rows, default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=50, help="runs (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1000, help="training images, at most 1000 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of a run (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    same = kills = in_save = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = str(SAMPLE) if args.images == 1000 else cut_sample(root / "images", args.images)
        argv = ["--data", images, *SMALL, "--dropRate", "0.1", "--nEpochs", str(EPOCHS)]
        validated = [*argv, "--valSize", str(args.images // 10)]
        longer = [*validated, "--nEpochs", str(EPOCHS + 1)]
        started = time.monotonic()
        run_killed(argv, root / "whole", 0, 0)
        seconds = (time.monotonic() - started) / 2
        run_killed(validated, root / "validated", 0, 0)
        old = shutil.copytree(root / "validated", root / "old")
        run_killed(longer, root / "validated", 0, 0)
        for i in range(1, args.n + 1):
            save, reference = root / f"run{i}", root / "whole"
            if i % 5 == 0:
                shutil.copytree(old, save)
                seen = ["overwriting", *run_killed(argv, save, KILLS, seconds, old)]
            elif i % 3 == 0:
                reference = root / "validated"
                seen = run_killed(validated, save, 1, seconds)
                seen += ["prolonged", *run_killed(longer, save, KILLS - 1, seconds)]
            else:
                seen = run_killed(argv, save, KILLS, seconds)
            left = [name for name in ("val.csv", "best.pth") if (save / name).exists() > (reference / name).exists()]
            different = left or differences(reference, save)
            same += not different
            kills += sum(text[0].isdigit() for text in seen)
            in_save += sum("saving" in text for text in seen)
            result = f"different: {' '.join(different[:5])}" if different else "identical"
            print(f"run {i}: killed after epoch {', '.join(seen)}: {result}", flush=True)
    print(f"{same} of {args.n} identical, after {kills} kills, {in_save} of them in the middle of a write")
    return 0 if same == args.n else 1


if __name__ == "__main__":
    sys.exit(main())

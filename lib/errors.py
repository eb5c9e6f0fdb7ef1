"""Reports the errors that a user can cause or fix, in one line on stderr."""

import shlex

import torch

from lib.cli import first_line, tell
from lib.cuda_graph import CaptureFailed
from lib.device import is_out_of_memory
from lib.distributed import World, is_peer_failure
from lib.run_directory import Run


def report(error: Exception, run: Run | None, world: World) -> int:
    """Prints an error that a user can cause or fix, and raises any other again. -> the exit status

    Ranks above 0 leave some errors to rank 0: those before the process group starts, and that a rank has ended.
    """
    hint = how_to_continue(run, world)
    if is_out_of_memory(error):
        reason = "out of memory; a new run with a smaller --batchSz, or with --efficient max, needs less"
    elif isinstance(error, (FloatingPointError, CaptureFailed)):  # no hint: --resume would fail again
        reason = str(error)
    elif isinstance(error, ValueError):
        reason = f"{error}{hint}"
    elif isinstance(error, OSError):
        reason = f"{error.filename}: {error.strerror}{hint}" if error.filename else f"{error}{hint}"
    elif isinstance(error, torch.AcceleratorError):
        reason = f"{first_line(error)}{hint}"
    elif world.size > 1 and is_peer_failure(error):
        reason = f"another process has ended{hint}" if world.rank == 0 else None
    else:
        raise error
    if world.rank == 0:
        tell(f"error: {reason}")
    elif reason and torch.distributed.is_initialized():
        tell(f"error: rank {world.rank}: {reason}")
    return 1 if world.rank > 0 or (run is not None and run.begun) else 2


def how_to_continue(run: Run | None, world: World) -> str:
    """-> the end of a message: the command that continues the run, or "" if there is nothing to continue"""
    if run is None or not run.begun:
        return ""
    command = "the same command with --resume"
    if world.size == 1:
        command = f"./train.py --save {shlex.quote(str(run.path))} --resume"
    return f"; {command} continues from the last epoch saved"

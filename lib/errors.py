"""Which errors a user can cause or mend, and the one line that tells of them."""

import shlex

import torch

from lib.cli import first_line, tell
from lib.cuda_graph import CaptureFailed
from lib.device import is_out_of_memory
from lib.distributed import World, is_peer_failure
from lib.run_directory import Run


def report(error: Exception, run: Run | None, world: World) -> int:
    """Prints in one line what a user can cause or mend. -> the exit status; any other error is raised again

    Other ranks print nothing for errors that rank 0 also reports: a wrong command line, a rank that has ended.
    """
    begun = run is not None and run.begun
    hint = how_to_continue(run, world)
    if is_out_of_memory(error):
        reason = "out of memory; a new run with a smaller --batchSz, or with --efficient max, needs less"
    elif isinstance(error, (FloatingPointError, CaptureFailed)):  # it would happen again
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
    return 1 if begun or world.rank > 0 else 2


def how_to_continue(run: Run | None, world: World) -> str:
    if run is None or not run.begun:
        return ""
    command = f"./train.py --save {shlex.quote(str(run.path))} --resume" if world.size == 1 else (
        "the same command with --resume")
    return f"; {command} continues from the last epoch saved"

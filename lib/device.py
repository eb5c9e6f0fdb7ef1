"""The training device and its settings."""

import argparse
import contextlib
import ctypes
import os
import platform

import torch

from lib.distributed import World


def choose_device(args: argparse.Namespace, world: World) -> torch.device:
    """Raises ValueError for a device that does not exist here, or that several ranks cannot share."""
    gpus = torch.cuda.device_count()  # does not start CUDA
    if gpus and not args.no_cuda and args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"there are {gpus} GPUs, but torch {torch.__version__} cannot use them: the driver may be "
                         "too old for its CUDA; update the driver, install another torch, or train with --no-cuda")
    if world.size > 1 and args.device in (None, "cuda") and gpus and not args.no_cuda:
        if gpus < world.local_size:
            raise ValueError(f"--nproc-per-node {world.local_size} is more than the {gpus} GPUs here; use at most "
                             f"{gpus}, or --no-cuda")
        return torch.device("cuda", world.local_rank)
    if args.device is None:
        return torch.device("cuda:0" if gpus and not args.no_cuda else "cpu")
    valid = ["cpu"]
    if gpus:
        valid += ["cuda", *(f"cuda:{i}" for i in range(gpus))]
    if torch.backends.mps.is_available():
        valid.append("mps")
    if args.device not in valid:
        raise ValueError(f"--device {args.device!r} does not exist here; valid are {', '.join(valid)}")
    if world.size > 1 and args.device != "cpu":
        raise ValueError(f"--device {args.device} for {world.size} processes; valid are cpu, cuda")
    return torch.device("cuda:0" if args.device == "cuda" else args.device)


def set_up_device(args: argparse.Namespace, world: World) -> torch.device:
    """Applies --deterministic and --precision. -> the device

    Raises:
        ValueError: as choose_device, or for a precision that the device does not have.
    """
    device = choose_device(args, world)
    if args.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"--precision tf32 needs a GPU; valid on {device} are fp32, bf16")
    if args.precision != "fp32" and device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:  # bf16 convolutions are slow loops there, and tf32 is silently fp32
            raise ValueError(f"--precision {args.precision} needs a GPU of compute capability 8.0; "
                             f"{torch.cuda.get_device_name(device)} has {major}.{minor}: valid is fp32")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic  # shapes are few: worth trying all algorithms
    tf32 = args.precision == "tf32"  # cuDNN's own default is True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise libraries open a context on GPU 0
    else:
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that a step frees, for the next step. Otherwise the operating system clears each page
    before its next use: a tenth of the time of BC 100-12 on a CPU. Costs up to a fifth more memory."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: glibc's own upper limit for it
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in an allocator of torch or, on a GPU, in CUDA itself, cuBLAS or cuDNN."""
    messages = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in messages)

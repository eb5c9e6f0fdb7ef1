"""Reading a folder of images, a subfolder for each class, into memory."""

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from lib.image_set import DataError, ImageSet, reason, shorten


def load_folder(root: Path, imageSize: int) -> tuple[ImageSet, ImageSet]:
    """Images in root/train/<class>/ and root/test/<class>/ (or root/val/), in the order of their names.

    One channel if all of them are grayscale, three otherwise. Files of other kinds and hidden ones are ignored.
    """
    train = root / "train"
    test = root / "val" if (root / "val").is_dir() and not (root / "test").is_dir() else root / "test"
    for folder, valid in ((train, "train"), (test, "test or val")):
        if not folder.is_dir():
            raise DataError(f"{root} has no folder {valid}; valid are {root}/train/<class>/ and {root}/test/<class>/")
    classes = visible(train, Path.is_dir)
    if len(classes) < 2:
        raise DataError(f"{train} has {len(classes)} class folders ({', '.join(classes)}); valid are two or more")
    if different := {*classes} ^ {*visible(test, Path.is_dir)}:
        raise DataError(f"{train} and {test} need the same classes; in only one: {shorten(sorted(different))}")
    files = [(path, label) for folder in (train, test) for label, name in enumerate(classes)
             for path in image_files(folder / name)]
    check_memory(len(files), imageSize)
    images, labels = decode([path for path, _ in files], imageSize), torch.tensor([label for _, label in files])
    n = sum(path.is_relative_to(train) for path, _ in files)
    return ImageSet(images[:n], labels[:n], classes), ImageSet(images[n:], labels[n:], classes)


def visible(folder: Path, wanted: Callable[[Path], bool]) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and wanted(p))


def image_files(folder: Path) -> list[Path]:
    names = visible(folder, lambda path: path.suffix.lower() in IMG_EXTENSIONS
                    and not path.is_dir() and not path.is_fifo())  # to read a pipe is to wait for ever
    if not names:
        raise DataError(f"{folder} has no image; valid endings are {', '.join(IMG_EXTENSIONS)}")
    return [folder / name for name in names]


def check_memory(n: int, imageSize: int) -> None:
    """Of the whole machine: what is free now does not count the files that the system can drop from its cache."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's, on this machine: each has the images
    processes = int(processes) if processes.isdecimal() else 1
    needed = 2 * processes * n * 3 * imageSize ** 2  # decoded, and as Batches has them
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise DataError(f"{n} images of {imageSize}x{imageSize} pixels need {needed / 1e9:.1f} GB of memory; this "
                        f"machine has {available / 1e9:.1f} GB")


def decode(files: list[Path], imageSize: int) -> torch.Tensor:
    """-> uint8 (N, C, imageSize, imageSize)"""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd palettes and sizes: what counts is that it decodes
    images, gray = torch.empty(len(files), 3, imageSize, imageSize, dtype=torch.uint8), True
    with ThreadPoolExecutor() as pool:  # PIL decodes and resizes without Python's lock
        decoded = pool.map(lambda path: decode_image(path, imageSize), files)
        for image, one in zip(images, tqdm(decoded, "decoding", len(files), leave=False, disable=None), strict=True):
            image.copy_(one)  # a single channel into all three
            gray &= len(one) == 1
    return images[:, :1].contiguous() if gray else images


def decode_image(path: Path, imageSize: int) -> torch.Tensor:
    """-> uint8 (1 or 3, imageSize, imageSize): upright, the shorter side resized, the middle of the longer one.

    By PIL: torchvision.io's decoders are deprecated (since 0.29), and read no bmp, tiff, ppm or pgm.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            image = image.convert("L" if Image.getmodebase(image.mode) == "L" else "RGB")
            return pil_to_tensor(ImageOps.fit(image, (imageSize, imageSize), Image.Resampling.BILINEAR))  # antialiased
    except Exception as error:  # PIL's decoders raise SyntaxError, struct.error and others
        raise DataError(f"{path} cannot be decoded ({reason(error)})") from error

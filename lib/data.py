"""Reads images into memory: ``train, test = load("cifar10", "data")``.

CIFAR and SVHN are read by torchvision, CIFAR-10's binary version and folders of pictures here.
"""

import contextlib
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, ImageFolder, VisionDataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from lib.cli import first_line, warn
from lib.flags import DATASETS

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BINARY_FOLDER = "cifar-10-batches-bin"
RECORD = 1 + 3 * 32 * 32  # bytes of an image in the binary version: label and pixels
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")  # Pillow reads more, but starts Ghostscript for PostScript


class DataError(ValueError):
    """Data are missing or damaged, or what was asked of them is impossible; the message is one line."""


class Images(NamedTuple):
    pixels: torch.Tensor  # uint8 (N, C, H, W)
    labels: torch.Tensor  # int64 (N,), each an index into classes
    classes: list[str]
    files: list[str] | None = None  # of a folder of pictures: each image's path below --data

    def select(self, names: list[str]) -> "Images":
        """-> the images of these classes only; label i is class ``names[i]``

        Raises:
            DataError: if a name is unknown, repeated or has no image, or if there are fewer than two names.
        """
        counts = self.labels.bincount(minlength=len(self.classes)).tolist()
        check_names(names, [name for name, n in zip(self.classes, counts, strict=True) if n])
        new_label = torch.full((len(self.classes),), -1)
        new_label[[self.classes.index(name) for name in names]] = torch.arange(len(names))
        labels = new_label[self.labels]
        return self._replace(labels=labels, classes=names).keep(labels >= 0)

    def hold_out(self, n: int, seed: int) -> tuple["Images", "Images"]:
        """-> the images to train on, and n validation images; both keep their order

        Stratified: a class has the same share of the n images as of all, to within one image. The random numbers come
        from a private generator, so that torch's global one stays as it is.

        Raises:
            DataError: if n is less than 1, or leaves a class without an image to train on.
        """
        counts = self.labels.bincount(minlength=len(self.classes))
        held, rest = counts * n // counts.sum(), counts * n % counts.sum()
        held[rest.argsort(descending=True, stable=True)[:n - held.sum()]] += 1  # of the largest remainders
        if n < 1 or (held >= counts)[counts > 0].any():
            raise DataError(f"{n} of {len(self.labels)} training images cannot be held out; valid are 1 and more, as "
                            "long as each class keeps an image to train on")
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        labels = self.labels[order]
        is_held = torch.zeros_like(labels, dtype=torch.bool)
        for label, n_held in enumerate(held.tolist()):
            is_held[order[labels == label][:n_held]] = True
        return self.keep(~is_held), self.keep(is_held)

    def keep(self, is_kept: torch.Tensor) -> "Images":
        """-> the images for which ``is_kept``, bool (N,), is true"""
        files = self.files and list(compress(self.files, is_kept.tolist()))
        return Images(self.pixels[is_kept], self.labels[is_kept], self.classes, files)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """-> each channel's mean and standard deviation over all pixels, in [0, 1]; deviation 1 if it is constant"""
        levels = torch.arange(256, dtype=torch.float64) / 255
        means, stds = [], []
        for channel in self.pixels.unbind(1):
            frequency = channel.flatten().bincount(minlength=256).double()  # a histogram: the order does not matter
            frequency /= frequency.sum()
            mean = (frequency * levels).sum()
            means.append(mean.item())
            stds.append((frequency * (levels - mean) ** 2).sum().sqrt().item() or 1.0)
        return means, stds

    def with_channels(self, n: int) -> "Images":
        """-> the images with as many channels as the network takes; grayscale images are repeated in each channel

        Raises:
            DataError: if the images are in colour and the network takes grayscale.
        """
        have = self.pixels.shape[1]
        if have not in (1, n):
            raise DataError(f"the images have {have} channels, the network takes {n}; valid are grayscale images")
        return self._replace(pixels=self.pixels.expand(-1, n, -1, -1))  # a view: takes no memory


def load(dataset: str, root: str | Path, parts: Sequence[str] = ("train", "test"), *, extra: bool = False,
         imageSize: int = 32, classes: list[str] | None = None, download: bool = True) -> list[Images]:
    """-> for each of ``parts``, "train" or "test", its images

    Args:
        dataset: one of DATASETS
        root: the data set's own folder or its parent; of pictures the folder that has train/CLASS/ and test/CLASS/
        extra: add SVHN's 531,131 extra images to the training images
        imageSize: height and width in pixels that pictures are resized to
        classes: read these classes only; label i is class ``classes[i]``
        download: download CIFAR or SVHN into ``root`` if it is not there

    Raises:
        DataError: if the data are missing, damaged, too large for the memory, or cannot be downloaded.
    """
    root = Path(root)
    try:
        if dataset == "folder":
            return load_folder(root, parts, imageSize, classes)
        if dataset == "svhn":
            images = load_svhn(root, parts, extra, download)
        elif dataset == "cifar10" and (folder := binary_folder(root)):
            images = load_binary(folder, parts)
        elif dataset in ("cifar10", "cifar100"):
            images = load_cifar(CIFAR10 if dataset == "cifar10" else CIFAR100, root, parts, download)
        else:
            raise DataError(f"{dataset} is not a data set; valid are {', '.join(DATASETS)}")
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read ({error.strerror or first_line(error)})") from error
    return images if classes is None else [part.select(classes) for part in images]


# --- CIFAR and SVHN ---------------------------------------------------------------------------------------------

def load_cifar(reader: type[CIFAR10], root: Path, parts: Sequence[str], download: bool) -> list[Images]:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 RGB images of 32x32, in torchvision's python version."""
    folder = root.parent if root.name == reader.base_folder else root
    found = [torchvision_set(reader, folder, reader.base_folder, download, train=part == "train") for part in parts]
    return [Images(torch.from_numpy(f.data).permute(0, 3, 1, 2), torch.tensor(f.targets), f.classes) for f in found]


def load_svhn(root: Path, parts: Sequence[str], extra: bool, download: bool) -> list[Images]:
    """Street View House Numbers (Netzer et al. 2011): 73,257 + 26,032 RGB digits of 32x32; 531,131 extra ones."""
    try:
        import scipy.io  # noqa: F401  torchvision reads MATLAB's format with it
    except ImportError as error:
        raise DataError("--dataset svhn needs scipy: pip install 'densenet-pytorch[svhn]'") from error
    splits = {"train": ["train", "extra"] if extra else ["train"], "test": ["test"]}
    images = []
    for part in parts:
        found = [torchvision_set(SVHN, root, SVHN.split_list[s][1], download, split=s) for s in splits[part]]
        pixels, labels = (np.concatenate([getattr(f, name) for f in found]) for name in ("data", "labels"))
        images.append(Images(torch.from_numpy(pixels), torch.from_numpy(labels), list("0123456789")))
    return images


def torchvision_set(reader: type[VisionDataset], root: Path, name: str, download: bool, **part: Any) -> VisionDataset:
    """-> torchvision's data set of root/name, downloaded if it is not there or has other than the published MD5 sums

    Raises:
        DataError: if it cannot or must not be downloaded, or if ``root`` is a folder of pictures.
    """
    with contextlib.suppress(RuntimeError, OSError):  # of files that are missing, damaged or not readable
        return reader(root, **part)
    if class_names(root / "train"):
        raise DataError(f"{root} is a folder of pictures, with {root}/train/CLASS/; read it with --dataset folder")
    failure = ""
    try:
        if download:
            socket.setdefaulttimeout(30)  # seconds without a byte; the default waits for ever
            with contextlib.redirect_stdout(sys.stderr):
                return reader(root, download=True, **part)
    except Exception as error:  # torchvision, urllib, tarfile and the file system raise many kinds
        failure = f", and its download failed ({first_line(error)})"
    valid = f"{BINARY_FOLDER} or {name}" if reader is CIFAR10 else name
    raise DataError(f"no {reader.__name__} with the published MD5 sums in {root}{failure}; put {valid} there, or try "
                    "the built-in sample: ./train.py --data tests/cifar10-sample --depth 22 --nEpochs 10 "
                    "--save work/sample")


# --- CIFAR-10's binary version ----------------------------------------------------------------------------------

def binary_folder(root: Path) -> Path | None:
    """-> root, or its folder of that name, if it has files of the binary version"""
    return next((folder for folder in (root, root / BINARY_FOLDER) if any(folder.glob("*_batch*.bin"))), None)


def load_binary(folder: Path, parts: Sequence[str]) -> list[Images]:
    """data_batch_1.bin to data_batch_5.bin (a smaller set of this layout may have fewer) and test_batch.bin"""
    n = len(list(folder.glob("data_batch_[1-5].bin"))) or 1
    names = {"train": [f"data_batch_{i}.bin" for i in range(1, n + 1)], "test": ["test_batch.bin"]}
    images = []
    for part in parts:
        records = torch.cat([read_records(folder / name) for name in names[part]])
        images.append(Images(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long(), CIFAR10_CLASSES))
    return images


def read_records(file: Path) -> torch.Tensor:
    """-> uint8 (n, RECORD): of each image the label, then the red, green and blue planes of 32x32 bytes"""
    content = np.fromfile(file, dtype=np.uint8)
    if content.size == 0 or content.size % RECORD:
        raise DataError(f"{file} has {content.size} bytes; valid is a multiple of {RECORD}, the size of a record")
    records = torch.from_numpy(content).view(-1, RECORD)
    if (label := records[:, 0].max()) > 9:
        raise DataError(f"{file} has the label {label}; valid are 0 to 9")
    return records


# --- a folder of pictures ---------------------------------------------------------------------------------------

def load_folder(root: Path, parts: Sequence[str], imageSize: int, classes: list[str] | None) -> list[Images]:
    """The pictures in root/train/CLASS/ and root/test/CLASS/, or root/val/CLASS/ where test has no classes.

    Subfolders of a class are included. The images have one channel if all of them are grayscale, else three.
    """
    folders = [root / "train" if part == "train" else choose_test_folder(root) for part in parts]
    names = [class_names(folder) for folder in folders]
    if len(names[0]) < 2:
        raise DataError(f"{folders[0]} has {len(names[0])} class folders; valid are two or more")
    if classes is None:
        classes = names[0]
        if different := set(names[0]) ^ set(names[-1]):
            raise DataError(f"{folders[0]} and {folders[-1]} need the same classes; in only one: "
                            f"{shorten(sorted(different))}")
    check_names(classes, names[0])
    found = [PictureFolder(folder, classes) for folder in folders]
    if (n := sum(part.passed_over for part in found)) and os.environ.get("RANK", "0") == "0":  # once under torchrun
        warn(f"{n} files in the class folders of {root} are passed over, as by their endings they are no pictures")
    files = [Path(path).relative_to(root).as_posix() for part in found for path, _ in part.samples]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine under torchrun: each holds all images
    needed = 2 * ranks * len(files) * 3 * imageSize ** 2  # bytes: the decoded images, and their copy in Batches
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise DataError(f"{len(files)} images of {imageSize}x{imageSize} pixels need {needed / 1e9:.1f} GB of memory; "
                        f"this machine has {available / 1e9:.1f} GB")
    pixels = decode(root, files, imageSize)
    images, start = [], 0
    for part in found:
        i = slice(start, start + len(part.samples))
        images.append(Images(pixels[i], torch.tensor([label for _, label in part.samples]), classes, files[i]))
        start = i.stop
    return images


def choose_test_folder(root: Path) -> Path:
    """-> root/test; root/val if only that has classes, as in Kaggle's layout"""
    test, val = root / "test", root / "val"
    return val if len(class_names(test)) < 2 <= len(class_names(val)) else test


def class_names(folder: Path) -> list[str]:
    """-> the names of the class folders in it, sorted; none if it does not exist"""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


class PictureFolder(ImageFolder):
    """The files in folder/CLASS/ and below that are pictures by their endings; ``classes[i]`` has label i.

    Names that begin with a dot are skipped. ``samples``, (path, label) of each picture, are sorted by path.

    Raises:
        DataError: if a class has no picture.
    """

    def __init__(self, folder: Path, classes: list[str]):
        self.chosen, self.passed_over = classes, 0
        self.endings = tuple(ending for ending, name in Image.registered_extensions().items() if name in FORMATS)
        super().__init__(str(folder), is_valid_file=self.is_picture, allow_empty=True)
        self.samples.sort(key=lambda sample: sample[0].split(os.sep))
        if empty := set(range(len(classes))) - {label for _, label in self.samples}:
            raise DataError(f"{folder / classes[min(empty)]} has no picture; valid endings are "
                            f"{', '.join(sorted(self.endings))}")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return self.chosen, {name: label for label, name in enumerate(self.chosen)}

    def is_picture(self, path: str) -> bool:
        """Called once for each file; counts those that are passed over."""
        if f"{os.sep}." in path.removeprefix(self.root):
            return False
        is_picture = path.lower().endswith(self.endings)
        self.passed_over += not is_picture
        return is_picture


def decode(root: Path, files: list[str], imageSize: int) -> torch.Tensor:
    """-> uint8 (N, C, imageSize, imageSize); C is 1 if all pictures are grayscale, else 3

    Raises:
        DataError: if pictures cannot be read; the message names the first 20 and gives their number.
    """
    pixels = torch.empty(len(files), 3, imageSize, imageSize, dtype=torch.uint8)
    modes: set[str] = set()
    errors: dict[int, str] = {}

    def read(i: int) -> None:
        try:
            picture = read_picture(root / files[i], imageSize)
            modes.add(picture.mode)
            pixels[i] = pil_to_tensor(picture)  # a single channel is copied into all three
        except UnidentifiedImageError:
            errors[i] = f"not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        except Exception as error:  # Pillow's decoders raise many kinds
            errors[i] = first_line(error)

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without Python's lock
        warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd palettes and metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        list(tqdm(pool.map(read, range(len(files))), "decoding", len(files), leave=False, disable=None))
    if errors:
        named = shorten([f"{files[i]} ({errors[i]})" for i in sorted(errors)])
        raise DataError(f"{len(errors)} of {len(files)} pictures in {root} cannot be read: {named}")
    return pixels[:, :1].contiguous() if modes == {"L"} else pixels


def read_picture(path: Path, imageSize: int) -> Image.Image:
    """-> the picture turned upright, cropped to the middle square and resized; mode "L" if it is grayscale, else "RGB"

    Raises:
        ValueError: if it has more than 8 bits a channel, which Pillow would clip at 255; many kinds if it is damaged.
    """
    with Image.open(path, formats=FORMATS) as picture:
        if picture.mode[0] in "FI":
            raise ValueError(f"mode {picture.mode}; valid are pictures of 8 bits a channel")
        picture.load()  # only the first access to a damaged picture raises an error
        with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse the picture
            ImageOps.exif_transpose(picture, in_place=True)
        mode = "L" if Image.getmodebase(picture.mode) == "L" else "RGB"
        return ImageOps.fit(picture.convert(mode), (imageSize, imageSize), Image.Resampling.BILINEAR)  # antialiased


# --- what several use -------------------------------------------------------------------------------------------

def check_names(names: list[str], valid: list[str]) -> None:
    """Raises DataError if ``names`` are not two or more different ones of the valid classes."""
    for name in names:
        if name not in valid:
            raise DataError(f"class {name} is unknown or has no image; valid are {shorten(valid)}")
        if names.count(name) > 1:
            raise DataError(f"class {name} is named twice; valid are {shorten(valid)}")
    if len(names) < 2:
        raise DataError(f"classes {names} are fewer than two; valid are two or more of {shorten(valid)}")


def shorten(names: list[str]) -> str:
    """-> the names in one line; after 20 of them only their number"""
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, ... ({len(names)} in all)"

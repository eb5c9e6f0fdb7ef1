"""Reads the data sets that train.py knows into memory. Reads the data sets that train.py knows into memory:
what batches.py, image_folder.py and image_set.py offer, too.

    train, test = data.load("cifar10", "data")
    batches = data.Batches(train, *data.mean_and_std(train.images), device)
    for images, labels, size in batches.augmented(data.draw(batches.n, seed=1, epoch=1), batchSz=64): ...
"""

import contextlib
import io
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from torchvision.datasets.utils import calculate_md5, download_url

from lib.batches import BORDERS, Augmentation, Batches, Stream, batch_sizes, draw, dropout_seed, epoch_seed
from lib.cli import first_line
from lib.image_folder import load_folder
from lib.image_set import (
    DataError,
    ImageSet,
    digest,
    hold_out,
    mean_and_std,
    select_classes,
    shorten,
    with_channels,
)

__all__ = ["BORDERS", "DATASETS", "Augmentation", "Batches", "DataError", "ImageSet", "Stream", "batch_sizes", "digest",
           "draw", "dropout_seed", "epoch_seed", "hold_out", "load", "load_test", "mean_and_std", "select_classes",
           "shorten", "with_channels"]

DATASETS = ("cifar10", "cifar100", "svhn", "folder")
Parts = tuple[str, ...]  # of "train" and "test"
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SVHN_FULL_BYTES = {"train": 182_040_794, "test": 64_275_384, "extra": 1_329_278_602}  # of the published files


class Cifar(NamedTuple):
    """The differences between CIFAR-10 and CIFAR-100."""

    title: str
    reader: type[CIFAR10]  # torchvision's class, which reads the python version
    folder: str  # of the binary version
    files: dict[str, tuple[int, str | None]]  # its files, their published bytes and MD5 sums; the test set is last
    labels: dict[str, int]  # a record's label bytes, and how many values each can have; the class is last


CIFAR = {
    "cifar10": Cifar("CIFAR-10", CIFAR10, "cifar-10-batches-bin", {
        "data_batch_1.bin": (30_730_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
        "data_batch_2.bin": (30_730_000, "5ea93a67294ea407fff1d09f752e9692"),
        "data_batch_3.bin": (30_730_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
        "data_batch_4.bin": (30_730_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
        "data_batch_5.bin": (30_730_000, "53f37980c15c3d472c316c40844f3f0d"),
        "test_batch.bin": (30_730_000, "803d5f7f4d78ea53de84dbe85f74fb6d")}, {"label": 10}),
    "cifar100": Cifar("CIFAR-100", CIFAR100, "cifar-100-binary", {  # an MD5 sum is published of its archive only
        "train.bin": (153_700_000, None), "test.bin": (30_740_000, None)}, {"coarse label": 20, "fine label": 100}),
}


def load(dataset: str, root: str, *, extra: bool = False, imageSize: int = 32,
         download: bool = True) -> tuple[ImageSet, ImageSet]:
    """Training and test images of one of DATASETS in directory ``root``, the set's own folder or its parent.

    Args:
        extra: add SVHN's 531,131 extra images to the training images
        imageSize: height and width in pixels that the images of a folder are resized to
        download: download CIFAR or SVHN into ``root`` if it is not there

    Raises:
        DataError: if the data are missing, damaged, too large for the memory, or cannot be downloaded.
    """
    train, test = load_parts(dataset, root, ("train", "test"), extra, imageSize, download)
    return train, test


def load_test(dataset: str, root: str, *, imageSize: int = 32, download: bool = True) -> ImageSet:
    """The test images alone, as ``load`` gives them; no training image is read, and none need be there.

    A folder's classes are those of its test folder, and its images have one channel if all test images are grayscale.
    """
    [test] = load_parts(dataset, root, ("test",), False, imageSize, download)
    return test


def load_parts(dataset: str, root: str, parts: Parts, extra: bool, imageSize: int,
               may_download: bool) -> list[ImageSet]:
    if dataset not in DATASETS:
        raise DataError(f"{dataset} is no data set; valid are {', '.join(DATASETS)}")
    folder = Path(root)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--data {root} is not a directory")
    if dataset == "folder":
        return load_folder(folder, imageSize, parts)
    if dataset == "svhn":
        return load_svhn(folder, parts, extra, may_download)
    return load_cifar(CIFAR[dataset], folder, parts, may_download)


# --- CIFAR-10 and CIFAR-100 -------------------------------------------------------------------------------------

def load_cifar(kind: Cifar, root: Path, parts: Parts, may_download: bool) -> list[ImageSet]:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 RGB images of 32x32, binary or python version."""
    for folder in (root, root / kind.folder):
        if any((folder / name).exists() for name in kind.files):
            return read_cifar_binary(kind, folder, parts)
    base = kind.reader.base_folder
    for folder in (root, root / base):
        if folder.name == base and folder.is_dir():
            return read_cifar_python(kind, folder, parts)
    download(kind.title, root, base, lambda folder: kind.reader(folder, download=True), f"{kind.folder} or {base}",
             may_download)
    return read_cifar_python(kind, root / base, parts)


def read_cifar_python(kind: Cifar, folder: Path, parts: Parts) -> list[ImageSet]:
    """The pickled version, which torchvision reads; only files with the published MD5 sums are unpickled."""
    class Reader(kind.reader):
        def _check_integrity(self) -> bool:  # torchvision's own reads the files of both parts
            return True

    lists = {"train": Reader.train_list, "test": Reader.test_list}
    files = [file for part in parts for file in lists[part]]
    for name, md5 in [*files, (Reader.meta["filename"], Reader.meta["md5"])]:
        if not (folder / name).exists():
            raise DataError(f"{folder / name} is missing; remove {folder} to download it again")
        check_md5(folder / name, md5, kind.title, folder)
    sets = [Reader(folder.parent, train=part == "train") for part in parts]
    return [ImageSet(torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets), s.classes) for s in sets]


def read_cifar_binary(kind: Cifar, folder: Path, parts: Parts) -> list[ImageSet]:
    """Files of records: the label bytes, then the red, green and blue planes.

    A smaller set of the same layout (fewer records, fewer batch files) is read as well.
    """
    *batches, test = kind.files
    sizes = {name: (folder / name).stat().st_size for name in kind.files if (folder / name).exists()}
    complete = any(size == kind.files[name][0] for name, size in sizes.items())
    if not complete:  # a smaller set: the batch files up to the last that is there
        last = max((i for i, name in enumerate(batches) if name in sizes), default=0)
        batches = batches[:last + 1]
    names = {"train": batches, "test": [test]}
    for name in [name for part in parts for name in names[part]]:
        if name not in sizes:
            raise DataError(f"{folder / name} is missing")
        if complete and sizes[name] != kind.files[name][0]:
            raise DataError(f"{folder / name} has {sizes[name]} bytes; valid are {kind.files[name][0]}: others of the "
                            "set are complete")
    classes = CIFAR10_CLASSES if kind.reader is CIFAR10 else read_names(folder / "fine_label_names.txt", 100)
    return [ImageSet(*join([read_records(kind, folder / name) for name in names[part]]), classes) for part in parts]


def join(pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(tensors) for tensors in zip(*pieces, strict=True)]


def read_records(kind: Cifar, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """-> images uint8 (n, 3, 32, 32) and labels int64 (n,)"""
    record = len(kind.labels) + 3 * 32 * 32  # bytes
    check_regular(path)
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if content.size == 0 or content.size % record:
        raise DataError(f"{path} has {content.size} bytes; valid is a multiple of {record}, the size of a record")
    full_size, md5 = kind.files[path.name]
    if md5 and content.size == full_size:
        check_md5(path, md5, kind.title, path.parent)
    records = torch.from_numpy(content).view(-1, record)
    for column, (name, values) in enumerate(kind.labels.items()):
        labels = records[:, column].long()
        check_labels(path, labels, values, name)
    return records[:, len(kind.labels):].reshape(-1, 3, 32, 32), labels


def read_names(path: Path, n: int) -> list[str]:
    check_regular(path)
    try:
        names = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)})") from error
    if len(set(names)) != n or len(names) != n:
        raise DataError(f"{path} has {len(names)} names, {len(set(names))} of them different; valid are {n}")
    return names


# --- SVHN -------------------------------------------------------------------------------------------------------

class SVHNFile(SVHN):
    """torchvision's reader without its MD5 check, which refuses smaller sets; read_svhn has a check of its own."""

    def _check_integrity(self) -> bool:
        return True


def load_svhn(root: Path, parts: Parts, extra: bool, may_download: bool) -> list[ImageSet]:
    """Street View House Numbers (Netzer et al. 2011): 73,257 + 26,032 RGB digits of 32x32; 531,131 extra ones."""
    try:
        import scipy.io  # noqa: F401  torchvision reads MATLAB's format with it
    except ImportError as error:
        raise DataError("--dataset svhn needs scipy: pip install 'densenet-pytorch[svhn]'") from error
    splits = {"train": ["train", "extra"] if extra else ["train"], "test": ["test"]}
    classes = [str(digit) for digit in range(10)]
    return [ImageSet(*join([read_svhn(root, split, may_download) for split in splits[part]]), classes)
            for part in parts]


def read_svhn(root: Path, split: str, may_download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One file -> images uint8 (n, 3, 32, 32) and labels int64 (n,); a smaller one of the same layout is read, too."""
    url, name, md5 = SVHN.split_list[split]
    path = root / name
    if not path.exists():
        download("SVHN", root, name, lambda folder: download_url(url, folder, name, md5), name, may_download)
    check_regular(path)
    if path.stat().st_size == SVHN_FULL_BYTES[split]:
        check_md5(path, md5, "SVHN", path)
    try:
        content = SVHNFile(root, split)
    except Exception as error:  # kinds of scipy, zlib and numpy
        raise DataError(f"{path} cannot be read ({first_line(error)})") from error
    images, labels = content.data, torch.from_numpy(content.labels).reshape(-1)
    if images.shape != (len(labels), 3, 32, 32) or images.dtype != np.uint8 or not len(labels):
        raise DataError(f"{path} has {len(labels)} labels and {images.dtype} images of shape {images.shape}; valid are "
                        "n labels and uint8 images of shape (n, 3, 32, 32), n at least 1")
    check_labels(path, labels, 10, "label")
    return torch.from_numpy(np.ascontiguousarray(images)), labels


# --- checks and download ----------------------------------------------------------------------------------------

def check_regular(path: Path) -> None:
    """A pipe would be waited for, and a device read, for ever."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} cannot be read (it is not a regular file)")


def check_labels(path: Path, labels: torch.Tensor, n: int, name: str) -> None:
    wrong = ((labels < 0) | (labels >= n)).nonzero()
    if len(wrong):
        at = wrong[0].item()
        raise DataError(f"{path}, record {at}: {name} {labels[at]}; valid is 0 to {n - 1}")


def check_md5(path: Path, md5: str, title: str, remove: Path) -> None:
    check_regular(path)
    if (found := calculate_md5(path)) != md5:
        raise DataError(f"{path} is damaged: its MD5 sum is {found}, {title}'s is {md5}; remove {remove} to download "
                        "it again")


def download(title: str, root: Path, name: str, fetch: Callable[[str], object], valid: str, allowed: bool) -> None:
    """Makes root/name, whole or not at all, by fetch(folder), which makes folder/name.

    Raises:
        DataError: if it is not ``allowed``, or fails.
    """
    if not allowed:
        raise DataError(f"no {title} in {root}; put {valid} there")
    parent = next(p for p in (root, *root.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as temporary, quiet_download():
            fetch(temporary)
            root.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / name).rename(root / name)
    except Exception as error:  # kinds of torchvision, urllib, tarfile and the file system
        raise DataError(
            f"no {title} in {root}, and its download failed ({first_line(error)}); put {valid} there, or try the "
            "built-in sample: ./train.py --data tests/cifar10-sample --depth 22 --nEpochs 10 --save work/sample"
        ) from error


@contextlib.contextmanager
def quiet_download() -> Iterator[None]:
    """Keeps torchvision from printing to stdout, and from waiting for a silent server for ever."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without a byte
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)

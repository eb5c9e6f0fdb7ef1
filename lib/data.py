"""Reads train.py's data sets into memory: ``train, test = data.load("cifar10", "data")``.

CIFAR and SVHN are read here, a folder of images in image_folder.py. The functions of image_set.py that work on what
was read, such as select_classes and mean_and_std, can be called through this module, too.
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

from lib.cli import first_line
from lib.image_folder import load_folder
from lib.image_set import DataError, ImageSet, digest, hold_out, mean_and_std, select_classes, with_channels

__all__ = ["DATASETS", "DataError", "ImageSet", "digest", "hold_out", "load", "load_test", "mean_and_std",
           "select_classes", "with_channels"]

DATASETS = ("cifar10", "cifar100", "svhn", "folder")
Parts = tuple[str, ...]  # ("train", "test") or ("test",): the sets to read
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SVHN_FULL_BYTES = {"train": 182_040_794, "test": 64_275_384, "extra": 1_329_278_602}  # published file sizes


class Cifar(NamedTuple):
    """The differences between CIFAR-10 and CIFAR-100."""

    title: str
    reader: type[CIFAR10]  # torchvision's class, which reads the python version
    folder: str  # name of the binary version's folder
    files: dict[str, tuple[int, str | None]]  # of that folder: name -> published size and MD5 sum; test file last
    labels: dict[str, int]  # label bytes at the start of a record -> number of valid values; the last is the class


CIFAR = {
    "cifar10": Cifar("CIFAR-10", CIFAR10, "cifar-10-batches-bin", {
        "data_batch_1.bin": (30_730_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
        "data_batch_2.bin": (30_730_000, "5ea93a67294ea407fff1d09f752e9692"),
        "data_batch_3.bin": (30_730_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
        "data_batch_4.bin": (30_730_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
        "data_batch_5.bin": (30_730_000, "53f37980c15c3d472c316c40844f3f0d"),
        "test_batch.bin": (30_730_000, "803d5f7f4d78ea53de84dbe85f74fb6d")}, {"label": 10}),
    "cifar100": Cifar("CIFAR-100", CIFAR100, "cifar-100-binary", {  # MD5 sums are published for the archive only
        "train.bin": (153_700_000, None), "test.bin": (30_740_000, None)}, {"coarse label": 20, "fine label": 100}),
}


def load(dataset: str, root: str, *, extra: bool = False, imageSize: int = 32,
         download: bool = True) -> tuple[ImageSet, ImageSet]:
    """-> training images and test images

    Args:
        dataset: one of DATASETS
        root: the data set's own folder or its parent
        extra: add SVHN's 531,131 extra images to the training images
        imageSize: height and width in pixels that the images of a folder are resized to
        download: download CIFAR or SVHN into ``root`` if it is not there

    Raises:
        DataError: if the data are missing, damaged, too large for the memory, or cannot be downloaded.
    """
    train, test = load_parts(dataset, root, ("train", "test"), extra, imageSize, download)
    return train, test


def load_test(dataset: str, root: str, *, imageSize: int = 32, download: bool = True) -> ImageSet:
    """-> the test images only; the training images need not exist. Arguments and errors are those of ``load``.

    With dataset "folder" the test folder alone gives the classes, and the images have one channel if all test images
    are grayscale.
    """
    [test] = load_parts(dataset, root, ("test",), False, imageSize, download)
    return test


def load_parts(dataset: str, root: str, parts: Parts, extra: bool, imageSize: int,
               may_download: bool) -> list[ImageSet]:
    if dataset not in DATASETS:
        raise DataError(f"{dataset} is not a data set; valid are {', '.join(DATASETS)}")
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
    """Reads the pickled files with torchvision. Only files with the published MD5 sums are unpickled."""
    class Reader(kind.reader):
        def _check_integrity(self) -> bool:  # torchvision's needs both sets; check_md5 checks ``parts``
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
    """Reads files of records: the label bytes, then the red, green and blue planes.

    A smaller data set of the same layout (fewer records, fewer batch files) is accepted, too.
    """
    *train_names, test_name = kind.files
    sizes = {name: (folder / name).stat().st_size for name in kind.files if (folder / name).exists()}
    is_full = any(size == kind.files[name][0] for name, size in sizes.items())
    if not is_full:  # then there may be fewer batch files
        last = max((i for i, name in enumerate(train_names) if name in sizes), default=0)
        train_names = train_names[:last + 1]
    names = {"train": train_names, "test": [test_name]}
    for name in [name for part in parts for name in names[part]]:
        if name not in sizes:
            raise DataError(f"{folder / name} is missing")
        if is_full and sizes[name] != kind.files[name][0]:
            raise DataError(f"{folder / name} has {sizes[name]} bytes; valid are {kind.files[name][0]}, as other files "
                            "of the set have their full size")
    classes = CIFAR10_CLASSES if kind.reader is CIFAR10 else read_names(folder / "fine_label_names.txt", 100)
    return [join([read_records(kind, folder / name) for name in names[part]], classes) for part in parts]


def join(pieces: list[tuple[torch.Tensor, torch.Tensor]], classes: list[str]) -> ImageSet:
    """-> one set of the images and labels of several files"""
    images, labels = zip(*pieces, strict=True)
    return ImageSet(torch.cat(images), torch.cat(labels), classes)


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
    """-> the n class names, all different, in a text file"""
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
    """torchvision's reader without its MD5 check, which would refuse smaller data sets; read_svhn checks instead."""

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
    return [join([read_svhn(root, split, may_download) for split in splits[part]], classes) for part in parts]


def read_svhn(root: Path, split: str, may_download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """-> images uint8 (n, 3, 32, 32) and labels int64 (n,) of one file, which may be smaller than the published one"""
    url, name, md5 = SVHN.split_list[split]
    path = root / name
    if not path.exists():
        download("SVHN", root, name, lambda folder: download_url(url, folder, name, md5), name, may_download)
    check_regular(path)
    if path.stat().st_size == SVHN_FULL_BYTES[split]:
        check_md5(path, md5, "SVHN", path)
    try:
        content = SVHNFile(root, split)
    except Exception as error:  # scipy, zlib and numpy raise many kinds
        raise DataError(f"{path} cannot be read ({first_line(error)})") from error
    images, labels = content.data, torch.from_numpy(content.labels).reshape(-1)
    if images.shape != (len(labels), 3, 32, 32) or images.dtype != np.uint8 or not len(labels):
        raise DataError(f"{path} has {len(labels)} labels and {images.dtype} images of shape {images.shape}; valid are "
                        "n labels and uint8 images of shape (n, 3, 32, 32), n at least 1")
    check_labels(path, labels, 10, "label")
    return torch.from_numpy(np.ascontiguousarray(images)), labels


# --- checks and download ----------------------------------------------------------------------------------------

def check_regular(path: Path) -> None:
    """Raises DataError for a pipe or a device: reading it might never end."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} cannot be read (it is not a regular file)")


def check_labels(path: Path, labels: torch.Tensor, n: int, name: str) -> None:
    wrong = ((labels < 0) | (labels >= n)).nonzero()
    if len(wrong):
        at = wrong[0].item()
        raise DataError(f"{path}, record {at}: {name} {labels[at]}; valid is 0 to {n - 1}")


def check_md5(path: Path, md5: str, title: str, to_remove: Path) -> None:
    check_regular(path)
    found = calculate_md5(path)
    if found != md5:
        raise DataError(f"{path} is damaged: its MD5 sum is {found}, {title}'s is {md5}; remove {to_remove} to "
                        "download it again")


def download(title: str, root: Path, name: str, fetch: Callable[[str], object], valid: str, allowed: bool) -> None:
    """Downloads root/name, completely or not at all. ``fetch(folder)`` downloads to folder/name.

    Raises:
        DataError: if the download is not ``allowed`` or fails; ``valid`` says what to put into ``root`` instead.
    """
    if not allowed:
        raise DataError(f"no {title} in {root}; put {valid} there")
    parent = next(p for p in (root, *root.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as temporary, quiet_download():
            fetch(temporary)
            root.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / name).rename(root / name)
    except Exception as error:  # torchvision, urllib, tarfile and the file system raise many kinds
        raise DataError(
            f"no {title} in {root}, and its download failed ({first_line(error)}); put {valid} there, or try the "
            "built-in sample: ./train.py --data tests/cifar10-sample --depth 22 --nEpochs 10 --save work/sample"
        ) from error


@contextlib.contextmanager
def quiet_download() -> Iterator[None]:
    """A context in which torchvision prints nothing to stdout and gives up a server that sends nothing."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without a byte; the default waits for ever
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)

"""Images for train.py: reading a data set into memory, and making training batches of it on the training device.

    train, test = data.load("cifar10", "data")
    batches = data.Batches(train, *data.mean_and_std(train.images), device)
    for images, labels in batches.augmented(data.draw(batches.n, seed=1, epoch=1), batchSz=64): ...
"""

import contextlib
import hashlib
import io
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

PADDING = 4  # pixels of black on each side before the crop (paper, section 4.1)

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_FULL_BYTES = 30_730_000  # of each file of the complete set: 10,000 records
CIFAR10_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


class DataError(ValueError):
    """Data that are missing or damaged; the message is one line for the user."""


class ImageSet(NamedTuple):
    images: torch.Tensor  # uint8 (N, C, H, W)
    labels: torch.Tensor  # int64 (N,), each an index into classes
    classes: list[str]


# --- reading ----------------------------------------------------------------------------------------------------

def load(dataset: str, root: str) -> tuple[ImageSet, ImageSet]:
    """Training and test images of a data set in directory ``root``, which is the set's own folder or its parent.

    Raises:
        DataError: if there is none, or a file is damaged, or it cannot be downloaded.
    """
    return {"cifar10": load_cifar10}[dataset](Path(root))


def load_cifar10(root: Path) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 RGB images of 32x32, in the binary or the python version."""
    if root.exists() and not root.is_dir():
        raise DataError(f"--data {root} is not a directory")
    for folder in (root, root / "cifar-10-batches-bin"):
        if any((folder / name).exists() for name in CIFAR10_MD5):
            return read_cifar10_binary(folder)
    for folder in (root, root / CIFAR10.base_folder):
        if folder.name == CIFAR10.base_folder and folder.is_dir():
            return read_cifar10_python(folder)
    download_cifar10(root)
    return read_cifar10_python(root / CIFAR10.base_folder)


def read_cifar10_python(folder: Path) -> tuple[ImageSet, ImageSet]:
    """The pickled version, which torchvision reads; only files with the published MD5 sums are unpickled."""
    for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
        if not (folder / name).exists():
            raise DataError(f"{folder / name} is missing; remove {folder} to download it again")
        if not check_integrity(folder / name, md5):
            raise DataError(f"{folder / name} is damaged: its MD5 sum is not {md5}, CIFAR-10's; remove {folder} to "
                            "download it again")
    train, test = (
        ImageSet(torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets), s.classes)
        for s in (CIFAR10(folder.parent, train=train) for train in (True, False)))
    return train, test


def download_cifar10(root: Path) -> None:
    """Makes root/cifar-10-batches-py, whole or not at all; DataError if it cannot be."""
    parent = next(p for p in (root, *root.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".cifar-10-", dir=parent) as temporary, quiet_download():
            CIFAR10(temporary, download=True)
            root.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / CIFAR10.base_folder).rename(root / CIFAR10.base_folder)
    except Exception as error:  # torchvision's, urllib's, tarfile's and the file system's own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"no CIFAR-10 in {root}, and its download failed ({reason}); put cifar-10-batches-bin or "
            "cifar-10-batches-py there, or try the built-in sample: ./train.py --data tests/cifar10-sample --depth 22 "
            "--nEpochs 10 --save work/sample") from error


@contextlib.contextmanager
def quiet_download() -> Iterator[None]:
    """torchvision prints to stdout, and would wait for a silent server for ever."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without a byte
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)


def read_cifar10_binary(folder: Path) -> tuple[ImageSet, ImageSet]:
    """Files of 3,073-byte records: label, then the red, green and blue planes.

    A smaller set of the same layout (fewer records, fewer batch files) is read as well.
    """
    *batches, test = CIFAR10_MD5
    sizes = {name: (folder / name).stat().st_size for name in CIFAR10_MD5 if (folder / name).exists()}
    full = CIFAR10_FULL_BYTES in sizes.values()
    if not full:  # batch files up to the last there is
        batches = batches[:max([i + 1 for i, name in enumerate(batches) if name in sizes], default=1)]
    for name in [*batches, test]:
        if name not in sizes:
            raise DataError(f"{folder / name} is missing")
        if full and sizes[name] != CIFAR10_FULL_BYTES:
            raise DataError(f"{folder / name} has {sizes[name]} bytes; valid are {CIFAR10_FULL_BYTES}, as others have")
    sets = [[read_records(folder / name) for name in names] for names in (batches, [test])]
    train, test = (
        ImageSet(torch.from_numpy(np.concatenate([images for images, _ in parts])),
                 torch.from_numpy(np.concatenate([labels for _, labels in parts])), CIFAR10_CLASSES)
        for parts in sets)
    return train, test


def read_records(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> images uint8 (n, 3, 32, 32) and labels int64 (n,)"""
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if content.size == 0 or content.size % 3073:
        raise DataError(f"{path} has {content.size} bytes; valid is a multiple of 3073, the size of a record")
    if content.size == CIFAR10_FULL_BYTES:
        md5 = hashlib.md5(content.data, usedforsecurity=False).hexdigest()
        if md5 != CIFAR10_MD5[path.name]:
            raise DataError(f"{path} is damaged: its MD5 sum is {md5}, CIFAR-10's is {CIFAR10_MD5[path.name]}")
    records = content.reshape(-1, 3073)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CIFAR10_CLASSES):
        at = int((labels >= len(CIFAR10_CLASSES)).argmax())
        raise DataError(f"{path}, record {at}: label {labels[at]}; valid is 0 to {len(CIFAR10_CLASSES) - 1}")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def mean_and_std(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Each channel's mean and standard deviation over all pixels, in [0, 1]: of integer counts, exact anywhere."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        share /= share.sum()
        mean = (share * levels).sum()
        means.append(mean.item())
        stds.append((share * (levels - mean) ** 2).sum().sqrt().item() or 1.0)  # a constant channel stays 0
    return means, stds


# --- batches ----------------------------------------------------------------------------------------------------

class Augmentation(NamedTuple):
    """One epoch's random numbers, entry i for image i of the set: (N,) each, on the CPU."""

    order: torch.Tensor  # permutation
    dy: torch.Tensor  # crop's offset from the image's own corner, -4 to 4 pixels
    dx: torch.Tensor
    flip: torch.Tensor  # bool


def epoch_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def draw(n: int, seed: int, epoch: int) -> Augmentation:
    """From a private generator on the CPU: the same for every device and any number of processes, nothing to save."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return Augmentation(
        torch.randperm(n, generator=generator),
        torch.randint(-PADDING, PADDING + 1, (n,), generator=generator),
        torch.randint(-PADDING, PADDING + 1, (n,), generator=generator),
        torch.rand(n, generator=generator) < 0.5)


class Batches:
    """A set's images on a device, as uint8 until a batch of them is normalised."""

    def __init__(self, images: ImageSet, mean: list[float], std: list[float], device: torch.device):
        self.n, self.channels, self.height, self.width = images.images.shape
        pixels = images.images.permute(0, 2, 3, 1).reshape(-1, self.channels)
        black = pixels.new_zeros(1, self.channels)  # what a crop finds outside of its image
        self.pixels = torch.cat((pixels, black)).to(device)  # (N*H*W + 1, C)
        self.labels = images.labels.to(device)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
        self.device = device

    def augmented(self, random: Augmentation, batchSz: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The epoch's batches, cropped and flipped; the last may be smaller."""
        order, dy, dx, flip = (r.to(self.device) for r in random)
        for i in order.split(batchSz):
            yield self.crop(i, dy[i], dx[i], flip[i]), self.labels[i]

    def plain(self, batchSz: int, order: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The images as they are, in order."""
        order = torch.arange(self.n) if order is None else order
        for i in order.to(self.device).split(batchSz):
            zero = torch.zeros_like(i)
            yield self.crop(i, zero, zero, zero.bool()), self.labels[i]

    def crop(self, i: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """Normalised float32 (B, C, H, W) in channels_last, by one gather: what RandomCrop(size, padding=4) and then
        RandomHorizontalFlip do with these offsets and flips."""
        y = torch.arange(self.height, device=self.device) + dy[:, None]  # (B, H)
        x = torch.arange(self.width, device=self.device).expand(len(i), -1)
        x = torch.where(flip[:, None], self.width - 1 - x, x) + dx[:, None]  # (B, W)
        at = (i[:, None, None] * self.height + y[:, :, None]) * self.width + x[:, None, :]  # (B, H, W)
        inside = ((y >= 0) & (y < self.height))[:, :, None] & ((x >= 0) & (x < self.width))[:, None, :]
        at = torch.where(inside, at, len(self.pixels) - 1)
        batch = self.pixels[at].float().div_(255).sub_(self.mean).div_(self.std)
        return batch.permute(0, 3, 1, 2)



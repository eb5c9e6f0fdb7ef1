"""Images for train.py: reading a data set into memory, and making training batches of it on the training device.

    train, test = data.load("cifar10", "data")
    batches = data.Batches(train, *data.mean_and_std(train.images), device)
    for images, labels in batches.augmented(data.draw(batches.n, seed=1, epoch=1), batchSz=64): ...
"""

import contextlib
import io
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100, SVHN
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import calculate_md5, download_url
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

DATASETS = ("cifar10", "cifar100", "svhn", "folder")
Stream = Iterator[tuple[torch.Tensor, torch.Tensor]]  # batches: float32 (B, C, H, W) and int64 (B,)
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SVHN_FULL_BYTES = {"train": 182_040_794, "test": 64_275_384, "extra": 1_329_278_602}  # of the published files


class Cifar(NamedTuple):
    """What the two CIFAR sets differ in."""

    title: str
    reader: type[CIFAR10]  # torchvision's, for the python version
    folder: str  # the binary version's
    files: dict[str, tuple[int, str | None]]  # its complete bytes and MD5 sums; the test set is last
    labels: dict[str, int]  # a record's label bytes and their numbers of values; the class is last


CIFAR = {
    "cifar10": Cifar("CIFAR-10", CIFAR10, "cifar-10-batches-bin", {
        "data_batch_1.bin": (30_730_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
        "data_batch_2.bin": (30_730_000, "5ea93a67294ea407fff1d09f752e9692"),
        "data_batch_3.bin": (30_730_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
        "data_batch_4.bin": (30_730_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
        "data_batch_5.bin": (30_730_000, "53f37980c15c3d472c316c40844f3f0d"),
        "test_batch.bin": (30_730_000, "803d5f7f4d78ea53de84dbe85f74fb6d")}, {"label": 10}),
    "cifar100": Cifar("CIFAR-100", CIFAR100, "cifar-100-binary", {  # a sum is published of its archive only
        "train.bin": (153_700_000, None), "test.bin": (30_740_000, None)}, {"coarse label": 20, "fine label": 100}),
}


class DataError(ValueError):
    """Data that are missing or damaged, or a choice from them that cannot be; the message is one line for the user."""


class ImageSet(NamedTuple):
    images: torch.Tensor  # uint8 (N, C, H, W)
    labels: torch.Tensor  # int64 (N,), each an index into classes
    classes: list[str]


# --- reading ----------------------------------------------------------------------------------------------------

def load(dataset: str, root: str, *, extra: bool = False, imageSize: int = 32) -> tuple[ImageSet, ImageSet]:
    """Training and test images of one of DATASETS in directory ``root``, which is the set's own folder or its parent.

    Args:
        extra: train on SVHN's 531,131 extra images too
        imageSize: height and width in pixels to which the images of a folder are brought

    Raises:
        DataError: if there is none, or a file is damaged, or it cannot be downloaded, or does not fit into memory.
    """
    if dataset not in DATASETS:
        raise DataError(f"{dataset} is no data set; valid are {', '.join(DATASETS)}")
    folder = Path(root)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--data {root} is not a directory")
    if dataset == "svhn":
        return load_svhn(folder, extra)
    return load_folder(folder, imageSize) if dataset == "folder" else load_cifar(CIFAR[dataset], folder)


def load_cifar(kind: Cifar, root: Path) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 RGB images of 32x32, binary or python version."""
    for folder in (root, root / kind.folder):
        if any((folder / name).exists() for name in kind.files):
            return read_cifar_binary(kind, folder)
    base = kind.reader.base_folder
    for folder in (root, root / base):
        if folder.name == base and folder.is_dir():
            return read_cifar_python(kind, folder)
    download(kind.title, root, base, lambda folder: kind.reader(folder, download=True), f"{kind.folder} or {base}")
    return read_cifar_python(kind, root / base)


def read_cifar_python(kind: Cifar, folder: Path) -> tuple[ImageSet, ImageSet]:
    """The pickled version, which torchvision reads; only files with the published MD5 sums are unpickled."""
    reader = kind.reader
    for name, md5 in [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]:
        if not (folder / name).exists():
            raise DataError(f"{folder / name} is missing; remove {folder} to download it again")
        check_md5(folder / name, md5, kind.title, folder)
    train, test = (
        ImageSet(torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets), s.classes)
        for s in (reader(folder.parent, train=train) for train in (True, False)))
    return train, test


def read_cifar_binary(kind: Cifar, folder: Path) -> tuple[ImageSet, ImageSet]:
    """Files of records: the label bytes, then the red, green and blue planes.

    A smaller set of the same layout (fewer records, fewer batch files) is read as well.
    """
    *batches, test = kind.files
    sizes = {name: (folder / name).stat().st_size for name in kind.files if (folder / name).exists()}
    full = any(size == kind.files[name][0] for name, size in sizes.items())
    if not full:  # batch files up to the last there is
        batches = batches[:max([i + 1 for i, name in enumerate(batches) if name in sizes], default=1)]
    for name in [*batches, test]:
        if name not in sizes:
            raise DataError(f"{folder / name} is missing")
        if full and sizes[name] != kind.files[name][0]:
            raise DataError(f"{folder / name} has {sizes[name]} bytes; valid are {kind.files[name][0]}: others of the "
                            "set are complete")
    classes = CIFAR10_CLASSES if kind.reader is CIFAR10 else read_names(folder / "fine_label_names.txt", 100)
    train, test = (ImageSet(*join([read_records(kind, folder / name) for name in names]), classes)
                   for names in (batches, [test]))
    return train, test


def join(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def read_records(kind: Cifar, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """-> images uint8 (n, 3, 32, 32) and labels int64 (n,)"""
    record = len(kind.labels) + 3 * 32 * 32  # bytes
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
    try:
        names = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)})") from error
    if len(set(names)) != n or len(names) != n:
        raise DataError(f"{path} has {len(names)} names, {len(set(names))} of them different; valid are {n}")
    return names


class SVHNFile(SVHN):
    """torchvision's reader, without its MD5 check, which refuses smaller sets: read_svhn has its own."""

    def _check_integrity(self) -> bool:
        return True


def load_svhn(root: Path, extra: bool) -> tuple[ImageSet, ImageSet]:
    """Street View House Numbers (Netzer et al. 2011): 73,257 + 26,032 RGB digits of 32x32; 531,131 extra ones."""
    try:
        import scipy.io  # noqa: F401  what torchvision reads MATLAB's format with
    except ImportError as error:
        raise DataError("--dataset svhn needs scipy: pip install 'densenet-pytorch[svhn]'") from error
    train = join([read_svhn(root, split) for split in ("train", "extra")[:1 + extra]])
    classes = [str(digit) for digit in range(10)]
    return ImageSet(*train, classes), ImageSet(*read_svhn(root, "test"), classes)


def read_svhn(root: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """-> images uint8 (n, 3, 32, 32) and labels int64 (n,); a smaller file of the same layout is read as well"""
    url, name, md5 = SVHN.split_list[split]
    path = root / name
    if not path.exists():
        download("SVHN", root, name, lambda folder: download_url(url, folder, name, md5), name)
    if path.stat().st_size == SVHN_FULL_BYTES[split]:
        check_md5(path, md5, "SVHN", path)
    try:
        content = SVHNFile(root, split)
    except Exception as error:  # scipy's, zlib's and numpy's own kinds
        raise DataError(f"{path} cannot be read ({reason(error)})") from error
    images, labels = content.data, torch.from_numpy(content.labels).reshape(-1)
    if images.shape != (len(labels), 3, 32, 32) or images.dtype != np.uint8 or not len(labels):
        raise DataError(f"{path} has {len(labels)} labels and {images.dtype} images of shape {images.shape}; valid are "
                        "n labels and uint8 images of shape (n, 3, 32, 32), n at least 1")
    check_labels(path, labels, 10, "label")
    return torch.from_numpy(np.ascontiguousarray(images)), labels


def check_labels(path: Path, labels: torch.Tensor, n: int, name: str) -> None:
    wrong = ((labels < 0) | (labels >= n)).nonzero()
    if len(wrong):
        at = wrong[0].item()
        raise DataError(f"{path}, record {at}: {name} {labels[at]}; valid is 0 to {n - 1}")


def check_md5(path: Path, md5: str, title: str, remove: Path) -> None:
    if (found := calculate_md5(path)) != md5:
        raise DataError(f"{path} is damaged: its MD5 sum is {found}, {title}'s is {md5}; remove {remove} to download "
                        "it again")


def download(title: str, root: Path, name: str, fetch: Callable[[str], object], valid: str) -> None:
    """Makes root/name by fetch(folder), which makes folder/name: whole or not at all; DataError if it cannot be."""
    parent = next(p for p in (root, *root.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as temporary, quiet_download():
            fetch(temporary)
            root.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / name).rename(root / name)
    except Exception as error:  # torchvision's, urllib's, tarfile's and the file system's own kinds
        raise DataError(
            f"no {title} in {root}, and its download failed ({reason(error)}); put {valid} there, or try the built-in "
            "sample: ./train.py --data tests/cifar10-sample --depth 22 --nEpochs 10 --save work/sample") from error


def reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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


# --- a folder of images -----------------------------------------------------------------------------------------

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


# --- choosing ---------------------------------------------------------------------------------------------------

def shorten(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, ... ({len(names)} in all)"


def select_classes(images: ImageSet, names: list[str]) -> ImageSet:
    """Only the images of these classes, which are labelled in the order of ``names``.

    Raises:
        DataError: for a name that is unknown, twice there or without an image, or fewer than two of them.
    """
    counts = images.labels.bincount(minlength=len(images.classes)).tolist()
    valid = [name for name, n in zip(images.classes, counts, strict=True) if n]
    for name in names:
        problem = ("is unknown" if name not in images.classes else "has no image" if name not in valid
                   else "is named twice" if names.count(name) > 1 else None)
        if problem:
            raise DataError(f"class {name} {problem}; valid are {shorten(valid)}")
    if len(names) < 2:
        raise DataError(f"classes {names} are fewer than two; valid are two or more of {shorten(valid)}")
    label = torch.full((len(images.classes),), -1)
    label[[images.classes.index(name) for name in names]] = torch.arange(len(names))
    labels = label[images.labels]
    keep = labels >= 0
    return ImageSet(images.images[keep], labels[keep], list(names))


def hold_out(images: ImageSet, n: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """-> the training images that stay, and n validation images; both in the set's order.

    Stratified: a class's share of the n is what it is of the set, to within one image. Drawn from a private generator.

    Raises:
        DataError: if n is less than 1, or leaves a class without an image to train on.
    """
    counts = images.labels.bincount(minlength=len(images.classes))
    if not possible(counts, n):
        nearest = next((m for m in (*range(min(n, len(images.labels)) - 1, 0, -1), 1) if possible(counts, m)), "none")
        raise DataError(f"{n} of {len(images.labels)} training images cannot be held out, as each class has to keep "
                        f"one; nearest valid is {nearest}")
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    held = torch.zeros_like(labels, dtype=torch.bool)
    for label, share in enumerate(shares(counts, n).tolist()):
        held[order[labels == label][:share]] = True
    stay, out = (ImageSet(images.images[part], images.labels[part], images.classes) for part in (~held, held))
    return stay, out


def shares(counts: torch.Tensor, n: int) -> torch.Tensor:
    """n split in the proportion of counts by largest remainders; of equal ones the first class gets the image."""
    whole, rest = counts * n // counts.sum(), counts * n % counts.sum()
    whole[rest.argsort(descending=True, stable=True)[:n - whole.sum()]] += 1
    return whole


def possible(counts: torch.Tensor, n: int) -> bool:
    return 1 <= n < int(counts.sum()) and bool((shares(counts, n) < counts)[counts > 0].all())


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
    dy: torch.Tensor  # crop's offset from the image's own corner, -padding to padding pixels
    dx: torch.Tensor
    flip: torch.Tensor  # bool


def epoch_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def draw(n: int, seed: int, epoch: int, padding: int = 4) -> Augmentation:
    """From a private generator on the CPU: the same for every device and any number of processes, nothing to save."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return Augmentation(
        torch.randperm(n, generator=generator),
        torch.randint(-padding, padding + 1, (n,), generator=generator),
        torch.randint(-padding, padding + 1, (n,), generator=generator),
        torch.rand(n, generator=generator) < 0.5)


def batch_sizes(n: int, batchSz: int, processes: int = 1) -> list[int]:
    """Of an epoch's batches, over all processes; their sum is n.

    A remainder smaller than ``processes`` joins the batch before it: every process has a part of every batch, unless
    there are fewer images than processes.
    """
    sizes, rest = [batchSz] * (n // batchSz), n % batchSz
    if sizes and rest < processes:
        return [*sizes[:-1], batchSz + rest]
    return [*sizes, rest] if rest else sizes


class Batches:
    """A set's images on a device, as uint8 until a batch of them is normalised."""

    def __init__(self, images: ImageSet, mean: list[float], std: list[float], device: torch.device):
        self.n, self.channels, self.height, self.width = images.images.shape
        self.padding = self.height // 8  # pixels of black on each side before the crop: 4 of 32 (paper, section 4.1)
        # (N*H*W + 1, C): the last one stays black, as what a crop finds outside of its image
        pixels = images.images.permute(0, 2, 3, 1)
        self.pixels = pixels.new_zeros(pixels[..., 0].numel() + 1, self.channels, device=device)
        self.pixels[:-1].view(pixels.shape).copy_(pixels)
        self.labels = images.labels.to(device)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
        self.device = device

    def augmented(self, random: Augmentation, batchSz: int, rank: int = 0, processes: int = 1) -> Stream:
        """Process ``rank``'s part of the epoch's batches, cropped and flipped; the last may be smaller."""
        order, dy, dx, flip = (r.to(self.device) for r in random)
        for i in self.parts(order, batchSz, rank, processes):
            yield self.crop(i, dy[i], dx[i], flip[i]), self.labels[i]

    def plain(self, batchSz: int, order: torch.Tensor | None = None, rank: int = 0, processes: int = 1) -> Stream:
        """Process ``rank``'s part of the images as they are, in order."""
        order = torch.arange(self.n) if order is None else order
        for i in self.parts(order.to(self.device), batchSz, rank, processes):
            zero = torch.zeros_like(i)
            yield self.crop(i, zero, zero, zero.bool()), self.labels[i]

    def parts(self, order: torch.Tensor, batchSz: int, rank: int, processes: int) -> Iterator[torch.Tensor]:
        """Indices of this process's images in each batch; nothing where the batch has none for it."""
        for i in order.split(batch_sizes(len(order), batchSz, processes)):
            if len(part := i[rank::processes]):
                yield part

    def crop(self, i: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """Normalised float32 (B, C, H, W) in channels_last, by one gather: what RandomCrop(size, padding) and then
        RandomHorizontalFlip do with these offsets and flips."""
        y = torch.arange(self.height, device=self.device) + dy[:, None]  # (B, H)
        x = torch.arange(self.width, device=self.device).expand(len(i), -1)
        x = torch.where(flip[:, None], self.width - 1 - x, x) + dx[:, None]  # (B, W)
        at = (i[:, None, None] * self.height + y[:, :, None]) * self.width + x[:, None, :]  # (B, H, W)
        inside = ((y >= 0) & (y < self.height))[:, :, None] & ((x >= 0) & (x < self.width))[:, None, :]
        at = torch.where(inside, at, len(self.pixels) - 1)
        batch = self.pixels[at].float().div_(255).sub_(self.mean).div_(self.std)
        return batch.permute(0, 3, 1, 2)

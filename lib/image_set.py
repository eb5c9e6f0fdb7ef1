"""A set of images in memory: choosing classes, holding out images, mean and deviation, digest."""

import hashlib
import json
import unicodedata
from typing import NamedTuple

import torch


class DataError(ValueError):
    """Data are missing or damaged, or what was asked of them is impossible; the message is one line."""


class ImageSet(NamedTuple):
    images: torch.Tensor  # uint8 (N, C, H, W)
    labels: torch.Tensor  # int64 (N,), each an index into classes
    classes: list[str]


def shorten(names: list[str]) -> str:
    """-> the names in one line; after 20 of them only their number"""
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, ... ({len(names)} in all)"


def normal_form(name: str) -> str:
    """-> the name in Unicode's NFC: macOS and Linux may write the same accented name in different code points"""
    return unicodedata.normalize("NFC", name)


def select_classes(images: ImageSet, names: list[str]) -> ImageSet:
    """-> the images of these classes only; label i is class ``names[i]``, compared after Unicode normalisation

    Raises:
        DataError: if a name is unknown, repeated or has no image, or if there are fewer than two names.
    """
    counts = images.labels.bincount(minlength=len(images.classes)).tolist()
    index = {normal_form(name): i for i, name in enumerate(images.classes)}
    valid = shorten([name for name, n in zip(images.classes, counts, strict=True) if n])
    chosen: list[int] = []
    for name in names:
        i = index.get(normal_form(name))
        if i is None:
            raise DataError(f"class {name} is unknown; valid are {valid}")
        if not counts[i]:
            raise DataError(f"class {name} has no image; valid are {valid}")
        if i in chosen:
            raise DataError(f"class {name} is named twice; valid are {valid}")
        chosen.append(i)
    if len(chosen) < 2:
        raise DataError(f"classes {names} are fewer than two; valid are two or more of {valid}")
    new_label = torch.full((len(images.classes),), -1)
    new_label[chosen] = torch.arange(len(chosen))
    labels = new_label[images.labels]
    keep = labels >= 0
    return ImageSet(images.images[keep], labels[keep], [images.classes[i] for i in chosen])


def hold_out(images: ImageSet, n: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """-> the images to train on, and n validation images; both keep the order of the set

    Stratified: a class has the same share of the n images as of the set, to within one image. The random numbers come
    from a private generator, so that torch's global one stays as it is.

    Raises:
        DataError: if n is less than 1, or leaves a class without an image to train on.
    """
    counts = images.labels.bincount(minlength=len(images.classes))
    if not can_hold_out(counts, n):
        smaller = range(min(n, len(images.labels)) - 1, 0, -1)
        nearest = next((m for m in (*smaller, 1) if can_hold_out(counts, m)), "none")
        raise DataError(f"{n} of {len(images.labels)} training images cannot be held out, as each class has to keep "
                        f"one; nearest valid is {nearest}")
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    is_held = torch.zeros_like(labels, dtype=torch.bool)
    for label, n_held in enumerate(stratified_counts(counts, n).tolist()):
        is_held[order[labels == label][:n_held]] = True
    kept, held = (ImageSet(images.images[i], images.labels[i], images.classes) for i in (~is_held, is_held))
    return kept, held


def stratified_counts(counts: torch.Tensor, n: int) -> torch.Tensor:
    """Splits n in proportion to ``counts`` by largest remainders; of equal remainders the first class's wins."""
    whole, rest = counts * n // counts.sum(), counts * n % counts.sum()
    whole[rest.argsort(descending=True, stable=True)[:n - whole.sum()]] += 1
    return whole


def can_hold_out(counts: torch.Tensor, n: int) -> bool:
    """Whether n images can be held out so that each class that has images keeps one."""
    return 1 <= n < int(counts.sum()) and bool((stratified_counts(counts, n) < counts)[counts > 0].all())


def with_channels(images: ImageSet, channels: int) -> ImageSet:
    """-> the images with as many channels as the network takes; grayscale images are repeated in each channel

    Raises:
        DataError: if the images are in colour and the network takes grayscale.
    """
    have = images.images.shape[1]
    if have == channels:
        return images
    if have != 1:
        raise DataError(f"the images have {have} channels, the network takes {channels}; valid are grayscale images")
    return images._replace(images=images.images.expand(-1, channels, -1, -1))  # a view: takes no memory


def mean_and_std(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """-> each channel's mean and standard deviation over all pixels, in [0, 1]; deviation 1 for a constant channel

    Args:
        images: uint8 (N, C, H, W)
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        # from a 256-bin histogram, so that device and order do not matter
        frequency = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        frequency /= frequency.sum()
        mean = (frequency * levels).sum()
        means.append(mean.item())
        stds.append((frequency * (levels - mean) ** 2).sum().sqrt().item() or 1.0)
    return means, stds


def digest(images: ImageSet) -> str:
    """-> SHA-256, as hex digits, of the shape, the class names, the pixels and the labels

    The layout in memory does not matter: the binary and the python version of CIFAR have the same digest.
    """
    sha = hashlib.sha256(json.dumps([list(images.images.shape), images.classes]).encode())
    for part in images.images.split(1000):  # so that contiguous() copies 1000 images at most
        sha.update(part.contiguous().numpy())
    sha.update(images.labels.contiguous().numpy().astype("<i8"))
    return sha.hexdigest()

"""A set of images in memory: choosing from it, its mean and deviation."""

from typing import NamedTuple

import torch


class DataError(ValueError):
    """Data that are missing or damaged, or a choice from them that cannot be; the message is one line for the user."""


class ImageSet(NamedTuple):
    images: torch.Tensor  # uint8 (N, C, H, W)
    labels: torch.Tensor  # int64 (N,), each an index into classes
    classes: list[str]


def reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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

"""Batches of images that stay on the training device: random crop, flip and normalisation."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lib.data import Images

# for each batch this rank's images, float32 (B, C, H, W), their labels, int64 (B,), and the global batch size
Stream = Iterator[tuple[torch.Tensor, torch.Tensor, int]]


class Augmentation(NamedTuple):
    """One epoch's random numbers: (N,) each, on the CPU."""

    order: torch.Tensor  # a permutation: the order in which the images are seen
    dy: torch.Tensor  # vertical offset of image i's crop, -padding to padding pixels
    dx: torch.Tensor  # horizontal offset
    flip: torch.Tensor  # bool: whether image i is mirrored


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed from which ``epoch_randomness`` draws an epoch's order, crops and flips."""
    return seed * 1_000_003 + epoch


def dropout_seed(seed: int, epoch: int, rank: int) -> int:
    """Seed of a rank's dropout in an epoch; below 2**63 for seeds below 2**32.

    Within a run (one ``seed``) of fewer than 2**20 epochs, every epoch and rank has a seed of its own. 2**62 keeps
    it apart from every run's ``epoch_seed``. torch's CPU generator reads only the low 32 bits of a seed: for up to 4095
    ranks these differ, too, among all dropout and epoch seeds of the run.
    """
    return 2**62 + (rank + 1) * 2**20 + epoch_seed(seed, epoch)


def epoch_randomness(n: int, seed: int, epoch: int, padding: int = 4) -> Augmentation:
    """Draws an epoch's random numbers for n images from a private generator on the CPU: they depend neither on the
    device nor on the world size, and a resumed run draws them again. ``padding`` is in pixels."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return Augmentation(
        torch.randperm(n, generator=generator),
        torch.randint(-padding, padding + 1, (n,), generator=generator),
        torch.randint(-padding, padding + 1, (n,), generator=generator),
        torch.rand(n, generator=generator) < 0.5)


def batch_sizes(n: int, batchSz: int, processes: int = 1) -> list[int]:
    """-> the global sizes of an epoch's batches; they add up to n

    A last batch with fewer images than processes is added to the batch before, so that every rank has images in every
    batch. (If n itself is smaller than ``processes``, some have none.)
    """
    sizes, rest = [batchSz] * (n // batchSz), n % batchSz
    if sizes and rest < processes:
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


class Batches:
    """A set's images on a device, as uint8. A batch is converted to float32 and normalised when it is taken.

    Random crops reach up to ``padding`` pixels beyond the edges: an eighth of the height, 4 of 32 (paper, section 4.1).

    Args:
        mean, std: of each channel, in [0, 1]
        border: colour of the padding. "black" is that of the ancestor (bamos/densenet.pytorch), which pads first and
            then normalises. "mean", the mean colour, is that of the authors' code (liuzhuang13/DenseNet on
            fb.resnet.torch, datasets/cifar10.lua), which normalises first and then pads with zeros: exactly 0 here.

    """

    def __init__(self, images: Images, mean: list[float], std: list[float], device: torch.device,
                 border: str = "black"):
        self.n, self.channels, self.height, self.width = images.pixels.shape
        self.padding = self.height // 8
        self.border = border
        pixels = images.pixels.permute(0, 2, 3, 1)
        # (N*H*W + 1, C): crops read the last row, a black pixel, wherever they reach beyond their image
        self.pixels = pixels.new_zeros(pixels[..., 0].numel() + 1, self.channels, device=device)
        self.pixels[:-1].view(pixels.shape).copy_(pixels)
        self.labels = images.labels.to(device)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
        self.device = device

    def augmented(self, random: Augmentation, batchSz: int, rank: int = 0, processes: int = 1) -> Stream:
        """This rank's part of the epoch's batches, cropped and flipped by the numbers of ``epoch_randomness``."""
        order, dy, dx, flip = (r.to(self.device) for r in random)
        for i, size in self.indices(order, batchSz, rank, processes):
            yield self.take(i, dy[i], dx[i], flip[i]), self.labels[i], size

    def plain(self, batchSz: int, order: torch.Tensor | None = None, rank: int = 0, processes: int = 1) -> Stream:
        """This rank's part of the batches in ``order`` (default: the set's order), without crop and flip."""
        order = torch.arange(self.n) if order is None else order
        for i, size in self.indices(order.to(self.device), batchSz, rank, processes):
            zero = torch.zeros_like(i)
            yield self.take(i, zero, zero, zero.bool()), self.labels[i], size

    def indices(self, order: torch.Tensor, batchSz: int, rank: int,
                processes: int) -> Iterator[tuple[torch.Tensor, int]]:
        """For each batch the indices of this rank's images, and the global batch size. A batch that has no image for
        this rank is skipped."""
        for batch in order.split(batch_sizes(len(order), batchSz, processes)):
            if len(own := batch[rank::processes]):
                yield own, len(batch)

    def take(self, i: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """Crops images ``i`` at these offsets, then flips and normalises them -> float32 (B, C, H, W), channels_last.

        The same as torchvision's RandomCrop(size, padding) and RandomHorizontalFlip with these numbers, in one gather.
        """
        y = torch.arange(self.height, device=self.device) + dy[:, None]  # (B, H)
        x = torch.arange(self.width, device=self.device).expand(len(i), -1)
        x = torch.where(flip[:, None], self.width - 1 - x, x) + dx[:, None]  # (B, W)
        at = (i[:, None, None] * self.height + y[:, :, None]) * self.width + x[:, None, :]  # (B, H, W)
        inside = ((y >= 0) & (y < self.height))[:, :, None] & ((x >= 0) & (x < self.width))[:, None, :]
        at = torch.where(inside, at, len(self.pixels) - 1)
        batch = self.pixels[at].float().div_(255)
        if self.border == "mean":  # subtract the mean inside the image only: the border stays 0
            batch.addcmul_(inside[..., None].float(), self.mean, value=-1)
        else:
            batch.sub_(self.mean)
        return batch.div_(self.std).permute(0, 3, 1, 2)

"""Training batches of images that are held on the training device: random crop, flip and normalisation."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from lib.image_set import ImageSet

BORDERS = ("black", "mean")
# a rank's part of each batch: images, float32 (B, C, H, W), labels, int64 (B,), and the batch's size over all ranks
Stream = Iterator[tuple[torch.Tensor, torch.Tensor, int]]


class Augmentation(NamedTuple):
    """One epoch's random numbers, entry i for image i of the set: (N,) each, on the CPU."""

    order: torch.Tensor  # permutation
    dy: torch.Tensor  # offset of the crop from the image's own corner, -padding to padding pixels
    dx: torch.Tensor
    flip: torch.Tensor  # bool


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of the generator that ``draw`` takes an epoch's order, crops and flips from."""
    return seed * 1_000_003 + epoch


def dropout_seed(seed: int, epoch: int, rank: int) -> int:
    """Seed of a rank's dropout in an epoch; below 2**63 for seeds below 2**32.

    In a run (one ``seed``) no two epochs or ranks have the same, for fewer than 2**20 epochs. 2**62 keeps it apart
    from the ``epoch_seed`` of any run. torch's generator on the CPU reads the low 32 bits alone: these differ, too,
    from each other and from the run's epoch seeds, for up to 4095 ranks.
    """
    return 2**62 + (rank + 1) * 2**20 + epoch_seed(seed, epoch)


def draw(n: int, seed: int, epoch: int, padding: int = 4) -> Augmentation:
    """Drawn on the CPU from a generator of its own: independent of device and number of ranks, nothing to save."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return Augmentation(
        torch.randperm(n, generator=generator),
        torch.randint(-padding, padding + 1, (n,), generator=generator),
        torch.randint(-padding, padding + 1, (n,), generator=generator),
        torch.rand(n, generator=generator) < 0.5)


def batch_sizes(n: int, batchSz: int, processes: int = 1) -> list[int]:
    """Sizes of an epoch's batches, summed over the ranks; they add up to n.

    If the last batch had fewer images than ranks, its images are added to the batch before: each rank has a part of
    each batch, unless there are fewer images than ranks.
    """
    sizes, rest = [batchSz] * (n // batchSz), n % batchSz
    if sizes and rest < processes:
        return [*sizes[:-1], batchSz + rest]
    return [*sizes, rest] if rest else sizes


class Batches:
    """The images of a set on a device, as uint8; a batch is converted to float32 and normalised when it is taken.

    Random crops see ``padding`` pixels beyond each edge: an eighth of the height, 4 of 32 (paper, section 4.1).

    Args:
        mean, std: of each channel, in [0, 1]
        border: colour of these pixels. "black" is that of the ancestor (bamos/densenet.pytorch), which pads first and
            then normalises. "mean", the mean colour, is that of the authors' code (liuzhuang13/DenseNet on
            fb.resnet.torch, datasets/cifar10.lua), which normalises first and then pads with zeros: exactly 0 here.

    Raises:
        ValueError: for another border.
    """

    def __init__(self, images: ImageSet, mean: list[float], std: list[float], device: torch.device,
                 border: str = "black"):
        if border not in BORDERS:
            raise ValueError(f"border {border!r} is unknown; valid are {', '.join(BORDERS)}")
        self.n, self.channels, self.height, self.width = images.images.shape
        self.padding = self.height // 8
        self.border = border
        pixels = images.images.permute(0, 2, 3, 1)
        # (N*H*W + 1, C): the last row is the black pixel that crops read outside their image
        self.pixels = pixels.new_zeros(pixels[..., 0].numel() + 1, self.channels, device=device)
        self.pixels[:-1].view(pixels.shape).copy_(pixels)
        self.labels = images.labels.to(device)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
        self.device = device

    def augmented(self, random: Augmentation, batchSz: int, rank: int = 0, processes: int = 1) -> Stream:
        """This rank's part of the epoch's batches, cropped and flipped at random; the last batch may be smaller."""
        order, dy, dx, flip = (r.to(self.device) for r in random)
        for i, size in self.parts(order, batchSz, rank, processes):
            yield self.crop(i, dy[i], dx[i], flip[i]), self.labels[i], size

    def plain(self, batchSz: int, order: torch.Tensor | None = None, rank: int = 0, processes: int = 1) -> Stream:
        """This rank's part of the batches in ``order`` (default: the set's), without crop and flip."""
        order = torch.arange(self.n) if order is None else order
        for i, size in self.parts(order.to(self.device), batchSz, rank, processes):
            zero = torch.zeros_like(i)
            yield self.crop(i, zero, zero, zero.bool()), self.labels[i], size

    def parts(self, order: torch.Tensor, batchSz: int, rank: int,
              processes: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Batch by batch the indices of this rank's images, and the batch's size over all ranks; a batch without an
        image for this rank is left out."""
        for i in order.split(batch_sizes(len(order), batchSz, processes)):
            if len(part := i[rank::processes]):
                yield part, len(i)

    def crop(self, i: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """Crops images ``i`` at these offsets, then flips and normalises them -> float32 (B, C, H, W), channels_last.

        The result of RandomCrop(size, padding) and RandomHorizontalFlip with these random numbers, by one gather.
        """
        y = torch.arange(self.height, device=self.device) + dy[:, None]  # (B, H)
        x = torch.arange(self.width, device=self.device).expand(len(i), -1)
        x = torch.where(flip[:, None], self.width - 1 - x, x) + dx[:, None]  # (B, W)
        at = (i[:, None, None] * self.height + y[:, :, None]) * self.width + x[:, None, :]  # (B, H, W)
        inside = ((y >= 0) & (y < self.height))[:, :, None] & ((x >= 0) & (x < self.width))[:, None, :]
        at = torch.where(inside, at, len(self.pixels) - 1)
        batch = self.pixels[at].float().div_(255)
        if self.border == "mean":  # subtract the mean inside only; the border stays 0
            batch.addcmul_(inside[..., None].float(), self.mean, value=-1)
        else:
            batch.sub_(self.mean)
        return batch.div_(self.std).permute(0, 3, 1, 2)

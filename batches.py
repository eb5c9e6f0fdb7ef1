"""Training batches of a set of images, made on the training device."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from image_set import ImageSet

Stream = Iterator[tuple[torch.Tensor, torch.Tensor]]  # batches: float32 (B, C, H, W) and int64 (B,)


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

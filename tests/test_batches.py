"""batches.py: an epoch's random numbers, and the content of batches."""

import itertools
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from image_helpers import CLASSES, noise

from lib.batches import Augmentation, Batches, batch_sizes, draw, dropout_seed, epoch_seed
from lib.image_set import ImageSet, mean_and_std


def image_set(images):
    return ImageSet(images, torch.arange(len(images)) % 10, CLASSES)


def batches_of(images, mean=None, std=None, **more):
    channels = images.shape[1]
    return Batches(image_set(images), mean or [0.0] * channels, std or [1.0] * channels, torch.device("cpu"), **more)


def every_crop(batches):
    """For every offset up to 4 pixels, with and without flip: dy, dx, flip, and images 0 and 1 cropped by them."""
    for dy, dx, flip in itertools.product(range(-4, 5), range(-4, 5), (False, True)):
        yield dy, dx, flip, batches.crop(torch.arange(2), torch.tensor([dy] * 2), torch.tensor([dx] * 2),
                                         torch.tensor([flip] * 2))


# --- the random numbers of an epoch -----------------------------------------------------------------------------

def test_every_offset_and_flip_occurs_equally_often():
    n = 81 * 2 * 200
    drawn = draw(n, seed=3, epoch=7)
    assert drawn.order.sort().values.equal(torch.arange(n))
    assert drawn.dy.unique().tolist() == drawn.dx.unique().tolist() == list(range(-4, 5))
    counts = (((drawn.dy + 4) * 9 + drawn.dx + 4) * 2 + drawn.flip).bincount(minlength=162).double()
    chi2 = ((counts - 200) ** 2 / 200).sum().item()  # 161 degrees of freedom: mean 161, deviation 18
    assert 90 < chi2 < 250 and counts.min() > 0


def test_every_seed_and_epoch_has_its_own_numbers_each_time_the_same():
    epochs = {(seed, epoch): draw(1000, seed, epoch) for seed in (0, 1) for epoch in (1, 2)}
    for i, field in enumerate(Augmentation._fields):
        assert len({tuple(drawn[i].tolist()) for drawn in epochs.values()}) == 4, field
    assert all(torch.equal(a, b) for a, b in zip(draw(1000, 1, 2), epochs[1, 2], strict=True))
    seeds = {epoch_seed(seed, epoch) for seed in range(50) for epoch in range(1, 301)}
    assert len(seeds) == 50 * 300 and epoch_seed(1, 2) == 1_000_005
    assert epoch_seed(2**32 - 1, 10**6) < 2**63  # a generator's largest seed


def test_dropout_has_a_seed_that_no_other_epoch_rank_or_permutation_of_the_run_has():
    """Their low 32 bits, all that torch's CPU generator reads of a seed, differ as well."""
    for seed in (0, 1, 4321, 2**32 - 1):
        for epochs, ranks in ((range(1, 1001), range(64)), (range(10**6 - 20, 10**6 + 1), range(4095))):
            used = [dropout_seed(seed, epoch, rank) for epoch in epochs for rank in ranks]
            used += [epoch_seed(seed, epoch) for epoch in epochs]
            assert len(set(used)) == len(used) == len({value % 2**32 for value in used})
    assert dropout_seed(2**32 - 1, 10**6, 10**5) < 2**63  # every generator's largest seed


def test_no_runs_dropout_has_the_seed_of_any_runs_permutation():
    drawn = np.random.default_rng(0)
    seeds = [0, 1, 2, 2**32 - 1, *drawn.integers(0, 2**32, 400).tolist()]
    epochs = [1, 2, 300, 10**6, *drawn.integers(1, 10**6, 100).tolist()]
    permutations = {epoch_seed(seed, epoch) for seed in seeds for epoch in epochs}
    dropout = {dropout_seed(seed, epoch, rank) for seed in seeds for epoch in epochs for rank in (0, 1, 7, 10**5)}
    assert len(dropout) == 4 * len(seeds) * len(epochs) and not dropout & permutations
    assert min(dropout) > epoch_seed(2**32 - 1, 10**6)  # hence for all of them


def test_drawing_neither_depends_on_global_generators_and_threads_nor_changes_them():
    expected = draw(500, 1, 1)
    torch.manual_seed(5)
    random.seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        drawn = draw(500, 1, 1)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(r.device.type == "cpu" for r in drawn)


def test_an_images_crop_does_not_depend_on_batch_size_and_rank():
    batches, drawn = batches_of(noise(21)), draw(21, 1, 1)
    [(images, labels, _)] = batches.augmented(drawn, 21)
    for size in (1, 4, 20):
        parts = list(batches.augmented(drawn, size))
        assert [len(labels) for _, labels, _ in parts] == [size] * (21 // size) + [21 % size] * (21 % size > 0)
        assert torch.equal(torch.cat([p[0] for p in parts]), images)
        assert torch.equal(torch.cat([p[1] for p in parts]), labels)
    for rank in range(2):  # every other image of each batch of 4; the last image has joined the batch before
        mine = torch.cat([torch.arange(*batch)[rank::2] for batch in ((0, 4), (4, 8), (8, 12), (12, 16), (16, 21))])
        assert torch.equal(torch.cat([p[0] for p in batches.augmented(drawn, 4, rank, 2)]), images[mine])


def test_every_image_is_in_an_epoch_once():
    images = torch.arange(21, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    for order in (None, torch.randperm(21)):
        parts = list(batches_of(images).plain(4, order))
        seen = torch.cat([(p[0] * 255).round()[:, 0, 0, 0].int() for p in parts])
        assert seen.equal((torch.arange(21) if order is None else order).int())
        assert torch.cat([p[1] for p in parts]).equal(seen.long() % 10)


@pytest.mark.parametrize("processes", range(1, 6))
@pytest.mark.parametrize("n", [1, 4, 5, 23, 24, 41, 60])
def test_every_image_is_seen_once_by_any_number_of_processes(n, processes):
    batches, drawn = batches_of(noise(n, 8, 8)), draw(n, 1, 1, padding=1)
    batchSz = 4 * processes
    sizes = batch_sizes(n, batchSz, processes)
    for parts in ([list(batches.augmented(drawn, batchSz, rank, processes)) for rank in range(processes)],
                  [list(batches.plain(batchSz, drawn.order, rank, processes)) for rank in range(processes)]):
        if n >= processes:  # DistributedDataParallel would wait for a process without images
            assert {len(part) for part in parts} == {len(sizes)}
            assert [sum(len(labels) for _, labels, _ in step) for step in zip(*parts, strict=True)] == sizes
            assert all([size for _, _, size in part] == sizes for part in parts)
        assert all(len(labels) for part in parts for _, labels, _ in part)
        labels = torch.cat([labels for part in parts for _, labels, _ in part])
        assert labels.bincount(minlength=10).equal(batches.labels.bincount(minlength=10)) and len(labels) == n
    seen = torch.cat([images for rank in range(processes)
                      for images, _, _ in batches.plain(batchSz, None, rank, processes)])
    whole = torch.cat([images for images, _, _ in batches.plain(batchSz)])
    assert sorted(map(tuple, seen.flatten(1).tolist())) == sorted(map(tuple, whole.flatten(1).tolist()))


@pytest.mark.parametrize("n, batchSz, processes, expected", [
    (21, 4, 1, [4, 4, 4, 4, 4, 1]), (20, 4, 1, [4] * 5), (21, 4, 2, [4, 4, 4, 4, 5]), (22, 4, 2, [4, 4, 4, 4, 4, 2]),
    (23, 8, 4, [8, 8, 7]), (19, 8, 4, [8, 11]), (3, 8, 1, [3]), (3, 8, 4, [3]), (0, 8, 2, []), (8, 8, 8, [8])])
def test_a_remainder_is_a_batch_of_its_own_or_joins_the_one_before(n, batchSz, processes, expected):
    assert batch_sizes(n, batchSz, processes) == expected


# --- crop and flip ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, channels", [(32, 32, 3), (12, 20, 1)])
def test_a_crop_is_the_same_as_torchvisions(height, width, channels):
    """Which is to pad by 4 with black, crop, flip, and normalise, in this order."""
    images = noise(2, height, width, channels)
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    for dy, dx, flip, got in every_crop(batches_of(images, mean, std)):
        want = vision.crop(vision.pad(images, [4]), 4 + dy, 4 + dx, height, width)
        want = vision.hflip(want) if flip else want
        want = vision.normalize(want.float() / 255, mean, std)
        assert got.shape == want.shape and (got - want).abs().max() < 1e-6


@pytest.mark.parametrize("height, width, channels", [(32, 32, 3), (16, 24, 1)])
def test_mean_border_is_zero_after_normalising(height, width, channels):
    """As in the authors' code: normalise, pad with exact zeros, crop. The image itself is the same as with "black"."""
    images = noise(2, height, width, channels)
    images[1] = 0  # black pixels inside the image must not be taken for the border
    mean, std = [0.49139968, 0.48215827, 0.44653124][:channels], [0.24703233, 0.24348505, 0.26158768][:channels]
    black, by_mean = batches_of(images, mean, std), batches_of(images, mean, std, border="mean")
    normalised = black.crop(torch.arange(2), *[torch.zeros(2, dtype=torch.long)] * 2, torch.zeros(2).bool())
    for dy, dx, flip, got in every_crop(by_mean):
        want = vision.crop(vision.pad(normalised, [4]), 4 + dy, 4 + dx, height, width)
        assert got.equal(vision.hflip(want) if flip else want)
    for (a, labels, _), (b, same, _) in zip(black.plain(1), by_mean.plain(1), strict=True):  # without crop
        assert a.equal(b) and labels.equal(same)


def test_the_default_border_is_black_and_an_unknown_one_is_refused():
    images, drawn = noise(20), draw(20, 1, 1)
    default, black, mean = (next(batches_of(images, [0.5] * 3, [0.2] * 3, **border).augmented(drawn, 20))[0]
                            for border in ({}, {"border": "black"}, {"border": "mean"}))
    assert default.equal(black) and not default.equal(mean)
    with pytest.raises(ValueError, match=r"^border 'grey' is unknown; valid are black, mean$"):
        batches_of(images, border="grey")


@pytest.mark.parametrize("size, padding", [(32, 4), (224, 28), (64, 8), (7, 0)])
def test_padding_grows_with_the_image(size, padding):
    assert batches_of(noise(1, size, size)).padding == padding
    drawn = draw(2000, 1, 1, padding)
    assert (drawn.dy.min(), drawn.dy.max(), drawn.dx.min(), drawn.dx.max()) == (-padding, padding, -padding, padding)
    if padding == 4:
        assert all(torch.equal(a, b) for a, b in zip(drawn, draw(2000, 1, 1), strict=True))


def test_pixels_never_wrap_and_padding_is_black_before_normalising():
    white = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    batches = batches_of(white, [0.5] * 3, [0.25] * 3)
    middle = torch.tensor([1])  # pixels of its neighbours must not appear
    for dy, dx, flip in [(4, 0, 0), (-4, 0, 0), (0, 4, 0), (0, -4, 1), (3, -2, 1)]:
        image = batches.crop(middle, torch.tensor([dy]), torch.tensor([dx]), torch.tensor([bool(flip)]))[0]
        black = image == (0 - 0.5) / 0.25
        assert (image[~black] == (1 - 0.5) / 0.25).all()
        assert black[0].sum() == 32 * 32 - (32 - abs(dy)) * (32 - abs(dx))
        left_is_black = (dx < 0) != bool(flip)
        if dx:
            assert black[:, 16, 0 if left_is_black else 31].all() and not black[:, 16, 31 if left_is_black else 0].any()


def test_plain_batches_are_the_images_normalised():
    images = noise(5)
    mean, std = mean_and_std(images)
    batch = torch.cat([b for b, _, _ in batches_of(images, mean, std).plain(2)])
    assert batch.dtype == torch.float32 and batch.shape == (5, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5 and (batch.std((0, 2, 3)) - 1).abs().max() < 1e-3

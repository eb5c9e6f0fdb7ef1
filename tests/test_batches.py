"""batches.py: an epoch's random numbers, and the content of batches."""

import itertools

import pytest
import torch
from torchvision import transforms
from torchvision.transforms.functional import crop, normalize, pad

from lib.batches import Batches, batch_sizes, dropout_seed, epoch_randomness, epoch_seed
from lib.data import Images

CLASSES = list("0123456789")
CPU = torch.device("cpu")
OFFSETS = range(-4, 5)


def noise(n, height=32, width=32, channels=3):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def batches_of(pixels, mean=None, std=None, **more):
    channels = pixels.shape[1]
    images = Images(pixels, torch.arange(len(pixels)) % 10, CLASSES)
    return Batches(images, mean or [0.0] * channels, std or [1.0] * channels, CPU, **more)


def every_crop(batches):
    """For every offset up to 4 pixels, with and without flip: dy, dx, flip, and images 0 and 1 cropped by them."""
    for dy, dx, flip in itertools.product(OFFSETS, OFFSETS, (False, True)):
        yield dy, dx, flip, batches.take(torch.arange(2), *(torch.tensor([value] * 2) for value in (dy, dx, flip)))


def as_lists(random):
    return [numbers.int().tolist() for numbers in random]


# --- the random numbers of an epoch -----------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "expected"), [
    ((8, 1, 1), [[7, 5, 6, 2, 1, 4, 0, 3], [2, 1, 4, 0, -2, -4, -4, 3], [4, 1, -3, 2, 3, -4, 4, 0],
                 [0, 0, 1, 0, 1, 1, 1, 0]]),
    ((8, 1, 2), [[6, 1, 5, 3, 7, 0, 4, 2], [-3, 1, -3, 0, -1, -4, 3, -2], [-2, -4, 2, 3, 4, 0, 1, -1],
                 [1, 0, 1, 0, 1, 1, 1, 0]]),
    ((8, 4321, 7, 1), [[6, 2, 1, 0, 3, 7, 5, 4], [0, -1, -1, -1, 0, 1, 0, -1], [-1, 0, -1, -1, 0, 0, 0, 1],
                       [1, 1, 1, 1, 1, 1, 1, 0]])])
def test_an_epoch_draws_what_version_1_1_drew(arguments, expected):
    assert as_lists(epoch_randomness(*arguments)) == expected


def test_dropout_has_the_seeds_of_version_1_1():
    assert dropout_seed(1, 1, 0) == 4611686018429436484
    assert dropout_seed(1, 2, 3) == 4611686018432582213
    assert dropout_seed(2**32 - 1, 300, 0) == 4615980998608338665


def test_dropout_has_a_seed_that_no_other_epoch_rank_or_permutation_of_the_run_has():
    """Their low 32 bits, all that torch's CPU generator reads of a seed, differ as well."""
    for seed in (0, 1, 2**32 - 1):
        for epochs, ranks in ((range(1, 1001), range(64)), (range(10**6 - 20, 10**6 + 1), range(4095))):
            used = [dropout_seed(seed, epoch, rank) for epoch in epochs for rank in ranks]
            used += [epoch_seed(seed, epoch) for epoch in epochs]
            assert len({value % 2**32 for value in used}) == len(used)
    assert dropout_seed(2**32 - 1, 10**6, 10**5) < 2**63  # every generator's largest seed


def test_drawing_leaves_the_global_generator_as_it_is():
    before = torch.get_rng_state()
    epoch_randomness(500, 1, 1)
    assert torch.get_rng_state().equal(before)


# --- which images are in a batch --------------------------------------------------------------------------------

@pytest.mark.parametrize(("n", "batchSz", "processes", "expected"), [
    (21, 4, 1, [4, 4, 4, 4, 4, 1]), (20, 4, 1, [4] * 5), (21, 4, 2, [4, 4, 4, 4, 5]), (22, 4, 2, [4, 4, 4, 4, 4, 2]),
    (23, 8, 4, [8, 8, 7]), (19, 8, 4, [8, 11]), (3, 8, 1, [3]), (3, 8, 4, [3]), (0, 8, 2, []), (8, 8, 8, [8])])
def test_a_remainder_is_a_batch_of_its_own_or_joins_the_one_before(n, batchSz, processes, expected):
    assert batch_sizes(n, batchSz, processes) == expected


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 4, 23, 41, 60])
def test_the_ranks_share_each_batch_so_that_every_image_is_seen_once(n, processes):
    """And each rank has images in every batch: DistributedDataParallel would wait for one without."""
    batches, random, batchSz = batches_of(noise(n, 8, 8)), epoch_randomness(n, 1, 1, padding=1), 4 * processes
    sizes = batch_sizes(n, batchSz, processes)
    [(cropped, labels, _)], [(plain, _, _)] = batches.augmented(random, n), batches.plain(n, random.order)
    for rank in range(processes):
        for expected, stream in ((cropped, batches.augmented(random, batchSz, rank, processes)),
                                 (plain, batches.plain(batchSz, random.order, rank, processes))):
            steps = list(stream)
            assert [size for _, _, size in steps] == sizes or n < processes
            for part, whole in ((0, expected), (1, labels)):
                shares = [batch[rank::processes] for batch in whole.split(sizes) if rank < len(batch)]
                assert all(step[part].equal(share) for step, share in zip(steps, shares, strict=True))


@pytest.mark.parametrize("batchSz", [1, 4, 20])
def test_batches_follow_the_order_that_was_drawn(batchSz):
    images = torch.arange(21, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    for order in (None, torch.randperm(21)):
        parts = list(batches_of(images).plain(batchSz, order))
        seen = torch.cat([(pixels * 255).round()[:, 0, 0, 0].long() for pixels, _, _ in parts])
        assert seen.equal(torch.arange(21) if order is None else order)
        assert torch.cat([labels for _, labels, _ in parts]).equal(seen % 10)


# --- crop, flip and normalise -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 3), (12, 20, 1)])
def test_crop_and_flip_are_torchvisions_with_the_same_numbers(height, width, channels, monkeypatch):
    """Pad by 4 with black, crop, flip, and normalise, in this order. Nothing wraps or comes from a neighbour."""
    images = noise(2, height, width, channels)
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    random_crop = transforms.RandomCrop((height, width), padding=4)
    for dy, dx, flip, found in every_crop(batches_of(images, mean, std)):
        monkeypatch.setattr(random_crop, "get_params", lambda *_, top=4 + dy, left=4 + dx: (top, left, height, width))
        cropped = transforms.RandomHorizontalFlip(p=float(flip))(random_crop(images))
        expected = normalize(cropped.float() / 255, mean, std)
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 3), (16, 24, 1)])
def test_mean_border_is_zero_after_normalising(height, width, channels):
    """As in the authors' code: normalise, pad with exact zeros, crop. The image itself is the same as with "black"."""
    images = noise(2, height, width, channels)
    images[1] = 0  # black pixels inside the image must not be taken for the border
    mean, std = [0.49139968, 0.48215827, 0.44653124][:channels], [0.24703233, 0.24348505, 0.26158768][:channels]
    black, by_mean = (batches_of(images, mean, std, border=border) for border in ("black", "mean"))
    [(normalised, _, _)] = black.plain(2)
    assert normalised.equal(next(by_mean.plain(2))[0])  # without crop there is no border
    for dy, dx, flip, found in every_crop(by_mean):
        expected = crop(pad(normalised, [4]), 4 + dy, 4 + dx, height, width)
        assert found.equal(expected.flip(3) if flip else expected)


def test_the_default_border_is_black():
    random = epoch_randomness(20, 1, 1)
    default, black, mean = (next(batches_of(noise(20), [0.5] * 3, **border).augmented(random, 20))[0]
                            for border in ({}, {"border": "black"}, {"border": "mean"}))
    assert default.equal(black) and not default.equal(mean)


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (224, 28), (64, 8), (7, 0)])
def test_padding_is_an_eighth_of_the_image(size, padding):
    assert batches_of(noise(1, size, size)).padding == padding
    _, dy, dx, _ = epoch_randomness(2000, 1, 1, padding)
    assert (dy.min(), dy.max(), dx.min(), dx.max()) == (-padding, padding, -padding, padding)


def test_plain_batches_are_the_images_normalised():
    pixels = noise(5)
    mean, std = Images(pixels, torch.zeros(5, dtype=torch.long), CLASSES).mean_and_std()
    batch = torch.cat([b for b, _, _ in batches_of(pixels, mean, std).plain(2)])
    assert batch.dtype == torch.float32 and batch.shape == (5, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5 and (batch.std((0, 2, 3)) - 1).abs().max() < 1e-3

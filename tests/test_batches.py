"""batches.py: an epoch's random numbers, and the content of batches."""

import itertools

import pytest
import torch
from torchvision.transforms.functional import crop, hflip, normalize, pad

from lib.batches import Batches, batch_sizes, dropout_seed, epoch_randomness, epoch_seed
from lib.data import Images


def noise(n, height=32, width=32, channels=3):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def batches_of(pixels, mean=None, std=None, **more):
    channels = pixels.shape[1]
    images = Images(pixels, torch.arange(len(pixels)) % 10, list("0123456789"))
    return Batches(images, mean or [0.0] * channels, std or [1.0] * channels, torch.device("cpu"), **more)


# --- the random numbers of an epoch -----------------------------------------------------------------------------

def test_an_epoch_draws_what_version_1_1_drew_from_a_generator_of_its_own():
    before = torch.get_rng_state()
    drawn = epoch_randomness(8, 4321, 7, padding=1)
    assert [numbers.int().tolist() for numbers in drawn] == [
        [6, 2, 1, 0, 3, 7, 5, 4], [0, -1, -1, -1, 0, 1, 0, -1], [-1, 0, -1, -1, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 0]]
    assert torch.get_rng_state().equal(before)


def test_dropout_has_the_seeds_of_version_1_1():
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


# --- which images are in a batch --------------------------------------------------------------------------------

@pytest.mark.parametrize(("n", "processes", "sizes"), [
    (4, 1, [4]), (21, 1, [4, 4, 4, 4, 4, 1]), (22, 2, [8, 8, 6]), (41, 2, [8, 8, 8, 8, 9]), (23, 5, [23]),
    (42, 5, [20, 22]), (4, 5, [4])])
def test_the_ranks_share_each_batch_of_the_drawn_order_so_that_every_image_is_seen_once(n, processes, sizes):
    """And each rank has images in every batch: a remainder of fewer images than ranks joins the batch before."""
    pixels, random, batchSz = noise(n, 8, 8), epoch_randomness(n, 1, 1, padding=1), 4 * processes
    batches = batches_of(pixels)
    assert batch_sizes(n, batchSz, processes) == sizes
    [(cropped, labels, _)], [(plain, _, _)] = batches.augmented(random, n), batches.plain(n, random.order)
    assert labels.equal(random.order % 10) and plain.mul(255).round().equal(pixels[random.order].float())
    for rank in range(processes):
        for expected, stream in ((cropped, batches.augmented(random, batchSz, rank, processes)),
                                 (plain, batches.plain(batchSz, random.order, rank, processes))):
            steps = list(stream)
            assert [size for _, _, size in steps] == sizes or n < processes
            for part, whole in ((0, expected), (1, labels)):
                shares = [batch[rank::processes] for batch in whole.split(sizes) if rank < len(batch)]
                assert all(step[part].equal(share) for step, share in zip(steps, shares, strict=True))


# --- crop, flip and normalise -----------------------------------------------------------------------------------

@pytest.mark.parametrize("border", ["black", "mean"])
@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 3), (12, 20, 1)])
def test_crop_and_flip_are_torchvisions_with_the_same_numbers(height, width, channels, border):
    """"black" is a pixel before normalising, "mean" exactly 0 after it. Nothing wraps or comes from a neighbour."""
    images = noise(2, height, width, channels)
    images[:, :, 5:8] = 0  # black pixels inside the image must not be taken for the border
    mean, std = [0.49139968, 0.48215827, 0.44653124][:channels], [0.24703233, 0.24348505, 0.26158768][:channels]
    batches = batches_of(images, mean, std, border=border)
    [(normalised, _, _)], [(with_black, _, _)] = batches.plain(2), batches_of(pad(images, [4]), mean, std).plain(2)
    assert (normalised - normalize(images.float() / 255, mean, std)).abs().max() < 1e-6
    padded = with_black if border == "black" else pad(normalised, [4])
    for dy, dx, flip in itertools.product(range(-4, 5), range(-4, 5), (False, True)):
        found = batches.take(torch.arange(2), *(torch.tensor([value] * 2) for value in (dy, dx, flip)))
        expected = crop(padded, 4 + dy, 4 + dx, height, width)
        assert found.equal(hflip(expected) if flip else expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_crops_reach_beyond_the_edges_by_up_to_an_eighth_of_the_image():
    assert [batches_of(noise(1, size, size)).padding for size in (32, 224, 7)] == [4, 28, 0]
    _, dy, dx, _ = epoch_randomness(2000, 1, 1, padding=28)
    assert (dy.min(), dy.max(), dx.min(), dx.max()) == (-28, 28, -28, 28)

"""image_set.py: selecting classes, holding out images, mean and deviation, digest, channels."""

import numpy as np
import pytest
import torch
from image_helpers import noise

from lib import data, image_set


def numbered(labels, classes):
    """-> an image set in which all pixels of image i are i"""
    images = torch.arange(len(labels)).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return data.ImageSet(images, torch.tensor(labels), classes)


def numbers(images):
    """-> for each image of the set the i that it had in ``numbered``"""
    return images.images[:, 0, 0, 0].tolist()


def test_select_classes_in_the_order_of_the_names():
    whole = numbered([0, 1, 2, 3, 2, 1, 0, 2], ["a", "b", "c", "d"])
    chosen = data.select_classes(whole, ["c", "a"])
    assert numbers(chosen) == [0, 2, 4, 6, 7] and chosen.labels.tolist() == [1, 0, 0, 1, 0]
    assert chosen.classes == ["c", "a"] and chosen.labels.dtype == torch.int64
    assert data.select_classes(whole, whole.classes).labels.equal(whole.labels)


@pytest.mark.parametrize("names, said", [
    (["a", "z"], "class z is unknown; valid are a, b"), (["a", "a"], "class a is named twice; valid are a, b"),
    (["a", "c"], "class c has no image; valid are a, b"), (["a"], r"\['a'\] are fewer than two; valid are two or more"),
    ([], r"\[\] are fewer than two"), (["A", "b"], "class A is unknown"),
])
def test_classes_that_cannot_be_selected_are_refused(names, said):
    with pytest.raises(data.DataError, match=said):
        data.select_classes(numbered([0, 1, 1, 0], ["a", "b", "c"]), names)


def test_a_class_is_found_whatever_its_unicode_normalisation():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for of_the_set, typed in ((composed, decomposed), (decomposed, composed)):
        chosen = data.select_classes(numbered([0, 1, 2], ["bar", of_the_set, "pub"]), [typed, "bar"])
        assert numbers(chosen) == [0, 1] and chosen.labels.tolist() == [1, 0]
        assert chosen.classes == [of_the_set, "bar"]  # the set's spelling
    with pytest.raises(data.DataError, match="is named twice"):
        data.select_classes(numbered([0, 1], [composed, "bar"]), [composed, decomposed])


def test_long_lists_of_valid_classes_are_shortened():
    names = [f"n{i:02}" for i in range(21)]
    with pytest.raises(data.DataError, match=r"n18, n19, \.\.\. \(21 in all\)$"):
        data.select_classes(numbered(list(range(21)), names), ["x", "n00"])
    with pytest.raises(data.DataError, match=r"n18, n19$"):
        data.select_classes(numbered(list(range(20)), names[:20]), ["x", "n00"])


@pytest.mark.parametrize("counts, n", [
    ([100] * 10, 100), ([100] * 10, 1), ([100] * 10, 990), ([100] * 10, 555), ([7, 50, 3, 140], 20),
    ([7, 50, 3, 140], 1), ([7, 50, 3, 140], 133), ([5, 0, 9], 4), ([2, 2, 2], 2), ([1, 30], 10)])
def test_held_out_images_are_stratified(counts, n):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    whole = data.ImageSet(torch.arange(len(labels))[:, None, None, None], torch.from_numpy(labels), list("abcdefghij"))
    whole = whole._replace(classes=whole.classes[:len(counts)])
    stay, held = data.hold_out(whole, n, seed=3)
    assert len(held.images) == n and stay.classes == held.classes == whole.classes
    assert sorted(numbers(stay) + numbers(held)) == list(range(len(labels)))
    assert numbers(stay) == sorted(numbers(stay)) and numbers(held) == sorted(numbers(held))
    for part in (stay, held):
        assert part.labels.equal(whole.labels[numbers(part)])
    for label, count in enumerate(counts):
        assert abs((held.labels == label).sum().item() - n * count / len(labels)) < 1
        assert not count or (stay.labels == label).any()


@pytest.mark.parametrize("counts, n, expected", [
    ([7, 50, 3, 140], 20, [1, 5, 0, 14]),  # of 0.7, 5, 0.3 and 14
    ([5, 5, 5], 4, [2, 1, 1])])  # of equal remainders the first
def test_the_largest_remainders_are_rounded_up(counts, n, expected):
    assert image_set.stratified_counts(torch.tensor(counts), n).tolist() == expected


def test_held_out_images_depend_on_the_seed_alone():
    whole = numbered([0, 1] * 60, ["a", "b"])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    held = [numbers(data.hold_out(whole, 20, seed)[1]) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2] and torch.equal(torch.get_rng_state(), before)
    often = torch.zeros(120)
    for seed in range(300):
        often[numbers(data.hold_out(whole, 20, seed)[1])] += 1
    assert often.min() > 20 and often.max() < 85  # of 300 / 6 = 50, deviation 6.5


@pytest.mark.parametrize("counts, n, nearest", [
    ([3, 3], 6, "4"), ([3, 3], 5, "4"), ([3, 3], 0, "1"), ([3, 3], -2, "1"), ([3, 3], 10**30, "4"), ([1, 1], 1, "none"),
    ([1, 9], 9, "4"), ([1, 9], 5, "4")])
def test_a_number_that_cannot_be_held_out_is_refused_with_the_nearest_valid_one(counts, n, nearest):
    whole = numbered([0] * counts[0] + [1] * counts[1], ["a", "b"])
    with pytest.raises(data.DataError, match=f"^{n} of {sum(counts)} training images .* nearest valid is {nearest}$"):
        data.hold_out(whole, n, seed=1)
    if nearest != "none":
        assert len(data.hold_out(whole, int(nearest), seed=1)[1].images) == int(nearest)


def test_mean_and_std_are_those_of_the_pixels_in_any_order():
    images = noise(50)
    images[:, 2] = 7  # a constant channel, which gets deviation 1
    mean, std = data.mean_and_std(images)
    pixels = images.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert mean == pytest.approx(pixels.mean(1), abs=1e-12)
    assert std == pytest.approx([*pixels[:2].std(1), 1], abs=1e-12)
    assert data.mean_and_std(images[torch.randperm(50)]) == (mean, std)  # exactly


# --- digest and channels ----------------------------------------------------------------------------------------

def test_digest_notices_every_change():
    whole = data.ImageSet(noise(7), torch.tensor([0, 1, 0, 1, 1, 0, 0]), ["a", "b"])
    pixel, label = whole.images.clone(), whole.labels.clone()
    pixel[6, 2, 31, 31] ^= 1
    label[6] = 1
    order = torch.tensor([1, 0, 2, 3, 4, 5, 6])
    changed = [whole._replace(images=pixel), whole._replace(labels=label), whole._replace(classes=["a", "c"]),
               whole._replace(classes=["b", "a"]), whole._replace(classes=["a, b"]),
               whole._replace(classes=["a", "b", ""]),
               whole._replace(images=whole.images.view(7, 3, 16, 64)), whole._replace(images=whole.images[order]),
               whole._replace(images=whole.images[:6], labels=whole.labels[:6])]
    digests = [data.digest(images) for images in (whole, *changed)]
    assert len(set(digests)) == len(digests) and all(len(value) == 64 for value in digests)


def test_digest_does_not_depend_on_the_layout_in_memory():
    whole = data.ImageSet(noise(1500, 4, 4), torch.arange(1500) % 2, ["a", "\udcff\n"])  # a name that is not UTF-8
    transposed = whole.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert data.digest(whole) == data.digest(whole._replace(images=transposed, labels=whole.labels.repeat(2)[:1500]))
    gray = whole._replace(images=whole.images[:, :1])
    expanded = data.with_channels(gray, 3)
    assert data.digest(expanded) == data.digest(expanded._replace(images=expanded.images.contiguous()))
    assert data.digest(expanded) != data.digest(gray)


def test_gray_images_fit_a_colour_network_but_colour_images_do_not_fit_a_gray_one():
    gray, colour = (data.ImageSet(noise(3, channels=n), torch.arange(3), list("abc")) for n in (1, 3))
    for channel in range(3):
        assert data.with_channels(gray, 3).images[:, channel].equal(gray.images[:, 0])
    for images, channels in ((gray, 1), (colour, 3)):
        assert data.with_channels(images, channels).images.equal(images.images)
    with pytest.raises(data.DataError, match=r"^the images have 3 channels, the network takes 1; valid are grayscale"):
        data.with_channels(colour, 1)

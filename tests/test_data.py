"""data.py: what it reads, what it refuses, and what a training batch is."""

import hashlib
import os
import pickle
import random

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from common import RECORD, SAMPLE, cut_sample
from torchvision.datasets import CIFAR10

import data

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]


def made_up(n, seed=0):
    """n records of the binary version: labels and pixels at random"""
    records = np.random.default_rng(seed).integers(0, 256, (n, RECORD), dtype=np.uint8)
    records[:, 0] %= 10
    return records


def write_binary(folder, train=(4, 3), test=2):
    """A small data set in several batch files -> all training records, test records"""
    folder.mkdir(parents=True)
    batches = [made_up(n, seed) for seed, n in enumerate(train)]
    for name, records in zip(BATCHES, batches, strict=False):
        records.tofile(folder / name)
    made_up(test, 99).tofile(folder / "test_batch.bin")
    return np.concatenate(batches), made_up(test, 99)


def image_set(images):
    return data.ImageSet(images, torch.arange(len(images)) % 10, CLASSES)


def batches_of(images, mean=None, std=None):
    channels = images.shape[1]
    return data.Batches(image_set(images), mean or [0.0] * channels, std or [1.0] * channels, torch.device("cpu"))


def noise(n, height=32, width=32, channels=3):
    return torch.from_numpy(np.random.default_rng(1).integers(1, 256, (n, channels, height, width), dtype=np.uint8))


# --- the binary version -----------------------------------------------------------------------------------------

def test_built_in_sample_is_stratified():
    train, test = data.load("cifar10", str(SAMPLE))
    assert train.images.shape == (1000, 3, 32, 32) and test.images.shape == (200, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64 and train.classes == CLASSES
    assert train.labels.bincount().tolist() == [100] * 10 and test.labels.bincount().tolist() == [20] * 10


@pytest.mark.parametrize("where", ["", "cifar-10-batches-bin"])
def test_binary_records(tmp_path, where):
    expected = write_binary(tmp_path / "d" / where)
    for images, records in zip(data.load("cifar10", str(tmp_path / "d")), expected, strict=True):
        assert len(images.images) == len(records)
        for image, label, record in zip(images.images, images.labels, records, strict=True):
            assert label == record[0]
            for channel, y, x in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 31, 31), (1, 17, 5)]:
                assert image[channel, y, x] == record[1 + channel * 1024 + y * 32 + x]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def bad_label(path):
    content = bytearray(path.read_bytes())
    content[RECORD] = 10
    path.write_bytes(content)


def make_folder(path):
    path.unlink()
    path.mkdir()


def grow_to_full_size(path):
    os.truncate(path, 30_730_000)


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
@pytest.mark.parametrize("damage, said", [
    (truncate, "has 6145 bytes; valid is a multiple of 3073"),
    (bad_label, "record 1: label 10; valid is 0 to 9"),
    (lambda path: os.truncate(path, 0), "has 0 bytes"),
    (lambda path: path.unlink(), "is missing"),
    (make_folder, ""),
])
def test_damaged_file_is_named(tmp_path, name, damage, said):
    write_binary(tmp_path / "d", train=(2, 2, 2), test=2)
    damage(tmp_path / "d" / name)
    with pytest.raises(data.DataError) as refusal:
        data.load("cifar10", str(tmp_path / "d"))
    assert f"{tmp_path}/d/{name}" in str(refusal.value) and said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_full_size_files_need_the_published_sums(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    write_binary(folder, train=(1, 1, 1, 1, 1), test=1)
    grow_to_full_size(folder / "data_batch_3.bin")
    with pytest.raises(data.DataError, match=r"data_batch_1.bin has 3073 bytes; valid are 30730000"):
        data.load("cifar10", str(folder))
    for name in [*BATCHES, "test_batch.bin"]:
        grow_to_full_size(folder / name)
    with pytest.raises(data.DataError, match=r"data_batch_1.bin is damaged: its MD5 sum is \w{32}, CIFAR-10's is 5dd7"):
        data.load("cifar10", str(folder))
    content = (folder / "test_batch.bin").read_bytes()
    monkeypatch.setitem(data.CIFAR10_MD5, "test_batch.bin", hashlib.md5(content).hexdigest())
    assert len(data.read_records(folder / "test_batch.bin")[1]) == 10_000
    (folder / "test_batch.bin").write_bytes(content[:-1] + b"\1")  # one bit
    with pytest.raises(data.DataError, match="MD5"):
        data.read_records(folder / "test_batch.bin")


# --- the python version -----------------------------------------------------------------------------------------

def write_python(folder, monkeypatch, n=2):
    """The pickled layout, its sums in the place of CIFAR-10's -> its records as in the binary version"""
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    batches = {name: made_up(n, seed) for seed, name in enumerate(names)}
    files = {name: {"data": records[:, 1:], "labels": records[:, 0].tolist()} for name, records in batches.items()}
    files["batches.meta"] = {"label_names": CLASSES}
    sums = {}
    for name, content in files.items():
        content = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return np.concatenate([batches[name] for name in names[:5]]), batches["test_batch"]


@pytest.mark.parametrize("root", [".", "cifar-10-batches-py"])
def test_python_version_gives_what_the_binary_one_does(tmp_path, monkeypatch, root):
    expected = write_python(tmp_path / "cifar-10-batches-py", monkeypatch)
    for images, records in zip(data.load("cifar10", str(tmp_path / root)), expected, strict=True):
        assert np.array_equal(images.images.numpy(), records[:, 1:].reshape(-1, 3, 32, 32))
        assert images.images.dtype == torch.uint8 and images.labels.tolist() == records[:, 0].tolist()
        assert images.classes == CLASSES


def test_damaged_python_version_is_named_and_not_unpickled(tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = tmp_path / "cifar-10-batches-py"
    write_python(folder, monkeypatch)
    (folder / "data_batch_4").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(data.DataError, match=r"cifar-10-batches-py/data_batch_4 is damaged"):
        data.load("cifar10", str(tmp_path))
    assert not (tmp_path / "executed").exists()
    (folder / "data_batch_4").unlink()
    with pytest.raises(data.DataError, match=r"cifar-10-batches-py/data_batch_4 is missing"):
        data.load("cifar10", str(tmp_path))


def test_download_arrives_whole_or_not_at_all(tmp_path, monkeypatch):
    write_python(tmp_path / "server", monkeypatch)
    monkeypatch.chdir(tmp_path)

    def interrupted(self):
        os.mkdir(f"{self.root}/cifar-10-batches-py")
        raise KeyboardInterrupt

    def refused(self):
        raise OSError("no\nnetwork")

    def complete(self):
        print("torchvision's chatter")
        if not self._check_integrity():
            os.rename(tmp_path / "server", f"{self.root}/cifar-10-batches-py")

    monkeypatch.setattr(CIFAR10, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("cifar10", "new/data")
    monkeypatch.setattr(CIFAR10, "download", refused)
    with pytest.raises(data.DataError, match=r"no CIFAR-10 in new/data.*\(no\).*cifar-10-batches-bin.*--data tests/c"):
        data.load("cifar10", "new/data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["server"]  # nothing is left of either
    monkeypatch.setattr(CIFAR10, "download", complete)
    assert len(data.load("cifar10", "new/data")[0].images) == 10
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*/*")] == ["new/data/cifar-10-batches-py"]


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(data.DataError, match="f is not a directory"):
        data.load("cifar10", str(tmp_path / "f"))


def test_mean_and_std():
    images = noise(50)
    images[:, 2] = 7  # a constant channel is left as it is
    mean, std = data.mean_and_std(images)
    pixels = images.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert mean == pytest.approx(pixels.mean(1), abs=1e-12)
    assert std == pytest.approx([*pixels[:2].std(1), 1], abs=1e-12)
    assert data.mean_and_std(images[torch.randperm(50)]) == (mean, std)  # exactly, whatever the order


# --- the random numbers of an epoch -----------------------------------------------------------------------------

def test_every_offset_and_flip_occurs_equally_often():
    n = 81 * 2 * 200
    drawn = data.draw(n, seed=3, epoch=7)
    assert drawn.order.sort().values.equal(torch.arange(n))
    assert drawn.dy.unique().tolist() == drawn.dx.unique().tolist() == list(range(-4, 5))
    counts = (((drawn.dy + 4) * 9 + drawn.dx + 4) * 2 + drawn.flip).bincount(minlength=162).double()
    chi2 = ((counts - 200) ** 2 / 200).sum().item()  # 161 degrees of freedom: mean 161, deviation 18
    assert 90 < chi2 < 250 and counts.min() > 0


def test_every_epoch_and_seed_draws_anew_and_the_same_again():
    epochs = {(seed, epoch): data.draw(1000, seed, epoch) for seed in (0, 1) for epoch in (1, 2)}
    for i, field in enumerate(data.Augmentation._fields):
        assert len({tuple(drawn[i].tolist()) for drawn in epochs.values()}) == 4, field
    assert all(torch.equal(a, b) for a, b in zip(data.draw(1000, 1, 2), epochs[1, 2], strict=True))
    seeds = {data.epoch_seed(seed, epoch) for seed in range(50) for epoch in range(1, 301)}
    assert len(seeds) == 50 * 300 and data.epoch_seed(1, 2) == 1_000_005
    assert data.epoch_seed(2**32 - 1, 10**6) < 2**63  # what a generator takes


def test_random_numbers_are_private(monkeypatch):
    """Neither torch's global generator, nor the thread count, nor what was drawn before has a say, nor notices."""
    expected = data.draw(500, 1, 1)
    torch.manual_seed(5)
    random.seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        drawn = data.draw(500, 1, 1)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(r.device.type == "cpu" for r in drawn)


def test_an_image_has_its_crop_whatever_batch_it_is_in():
    """Hence also whatever process has it: the numbers belong to the image, not to the step."""
    batches, drawn = batches_of(noise(21)), data.draw(21, 1, 1)
    images, labels = (torch.cat(parts) for parts in zip(*batches.augmented(drawn, 21), strict=True))
    for size in (1, 4, 20):
        parts = list(batches.augmented(drawn, size))
        assert [len(labels) for _, labels in parts] == [size] * (21 // size) + [21 % size] * (21 % size > 0)
        assert torch.equal(torch.cat([p[0] for p in parts]), images)
        assert torch.equal(torch.cat([p[1] for p in parts]), labels)
    for rank in range(2):  # every other image of the order, as two processes would share them
        mine = drawn._replace(order=drawn.order[rank::2])
        assert torch.equal(torch.cat([p[0] for p in batches.augmented(mine, 4)]), images[rank::2])


def test_every_image_is_in_an_epoch_once():
    images = torch.arange(21, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    for order in (None, torch.randperm(21)):
        parts = list(batches_of(images).plain(4, order))
        seen = torch.cat([(p[0] * 255).round()[:, 0, 0, 0].int() for p in parts])
        assert seen.equal((torch.arange(21) if order is None else order).int())
        assert torch.cat([p[1] for p in parts]).equal(seen.long() % 10)


# --- crop and flip ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, channels", [(32, 32, 3), (12, 20, 1)])
def test_crop_is_what_torchvision_does(height, width, channels):
    """Every offset and flip: pad by 4 with black, crop, flip, and only then normalise."""
    images = noise(2, height, width, channels)
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    batches = batches_of(images, mean, std)
    for dy in range(-4, 5):
        for dx in range(-4, 5):
            for flip in (False, True):
                got = batches.crop(torch.arange(2), torch.tensor([dy] * 2), torch.tensor([dx] * 2),
                                   torch.tensor([flip] * 2))
                want = vision.crop(vision.pad(images, [4]), 4 + dy, 4 + dx, height, width)
                want = vision.hflip(want) if flip else want
                want = vision.normalize(want.float() / 255, mean, std)
                assert got.shape == want.shape and (got - want).abs().max() < 1e-6


def test_pixels_never_wrap_and_padding_is_black_before_normalising():
    white = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    batches = batches_of(white, [0.5] * 3, [0.25] * 3)
    middle = torch.tensor([1])  # it has neighbours whose pixels must not come in
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
    mean, std = data.mean_and_std(images)
    batch = torch.cat([b for b, _ in batches_of(images, mean, std).plain(2)])
    assert batch.dtype == torch.float32 and batch.shape == (5, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5 and (batch.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_cut_sample_is_read(tmp_path):
    train, test = data.load("cifar10", cut_sample(tmp_path / "d"))
    assert len(train.images) == 80 and len(test.images) == 40

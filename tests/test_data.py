"""data.py: CIFAR-10, CIFAR-100 and SVHN, selecting classes, holding out images, mean and deviation."""

import hashlib
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import RECORD, SAMPLE
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from lib import data

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE_CLASSES = [f"fine_{i:02}" for i in range(100)]


def load_error(dataset, folder, **settings):
    """-> the one-line message with which data.load refuses the data"""
    with pytest.raises(data.DataError) as raised:
        data.load(dataset, folder, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def made_up(n, seed=0):
    """-> (n, RECORD): records of the binary version with random labels and pixels"""
    records = np.random.default_rng(seed).integers(0, 256, (n, RECORD), dtype=np.uint8)
    records[:, 0] %= 10
    return records


def check_images(images, records, classes=CLASSES):
    assert np.array_equal(images.pixels.numpy(), records[:, 1:].reshape(-1, 3, 32, 32))
    assert images.labels.tolist() == records[:, 0].tolist() and images.classes == classes and images.files is None
    assert images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64


# --- the binary version -----------------------------------------------------------------------------------------

def write_binary(folder):
    """Writes a small data set -> all training records, test records"""
    folder.mkdir(parents=True)
    records = {f"data_batch_{i}.bin": made_up(2, i) for i in (1, 2, 3)} | {"test_batch.bin": made_up(2, 99)}
    for name, content in records.items():
        content.tofile(folder / name)
    *train, test = records.values()
    return np.concatenate(train), test


def test_the_built_in_sample_has_100_training_and_20_test_images_of_each_class():
    for images, n in zip(data.load("cifar10", SAMPLE), (100, 20), strict=True):
        assert images.pixels.shape == (10 * n, 3, 32, 32) and images.labels.bincount().tolist() == [n] * 10


@pytest.mark.parametrize("where", ["", "cifar-10-batches-bin"])
def test_the_binary_version_is_read_from_its_folder_or_the_parent(tmp_path, where):
    train, test = write_binary(tmp_path / "d" / where)
    for images, records in zip(data.load("cifar10", str(tmp_path / "d")), (train, test), strict=True):
        check_images(images, records)
    (tmp_path / "d" / where / "data_batch_1.bin").unlink()
    [images] = data.load("cifar10", tmp_path / "d", ["test"])  # needs no training images
    check_images(images, test)


@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: os.truncate(path, 2 * RECORD - 1), "has 6145 bytes; valid is a multiple of 3073"),
    (lambda path: os.truncate(path, 0), "has 0 bytes"),
    (lambda path: path.write_bytes(bytes(RECORD) + bytes([10]) * RECORD), "has the label 10; valid are 0 to 9"),
    (Path.unlink, "cannot be read (No such file or directory)")])
def test_a_damaged_or_missing_binary_file_is_named(tmp_path, damage, said):
    write_binary(tmp_path / "d")
    damage(tmp_path / "d/data_batch_2.bin")
    assert f"{tmp_path}/d/data_batch_2.bin {said}" in load_error("cifar10", tmp_path / "d")


# --- torchvision's readers --------------------------------------------------------------------------------------

def write_cifar(folder, monkeypatch, reader=CIFAR10):
    """Writes a small python version, and has torchvision expect its MD5 sums -> training records, test records"""
    folder.mkdir(parents=True)
    label, classes = ("labels", CLASSES) if reader is CIFAR10 else ("fine_labels", FINE_CLASSES)
    names = [name for name, _ in reader.train_list + reader.test_list]
    batches = {name: made_up(2, seed) for seed, name in enumerate(names)}
    files = {name: {"data": records[:, 1:], label: records[:, 0].tolist()} for name, records in batches.items()}
    files[reader.meta["filename"]] = {reader.meta["key"]: classes}
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(reader, "train_list", [[name, sums[name]] for name in names[:-1]])
    monkeypatch.setattr(reader, "test_list", [[names[-1], sums[names[-1]]]])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": sums[reader.meta["filename"]]})
    *train, test = batches.values()
    return np.concatenate(train), test


@pytest.mark.parametrize(("dataset", "reader", "classes"), [
    ("cifar10", CIFAR10, CLASSES), ("cifar100", CIFAR100, FINE_CLASSES)])
def test_the_python_version_is_read_from_its_folder_or_the_parent(tmp_path, monkeypatch, dataset, reader, classes):
    folder = tmp_path / reader.base_folder
    expected = write_cifar(folder, monkeypatch, reader)
    for root in (folder, tmp_path):
        for images, records in zip(data.load(dataset, root), expected, strict=True):
            check_images(images, records, classes)


def test_data_that_are_missing_or_damaged_are_downloaded(tmp_path, monkeypatch):
    made, root = tmp_path / "made", tmp_path / "new/data"
    train, _ = write_cifar(made / "cifar-10-batches-py", monkeypatch)
    monkeypatch.setattr(CIFAR10, "download", lambda self: shutil.copytree(made, self.root, dirs_exist_ok=True))
    check_images(data.load("cifar10", root)[0], train)
    os.truncate(root / "cifar-10-batches-py/data_batch_3", 100)  # as if stopped while the archive was unpacked
    check_images(data.load("cifar10", root)[0], train)


def test_a_download_that_fails_is_one_line_and_stdout_stays_the_scripts_own(tmp_path, monkeypatch, capfd):
    def download(self):
        print("chatter")
        raise OSError(f"a silent server is given up after {socket.getdefaulttimeout()} s\nby Python")

    socket.setdefaulttimeout(None)
    monkeypatch.setattr(CIFAR100, "download", download)
    said = load_error("cifar100", tmp_path)
    assert f"no CIFAR100 with the published MD5 sums in {tmp_path}, and its download failed (a silent server is given" \
           " up after 30.0 s); put cifar-100-python there, or try the built-in sample: ./train.py --data tests/" in said
    out, err = capfd.readouterr()
    assert out == "" and "chatter" in err


@pytest.mark.parametrize(("dataset", "valid"), [
    ("cifar10", "cifar-10-batches-bin or cifar-10-batches-py"), ("cifar100", "cifar-100-python"),
    ("svhn", "train_32x32.mat")])
def test_nothing_is_downloaded_unasked_or_into_a_folder_of_pictures(tmp_path, monkeypatch, dataset, valid):
    for reader in (CIFAR10, SVHN):
        monkeypatch.setattr(reader, "download", lambda *_: pytest.fail("a download"))
    assert f"in {tmp_path}/new; put {valid} there" in load_error(dataset, tmp_path / "new", download=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "train/cat").mkdir(parents=True)
    assert "--dataset folder" in load_error(dataset, tmp_path)


@pytest.mark.parametrize("extra", [False, True])
def test_svhn_is_read_with_and_without_its_extra_images(tmp_path, monkeypatch, extra):
    """Its files hold images (32, 32, 3, n), and label 10 for the digit 0."""
    made = {}
    for split, n in (("train", 40), ("test", 12), ("extra", 30)):
        pixels, digits = made_up(n, n)[:, 1:].reshape(-1, 3, 32, 32), np.arange(n) % 10
        file = tmp_path / f"{split}_32x32.mat"
        pytest.importorskip("scipy.io").savemat(file, {
            "X": pixels.transpose(2, 3, 1, 0), "y": np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)})
        monkeypatch.setitem(SVHN.split_list, split, ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()])
        made[split] = pixels, digits
    train = [np.concatenate(parts) for parts in zip(made["train"], *[made["extra"]] * extra, strict=True)]
    for images, (pixels, digits) in zip(data.load("svhn", tmp_path, extra=extra), (train, made["test"]), strict=True):
        assert np.array_equal(images.pixels.numpy(), pixels) and images.labels.tolist() == digits.tolist()
        assert images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert images.classes == list("0123456789")
    os.truncate(tmp_path / "test_32x32.mat", 100)
    assert "put test_32x32.mat there" in load_error("svhn", tmp_path, download=False)


def test_svhn_without_scipy_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install 'densenet-pytorch[svhn]'" in load_error("svhn", tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- classes ----------------------------------------------------------------------------------------------------

def test_selected_classes_have_labels_in_the_order_of_the_names():
    selected = data.load("cifar10", SAMPLE, classes=["dog", "cat"])
    for whole, images in zip(data.load("cifar10", SAMPLE), selected, strict=True):
        is_cat, is_dog = whole.labels == 3, whole.labels == 5
        assert images.pixels.equal(whole.pixels[is_cat | is_dog]) and images.classes == ["dog", "cat"]
        assert images.labels.equal(is_cat[is_cat | is_dog].long())


@pytest.mark.parametrize(("names", "said"), [
    (["cat", "cow"], "class cow is unknown or has no image; valid are airplane, automobile, bird, cat, deer, dog, "),
    (["cat", "cat"], "class cat is named twice; valid are airplane, "),
    (["cat"], "['cat'] are fewer than two; valid are two or more of airplane, ")])
def test_classes_that_cannot_be_selected_are_refused(names, said):
    assert said in load_error("cifar10", SAMPLE, classes=names)


# --- validation images ------------------------------------------------------------------------------------------

def numbered(labels, classes):
    """-> images in which all pixels of image i are i, from files named i"""
    pixels = torch.arange(len(labels)).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return data.Images(pixels, torch.tensor(labels), classes, [str(i) for i in range(len(labels))])


def numbers(images):
    """-> for each image the i that it had in ``numbered``"""
    assert images.files == [str(i.item()) for i in images.pixels[:, 0, 0, 0]]
    return images.pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(("n", "seed", "held"), [  # drawn by version 1.1, whose runs resume with the same images
    (5, 2, [1, 6, 8, 10, 19]), (7, 1, [0, 1, 2, 5, 9, 13, 19])])
def test_the_images_that_are_held_out_are_those_of_version_1_1(n, seed, held):
    whole = numbered([0, 1, 2, 1, 1, 0, 2, 1, 0, 1, 1, 2, 0, 1, 1, 1, 0, 1, 2, 1], ["a", "b", "c"])
    before = torch.get_rng_state()
    kept, val = whole.hold_out(n, seed)
    assert numbers(val) == held and numbers(kept) == [i for i in range(20) if i not in held]
    assert val.labels.tolist() == whole.labels[held].tolist() and val.classes == kept.classes == whole.classes
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("counts", "n", "expected"), [
    ([7, 50, 3, 140], 20, [1, 5, 0, 14]),  # of 0.7, 5, 0.3 and 14: the largest remainders are rounded up
    ([5, 5, 5], 4, [2, 1, 1]),  # of equal remainders the first
    ([5, 0, 9], 4, [1, 0, 3])])
def test_each_class_has_its_share_of_the_images_that_are_held_out(counts, n, expected):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    kept, val = numbered(labels.tolist(), list("abcd")[:len(counts)]).hold_out(n, seed=3)
    assert val.labels.bincount(minlength=len(counts)).tolist() == expected and len(kept.labels) == len(labels) - n


@pytest.mark.parametrize(("counts", "n"), [([3, 3], 0), ([3, 3], 6), ([1, 9], 5)])
def test_a_number_that_leaves_a_class_without_training_images_is_refused(counts, n):
    with pytest.raises(data.DataError, match=f"^{n} of {sum(counts)} training images cannot be held out; valid are 1 "):
        numbered([0] * counts[0] + [1] * counts[1], ["a", "b"]).hold_out(n, seed=1)


# --- pixels -----------------------------------------------------------------------------------------------------

def test_mean_and_std_are_those_of_the_pixels_in_any_order():
    images = data.load("cifar10", SAMPLE)[1]
    images.pixels[:, 2] = 7  # a constant channel, which gets deviation 1
    mean, std = images.mean_and_std()
    pixels = images.pixels.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert mean == pytest.approx(pixels.mean(1), abs=1e-12)
    assert std == pytest.approx([*pixels[:2].std(1), 1], abs=1e-12)
    assert images._replace(pixels=images.pixels.flip(0)).mean_and_std() == (mean, std)  # exactly


def test_gray_images_fit_a_colour_network_but_colour_images_do_not_fit_a_gray_one():
    colour = numbered([0, 1, 2], list("abc"))
    gray = colour._replace(pixels=colour.pixels[:, :1])
    assert gray.with_channels(3).pixels.equal(colour.pixels)
    with pytest.raises(data.DataError, match=r"^the images have 3 channels, the network takes 1; valid are grayscale"):
        colour.with_channels(1)

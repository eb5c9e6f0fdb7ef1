"""data.py: reading CIFAR and SVHN, and refusing files that are damaged, missing or not regular."""

import hashlib
import os
import pickle
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import RECORD, SAMPLE, cut_sample
from image_helpers import CLASSES, load_error
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from lib import data

BATCH_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]
FINE_CLASSES = [f"fine_{i:02}" for i in range(100)]


def made_up(n, seed=0):
    """-> (n, RECORD): records of the binary version with random labels and pixels"""
    records = np.random.default_rng(seed).integers(0, 256, (n, RECORD), dtype=np.uint8)
    records[:, 0] %= 10
    return records


def write_binary(folder, train=(4, 3), test=2):
    """A small data set in several batch files -> all training records, test records"""
    folder.mkdir(parents=True)
    batches = [made_up(n, seed) for seed, n in enumerate(train)]
    for name, records in zip(BATCH_FILES, batches, strict=False):
        records.tofile(folder / name)
    made_up(test, 99).tofile(folder / "test_batch.bin")
    return np.concatenate(batches), made_up(test, 99)


# --- the binary version -----------------------------------------------------------------------------------------

def test_built_in_sample_is_stratified():
    train, test = data.load("cifar10", str(SAMPLE))
    assert train.images.shape == (1000, 3, 32, 32) and test.images.shape == (200, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64 and train.classes == CLASSES
    assert train.labels.bincount().tolist() == [100] * 10 and test.labels.bincount().tolist() == [20] * 10


@pytest.mark.parametrize("where", ["", "cifar-10-batches-bin"])
def test_binary_records_become_labels_and_pixels(tmp_path, where):
    expected = write_binary(tmp_path / "d" / where)
    for images, records in zip(data.load("cifar10", str(tmp_path / "d")), expected, strict=True):
        assert len(images.images) == len(records)
        for image, label, record in zip(images.images, images.labels, records, strict=True):
            assert label == record[0]
            for channel, y, x in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 31, 31), (1, 17, 5)]:
                assert image[channel, y, x] == record[1 + channel * 1024 + y * 32 + x]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def put(position, value):
    """-> a function that sets this byte of a file"""
    def damage(path):
        content = bytearray(path.read_bytes())
        content[position] = value
        path.write_bytes(content)
    return damage


def make_folder(path):
    path.unlink()
    path.mkdir()


def grow_to_full_size(path):
    os.truncate(path, 30_730_000)


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
@pytest.mark.parametrize("damage, said", [
    (truncate, "has 6145 bytes; valid is a multiple of 3073"),
    (put(RECORD, 10), "record 1: label 10; valid is 0 to 9"),
    (lambda path: os.truncate(path, 0), "has 0 bytes"),
    (lambda path: path.unlink(), "is missing"),
    (make_folder, ""),
])
def test_a_damaged_binary_file_is_named(tmp_path, name, damage, said):
    write_binary(tmp_path / "d", train=(2, 2, 2), test=2)
    damage(tmp_path / "d" / name)
    message = load_error("cifar10", tmp_path / "d")
    assert f"{tmp_path}/d/{name}" in message and said in message


def test_full_size_files_need_the_published_sums(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    write_binary(folder, train=(1, 1, 1, 1, 1), test=1)
    grow_to_full_size(folder / "data_batch_3.bin")
    with pytest.raises(data.DataError, match=r"data_batch_1.bin has 3073 bytes; valid are 30730000"):
        data.load("cifar10", str(folder))
    for name in [*BATCH_FILES, "test_batch.bin"]:
        grow_to_full_size(folder / name)
    with pytest.raises(data.DataError, match=r"data_batch_1.bin is damaged: its MD5 sum is \w{32}, CIFAR-10's is 5dd7"):
        data.load("cifar10", str(folder))
    content = (folder / "test_batch.bin").read_bytes()
    kind = data.CIFAR["cifar10"]
    monkeypatch.setitem(kind.files, "test_batch.bin", (len(content), hashlib.md5(content).hexdigest()))
    assert len(data.read_records(kind, folder / "test_batch.bin")[1]) == 10_000
    (folder / "test_batch.bin").write_bytes(content[:-1] + b"\1")  # one bit differs
    with pytest.raises(data.DataError, match="MD5"):
        data.read_records(kind, folder / "test_batch.bin")


# --- the python version -----------------------------------------------------------------------------------------

def write_python(folder, monkeypatch, reader=CIFAR10, n=2):
    """Writes the pickled layout, and has its MD5 sums taken for the published ones -> training, test records"""
    folder.mkdir(parents=True)
    label, classes = ("labels", CLASSES) if reader is CIFAR10 else ("fine_labels", FINE_CLASSES)
    names = [name for name, _ in [*reader.train_list, *reader.test_list]]
    batches = {name: made_up(n, seed) for seed, name in enumerate(names)}
    files = {name: {"data": records[:, 1:], label: records[:, 0].tolist()} for name, records in batches.items()}
    files[reader.meta["filename"]] = {reader.meta["key"]: classes}
    sums = {}
    for name, content in files.items():
        content = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(reader, "train_list", [[name, sums[name]] for name in names[:-1]])
    monkeypatch.setattr(reader, "test_list", [[names[-1], sums[names[-1]]]])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": sums[reader.meta["filename"]]})
    return np.concatenate([batches[name] for name in names[:-1]]), batches[names[-1]]


@pytest.mark.parametrize("dataset, reader, classes", [
    ("cifar10", CIFAR10, CLASSES), ("cifar100", CIFAR100, FINE_CLASSES)])
@pytest.mark.parametrize("own", [False, True])
def test_the_python_version_gives_the_same_as_the_binary_one(tmp_path, monkeypatch, dataset, reader, classes, own):
    folder = tmp_path / reader.base_folder
    expected = write_python(folder, monkeypatch, reader)
    for images, records in zip(data.load(dataset, str(folder if own else tmp_path)), expected, strict=True):
        assert np.array_equal(images.images.numpy(), records[:, 1:].reshape(-1, 3, 32, 32))
        assert images.images.dtype == torch.uint8 and images.labels.tolist() == records[:, 0].tolist()
        assert images.classes == classes


def test_a_damaged_python_version_is_named_and_not_unpickled(tmp_path, monkeypatch):
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


def test_download_arrives_whole_or_not_at_all(tmp_path, monkeypatch, capfd):
    write_python(tmp_path / "server", monkeypatch)
    monkeypatch.chdir(tmp_path)

    def interrupted(self):
        os.mkdir(f"{self.root}/cifar-10-batches-py")
        raise KeyboardInterrupt

    def fail(self):
        raise OSError("no\nnetwork")

    def complete(self):
        print("torchvision's chatter")
        assert socket.getdefaulttimeout() == 30  # seconds after which a silent server is given up
        if not self._check_integrity():
            os.rename(tmp_path / "server", f"{self.root}/cifar-10-batches-py")

    monkeypatch.setattr(CIFAR10, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("cifar10", "new/data")
    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(data.DataError, match=r"no CIFAR-10 in new/data.*\(no\).*cifar-10-batches-bin.*--data tests/c"):
        data.load("cifar10", "new/data")
    with pytest.raises(data.DataError, match=r"^no CIFAR-100 in new/data.*\(no\); put cifar-100-binary or cifar-100-p"):
        data.load("cifar100", "new/data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["server"]  # no remains of the three
    monkeypatch.setattr(CIFAR10, "download", complete)
    assert len(data.load("cifar10", "new/data")[0].images) == 10
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*/*")] == ["new/data/cifar-10-batches-py"]
    assert capfd.readouterr().out == "" and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("dataset", data.DATASETS)
def test_a_file_in_the_place_of_the_data_directory_is_refused(tmp_path, dataset):
    (tmp_path / "f").write_text("")
    assert "f is not a directory" in load_error(dataset, tmp_path / "f")


def test_an_unknown_data_set_is_refused_with_the_valid_ones(tmp_path):
    assert "mnist is not a data set; valid are cifar10, cifar100, svhn, folder" in load_error("mnist", tmp_path)


# --- CIFAR-100's binary version ---------------------------------------------------------------------------------

def write_cifar100(folder, train=5, test=3):
    """-> records of training and test set: coarse label, fine label, pixels"""
    folder.mkdir(parents=True)
    (folder / "fine_label_names.txt").write_text("\n".join(FINE_CLASSES) + "\n\n")
    files = {}
    for name, n in (("train.bin", train), ("test.bin", test)):
        files[name] = np.random.default_rng(n).integers(0, 256, (n, 3074), dtype=np.uint8)
        files[name][:, 0] %= 20
        files[name][:, 1] = (files[name][:, 1] % 80) + 20  # no coarse label has these values
        files[name].tofile(folder / name)
    return files.values()


@pytest.mark.parametrize("where", ["", "cifar-100-binary"])
def test_cifar100_has_the_fine_labels(tmp_path, where):
    expected = write_cifar100(tmp_path / "d" / where)
    for images, records in zip(data.load("cifar100", str(tmp_path / "d")), expected, strict=True):
        assert images.labels.tolist() == records[:, 1].tolist() and images.classes == FINE_CLASSES
        assert images.labels.dtype == torch.int64 and images.images.dtype == torch.uint8
        assert np.array_equal(images.images.numpy(), records[:, 2:].reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("name, damage, said", [
    ("train.bin", truncate, "has 15369 bytes; valid is a multiple of 3074"),
    ("test.bin", put(2 * 3074, 20), "record 2: coarse label 20; valid is 0 to 19"),
    ("train.bin", put(3074 + 1, 100), "record 1: fine label 100; valid is 0 to 99"),
    ("train.bin", lambda path: path.unlink(), "is missing"),
    ("test.bin", lambda path: path.unlink(), "is missing"),
    ("test.bin", lambda path: os.truncate(path, 30_740_000), "has 15370 bytes; valid are 153700000"),
    ("fine_label_names.txt", lambda path: path.unlink(), "cannot be read"),
    ("fine_label_names.txt", lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
    ("fine_label_names.txt", lambda path: path.write_text("\n".join(FINE_CLASSES[1:])), "99 names"),
    ("fine_label_names.txt", lambda path: path.write_text("\n".join([*FINE_CLASSES[1:], FINE_CLASSES[1]])),
     "100 names, 99 of them"),
])
def test_a_damaged_cifar100_file_is_named(tmp_path, name, damage, said):
    write_cifar100(tmp_path / "d")
    damage(tmp_path / "d" / name)
    message = load_error("cifar100", tmp_path / "d")
    named = "train.bin" if "153700000" in said else name  # test.bin has its full size there: train.bin is too small
    assert f"{tmp_path}/d/{named}" in message and said in message


# --- SVHN -------------------------------------------------------------------------------------------------------

def write_svhn(folder, sizes, **changes):
    """Writes files as published: images (32, 32, 3, n), label 10 for the digit 0 -> images (n, 3, 32, 32), digits"""
    scipy_io = pytest.importorskip("scipy.io")
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for split, n in sizes.items():
        numbers = np.random.default_rng(n)
        images, digits = numbers.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), numbers.integers(0, 10, n)
        content = {"X": images.transpose(2, 3, 1, 0), "y": np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)}
        scipy_io.savemat(folder / f"{split}_32x32.mat", content | changes, do_compression=True)
        made[split] = images, digits
    return made


@pytest.mark.parametrize("extra", [False, True])
def test_svhn_is_read_with_and_without_its_extra_images(tmp_path, extra):
    made = write_svhn(tmp_path, {"train": 40, "test": 1, "extra": 30})
    train, test = data.load("svhn", str(tmp_path), extra=extra)
    expected = [np.concatenate(parts) for parts in zip(made["train"], *[made["extra"]] * extra, strict=True)]
    for images, (pixels, digits) in ((train, expected), (test, made["test"])):
        assert np.array_equal(images.images.numpy(), pixels) and images.labels.tolist() == digits.tolist()
        assert images.images.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert images.images.is_contiguous() and images.classes == list("0123456789")
    assert 0 in train.labels  # 10 in the file


@pytest.mark.parametrize("changes, said", [
    (dict(y=np.array([[1], [11], [3], [4]], dtype=np.uint8)), "record 1: label 11; valid is 0 to 9"),
    (dict(y=np.array([[1], [2]], dtype=np.uint8)), "has 2 labels and uint8 images of shape (4, 3, 32, 32)"),
    (dict(X=np.zeros((32, 32, 1, 4), dtype=np.uint8)), "images of shape (4, 1, 32, 32)"),
    (dict(X=np.zeros((32, 32, 3), dtype=np.uint8)), "cannot be read"),
    (dict(X=np.zeros((32, 32, 3, 4))), "float64 images"),
    (dict(y=np.array([["a"], ["b"]])), "cannot be read"),
])
def test_an_svhn_file_of_another_layout_is_named(tmp_path, changes, said):
    write_svhn(tmp_path, {"train": 4})
    write_svhn(tmp_path, {"test": 4}, **changes)
    message = load_error("svhn", tmp_path)
    assert f"{tmp_path}/test_32x32.mat" in message and said in message


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path, path.stat().st_size - 100), lambda path: os.truncate(path, 0), make_folder,
    lambda path: path.write_text("<html>404</html>"), put(300, 77)])
def test_a_damaged_svhn_file_is_named(tmp_path, damage):
    write_svhn(tmp_path, {"train": 4, "test": 4})
    damage(tmp_path / "train_32x32.mat")
    message = load_error("svhn", tmp_path)
    assert f"{tmp_path}/train_32x32.mat cannot be read (" in message


def test_svhn_of_the_published_size_needs_the_published_sum(tmp_path, monkeypatch):
    write_svhn(tmp_path, {"train": 4, "test": 4})
    path = tmp_path / "train_32x32.mat"
    monkeypatch.setitem(data.SVHN_FULL_BYTES, "train", path.stat().st_size)
    assert f"{path} is damaged: its MD5 sum is" in load_error("svhn", tmp_path)
    url, name, _ = SVHN.split_list["train"]
    monkeypatch.setitem(SVHN.split_list, "train", [url, name, hashlib.md5(path.read_bytes()).hexdigest()])
    assert len(data.load("svhn", str(tmp_path))[0].images) == 4


def test_svhn_downloads_missing_files_completely_or_not_at_all(tmp_path, monkeypatch):
    write_svhn(tmp_path / "server", {"train": 4, "test": 3, "extra": 2})
    asked, broken = [], {"extra_32x32.mat"}

    def fetch(url, folder, name, md5):
        asked.append(name)
        assert url.endswith(name) and len(md5) == 32
        content = (tmp_path / "server" / name).read_bytes()
        if name in broken:
            (Path(folder) / name).write_bytes(content[:50])
            raise OSError("connection\nlost")
        (Path(folder) / name).write_bytes(content)

    monkeypatch.setattr(data, "download_url", fetch)
    root = tmp_path / "data"
    assert [len(part.images) for part in data.load("svhn", str(root))] == [4, 3]
    assert asked == ["train_32x32.mat", "test_32x32.mat"]
    message = load_error("svhn", root, extra=True)
    assert f"no SVHN in {root}" in message and "(connection); put extra_32x32.mat there" in message
    assert sorted(p.name for p in root.iterdir()) == ["test_32x32.mat", "train_32x32.mat"]
    broken.clear()
    assert [len(part.images) for part in data.load("svhn", str(root), extra=True)] == [6, 3]


def test_svhn_without_scipy_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install 'densenet-pytorch[svhn]'" in load_error("svhn", tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the test images alone --------------------------------------------------------------------------------------

def without_training_images(folder, names):
    """Damages these files, yields, removes them, and yields again."""
    for damage in (lambda path: path.write_bytes(b"broken"), lambda path: path.unlink()):
        for name in names:
            damage(folder / name)
        yield


def test_load_test_needs_no_training_images_of_the_binary_versions(tmp_path):
    _, records = write_binary(tmp_path / "ten")
    for _ in without_training_images(tmp_path / "ten", BATCH_FILES[:2]):
        test = data.load_test("cifar10", str(tmp_path / "ten"))
        assert np.array_equal(test.images.numpy(), records[:, 1:].reshape(-1, 3, 32, 32)) and test.classes == CLASSES
    _, records = write_cifar100(tmp_path / "hundred")
    for _ in without_training_images(tmp_path / "hundred", ["train.bin"]):
        test = data.load_test("cifar100", str(tmp_path / "hundred"))
        assert test.labels.tolist() == records[:, 1].tolist() and test.classes == FINE_CLASSES


@pytest.mark.parametrize("dataset, reader", [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_load_test_needs_no_training_images_of_the_python_version(tmp_path, monkeypatch, dataset, reader):
    folder = tmp_path / reader.base_folder
    _, records = write_python(folder, monkeypatch, reader)
    for _ in without_training_images(folder, [name for name, _ in reader.train_list]):
        test = data.load_test(dataset, str(tmp_path))
        assert np.array_equal(test.images.numpy(), records[:, 1:].reshape(-1, 3, 32, 32))
    (folder / reader.test_list[0][0]).write_bytes(b"broken")
    with pytest.raises(data.DataError, match="is damaged"):
        data.load_test(dataset, str(tmp_path))


def test_load_test_needs_no_training_images_of_svhn(tmp_path):
    made = write_svhn(tmp_path, {"train": 4, "test": 3})
    for _ in without_training_images(tmp_path, ["train_32x32.mat"]):
        test = data.load_test("svhn", str(tmp_path))
        assert np.array_equal(test.images.numpy(), made["test"][0])


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn"])
def test_nothing_is_downloaded_if_download_is_false(tmp_path, monkeypatch, dataset):
    pytest.importorskip("scipy.io")
    monkeypatch.setattr(CIFAR10, "download", lambda *_: pytest.fail("a download"))
    monkeypatch.setattr(data, "download_url", lambda *_: pytest.fail("a download"))
    for load in (data.load, data.load_test):
        with pytest.raises(data.DataError, match=rf"^no (CIFAR-100?|SVHN) in {tmp_path}/new; put \S+( or \S+)? there$"):
            load(dataset, str(tmp_path / "new"), download=False)
    assert list(tmp_path.iterdir()) == []


# --- pipes and devices ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dataset, name", [
    ("cifar10", "test_batch.bin"), ("cifar10", "cifar-10-batches-py/test_batch"), ("cifar100", "test.bin"),
    ("cifar100", "fine_label_names.txt"), ("svhn", "test_32x32.mat")])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_pipes_and_devices_are_refused_unread(tmp_path, monkeypatch, dataset, name, make):
    if "py/" in name:
        write_python(tmp_path / "cifar-10-batches-py", monkeypatch)
    else:
        {"cifar10": lambda: write_binary(tmp_path / "d"), "cifar100": lambda: write_cifar100(tmp_path / "d"),
         "svhn": lambda: write_svhn(tmp_path / "d", {"train": 3, "test": 3})}[dataset]()
    folder = tmp_path if "py/" in name else tmp_path / "d"
    (folder / name).unlink()
    make(folder / name)
    assert f"{folder / name} cannot be read (it is not a regular file)" in load_error(dataset, folder)


def test_cut_sample_is_read(tmp_path):
    train, test = data.load("cifar10", cut_sample(tmp_path / "d"))
    assert len(train.images) == 80 and len(test.images) == 40

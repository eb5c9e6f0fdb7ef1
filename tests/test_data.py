"""data.py: what it reads, what it refuses, and what a training batch is."""

import hashlib
import os
import pickle
import random
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from common import RECORD, SAMPLE, cut_sample
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

import data

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)]
FINE = [f"fine_{i:02}" for i in range(100)]


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


def refused(dataset, folder, **settings):
    """-> the one line that load() refuses the data with"""
    with pytest.raises(data.DataError) as refusal:
        data.load(dataset, str(folder), **settings)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


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
    message = refused("cifar10", tmp_path / "d")
    assert f"{tmp_path}/d/{name}" in message and said in message


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
    kind = data.CIFAR["cifar10"]
    monkeypatch.setitem(kind.files, "test_batch.bin", (len(content), hashlib.md5(content).hexdigest()))
    assert len(data.read_records(kind, folder / "test_batch.bin")[1]) == 10_000
    (folder / "test_batch.bin").write_bytes(content[:-1] + b"\1")  # one bit
    with pytest.raises(data.DataError, match="MD5"):
        data.read_records(kind, folder / "test_batch.bin")


# --- the python version -----------------------------------------------------------------------------------------

def write_python(folder, monkeypatch, reader=CIFAR10, n=2):
    """The pickled layout, its sums in the place of the published ones -> its records as in the binary version"""
    folder.mkdir(parents=True)
    label, classes = ("labels", CLASSES) if reader is CIFAR10 else ("fine_labels", FINE)
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


@pytest.mark.parametrize("dataset, reader, classes", [("cifar10", CIFAR10, CLASSES), ("cifar100", CIFAR100, FINE)])
@pytest.mark.parametrize("own", [False, True])
def test_python_version_gives_what_the_binary_one_does(tmp_path, monkeypatch, dataset, reader, classes, own):
    folder = tmp_path / reader.base_folder
    expected = write_python(folder, monkeypatch, reader)
    for images, records in zip(data.load(dataset, str(folder if own else tmp_path)), expected, strict=True):
        assert np.array_equal(images.images.numpy(), records[:, 1:].reshape(-1, 3, 32, 32))
        assert images.images.dtype == torch.uint8 and images.labels.tolist() == records[:, 0].tolist()
        assert images.classes == classes


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


def test_download_arrives_whole_or_not_at_all(tmp_path, monkeypatch, capfd):
    write_python(tmp_path / "server", monkeypatch)
    monkeypatch.chdir(tmp_path)

    def interrupted(self):
        os.mkdir(f"{self.root}/cifar-10-batches-py")
        raise KeyboardInterrupt

    def refused(self):
        raise OSError("no\nnetwork")

    def complete(self):
        print("torchvision's chatter")
        assert socket.getdefaulttimeout() == 30  # a silent server is given up
        if not self._check_integrity():
            os.rename(tmp_path / "server", f"{self.root}/cifar-10-batches-py")

    monkeypatch.setattr(CIFAR10, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load("cifar10", "new/data")
    monkeypatch.setattr(CIFAR10, "download", refused)
    with pytest.raises(data.DataError, match=r"no CIFAR-10 in new/data.*\(no\).*cifar-10-batches-bin.*--data tests/c"):
        data.load("cifar10", "new/data")
    with pytest.raises(data.DataError, match=r"^no CIFAR-100 in new/data.*\(no\); put cifar-100-binary or cifar-100-p"):
        data.load("cifar100", "new/data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["server"]  # nothing is left of any
    monkeypatch.setattr(CIFAR10, "download", complete)
    assert len(data.load("cifar10", "new/data")[0].images) == 10
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*/*")] == ["new/data/cifar-10-batches-py"]
    assert capfd.readouterr().out == "" and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("dataset", data.DATASETS)
def test_root_that_is_a_file(tmp_path, dataset):
    (tmp_path / "f").write_text("")
    assert "f is not a directory" in refused(dataset, tmp_path / "f")


def test_unknown_data_set(tmp_path):
    assert "mnist is no data set; valid are cifar10, cifar100, svhn, folder" in refused("mnist", tmp_path)


# --- CIFAR-100's binary version ---------------------------------------------------------------------------------

def write_cifar100(folder, train=5, test=3):
    """-> records of training and test set: coarse label, fine label, pixels"""
    folder.mkdir(parents=True)
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n\n")
    files = {}
    for name, n in (("train.bin", train), ("test.bin", test)):
        files[name] = np.random.default_rng(n).integers(0, 256, (n, 3074), dtype=np.uint8)
        files[name][:, 0] %= 20
        files[name][:, 1] = (files[name][:, 1] % 80) + 20  # never a coarse one
        files[name].tofile(folder / name)
    return files.values()


@pytest.mark.parametrize("where", ["", "cifar-100-binary"])
def test_cifar100_has_the_fine_labels(tmp_path, where):
    expected = write_cifar100(tmp_path / "d" / where)
    for images, records in zip(data.load("cifar100", str(tmp_path / "d")), expected, strict=True):
        assert images.labels.tolist() == records[:, 1].tolist() and images.classes == FINE
        assert images.labels.dtype == torch.int64 and images.images.dtype == torch.uint8
        assert np.array_equal(images.images.numpy(), records[:, 2:].reshape(-1, 3, 32, 32))


def put(position, value):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[position] = value
        path.write_bytes(content)
    return damage


@pytest.mark.parametrize("name, damage, said", [
    ("train.bin", truncate, "has 15369 bytes; valid is a multiple of 3074"),
    ("test.bin", put(2 * 3074, 20), "record 2: coarse label 20; valid is 0 to 19"),
    ("train.bin", put(3074 + 1, 100), "record 1: fine label 100; valid is 0 to 99"),
    ("train.bin", lambda path: path.unlink(), "is missing"),
    ("test.bin", lambda path: path.unlink(), "is missing"),
    ("test.bin", lambda path: os.truncate(path, 30_740_000), "has 15370 bytes; valid are 153700000"),
    ("fine_label_names.txt", lambda path: path.unlink(), "cannot be read"),
    ("fine_label_names.txt", lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
    ("fine_label_names.txt", lambda path: path.write_text("\n".join(FINE[1:])), "99 names"),
    ("fine_label_names.txt", lambda path: path.write_text("\n".join([*FINE[1:], FINE[1]])), "100 names, 99 of them"),
])
def test_damaged_cifar100_is_named(tmp_path, name, damage, said):
    write_cifar100(tmp_path / "d")
    damage(tmp_path / "d" / name)
    message = refused("cifar100", tmp_path / "d")
    named = "train.bin" if "153700000" in said else name  # the one that is not complete while the other is
    assert f"{tmp_path}/d/{named}" in message and said in message


# --- SVHN -------------------------------------------------------------------------------------------------------

def write_svhn(folder, sizes, **changes):
    """Files as published: images (32, 32, 3, n), the digit 0 labelled 10 -> images (n, 3, 32, 32), digits"""
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
def test_svhn(tmp_path, extra):
    made = write_svhn(tmp_path, {"train": 40, "test": 1, "extra": 30})
    train, test = data.load("svhn", str(tmp_path), extra=extra)
    expected = [np.concatenate(parts) for parts in zip(made["train"], *[made["extra"]] * extra, strict=True)]
    for images, (pixels, digits) in ((train, expected), (test, made["test"])):
        assert np.array_equal(images.images.numpy(), pixels) and images.labels.tolist() == digits.tolist()
        assert images.images.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert images.images.is_contiguous() and images.classes == list("0123456789")
    assert 0 in train.labels  # which the file has as 10


@pytest.mark.parametrize("changes, said", [
    (dict(y=np.array([[1], [11], [3], [4]], dtype=np.uint8)), "record 1: label 11; valid is 0 to 9"),
    (dict(y=np.array([[1], [2]], dtype=np.uint8)), "has 2 labels and uint8 images of shape (4, 3, 32, 32)"),
    (dict(X=np.zeros((32, 32, 1, 4), dtype=np.uint8)), "images of shape (4, 1, 32, 32)"),
    (dict(X=np.zeros((32, 32, 3), dtype=np.uint8)), "cannot be read"),
    (dict(X=np.zeros((32, 32, 3, 4))), "float64 images"),
    (dict(y=np.array([["a"], ["b"]])), "cannot be read"),
])
def test_wrong_svhn_is_named(tmp_path, changes, said):
    write_svhn(tmp_path, {"train": 4})
    write_svhn(tmp_path, {"test": 4}, **changes)
    message = refused("svhn", tmp_path)
    assert f"{tmp_path}/test_32x32.mat" in message and said in message


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path, path.stat().st_size - 100), lambda path: os.truncate(path, 0), make_folder,
    lambda path: path.write_text("<html>404</html>"), put(300, 77)])
def test_damaged_svhn_is_named(tmp_path, damage):
    write_svhn(tmp_path, {"train": 4, "test": 4})
    damage(tmp_path / "train_32x32.mat")
    message = refused("svhn", tmp_path)
    assert f"{tmp_path}/train_32x32.mat cannot be read (" in message


def test_svhn_of_the_published_size_needs_the_published_sum(tmp_path, monkeypatch):
    write_svhn(tmp_path, {"train": 4, "test": 4})
    path = tmp_path / "train_32x32.mat"
    monkeypatch.setitem(data.SVHN_FULL_BYTES, "train", path.stat().st_size)
    assert f"{path} is damaged: its MD5 sum is" in refused("svhn", tmp_path)
    url, name, _ = SVHN.split_list["train"]
    monkeypatch.setitem(SVHN.split_list, "train", [url, name, hashlib.md5(path.read_bytes()).hexdigest()])
    assert len(data.load("svhn", str(tmp_path))[0].images) == 4


def test_svhn_downloads_what_is_missing_and_that_whole(tmp_path, monkeypatch):
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
    message = refused("svhn", root, extra=True)
    assert f"no SVHN in {root}" in message and "(connection); put extra_32x32.mat there" in message
    assert sorted(p.name for p in root.iterdir()) == ["test_32x32.mat", "train_32x32.mat"]
    broken.clear()
    assert [len(part.images) for part in data.load("svhn", str(root), extra=True)] == [6, 3]


def test_svhn_without_scipy_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install 'densenet-pytorch[svhn]'" in refused("svhn", tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- a folder of images -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def photographs():
    """The first images of the sample's classes: {class: PIL images of 32x32}"""
    _, test = data.load("cifar10", str(SAMPLE))
    return {name: [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in test.images[test.labels == i][:4]]
            for i, name in enumerate(test.classes)}


def write_folder(root, photographs, gray=("cat/2.png",), test="test"):
    """root/train and root/test: cats and dogs of mixed sizes, as png and jpeg -> number of images of each"""
    for name in ("cat", "dog"):
        for i, image in enumerate(photographs[name]):
            path = root / ("train" if i < 3 else test) / name / f"{i}.{('png', 'JPG', 'png', 'jpeg')[i]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = image.resize([(32, 32), (80, 40), (40, 60), (30, 90)][i])
            image.convert("L" if f"{name}/{path.name}" in gray else "RGB").save(path)
    return root


def test_folder_of_mixed_images(tmp_path, photographs):
    root = write_folder(tmp_path / "d", photographs)
    for name in ("notes.txt", ".hidden.png", "._0.png", "Thumbs.db"):
        (root / "train/cat" / name).write_text("no image")
    (root / "train/cat/folder.png").mkdir()
    (root / "train/.cache").mkdir()
    (root / "train/README").write_text("about")
    train, test = data.load("folder", str(root), imageSize=24)
    assert train.images.shape == (6, 3, 24, 24) and test.images.shape == (2, 3, 24, 24)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 1]
    assert torch.equal(train.images[2, 0], train.images[2, 1]) and torch.equal(train.images[2, 0], train.images[2, 2])
    assert not torch.equal(train.images[5, 0], train.images[5, 1])
    again, _ = data.load("folder", str(root), imageSize=24)
    assert torch.equal(again.images, train.images)


def test_folder_keeps_images_that_have_the_size(tmp_path, photographs):
    root = write_folder(tmp_path / "d", photographs)
    train, _ = data.load("folder", str(root))
    assert np.array_equal(train.images[0].permute(1, 2, 0).numpy(), np.asarray(photographs["cat"][0]))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_folder_resizes_and_crops_as_torchvision_does(tmp_path, photographs, at):
    root = write_folder(tmp_path / "d", photographs)
    train, test = data.load("folder", str(root), imageSize=20)
    file, got = [None, ("train/dog/1.JPG", train.images[4]), ("train/dog/2.png", train.images[5]),
                 ("test/dog/3.jpeg", test.images[1])][at]
    want = vision.pil_to_tensor(vision.center_crop(vision.resize(Image.open(root / file), 20), 20))
    inner = (slice(None), slice(2, -2), slice(2, -2))  # torchvision's outermost pixels see what the crop cuts off
    assert (got.int() - want.int())[inner].abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 300), (301, 7), (33, 31)])
def test_any_shape_is_brought_to_the_size(tmp_path, photographs, size):
    photographs["dog"][0].resize(size).save(tmp_path / "0.png")
    assert data.decode_image(tmp_path / "0.png", 16).shape == (3, 16, 16)


def test_all_gray_is_one_channel(tmp_path, photographs):
    gray = [f"{name}/{file}" for name in ("cat", "dog") for file in ("0.png", "1.JPG", "2.png", "3.jpeg")]
    train, test = data.load("folder", str(write_folder(tmp_path / "d", photographs, gray)))
    assert train.images.shape == (6, 1, 32, 32) and test.images.shape == (2, 1, 32, 32)
    assert np.array_equal(train.images[0, 0].numpy(), np.asarray(photographs["cat"][0].convert("L")))
    for where, others in (("first", gray[1:]), ("last", gray[:-1])):  # a single image in colour is enough
        train, test = data.load("folder", str(write_folder(tmp_path / where, photographs, others)))
        assert train.images.shape == (6, 3, 32, 32) and test.images.shape == (2, 3, 32, 32)


def test_kinds_of_image_files(tmp_path, photographs):
    """16 bits, palette, transparency, CMYK, bmp, tiff, and a camera held upright"""
    image = photographs["cat"][0]
    deep = (np.asarray(image.convert("L")).astype(np.uint16) << 8) + 5
    saved = {"16.png": Image.fromarray(deep), "palette.png": image.quantize(256), "alpha.png": image.convert("RGBA"),
             "cmyk.jpg": image.convert("CMYK"), "b.bmp": image, "t.tiff": image, "w.webp": image, "p.ppm": image,
             "16.tif": Image.fromarray(deep), "1.png": image.convert("1"), "la.png": image.convert("LA")}
    for name, one in saved.items():
        one.save(tmp_path / name, **({"lossless": True} if name == "w.webp" else {}))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn it by 90 degrees clockwise to see it upright
    image.rotate(90).save(tmp_path / "turned.png", exif=exif)
    want, gray = np.asarray(image).transpose(2, 0, 1), np.asarray(image.convert("L"))[None]
    for name in ["alpha.png", "b.bmp", "t.tiff", "w.webp", "p.ppm", "turned.png"]:
        assert np.array_equal(data.decode_image(tmp_path / name, 32).numpy(), want), name
    for name in ["16.png", "16.tif", "la.png"]:
        assert np.array_equal(data.decode_image(tmp_path / name, 32).numpy(), gray), name
    assert data.decode_image(tmp_path / "1.png", 32).unique().tolist() == [0, 255]
    for name in ["palette.png", "cmyk.jpg"]:
        got = data.decode_image(tmp_path / name, 32).numpy()
        assert got.shape == want.shape and np.abs(got.astype(int) - want).mean() < 12, name


def write(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    write(b""), write(b"no image"), write(b"\x89PNG\r\n\x1a\n"),
    lambda path: os.truncate(path, path.stat().st_size // 2)], ids=["empty", "text", "head", "half"])
@pytest.mark.parametrize("name", ["train/dog/1.JPG", "test/cat/3.jpeg", "train/cat/0.png"])
def test_broken_image_is_named(tmp_path, photographs, name, damage):
    root = write_folder(tmp_path / "d", photographs)
    damage(root / name)
    assert f"{root / name} cannot be decoded (" in refused("folder", root)


@pytest.mark.parametrize("change, said", [
    (lambda root: (root / "train").rename(root / "training"), "d has no folder train;"),
    (lambda root: (root / "test").rename(root / "testing"), "d has no folder test or val;"),
    (lambda root: shutil.rmtree(root / "train/dog"), "d/train has 1 class folders (cat); valid are two or more"),
    (lambda root: [shutil.rmtree(root / "train" / name) for name in ("cat", "dog")], "d/train has 0 class folders ()"),
    (lambda root: shutil.rmtree(root / "test/cat"), "need the same classes; in only one: cat"),
    (lambda root: (root / "test/cow").mkdir(), "need the same classes; in only one: cow"),
    (lambda root: (root / "test/dog/3.jpeg").rename(root / "test/dog/3.txt"), "d/test/dog has no image; valid endings"),
    (lambda root: (root / "train/cat/9.png").symlink_to("nothing"), "d/train/cat/9.png cannot be decoded"),
    (shutil.rmtree, "d has no folder train;"),
])
def test_folder_that_is_no_data_set(tmp_path, photographs, change, said):
    root = write_folder(tmp_path / "d", photographs)
    change(root)
    assert said in refused("folder", root)


def test_folder_val_in_the_place_of_test(tmp_path, photographs):
    root = write_folder(tmp_path / "d", photographs, test="val")
    assert len(data.load("folder", str(root))[1].images) == 2
    write_folder(root, {name: images[::-1] for name, images in photographs.items()})
    _, test = data.load("folder", str(root))  # test goes before val
    assert torch.equal(test.images[0], data.decode_image(root / "test/cat/3.jpeg", 32))
    assert not torch.equal(test.images[0], data.decode_image(root / "val/cat/3.jpeg", 32))


def test_folder_that_does_not_fit_is_refused_before_anything_is_decoded(tmp_path, photographs, monkeypatch):
    root = write_folder(tmp_path / "d", photographs)
    (root / "train/cat/0.png").write_text("broken")
    pages = 8 * 3 * 32 * 32 * 2  # decoded, and in training
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages - 1}.get)
    assert "8 images of 32x32 pixels need 0.0 GB of memory; this machine has 0.0 GB" in refused("folder", root)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}.get)
    assert "cannot be decoded" in refused("folder", root)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "GB of memory" in refused("folder", root)


# --- choosing from a set ----------------------------------------------------------------------------------------

def numbered(labels, classes):
    """An image set whose images say what number they have"""
    images = torch.arange(len(labels)).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return data.ImageSet(images, torch.tensor(labels), classes)


def numbers(images):
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
def test_classes_that_cannot_be_selected(names, said):
    with pytest.raises(data.DataError, match=said):
        data.select_classes(numbered([0, 1, 1, 0], ["a", "b", "c"]), names)


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


def test_largest_remainders_get_the_rest():
    assert data.shares(torch.tensor([7, 50, 3, 140]), 20).tolist() == [1, 5, 0, 14]  # of 0.7, 5, 0.3 and 14
    assert data.shares(torch.tensor([5, 5, 5]), 4).tolist() == [2, 1, 1]  # the first of equal ones


def test_held_out_images_follow_from_the_seed_alone():
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
def test_what_cannot_be_held_out(counts, n, nearest):
    whole = numbered([0] * counts[0] + [1] * counts[1], ["a", "b"])
    with pytest.raises(data.DataError, match=f"^{n} of {sum(counts)} training images .* nearest valid is {nearest}$"):
        data.hold_out(whole, n, seed=1)
    if nearest != "none":
        assert len(data.hold_out(whole, int(nearest), seed=1)[1].images) == int(nearest)


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
    for rank in range(2):  # every other image of each batch of 4; the last one, of 1, has joined the one before
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
    batches, drawn = batches_of(noise(n, 8, 8)), data.draw(n, 1, 1, padding=1)
    batchSz = 4 * processes
    sizes = data.batch_sizes(n, batchSz, processes)
    for parts in ([list(batches.augmented(drawn, batchSz, rank, processes)) for rank in range(processes)],
                  [list(batches.plain(batchSz, drawn.order, rank, processes)) for rank in range(processes)]):
        if n >= processes:  # or DistributedDataParallel would wait for the process without an image
            assert {len(part) for part in parts} == {len(sizes)}
            assert [sum(len(labels) for _, labels in step) for step in zip(*parts, strict=True)] == sizes
        assert all(len(labels) for part in parts for _, labels in part)
        labels = torch.cat([labels for part in parts for _, labels in part])
        assert labels.bincount(minlength=10).equal(batches.labels.bincount(minlength=10)) and len(labels) == n
    seen = torch.cat([images for rank in range(processes)
                      for images, _ in batches.plain(batchSz, None, rank, processes)])
    whole = torch.cat([images for images, _ in batches.plain(batchSz)])
    assert sorted(map(tuple, seen.flatten(1).tolist())) == sorted(map(tuple, whole.flatten(1).tolist()))


@pytest.mark.parametrize("n, batchSz, processes, expected", [
    (21, 4, 1, [4, 4, 4, 4, 4, 1]), (20, 4, 1, [4] * 5), (21, 4, 2, [4, 4, 4, 4, 5]), (22, 4, 2, [4, 4, 4, 4, 4, 2]),
    (23, 8, 4, [8, 8, 7]), (19, 8, 4, [8, 11]), (3, 8, 1, [3]), (3, 8, 4, [3]), (0, 8, 2, []), (8, 8, 8, [8])])
def test_batch_sizes(n, batchSz, processes, expected):
    assert data.batch_sizes(n, batchSz, processes) == expected


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


@pytest.mark.parametrize("size, padding", [(32, 4), (224, 28), (64, 8), (7, 0)])
def test_padding_grows_with_the_image(size, padding):
    assert batches_of(noise(1, size, size)).padding == padding
    drawn = data.draw(2000, 1, 1, padding)
    assert (drawn.dy.min(), drawn.dy.max(), drawn.dx.min(), drawn.dx.max()) == (-padding, padding, -padding, padding)
    if padding == 4:
        assert all(torch.equal(a, b) for a, b in zip(drawn, data.draw(2000, 1, 1), strict=True))


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

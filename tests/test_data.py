"""data.py: CIFAR-10, CIFAR-100 and SVHN, selecting classes, holding out images, mean and deviation."""

import functools
import hashlib
import os
import pickle
import socket
import sys
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from lib import data

SAMPLE = Path(__file__).parent / "cifar10-sample"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE_CLASSES = [f"fine_{i:02}" for i in range(100)]
RECORD = 3073


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

def write_binary(folder, batches=3, n=2):
    """Writes a small data set -> all training records, test records"""
    folder.mkdir(parents=True)
    records = {f"data_batch_{i}.bin": made_up(n, i) for i in range(1, batches + 1)} | {"test_batch.bin": made_up(n, 99)}
    for name, content in records.items():
        content.tofile(folder / name)
    *train, test = records.values()
    return np.concatenate(train), test


def test_the_built_in_sample_has_100_training_and_20_test_images_of_each_class():
    for images, n in zip(data.load("cifar10", SAMPLE), (100, 20), strict=True):
        assert images.pixels.shape == (10 * n, 3, 32, 32) and images.labels.bincount().tolist() == [n] * 10
        assert images.classes == CLASSES


@pytest.mark.parametrize("where", ["", "cifar-10-batches-bin"])
def test_the_binary_version_is_read_from_its_folder_or_the_parent(tmp_path, where):
    train, test = write_binary(tmp_path / "d" / where)
    for images, records in zip(data.load("cifar10", str(tmp_path / "d")), (train, test), strict=True):
        check_images(images, records)
    (tmp_path / "d" / where / "data_batch_1.bin").unlink()
    [images] = data.load("cifar10", tmp_path / "d", ["test"])  # needs no training images
    check_images(images, test)


def put(position, value):
    """-> a function that sets this byte of a file"""
    def damage(path):
        content = bytearray(path.read_bytes())
        content[position] = value
        path.write_bytes(content)
    return damage


@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
@pytest.mark.parametrize(("damage", "said"), [
    (lambda path: os.truncate(path, 2 * RECORD - 1), "has 6145 bytes; valid is a multiple of 3073"),
    (lambda path: os.truncate(path, 0), "has 0 bytes"),
    (put(RECORD, 10), "has the label 10; valid are 0 to 9"),
    (Path.unlink, "cannot be read (No such file or directory)"),
])
def test_a_damaged_or_missing_binary_file_is_named(tmp_path, name, damage, said):
    write_binary(tmp_path / "d")
    damage(tmp_path / "d" / name)
    assert f"{tmp_path}/d/{name} {said}" in load_error("cifar10", tmp_path / "d")


# --- torchvision's readers --------------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path):
    """A folder whose files are served -> the folder, its URL"""
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.fixture(autouse=True)
def restored_timeout():
    yield
    socket.setdefaulttimeout(None)


def write_cifar(folder, monkeypatch, reader=CIFAR10, n=2):
    """Writes a small python version, and has torchvision expect its MD5 sums -> training records, test records"""
    folder.mkdir(parents=True)
    label, classes = ("labels", CLASSES) if reader is CIFAR10 else ("fine_labels", FINE_CLASSES)
    names = [name for name, _ in reader.train_list + reader.test_list]
    batches = {name: made_up(n, seed) for seed, name in enumerate(names)}
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
@pytest.mark.parametrize("own", [False, True])
def test_the_python_version_is_read_from_its_folder_or_the_parent(tmp_path, monkeypatch, dataset, reader, classes, own):
    folder = tmp_path / reader.base_folder
    expected = write_cifar(folder, monkeypatch, reader)
    for images, records in zip(data.load(dataset, folder if own else tmp_path), expected, strict=True):
        check_images(images, records, classes)


def test_a_download_that_was_cut_is_not_taken_for_whole(tmp_path, monkeypatch, server, capfd):
    served, url = server
    train, _ = write_cifar(tmp_path / "made/cifar-10-batches-py", monkeypatch)
    archive = served / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made/cifar-10-batches-py", "cifar-10-batches-py")
    whole = archive.read_bytes()
    monkeypatch.setattr(CIFAR10, "url", f"{url}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(whole).hexdigest())
    root = tmp_path / "new/data"
    archive.write_bytes(whole[:len(whole) // 2])
    message = load_error("cifar10", root)
    assert f"in {root}, and its download failed (" in message
    assert "put cifar-10-batches-bin or cifar-10-batches-py there, or try the built-in sample: ./train.py" in message
    archive.write_bytes(whole)
    check_images(data.load("cifar10", root)[0], train)
    os.truncate(root / "cifar-10-batches-py/data_batch_3", 100)  # as if stopped while the archive was unpacked
    check_images(data.load("cifar10", root)[0], train)
    assert capfd.readouterr().out == ""


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    def download(self):
        raise OSError(f"waits for {socket.getdefaulttimeout()} s\nat most")

    monkeypatch.setattr(CIFAR100, "download", download)
    assert "its download failed (waits for 30.0 s); put cifar-100-python there" in load_error("cifar100", tmp_path)


def test_what_torchvision_prints_goes_to_stderr(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(CIFAR100, "download", lambda self: print("chatter"))
    load_error("cifar100", tmp_path)
    out, err = capfd.readouterr()
    assert out == "" and "chatter" in err


@pytest.mark.parametrize(("dataset", "said"), [
    ("cifar10", "put cifar-10-batches-bin or cifar-10-batches-py there"), ("cifar100", "put cifar-100-python there"),
    ("svhn", "put train_32x32.mat there")])
def test_nothing_is_downloaded_if_download_is_false(tmp_path, monkeypatch, dataset, said):
    for reader in (CIFAR10, SVHN):
        monkeypatch.setattr(reader, "download", lambda *_: pytest.fail("a download"))
    message = load_error(dataset, tmp_path / "new", download=False)
    assert f"in {tmp_path}/new; {said}" in message and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn"])
def test_nothing_is_downloaded_into_a_folder_of_pictures(tmp_path, monkeypatch, dataset):
    for reader in (CIFAR10, SVHN):
        monkeypatch.setattr(reader, "download", lambda *_: pytest.fail("a download"))
    (tmp_path / "train/cat").mkdir(parents=True)
    assert "--dataset folder" in load_error(dataset, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["train", "cat"]


def test_a_file_in_the_place_of_the_data_directory_is_refused(tmp_path):
    (tmp_path / "f").write_text("")
    for dataset in data.DATASETS:
        assert f"{tmp_path}/f" in load_error(dataset, tmp_path / "f", download=False)


def test_an_unknown_data_set_is_refused_with_the_valid_ones(tmp_path):
    assert "mnist is not a data set; valid are cifar10, cifar100, svhn, folder" in load_error("mnist", tmp_path)


def write_svhn(folder, monkeypatch, url="", **sizes):
    """Writes small files as published: images (32, 32, 3, n), label 10 for the digit 0 -> split: pixels, digits"""
    made = {}
    for split, n in sizes.items():
        pixels, digits = made_up(n, n)[:, 1:].reshape(-1, 3, 32, 32), np.arange(n) % 10
        file = folder / f"{split}_32x32.mat"
        pytest.importorskip("scipy.io").savemat(file, {
            "X": pixels.transpose(2, 3, 1, 0), "y": np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)})
        sums = hashlib.md5(file.read_bytes()).hexdigest()
        monkeypatch.setitem(SVHN.split_list, split, [f"{url}/{file.name}", file.name, sums])
        made[split] = pixels, digits
    return made


@pytest.mark.parametrize("extra", [False, True])
def test_svhn_is_read_with_and_without_its_extra_images(tmp_path, monkeypatch, extra):
    made = write_svhn(tmp_path, monkeypatch, train=40, test=12, extra=30)
    train = [np.concatenate(parts) for parts in zip(made["train"], *[made["extra"]] * extra, strict=True)]
    for images, (pixels, digits) in zip(data.load("svhn", tmp_path, extra=extra), (train, made["test"]), strict=True):
        assert np.array_equal(images.pixels.numpy(), pixels) and images.labels.tolist() == digits.tolist()
        assert images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert images.classes == list("0123456789")


def test_svhn_downloads_the_files_that_are_missing_or_damaged(tmp_path, monkeypatch, server):
    served, url = server
    write_svhn(served, monkeypatch, url, train=4, test=3, extra=2)
    root = tmp_path / "data"
    assert [len(part.pixels) for part in data.load("svhn", root)] == [4, 3]
    assert sorted(path.name for path in root.iterdir()) == ["test_32x32.mat", "train_32x32.mat"]
    os.truncate(root / "test_32x32.mat", 100)
    assert [len(part.pixels) for part in data.load("svhn", root, extra=True)] == [6, 3]
    (root / "extra_32x32.mat").unlink()
    (served / "extra_32x32.mat").unlink()
    assert "(HTTP Error 404: File not found); put extra_32x32.mat there" in load_error("svhn", root, extra=True)


def test_svhn_without_scipy_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install 'densenet-pytorch[svhn]'" in load_error("svhn", tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- classes ----------------------------------------------------------------------------------------------------

def numbered(labels, classes):
    """-> images in which all pixels of image i are i, from files named i"""
    pixels = torch.arange(len(labels)).to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    return data.Images(pixels, torch.tensor(labels), classes, [str(i) for i in range(len(labels))])


def numbers(images):
    """-> for each image the i that it had in ``numbered``"""
    assert images.files == [str(i.item()) for i in images.pixels[:, 0, 0, 0]]
    return images.pixels[:, 0, 0, 0].tolist()


def test_selected_classes_have_labels_in_the_order_of_the_names():
    chosen = numbered([0, 1, 2, 3, 2, 1, 0, 2], ["a", "b", "c", "d"]).select(["c", "a"])
    assert numbers(chosen) == [0, 2, 4, 6, 7] and chosen.labels.tolist() == [1, 0, 0, 1, 0]
    assert chosen.classes == ["c", "a"] and chosen.labels.dtype == torch.int64


@pytest.mark.parametrize(("names", "said"), [
    (["a", "z"], "class z is unknown or has no image; valid are a, b$"), (["A", "b"], "class A is unknown"),
    (["a", "a"], "class a is named twice; valid are a, b$"), (["a", "c"], "class c is unknown or has no image"),
    (["a"], r"\['a'\] are fewer than two; valid are two or more of a, b$"), ([], r"\[\] are fewer than two"),
])
def test_classes_that_cannot_be_selected_are_refused(names, said):
    with pytest.raises(data.DataError, match=said):
        numbered([0, 1, 1, 0], ["a", "b", "c"]).select(names)


def test_classes_are_selected_while_loading():
    for images, n in zip(data.load("cifar10", SAMPLE, classes=["dog", "cat"]), (200, 40), strict=True):
        assert images.classes == ["dog", "cat"] and images.labels.bincount().tolist() == [n // 2] * 2
    assert "class cow is unknown" in load_error("cifar10", SAMPLE, classes=["cow", "cat"])


# --- validation images ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("n", "seed", "held"), [  # drawn by version 1.1, whose runs resume with the same images
    (5, 1, [1, 2, 5, 13, 19]), (5, 2, [1, 6, 8, 10, 19]), (7, 1, [0, 1, 2, 5, 9, 13, 19]), (3, 7, [12, 15, 17])])
def test_the_images_that_are_held_out_are_those_of_version_1_1(n, seed, held):
    whole = numbered([0, 1, 2, 1, 1, 0, 2, 1, 0, 1, 1, 2, 0, 1, 1, 1, 0, 1, 2, 1], ["a", "b", "c"])
    before = torch.get_rng_state()
    kept, val = whole.hold_out(n, seed)
    assert numbers(val) == held and numbers(kept) == [i for i in range(20) if i not in held]
    assert val.labels.tolist() == whole.labels[held].tolist() and val.classes == kept.classes == whole.classes
    assert torch.equal(torch.get_rng_state(), before)


def test_the_images_that_are_held_out_of_the_sample_are_those_of_version_1_1():
    train, _ = data.load("cifar10", SAMPLE)
    _, val = train._replace(files=[str(i) for i in range(1000)]).hold_out(20, seed=1)
    assert [int(name) for name in val.files] == [60, 66, 228, 239, 268, 303, 403, 436, 457, 485, 555, 573, 593, 672,
                                                 788, 845, 886, 892, 904, 999]


@pytest.mark.parametrize(("counts", "n", "expected"), [
    ([7, 50, 3, 140], 20, [1, 5, 0, 14]),  # of 0.7, 5, 0.3 and 14: the largest remainders are rounded up
    ([5, 5, 5], 4, [2, 1, 1]),  # of equal remainders the first
    ([5, 0, 9], 4, [1, 0, 3]), ([100] * 3, 297, [99] * 3)])
def test_each_class_has_its_share_of_the_images_that_are_held_out(counts, n, expected):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    whole = data.Images(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels, list("abcd")[:len(counts)])
    kept, val = whole.hold_out(n, seed=3)
    assert val.labels.bincount(minlength=len(counts)).tolist() == expected and len(kept.labels) == len(labels) - n


@pytest.mark.parametrize(("counts", "n"), [([3, 3], 6), ([3, 3], 5), ([3, 3], 0), ([3, 3], -2), ([3, 3], 10**9),
                                           ([1, 1], 1), ([1, 9], 5)])
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
    assert gray.with_channels(3).pixels.equal(colour.pixels) and numbers(gray.with_channels(3)) == [0, 1, 2]
    assert gray.with_channels(1).pixels.equal(gray.pixels) and colour.with_channels(3).pixels.equal(colour.pixels)
    with pytest.raises(data.DataError, match=r"^the images have 3 channels, the network takes 1; valid are grayscale"):
        colour.with_channels(1)

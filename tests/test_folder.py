"""data.py: a folder of pictures, with a subfolder for each class."""

import os
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from common import SAMPLE
from PIL import Image
from test_data import load_error

from lib import data


@pytest.fixture(scope="module")
def photographs():
    """-> class name: PIL images, the first four of 32x32 of the sample's test images"""
    _, test = data.load("cifar10", SAMPLE)
    return {name: [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in test.pixels[test.labels == i][:4]]
            for i, name in enumerate(test.classes)}


@pytest.fixture
def root(tmp_path, photographs):
    return write_folder(tmp_path / "d", photographs)


def write_folder(root, photographs, gray=("cat/2.png",), test="test"):
    """Writes root/train and root/test: cats and dogs of mixed sizes, as png and jpeg -> root"""
    for name in ("cat", "dog"):
        for i, image in enumerate(photographs[name]):
            path = root / ("train" if i < 3 else test) / name / f"{i}.{('png', 'JPG', 'png', 'jpeg')[i]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = image.resize([(32, 32), (80, 40), (40, 60), (30, 90)][i])
            image.convert("L" if f"{name}/{path.name}" in gray else "RGB").save(path)
    return root


def pixels(path, size=32):
    return vision.pil_to_tensor(data.read_picture(path, size))


# --- files and classes ------------------------------------------------------------------------------------------

def test_pictures_of_mixed_sizes_are_read_by_class(root):
    train, test = data.load("folder", str(root), imageSize=24)
    assert train.pixels.shape == (6, 3, 24, 24) and test.pixels.shape == (2, 3, 24, 24)
    assert train.pixels.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 1]
    assert train.files == [f"train/{name}/{file}" for name in ("cat", "dog") for file in ("0.png", "1.JPG", "2.png")]
    for image, file in zip(train.pixels, train.files, strict=True):
        assert image.equal(pixels(root / file, 24).expand(3, -1, -1))


def test_pictures_are_sorted_by_path_and_names_with_a_dot_are_skipped(tmp_path, photographs, capsys):
    root = write_folder(tmp_path / ".hidden" / "d", photographs)
    for path in ("train/cat/a/b.png/0.png", "train/cat/a-b/0.png", "train/cat-2/0.png", "test/cat-2/0.png",
                 "train/cat/.0.png", "train/cat/a/.git/0.png", "train/.cache/0.png"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "train/dog/0.png", root / path)
    train, test = data.load("folder", root)
    assert train.files[:6] == ["train/cat/0.png", "train/cat/1.JPG", "train/cat/2.png", "train/cat/a/b.png/0.png",
                               "train/cat/a-b/0.png", "train/cat-2/0.png"]
    assert train.classes == test.classes == ["cat", "cat-2", "dog"] and train.labels.tolist() == [0] * 5 + [1] + [2] * 3
    assert capsys.readouterr().err == ""


def test_one_line_counts_the_files_that_are_no_pictures(root, capsys, monkeypatch):
    for name in ("train/cat/a.gif", "train/dog/README", "test/dog/Thumbs.db", "train/cat/.hidden.gif", "train/f.txt"):
        (root / name).write_text("")
    data.load("folder", root)
    assert capsys.readouterr().err.splitlines() == [
        f"train.py: warning: 3 files in the class folders of {root} are passed over, as by their endings they are no "
        "pictures"]
    monkeypatch.setenv("RANK", "1")
    data.load("folder", root)
    assert capsys.readouterr().err == ""


def test_classes_are_selected_before_anything_is_decoded(root):
    whole = data.load("folder", root)
    for name in ("train", "test"):
        shutil.copytree(root / name / "cat", root / name / "ape")
    (root / "train/ape/0.png").write_bytes(b"broken")
    shutil.rmtree(root / "test/ape")
    for images, unselected in zip(data.load("folder", root, classes=["dog", "cat"]), whole, strict=True):
        expected = unselected.select(["dog", "cat"])
        assert images.pixels.equal(expected.pixels) and images.labels.equal(expected.labels)
        assert images.files == expected.files and images.classes == ["dog", "cat"]
    assert f"{root}/test/ape has no picture" in load_error("folder", root, classes=["cat", "ape"])
    assert "class cow is unknown or has no image; valid are ape, cat, d" in load_error("folder", root, classes=["cow"])


def test_val_is_read_where_test_has_no_classes(root, photographs):
    expected = data.load("folder", root)[1]
    (root / "test").rename(root / "val")
    for unlabelled in (None, "test", "test/unknown"):  # no test folder; pictures in test; Kaggle's single class
        if unlabelled:
            (root / unlabelled).mkdir()
            shutil.copy(root / "train/cat/0.png", root / unlabelled)
        test = data.load("folder", root)[1]
        assert test.pixels.equal(expected.pixels) and test.files == ["val/cat/3.jpeg", "val/dog/3.jpeg"]
    shutil.rmtree(root / "test")
    write_folder(root, photographs)  # has both: test is read
    shutil.rmtree(root / "train")
    [test] = data.load("folder", root, ["test"])  # needs no training images
    assert test.files == ["test/cat/3.jpeg", "test/dog/3.jpeg"] and test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(("change", "said"), [
    (shutil.rmtree, "d/train has 0 class folders; valid are two or more"),
    (lambda root: shutil.rmtree(root / "train/dog"), "d/train has 1 class folders; valid are two or more"),
    (lambda root: shutil.rmtree(root / "test/cat"), "d/test need the same classes; in only one: cat"),
    (lambda root: (root / "test/cow").mkdir(), "d/test need the same classes; in only one: cow"),
    (lambda root: (root / "test/dog/3.jpeg").rename(root / "test/dog/3.txt"), "d/test/dog has no picture; valid end")])
def test_a_folder_that_is_not_a_data_set_is_named(root, change, said):
    change(root)
    assert said in load_error("folder", root)


def test_a_folder_beyond_the_machines_memory_is_refused_before_decoding(root, monkeypatch):
    (root / "train/cat/0.png").write_text("broken")
    needed = 8 * 3 * 32 * 32 * 2  # bytes: the decoded images, and the copy for training
    for ranks, pages, said in (("1", needed - 1, "need 0.0 GB of memory; this machine has 0.0 GB"),
                               ("2", 2 * needed - 1, "GB of memory"), ("2", 2 * needed, "cannot be read")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}.get)
        assert said in load_error("folder", root)


# --- pictures ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["train/dog/1.JPG", "train/dog/2.png"])  # broad, tall
def test_pictures_are_resized_and_cropped_to_the_middle_as_by_torchvision(root, file):
    want = vision.pil_to_tensor(vision.center_crop(vision.resize(Image.open(root / file), 20), 20))
    inner = (slice(None), slice(2, -2), slice(2, -2))  # torchvision resizes before it crops: pixels at the edge differ
    assert (pixels(root / file, 20).int() - want.int())[inner].abs().max() <= 1


def test_a_folder_of_only_grayscale_pictures_has_one_channel(tmp_path, photographs):
    gray = [f"{name}/{file}" for name in ("cat", "dog") for file in ("0.png", "1.JPG", "2.png", "3.jpeg")]
    train, test = data.load("folder", write_folder(tmp_path / "d", photographs, gray))
    assert train.pixels.shape == (6, 1, 32, 32) and test.pixels.shape == (2, 1, 32, 32)
    assert np.array_equal(train.pixels[0, 0].numpy(), np.asarray(photographs["cat"][0].convert("L")))
    for images in data.load("folder", write_folder(tmp_path / "e", photographs, gray[:-1])):  # one in colour is enough
        assert images.pixels.shape[1] == 3


def test_every_kind_of_picture_is_read(tmp_path, photographs):
    image = photographs["cat"][0]
    gray, palette = image.convert("L"), image.quantize(256)
    for name, picture, expected in (
            ("b.bmp", image, image), ("t.tiff", image, image), ("w.webp", image, image), ("p.ppm", image, image),
            ("alpha.png", image.convert("RGBA"), image), ("palette.png", palette, palette.convert("RGB")),
            ("g.pgm", gray, gray), ("gray-alpha.png", image.convert("LA"), gray)):
        picture.save(tmp_path / name, lossless=True)  # which only WebP knows
        assert pixels(tmp_path / name).equal(vision.pil_to_tensor(expected)), name


def test_pictures_are_turned_by_their_exif_orientation(tmp_path, photographs):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photographs["cat"][0].save(tmp_path / "0.png", exif=exif)
    upright = np.rot90(photographs["cat"][0], -1)
    assert np.array_equal(pixels(tmp_path / "0.png").permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("exif", [  # for these Pillow raises an error or a warning
    b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_a_broken_exif_block_is_ignored(root, photographs, exif, capsys, recwarn):
    expected = data.load("folder", root)[0].pixels
    photographs["cat"][0].save(root / "train/cat/0.png", exif=exif)
    assert data.load("folder", root)[0].pixels.equal(expected) and capsys.readouterr().err == "" and not recwarn.list


def change_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: os.truncate(path, path.stat().st_size // 2), change_a_bit,
    lambda path: (path.unlink(), path.symlink_to("nothing"))], ids=["empty", "half", "bit", "link"])
def test_a_picture_that_cannot_be_read_is_named(root, damage):
    damage(root / "train/cat/0.png")
    assert f"1 of 8 pictures in {root} cannot be read: train/cat/0.png (" in load_error("folder", root)


def test_the_first_20_pictures_that_cannot_be_read_are_named_of_both_parts_and_all_are_counted(root):
    for i in range(30):
        (root / f"{'train' if i < 10 else 'test'}/dog/x{i:02}.png").write_text("no picture")
    named = ", ".join(f"{'train' if i < 10 else 'test'}/dog/x{i:02}.png (not JPEG, PNG, WEBP, BMP, TIFF or PPM)"
                      for i in range(20))
    assert load_error("folder", root) == f"30 of 38 pictures in {root} cannot be read: {named}, ... (30 in all)"


@pytest.mark.parametrize(("kind", "file", "mode"), [(np.float32, "0.tif", "F"), (np.uint16, "0.png", "I;16")])
def test_pictures_of_more_than_8_bits_are_refused_by_their_mode(root, kind, file, mode):
    Image.fromarray(np.arange(1024).reshape(32, 32).astype(kind)).save(root / "train/cat" / file)
    said = f"train/cat/{file} (mode {mode}; valid are pictures of 8 bits a channel)"
    assert said in load_error("folder", root)


def test_pictures_above_89478485_pixels_are_refused(root):
    (root / "train/cat/x.ppm").write_text("P6 9460 9459 255\n")  # 89,482,140
    assert "train/cat/x.ppm (Image size" in load_error("folder", root)


def test_postscript_is_no_picture_as_pillow_would_start_ghostscript(root):
    (root / "train/cat/0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n%%EOF\n")
    assert "train/cat/0.png (not JPEG, PNG" in load_error("folder", root)

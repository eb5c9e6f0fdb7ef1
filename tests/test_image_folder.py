"""image_folder.py: what it reads of a folder of images, and what it refuses."""

import os
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from common import SAMPLE
from image_helpers import refused
from PIL import Image

import data
import image_folder


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
    assert image_folder.decode_image(tmp_path / "0.png", 16).shape == (3, 16, 16)


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
        assert np.array_equal(image_folder.decode_image(tmp_path / name, 32).numpy(), want), name
    for name in ["16.png", "16.tif", "la.png"]:
        assert np.array_equal(image_folder.decode_image(tmp_path / name, 32).numpy(), gray), name
    assert image_folder.decode_image(tmp_path / "1.png", 32).unique().tolist() == [0, 255]
    for name in ["palette.png", "cmyk.jpg"]:
        got = image_folder.decode_image(tmp_path / name, 32).numpy()
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
    assert torch.equal(test.images[0], image_folder.decode_image(root / "test/cat/3.jpeg", 32))
    assert not torch.equal(test.images[0], image_folder.decode_image(root / "val/cat/3.jpeg", 32))


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

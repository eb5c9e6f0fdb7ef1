"""image_folder.py: reading a folder of images, and refusing what it cannot read."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as vision
from common import SAMPLE, one_line
from image_helpers import load_error
from PIL import EpsImagePlugin, Image

from lib import data, image_folder


@pytest.fixture(scope="module")
def photographs():
    """-> class name: PIL images, the first four of 32x32 of the sample's test images"""
    _, test = data.load("cifar10", str(SAMPLE))
    return {name: [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in test.images[test.labels == i][:4]]
            for i, name in enumerate(test.classes)}


def write_folder(root, photographs, gray=("cat/2.png",), test="test"):
    """Writes root/train and root/test: cats and dogs of mixed sizes, as png and jpeg -> root"""
    for name in ("cat", "dog"):
        for i, image in enumerate(photographs[name]):
            path = root / ("train" if i < 3 else test) / name / f"{i}.{('png', 'JPG', 'png', 'jpeg')[i]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = image.resize([(32, 32), (80, 40), (40, 60), (30, 90)][i])
            image.convert("L" if f"{name}/{path.name}" in gray else "RGB").save(path)
    return root


def test_images_of_mixed_sizes_and_kinds_are_read_by_class(tmp_path, photographs):
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


def line_on_stderr(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return one_line(err, "train.py: ").removeprefix("train.py: ").rstrip()


def test_images_in_subfolders_of_a_class_are_read(tmp_path, photographs, capsys):
    flat, deep = write_folder(tmp_path / "flat", photographs), tmp_path / "deep"
    for path in flat.rglob("*.*"):
        split, name, file = path.relative_to(flat).parts
        target = deep / split / name / {"0": "a", "1": "a/b.png/c", "2": "z", "3": ""}[file[0]] / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for hidden in ("train/cat/.trash", "train/cat/a/.git"):
        (deep / hidden).mkdir()
        shutil.copy(deep / "train/dog/a/0.png", deep / hidden)
    (deep / "train/cat/a/loop").symlink_to(deep / "train/cat")  # a folder above the link
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(deep / "train/dog/z/2.png", tmp_path / "elsewhere/9.png")
    for images, same in zip(data.load("folder", str(deep)), data.load("folder", str(flat)), strict=True):
        assert images.images.equal(same.images) and images.labels.equal(same.labels)
    (deep / "train/cat/zz").symlink_to(tmp_path / "elsewhere")
    train, _ = data.load("folder", str(deep))
    assert train.labels.tolist() == [0] * 4 + [1] * 3 and train.images[3].equal(train.images[6])
    assert capsys.readouterr().err == ""


def test_jpegs_under_other_endings_are_read(tmp_path, photographs):
    root = write_folder(tmp_path / "d", photographs)
    expected, _ = data.load("folder", str(root))
    for name, new in (("cat/1.JPG", "cat/1.jfif"), ("dog/1.JPG", "dog/1.JPE"), ("cat/2.png", "cat/2.apng")):
        (root / "train" / name).rename(root / "train" / new)
    assert data.load("folder", str(root))[0].images.equal(expected.images)


def test_files_of_other_kinds_are_counted_in_one_line(tmp_path, photographs, capsys, monkeypatch):
    root = write_folder(tmp_path / "d", photographs)
    (root / "train/cat/more").mkdir()
    for name in ("train/cat/a.gif", "train/cat/more/b.GIF", "test/dog/c.gif", "train/dog/d.avif", "train/dog/e.avif",
                 "test/cat/LICENSE", "train/cat/.hidden.gif", "train/f.txt"):
        (root / name).write_text("")
    shutil.copy(root / "train/cat/0.png", root / "train/x.png")
    os.mkfifo(root / "train/cat/pipe.png")
    os.mkfifo(root / "train/cat/pipe.gif")
    (root / "train/cat/device.png").symlink_to("/dev/zero")
    train, _ = data.load("folder", str(root))
    assert len(train.images) == 6
    assert line_on_stderr(capsys) == (
        f"passed over in {root}: 3 .gif, 2 .avif, 1 .png in no class folder, 1 without an ending; "
        f"images are {', '.join(image_folder.ENDINGS)} in class folders")
    monkeypatch.setenv("RANK", "1")
    data.load("folder", str(root))
    assert capsys.readouterr().err == ""


def test_val_is_read_if_test_has_no_class_folders_as_in_kaggles_layout(tmp_path, photographs, capsys):
    root = write_folder(tmp_path / "d", photographs, test="val")
    for hidden_labels in ("test", "test/unknown"):
        (root / hidden_labels).mkdir()
        shutil.copy(root / "train/cat/0.png", root / hidden_labels)
        train, test = data.load("folder", str(root))
        assert (len(train.images), len(test.images)) == (6, 2) and test.classes == ["cat", "dog"]
        assert data.load_test("folder", str(root)).images.equal(test.images)
        line = f"train.py: the test images are those of {root}/val, as {root}/test has no class folders\n"
        assert capsys.readouterr().err == line * 2
    shutil.rmtree(root / "val/dog")
    shutil.rmtree(root / "val/cat")
    assert "d/test need the same classes; in only one: cat, dog, unknown" in load_error("folder", root)


def test_classes_that_differ_only_in_unicode_normalisation_are_one(tmp_path, photographs):
    root = write_folder(tmp_path / "d", photographs)
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (root / "train/cat").rename(root / "train" / composed)
    (root / "test/cat").rename(root / "test" / decomposed)
    for images in data.load("folder", str(root)):
        assert images.classes == [composed, "dog"]
    (root / "train" / decomposed).mkdir()
    (root / "train" / composed / "2.png").rename(root / "train" / decomposed / "2.png")
    train, test = data.load("folder", str(root))
    assert train.classes == test.classes == [composed, "dog"] and train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_load_test_needs_no_training_images(tmp_path, photographs):
    root = write_folder(tmp_path / "d", photographs)
    _, expected = data.load("folder", str(root), imageSize=24)
    for change in (lambda: (root / "train/cat/0.png").write_text("broken"), lambda: shutil.rmtree(root / "train")):
        change()
        test = data.load_test("folder", str(root), imageSize=24)
        assert test.images.equal(expected.images) and test.labels.equal(expected.labels)
        assert test.classes == expected.classes
    (root / "test").rename(root / "val")
    assert data.load_test("folder", str(root), imageSize=24).images.equal(expected.images)
    shutil.rmtree(root / "val/dog")
    with pytest.raises(data.DataError, match=r"d/val has 1 class folders \(cat\); valid are two or more"):
        data.load_test("folder", str(root))


def test_images_of_the_right_size_are_not_changed(tmp_path, photographs):
    root = write_folder(tmp_path / "d", photographs)
    train, _ = data.load("folder", str(root))
    assert np.array_equal(train.images[0].permute(1, 2, 0).numpy(), np.asarray(photographs["cat"][0]))


@pytest.mark.parametrize("file, part, i", [("train/dog/1.JPG", 0, 4), ("train/dog/2.png", 0, 5),
                                           ("test/dog/3.jpeg", 1, 1)])
def test_images_are_resized_and_cropped_as_by_torchvision(tmp_path, photographs, file, part, i):
    root = write_folder(tmp_path / "d", photographs)
    got = data.load("folder", str(root), imageSize=20)[part].images[i]
    want = vision.pil_to_tensor(vision.center_crop(vision.resize(Image.open(root / file), 20), 20))
    inner = (slice(None), slice(2, -2), slice(2, -2))  # torchvision resizes before it crops: pixels at the edge differ
    assert (got.int() - want.int())[inner].abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 300), (301, 7), (33, 31)])
def test_pictures_of_any_shape_become_square(tmp_path, photographs, size):
    photographs["dog"][0].resize(size).save(tmp_path / "0.png")
    assert image_folder.decode_image(tmp_path / "0.png", 16).shape == (3, 16, 16)


def test_a_folder_of_only_grayscale_images_has_one_channel(tmp_path, photographs):
    gray = [f"{name}/{file}" for name in ("cat", "dog") for file in ("0.png", "1.JPG", "2.png", "3.jpeg")]
    train, test = data.load("folder", str(write_folder(tmp_path / "d", photographs, gray)))
    assert train.images.shape == (6, 1, 32, 32) and test.images.shape == (2, 1, 32, 32)
    assert np.array_equal(train.images[0, 0].numpy(), np.asarray(photographs["cat"][0].convert("L")))
    for where, others in (("first", gray[1:]), ("last", gray[:-1])):  # a single image in colour is enough
        train, test = data.load("folder", str(write_folder(tmp_path / where, photographs, others)))
        assert train.images.shape == (6, 3, 32, 32) and test.images.shape == (2, 3, 32, 32)


def test_every_kind_of_picture_is_read(tmp_path, photographs):
    """16 bits, palette, transparency, CMYK, several formats, and an orientation in the EXIF data"""
    image = photographs["cat"][0]
    for name in ("a.jfif", "a.JPE", "a.jpeg"):
        image.save(tmp_path / name, format="JPEG")
        assert image_folder.decode_image(tmp_path / name, 32).equal(image_folder.decode_image(tmp_path / "a.jfif", 32))
    deep = (np.asarray(image.convert("L")).astype(np.uint16) << 8) + 5
    saved = {"16.png": Image.fromarray(deep), "palette.png": image.quantize(256), "alpha.png": image.convert("RGBA"),
             "cmyk.jpg": image.convert("CMYK"), "b.bmp": image, "t.tiff": image, "w.webp": image, "p.ppm": image,
             "16.tif": Image.fromarray(deep), "1.png": image.convert("1"), "la.png": image.convert("LA")}
    for name, picture in saved.items():
        picture.save(tmp_path / name, lossless=True)  # which only WebP knows
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
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


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no image"),
    lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), lambda path: os.truncate(path, path.stat().st_size // 2)],
    ids=["empty", "text", "head", "half"])
@pytest.mark.parametrize("name", ["train/dog/1.JPG", "test/cat/3.jpeg", "train/cat/0.png"])
def test_a_broken_image_is_named(tmp_path, photographs, name, damage):
    root = write_folder(tmp_path / "d", photographs)
    damage(root / name)
    assert f"{root / name} cannot be decoded (" in load_error("folder", root)


@pytest.mark.parametrize("n, more", [(1, ""), (5, ""), (6, "; and 1 more"), (30, "; and 25 more")])
def test_of_many_broken_images_the_first_five_are_named(tmp_path, photographs, n, more):
    root = write_folder(tmp_path / "d", photographs)
    broken = [root / f"train/dog/broken{i:02}.png" for i in range(n)]
    for path in broken:
        path.write_text("no image")
    message = load_error("folder", root)
    said = " cannot be decoded (it is not JPEG, PNG, WEBP, BMP, TIFF or PPM)"
    assert message == "; ".join(f"{path}{said}" for path in broken[:5]) + more


@pytest.mark.parametrize("pillows_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_picture_that_is_too_large_is_refused(tmp_path, monkeypatch, pillows_limit):
    path = tmp_path / "0.ppm"
    path.write_bytes(b"P6 20000 10000 255\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    with pytest.raises(data.DataError) as refusal:
        image_folder.decode_image(path, 32)
    assert str(refusal.value) == f"{path} is too large a picture; valid are at most 178,956,970 pixels"


@pytest.mark.slow
def test_large_pictures_are_not_decoded_all_at_once(tmp_path, photographs):
    """Four pictures of 144 million pixels each, decoded by several threads, fit into 1.2 GB."""
    root = write_folder(tmp_path / "d", photographs)
    Image.new("L", (12_000, 12_000)).save(tmp_path / "large.png", compress_level=1)
    for i in range(4):
        (root / f"train/dog/large{i}.png").symlink_to(tmp_path / "large.png")
    code = f"""if True:
        import resource, sys
        sys.path.insert(0, {str(Path(data.__file__).parents[1])!r})
        from lib import data
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 1_200_000_000, used + 1_200_000_000))
        print(len(data.load("folder", {str(root)!r})[0].images))"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"})
    assert (ended.stdout, ended.stderr) == ("10\n", "")


def test_postscript_does_not_start_ghostscript(tmp_path, monkeypatch):
    for name in ("gs", "gswin32c", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho $0 $@ >> {tmp_path}/started\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow then searches PATH
    (tmp_path / "0.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n%%EOF\n")
    with pytest.raises(data.DataError, match=r"0\.png cannot be decoded \(it is not JPEG, PNG"):
        image_folder.decode_image(tmp_path / "0.png", 32)
    assert not (tmp_path / "started").exists()


def test_other_formats_under_an_images_name_are_refused(tmp_path, photographs):
    for name in ("GIF", "ICO", "TGA", "PCX", "SGI", "DDS", "ICNS"):
        photographs["cat"][0].save(tmp_path / "0.png", format=name)
        with pytest.raises(data.DataError, match=r"0\.png cannot be decoded \(it is not JPEG, PNG"):
            image_folder.decode_image(tmp_path / "0.png", 32)


@pytest.mark.parametrize("pixels, said", [
    (np.linspace(0, 1, 1024, dtype=np.float32), "has floating-point pixels (mode F); valid are whole numbers"),
    (np.arange(1024, dtype=np.int32) - 1, "has pixels from -1 to 1022 (mode I); valid are 0 to 65535"),
    (np.arange(1024, dtype=np.int32) + 65536 - 1023, "has pixels from 64513 to 65536 (mode I); valid are 0 to 65535"),
    (np.full(1024, -2**31, dtype=np.int32), "has pixels from -2147483648 to -2147483648 (mode I)"),
])
def test_pixels_beyond_16_bits_are_refused(tmp_path, photographs, pixels, said):
    root = write_folder(tmp_path / "d", photographs)
    path = root / "train/cat/0.tif"
    Image.fromarray(pixels.reshape(32, 32)).save(path)
    assert f"{path} {said}" in load_error("folder", root)


def test_32_bit_pictures_of_16_bit_values_are_read_as_such(tmp_path):
    values = (np.arange(1024, dtype=np.int32) * 64).reshape(32, 32)  # to 65472
    for name, kind in (("i.tif", np.int32), ("i16.png", np.uint16), ("i16.tif", np.uint16)):
        Image.fromarray(values.astype(kind)).save(tmp_path / name)
        assert np.array_equal(image_folder.decode_image(tmp_path / name, 32)[0].numpy(), values >> 8), name


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
def test_a_folder_that_is_not_a_data_set_is_refused(tmp_path, photographs, change, said):
    root = write_folder(tmp_path / "d", photographs)
    change(root)
    assert said in load_error("folder", root)


def test_val_is_read_if_there_is_no_test(tmp_path, photographs, capsys):
    root = write_folder(tmp_path / "d", photographs, test="val")
    assert len(data.load("folder", str(root))[1].images) == 2 and capsys.readouterr().err == ""
    write_folder(root, {name: images[::-1] for name, images in photographs.items()})
    capsys.readouterr()
    _, test = data.load("folder", str(root))  # has both: test is read
    assert line_on_stderr(capsys) == f"the test images are those of {root}/test; those of {root}/val are not read"
    assert torch.equal(test.images[0], image_folder.decode_image(root / "test/cat/3.jpeg", 32))
    assert not torch.equal(test.images[0], image_folder.decode_image(root / "val/cat/3.jpeg", 32))


def test_images_that_do_not_fit_into_memory_are_refused_before_decoding(tmp_path, photographs, monkeypatch):
    root = write_folder(tmp_path / "d", photographs)
    (root / "train/cat/0.png").write_text("broken")
    pages = 8 * 3 * 32 * 32 * 2  # of one byte: the decoded images, and the copy for training
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages - 1}.get)
    assert "8 images of 32x32 pixels need 0.0 GB of memory; this machine has 0.0 GB" in load_error("folder", root)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}.get)
    assert "cannot be decoded" in load_error("folder", root)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "GB of memory" in load_error("folder", root)

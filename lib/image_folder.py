"""Reads a folder of images, with a subfolder for each class, into memory."""

import contextlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from lib.cli import first_line, tell
from lib.image_set import DataError, ImageSet, normal_form, shorten
from lib.memory import total_memory

# Told by the file's content. Pillow reads more formats, but starts Ghostscript for PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
           ".pnm")
MAX_PIXELS = 178_956_970  # of a picture (Pillow's limit), and of all that are decoded at a time; 4 to 7 bytes a pixel
MAX_NAMED = 5  # broken pictures that a message names


def load_folder(root: Path, imageSize: int, parts: tuple[str, ...]) -> list[ImageSet]:
    """-> for each of ``parts`` ("train", "test") the images in root/train/<class>/ or root/test/<class>/

    If test is missing or has no classes, root/val/<class>/ is read; if both have, a line on stderr says that test is.
    Subfolders of a class are included; a class is sorted by path. The images have one channel if all of them are
    grayscale, else three. Hidden files and folders are skipped; files of other kinds are counted in a line on stderr.

    Raises:
        DataError: if folders or images are missing, cannot be read or need too much memory.
    """
    folders = [root / "train" if part == "train" else choose_test_folder(root) for part in parts]
    for folder, part in zip(folders, parts, strict=True):
        if not folder.is_dir():
            valid = "train" if part == "train" else "test or val"
            raise DataError(f"{root} has no folder {valid}; valid are {root}/train/<class>/ and {root}/test/<class>/")
    class_folders = [find_classes(folder) for folder in folders]
    classes = sorted(class_folders[0])
    if len(classes) < 2:
        raise DataError(f"{folders[0]} has {len(classes)} class folders ({', '.join(classes)}); valid are two or more")
    if different := set(classes) ^ set(class_folders[-1]):
        raise DataError(f"{folders[0]} and {folders[-1]} need the same classes; in only one: "
                        f"{shorten(sorted(different))}")
    passed_over: Counter[str] = Counter()
    files, labels, sizes = [], [], []
    for folder, folders_of_class in zip(folders, class_folders, strict=True):
        count_images_outside_classes(folder, passed_over)
        n_before = len(files)
        for label, name in enumerate(classes):
            found = find_images(folders_of_class[name], passed_over)
            files += found
            labels += [label] * len(found)
        sizes.append(len(files) - n_before)
    if passed_over:
        counts = [f"{n} {kind}" for kind, n in sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))]
        tell_once(f"passed over in {root}: {shorten(counts)}; images are {', '.join(ENDINGS)} in class folders")
    check_memory(len(files), imageSize)
    images = decode(files, imageSize).split(sizes)
    return [ImageSet(*pair, classes) for pair in zip(images, torch.tensor(labels).split(sizes), strict=True)]


def tell_once(message: str) -> None:
    """Prints a line on stderr, on rank 0 only: under torchrun every rank reads the images."""
    if os.environ.get("RANK", "0") == "0":
        tell(message)


# --- finding the files ------------------------------------------------------------------------------------------

def choose_test_folder(root: Path) -> Path:
    """-> root/test; root/val if test is missing or, as in Kaggle's layout, has no class folders"""
    test, val = root / "test", root / "val"
    if not val.is_dir():
        return test
    if not test.is_dir():
        return val
    if len(find_classes(val)) < 2:
        return test
    if len(find_classes(test)) < 2:
        tell_once(f"the test images are those of {val}, as {test} has no class folders")
        return val
    tell_once(f"the test images are those of {test}; those of {val} are not read")
    return test


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """-> class name: its folders, several if their names differ only in Unicode normalisation"""
    found: dict[str, list[Path]] = {}
    for path in sorted(list_visible(folder)):
        if path.is_dir():
            found.setdefault(normal_form(path.name), []).append(path)
    return found


def list_visible(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise unreadable_error(error) from error


def unreadable_error(error: OSError) -> DataError:
    return DataError(f"{error.filename} cannot be read ({error.strerror})")


def find_images(folders: list[Path], passed_over: Counter[str]) -> list[Path]:
    """-> all images of a class, sorted by path; ``passed_over`` counts its other files by ending"""
    def fail(error: OSError) -> None:
        raise unreadable_error(error) from error

    images, seen = [], set()
    for folder in folders:
        for parent, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen:  # a link to a folder above it would be followed for ever
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for path in (Path(parent, name) for name in names if not name.startswith(".")):
                if path.exists() and not path.is_file():
                    continue  # a pipe or a device: reading it might never end
                if path.suffix.lower() in ENDINGS:
                    images.append(path)
                else:
                    passed_over[path.suffix.lower() or "without an ending"] += 1
    if not images:
        raise DataError(f"{folders[0]} has no image; valid endings are {', '.join(ENDINGS)}")
    return sorted(images)


def count_images_outside_classes(folder: Path, passed_over: Counter[str]) -> None:
    for path in list_visible(folder):
        if path.suffix.lower() in ENDINGS and path.is_file():
            passed_over[f"{path.suffix.lower()} in no class folder"] += 1


# --- decoding ---------------------------------------------------------------------------------------------------

def check_memory(n: int, imageSize: int) -> None:
    """Raises DataError if n images need more than the machine's total memory.

    Free memory is no measure: it excludes the file cache, which the system gives up when memory is needed.
    """
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # ranks on this machine, each of which holds all images
    processes = int(processes) if processes.isdecimal() else 1
    needed = 2 * processes * n * 3 * imageSize ** 2  # bytes: the decoded images, and their copy in Batches
    available = total_memory(torch.device("cpu"))
    if needed > available:
        raise DataError(f"{n} images of {imageSize}x{imageSize} pixels need {needed / 1e9:.1f} GB of memory; this "
                        f"machine has {available / 1e9:.1f} GB")


def decode(files: list[Path], imageSize: int) -> torch.Tensor:
    """-> uint8 (N, C, imageSize, imageSize); C is 1 if all images are grayscale, else 3

    Raises:
        DataError: if images cannot be decoded; the message names the first five and counts the others.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd palettes and sizes, which Pillow decodes
    Image.core.set_block_size(2**26)  # glibc frees blocks above 32 MiB at once; each thread would keep smaller ones
    images = torch.empty(len(files), 3, imageSize, imageSize, dtype=torch.uint8)
    all_gray, broken = True, []

    def decode_or_error(path: Path) -> torch.Tensor | DataError:
        try:
            return decode_image(path, imageSize)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:  # PIL decodes and resizes without Python's lock
        results = tqdm(pool.map(decode_or_error, files), "decoding", len(files), leave=False, disable=None)
        for image, result in zip(images, results, strict=True):
            if isinstance(result, DataError):
                broken.append(str(result))
            else:
                image.copy_(result)  # a single channel is copied into all three
                all_gray &= len(result) == 1
    if broken:
        more = [f"and {len(broken) - MAX_NAMED} more"] if len(broken) > MAX_NAMED else []
        raise DataError("; ".join(broken[:MAX_NAMED] + more))
    return images[:, :1].contiguous() if all_gray else images


class PixelBudget:
    """Limits the pixels of all pictures that threads decode at the same time to ``total``: others wait."""

    def __init__(self, total: int):
        self.left = total
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, n: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.left >= n)
            self.left -= n
        try:
            yield
        finally:
            with self.changed:
                self.left += n
                self.changed.notify_all()


BUDGET = PixelBudget(MAX_PIXELS)


def decode_image(path: Path, imageSize: int) -> torch.Tensor:
    """-> uint8 (1 or 3, imageSize, imageSize): turned upright, cropped to the middle square and resized

    PIL decodes: torchvision.io's decoders are deprecated (since 0.29) and do not read BMP, TIFF and PPM.

    Raises:
        DataError: if the picture is damaged, too large, or has values that do not fit into 16 bits.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:  # reads the header only
            if file.width * file.height > MAX_PIXELS:  # Pillow's own limit can be switched off
                raise Image.DecompressionBombError
            with BUDGET.take(file.width * file.height):
                return to_tensor(file, path, imageSize)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large a picture; valid are at most {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} cannot be decoded (it is not {', '.join(FORMATS[:-1])} or {FORMATS[-1]})") from error
    except Exception as error:  # PIL's decoders raise SyntaxError, struct.error and others
        raise DataError(f"{path} cannot be decoded ({first_line(error)})") from error


def to_tensor(image: Image.Image, path: Path, imageSize: int) -> torch.Tensor:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise DataError(f"{path} has floating-point pixels (mode F); valid are whole numbers of 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which PIL's convert() would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{path} has pixels from {values.min()} to {values.max()} (mode {image.mode}); valid are 0 "
                            "to 65535")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    mode = "L" if Image.getmodebase(image.mode) == "L" else "RGB"
    if image.mode != mode:  # convert() would copy a picture that has the mode already
        image = image.convert(mode)
    return pil_to_tensor(ImageOps.fit(image, (imageSize, imageSize), Image.Resampling.BILINEAR))  # antialiased

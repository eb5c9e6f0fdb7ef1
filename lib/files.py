"""Files that are replaced whole: a reader finds the old content or the new, whatever moment the process dies at."""

import argparse
import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# errnos of file systems that have no locks, or no fsync of a directory: Lustre, NFS, CIFS, shared folders
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes ``path``'s place, on disk, when the block ends. If it raises, ``path`` is as it was.

    Raises:
        OSError: with ``path`` as its filename.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(path):
        try:
            with open(temporary, "xb") as file:  # exclusive: never through a link that somebody put there
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)


def copy_file(path: Path, other: Path) -> None:
    """Replaces ``other`` whole by a copy of ``path``: no link, so that damage to one leaves the other sound."""
    with open(path, "rb") as source, replacing(other) as target:
        shutil.copyfileobj(source, target)


def sync_directory(path: Path) -> None:
    """Puts a directory's entries on disk, where the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Fills in OSError.filename, which write() and fsync() leave empty."""
    try:
        yield
    except OSError as error:
        if not getattr(error, "is_named", False):  # by a block inside this one
            error.filename, error.is_named = str(path), True
        raise


# --- files that a tool writes -----------------------------------------------------------------------------------

def new_file(suffix: str):
    """-> an argparse type: a file that can be written. It refuses before the work is done, not after it."""
    def parse(text: str) -> Path:
        other = os.path.exists(text or ".") and not os.path.isfile(text)  # a directory, or a device to be overwritten
        if not text.isprintable() or not text.endswith(suffix) or other:
            valid = f"the path of a file that ends in {suffix}" if suffix else "the path of a file"
            raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is {valid}")
        if not os.access(Path(text).parent, os.W_OK | os.X_OK):
            raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is a path in an existing, writable directory")
        return Path(text)
    return parse


def replace_file(path: Path, content: bytes) -> None:
    """Writes a tool's result and prints its path. RuntimeError, with one line for the user, if it cannot be written."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise RuntimeError(f"{path}: cannot be written ({error.strerror})") from None
    print(path)

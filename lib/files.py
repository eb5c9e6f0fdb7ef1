"""Replaces files as a whole: whenever the process is killed, a reader finds either the old content or the new."""

import argparse
import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# errnos of file systems without locks, or without fsync of a directory: Lustre, NFS, CIFS, shared folders
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A context with a new file that replaces ``path`` at its end, synced to disk. If it raises, ``path`` is unchanged.

    Raises:
        OSError: with ``path`` as its filename.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with filename_in_errors(path):
        try:
            with open(temporary, "xb") as file:  # x: an existing file or link is an error
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
    """Replaces ``other`` by a copy of ``path``, not by a hard link: damage to one file leaves the other sound."""
    with open(path, "rb") as source, replacing(other) as target:
        shutil.copyfileobj(source, target)


def sync_directory(path: Path) -> None:
    """Syncs a directory's entries to disk, if its file system can do that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def filename_in_errors(path: Path) -> Iterator[None]:
    """A context that fills in OSError.filename, which write() and fsync() leave empty."""
    try:
        yield
    except OSError as error:
        if not getattr(error, "is_named", False):  # True: an inner context has filled it in
            error.filename, error.is_named = str(path), True
        raise


# --- files that a tool writes -----------------------------------------------------------------------------------

def new_file(suffix: str):
    """-> an argparse type: the path of a file that can be written. Refusing it later would lose the tool's work."""
    def parse(text: str) -> Path:
        is_no_file = os.path.exists(text or ".") and not os.path.isfile(text)  # a directory or a device
        if not text.isprintable() or not text.endswith(suffix) or is_no_file:
            valid = f"the path of a file that ends in {suffix}" if suffix else "the path of a file"
            raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is {valid}")
        if not os.access(Path(text).parent, os.W_OK | os.X_OK):
            raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is a path in an existing, writable directory")
        return Path(text)
    return parse


def replace_file(path: Path, content: bytes) -> None:
    """Writes a tool's result and prints its path. Raises RuntimeError, with a one-line message, if that fails."""
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise RuntimeError(f"{path}: cannot be written ({error.strerror})") from None
    print(path)

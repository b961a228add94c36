"""Regular files, read whole: a FIFO would keep its reader waiting, a device send bytes for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_descriptor(path: str | os.PathLike[str]) -> int:
    """The file's descriptor, for reading. Raises OSError where there is no regular file of that
    name."""
    try:
        mode = Path(path).stat().st_mode  # first, since some devices act when they are opened
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "a folder, not a regular file")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error)) from None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, for reading. Raises OSError where there is no regular file of that name."""
    return os.fdopen(open_descriptor(path), "rb")


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The content. Raises OSError when it cannot be read or is longer than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"longer than {most:,} bytes")
        return file.read(size)  # it takes memory for all that is asked for

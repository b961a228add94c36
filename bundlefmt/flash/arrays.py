"""Arrays in folders, as mmap-ninja lays them out: `data.ninja`, and small files that say what is
in it.

Facts: mmap-ninja writes through a memory map, where a full disk ends the process with SIGBUS, and
maps whatever the small files say. Here data is written with calls that report errors, and mapped
only when the small files and the length of the data are just what the reader expects. (A file that
is cut short later, while it is mapped, is a SIGBUS still.)
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import FormatError
from bundlefmt.storage.atomic import write_all
from bundlefmt.storage.regular import open_regular, read_regular

_DATA = "data.ninja"
_MOST_SMALL = 64  # bytes of a small file


def open_array(folder: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array in a folder, mapped. Raises FormatError when it is not of this dtype and shape."""
    _check(folder / "dtype.ninja", dtype.encode(), _text)
    _check(folder / "shape.ninja", _shape_bytes(shape), _shape)
    _check(folder / "order.ninja", b"C", _text)
    with _reporting(folder / _DATA):
        return _mapped(folder / _DATA, np.dtype(dtype), shape)


class ArrayWriter:
    """Writes an array [rows, *row_shape] into a new folder, some rows at a time; `finish` says what
    was written. Raises OSError when the device refuses."""

    def __init__(self, folder: Path, dtype: str, row_shape: tuple[int, ...] = ()) -> None:
        folder.mkdir()
        self._folder = folder
        self._dtype = dtype
        self._row_shape = row_shape
        self.rows = 0
        self._nbytes = 0

    def extend(self, rows: NDArray[Any]) -> None:
        """Add rows [n, *row_shape]."""
        data = np.ascontiguousarray(rows, dtype=self._dtype).reshape(-1)
        self._put(data.view(np.uint8))
        self._nbytes += data.nbytes
        self.rows += rows.shape[0]

    def finish(self) -> None:
        """Write the small files."""
        if not self._nbytes:
            self._put(np.zeros(1, dtype=np.uint8))  # no empty file can be mapped
        for name, content in {
            "type": b"numpy",
            "dtype": self._dtype.encode(),
            "shape": _shape_bytes((self.rows, *self._row_shape)),
            "order": b"C",
        }.items():
            write_small(self._folder / f"{name}.ninja", content)

    def _put(self, data: NDArray[np.uint8]) -> None:
        # Opened anew each time: kept open, the arrays of many layers are too many open files.
        with (self._folder / _DATA).open("ab", buffering=0) as file:
            write_all(file.fileno(), data, self._nbytes)


def write_small(path: Path, content: bytes) -> None:
    """Write a whole new file."""
    with path.open("xb") as file:
        file.write(content)


def _check(path: Path, expected: bytes, decode: Callable[[bytes], object]) -> None:
    with _reporting(path):
        found = read_regular(path, _MOST_SMALL)
    if found != expected:
        raise FormatError(
            "another array than trace.json tells of",
            file=path,
            expected=decode(expected),
            found=decode(found),
        )


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FormatError(f"cannot read: {error.strerror or error}", file=path) from error


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    nbytes = math.prod(shape) * dtype.itemsize
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != max(nbytes, 1) and size != nbytes:
            raise FormatError("wrong length", file=path, expected=f"{nbytes} bytes", found=size)
        if not nbytes:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", shape=shape)


def _shape_bytes(shape: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(shape)}Q", *shape)


def _shape(content: bytes) -> list[int]:
    return [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), 8)]

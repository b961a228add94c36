"""What a measurement reads from, and the memory that it reads into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import UsageError, WriteError
from bundlefmt.file import BundleFile
from bundlefmt.storage.atomic import scratch_file, write_all
from bundlefmt.storage.buffers import aligned_empty

DEFAULT_SIZE = 1 << 30
SEED = 1

_WRITE_STEP = 16 << 20


@contextmanager
def target(
    model: str | os.PathLike[str] | None, folder: str | os.PathLike[str], size: int
) -> Iterator[tuple[str, BundleFile | None]]:
    """The file to read: the model, or a temporary file full of random bytes."""
    if model is not None:
        with BundleFile(model) as file:
            if not file.groups:
                raise UsageError("a file without bundles", file=model)
            yield file.path, file
        return
    with scratch_file(folder, needed=size) as temporary:
        block = np.random.default_rng(SEED).bytes(_WRITE_STEP)
        try:
            for start in range(0, size, _WRITE_STEP):
                write_all(temporary.fileno(), block[: size - start], start)
        except OSError as error:
            raise WriteError(f"cannot write: {error.strerror}", file=folder) from error
        yield temporary.name, None


def touched(rows: int, width: int) -> NDArray[np.uint8]:
    """Memory [rows, width] whose pages are there: no read pays for them."""
    memory = aligned_empty(rows * width)
    memory.fill(0)
    return memory.reshape(rows, width)

"""Read backends behind one interface; a new one is one class and one entry here."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import ReadError, UsageError
from bundlefmt.storage.backends.base import (
    DEFAULT_QUEUE_DEPTH,
    DEFAULT_THREADS,
    MAX_VIEWS,
    SPARE,
    Backend,
    Batch,
    Checks,
    Damaged,
    Requests,
    land,
    whole_rows,
)
from bundlefmt.storage.backends.mapped import Mapped
from bundlefmt.storage.backends.pread import Buffered, Direct, Uring

BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (Uring, Direct, Buffered, Mapped)
}
CHOICES = ("auto", *BACKENDS)

__all__ = [
    "BACKENDS",
    "CHOICES",
    "DEFAULT_QUEUE_DEPTH",
    "DEFAULT_THREADS",
    "MAX_VIEWS",
    "SPARE",
    "Backend",
    "Batch",
    "Checks",
    "Damaged",
    "Requests",
    "land",
    "open_backend",
    "whole_rows",
]


def open_backend(
    path: str | os.PathLike[str],
    name: str = "auto",
    threads: int = DEFAULT_THREADS,
    queue_depth: int = DEFAULT_QUEUE_DEPTH,
    memory: NDArray[np.uint8] | None = None,
) -> tuple[Backend, str | None]:
    """The backend of that name on a file, and why it is not the first choice (None when it is).

    `auto` takes the first of `uring`, `direct` and `buffered` that works on the file; `uring` has
    `queue_depth` reads in flight, the others one for each of their `threads`. `memory` (contiguous
    uint8), into which most reads will go, is registered with the kernel where that helps. Raises
    UsageError for an unknown name, ReadError when a backend asked for by name cannot work on the
    file.
    """
    if name not in CHOICES:
        raise UsageError(
            "unknown backend", field="backend", expected=", ".join(CHOICES), found=name
        )
    if name != "auto":
        return BACKENDS[name](path, threads, queue_depth, memory), None
    refusals: list[str] = []
    for backend in (Uring, Direct):
        try:
            return backend(path, threads, queue_depth, memory), "; ".join(refusals) or None
        except ReadError as error:
            refusals += [error.what] if error.what not in refusals else []
    return Buffered(path, threads, queue_depth, memory), "; ".join(refusals)

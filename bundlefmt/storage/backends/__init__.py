"""Read backends behind one interface; a new one is one module and one entry here."""

from __future__ import annotations

import os

from bundlefmt.errors import ReadError, UsageError
from bundlefmt.storage.backends.base import DEFAULT_THREADS, MAX_VIEWS, Backend, Batch, Request
from bundlefmt.storage.backends.mapped import Mapped
from bundlefmt.storage.backends.pread import Buffered, Direct

BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (Direct, Buffered, Mapped)
}
CHOICES = ("auto", *BACKENDS)

__all__ = [
    "BACKENDS",
    "CHOICES",
    "DEFAULT_THREADS",
    "MAX_VIEWS",
    "Backend",
    "Batch",
    "Request",
    "open_backend",
]


def open_backend(
    path: str | os.PathLike[str], name: str = "auto", threads: int = DEFAULT_THREADS
) -> tuple[Backend, str | None]:
    """The backend of that name on a file, and why it is not the first choice (None when it is).

    `auto` takes `direct` where a probe read succeeds, else `buffered`. Raises UsageError for an
    unknown name, ReadError when a backend asked for by name cannot work on the file.
    """
    if name not in CHOICES:
        raise UsageError(
            "unknown backend", field="backend", expected=", ".join(CHOICES), found=name
        )
    if name != "auto":
        return BACKENDS[name](path, threads), None
    try:
        return Direct(path, threads), None
    except ReadError as error:
        return Buffered(path, threads), error.what

"""The C library's heap."""

from __future__ import annotations

import ctypes

# What mallopt calls them (glibc's malloc.h). Setting either stops glibc from raising both: up to
# 32 and 64 MiB, by what a process has freed so far.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_THRESHOLD = 1 << 20  # bytes


def return_freed() -> None:
    """From now on large pieces of memory go back to the system when they are freed. Without this,
    glibc keeps tens of megabytes of them, which no later mapping can use. Does nothing where the C
    library has no mallopt."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)

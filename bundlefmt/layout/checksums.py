"""Checksums of bundles (spec, section 5): one xxh3-64 over each row's whole stride."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from bundlefmt.native import CPUS, core


def row_digests(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """xxh3-64 of each row, uint64 [n], of uint8 [n, stride] with contiguous rows."""
    if core is not None:
        found: NDArray[np.uint64] = core.digests(rows, CPUS)
        return found
    return np.array([xxhash.xxh3_64_intdigest(row) for row in rows], dtype=np.uint64)

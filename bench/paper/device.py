"""What the device under a file does: sequential and random reads, cold, past the page cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import bundlefmt
from bundlefmt.file import BundleFile
from bundlefmt.storage.device import drop_cache
from bundlefmt.storage.sequential import Sequential

RANDOM = 16 << 10
_SPAN = 1 << 30  # of a sequential reading
_READINGS = 3


@dataclass(frozen=True)
class Device:
    """Bytes per second, medians: sequential, and random reads of 16 KiB at the reader's depth."""

    sequential: float
    random: float
    backend: str

    @property
    def ratio(self) -> float:
        return self.random / self.sequential


def measure(path: str) -> Device:
    """Of the device under a bundle file."""
    with BundleFile(path) as file:
        backend, _ = file.backend()
        try:
            sequential = Sequential(backend)
            size = file.superblock.file_length
            span = min(_SPAN, size // _READINGS)
            rates = []
            for reading in range(_READINGS):
                drop_cache(path)
                start = time.perf_counter()
                for _ in sequential.pieces(reading * span // 4096 * 4096, span):
                    pass
                rates.append(span / (time.perf_counter() - start))
        finally:
            backend.close()
        name = backend.name
    (row,) = bundlefmt.bench(path, chunk_sizes=[RANDOM], backend=name, verify=False).rows
    return Device(median(rates), row.bytes_per_second, name)

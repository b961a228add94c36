"""What reads from a device cost: the arithmetic, free of I/O.

Strategy: what limits sparse reading is the number of requests. Batches of several numbers of random
requests were measured at some sizes, at the depth that the reader keeps, beside a computation as in
a pass; what a batch of n requests of s bytes takes is interpolated between them, log on log in
both: about a latency and so much for each request. One long span takes what the sequential rate
says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct

from bundlefmt.errors import FormatError

VERSION = 2

_GRID = 256  # sizes that a break-even is looked for among
_LEAST_SECONDS = 1e-9  # has a logarithm, and is nothing

Bytes = Annotated[int, Meta(ge=1, le=1 << 40)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
SomeSeconds = Annotated[float, Meta(gt=0, le=1e6)]
Rate = Annotated[float, Meta(gt=0, le=1e15)]


class Batch(NamedTuple):
    """Requests that are submitted together, and the bytes of them all; expected values, so that
    neither need be whole."""

    requests: float
    nbytes: float


class SizeCost(Struct, frozen=True):
    """What random requests of so many bytes cost: a batch of counts[k] of them takes seconds[k],
    and each of them cpu_seconds of the process's CPU time."""

    bytes: Bytes
    counts: Annotated[list[Annotated[int, Meta(ge=1, le=1 << 20)]], Meta(min_length=1)]
    seconds: list[SomeSeconds]
    cpu_seconds: Seconds

    def __post_init__(self) -> None:
        if self.counts != sorted(set(self.counts)) or len(self.counts) != len(self.seconds):
            raise ValueError("counts do not ascend, or not one for each of the seconds")

    def batch(self, requests: float) -> float:
        """Seconds for a batch. Beyond the largest measured the rate stays; less than one request
        is one that is not always needed."""
        near = min(max(requests, self.counts[0]), self.counts[-1])
        logs = np.interp(np.log(near), np.log(self.counts), np.log(self.seconds))
        return float(np.exp(logs)) * requests / near


class DeviceProfile(Struct, frozen=True):
    """A device, and the machine beside it, as measured: `device` identifies it, `backend` and
    `in_flight` are what was read with, `sizes` ascend; `compute_bytes_per_second` is the rate at
    which f16 weights in memory are multiplied."""

    version: int
    device: str
    backend: str
    in_flight: int
    sizes: Annotated[list[SizeCost], Meta(min_length=1)]
    sequential_bytes_per_second: Rate
    compute_bytes_per_second: Rate

    def __post_init__(self) -> None:
        sizes = [cost.bytes for cost in self.sizes]
        if sizes != sorted(set(sizes)):
            raise ValueError("sizes do not ascend")

    def batch_seconds(self, requests: float, nbytes: float) -> float:
        """Seconds for a batch of so many requests of so many bytes each."""
        if not requests:
            return 0.0
        largest = self.sizes[-1].bytes  # beyond it the rate stays
        found = self._interpolated(nbytes, [cost.batch(requests) for cost in self.sizes])
        return found * max(nbytes / largest, 1.0)

    def seconds_per_request(self, nbytes: float) -> float:
        """Seconds for each request of a batch that is large."""
        many = max(cost.counts[-1] for cost in self.sizes)
        return self.batch_seconds(many, nbytes) / many

    def cpu_seconds(self, nbytes: float) -> float:
        """Seconds of CPU time for each request of that size."""
        return self._interpolated(nbytes, [cost.cpu_seconds for cost in self.sizes])

    def predict(self, batches: Iterable[Batch]) -> float:
        """Seconds for batches that are waited for one after the other."""
        return sum(
            self.batch_seconds(requests, nbytes / requests)
            for requests, nbytes in batches
            if requests
        )

    def break_even_gap(self, bundle_bytes: int) -> int:
        """Up to how many bytes between two wanted bundles it pays to read along: then one request
        over all three costs no more than one for each bundle."""
        two, largest = 2 * bundle_bytes, self.sizes[-1].bytes
        limit = 2 * self.seconds_per_request(bundle_bytes)
        gap = 0
        for size in np.geomspace(two, max(two, largest), _GRID):
            if self.seconds_per_request(size) > limit:
                break
            gap = int(size) - two
        return gap

    def _interpolated(self, nbytes: float, seconds: Sequence[float]) -> float:
        sizes = [cost.bytes for cost in self.sizes]
        logs = np.log(np.maximum(seconds, _LEAST_SECONDS))
        return float(np.exp(np.interp(np.log(max(nbytes, 1)), np.log(sizes), logs)))


def encode(profile: DeviceProfile) -> bytes:
    """A profile as JSON."""
    return msgspec.json.format(msgspec.json.encode(profile))


def decode(data: bytes) -> DeviceProfile:
    """A profile from JSON. Raises FormatError for one that is damaged or of another version."""
    remedy = "bundlefmt calibrate makes a new one"
    try:
        profile = msgspec.json.decode(data, type=DeviceProfile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"no device profile, {remedy}: {error}") from None
    if profile.version != VERSION:
        raise FormatError(
            f"a device profile of another version, {remedy}",
            field="version",
            expected=VERSION,
            found=profile.version,
        )
    return profile

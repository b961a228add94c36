"""What reads from a device cost: the arithmetic, free of I/O.

Strategy: what limits sparse reading is the number of requests. A batch of n random requests of s
bytes takes latency(s) + n * seconds_per_request(s), both fitted to batches of several n that were
measured at some sizes, and interpolated between those, log on log. The rate is that of the depth
which the reader keeps, so that it is not a parameter. One long span takes what the sequential rate
says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bundlefmt.errors import FormatError

VERSION = 1

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
    """What random requests of so many bytes cost: a batch of n takes latency + n *
    seconds_per_request of time, and n * cpu_seconds of the process's CPU."""

    bytes: Bytes
    latency: Seconds
    seconds_per_request: SomeSeconds
    cpu_seconds: Seconds


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

    def latency(self, nbytes: float) -> float:
        """Seconds that a batch of requests of that size takes besides those for each of them."""
        return self._interpolated(nbytes, [cost.latency for cost in self.sizes])

    def seconds_per_request(self, nbytes: float) -> float:
        """Seconds that each request of that size adds to its batch."""
        largest = self.sizes[-1].bytes  # beyond it the rate stays
        found = self._interpolated(nbytes, [cost.seconds_per_request for cost in self.sizes])
        return found * max(nbytes / largest, 1.0)

    def cpu_seconds(self, nbytes: float) -> float:
        """Seconds of CPU time for each request of that size."""
        return self._interpolated(nbytes, [cost.cpu_seconds for cost in self.sizes])

    def predict(self, batches: Iterable[Batch]) -> float:
        """Seconds for batches that are waited for one after the other. A batch of less than one
        request is one that is not always needed."""
        total = 0.0
        for requests, nbytes in batches:
            if requests > 0:
                size = nbytes / requests
                total += min(requests, 1.0) * self.latency(size)
                total += requests * self.seconds_per_request(size)
        return total

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


def fitted(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(latency, seconds per request), neither negative, nearest to batches of so many requests
    that took so long: least squares of the relative errors."""
    n, t = np.asarray(counts, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    terms = np.stack([np.ones_like(n), n], axis=1) / t[:, None]
    latency, each = _least_squares(terms)
    if latency < 0:
        latency, each = 0.0, *_least_squares(terms[:, 1:])
    elif each <= 0:
        latency, each = *_least_squares(terms[:, :1]), 0.0
    return latency, max(each, _LEAST_SECONDS)


def _least_squares(terms: NDArray[np.float64]) -> list[float]:
    """The factors with which the terms [n, k] come nearest to one."""
    factors: list[float] = np.linalg.lstsq(terms, np.ones(terms.shape[0]), rcond=None)[0].tolist()
    return factors


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

"""Batches of neurons through each backend, cold, two batches in flight; verified and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import bundlefmt
from bench.conftest import ROUNDS
from bundlefmt.errors import ReadError
from bundlefmt.measurement.reads import Pattern, two_in_flight
from bundlefmt.storage.backends import BACKENDS
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.device import drop_cache

PATTERN, BATCHES = Pattern(), 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_batches(benchmark: Any, bundle: Path, backend: str, verify: bool) -> None:
    random = np.random.default_rng(1)
    with bundlefmt.open(bundle) as file:
        group = file.groups[0]
        try:
            reader = file.reader(backend, verify=verify)
        except ReadError as error:
            pytest.skip(error.what)
        memory = aligned_empty(BATCHES * PATTERN.batch * group.stride)
        memory.fill(0)  # its pages are there
        outs = memory.reshape(BATCHES, PATTERN.batch, group.stride)

        def cold() -> tuple[tuple[NDArray[np.int64]], dict[str, Any]]:
            drop_cache(bundle)
            return (PATTERN.draw(group.neurons, 1, BATCHES, random),), {}

        def read(batches: NDArray[np.int64]) -> None:
            for pending in two_in_flight(
                reader.submit(group.layer, neurons, expert=group.expert, out=out)
                for neurons, out in zip(batches, outs, strict=True)
            ):
                pending.result()

        with reader:
            benchmark.pedantic(read, setup=cold, rounds=ROUNDS, iterations=1, warmup_rounds=1)
        if benchmark.stats is not None:
            benchmark.extra_info["MB/s"] = round(outs.nbytes / benchmark.stats["median"] / 1e6)

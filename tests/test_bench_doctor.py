"""What `bench` measures and `doctor` finds: figures of the right settings, and nothing left."""

from __future__ import annotations

import errno
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

import bundlefmt
from bundlefmt import native
from bundlefmt.errors import BundleError, FormatError, ReadError, UsageError, WriteError
from bundlefmt.storage.backends import BACKENDS
from bundlefmt.storage.device import probe_direct
from tests.conftest import VECTORS

SIZE = 4 << 20
STRIDE = 512  # of the demo model's bundles


def _direct_works() -> bool:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(65536))
        file.flush()
        return probe_direct(file.name).refusal is None


needs_direct = pytest.mark.skipif(not _direct_works(), reason="no direct I/O here")
backends = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=[needs_direct] if name == "direct" else []) for name in BACKENDS],
)


def check_figures(row: Any) -> None:
    """Figures that any row of measurements must have."""
    assert row.repetitions > 1
    assert row.requests >= 1
    assert 0 < row.least_bytes_per_second <= row.bytes_per_second <= row.most_bytes_per_second
    assert row.requests_per_second > 0
    assert 0 < row.latency_median_us <= row.latency_p99_us
    assert row.cpu_us_per_read >= 0


# Devices.


@needs_direct
def test_a_device_is_measured_with_every_setting_asked_for(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    rows = bundlefmt.bench(
        chunk_sizes=[4096, 16384],
        threads=[1, 2],
        folder=tmp_path,
        size=SIZE,
        progress=lambda done, total: seen.append((done, total)),
    )
    settings = [(row.chunk_bytes, row.backend, row.threads) for row in rows]
    assert settings == list(itertools.product([4096, 16384], BACKENDS, [1, 2]))
    assert seen == [(done, len(rows)) for done in range(1, len(rows) + 1)]
    for row in rows:
        check_figures(row)
        assert (row.reads, row.neurons_per_chunk, row.verify) == ("device", None, False)
        assert row.requests == SIZE // row.chunk_bytes
        assert row.bytes_per_second / row.requests_per_second == pytest.approx(row.chunk_bytes)
        assert Path(row.file).parent == tmp_path
    assert list(tmp_path.iterdir()) == []


@backends
def test_a_chunk_need_not_be_aligned(tmp_path: Path, backend: str) -> None:
    (row,) = bundlefmt.bench(chunk_sizes=[3001], backend=backend, folder=tmp_path, size=1 << 18)
    check_figures(row)
    assert (row.chunk_bytes, row.backend) == (3001, backend)


def test_auto_is_measured_under_the_name_of_the_backend_in_effect(tmp_path: Path) -> None:
    (row,) = bundlefmt.bench(chunk_sizes=[4096], backend="auto", folder=tmp_path, size=1 << 18)
    assert row.backend in BACKENDS


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"chunk_sizes": [SIZE + 1]}, UsageError),
        ({"chunk_sizes": [0]}, UsageError),
        ({"chunk_sizes": [-4096]}, UsageError),
        ({"chunk_sizes": [4096], "threads": [0]}, UsageError),
        ({"backend": "tape"}, UsageError),
        ({"size": 0}, UsageError),
        ({"size": 1 << 60}, WriteError),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_and_leave_nothing(
    tmp_path: Path, settings: dict[str, Any], error: type[BundleError]
) -> None:
    with pytest.raises(error):
        bundlefmt.bench(**{"folder": tmp_path, "size": SIZE, "backend": "buffered"} | settings)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(fd: int, views: Any, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(native, "core", None)  # whose engines do not go through os
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ReadError, match=os.strerror(errno.EIO)):
        bundlefmt.bench(backend="buffered", folder=tmp_path, size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder"):
        bundlefmt.bench(folder=tmp_path / "missing", size=SIZE)


def test_a_folder_that_takes_no_file_raises_only_our_errors() -> None:
    with pytest.raises(BundleError, match="/proc"):
        bundlefmt.bench(folder="/proc", size=0)


# Bundles.


@backends
@pytest.mark.parametrize("verify", [True, False])
def test_a_model_is_measured_in_whole_neighbours(
    demo_bundle: Path, backend: str, verify: bool
) -> None:
    (row,) = bundlefmt.bench(
        demo_bundle, chunk_sizes=[4 * STRIDE], threads=[2], backend=backend, verify=verify
    )
    check_figures(row)
    assert (row.reads, row.file, row.backend) == ("bundles", str(demo_bundle), backend)
    assert (row.neurons_per_chunk, row.chunk_bytes) == (4, 4 * STRIDE)
    assert (row.threads, row.verify) == (2, verify)


@pytest.mark.parametrize(
    ("chunks", "neurons"),
    [
        (None, [1]),
        ([1, STRIDE, STRIDE + 200, 3 * STRIDE], [1, 1, 1, 3]),
        ([1 << 30], [1024]),  # the whole of a group
    ],
)
def test_a_chunk_is_rounded_to_bundles_that_a_group_has(
    demo_bundle: Path, chunks: list[int] | None, neurons: list[int]
) -> None:
    rows = bundlefmt.bench(demo_bundle, chunk_sizes=chunks, threads=[2], backend="buffered")
    assert [row.neurons_per_chunk for row in rows] == neurons
    assert [row.chunk_bytes for row in rows] == [n * STRIDE for n in neurons]


@pytest.mark.parametrize("neighbours", [1, 4, 16])
def test_every_read_of_a_model_is_one_chunk_long(demo_bundle: Path, neighbours: int) -> None:
    (row,) = bundlefmt.bench(demo_bundle, chunk_sizes=[neighbours * STRIDE], backend="buffered")
    assert row.bytes_per_second / row.requests_per_second == pytest.approx(row.chunk_bytes)


@pytest.mark.parametrize("vector", ["ordered", "experts", "plain"])
def test_files_with_an_order_or_experts_are_measured(vector: str) -> None:
    path = VECTORS / f"{vector}.bundle"
    (row,) = bundlefmt.bench(path, chunk_sizes=[128], threads=[2], backend="buffered")
    check_figures(row)
    assert row.neurons_per_chunk == 2


def test_a_damaged_model_is_measured_only_unchecked() -> None:
    damaged = VECTORS / "bad" / "bundle-damaged.bundle"
    with pytest.raises(FormatError, match="neuron 1"):
        bundlefmt.bench(damaged, chunk_sizes=[1 << 20], backend="buffered")
    rows = bundlefmt.bench(damaged, chunk_sizes=[1 << 20], backend="buffered", verify=False)
    assert len(rows) == 1


# The doctor.


def test_the_doctor_reports_what_the_machine_offers(tmp_path: Path) -> None:
    found = bundlefmt.doctor(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["folder"] == str(tmp_path)
    assert found["cpus"] == len(os.sched_getaffinity(0))
    assert all(isinstance(feature, str) for feature in found["cpu_features"])
    memory = found["memory"]
    assert 0 < memory["available"] <= memory["total"]
    assert memory["limit"] is None or memory["limit"] > 0
    direct = found["direct_io"]
    for name in ("memory_alignment", "offset_alignment"):
        assert direct[name] >= 1
        assert direct[name] & (direct[name] - 1) == 0
    assert direct["works"] == (direct["refusal"] is None) == (found["backends"]["direct"] == "ok")
    assert set(found["backends"]) == set(BACKENDS)
    assert found["backends"]["buffered"] == found["backends"]["mmap"] == "ok"
    first = next(name for name in BACKENDS if found["backends"][name] == "ok")
    assert found["auto"]["backend"] == first
    assert (found["auto"]["fallback"] is None) == (first == next(iter(BACKENDS)))
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_says_why_direct_is_not_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    found = bundlefmt.doctor(tmp_path)
    why = os.strerror(errno.EINVAL)
    assert found["direct_io"]["works"] is False
    assert why in found["direct_io"]["refusal"]
    assert why in found["backends"]["direct"]
    assert found["backends"]["buffered"] == found["backends"]["mmap"] == "ok"
    assert found["auto"]["backend"] == "buffered"
    assert why in found["auto"]["fallback"]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_the_doctor_refuses_what_is_no_folder(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=folder):
        bundlefmt.doctor(tmp_path / folder)

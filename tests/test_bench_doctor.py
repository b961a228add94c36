"""What `bench` measures and `doctor` finds: figures of the right settings, and nothing left."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundlefmt
from bundlefmt import native
from bundlefmt.cli import main
from bundlefmt.errors import BundleError, FormatError, ReadError, UsageError, WriteError
from bundlefmt.measurement import BenchRow, fio, plot
from bundlefmt.measurement.reads import Pattern, two_in_flight
from bundlefmt.storage.backends import BACKENDS, DEFAULT_QUEUE_DEPTH
from tests.conftest import REFUSED, VECTORS, backends

SIZE = 4 << 20
STRIDE = 512  # of the demo model's bundles


def rows_of(*model: Path, **settings: Any) -> list[BenchRow]:
    """What a measurement finds."""
    return bundlefmt.bench(*model, **settings).rows


def check_figures(row: Any) -> None:
    """Figures that any row of measurements must have."""
    assert row.repetitions > 1
    assert row.requests >= 1
    assert 0 < row.least_bytes_per_second <= row.bytes_per_second <= row.most_bytes_per_second
    assert row.requests_per_second > 0
    assert 0 < row.latency_median_us <= row.latency_p99_us
    assert row.cpu_us_per_read >= 0


# Devices.


def test_a_device_is_measured_with_every_setting_asked_for(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    rows = rows_of(
        chunk_sizes=[4096, 16384],
        threads=[1, 2],
        queue_depths=[3],
        folder=tmp_path,
        size=SIZE,
        progress=lambda done, total: seen.append((done, total)),
    )
    settings = [(row.chunk_bytes, row.backend, row.threads, row.queue_depth) for row in rows]
    each = [
        ("uring", None, 3),
        *((name, count, None) for name in list(BACKENDS)[1:] for count in (1, 2)),
    ]
    each = [one for one in each if one[0] not in REFUSED]
    assert settings == [(chunk, *one) for chunk, one in itertools.product([4096, 16384], each)]
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
    (row,) = rows_of(chunk_sizes=[3001], backend=backend, folder=tmp_path, size=1 << 18)
    check_figures(row)
    assert (row.chunk_bytes, row.backend) == (3001, backend)


def test_auto_is_measured_under_the_name_of_the_backend_in_effect(tmp_path: Path) -> None:
    (row,) = rows_of(chunk_sizes=[4096], backend="auto", folder=tmp_path, size=1 << 18)
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
        ({"backend": "uring", "queue_depths": [0]}, BundleError),
        ({"batch": 0}, UsageError),
        ({"order": "backwards"}, UsageError),
        ({"adjacent": 0.5}, UsageError),
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
    monkeypatch.setattr(native, "python_asked_for", True)
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


# Which bundles.


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("adjacent", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("order", ["random", "sorted"])
def test_batches_have_the_share_of_adjacent_chunks_asked_for(
    width: int, adjacent: float, order: str
) -> None:
    pattern = Pattern(40, order, adjacent)
    for slots in (1000, 4 * (40 * (width + 1) - pattern.pairs) - 1):  # the latter: no room to spare
        assert pattern.batches_in(slots, width) >= 4
        drawn = pattern.draw(slots, width, 4, np.random.default_rng())
        assert drawn.shape == (4, 40 * width)
        assert np.unique(drawn).size == drawn.size
        assert drawn.min() >= 0 and drawn.max() < slots
        every = np.zeros(slots + 2, bool)
        every[drawn + 1] = True
        for chunks in drawn.reshape(4, 40, width):
            starts = set(chunks[:, 0].tolist())
            assert (np.diff(chunks, axis=1) == 1).all()
            paired = [s for s in starts if starts & {s - width, s + width}]
            assert len(paired) == 40 * adjacent
            alone = np.array(sorted(starts - set(paired)), int)
            assert not every[alone].any() and not every[alone + width + 1].any()
        ascending = (np.diff(drawn, axis=1) > 0).all()
        assert ascending == (order == "sorted")


@pytest.mark.parametrize(("slots", "width", "batch"), [(10, 1, 5), (1, 1, 1), (9, 4, 2), (9, 9, 1)])
def test_a_batch_shrinks_to_what_a_group_holds(slots: int, width: int, batch: int) -> None:
    pattern = Pattern(512).fitted(slots, width)
    assert pattern.batch == batch
    assert pattern.draw(slots, width, 1, np.random.default_rng()).shape == (1, batch * width)


def test_a_batch_is_waited_for_when_the_next_one_is_on_its_way() -> None:
    events = []

    def submitted() -> Iterator[int]:
        for k in range(3):
            events.append(f"submit {k}")
            yield k

    for k in two_in_flight(submitted()):
        events.append(f"wait {k}")
    assert events == ["submit 0", "submit 1", "wait 0", "submit 2", "wait 1", "wait 2"]


# Bundles.


def test_a_row_says_how_its_batches_were_made(demo_bundle: Path) -> None:
    (row,) = rows_of(
        demo_bundle, backend="buffered", batch=100, order="sorted", adjacent=0.5, threads=[2]
    )
    check_figures(row)
    assert (row.batch, row.order, row.adjacent) == (100, "sorted", 0.5)
    assert row.requests % 75 == 0  # of 100 neurons, 50 stand in pairs, and a pair is one request


def test_a_backend_that_cannot_work_is_named_with_its_reason(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "reason", "taken away")
    monkeypatch.setattr(native, "python_asked_for", True)
    assert main(["bench", str(demo_bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "taken away" in found["unusable"]["uring"]
    assert "uring" not in [row["backend"] for row in found["rows"]]
    assert found["machine"]["file_bytes"] == demo_bundle.stat().st_size
    assert main(["bench", str(demo_bundle)]) == 0
    assert re.search("uring .*taken away", capsys.readouterr().out)


# Pictures.


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_picture_is_drawn(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begins: bytes
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(fio, "installed", lambda: False)
    args = ["bench", str(demo_bundle), "--backend", "buffered", "--chunk-size", "512,2K"]
    assert main([*args, "--plot", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_has_a_line_per_setting_and_the_ceiling(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(fio, "installed", lambda: True)
    monkeypatch.setattr(fio, "run", lambda path, chunk, depth, *_: a_ceiling(chunk, depth))
    measured = bundlefmt.bench(
        demo_bundle, chunk_sizes=[512, 2048], threads=[1, 2], backend="buffered", ceiling=True
    )
    assert [(found.chunk_bytes, found.depth) for found in measured.ceilings] == [
        (512, max(fio.DEPTHS)),
        (2048, max(fio.DEPTHS)),
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        plot.draw(measured, tmp_path / "rates.svg")
    text = (tmp_path / "rates.svg").read_text()
    for label in ("buffered, 1 thread", "buffered, 2 threads", "fio, best depth", "2 KiB", "MB/s"):
        assert label in text


def a_ceiling(chunk: int, depth: int) -> fio.Ceiling:
    """What a fio might find that is the faster, the deeper its queue."""
    return fio.Ceiling(chunk, depth, depth * chunk, depth, 1.0)


def test_without_matplotlib_nothing_is_measured_for_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape("pip install 'bundlefmt[plot]'")):
        plot.check(tmp_path / "rates.png")


@backends
@pytest.mark.parametrize("verify", [True, False])
def test_a_model_is_measured_in_whole_neighbours(
    demo_bundle: Path, backend: str, verify: bool
) -> None:
    (row,) = rows_of(
        demo_bundle, chunk_sizes=[4 * STRIDE], threads=[2], backend=backend, verify=verify
    )
    check_figures(row)
    assert (row.reads, row.file, row.backend) == ("bundles", str(demo_bundle), backend)
    assert (row.neurons_per_chunk, row.chunk_bytes) == (4, 4 * STRIDE)
    assert row.verify is verify
    assert (row.threads, row.queue_depth) == (
        (None, DEFAULT_QUEUE_DEPTH) if backend == "uring" else (2, None)
    )


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
    rows = rows_of(demo_bundle, chunk_sizes=chunks, threads=[2], backend="buffered")
    assert [row.neurons_per_chunk for row in rows] == neurons
    assert [row.chunk_bytes for row in rows] == [n * STRIDE for n in neurons]


@pytest.mark.parametrize("neighbours", [1, 4, 16])
def test_every_read_of_a_model_is_one_chunk_long(demo_bundle: Path, neighbours: int) -> None:
    (row,) = rows_of(demo_bundle, chunk_sizes=[neighbours * STRIDE], backend="buffered")
    assert row.bytes_per_second / row.requests_per_second == pytest.approx(row.chunk_bytes)


@pytest.mark.parametrize("vector", ["ordered", "experts", "plain"])
def test_files_with_an_order_or_experts_are_measured(vector: str) -> None:
    path = VECTORS / f"{vector}.bundle"
    (row,) = rows_of(path, chunk_sizes=[128], threads=[2], backend="buffered")
    check_figures(row)
    assert row.neurons_per_chunk == 2


def test_a_damaged_model_is_measured_only_unchecked() -> None:
    damaged = VECTORS / "bad" / "bundle-damaged.bundle"
    with pytest.raises(FormatError, match="neuron 1"):
        bundlefmt.bench(damaged, chunk_sizes=[1 << 20], backend="buffered")
    rows = rows_of(damaged, chunk_sizes=[1 << 20], backend="buffered", verify=False)
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

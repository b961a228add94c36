"""Over-reading: bundles that a small gap parts are one request, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bundlefmt
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.reader import Reader
from bundlefmt.storage.backends import BACKENDS
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.device import DirectIO
from tests.conftest import REFUSED, VECTORS, backends, flipped, prefixes, slices

NEURONS, STRIDE = 72, 512  # of the small bundle file
ORDERED = VECTORS / "ordered.bundle"  # 6 neurons, stride 64
FILL = 0xA5  # of memory that nothing may write to


@pytest.mark.parametrize(
    ("ids", "gap", "requests"),
    [
        ([5, 7], STRIDE - 1, 2),
        ([5, 7], STRIDE, 1),
        ([5, 8], STRIDE, 2),
        ([8, 5, 5], 2 * STRIDE, 1),
        ([5, 7, 8, 20, 22], STRIDE, 2),
        ([71, 0], 70 * STRIDE - 1, 2),
        ([71, 0], 70 * STRIDE, 1),
        (list(range(0, NEURONS, 2)), STRIDE, 1),
        ([3], 1 << 40, 1),
        ([], STRIDE, 0),
    ],
)
@backends
def test_bundles_that_a_small_gap_parts_are_read_with_one_request(
    small_bundle: Path, backend: str, ids: list[int], gap: int, requests: int
) -> None:
    with bundlefmt.open(small_bundle) as file, file.reader(backend, gap=gap) as reader:
        assert reader.gap == gap
        pending = reader.submit(1, ids)
        rows = pending.result().raw
        assert [row.tobytes() for row in rows] == slices(small_bundle, 1, ids)
        assert reader.stats.requests == len(pending.latencies) == requests
        assert reader.stats.bundles == len(set(ids))


def test_bytes_between_two_bundles_are_counted_as_read_but_not_as_asked_for(
    small_bundle: Path,
) -> None:
    with bundlefmt.open(small_bundle) as file, file.reader("buffered", gap=9 * STRIDE) as reader:
        reader.read(0, [20, 22, 25])  # none before the first, none behind the last
        assert reader.stats.bytes_read == 6 * STRIDE
        assert reader.stats.bytes_asked == 3 * 384
        assert reader.stats.bundles == 3


@backends
def test_what_lies_in_a_gap_goes_nowhere_near_the_callers_memory(
    small_bundle: Path, backend: str
) -> None:
    ids, rows = [3, 5, 6, 9, 70], [9, 10, 2, 0, 7]
    out = aligned_empty(12 * STRIDE).reshape(12, STRIDE)
    out[:] = FILL
    with bundlefmt.open(small_bundle) as file, file.reader(backend, gap=2 * STRIDE) as reader:
        reader.read(0, ids, out=out, rows=np.array(rows))
        assert reader.stats.requests == 2
    assert [out[row].tobytes() for row in rows] == slices(small_bundle, 0, ids)
    assert (np.delete(out, rows, axis=0) == FILL).all()


@backends
def test_gaps_are_those_of_the_file_not_of_the_ids(backend: str) -> None:
    with bundlefmt.open(ORDERED) as file, file.reader(backend, gap=64) as reader:
        order = file.order(file.groups[0])
        assert order is not None
        ids = order[[4, 2, 0]].tolist()
        assert sorted(ids) != ids != sorted(ids)[::-1]
        assert [row.tobytes() for row in reader.read(0, ids).raw] == slices(ORDERED, 0, ids)
        assert reader.stats.requests == 1


@backends
def test_damage_in_a_gap_does_not_fail_the_batch(
    small_bundle: Path, tmp_path: Path, backend: str
) -> None:
    with bundlefmt.open(small_bundle) as file:
        at = file.groups[0].bundles.offset + 17 * STRIDE + 9
    damaged = flipped(small_bundle, tmp_path / "damaged.bundle", at)
    with bundlefmt.open(damaged) as file, file.reader(backend, gap=STRIDE) as reader:
        rows = reader.read(0, [16, 18]).raw
        assert [row.tobytes() for row in rows] == slices(small_bundle, 0, [16, 18])
        assert reader.stats.requests == 1
        with pytest.raises(FormatError, match="neuron 17"):
            reader.read(0, [15, 17])
        with pytest.raises(FormatError, match="neuron 17"):
            reader.read(0, [16, 17, 19])


# Limits of a request.


@backends
def test_a_long_run_with_gaps_is_split_where_none_is_over_read(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("bundlefmt.reader.MAX_REQUEST", 3 * STRIDE + 100)
    ids = [10, 12, 14, 16, 17, 18]  # 10 . 12 | . 14 . | 16 17 18
    with bundlefmt.open(small_bundle) as file, file.reader(backend, gap=STRIDE) as reader:
        rows = reader.read(0, ids).raw
        assert [row.tobytes() for row in rows] == slices(small_bundle, 0, ids)
        assert reader.stats.requests == 3
        if backend == "buffered":
            assert reader.stats.bytes_read == 7 * STRIDE


@backends
def test_rows_and_gaps_together_are_never_more_than_one_scatter_read_takes(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("bundlefmt.reader.MAX_VIEWS", 5)
    ids = np.random.default_rng(5).permutation(np.arange(0, 1024, 2)).tolist()
    with bundlefmt.open(demo_bundle) as file, file.reader(backend, gap=1 << 20) as reader:
        rows = reader.read(0, ids).raw
        assert [row.tobytes() for row in rows] == slices(demo_bundle, 0, ids)
        assert reader.stats.requests == 205


@pytest.mark.skipif("direct" in REFUSED, reason=REFUSED.get("direct", ""))
@pytest.mark.parametrize("path", [ORDERED, VECTORS / "plain.bundle"], ids=lambda path: path.stem)
def test_a_device_with_large_blocks_skips_gaps_in_small_bundles(
    monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.setattr(
        "bundlefmt.storage.backends.pread.probe_direct",
        lambda path: DirectIO(4096, 4096, "statx"),
    )
    with bundlefmt.open(path) as file, file.reader("direct", gap=64) as reader:
        for ids in ([0, 2], [3, 1], [0, 1, 3]):
            rows = reader.read(0, ids).raw
            assert [row.tobytes() for row in rows] == slices(path, 0, ids)


# Beside everything else.


@pytest.fixture(scope="module")
def readers(small_bundle: Path) -> Iterator[dict[tuple[str, str, int], Reader]]:
    """Readers of two files by (file, backend, gap in bundles), open for the whole module."""
    paths = {"small": small_bundle, "ordered": ORDERED}
    files = {target: bundlefmt.open(path) for target, path in paths.items()}
    opened = {
        (target, name, gap): file.reader(
            name, threads=2, queue_depth=2, gap=gap * file.groups[0].stride + gap % 2
        )
        for target, file in files.items()
        for name in BACKENDS
        if name not in REFUSED
        for gap in (1, 2, 100)
    }
    yield opened
    for reader in opened.values():
        reader.close()
    for file in files.values():
        file.close()


@settings(max_examples=200, deadline=None)
@given(data=st.data(), gap=st.sampled_from([1, 2, 100]))
def test_any_batch_over_any_gap_equals_slices_of_the_file(
    readers: dict[tuple[str, str, int], Reader], small_bundle: Path, data: st.DataObject, gap: int
) -> None:
    path, neurons = data.draw(st.sampled_from([(small_bundle, NEURONS), (ORDERED, 6)]))
    backend = data.draw(st.sampled_from(sorted({name for _, name, _ in readers})))
    reader = readers["small" if path == small_bundle else "ordered", backend, gap]
    batches = [
        data.draw(st.lists(st.integers(0, neurons - 1), max_size=40)) for _ in range(2)
    ]  # in flight together
    before = reader.stats.requests
    pending = [reader.submit(0, ids) for ids in batches]
    for ids, batch in zip(batches, pending, strict=True):
        assert [row.tobytes() for row in batch.result().raw] == slices(path, 0, ids)
    with bundlefmt.open(path) as file:
        order = file.order(file.groups[0])
    where = list(range(neurons)) if order is None else order.tolist()
    wanted = [sorted({where.index(neuron) for neuron in ids}) for ids in batches]
    runs = sum(
        k == 0 or slots[k] - slots[k - 1] - 1 > gap for slots in wanted for k in range(len(slots))
    )
    assert reader.stats.requests - before == runs


@backends
@pytest.mark.parametrize("width", [0, 1, 512, 700, 1024])
def test_a_known_prefix_gives_the_same_bundles_over_gaps(
    wide_bundle: Path, backend: str, width: int
) -> None:
    ids = [900, 3, 4, 6, 6, 77, 1023, 1021, 0, 3]
    with bundlefmt.open(wide_bundle) as file, file.reader(backend, gap=2048) as reader:
        rows = reader.read(0, ids, known=prefixes(wide_bundle, width)).raw
        assert [row.tobytes() for row in rows] == slices(wide_bundle, 0, ids)
        assert reader.stats.requests == 4


def test_a_model_over_gaps_makes_the_same_tokens_with_fewer_requests(demo_bundle: Path) -> None:
    made, requests = [], []
    for gap in (0, 4096):
        with bundlefmt.load_model(demo_bundle, mode="exact", gap=gap) as model:
            before = model.reader.stats.requests
            made.append(model.generate([5, 6, 7], 8))
            requests.append(model.reader.stats.requests - before)
    assert made[0] == made[1]
    assert requests[1] < requests[0] / 2


def test_a_gap_below_zero_is_refused(small_bundle: Path) -> None:
    with bundlefmt.open(small_bundle) as file, pytest.raises(UsageError, match="out of range"):
        file.reader(gap=-1)

"""The batch reader: neuron ids in, bundles out, whatever the backend, the memory and the file."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

import bundlefmt
from bundlefmt.errors import BundleError, FormatError, ReadError, UsageError
from bundlefmt.layout.constants import PARTS
from bundlefmt.reader import Reader, ReadStats
from bundlefmt.storage.backends import BACKENDS, Backend, Batch
from bundlefmt.storage.buffers import aligned_empty
from bundlefmt.storage.device import DirectIO, probe_direct
from tests.conftest import FIXTURES, REFUSED, VECTORS, backends, flipped, prefixes, slices

NEURONS = 72  # of a layer of the fixtures
FILL = 0xA5  # of memory that nothing may write to

Matrices = dict[str, NDArray[Any]]


needs_direct = pytest.mark.skipif("direct" in REFUSED, reason=REFUSED.get("direct", ""))


def _llama(tensors: Matrices, layer: int) -> Matrices:
    stem = f"model.layers.{layer}.mlp"
    return {
        "gate": tensors[f"{stem}.gate_proj.weight"],
        "up": tensors[f"{stem}.up_proj.weight"],
        "down": tensors[f"{stem}.down_proj.weight"].T,
    }


def _gpt2(tensors: Matrices, layer: int) -> Matrices:  # Conv1D: [in, out]
    stem = f"transformer.h.{layer}.mlp"
    return {
        "up": tensors[f"{stem}.c_fc.weight"].T,
        "down": tensors[f"{stem}.c_proj.weight"],
    }


def _phi3(tensors: Matrices, layer: int) -> Matrices:  # gate and up in one matrix
    stem = f"model.layers.{layer}.mlp"
    fused = tensors[f"{stem}.gate_up_proj.weight"]
    return {
        "gate": fused[:NEURONS],
        "up": fused[NEURONS:],
        "down": tensors[f"{stem}.down_proj.weight"].T,
    }


CHECKPOINTS: dict[str, Callable[[Matrices, int], Matrices]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "phi3": _phi3,
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundle files of the checkpoints, by name. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("packed")
    paths = {name: folder / f"{name}.bundle" for name in CHECKPOINTS}
    for name, path in paths.items():
        bundlefmt.pack(FIXTURES / name, path)
    return paths


@pytest.fixture
def reader(small_bundle: Path) -> Iterator[Reader]:
    """A reader of the small bundle file, through the page cache."""
    with bundlefmt.open(small_bundle) as file, file.reader("buffered") as reader:
        yield reader


# What comes back.


@backends
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_neurons_come_back_as_the_checkpoint_has_them(
    packed: dict[str, Path], checkpoint: str, backend: str, verify: bool
) -> None:
    tensors = load_file(FIXTURES / checkpoint / "model.safetensors")
    ids = np.random.default_rng(3).integers(0, NEURONS, 200).tolist()
    assert len(set(ids)) < len(ids)
    with (
        bundlefmt.open(packed[checkpoint]) as file,
        file.reader(backend, verify=verify) as reader,
    ):
        assert (reader.backend, reader.verify, reader.fallback) == (backend, verify, None)
        for layer in (1, 0):
            expected = CHECKPOINTS[checkpoint](tensors, layer)
            batch = reader.read(layer, ids)
            assert batch.neurons.tolist() == ids
            for name, matrix in expected.items():
                assert batch.part(name).dtype == matrix.dtype
                assert np.array_equal(batch.part(name), matrix[ids])
            assert np.array_equal(batch.up, expected["up"][ids])
            assert np.array_equal(batch.down, expected["down"][ids])
            if "gate" in expected:
                assert np.array_equal(batch.gate, expected["gate"][ids])


@pytest.mark.parametrize("given", [range(9, 0, -2), (9, 7, 5, 3, 1), np.arange(9, 0, -2)])
@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64])
def test_ids_may_be_any_sequence_of_integers(small_bundle: Path, given: Any, kind: type) -> None:
    with bundlefmt.open(small_bundle) as file, file.reader("buffered") as reader:
        for ids in (given, np.array(given, dtype=kind)):
            rows = reader.read(0, ids).raw
            assert [row.tobytes() for row in rows] == slices(small_bundle, 0, [9, 7, 5, 3, 1])


@backends
@pytest.mark.parametrize("vector", ["plain", "gated-f16", "q8-0", "q4-0"])
def test_an_empty_batch_has_parts_of_no_rows(backend: str, vector: str) -> None:
    with (
        bundlefmt.open(VECTORS / f"{vector}.bundle") as file,
        file.reader(backend) as reader,
    ):
        batch = reader.read(0, [])
        assert reader.stats.requests == reader.stats.bytes_read == 0
        assert batch.raw.shape == (0, file.groups[0].stride)
        for part in file.groups[0].bundled:
            assert batch.part(part.name).shape == (0, file.groups[0].d_model)


@backends
@pytest.mark.parametrize("vector", sorted(path.stem for path in VECTORS.glob("*.bundle")))
def test_every_vector_decodes_to_what_its_json_says(backend: str, vector: str) -> None:
    expected = json.loads((VECTORS / f"{vector}.json").read_text())["groups"]
    with (
        bundlefmt.open(VECTORS / f"{vector}.bundle") as file,
        file.reader(backend) as reader,
    ):
        for group, wanted in zip(file.groups, expected, strict=True):
            assert (group.layer, group.expert) == (wanted["layer"], wanted["expert"])
            ids = list(range(group.neurons))[::-1] * 2
            batch = reader.read(group.layer, ids, expert=group.expert)
            for part in group.bundled:
                numbers = np.array(wanted["parts"][part.name])[ids]
                assert np.array_equal(batch.part(part.name).astype(np.float64), numbers)


@backends
def test_an_ordered_file_gives_neurons_by_id(backend: str) -> None:
    path = VECTORS / "ordered.bundle"
    with bundlefmt.open(path) as file, file.reader(backend) as reader:
        order = file.order(file.groups[0])
        assert order is not None and order.tolist() != sorted(order.tolist())
        for ids in ([0], [5, 0, 5], [3, 1, 4, 1, 5]):
            rows = reader.read(0, ids).raw
            assert [row.tobytes() for row in rows] == slices(path, 0, ids)
        before = reader.stats.requests
        reader.read(0, order[1:4])  # neighbours in the file, not by id
        assert reader.stats.requests == before + 1


def test_a_part_that_the_bundles_do_not_hold_is_refused_naming_those_they_do() -> None:
    with (
        bundlefmt.open(VECTORS / "resident-gate.bundle") as file,
        file.reader("buffered") as reader,
    ):
        batch = reader.read(0, [1])
        for ask in (lambda: batch.gate, lambda: batch.part("bias")):
            with pytest.raises(UsageError, match="up, down"):
                ask()


@st.composite
def _batches(draw: st.DrawFn) -> tuple[str, str, list[int]]:
    target, neurons = draw(st.sampled_from([("small", NEURONS), ("ordered", 6)]))
    ids = draw(st.lists(st.integers(0, neurons - 1), max_size=80))
    return target, draw(st.sampled_from(sorted(BACKENDS))), ids


@pytest.fixture(scope="module")
def readers(small_bundle: Path) -> Iterator[dict[tuple[str, str], Reader]]:
    """Readers of two files by (file, backend), open for the whole module."""
    paths = {"small": small_bundle, "ordered": VECTORS / "ordered.bundle"}
    files = {target: bundlefmt.open(path) for target, path in paths.items()}
    names = [name for name in BACKENDS if name not in REFUSED]
    opened = {(t, n): file.reader(n, threads=2) for t, file in files.items() for n in names}
    yield opened
    for reader in opened.values():
        reader.close()
    for file in files.values():
        file.close()


@settings(max_examples=200, deadline=None)
@given(batch=_batches(), extra=st.integers(0, 130), skew=st.integers(0, 70))
def test_any_batch_through_any_backend_equals_slices_of_the_file(
    readers: dict[tuple[str, str], Reader],
    small_bundle: Path,
    batch: tuple[str, str, list[int]],
    extra: int,
    skew: int,
) -> None:
    target, backend, ids = batch
    path = small_bundle if target == "small" else VECTORS / "ordered.bundle"
    reader = readers.get((target, backend)) or readers[target, "buffered"]
    expected = slices(path, 0, ids)
    assert [row.tobytes() for row in reader.read(0, ids).raw] == expected
    width = (512 if target == "small" else 64) + extra
    out = np.full(skew + len(ids) * width, FILL, dtype=np.uint8)[skew:].reshape(len(ids), width)
    assert [row.tobytes() for row in reader.read(0, ids, out=out).raw] == expected
    assert [row.tobytes() for row in out] == [row + bytes([FILL]) * extra for row in expected]


# Into the caller's memory.

OUTS: dict[str, Callable[[int, int], NDArray[np.uint8]]] = {
    "aligned": lambda n, stride: aligned_empty(n * stride).reshape(n, stride),
    "not aligned": lambda n, stride: aligned_empty(n * stride + 1)[1:].reshape(n, stride),
    "wider rows": lambda n, stride: aligned_empty(n * 4096).reshape(n, 4096),
    "rows apart": lambda n, stride: aligned_empty(2 * n * stride).reshape(2 * n, stride)[::2],
    "backwards": lambda n, stride: aligned_empty(n * stride).reshape(n, stride)[::-1],
    "columns of more": lambda n, stride: aligned_empty(n * 4096).reshape(n, 4096)[:, 17:],
}


@backends
@pytest.mark.parametrize("kind", OUTS)
def test_bundles_come_into_the_callers_memory(small_bundle: Path, backend: str, kind: str) -> None:
    ids = [3, 4, 5, 5, 70, 1, 0, 71, 4]
    with bundlefmt.open(small_bundle) as file, file.reader(backend) as reader:
        stride = file.groups[0].stride
        out = OUTS[kind](len(ids), stride)
        out[:] = FILL
        batch = reader.read(0, ids, out=out)
        assert np.shares_memory(batch.raw, out)
        assert [row.tobytes() for row in out[:, :stride]] == slices(small_bundle, 0, ids)
        assert (out[:, stride:] == FILL).all()
        up = load_file(FIXTURES / "llama" / "model.safetensors")[
            "model.layers.0.mlp.up_proj.weight"
        ]
        assert np.array_equal(batch.up, up[ids])


@backends
@pytest.mark.parametrize("kind", OUTS)
def test_bundles_come_into_the_rows_that_the_caller_chose(
    small_bundle: Path, backend: str, kind: str
) -> None:
    ids, rows = [3, 4, 5, 5, 70, 1, 0, 71], [9, 10, 2, 0, 7, 6, 5, 11]
    with bundlefmt.open(small_bundle) as file, file.reader(backend) as reader:
        stride = file.groups[0].stride
        out = OUTS[kind](12, stride)
        out[:] = FILL
        batch = reader.read(0, ids, out=out, rows=np.array(rows))
        assert [out[row, :stride].tobytes() for row in rows] == slices(small_bundle, 0, ids)
        assert (out[[1, 3, 4, 8]] == FILL).all()
        up = load_file(FIXTURES / "llama" / "model.safetensors")[
            "model.layers.0.mlp.up_proj.weight"
        ]
        assert np.array_equal(batch.up[batch.rows], up[ids])


@pytest.mark.parametrize(
    "rows", [[0, 1], [0, 1, 2, 3], [0, 1, 5], [-1, 0, 1], [0.0, 1.0, 2.0], [[0, 1, 2]]]
)
def test_rows_that_do_not_fit_are_refused(reader: Reader, rows: list[Any]) -> None:
    out = aligned_empty(5 * 512).reshape(5, 512)
    with pytest.raises(UsageError, match=r"int64 \[3\] of 0\.\.4"):
        reader.read(0, [1, 2, 3], out=out, rows=np.array(rows))
    assert reader.stats.requests == 0


def _read_only(n: int, stride: int) -> NDArray[np.uint8]:
    out = np.empty((n, stride), dtype=np.uint8)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda n, s: np.empty((n, s), dtype=np.int8), id="dtype"),
        pytest.param(lambda n, s: np.empty((n, s // 4), dtype=np.float32), id="floats"),
        pytest.param(lambda n, s: np.empty((n + 1, s), dtype=np.uint8), id="too many rows"),
        pytest.param(lambda n, s: np.empty((n - 1, s), dtype=np.uint8), id="too few rows"),
        pytest.param(lambda n, s: np.empty((n, s - 1), dtype=np.uint8), id="too narrow"),
        pytest.param(lambda n, s: np.empty(n * s, dtype=np.uint8), id="flat"),
        pytest.param(lambda n, s: np.empty((n, 1, s), dtype=np.uint8), id="too deep"),
        pytest.param(lambda n, s: np.empty((n, 2 * s), dtype=np.uint8)[:, ::2], id="every second"),
        pytest.param(lambda n, s: np.empty((s, n), dtype=np.uint8).T, id="transposed"),
        pytest.param(_read_only, id="read-only"),
        pytest.param(lambda n, s: [[0] * s] * n, id="lists"),
        pytest.param(lambda n, s: bytearray(n * s), id="bytes"),
    ],
)
def test_memory_that_cannot_take_the_bundles_is_refused(
    reader: Reader, make: Callable[[int, int], NDArray[Any]]
) -> None:
    with pytest.raises(UsageError, match=r"uint8 \[3, 512\]") as caught:
        reader.read(0, [1, 2, 3], out=make(3, 512))
    assert caught.value.field == "out"
    assert reader.stats.requests == 0


# What is refused.


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([NEURONS], "0..71, found 72"),
        ([0, -1, 3], "0..71, found -1"),
        ([0, 10**15], f"0..71, found {10**15}"),
        (np.array([2**64 - 1], dtype=np.uint64), "0..71, found 18446744073709551615"),
        ([10**30], "integers"),
        ([0.0], "float64"),
        (np.array([], dtype=np.float32).reshape(0, 1), "shape"),
        (["3"], "integers"),
        ([True], "bool"),
        ([[1, 2]], "shape"),
        (3, "shape"),
        (None, "shape"),
        ([[1], [2, 3]], "integers"),
    ],
)
def test_ids_that_are_no_neurons_are_refused(reader: Reader, ids: Any, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        reader.read(0, ids)
    assert named in str(caught.value)
    assert reader.read(0, [0]).raw.shape == (1, 512)


@pytest.mark.parametrize(
    ("layer", "expert", "named"),
    [(2, None, "0..1, found 2"), (-1, None, "0..1, found -1"), (0, 0, "found (0, 0)")],
)
def test_a_group_that_is_not_there_is_refused_naming_those_that_are(
    reader: Reader, layer: int, expert: int | None, named: str
) -> None:
    with pytest.raises(UsageError) as caught:
        reader.read(layer, [0], expert=expert)
    assert named in str(caught.value)
    assert caught.value.file == os.fspath(reader._file.path)


@pytest.mark.parametrize("expert", [None, 3])
def test_a_wrong_expert_is_refused_naming_the_layers_experts(expert: int | None) -> None:
    with (
        bundlefmt.open(VECTORS / "experts.bundle") as file,
        file.reader("buffered") as reader,
        pytest.raises(UsageError, match=r"expert in 0\.\.2|experts 0\.\.2"),
    ):
        reader.read(1, [0], expert=expert)


def test_a_file_that_two_threads_close_is_closed_once(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, close, closed = bundlefmt.open(small_bundle), os.close, list[int]()

    def closing(fd: int) -> None:
        closed.append(fd)
        if len(closed) == 1:
            file.close()  # as another thread may meanwhile
            close(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", closing)
        file.close()
    assert len(closed) == 1


def test_a_closed_file_opens_no_reader(small_bundle: Path) -> None:
    file = bundlefmt.open(small_bundle)
    file.close()
    with pytest.raises(UsageError, match="the file is closed"):
        file.reader()


def test_threads_that_first_read_at_once_leave_no_backend_open(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bundlefmt.open(small_bundle) as file:
        config, make, made = file.blob("config.json"), file.backend, list[Backend]()

        def backend() -> tuple[Backend, str | None]:
            mine, fallback = make()
            made.append(mine)
            if len(made) == 1:
                assert file.blob("config.json") == config  # as another thread may meanwhile
            return mine, fallback

        monkeypatch.setattr("bundlefmt.file._LONG", 1)
        monkeypatch.setattr(file, "backend", backend)
        assert file.blob("config.json") == config
    assert len(made) == 2
    assert [backend._engine for backend in made] == [None, None]


def test_a_closed_reader_refuses_and_may_be_closed_again(small_bundle: Path) -> None:
    with bundlefmt.open(small_bundle) as file:
        reader = file.reader()
        reader.close()
        reader.close()
        for ids in ([1], []):
            with pytest.raises(UsageError, match="closed"):
                reader.read(0, ids)


@backends
@pytest.mark.parametrize("state", ["gone", "emptied"])
def test_a_file_that_goes_away_before_the_reader_opens_raises_only_our_errors(
    small_bundle: Path, tmp_path: Path, backend: str, state: str
) -> None:
    path = Path(shutil.copy(small_bundle, tmp_path))
    with bundlefmt.open(path) as file:
        if state == "gone":
            path.unlink()
        else:
            os.truncate(path, 0)
        try:
            with file.reader(backend) as reader:
                batch = reader.read(0, [1])
        except BundleError as error:
            assert str(path) in str(error)
        else:  # whoever reads through the descriptor that is open may well succeed
            assert state == "gone"
            assert [batch.raw[0].tobytes()] == slices(small_bundle, 0, [1])


# Requests.


@pytest.mark.parametrize(
    ("ids", "requests"),
    [
        ([5], 1),
        ([5, 6, 7], 1),
        ([7, 5, 6], 1),
        ([6, 6, 5, 5], 1),
        ([5, 7], 2),
        ([5, 6, 7, 20], 2),
        ([71, 0], 2),
        (list(range(NEURONS)), 1),
        (list(range(0, NEURONS, 2)), 36),
    ],
)
@backends
def test_neighbours_are_read_with_one_request(
    small_bundle: Path, backend: str, ids: list[int], requests: int
) -> None:
    with bundlefmt.open(small_bundle) as file, file.reader(backend) as reader:
        pending = reader.submit(1, ids)
        rows = pending.result().raw
        assert [row.tobytes() for row in rows] == slices(small_bundle, 1, ids)
        assert reader.stats.requests == len(pending.latencies) == requests
        assert reader.stats.bundles == len(set(ids))


@backends
def test_a_long_run_is_split(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("bundlefmt.reader.MAX_REQUEST", 3 * 512 + 100)
    ids = [40, *range(10, 20), *range(60, 63), 62]
    with bundlefmt.open(small_bundle) as file, file.reader(backend) as reader:
        rows = reader.read(0, ids).raw
        assert [row.tobytes() for row in rows] == slices(small_bundle, 0, ids)
        assert reader.stats.requests == 1 + 4 + 1


@backends
def test_a_bundle_longer_than_the_longest_request_is_one_request(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("bundlefmt.reader.MAX_REQUEST", 100)
    with bundlefmt.open(small_bundle) as file, file.reader(backend) as reader:
        rows = reader.read(0, [4, 3]).raw
        assert [row.tobytes() for row in rows] == slices(small_bundle, 0, [4, 3])
        assert reader.stats.requests == 2


@backends
def test_a_run_of_more_rows_than_one_scatter_read_takes_comes_back_whole(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("bundlefmt.reader.MAX_VIEWS", 5)
    ids = np.random.default_rng(5).permutation(1024).tolist()
    with bundlefmt.open(demo_bundle) as file, file.reader(backend) as reader:
        rows = reader.read(0, ids).raw
        assert [row.tobytes() for row in rows] == slices(demo_bundle, 0, ids)
        assert reader.stats.requests == 205


@backends
def test_batches_in_flight_together_may_be_collected_in_any_order(
    small_bundle: Path, backend: str
) -> None:
    random = np.random.default_rng(11)
    batches = [(i % 2, random.integers(0, NEURONS, 30).tolist()) for i in range(12)]
    with bundlefmt.open(small_bundle) as file, file.reader(backend, threads=3) as reader:
        pending = [reader.submit(layer, ids) for layer, ids in batches]
        for i in random.permutation(12):
            rows = pending[i].result().raw
            assert [row.tobytes() for row in rows] == slices(small_bundle, *batches[i])
        read = reader.stats.bytes_read
        assert pending[0].result() is pending[0].result()
        assert reader.stats.bytes_read == read  # asked again, it is not counted again


def test_closing_waits_for_what_is_in_flight(small_bundle: Path) -> None:
    with bundlefmt.open(small_bundle) as file:
        with file.reader("buffered", threads=1) as reader:
            pending = [reader.submit(0, range(0, NEURONS, 2)) for _ in range(4)]
        for batch in pending:
            rows = batch.result().raw
            assert [row.tobytes() for row in rows] == slices(
                small_bundle, 0, list(range(0, NEURONS, 2))
            )


# Counting.


def test_read_amplification_is_bytes_read_over_bytes_asked(reader: Reader) -> None:
    assert reader.stats.read_amplification == 0.0
    reader.read(0, [8, 3, 3, 3])
    assert reader.stats.bytes_asked == 2 * 384  # gate, up and down, each bundle once
    assert reader.stats.bytes_read == 2 * 512
    assert reader.stats.read_amplification == 512 / 384
    assert reader.stats.seconds > 0


def test_bundles_without_padding_are_not_amplified(demo_bundle: Path) -> None:
    with bundlefmt.open(demo_bundle) as file, file.reader("buffered") as reader:
        reader.read(2, range(100))
        assert reader.stats.read_amplification == 1.0


# A device with blocks of 4096 bytes: every stride of 64 crosses its alignment.


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bundlefmt.storage.backends.pread.probe_direct",
        lambda path: DirectIO(4096, 4096, "statx"),
    )


@needs_direct
@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("vector", ["plain", "ordered", "gated-f16", "gated-bf16", "q4-0"])
def test_a_device_with_large_blocks_gives_small_bundles_right(vector: str) -> None:
    path = VECTORS / f"{vector}.bundle"
    with bundlefmt.open(path) as file, file.reader("direct") as reader:
        neurons = file.groups[0].neurons
        for ids in ([neurons - 1], [0, neurons - 1], list(range(neurons))[::-1], [1, 1]):
            rows = reader.read(0, ids).raw
            assert [row.tobytes() for row in rows] == slices(path, 0, ids)


@needs_direct
@pytest.mark.usefixtures("large_blocks")
def test_a_device_with_large_blocks_amplifies_small_reads(small_bundle: Path) -> None:
    with bundlefmt.open(small_bundle) as file, file.reader("direct") as reader:
        reader.read(0, [20])
        assert reader.stats.bytes_read == 4096
        reader.read(0, range(NEURONS))
        assert reader.stats.bytes_read == 4096 + NEURONS * 512


# The first bytes of every bundle known already.

KNOWN = 512  # bytes of `up` in the wide bundle file, whose stride is 1024


@backends
@pytest.mark.parametrize("width", [0, 1, 500, 512, 700, 1024])
def test_a_known_prefix_gives_the_same_bundles(wide_bundle: Path, backend: str, width: int) -> None:
    ids = [900, 3, 4, 5, 5, 77, 1023, 0, 3]
    with bundlefmt.open(wide_bundle) as file, file.reader(backend) as reader:
        rows = reader.read(0, ids, known=prefixes(wide_bundle, width)).raw
        assert [row.tobytes() for row in rows] == slices(wide_bundle, 0, ids)


@backends
def test_a_known_prefix_is_not_read_again(wide_bundle: Path, backend: str) -> None:
    ids = list(range(0, 1000, 10))
    with bundlefmt.open(wide_bundle) as file, file.reader(backend) as reader:
        reader.read(0, ids, known=prefixes(wide_bundle, KNOWN))
        if backend == "direct" and KNOWN % probe_direct(wide_bundle).offset_alignment:
            assert reader.stats.bytes_read <= 100 * 4096
        else:
            assert reader.stats.bytes_read == 100 * (1024 - KNOWN)
        assert reader.stats.bytes_asked == 100 * (1024 - KNOWN)


@backends
def test_damage_behind_and_in_a_known_prefix_is_detected(
    wide_bundle: Path, tmp_path: Path, backend: str
) -> None:
    known = prefixes(wide_bundle, KNOWN)
    with bundlefmt.open(wide_bundle) as file:
        at = file.groups[0].bundles.offset + 33 * 1024 + KNOWN + 9
    damaged = flipped(wide_bundle, tmp_path / "damaged.bundle", at)
    with bundlefmt.open(damaged) as file, file.reader(backend) as reader:
        with pytest.raises(FormatError, match="neuron 33"):
            reader.read(0, [33], known=known)
        known[34, 100] ^= 1
        with pytest.raises(FormatError, match="neuron 34"):
            reader.read(0, [34], known=known)


@pytest.mark.parametrize(
    "known",
    [
        pytest.param(np.zeros((3, 128), dtype=np.uint8), id="too few neurons"),
        pytest.param(np.zeros((73, 128), dtype=np.uint8), id="too many neurons"),
        pytest.param(np.zeros((NEURONS, 513), dtype=np.uint8), id="wider than a bundle"),
        pytest.param(np.zeros((NEURONS, 32), dtype=np.float32), id="floats"),
        pytest.param(np.zeros(NEURONS, dtype=np.uint8), id="flat"),
    ],
)
def test_a_known_prefix_that_does_not_fit_is_refused(reader: Reader, known: NDArray[Any]) -> None:
    with pytest.raises(UsageError) as caught:
        reader.read(0, [71], known=known)
    assert caught.value.field == "known"


# Damage.


@backends
@pytest.mark.parametrize("at", [0, 200, 383, 384, 511], ids=lambda at: f"byte {at} of 512")
def test_a_flipped_byte_names_file_layer_neuron_and_offset(
    small_bundle: Path, tmp_path: Path, backend: str, at: int
) -> None:
    with bundlefmt.open(small_bundle) as file:
        start = file.groups[1].bundles.offset + 17 * 512
    damaged = flipped(small_bundle, tmp_path / "damaged.bundle", start + at)
    with bundlefmt.open(damaged) as file, file.reader(backend) as reader:
        for ids in ([17], [18, 17, 16], list(range(NEURONS)), [17, 17]):
            with pytest.raises(FormatError, match="damaged") as caught:
                reader.read(1, ids)
            assert caught.value.file == str(damaged)
            assert caught.value.field == "layer 1, neuron 17"
            assert caught.value.offset == start
        for layer, good in ((1, [16, 18]), (0, [17])):  # the reader stays usable
            rows = reader.read(layer, good).raw
            assert [row.tobytes() for row in rows] == slices(small_bundle, layer, good)
    with bundlefmt.open(damaged) as file, file.reader(backend, verify=False) as reader:
        found = reader.read(1, [17]).raw[0].tobytes()
        assert [found] == slices(damaged, 1, [17]) != slices(small_bundle, 1, [17])


@backends
def test_damage_in_an_ordered_file_names_the_neuron_not_its_slot(
    tmp_path: Path, backend: str
) -> None:
    path = VECTORS / "ordered.bundle"
    with bundlefmt.open(path) as file:
        order = file.order(file.groups[0])
        start = file.groups[0].bundles.offset
    assert order is not None
    slot = next(j for j, neuron in enumerate(order) if neuron != j)
    damaged = flipped(path, tmp_path / "damaged.bundle", start + slot * 64)
    with bundlefmt.open(damaged) as file, file.reader(backend) as reader:
        with pytest.raises(FormatError) as caught:
            reader.read(0, range(6))
        assert caught.value.field == f"layer 0, neuron {order[slot]}"
        assert caught.value.offset == start + slot * 64


def test_a_damaged_checksum_table_is_refused_before_a_bundle_is_read(
    small_bundle: Path, tmp_path: Path
) -> None:
    with bundlefmt.open(small_bundle) as file:
        table = file.groups[0].checksums.offset
    damaged = flipped(small_bundle, tmp_path / "damaged.bundle", table + 3)
    with bundlefmt.open(damaged) as file, file.reader("buffered") as reader:
        with pytest.raises(FormatError, match="layer 0, checksums"):
            reader.read(0, [1])
        assert reader.stats.requests == 0
        assert [reader.read(1, [1]).raw[0].tobytes()] == slices(small_bundle, 1, [1])


@backends
def test_a_file_cut_while_it_is_read_is_a_read_error(
    small_bundle: Path, tmp_path: Path, backend: str
) -> None:
    path = Path(shutil.copy(small_bundle, tmp_path))
    with bundlefmt.open(path) as file, file.reader(backend) as reader:
        first, last = sorted(file.groups, key=lambda group: group.bundles.offset)
        for group in (first, last):
            reader.read(group.layer, [0])
        os.truncate(path, last.bundles.offset)
        with pytest.raises(ReadError, match=r"llama\.bundle"):
            reader.read(last.layer, [NEURONS - 1])
        rows = reader.read(first.layer, [0]).raw
        assert [row.tobytes() for row in rows] == slices(small_bundle, first.layer, [0])


def test_the_parts_of_a_batch_are_those_of_its_group(reader: Reader) -> None:
    batch = reader.read(0, [1])
    assert [part.name for part in batch.group.bundled] == list(PARTS)
    assert batch.gate.base is not None  # a view of `raw`, not a copy
    assert np.shares_memory(batch.gate, batch.raw)


# Memory that the reader recycles, and readers that threads share


def test_memory_is_used_again_once_no_view_of_a_batch_is_left(reader: Reader) -> None:
    batch = reader.read(0, range(NEURONS))
    address, expected = batch.raw.ctypes.data, batch.up[10:20].copy()
    views = [batch.up[10:20], memoryview(batch.up[10:20])]
    del batch
    while views:
        for _ in range(8):
            assert reader.read(1, range(NEURONS)).raw.ctypes.data != address
        assert all(np.array_equal(view, expected) for view in views)
        views.pop(0)
    assert address in [reader.read(1, range(NEURONS)).raw.ctypes.data for _ in range(8)]


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Python gives way to another thread whenever it may."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@backends
@pytest.mark.usefixtures("busy_switching")
def test_threads_may_share_a_reader(wide_bundle: Path, backend: str) -> None:
    rounds = 30
    with bundlefmt.open(wide_bundle) as file, file.reader(backend) as reader:
        groups = len(file.groups)
        rows = [reader.read(layer, range(200)).raw.copy() for layer in range(groups)]
        before = replace(reader.stats)

        def right(seed: int) -> bool:
            random = np.random.default_rng(seed)
            for _ in range(rounds):
                layer, ids = int(random.integers(groups)), random.permutation(200)[:50]
                if not np.array_equal(reader.read(layer, ids).raw, rows[layer][ids]):
                    return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(right, range(4)))
        found = reader.stats.since(before)
    assert found.bundles == 4 * rounds * 50
    assert found.bytes_asked == 4 * rounds * 50 * rows[0].shape[1]


def test_a_batch_that_two_threads_wait_for_is_counted_once(reader: Reader) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            pending = reader.submit(0, range(NEURONS))
            results = [each.result() for each in [pool.submit(pending.result) for _ in range(8)]]
            assert all(each is results[0] for each in results)
    assert reader.stats.bundles == 20 * NEURONS


# The counters


@given(spans=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 20)), max_size=64))
def test_a_moment_in_which_reads_are_in_flight_is_counted_once(
    spans: list[tuple[int, int]],
) -> None:
    """Whenever they began, ended, and were told of."""
    stats = ReadStats()
    asked = ReadStats(requests=2, bundles=3, bytes_asked=10)
    for began, length in spans:
        batch = SimpleNamespace(bytes_read=12, finished=began + length)
        stats.add(asked, cast(Batch, batch), began, waited=0.5)
    moments = {moment for began, length in spans for moment in range(began, began + length)}
    assert stats.busy_seconds == pytest.approx(len(moments) / 1e9)
    count = len(spans)
    assert (stats.requests, stats.bundles) == (2 * count, 3 * count)
    assert (stats.bytes_asked, stats.bytes_read) == (10 * count, 12 * count)
    assert stats.seconds == 0.5 * count


@pytest.mark.usefixtures("busy_switching")
def test_several_threads_may_count() -> None:
    class Arrived:
        finished = 0

        @property
        def bytes_read(self) -> int:
            return sum(1 for _ in range(1000))

    stats, asked = ReadStats(), ReadStats(requests=2)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(400):
            pool.submit(stats.add, asked, cast(Batch, Arrived()), 0, 0.5)
    assert (stats.requests, stats.bytes_read, stats.seconds) == (800, 400_000, 200.0)

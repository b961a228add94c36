"""Reordered files: the same neurons in other slots, and everything else as it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import bundlefmt
from bundlefmt.convert import writer
from bundlefmt.convert.reorder import rewrite
from bundlefmt.errors import FormatError, UsageError, WriteError
from bundlefmt.flash.traces import Trace, new_trace
from bundlefmt.layout.header import Predictor
from bundlefmt.ordering import GAP
from tests.conftest import DEMO, FIXTURES, VECTORS, flipped

IDS = list(range(5, 25))
NEURONS = 72  # of a layer of the fixtures


@pytest.fixture(scope="module")
def ordered(demo_bundle: Path, demo_traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, reordered. Read it, do not change it."""
    path = tmp_path_factory.mktemp("ordered") / "demo.bundle"
    bundlefmt.reorder(demo_bundle, demo_traces, path)
    return path


@pytest.fixture
def gated(tmp_path: Path) -> Path:
    """A ReLU Llama with biases, its gate resident, all that can be compressed."""
    path = tmp_path / "gated.bundle"
    bundlefmt.pack(FIXTURES / "llama3-rope", path, resident="gate", zstd=True)
    return path


def synthetic_trace(path: Path, folder: Path, active: Mapping[int, NDArray[np.bool_]]) -> Path:
    """A trace of a bundle file with that activity [tokens, neurons], by layer."""
    with bundlefmt.open(path) as file:
        groups = [file.group(layer) for layer in active]
        with new_trace(folder, file.superblock.file_id, groups) as recorded:
            for group in groups:
                firing = active[group.layer].astype(np.float32)
                x = np.zeros((firing.shape[0], group.d_model), dtype=np.float32)
                recorded.record(group, x, firing)
            recorded.finish()
    return folder


def random_activity(tokens: int = 120, neurons: int = NEURONS) -> NDArray[np.bool_]:
    return np.random.default_rng(3).random((tokens, neurons)) < 0.2


# What changes, and what does not


def test_a_reordered_file_verifies_and_unpacks_to_the_original_files(
    ordered: Path, tmp_path: Path
) -> None:
    report = bundlefmt.verify(ordered)
    assert (report.faults, report.notes, report.generation) == ([], [], 1)
    unpacked = bundlefmt.unpack(ordered, tmp_path / "files")
    assert unpacked.identical
    for name in unpacked.files:
        assert (tmp_path / "files" / name).read_bytes() == (DEMO / name).read_bytes()


def test_only_the_order_is_another(demo_bundle: Path, ordered: Path) -> None:
    with (
        bundlefmt.open(demo_bundle) as old,
        bundlefmt.open(ordered) as new,
        old.reader() as old_reader,
        new.reader() as new_reader,
    ):
        assert new.superblock.file_id == old.superblock.file_id  # so that traces still fit
        assert new.tensor_names == old.tensor_names
        assert new.blob_names == old.blob_names
        for name in old.tensor_names:
            assert new.tensor_bytes(name) == old.tensor_bytes(name)
        for name in old.blob_names:
            assert new.blob(name) == old.blob(name)
        for group in old.groups:
            order = new.order(new.group(group.layer))
            assert order is not None
            assert order.tolist() != sorted(order.tolist())
            expected = old_reader.read(group.layer, range(group.neurons)).raw
            found = new_reader.read(group.layer, range(group.neurons)).raw
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_a_reordered_model_makes_the_same_tokens(
    demo_bundle: Path, ordered: Path, mode: str
) -> None:
    with (
        bundlefmt.load_model(demo_bundle, mode=mode) as old,
        bundlefmt.load_model(ordered, mode=mode) as new,
    ):
        np.testing.assert_allclose(new.logits(IDS), old.logits(IDS), rtol=1e-3, atol=1e-3)
        assert new.generate(IDS, 12) == old.generate(IDS, 12)


def test_resident_parts_biases_and_compressed_regions_stay(gated: Path, tmp_path: Path) -> None:
    layers = dict.fromkeys((0, 1), random_activity())
    traces = synthetic_trace(gated, tmp_path / "traces", layers)
    bundlefmt.reorder(gated, traces, tmp_path / "new.bundle")
    assert bundlefmt.verify(tmp_path / "new.bundle").faults == []
    bundlefmt.unpack(tmp_path / "new.bundle", tmp_path / "files")
    for path in (tmp_path / "files").iterdir():
        assert path.read_bytes() == (FIXTURES / "llama3-rope" / path.name).read_bytes()
    with bundlefmt.load_model(gated) as old, bundlefmt.load_model(tmp_path / "new.bundle") as new:
        codecs = [tensor.data.codec for tensor in new.file.header.tensors]
        assert codecs == [tensor.data.codec for tensor in old.file.header.tensors]
        assert "zstd" in codecs
        np.testing.assert_allclose(new.logits(IDS), old.logits(IDS), rtol=1e-3, atol=1e-4)


def test_predictors_stay_and_what_older_generations_left_goes(gated: Path, tmp_path: Path) -> None:
    with bundlefmt.open(gated) as file:
        d_model = file.groups[0].d_model
    a, b = np.ones((3, d_model), np.float16), np.ones((NEURONS, 3), np.float16)
    for _ in range(2):
        bundlefmt.append(gated, tensors={"a": a, "b": b}, predictors=[Predictor(0, "a", "b", 0.25)])
    traces = synthetic_trace(gated, tmp_path / "traces", {0: random_activity()})
    report = bundlefmt.reorder(gated, traces, tmp_path / "new.bundle")
    assert report.file_bytes == (tmp_path / "new.bundle").stat().st_size < gated.stat().st_size
    with bundlefmt.open(tmp_path / "new.bundle") as file:
        assert file.header.predictors == [Predictor(0, "a", "b", 0.25)]
        np.testing.assert_array_equal(file.tensor("b"), b)
        assert file.header.retired == []
    bundlefmt.append(tmp_path / "new.bundle", blobs={"note": b"updates go on"})
    assert bundlefmt.verify(tmp_path / "new.bundle").ok


def test_a_layer_that_was_not_traced_keeps_its_order(gated: Path, tmp_path: Path) -> None:
    traces = synthetic_trace(gated, tmp_path / "traces", {1: random_activity()})
    report = bundlefmt.reorder(gated, traces, tmp_path / "new.bundle")
    assert [row.layer for row in report.layers] == [1]
    with bundlefmt.open(tmp_path / "new.bundle") as file:
        orders = [file.order(group) for group in file.groups]
    assert orders[0] is not None and orders[0].tolist() == list(range(NEURONS))
    assert orders[1] is not None and orders[1].tolist() != list(range(NEURONS))
    assert bundlefmt.verify(tmp_path / "new.bundle").ok


def test_a_file_with_an_order_can_be_reordered(
    ordered: Path, demo_bundle: Path, demo_traces: Path, tmp_path: Path
) -> None:
    first = bundlefmt.reorder(demo_bundle, demo_traces, tmp_path / "first.bundle")
    again = bundlefmt.reorder(ordered, demo_traces, tmp_path / "again.bundle")
    assert again.total.before == again.total.after == first.total.after
    assert (tmp_path / "again.bundle").read_bytes() == ordered.read_bytes()
    path = Path(shutil.copy(VECTORS / "ordered.bundle", tmp_path))
    traces = synthetic_trace(path, tmp_path / "traces", {0: random_activity(neurons=6)})
    bundlefmt.reorder(path, traces, path, force=True)  # onto itself
    assert bundlefmt.verify(path).ok
    with (
        bundlefmt.open(path) as new,
        bundlefmt.open(VECTORS / "ordered.bundle") as old,
        new.reader() as reader,
        old.reader() as old_reader,
    ):
        assert new.order(new.groups[0]).tolist() != old.order(old.groups[0]).tolist()
        found, expected = reader.read(0, range(6)), old_reader.read(0, range(6))
        np.testing.assert_array_equal(found.raw, expected.raw)


# What it reports


def test_clusters_in_a_trace_become_single_requests(gated: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    cluster_of = random.permutation(np.repeat(np.arange(12), 6))
    active = random.integers(0, 12, 400)[:, None] == cluster_of  # one cluster for each token
    traces = synthetic_trace(gated, tmp_path / "traces", {0: active, 1: active})
    report = bundlefmt.reorder(gated, traces, tmp_path / "new.bundle", gap=1 << 20)
    assert report.tokens == 40
    for row in [*report.layers, report.total]:
        layers = 1 if row.layer is not None else 2
        assert row.neurons == layers * NEURONS
        assert row.active == layers * 6
        assert row.before.requests > layers * 5
        assert (row.after.requests, row.after.run_length) == (layers, 6)
        assert row.before_gap.requests == row.after_gap.requests == layers
        assert row.before_gap.unwanted_bytes > row.after_gap.unwanted_bytes == 0


def test_an_order_is_judged_on_tokens_that_it_was_not_made_from(
    gated: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(5)
    seen, held_out = (random.permutation(np.repeat(np.arange(12), 6)) for _ in range(2))
    fired = random.integers(0, 12, 400)[:, None]
    active = np.vstack([fired[:360] == seen, fired[360:] == held_out])
    traces = synthetic_trace(gated, tmp_path / "traces", {0: active})
    report = bundlefmt.reorder(gated, traces, tmp_path / "new.bundle")
    assert report.total.after.requests > 4
    with bundlefmt.open(tmp_path / "new.bundle") as file:
        order = file.order(file.group(0))
    assert np.count_nonzero(np.diff(seen[order])) == 11


def test_what_it_reports_is_what_a_reader_then_does(
    demo_bundle: Path, demo_traces: Path, tmp_path: Path
) -> None:
    report = bundlefmt.reorder(demo_bundle, demo_traces, tmp_path / "new.bundle")
    assert report.gap == GAP
    trace = Trace(demo_traces)
    held_out = np.arange(180, 200)
    assert report.tokens == held_out.size
    for path, gap, expected in (
        (demo_bundle, 0, report.total.before),
        (tmp_path / "new.bundle", 0, report.total.after),
        (demo_bundle, GAP, report.total.before_gap),
        (tmp_path / "new.bundle", GAP, report.total.after_gap),
    ):
        with bundlefmt.open(path) as file, file.reader("buffered", gap=gap) as reader:
            for index, group in enumerate(trace.groups_of(file)):
                active = trace.layer(index).active(held_out)
                for token in active:
                    reader.read(group.layer, np.flatnonzero(token))
            stats, stride = reader.stats, file.groups[0].stride
        assert stats.requests == round(expected.requests * held_out.size)
        assert stats.bundles == round(expected.run_length * stats.requests)
        unwanted = stats.bytes_read - stats.bundles * stride
        assert unwanted == round(expected.unwanted_bytes * held_out.size)
    assert report.total.after.requests < report.total.before.requests


# What is refused, and what it leaves


def test_a_trace_of_another_model_is_refused(
    gated: Path, demo_traces: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="another model"):
        bundlefmt.reorder(gated, demo_traces, tmp_path / "new.bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["gated.bundle"]


def test_too_short_a_trace_is_refused(gated: Path, tmp_path: Path) -> None:
    traces = synthetic_trace(gated, tmp_path / "traces", {0: random_activity(99)})
    with pytest.raises(UsageError, match="100 or more, found 99"):
        bundlefmt.reorder(gated, traces, tmp_path / "new.bundle")


def test_a_gap_below_zero_and_a_name_that_is_taken_are_refused(
    demo_bundle: Path, demo_traces: Path, ordered: Path
) -> None:
    with pytest.raises(UsageError, match="gap"):
        bundlefmt.reorder(demo_bundle, demo_traces, gap=-1)
    with pytest.raises(UsageError, match="already there"):
        bundlefmt.reorder(demo_bundle, demo_traces, ordered)


@pytest.mark.parametrize(
    ("where", "named"), [("tensor", "lm_head"), ("bundle", "layer 0, neuron 5"), ("blob", "config")]
)
def test_a_damaged_file_is_not_carried_over(
    small_bundle: Path, tmp_path: Path, where: str, named: str
) -> None:
    with bundlefmt.open(small_bundle) as file:
        group = file.group(0)
        at = {
            "tensor": file.header.tensors[0].data.offset,
            "bundle": group.bundles.offset + 5 * group.stride,
            "blob": next(b.data.offset for b in file.header.blobs if b.name == "config.json"),
        }[where]
    damaged = flipped(small_bundle, tmp_path / "damaged.bundle", at + 3)
    with bundlefmt.open(damaged) as file, pytest.raises(FormatError, match=named):
        rewrite(file, tmp_path / "new.bundle", lambda group: np.arange(72, dtype=np.uint32))
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.bundle"]


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(
    demo_bundle: Path, demo_traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new.bundle").write_bytes(b"old")
    monkeypatch.setattr(writer, "write_all", _full_disk)
    with pytest.raises(WriteError, match="No space left"):
        bundlefmt.reorder(demo_bundle, demo_traces, tmp_path / "new.bundle", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["new.bundle"]
    assert (tmp_path / "new.bundle").read_bytes() == b"old"


def _full_disk(fd: int, data: object, offset: int) -> int:
    if offset > 1 << 20:
        raise OSError(28, os.strerror(28))
    return os.pwrite(fd, memoryview(data).cast("B"), offset)


KILLED = """
import os, signal, sys
import bundlefmt

def progress(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

bundlefmt.reorder(*sys.argv[1:], progress=progress)
"""


def test_a_killed_reorder_leaves_no_file_and_the_next_one_cleans_up(
    demo_bundle: Path, demo_traces: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new.bundle"
    command = [sys.executable, "-P", "-c", KILLED, demo_bundle, demo_traces, target]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    (leaving,) = tmp_path.iterdir()
    assert leaving.name.endswith(".partial")
    bundlefmt.reorder(demo_bundle, demo_traces, target)
    assert [path.name for path in tmp_path.iterdir()] == ["new.bundle"]
    assert bundlefmt.verify(target).ok

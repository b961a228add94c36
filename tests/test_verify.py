"""Verify vouches for every byte of a file."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import pytest

import bundlefmt
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.layout.constants import SLOT_LENGTH
from tests.conftest import VECTORS

GOOD = sorted(VECTORS.glob("*.bundle"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A copy of the smallest vector that has a region of every kind."""
    return copy_of(VECTORS / "plain.bundle", tmp_path)


@pytest.fixture
def two_generations(tmp_path: Path) -> Path:
    return copy_of(VECTORS / "two-generations.bundle", tmp_path)


def copy_of(path: Path, folder: Path) -> Path:
    return Path(shutil.copy(path, folder / path.name))


def flip(path: Path, *offsets: int) -> None:
    """Flip one bit of the byte at each offset."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for offset in offsets:
            data[offset] ^= 0x10


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_good_files_have_no_fault(path: Path, quick: bool) -> None:
    report = bundlefmt.verify(path, quick=quick)
    assert report.ok
    assert (report.faults, report.fault_count) == ([], 0)
    assert report.file_bytes == path.stat().st_size


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_every_byte_is_accounted_for(path: Path) -> None:
    with bundlefmt.open(path) as file:
        length = file.superblock.file_length
    assert bundlefmt.verify(path).checked_bytes == length
    assert bundlefmt.verify(path, quick=True).checked_bytes < length


@pytest.mark.slow
def test_flipping_any_byte_is_detected(plain: Path) -> None:
    missed = []
    with plain.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for offset in range(len(data)):
            data[offset] ^= 1 << offset % 8
            if bundlefmt.verify(plain).ok:
                missed.append(offset)
            data[offset] ^= 1 << offset % 8
    assert not missed
    assert bundlefmt.verify(plain).ok


def test_truncation_at_every_length_is_refused(plain: Path) -> None:
    accepted = []
    for length in reversed(range(plain.stat().st_size)):
        os.truncate(plain, length)
        try:
            bundlefmt.open(plain).close()
        except FormatError:
            continue
        accepted.append(length)
    assert not accepted


def test_a_flipped_byte_is_named_by_its_place(plain: Path) -> None:
    with bundlefmt.open(plain) as file:
        group = file.groups[0]
        tensor, blob = file.header.tensors[0], file.header.blobs[0]
        source = file.header.sources[0]
        places = {
            group.bundles.offset + 3 * group.stride + 1: "layer 0, neuron 3",
            group.checksums.offset + 1: "groups[0].checksums",
            tensor.data.offset + 1: "tensors[0].data",
            blob.data.offset + 1: "blobs[0].data",
            source.header.offset + 1: "sources[0].header",
            source.header.offset + source.header.length: "gap",
            file.superblock.header_offset + 1: "header",
            SLOT_LENGTH + 0x10: "superblock.checksum",
            SLOT_LENGTH - 1: "superblock",
        }
    for offset, field in places.items():
        flip(plain, offset)
        report = bundlefmt.verify(plain)
        assert report.fault_count == 1
        assert report.faults[0].startswith(f"{plain}: {field} at byte ")
        assert "\n" not in report.faults[0]
        flip(plain, offset)


def test_a_damaged_neuron_is_named_by_its_order(tmp_path: Path) -> None:
    path = copy_of(VECTORS / "ordered.bundle", tmp_path)
    with bundlefmt.open(path) as file:
        group = file.groups[0]
        order = file.order(group)
    assert order is not None
    flip(path, group.bundles.offset + 2 * group.stride)
    assert f"layer 0, neuron {order[2]} at byte" in bundlefmt.verify(path).faults[0]


def test_faults_are_counted_and_the_first_is_named(plain: Path) -> None:
    with bundlefmt.open(plain) as file:
        group, blob = file.groups[0], file.header.blobs[0]
    slots = [group.bundles.offset + slot * group.stride for slot in (0, 2)]
    flip(plain, blob.data.offset, *slots, group.bundles.offset + group.bundles.length)
    report = bundlefmt.verify(plain)
    assert not report.ok
    assert report.fault_count == len(report.faults) == 4
    for found, field in zip(report.faults, ("neuron 0", "neuron 2", "gap", "blobs"), strict=True):
        assert field in found


def test_faults_beyond_a_hundred_are_counted_only(small_bundle: Path, tmp_path: Path) -> None:
    path = copy_of(small_bundle, tmp_path)
    with bundlefmt.open(path) as file:
        slots = [
            group.bundles.offset + slot * group.stride
            for group in file.groups
            for slot in range(group.neurons)
        ]
    flip(path, *slots)
    report = bundlefmt.verify(path)
    assert report.fault_count == len(slots) == 144
    assert len(report.faults) == 100
    assert "layer 0, neuron 0" in report.faults[0]


QUICK = {
    # place -> whether `quick` finds damage there
    "bundles": False,
    "tensor": False,
    "gap": False,
    "checksums": True,
    "order": True,
    "blob": True,
    "superblock": True,
    "header": True,
}


@pytest.mark.parametrize("place", QUICK)
def test_quick_leaves_out_the_bulk_but_not_the_tables(place: str, tmp_path: Path) -> None:
    path = copy_of(VECTORS / ("ordered.bundle" if place == "order" else "plain.bundle"), tmp_path)
    with bundlefmt.open(path) as file:
        group, order = file.groups[0], file.groups[0].order
        offsets = {
            "bundles": group.bundles.offset,
            "gap": group.bundles.offset + group.bundles.length,
            "checksums": group.checksums.offset,
            "superblock": 100,
            "header": file.superblock.header_offset,
            "order": order.offset if order else 0,
        }
        if place in ("tensor", "blob"):
            offsets["tensor"] = file.header.tensors[0].data.offset
            offsets["blob"] = file.header.blobs[0].data.offset
    flip(path, offsets[place])
    assert bundlefmt.verify(path, quick=True).ok is not QUICK[place]
    assert not bundlefmt.verify(path).ok


def test_a_damaged_newest_slot_is_reported_over_the_older_state(two_generations: Path) -> None:
    assert bundlefmt.verify(two_generations).generation == 2
    flip(two_generations, SLOT_LENGTH + 0x20)
    with bundlefmt.open(two_generations) as file:
        assert file.superblock.generation == 1
        assert file.blob("note.txt") == b"first"
    report = bundlefmt.verify(two_generations)
    assert report.generation == 1
    assert report.fault_count == 1
    assert "superblock.checksum" in report.faults[0]
    assert "interrupted update" in report.notes[0]


def test_a_damaged_older_slot_is_reported(two_generations: Path) -> None:
    flip(two_generations, 0x20)
    report = bundlefmt.verify(two_generations)
    assert (report.generation, report.fault_count) == (2, 1)
    assert "superblock.checksum at byte 72" in report.faults[0]


def test_retired_bytes_are_vouched_for(two_generations: Path) -> None:
    with bundlefmt.open(two_generations) as file:
        retired = file.header.retired
    assert len(retired) == 2
    for i, region in enumerate(retired):
        flip(two_generations, region.offset)
        assert f"retired[{i}]" in bundlefmt.verify(two_generations).faults[0]
        flip(two_generations, region.offset)


def test_bytes_after_the_end_are_a_note_and_no_fault() -> None:
    report = bundlefmt.verify(VECTORS / "interrupted-update.bundle")
    assert report.ok
    assert len(report.notes) == 1
    assert report.notes[0].startswith("17 bytes after the end at byte 20480")


def test_progress_rises_to_the_length_of_the_file(small_bundle: Path) -> None:
    calls: list[tuple[int, int]] = []
    bundlefmt.verify(small_bundle, progress=lambda done, total: calls.append((done, total)))
    size = small_bundle.stat().st_size
    assert {total for _, total in calls} == {size}
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == size


def test_what_is_no_file_is_the_callers_fault(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pipe"):
        with pytest.raises(UsageError) as caught:
            bundlefmt.verify(path)
        assert str(path) in str(caught.value)

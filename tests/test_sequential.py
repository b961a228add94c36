"""Long spans come piece by piece, whole, in order, and read ahead of their use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import bundlefmt
from bundlefmt.errors import ReadError
from bundlefmt.storage import sequential
from bundlefmt.storage.backends import BACKENDS, Backend, open_backend
from bundlefmt.storage.sequential import Sequential

SIZE = 300_001
PIECE = 1 << 16


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sequential") / "file"
    path.write_bytes(np.random.default_rng(3).bytes(SIZE))
    return path


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, file: Path) -> Iterator[Backend]:
    try:
        opened, _ = open_backend(file, request.param, 4, 4)
    except ReadError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "PIECE", PIECE)
    monkeypatch.setattr(sequential, "_REQUEST", 10_000)


@pytest.mark.parametrize("unit", [1, 1000, PIECE + 100])
@pytest.mark.parametrize("span", [(0, SIZE), (17, SIZE - 17), (4096, 4 * PIECE), (5, 1), (9, 0)])
def test_the_pieces_of_a_span_are_its_bytes(
    file: Path, backend: Backend, span: tuple[int, int], unit: int
) -> None:
    offset, length = span
    content, at = file.read_bytes(), offset
    for start, data in Sequential(backend).pieces(offset, length, unit):
        assert start == at
        assert data.tobytes() == content[start : start + data.nbytes]
        at += data.nbytes
        assert data.nbytes % unit == 0 or at == offset + length
        assert data.nbytes <= max(PIECE, unit)
    assert at == offset + length


def test_a_span_left_early_leaves_nothing_in_flight(file: Path, backend: Backend) -> None:
    reading = Sequential(backend)
    for _ in range(5):
        next(reading.pieces(0, SIZE))
    assert [data.tobytes() for _, data in reading.pieces(7, 100)] == [file.read_bytes()[7:107]]


def test_a_span_beyond_the_file_is_an_error_of_its_last_piece(backend: Backend) -> None:
    pieces = Sequential(backend).pieces(0, 2 * SIZE)
    with pytest.raises(ReadError):
        list(pieces)


def test_verify_finds_damage_on_both_sides_of_a_pieces_edge(
    demo_bundle: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(demo_bundle, tmp_path))
    with bundlefmt.open(path) as file:
        group = file.groups[0]
    edge = PIECE // group.stride  # the first bundle of the second piece
    with path.open("r+b") as out:
        for slot in (edge - 1, edge):
            out.seek(group.bundles.offset + slot * group.stride)
            out.write(bytes(8))
    report = bundlefmt.verify(path)
    assert report.fault_count == 2
    assert all("bundle damaged" in fault for fault in report.faults)

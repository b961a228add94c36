"""The comparison with other readers: every reader gets a row, and all read the same bytes."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bundlefmt.cli import main
from bundlefmt.errors import FormatError, ReadError, UsageError
from bundlefmt.measurement import fio, peers
from bundlefmt.measurement.reads import REPETITIONS
from tests.conftest import VECTORS

ALWAYS = (
    "bundlefmt",
    "bundlefmt, plain call",
    "buffered",
    "bundled",
    "unbundled",
    "numpy.memmap",
    "mmap, advised",
)
RATE = 1e4  # reads per second that the fio of these tests finds


@pytest.fixture
def model(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fio, "installed", lambda: True)
    monkeypatch.setattr(
        fio, "run", lambda path, chunk, depth, *_: fio.Ceiling(chunk, depth, RATE * chunk, RATE, 9)
    )
    return Path(shutil.copy(demo_bundle, tmp_path))


def turns(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Keep to these peers; the list takes the names of those that are opened."""
    opened: list[str] = []

    def noting(name: str, peer: peers.Peer) -> peers.Peer:
        @contextmanager
        def opening(subject: peers.Subject) -> Iterator[peers.Read]:
            opened.append(name)
            with peer.open(subject) as read:
                yield read

        return peer._replace(open=opening)

    monkeypatch.setattr(peers, "PEERS", {name: noting(name, peers.PEERS[name]) for name in names})
    return opened


def test_every_peer_has_a_row_and_nothing_is_left(model: Path) -> None:
    found = peers.compare(model, batch=64)
    assert [row.peer for row in found.rows] == [*peers.PEERS, "fio"]
    for row in found.rows:
        if not row.missing:
            assert len(row.neurons_per_second) == len(row.cpu_us_per_read) == REPETITIONS
            assert min(row.bytes_per_second) > 0
    rows = {row.peer: row for row in found.rows}
    for name in ALWAYS:
        assert rows[name].missing is None
    for name, peer in peers.PEERS.items():
        if peer.needs:
            assert (rows[name].missing is None) == (find_spec(peer.needs) is not None)
    assert rows["safetensors"].neurons in (0, peers.FEW)
    assert rows["bundled"].neurons == rows["unbundled"].neurons > 64
    assert found.ratios.keys() == peers.RATIOS.keys()
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize("vector", ["ordered", "experts", "gated-bf16", "q8-0", "resident-gate"])
def test_any_file_can_be_compared(model: Path, tmp_path: Path, vector: str) -> None:
    found = peers.compare(shutil.copy(VECTORS / f"{vector}.bundle", tmp_path))
    assert {row.peer for row in found.rows if not row.missing} >= set(ALWAYS)


def test_a_ratio_is_the_median_of_those_within_a_repetition(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1e3, 2e3, 3e3, 4e3, 5e3])
    monkeypatch.setattr(fio, "best_depth", lambda path, chunk: 7)
    monkeypatch.setattr(
        fio, "run", lambda path, chunk, depth: fio.Ceiling(chunk, depth, 1.0, next(rates), 2.0)
    )
    turns(monkeypatch, "buffered")
    row, ceiling = peers.compare(model).rows
    assert ceiling.neurons_per_second == [1e3, 2e3, 3e3, 4e3, 5e3]
    assert ceiling.remark == "depth 7"
    ratios = [a / b for a, b in zip(row.neurons_per_second, [1e3, 2e3, 3e3, 4e3, 5e3], strict=True)]
    assert row.of_ceiling == statistics.median(ratios)
    assert row.cpu_of_ceiling == pytest.approx(statistics.median(row.cpu_us_per_read) / 2)


def test_all_readers_have_their_turn_in_each_repetition(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = turns(monkeypatch, "buffered", "unbundled")
    peers.compare(model)
    for turn in range(0, len(opened), 2):
        assert sorted(opened[turn : turn + 2]) == ["buffered", "unbundled"]
    assert len(opened) == 2 * REPETITIONS


def test_no_mapping_keeps_pages_when_the_cache_is_dropped(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dropped(path: Path) -> None:
        assert str(path) not in Path("/proc/self/maps").read_text()

    monkeypatch.setattr(peers, "drop_cache", dropped)
    peers.compare(model)


def test_no_copy_is_made_for_a_peer_that_is_not_installed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(subject: peers.Subject) -> Any:
        raise AssertionError

    monkeypatch.setattr(peers, "PEERS", {"absent": peers.Peer(never, "no_such_module", never)})
    row, _ = peers.compare(model).rows
    assert row.missing == "not installed"


def test_a_fio_that_fails_costs_only_its_own_row(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: str, chunk: int) -> int:
        raise ReadError("fio failed: it says nothing", file=path)

    monkeypatch.setattr(fio, "best_depth", failing)
    turns(monkeypatch, "buffered")
    row, ceiling = peers.compare(model).rows
    assert ceiling.missing == "fio failed: it says nothing"
    assert row.missing is None and row.of_ceiling is None


def test_a_peer_that_reads_other_bytes_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def wrong(subject: peers.Subject) -> Iterator[peers.Read]:
        yield lambda: None

    monkeypatch.setattr(peers, "PEERS", {"wrong": peers.Peer(wrong)})
    with pytest.raises(FormatError, match="wrong reads other bytes"):
        peers.compare(model)
    assert list(model.parent.iterdir()) == [model]


def test_the_objects_and_the_table_say_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns(monkeypatch, "buffered", "bundled", "unbundled")
    args = ["bench", "--peers", str(model), "--batch", "32", "--order", "sorted"]
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["peer"] for row in found["rows"]] == ["buffered", "bundled", "unbundled", "fio"]
    assert found["settings"]["batch"] == found["rows"][0]["batch"] == 32
    assert found["settings"]["order"] == "sorted"
    assert len(found["rows"][0]["bytes_per_second"]) == REPETITIONS
    assert "smaller than the memory" in found["machine"]["cold"]
    assert main(args) == 0
    table = capsys.readouterr().out
    assert "bundled / unbundled" in table and "smaller than the memory" in table


@pytest.mark.parametrize(
    "settings", [{"batch": 0}, {"adjacent": 2}, {"order": "no"}, {"backend": "tape"}], ids=str
)
def test_settings_that_cannot_be_are_refused(model: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        peers.compare(model, **settings)
    assert list(model.parent.iterdir()) == [model]


def test_a_comparison_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--peers"]) != 0
    assert "bundle file" in capsys.readouterr().err

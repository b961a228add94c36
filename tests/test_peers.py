"""The comparison with other readers: every reader gets a row, and all read the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bundlefmt.cli import main
from bundlefmt.errors import FormatError
from bundlefmt.measurement import peers


@pytest.fixture
def model(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(peers, "ceiling", lambda path, chunk: None)
    return Path(shutil.copy(demo_bundle, tmp_path))


def test_every_peer_has_a_row_and_nothing_is_left(model: Path) -> None:
    rows = peers.compare(model)
    assert [row.peer for row in rows] == [*peers.PEERS, "fio"]
    for row in rows:
        assert row.missing or 0 < row.least_bytes_per_second <= row.bytes_per_second
    missing = {row.peer: row.missing for row in rows}
    for name in ("buffered", "bundled", "unbundled", "numpy.memmap", "mmap, advised"):
        assert missing[name] is None
    for name, peer in peers.PEERS.items():
        if peer.needs:
            assert (missing[name] is None) == (find_spec(peer.needs) is not None)
    assert missing["fio"] == "not installed"
    assert list(model.parent.iterdir()) == [model]


def test_a_peer_that_reads_other_bytes_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def wrong(subject: peers.Subject) -> Iterator[peers.Read]:
        yield lambda: np.zeros_like(subject.empty())

    monkeypatch.setattr(peers, "PEERS", {"wrong": peers.Peer(wrong)})
    with pytest.raises(FormatError, match="wrong reads other bytes"):
        peers.compare(model)


def test_a_comparison_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--peers"]) != 0
    assert "bundle file" in capsys.readouterr().err

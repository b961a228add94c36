"""The paper's tables: what the steps compute and read, and how results are told."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundlefmt
from bench.paper import dense, running, tables
from bench.paper.device import Device
from bench.paper.limits import Finished
from bench.paper.records import Settings, Token
from bench.paper.running import Row
from bench.paper.traces import Statistics
from bench.paper.unbundled import unbundle
from tests.conftest import FIXTURES

PROMPT = [1, 2, 3, 4, 5]
SETTINGS = Settings("naive", "m.bundle", None, "opt-6.7b", limit=100, tokens=3, prompt_tokens=1)


@pytest.mark.parametrize("family", ["opt", "falcon", "phi-relu", "llama-fatrelu"])
@pytest.mark.parametrize("step", [dense.naive, dense.mapped, dense.hybrid])
def test_the_dense_steps_compute_the_model(
    family: str, step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_LARGE", 32 * 16 * 4)  # all matrices are large
    path = tmp_path / "model.bundle"
    bundlefmt.pack(FIXTURES / family, path)
    with bundlefmt.load_model(path) as model:
        expected = model.logits(PROMPT)
    made = step(str(path), 1 << 40, 16)
    cache = made.decoder.new_cache(16)
    found = []
    for token in PROMPT:
        hidden = made.decoder.forward([token], cache)
        made.before_head()
        found.append(made.decoder.logits(hidden)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_naive_reads_the_whole_model_for_each_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_LARGE", 32 * 16 * 4)
    path = tmp_path / "model.bundle"
    bundlefmt.pack(FIXTURES / "opt", path)
    made = dense.naive(str(path), 1 << 40, 16)
    assert made.loads is not None
    cache = made.decoder.new_cache(16)
    with bundlefmt.open(path) as file:
        matrices = [t.data.length for t in file.header.tensors if len(t.shape) == 2]
        whole = sum(matrices) + sum(group.bundles.length for group in file.groups)
    for token in PROMPT:
        before = made.loads.nbytes
        made.decoder.forward([token], cache)
        made.before_head()
        assert made.loads.nbytes - before == whole


def test_hybrid_reads_the_neurons_that_it_does_not_hold(small_bundle: Path) -> None:
    with bundlefmt.open(small_bundle) as file, file.reader() as reader:
        held = {g.layer: np.zeros((5 * (g.layer + 1), g.stride), np.uint8) for g in file.groups}
        loads = dense.Loads(file.backend()[0])
        partly = dense._PartlyHeld(held, loads, file.groups)
        for group in file.groups:
            ids, before = np.arange(group.neurons), loads.nbytes
            pieces = [piece.raw.copy() for piece in partly.bundles(group, ids)]
            assert np.array_equal(np.concatenate(pieces), reader.read(group.layer, ids).raw)
            rest = group.neurons - len(held[group.layer])
            assert loads.nbytes - before == rest * group.stride


def test_without_bundles_each_part_is_read_from_a_place_of_its_own(small_bundle: Path) -> None:
    with bundlefmt.load_model(small_bundle, verify=False, gap=0) as model:
        unbundle(model)
        group = model.file.groups[1]
        region = np.fromfile(
            small_bundle, np.uint8, group.bundles.length, offset=group.bundles.offset
        )
        ids, start = [3, 9, 10, 11, 2], 0
        rows = np.array([4, 0, 1, 2, 7])
        out = np.zeros((8, group.stride), dtype=np.uint8)
        model.reader.read(group.layer, ids, out=out, rows=rows)
        for part in group.bundled:
            matrix = region[start : start + group.neurons * part.length].reshape(-1, part.length)
            assert np.array_equal(
                out[rows, part.offset : part.offset + part.length], matrix[np.array(ids)]
            )
            start += group.neurons * part.length


def ended(lines: list[dict[str, Any]], **how: Any) -> Finished:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    usual = {"status": 0, "killed_for_memory": False, "timed_out": False}
    return Finished(**{"err": "", "peak": 90, "anonymous_peak": 80, **usual, **how}, out=text)


TOKENS = [
    {"Token": asdict(Token(seconds, io=2.0, waited=1.0, manage=0.5, nbytes=8_000_000_000))}
    for seconds in (4.0, 6.0, 5.0)
]


def test_a_row_is_the_medians_of_its_tokens() -> None:
    row = running.row_of(SETTINGS, ended(TOKENS), seconds=60)
    assert (row.tokens, row.seconds, row.compute, row.rate) == (3, 5.0, 3.5, 4e9)
    assert row.note is None


@pytest.mark.parametrize(
    ("how", "note"),
    [
        ({"status": -9, "timed_out": True}, "did not finish within 60 s: 3 tokens"),
        ({"status": -9, "killed_for_memory": True}, "killed after 3 tokens: more memory"),
        ({"status": 1, "err": "Traceback\nUsageError: too little\n"}, "UsageError: too little"),
    ],
)
def test_a_row_says_what_kept_it_from_being_whole(how: dict[str, Any], note: str) -> None:
    row = running.row_of(SETTINGS, ended(TOKENS, **how), seconds=60)
    assert row.note is not None and note in row.note
    assert row.seconds == 5.0


def report() -> tables.Report:
    figures = {"limit": 7_000_000_000, "tokens": 3, "anonymous_peak": 6_500_000_000, "peak": None}
    naive = Row("naive", **figures, seconds=6.0, io=4.5, waited=4.5, manage=0.0, nbytes=13e9)
    best = Row("bundling", **figures, seconds=0.6, io=0.3, waited=0.2, manage=0.1, nbytes=3e8)
    slow = Row("torch", **figures, seconds=None, note="did not finish within 60 s")
    return tables.Report(
        model="opt-6.7b",
        file_bytes=13_000_000_000,
        ffn_bytes=8_000_000_000,
        limit=7_000_000_000,
        prompt_tokens=16,
        device=Device(3e9, 1e9, "uring"),
        generator={},
        statistics=Statistics(0.1, [0.1, 0.15], [0.05, 0.04], 0.5, 0.3),
        early={"recall": 0.85, "wrong": 0.15},
        rows=[naive, slow, best],
        machine={
            "cpu": "a CPU",
            "cpus": 2,
            "memory": {"total": 1},
            "system": "S",
            "core": "C",
            "load": 0.0,
        },
        date="2000-01-01",
        commit="abc",
        commands=["python -m bench.paper_tables"],
    )


def test_the_table_sets_each_step_beside_the_paper_s() -> None:
    text = tables.markdown(report())
    naive = "| naive | 6.50 | 4500 | 4500 | 0 | 1500 | 6000 | 1.00 | 1.00 | 1.00 | 3 |"
    assert f"{naive} 2196 / 0 / 986 / 3182 |" in text
    assert "| + bundling | 6.50 | 300 | 200 | 100 | 300 | 600 | 10.00 | 15.00 | 0.86 | 3 |" in text
    assert "a ratio of 0.33" in text
    assert "PyTorch, mmap: did not finish within 60 s" in text
    assert "synthetic" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_json_holds_what_the_table_says() -> None:
    found = json.loads(json.dumps(report().as_dict()))
    assert [row["ratio"] for row in found["rows"]] == [1.0, None, 10.0]
    assert found["rows"][2]["compute"] == pytest.approx(0.3)
    assert found["device"]["ratio"] == pytest.approx(1 / 3)


def test_a_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables.draw(report(), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_section_takes_the_place_of_the_one_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    for heading, text in [("a", "old"), ("b", "other"), ("a", "new")]:
        tables.write_section(path, heading, text)
    assert path.read_text() == "# Results\n\n## a\n\nnew\n\n## b\n\nother\n"

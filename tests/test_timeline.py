"""Every moment of a pass belongs to one stage, and the picture shows them all."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

import bundlefmt
from bundlefmt.runtime.clock import STAGES, Clock, Span
from bundlefmt.runtime.timeline import drawing

SVG = "{http://www.w3.org/2000/svg}"


def test_the_stages_of_a_pass_follow_one_another_without_gaps(demo_bundle: Path) -> None:
    with bundlefmt.load_model(demo_bundle, mode="predict", memory=1 << 40, tokens=8) as model:
        cache = model.decoder.new_cache()
        model.clock.keep_spans()
        model.decoder.forward([1], cache)
        spans = model.clock.spans
        assert spans is not None
        stages = [span for span in spans if span.stage != "read"]
        assert {span.stage for span in stages} == set(STAGES)
        for before, after in pairwise(stages):
            assert before.ended == after.began
        for span in spans:
            if span.stage == "read":
                assert stages[0].began <= span.began <= span.ended <= stages[-1].ended


def test_seconds_are_the_sum_of_the_spans() -> None:
    clock = Clock()
    clock.keep_spans()
    clock.start()
    for stage in ("attention", "ffn", "attention"):
        clock.lap(stage, 0)
    assert clock.spans is not None
    for stage in STAGES:
        lengths = [span.ended - span.began for span in clock.spans if span.stage == stage]
        assert clock.seconds[stage] == pytest.approx(sum(lengths) / 1e9)


def test_what_is_not_asked_for_is_not_kept() -> None:
    clock = Clock()
    clock.lap("ffn")
    clock.read(0, (1, 2))
    assert clock.spans is None


def test_the_picture_has_a_bar_for_every_span() -> None:
    spans = [
        Span("attention", 0, 1_000_000, 3_000_000),
        Span("read", 0, 1_500_000, 4_000_000),
        Span("wait", 0, 3_000_000, 4_000_000),
        Span("head", None, 4_000_000, 4_200_000),
    ]
    root = ElementTree.fromstring(drawing(spans, "one token <&>"))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles == [
        "attention, layer 0: 2.000 ms",
        "read, layer 0: 2.500 ms",
        "wait, layer 0: 1.000 ms",
        "head: 0.200 ms",
    ]
    assert "one token <&>" in [text.text for text in root.iter(f"{SVG}text")]


def test_a_pass_without_spans_has_a_picture_too() -> None:
    assert ElementTree.fromstring(drawing([], "nothing")).tag == f"{SVG}svg"

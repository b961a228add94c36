"""A picture of one pass: what was computed, when, and what the device did meanwhile. SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

from bundlefmt.runtime.clock import Span

_LANES = ("compute", "wait", "flash")
_LANE_OF = {"wait": "wait", "read": "flash"}  # everything else is computed
_COLOURS = {
    "attention": "#4c78a8",
    "predict": "#f58518",
    "manage": "#b279a2",
    "ffn": "#54a24b",
    "head": "#9d755d",
    "wait": "#e45756",
    "read": "#72b7b2",
}
_LEFT, _TOP, _LANE, _GAP, _WIDTH = 70, 60, 34, 10, 1500
_TICKS = 10


def drawing(spans: Sequence[Span], title: str) -> str:
    """The SVG of a pass's spans, one lane for what was computed, one for waiting, one for reads in
    flight."""
    began = min((span.began for span in spans), default=0)
    length = max((span.ended for span in spans), default=1) - began
    scale = _WIDTH / max(length, 1)
    bottom = _TOP + len(_LANES) * (_LANE + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20}" '
        f'height="{bottom + 50}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
        *_legend(),
        *(_label(lane) for lane in _LANES),
        *(_bar(span, began, scale) for span in spans),
        *_axis(length, scale, bottom),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _height_of(lane: str) -> int:
    return _TOP + _LANES.index(lane) * (_LANE + _GAP)


def _label(lane: str) -> str:
    return f'<text x="8" y="{_height_of(lane) + _LANE - 12}">{lane}</text>'


def _bar(span: Span, began: int, scale: float) -> str:
    lane = _LANE_OF.get(span.stage, "compute")
    where = "" if span.layer is None else f", layer {span.layer}"
    milliseconds = (span.ended - span.began) / 1e6
    return (
        f'<rect x="{_LEFT + (span.began - began) * scale:.2f}" y="{_height_of(lane)}" '
        f'width="{(span.ended - span.began) * scale:.2f}" height="{_LANE}" '
        f'fill="{_COLOURS[span.stage]}" fill-opacity="0.85">'
        f"<title>{span.stage}{where}: {milliseconds:.3f} ms</title></rect>"
    )


def _legend() -> Iterable[str]:
    for turn, (stage, colour) in enumerate(_COLOURS.items()):
        x = _LEFT + 110 * turn
        yield f'<rect x="{x}" y="32" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 18}" y="43">{stage}</text>'


def _axis(length: int, scale: float, y: int) -> Iterable[str]:
    """Milliseconds, about _TICKS of them, at round numbers."""
    step = next(
        step
        for power in range(12)
        for step in (10**power, 2 * 10**power, 5 * 10**power)
        if step * _TICKS * 1000 >= length
    )
    for tick in range(0, length + 1, step * 1000):
        x = _LEFT + tick * scale
        yield f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{_TOP}" y2="{y}" stroke="#ddd"/>'
        yield f'<text x="{x:.2f}" y="{y + 16}" text-anchor="middle">{tick / 1e6:g} ms</text>'

"""A picture of a measurement: throughput against chunk size."""

from __future__ import annotations

import io
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bundlefmt.errors import UsageError
from bundlefmt.measurement import Bench, BenchRow
from bundlefmt.storage.atomic import refuse_existing, replacing, write_all

FORMATS = (".png", ".svg")


def check(path: str | os.PathLike[str]) -> None:
    """Raise UsageError unless `draw` can make a picture of that name, before anything is measured
    for it."""
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise UsageError(
            "unknown kind of picture", file=path, expected=" or ".join(FORMATS), found=suffix
        )
    refuse_existing(Path(path), force=True)
    if find_spec("matplotlib") is None:
        raise UsageError("no matplotlib to draw with: pip install 'bundlefmt[plot]'", field="plot")


def draw(measured: Bench, path: str | os.PathLike[str]) -> None:
    """Write a PNG or SVG: a line through the medians of each backend's settings, a band from their
    least to their most, and fio's rate, if there is one. Raises WriteError when the device
    refuses, UsageError as `check` does."""
    check(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[BenchRow]] = {}
    for row in sorted(measured.rows, key=lambda row: row.chunk_bytes):
        lines.setdefault(_label(row), []).append(row)
    for (label, rows), marker in zip(lines.items(), _MARKERS * len(lines), strict=False):
        sizes = [row.chunk_bytes for row in rows]
        rates = [row.bytes_per_second / 1e6 for row in rows]
        (line,) = axes.plot(sizes, rates, marker=marker, markersize=5, label=label)
        axes.fill_between(
            sizes,
            [row.least_bytes_per_second / 1e6 for row in rows],
            [row.most_bytes_per_second / 1e6 for row in rows],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    if measured.ceilings:
        sizes = [found.chunk_bytes for found in measured.ceilings]
        rates = [found.bytes_per_second / 1e6 for found in measured.ceilings]
        axes.plot(sizes, rates, "--x", color="black", linewidth=1.2, label="fio, best depth")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row.chunk_bytes for row in measured.rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(_size))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("chunk size (bytes per read)")
    axes.set_ylabel("throughput (MB/s)")
    axes.set_title(_title(measured.rows[0]), fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:])
    with replacing(path, force=True) as file:
        write_all(file.fileno(), picture.getbuffer(), 0)


_MARKERS = ("o", "s", "^", "D", "v")


def _label(row: BenchRow) -> str:
    if row.queue_depth is not None:
        return f"{row.backend}, depth {row.queue_depth}"
    return f"{row.backend}, {row.threads} thread{'s' if row.threads != 1 else ''}"


def _title(row: BenchRow) -> str:
    adjacent = f", {row.adjacent:.0%} adjacent" if row.adjacent else ""
    checked = ", checksums verified" if row.verify else ""
    what = "Device" if row.reads == "device" else "Bundles"
    return (
        f"{what}, cold reads in {row.order} order{adjacent}{checked}\n"
        f"median of {row.repetitions} repetitions, band from least to most"
    )


def _size(nbytes: float, _: Any) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"

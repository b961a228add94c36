"""What was measured, as tables (Markdown), as JSON, as a bar chart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.paper.device import Device
from bench.paper.figures import PAPER
from bench.paper.running import Row
from bench.paper.traces import Statistics

TITLES = {
    "naive": "naive",
    "mapped": "naive, mmap",
    "accelerate": "accelerate, disk offload",
    "torch": "PyTorch, mmap",
    "hybrid": "hybrid",
    "predictor": "+ predictor",
    "window": "+ window",
    "bundling": "+ bundling",
    "overlap": "+ overlap",
}
BEST = "overlap"


@dataclass(frozen=True)
class Report:
    """One run of the steps for a model."""

    model: str
    file_bytes: int
    ffn_bytes: int
    limit: int
    prompt_tokens: int
    device: Device
    generator: dict[str, float]
    statistics: Statistics
    early: dict[str, float]
    rows: list[Row]
    machine: dict[str, Any]
    date: str
    commit: str
    commands: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what a row computes from its figures is in it."""
        found = asdict(self)
        for row, said in zip(self.rows, found["rows"], strict=True):
            said |= {"compute": row.compute, "rate": row.rate, "ratio": self.ratio(row)}
            said |= {"io_ratio": self.io_ratio(row), "overlapped": row.overlapped}
        found["device"]["ratio"] = self.device.ratio
        return found

    def io_ratio(self, row: Row) -> float | None:
        """How many times as fast as naive's a row's I/O is."""
        naive = next((each.io for each in self.rows if each.step == "naive"), None)
        return naive / row.io if naive and row.io else None

    def ratio(self, row: Row) -> float | None:
        """How many times as fast as naive a row's tokens are."""
        naive = next((each.seconds for each in self.rows if each.step == "naive"), None)
        return naive / row.seconds if naive and row.seconds else None


def markdown(report: Report) -> str:
    """The report as a section."""
    return "\n\n".join(
        [_setting(report), _traces(report), _times(report), *_reads(report), _foot(report)]
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_section(path: Path, heading: str, text: str) -> None:
    """Put a section into a Markdown file in place of the one of that heading, or at its end."""
    old = path.read_text() if path.exists() else "# Results\n"
    section = f"## {heading}\n\n{text.strip()}\n"
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", old, re.DOTALL | re.MULTILINE)
    if found is None:
        new = f"{old.rstrip()}\n\n{section}"
    else:
        new = f"{old[: found.start()]}{section}\n{old[found.end() :]}"
    path.write_text(new.rstrip() + "\n")


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}"


def gigabytes(nbytes: float | None, digits: int = 2) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.{digits}f}"


def _setting(report: Report) -> str:
    device, machine = report.device, report.machine
    return (
        f"{report.date}, commit {report.commit}. {machine['cpu']}, {machine['cpus']} CPUs, "
        f"{gigabytes(machine['memory']['total'], 0)} GB of memory, {machine['system']}; core: "
        f"{machine['core']}; other load before: {machine['load']:.1f}. "
        f"{report.model}'s shape with random weights, float16: "
        f"{gigabytes(report.file_bytes)} GB, of which {gigabytes(report.ffn_bytes)} GB are FFN; "
        f"memory limit {gigabytes(report.limit)} GB (the kernel's: a control group around each "
        f"step's process). Device ({device.backend}): {gigabytes(device.sequential)} GB/s "
        f"sequential, {gigabytes(device.random)} GB/s in random reads of 16 KiB, a ratio of "
        f"{device.ratio:.2f} (the paper's: 0.37)."
    )


def _traces(report: Report) -> str:
    paper, found = PAPER[report.model], report.statistics
    windows = range(1, len(found.fresh) + 1)
    said = {
        "held": {1: paper.predicted, paper.window: paper.held},
        "fresh": {paper.window: paper.fresh},
    }

    def line(title: str, shares: Sequence[float]) -> list[str]:
        return [title, *(f"{share:.1%}" for share in shares)]

    def claim(title: str, claims: dict[int, float]) -> list[str]:
        return [title, *(f"{claims[k]:.1%}" if k in claims else "" for k in windows)]

    rows = [
        line("held by a window, trace", found.held),
        claim("held by a window, paper", said["held"]),
        line("new for the next token, trace", found.fresh),
        claim("new for the next token, paper", said["fresh"]),
    ]
    return (
        "**Activations are synthetic**: traces drawn to have the paper's sparsity and reuse, "
        f"replayed ({paper.sources}). Of a layer's neurons, {found.predicted:.1%} are predicted "
        f"for a token (paper: {paper.predicted:.1%}, of which truly active {paper.active:.0%} of "
        f"all); {found.persisting:.0%} of them are needed by the next one too (Jaccard "
        f"{found.jaccard:.2f}). Early guesses: recall {report.early['recall']:.2f}, "
        f"{report.early['wrong']:.2f} of them wrong. Predictors are random, of the paper's ranks, "
        "stored as trained ones are. By tokens in the window:\n\n"
        + table(["", *map(str, windows)], rows)
    )


def _times(report: Report) -> str:
    rows = []
    for row in report.rows:
        paper = PAPER[report.model].times.get(row.step)
        said = " / ".join(f"{time:.0f}" for time in (*paper, paper.total)) if paper else ""
        rows.append(
            [
                TITLES[row.step],
                gigabytes(row.anonymous_peak),
                *map(milliseconds, (row.io, row.waited, row.manage, row.compute, row.seconds)),
                *map(_ratio, (report.ratio(row), report.io_ratio(row), row.overlapped)),
                str(row.tokens),
                said,
            ]
        )
    columns = ["ms per token", "DRAM GB", "I/O", "waited for", "management", "compute", "total"]
    columns += [
        "naive / total",
        "naive's I/O / I/O",
        "total / sum",
        "tokens",
        "paper: I/O / management / compute / total",
    ]
    return table(columns, rows)


def _reads(report: Report) -> list[str]:
    rows = []
    for row in report.rows:
        paper = (PAPER[report.model].reads or {}).get(row.step)
        said = f"{paper.dram} / {paper.flash} / {paper.rate} / {paper.io:.0f}" if paper else ""
        if row.nbytes is not None:
            rows.append(
                [
                    TITLES[row.step],
                    gigabytes(row.anonymous_peak),
                    gigabytes(row.nbytes, 3),
                    gigabytes(row.rate),
                    milliseconds(row.io),
                    "-" if row.cache_share is None else f"{row.cache_share:.1%}",
                    said,
                ]
            )
    columns = ["reads per token", "DRAM GB", "flash→DRAM GB", "GB/s", "I/O ms"]
    columns += ["cache / FFN", "paper: DRAM / GB / GB/s / ms"]
    return [table(columns, rows)] if rows else []


def _foot(report: Report) -> str:
    notes = [f"- {TITLES[row.step]}: {row.note}" for row in report.rows if row.note]
    peaks = [row.peak for row in report.rows if row.peak is not None]
    highest = f"; with page cache at most {gigabytes(max(peaks))} GB" if peaks else ""
    text = (
        "Medians over the tokens after a prompt of "
        f"{report.prompt_tokens} and, where there is a cache, after it was brought into its steady "
        "state. DRAM: the most anonymous memory that the step's control group was seen to hold"
        f"{highest}. I/O: the device was busy with reads for that long; waited for: of that, the "
        "time in which nothing was computed; total / sum: beside I/O, management and compute done "
        "one after the other. Files are cold before each step. Made by:\n\n"
        + "\n".join(f"    {command}" for command in report.commands)
    )
    return "\n\n".join([text, "\n".join(notes)]) if notes else text


def draw(report: Report, path: Path) -> None:
    """A bar per step: what was waited for, management, compute, stacked; PNG or SVG."""
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.seconds is not None]
    figure = Figure(figsize=(9, 0.6 + 0.45 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    names = [TITLES[row.step] for row in rows]
    for part, (label, color) in enumerate(_PARTS.items()):
        widths = [1e3 * _parts(row)[part] for row in rows]
        if any(widths):
            axes.barh(names, widths, left=left, label=label, color=color)
            left = [sum(pair) for pair in zip(left, widths, strict=True)]
    for place, (end, row) in enumerate(zip(left, rows, strict=True)):
        ratio = report.ratio(row)
        label = f" {end:.0f}" + (f" ({ratio:.1f} times as fast)" if ratio else "")
        axes.text(end, place, label, va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("ms per token")
    axes.set_title(
        f"{report.model}'s shape, {gigabytes(report.limit)} GB of {gigabytes(report.file_bytes)} "
        "GB in memory; synthetic activations",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


_PARTS = {
    "waiting for reads": "#4878a8",
    "management": "#e0a030",
    "compute": "#6aa56a",
    "not told apart": "#b0b0b0",
}


def _parts(row: Row) -> tuple[float, float, float, float]:
    """A row's seconds by _PARTS."""
    if row.waited is None or row.compute is None:
        return 0.0, 0.0, 0.0, row.seconds or 0.0
    return row.waited, row.manage or 0.0, row.compute, 0.0

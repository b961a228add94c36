"""Tokens per second against the memory that a model may use, each measured under a limit.

    python -m bench.budgets --folder /big/disk --json budgets.json --plot budgets.png

The same trace as in `bench.paper_tables` is replayed in a process of its own for each budget, in a
control group with that limit, and once without a limit and with every neuron in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench import paper_tables
from bench.paper import tables
from bench.paper.records import Settings
from bench.paper.running import Row, run
from bench.paper_tables import RESULTS, add_files, commit, facts, files, say, today
from bundlefmt.errors import BundleError
from bundlefmt.storage.device import available_memory

BEST = "overlap"
SHARES = tuple(range(20, 101, 10))  # of the file, percent


@dataclass(frozen=True)
class Report:
    """A row per share of the file's bytes, and the one with everything in memory."""

    model: str
    file_bytes: int
    shares: list[float]
    rows: list[Row]
    resident: Row
    machine: dict[str, Any]
    date: str
    commit: str
    command: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_files(parser)
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES, help="budgets, percent")
    parser.add_argument("--step", choices=tables.TITLES, default=BEST, help="how it is run")
    parser.add_argument("--tokens", type=int, default=20, help="measured of each")
    parser.add_argument("--seconds", type=float, default=180, help="at most, of each")
    parser.add_argument("--json", type=Path, help="file to write everything measured to")
    parser.add_argument("--plot", type=Path, help="PNG or SVG to draw")
    parser.add_argument("--write-results", action="store_true", help=f"into {RESULTS.name}")
    args = parser.parse_args()
    try:
        report = measure(args)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = markdown(report)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    if args.plot:
        draw(report, args.plot)
    if args.write_results:
        tables.write_section(RESULTS, f"{args.model}: tokens per second against memory", text)
    return 0


def measure(args: argparse.Namespace) -> Report:
    """Run all budgets."""
    bundle, _ = files(args)
    size = bundle.stat().st_size
    settings = Settings(
        step=args.step,
        bundle=str(bundle),
        checkpoint=None,
        model=args.model,
        limit=0,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
    )

    def row(limit: int) -> Row:
        found = run(msgspec.structs.replace(settings, limit=limit), args.seconds)
        say(f"{tables.gigabytes(limit)} GB: {rate(found)} tokens/s {found.note or ''}")
        return found

    return Report(
        model=args.model,
        file_bytes=size,
        shares=[share / 100 for share in args.shares],
        rows=[row(size * share // 100) for share in args.shares],
        resident=row(available_memory()),
        machine=facts(bundle),
        date=today(),
        commit=commit(),
        command=paper_tables.command(),
    )


def rate(row: Row) -> str:
    return "-" if row.seconds is None else f"{1 / row.seconds:.2f}"


def markdown(report: Report) -> str:
    """The report as a section."""
    lines = [
        [
            name,
            tables.gigabytes(row.limit),
            tables.gigabytes(row.anonymous_peak),
            "-" if row.cache_share is None else f"{row.cache_share:.0%}",
            tables.gigabytes(row.nbytes, 3),
            tables.milliseconds(row.seconds),
            rate(row),
            row.note or "",
        ]
        for name, row in _named(report)
    ]
    columns = ["memory / file", "limit GB", "DRAM GB", "cache / FFN", "read GB per token"]
    columns += ["ms per token", "tokens/s", "note"]
    return (
        f"{report.date}, commit {report.commit}. {report.machine['cpu']}, "
        f"{report.machine['cpus']} CPUs. Synthetic activations, as in the tables; medians over the "
        "tokens after the cache was brought into its steady state. Made by:\n\n"
        f"    {report.command}\n\n" + tables.table(columns, lines)
    )


def _named(report: Report) -> Iterator[tuple[str, Row]]:
    for share, row in zip(report.shares, report.rows, strict=True):
        yield f"{share:.0%}", row
    yield "all resident", report.resident


def draw(report: Report, path: Path) -> None:
    """Tokens per second by budget; PNG or SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ran = [
        (100 * share, 1 / row.seconds)
        for share, row in zip(report.shares, report.rows, strict=True)
        if row.seconds is not None
    ]
    axes.plot(*zip(*ran, strict=True), marker="o", label="within the limit")
    if report.resident.seconds is not None:
        resident = 1 / report.resident.seconds
        axes.axhline(resident, color="black", linestyle="--", label="all in memory, no limit")
    axes.set_xlabel("memory limit (% of the file's bytes)")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{report.model}'s shape; synthetic activations", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())

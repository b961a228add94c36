"""Tokens per second, and I/O, against the memory that a model may use, each under a real limit.

    python -m bench.budgets --folder /big/disk --json budgets.json --plot budgets.png

The same trace as in `bench.paper_tables` is replayed in a process of its own for each budget and
each policy of the neuron cache, in a control group with that limit, and once without a limit and
with every neuron in memory. Beside the I/O that was measured stands what the planner foresees of
it; it knows nothing of reading ahead, so `--step bundling` is what to compare it with.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench import paper_tables
from bench.paper import tables
from bench.paper.planned import Planner, Reads
from bench.paper.records import Settings
from bench.paper.running import Row, run
from bench.paper_tables import add_arguments, commit, facts, files, publish, say, today
from bundlefmt.errors import BundleError
from bundlefmt.runtime.memory import POLICIES
from bundlefmt.storage.device import available_memory

PLANNED = "lfu"  # the policy that the planner counts by
SHARES = tuple(range(20, 101, 10))  # of the file, percent


@dataclass(frozen=True)
class Run:
    """One budget: a `share` of the file's bytes (None: no limit, everything in memory), and what
    was planned for it (None for what the planner does not know)."""

    share: float | None
    policy: str
    row: Row
    planned: Reads | None


@dataclass(frozen=True)
class Report:
    """All budgets of a model."""

    model: str
    step: str
    file_bytes: int
    runs: list[Run]
    machine: dict[str, Any]
    date: str
    commit: str
    command: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES, help="budgets, percent")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["lfu"])
    parser.add_argument("--step", choices=tables.TITLES, default=tables.BEST, help="how it is run")
    parser.add_argument("--tokens", type=int, default=20, help="measured of each")
    parser.add_argument("--heading", default="tokens per second against memory", help="in results")
    args = parser.parse_args()
    try:
        report = measure(args)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    publish(args, markdown(report), asdict(report), lambda path: draw(report, path), args.heading)
    return 0


def measure(args: argparse.Namespace) -> Report:
    """Run all budgets."""
    bundle, _ = files(args)
    size = bundle.stat().st_size
    planner = Planner(str(bundle), args.model)
    settings = Settings(
        step=args.step,
        bundle=str(bundle),
        checkpoint=None,
        model=args.model,
        limit=0,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
    )

    def one(share: float | None, policy: str) -> Run:
        limit = available_memory() if share is None else int(size * share)
        row = run(msgspec.structs.replace(settings, limit=limit, policy=policy), args.seconds)
        planned = None
        if share is not None and row.caching is not None and policy == PLANNED:
            planned = planner.reads(row.caching)
        found = Run(share, policy, row, planned)
        say(f"{_name(found)}, {policy}: {rate(row)} tokens/s {row.note or ''}")
        return found

    shares = [share / 100 for share in args.shares]
    return Report(
        model=args.model,
        step=args.step,
        file_bytes=size,
        runs=[one(share, policy) for share in shares for policy in args.policies]
        + [one(None, PLANNED)],
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
            _name(each),
            each.policy,
            tables.gigabytes(each.row.limit),
            tables.gigabytes(each.row.anonymous_peak),
            "-" if each.row.cache_share is None else f"{each.row.cache_share:.0%}",
            tables.gigabytes(each.row.nbytes, 3),
            "-" if each.planned is None else tables.gigabytes(each.planned.nbytes, 3),
            tables.milliseconds(each.row.io),
            "-" if each.planned is None else tables.milliseconds(each.planned.seconds),
            tables.milliseconds(each.row.seconds),
            rate(each.row),
            each.row.note or "",
        ]
        for each in report.runs
    ]
    columns = ["memory / file", "policy", "limit GB", "DRAM GB", "cache / FFN"]
    columns += ["read GB per token", "planned GB", "I/O ms", "planned ms"]
    columns += ["ms per token", "tokens/s", "note"]
    return (
        f"{report.date}, commit {report.commit}. {report.machine['cpu']}, "
        f"{report.machine['cpus']} CPUs; {tables.TITLES[report.step]}. Synthetic activations, as "
        "in the tables; medians over the tokens after the cache was brought into its steady state. "
        "Planned: what the cost model says of the device's calibration, without reading ahead. "
        f"Made by:\n\n    {report.command}\n\n" + tables.table(columns, lines)
    )


def _name(found: Run) -> str:
    return "all resident" if found.share is None else f"{found.share:.0%}"


def draw(report: Report, path: Path) -> None:
    """Tokens per second by budget, a line for each policy; PNG or SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for each in report.runs:
        if each.row.seconds is None:
            continue
        if each.share is None:
            label = "all in memory, no limit"
            axes.axhline(1 / each.row.seconds, color="black", linestyle="--", label=label)
        else:
            lines[each.policy].append((100 * each.share, 1 / each.row.seconds))
    for policy, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"within the limit, {policy}")
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

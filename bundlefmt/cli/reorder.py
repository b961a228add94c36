"""bundlefmt reorder: a file in which neurons that fire together are neighbours."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from bundlefmt.cli import arguments, output
from bundlefmt.errors import printable

if TYPE_CHECKING:
    from bundlefmt.ordering import Reordered

HELP = "write a file in which neurons that fire together are neighbours, so that reads are fewer"
GAP = 32 << 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="a bundle file")
    parser.add_argument(
        "--traces", required=True, metavar="DIR", help="the folder that `trace` wrote"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the file to write (default: the model's name with .ordered.bundle)",
    )
    parser.add_argument(
        "--gap",
        type=arguments.parse_size,
        default=GAP,
        metavar="SIZE",
        help="unwanted bytes that the report reads over to save a request",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the file, and print what its order saves."""
    from bundlefmt.ordering import reorder

    with output.progress("reordering") as progress:
        report = reorder(
            args.model,
            args.traces,
            args.output,
            gap=args.gap,
            force=args.force,
            progress=progress,
        )
    if args.json:
        output.print_json(asdict(report))
        return 0
    print(
        f"{printable(report.path)}: {output.size(report.file_bytes)} in {report.seconds:.1f} s; "
        f"per token, on {report.tokens:,} held-out tokens, without gaps and with gaps of "
        f"{output.size(report.gap)}:"
    )
    output.print_table(
        [
            *("layer", "active", "run before", "after", "requests before", "after", "fewer"),
            *("with gaps before", "after", "unwanted before", "after"),
        ],
        [_cells(row) for row in [*report.layers, report.total]],
    )
    return 0


def _cells(row: Reordered) -> list[str]:
    before, after = row.before, row.after
    return [
        "all" if row.layer is None else str(row.layer),
        f"{row.active:.1f}",
        f"{before.run_length:.2f}",
        f"{after.run_length:.2f}",
        f"{before.requests:.1f}",
        f"{after.requests:.1f}",
        output.share(before.requests - after.requests, before.requests),
        f"{row.before_gap.requests:.1f}",
        f"{row.after_gap.requests:.1f}",
        output.size(row.before_gap.unwanted_bytes),
        output.size(row.after_gap.unwanted_bytes),
    ]

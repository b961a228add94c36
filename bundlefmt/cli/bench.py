"""bundlefmt bench: random reads of a device or of a bundle file."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bundlefmt.cli import arguments, output

SIZE = 1 << 30
HELP = "measure random reads through each backend, cold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", nargs="?", help="a bundle file (default: a temporary file)")
    parser.add_argument(
        "--chunk-size",
        type=arguments.parse_sizes,
        metavar="SIZES",
        help="bytes per read, such as 4K,16K,64K; of a model, as many neighbouring bundles "
        "(default: one bundle)",
    )
    parser.add_argument(
        "--threads",
        type=arguments.parse_counts,
        default=[arguments.THREADS],
        metavar="COUNTS",
        help="reading threads, such as 1,8,32",
    )
    parser.add_argument("--backend", choices=arguments.BACKENDS, help="default: all of them")
    parser.add_argument("--dir", default=".", help="where the temporary file goes")
    parser.add_argument(
        "--size", type=arguments.parse_size, default=SIZE, help="of the temporary file"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="compare readers on the same batch of the model's neurons, fio as the ceiling",
    )
    arguments.add_reading(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print a table."""
    if args.peers:
        return _compare(args)
    from bundlefmt.measurement import bench

    with output.progress("measuring", in_bytes=False) as progress:
        rows = bench(
            args.model,
            chunk_sizes=args.chunk_size,
            threads=args.threads,
            backend=args.backend,
            folder=args.dir,
            size=args.size,
            verify=not args.no_verify,
            progress=progress,
        )
    if args.json:
        output.print_json({"rows": [asdict(row) for row in rows]})
        return 0
    output.print_table(
        [
            "reads",
            "chunk",
            "backend",
            "threads",
            "verify",
            "MB/s",
            "least..most",
            "reads/s",
            "median µs",
            "p99 µs",
            "CPU µs/read",
            "repeats x reads",
        ],
        [
            [
                row.reads,
                output.size(row.chunk_bytes),
                row.backend,
                row.threads,
                "yes" if row.verify else "no",
                f"{row.bytes_per_second / 1e6:,.0f}",
                f"{row.least_bytes_per_second / 1e6:,.0f}..{row.most_bytes_per_second / 1e6:,.0f}",
                f"{row.requests_per_second:,.0f}",
                f"{row.latency_median_us:,.0f}",
                f"{row.latency_p99_us:,.0f}",
                f"{row.cpu_us_per_read:.1f}",
                f"{row.repetitions} x {row.requests}",
            ]
            for row in rows
        ],
    )
    return 0


def _compare(args: argparse.Namespace) -> int:
    from bundlefmt.errors import UsageError
    from bundlefmt.measurement.peers import compare

    if args.model is None:
        raise UsageError("a comparison needs a bundle file", field="peers")
    rows = compare(args.model)
    if args.json:
        output.print_json({"rows": [asdict(row) for row in rows]})
        return 0
    output.print_table(
        ["reader", "MB/s", "least..most", "CPU µs/read", "remark"],
        [
            [row.peer, "-", "-", "-", row.missing]
            if row.missing
            else [
                row.peer,
                f"{row.bytes_per_second / 1e6:,.0f}",
                f"{row.least_bytes_per_second / 1e6:,.0f}..{row.most_bytes_per_second / 1e6:,.0f}",
                f"{row.cpu_us_per_read:.1f}",
                "",
            ]
            for row in rows
        ],
    )
    return 0

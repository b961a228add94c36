"""bundlefmt bench: random reads of a device or of a bundle file."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING

from bundlefmt.cli import arguments, output

if TYPE_CHECKING:
    from bundlefmt.measurement import BenchRow
    from bundlefmt.measurement.peers import PeerRow

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
        "--backend",
        choices=arguments.BACKENDS,
        help="the backend to measure (default: all of them)",
    )
    parser.add_argument(
        "--queue-depth",
        type=arguments.parse_counts,
        default=[arguments.QUEUE_DEPTH],
        metavar="COUNTS",
        help="reads in flight of uring, such as 16,64,128",
    )
    parser.add_argument(
        "--threads",
        type=arguments.parse_counts,
        default=[arguments.THREADS],
        metavar="COUNTS",
        help="reading threads of the other backends, such as 1,8,32",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=arguments.BATCH,
        metavar="N",
        help=f"neurons (without a model: reads) in a batch, two batches in flight "
        f"(default: {arguments.BATCH})",
    )
    parser.add_argument(
        "--order",
        choices=arguments.ORDERS,
        default=arguments.ORDERS[0],
        help="order of the reads within a batch",
    )
    parser.add_argument(
        "--adjacent",
        type=arguments.parse_share,
        default=0.0,
        metavar="SHARE",
        help="share of a batch's neurons that are neighbours in the file, such as 0.25",
    )
    parser.add_argument("--dir", default=".", help="where the temporary file goes")
    parser.add_argument(
        "--size", type=arguments.parse_size, default=SIZE, help="size of the temporary file"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="compare readers on the same batches of the model's neurons, fio as the ceiling",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw throughput against chunk size: .png or .svg"
    )
    arguments.add_reading(parser)
    arguments.add_core(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print a table."""
    if args.peers:
        return _compare(args)
    from bundlefmt.measurement import bench, plot

    if args.plot:
        plot.check(args.plot)
    with output.progress("measuring", in_bytes=False) as progress:
        measured = bench(
            args.model,
            chunk_sizes=args.chunk_size,
            threads=args.threads,
            queue_depths=args.queue_depth,
            backend=args.backend,
            batch=args.batch,
            order=args.order,
            adjacent=args.adjacent,
            folder=args.dir,
            size=args.size,
            verify=not args.no_verify,
            ceiling=args.plot is not None,
            progress=progress,
        )
    if args.plot:
        plot.draw(measured, args.plot)
    if args.json:
        output.print_json(asdict(measured))
        return 0
    _print_rows(measured.rows)
    row = measured.rows[0]
    settings = f"{row.order} order, {output.share(row.adjacent, 1)} adjacent"
    settings += ", verified" if row.verify else ", not verified"
    remarks = [("settings", settings), ("cold", measured.machine["cold"])]
    remarks += measured.unusable.items()
    for found in measured.ceilings:
        rate = f"{output.size(found.chunk_bytes)}: {found.bytes_per_second / 1e6:,.0f} MB/s"
        remarks.append(("fio", f"{rate} at depth {found.depth}"))
    if args.plot and measured.no_ceiling:
        remarks.append(("fio", measured.no_ceiling))
    output.print_fields(remarks)
    return 0


def _print_rows(rows: list[BenchRow]) -> None:
    output.print_table(
        [
            "reads",
            "chunk",
            "backend",
            "in flight",
            "batch",
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
                row.queue_depth or row.threads,
                row.batch,
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


def _compare(args: argparse.Namespace) -> int:
    from bundlefmt.errors import UsageError
    from bundlefmt.measurement.peers import compare

    if args.model is None:
        raise UsageError("a comparison needs a bundle file", field="peers")
    for option, given in (("chunk_size", args.chunk_size), ("plot", args.plot)):
        if given:
            raise UsageError("a comparison reads bundle by bundle: no other sizes", field=option)
    for option, counts in (("queue_depth", args.queue_depth), ("threads", args.threads)):
        if len(counts) != 1:
            raise UsageError("a comparison takes one", field=option, found=len(counts))
    with output.progress("comparing", in_bytes=False) as progress:
        found = compare(
            args.model,
            backend=args.backend or "auto",
            threads=args.threads[0],
            queue_depth=args.queue_depth[0],
            batch=args.batch,
            order=args.order,
            adjacent=args.adjacent,
            progress=progress,
        )
    if args.json:
        output.print_json(
            asdict(found)
            | {"rows": [asdict(r) | {"bytes_per_second": r.bytes_per_second} for r in found.rows]}
        )
        return 0
    output.print_table(
        ["reader", "neurons", "MB/s", "least..most", "of fio", "CPU µs/read", "of fio", "remark"],
        [_peer_cells(row) for row in found.rows],
    )
    output.print_fields(
        [
            *((title, f"{ratio:.2f}") for title, ratio in found.ratios.items()),
            ("settings", ", ".join(f"{name} {value}" for name, value in found.settings.items())),
            ("cold", found.machine["cold"]),
        ]
    )
    return 0


def _peer_cells(row: PeerRow) -> list[object]:
    if row.missing:
        return [row.peer, *"------", row.missing]
    rates = [rate / 1e6 for rate in row.bytes_per_second]
    return [
        row.peer,
        row.neurons,
        f"{median(rates):,.0f}",
        f"{min(rates):,.0f}..{max(rates):,.0f}",
        "-" if row.of_ceiling is None else f"{row.of_ceiling:.2f}",
        f"{median(row.cpu_us_per_read):.1f}",
        "-" if row.cpu_of_ceiling is None else f"{row.cpu_of_ceiling:.2f}",
        row.remark,
    ]

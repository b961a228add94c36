"""bundlefmt calibrate: what reads from a device cost."""

from __future__ import annotations

import argparse

from bundlefmt.cli import arguments, output

SIZE = 1 << 30
SECONDS = 15.0
HELP = "measure a device once, so that plan can tell times"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument(
        "path",
        nargs="?",
        default=".",
        help="a folder on the device, or a bundle file to measure on (default: this folder)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help=f"for how long, about; longer is steadier (default: {SECONDS:.0f})",
    )
    parser.add_argument(
        "--size",
        type=arguments.parse_size,
        default=SIZE,
        help="size of the temporary file in a folder",
    )
    arguments.add_core(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, keep and print what was found."""
    import msgspec

    from bundlefmt.measurement.calibration import calibrate

    with output.progress("calibrating", in_bytes=False) as progress:
        found = calibrate(args.path, size=args.size, seconds=args.seconds, progress=progress)
    if args.json:
        output.print_json(msgspec.to_builtins(found))
        return 0
    profile = found.profile
    rates = [profile.seconds_per_request(cost.bytes) for cost in profile.sizes]
    output.print_table(
        ["request", "one µs", "of many µs", "MB/s", "reads/s", "CPU µs/read", "break-even gap"],
        [
            [
                output.size(cost.bytes),
                f"{profile.batch_seconds(1, cost.bytes) * 1e6:,.0f}",
                f"{each * 1e6:,.1f}",
                f"{cost.bytes / each / 1e6:,.0f}",
                f"{1 / each:,.0f}",
                f"{cost.cpu_seconds * 1e6:.1f}",
                output.size(gap.break_even_gap),
            ]
            for cost, gap, each in zip(profile.sizes, found.gaps, rates, strict=True)
        ],
    )
    fallback = f" ({found.fallback})" if found.fallback else ""
    output.print_fields(
        [
            ("device", profile.device),
            ("backend", f"{profile.backend}{fallback}, {profile.in_flight} in flight"),
            ("in sequence", f"{profile.sequential_bytes_per_second / 1e6:,.0f} MB/s"),
            ("weights in memory", f"{profile.compute_bytes_per_second / 1e9:,.1f} GB/s, f16"),
            ("cold", found.machine["cold"]),
            ("rounds", found.rounds),
            ("kept in", found.path),
        ]
    )
    return 0

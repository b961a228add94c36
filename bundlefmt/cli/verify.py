"""bundlefmt verify: the proof that a bundle file is whole."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bundlefmt.cli import arguments, output
from bundlefmt.errors import printable

HELP = "check a bundle file's structure and every checksum"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="a bundle file")
    parser.add_argument("--quick", action="store_true", help="leave out bundles, tensors and gaps")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Verify; 0 when the file is whole, 1 when it is not."""
    from bundlefmt.convert.verify import verify

    with output.progress("verifying") as progress:
        report = verify(args.model, quick=args.quick, progress=progress)
    if args.json:
        output.print_json({"ok": report.ok, **asdict(report)})
    elif report.ok:
        rate = output.size(report.checked_bytes / max(report.seconds, 1e-9))
        print(
            f"{printable(report.path)}: ok, {output.size(report.checked_bytes)} checked, {rate}/s"
        )
    else:
        others = report.fault_count - 1
        print(report.faults[0] + (f" (and {others} more faults)" if others else ""))
    if not args.json:
        for note in report.notes:
            print(f"note: {note}")
    return 0 if report.ok else 1

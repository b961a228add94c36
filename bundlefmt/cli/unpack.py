"""bundlefmt unpack: the original files back."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from bundlefmt.cli import arguments, output
from bundlefmt.errors import printable

HELP = "write back the files that were packed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="a bundle file")
    parser.add_argument("-o", "--output", required=True, help="the folder to write into")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Unpack and report."""
    from bundlefmt.convert.unpack import unpack

    with output.progress("unpacking") as progress:
        report = unpack(args.model, args.output, progress=progress)
    if args.json:
        output.print_json(asdict(report))
        return 0
    for name in report.files:
        print(printable(Path(report.folder, name)))
    if report.identical:
        print("byte-identical to the files that were packed")
    else:
        print(f"{len(report.reencoded)} tensors were re-encoded: these hold the stored values")
    return 0

"""bundlefmt pack: a checkpoint into a bundle file."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from bundlefmt.cli import arguments, output
from bundlefmt.errors import printable

HELP = "write the bundle file of a checkpoint"
DTYPES = ("keep", "f32", "f16", "bf16", "q8_0", "q4_0")
_NAMES = 4  # unused tensors named in the report
ALIGNMENTS = ("auto", "512", "4096", "16384", "65536")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument(
        "source", help="a .safetensors file, a folder with one, or a model.safetensors.index.json"
    )
    parser.add_argument("-o", "--output", help="the file to write (default: SOURCE.bundle)")
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="the family whose rules to use, where config.json's model_type is not known",
    )
    parser.add_argument("--dtype", default="keep", choices=DTYPES, help="encoding of the bundles")
    parser.add_argument(
        "--align", default="auto", choices=ALIGNMENTS, help="alignment of each bundle, in bytes"
    )
    parser.add_argument(
        "--resident",
        choices=("gate", "up"),
        help="leave this part out of the bundles, to be held in DRAM",
    )
    parser.add_argument(
        "--zstd", action="store_true", help="compress resident tensors and carried files"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Pack and report."""
    from bundlefmt.packing import pack

    with output.progress("packing") as progress:
        report = pack(
            args.source,
            args.output,
            family=args.family,
            dtype=args.dtype,
            align=args.align,
            resident=args.resident,
            zstd=args.zstd,
            force=args.force,
            dry_run=args.dry_run,
            progress=progress,
        )
    for note in report.notes:
        print(printable(f"bundlefmt pack: {args.source}: {note}"), file=sys.stderr)
    if args.json:
        output.print_json(asdict(report))
        return 0
    padding = f"{output.size(report.padding_bytes)} of padding"
    names = ", ".join(report.unused[:_NAMES] + ["..."] * (len(report.unused) > _NAMES))
    tensors = f"{len(report.unused)} tensor{'s' * (len(report.unused) != 1)}"
    unused = f"{output.size(report.unused_bytes)} in {tensors}: {names}"
    output.print_fields(
        [
            ("would write" if report.dry_run else "wrote", report.path),
            ("family", f"{report.family}, {report.activation}"),
            ("groups", f"{report.groups} in {report.layers} layers, {report.neurons:,} neurons"),
            (
                "bundles",
                f"{output.size(report.bundle_bytes)}, {padding}: "
                f"{output.share(report.unit_share, 1)} of the weights",
            ),
            ("resident", output.size(report.resident_bytes)),
            *([("unused", unused)] if report.unused else []),
            (
                "disk needed" if report.dry_run else "file",
                f"{output.size(report.file_bytes)} (checkpoint: "
                f"{output.size(report.source_bytes)})",
            ),
            ("runs", "yes" if report.runs else f"no: {report.why_not}"),
            ("seconds", f"{report.seconds:.2f}"),
        ]
    )
    return 0

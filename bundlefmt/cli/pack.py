"""bundlefmt pack: a checkpoint into a bundle file."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bundlefmt.cli import arguments, output

HELP = "write the bundle file of a checkpoint"
DTYPES = ("keep", "f32", "f16", "bf16", "q8_0", "q4_0")
ALIGNMENTS = ("auto", "512", "4096", "16384", "65536")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument(
        "source", help="a .safetensors file, a folder with one, or a model.safetensors.index.json"
    )
    parser.add_argument("-o", "--output", help="the file to write (default: SOURCE.bundle)")
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
    from bundlefmt.convert.pack import pack

    with output.progress("packing") as progress:
        report = pack(
            args.source,
            args.output,
            dtype=args.dtype,
            align=args.align,
            resident=args.resident,
            zstd=args.zstd,
            force=args.force,
            dry_run=args.dry_run,
            progress=progress,
        )
    if args.json:
        output.print_json(asdict(report))
        return 0
    padding = f"{output.size(report.padding_bytes)} of padding"
    output.print_fields(
        [
            ("would write" if report.dry_run else "wrote", report.path),
            ("family", f"{report.family}, {report.activation}"),
            ("groups", f"{report.groups} in {report.layers} layers, {report.neurons:,} neurons"),
            ("bundles", f"{output.size(report.bundle_bytes)}, {padding}"),
            ("resident", output.size(report.resident_bytes)),
            (
                "disk needed" if report.dry_run else "file",
                f"{output.size(report.file_bytes)} (checkpoint: "
                f"{output.size(report.source_bytes)})",
            ),
            ("seconds", f"{report.seconds:.2f}"),
        ]
    )
    return 0

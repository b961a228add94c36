"""bundlefmt trace: record which neurons a text needs."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bundlefmt.cli import arguments, output
from bundlefmt.errors import printable

HELP = "record the active neurons of a dense run, to train predictors on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="a bundle file")
    parser.add_argument("--text", required=True, metavar="FILE", help="the text to run over")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="the folder to write (default: the model's name with .traces)",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="run over only so many tokens (default: all)"
    )
    arguments.add_core(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Record and print what was active."""
    from bundlefmt.prediction import trace

    with output.progress("tracing", in_bytes=False) as progress:
        report = trace(
            args.model, args.text, args.output, max_tokens=args.max_tokens, progress=progress
        )
    if args.json:
        output.print_json(asdict(report))
        return 0
    print(f"{printable(report.path)}: {report.tokens:,} tokens in {report.seconds:.1f} s")
    output.print_table(
        ["layer", "neurons", "active"],
        [
            [layer.layer, f"{layer.neurons:,}", output.share(layer.active_share, 1)]
            for layer in report.layers
        ],
    )
    return 0

"""bundlefmt demo: the small model that ships with the package, dense against exact."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bundlefmt.cli import arguments, output

HELP = "pack the small model that ships with the package and generate from it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    arguments.add_core(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo; 1 when the modes disagree."""
    from bundlefmt.demonstration import demo

    report = demo()
    if args.json:
        output.print_json({"same_text": report.same_text, **asdict(report)})
        return 0 if report.same_text else 1
    output.print_text(f"{report.prompt}{report.runs[0].text}\n")
    output.print_table(
        [
            "mode",
            "tokens/s",
            "read per token",
            "of the FFN",
            "requests per token",
            "I/O s",
            "compute s",
        ],
        [
            [
                run.mode,
                f"{run.tokens_per_second:.1f}",
                output.size(run.bytes_read_per_token),
                output.share(run.bytes_read_per_token, run.ffn_bytes),
                f"{run.requests_per_token:.0f}",
                f"{run.io_seconds:.2f}",
                f"{run.compute_seconds:.2f}",
            ]
            for run in report.runs
        ],
    )
    print("same text in both modes" if report.same_text else "the modes gave different texts")
    return 0 if report.same_text else 1

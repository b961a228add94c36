"""bundlefmt eval: how well a model predicts a text, and how near a mode stays to dense."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bundlefmt.cli import arguments, output
from bundlefmt.cli.run import MODES

HELP = "score a text: perplexity, and agreement of a mode with dense"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="a bundle file")
    parser.add_argument("--text", required=True, metavar="FILE", help="the UTF-8 text to score")
    parser.add_argument("--mode", default="dense", choices=MODES, help="as in run")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="score only so many tokens of the text (default: all)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens that are seen at once (default: the model's context, at most 512)",
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        default=None,
        help="feed tokens as generation does, each with reads of its own (default: with --memory, "
        "and in the modes predict and topk)",
    )
    arguments.add_caching(parser)
    arguments.add_core(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Score and print a row per mode."""
    from bundlefmt.runtime.evaluate import evaluate

    with output.progress("scoring", in_bytes=False) as progress:
        report = evaluate(
            args.model,
            args.text,
            mode=args.mode,
            memory=args.memory,
            policy=args.policy,
            window=args.window,
            one_at_a_time=args.one_at_a_time,
            max_tokens=args.max_tokens,
            context=args.context,
            progress=progress,
        )
    if args.json:
        output.print_json(asdict(report))
        return 0
    rows = [report] if report.dense is None else [report.dense, report]
    output.print_table(
        [
            "mode",
            "tokens",
            "nats/token",
            "perplexity",
            "bits/byte",
            "fed at once",
            "read per token",
            "of the FFN",
            "seconds",
        ],
        [
            [
                row.mode,
                row.tokens,
                f"{row.nll:.4f}",
                f"{row.perplexity:.3f}",
                f"{row.bits_per_byte:.4f}",
                row.tokens_at_once,
                output.size(row.bytes_read_per_token),
                output.share(row.bytes_read_per_token, row.ffn_bytes),
                f"{row.seconds:.1f}",
            ]
            for row in rows
        ],
    )
    if report.top1_agreement is not None:
        print(
            f"against dense: same likeliest token {100 * report.top1_agreement:.2f} %, "
            f"KL {report.kl:.3g} nats/token"
        )
    return 0

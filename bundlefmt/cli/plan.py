"""bundlefmt plan: what a model would do with so much memory."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from bundlefmt.cli import arguments, output
from bundlefmt.cli.run import MODES

if TYPE_CHECKING:
    from bundlefmt.planning import Plan
    from bundlefmt.planning.advice import Advice

HELP = "show how memory would be divided, and what a token would take"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="a bundle file")
    parser.add_argument(
        "--memory",
        type=arguments.parse_size,
        required=True,
        metavar="SIZE",
        help="of the whole process, such as 7GiB",
    )
    parser.add_argument("--mode", default="dense", choices=MODES, help="as in run")
    parser.add_argument(
        "--share", type=float, default=0.3, help="of the neurons, that mode topk takes"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="of the longest text, prompt included"
    )
    parser.add_argument(
        "--traces", metavar="DIR", help="what trace recorded: which neurons are active"
    )
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Plan and print."""
    from bundlefmt.planning import plan

    with output.progress("replaying", in_bytes=False) as progress:
        found = plan(
            args.model,
            args.memory,
            mode=args.mode,
            share=args.share,
            tokens=args.tokens,
            traces=args.traces,
            progress=progress,
        )
    if args.json:
        output.print_json(asdict(found))
        return 0
    output.print_table(
        ["memory", "bytes", "of the limit"],
        [
            [name.replace("_", " "), output.size(n), output.share(n, found.memory)]
            for name, n in found.split.items()
        ],
    )
    output.print_table(
        ["a token's", "bytes", "requests", "ms"],
        [
            [
                stage.name,
                output.size(stage.bytes),
                f"{stage.requests:,.0f}" if stage.requests else "-",
                "-" if stage.milliseconds is None else f"{stage.milliseconds:,.1f}",
            ]
            for stage in found.stages
        ],
    )
    total = found.milliseconds_per_token
    output.print_fields(
        [
            ("mode, tokens", f"{found.mode}, a text of {found.tokens:,}"),
            (
                "cache",
                f"{output.share(found.cached_share, 1)} of the FFN ("
                f"{output.size(found.ffn_bytes)}), a window of {found.window} tokens",
            ),
            ("streamed", f"the attention of {len(found.streamed)} layers"),
            (
                "active",
                f"{output.share(found.active_share, 1)} of the neurons, "
                f"{output.share(found.hit_rate, 1)} of them in the cache",
            ),
            (found.activity, found.activity_from),
            ("a token", found.untimed or f"{total:,.1f} ms, what overlaps counted once"),
            *(("better", _advised(line, found)) for line in found.advice),
        ]
    )
    return 0


def _advised(line: Advice, plan: Plan) -> str:
    """`1.2 GiB more memory: a window of 5 tokens, 0.200 GB per token instead of 0.350`"""
    if line.bytes_per_token is None:
        return line.change
    read = f"{line.bytes_per_token / 1e9:.3f} GB per token instead of "
    read += f"{plan.bytes_per_token / 1e9:.3f}"
    if line.memory is None:
        return f"{line.change}: {read}"
    window = "all neurons in the cache"
    if line.window is not None:
        window = f"a window of {line.window} tokens"
    return f"{output.size(line.memory - plan.memory)} {line.change}: {window}, {read}"

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
    parser.add_argument("--mode", default="dense", choices=MODES, help="as in run")
    parser.add_argument(
        "--share", type=float, default=0.3, help="share of the neurons that mode topk takes"
    )
    arguments.add_caching(parser, required=True)
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens of the longest text, prompt and new ones included (default: the model's "
        "context, at most 2048)",
    )
    parser.add_argument("--draft", metavar="FILE", help="as in run")
    parser.add_argument("--threads", type=int, default=arguments.THREADS, help="as in run")
    parser.add_argument(
        "--traces",
        metavar="DIR",
        help="the folder that `trace` wrote, which tells what neurons are active",
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
            policy=args.policy,
            window=args.window,
            tokens=args.tokens,
            draft=args.draft,
            threads=args.threads,
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
            ("mode, policy", f"{found.mode}, {found.policy}"),
            ("for a text of", f"up to {found.tokens:,} tokens (--tokens)"),
            ("least memory", f"{found.least_memory >> 20} MiB for that text"),
            ("cache", _cache(found)),
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


def _cache(found: Plan) -> str:
    """`12.0 % of the FFN (4.0 GiB), a window of 3 tokens`"""
    if found.policy == "none":
        return "the operating system's"
    window = f"a window of {found.window} tokens" if found.window else "less than a token's"
    share = output.share(found.cached_share, 1)
    return f"{share} of the FFN ({output.size(found.ffn_bytes)}), {window}"


def _advised(line: Advice, plan: Plan) -> str:
    """`1.2 GiB more memory, --memory 4096MiB: a window of 5 tokens, 0.2 GiB per token ...`"""
    if line.bytes_per_token is None:
        return line.change
    read = f"{output.size(line.bytes_per_token)} per token instead of "
    read += output.size(plan.bytes_per_token)
    if line.memory is None:
        return f"{line.change}: {read}"
    window = "all neurons in the cache"
    if line.window is not None:
        window = f"a window of {line.window} tokens"
    more = output.size(line.memory - plan.memory)
    return f"{more} {line.change}, --memory {line.memory >> 20}MiB: {window}, {read}"

"""bundlefmt run: text from a bundle file."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict

from bundlefmt.cli import arguments, output

HELP = "generate text, with the FFN read from flash"
MODES = ("dense", "exact", "predict", "topk")
DRAFT_TOKENS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="a bundle file")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens to generate, at most"
    )
    parser.add_argument(
        "--mode",
        default="dense",
        choices=MODES,
        help="dense reads every neuron; exact, for ReLU-like models, only the active ones; "
        "predict, for ReLU-like models, those that predictors name, and topk the strongest ones: "
        "both are approximations",
    )
    parser.add_argument(
        "--share", type=float, default=0.3, help="share of the neurons that mode topk takes"
    )
    arguments.add_caching(parser)
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="temperature of the sampling; 0 takes the likeliest",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="share of probability that sampling keeps (nucleus sampling)",
    )
    parser.add_argument("--seed", type=int, help="seed of the sampling")
    parser.add_argument(
        "--draft",
        metavar="FILE",
        help="a small model with the same tokenizer, for speculative decoding; held in memory",
    )
    parser.add_argument(
        "--draft-tokens",
        type=int,
        default=DRAFT_TOKENS,
        metavar="N",
        help="tokens that the draft proposes for each pass",
    )
    parser.add_argument(
        "--backend", default="auto", choices=arguments.BACKENDS, help="how to read the file"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=arguments.THREADS,
        help="reading threads of the other backends",
    )
    parser.add_argument(
        "--queue-depth",
        type=int,
        default=arguments.QUEUE_DEPTH,
        metavar="N",
        help="reads in flight of the uring backend",
    )
    parser.add_argument(
        "--compute-threads",
        type=int,
        metavar="N",
        help="threads to compute with (default: one for each CPU)",
    )
    parser.add_argument(
        "--timeline",
        metavar="FILE.svg",
        help="draw in this file where the time of the last pass went",
    )
    arguments.add_reading(parser)
    arguments.add_core(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Generate, printing the text as it comes and then how it went."""
    from bundlefmt.runtime.run import run as generate

    prompt = unshown = arguments.text_of(args.prompt)
    loading = ExitStack()

    def show(piece: str) -> None:
        nonlocal unshown
        loading.close()  # the bar would take what is written for its own
        if not args.json:
            output.print_text(unshown + piece)
            unshown = ""

    with loading:
        report = generate(
            args.model,
            prompt,
            args.max_new_tokens,
            mode=args.mode,
            share=args.share,
            memory=args.memory,
            policy=args.policy,
            window=args.window,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            draft=args.draft,
            draft_tokens=args.draft_tokens,
            backend=args.backend,
            verify=not args.no_verify,
            threads=args.threads,
            queue_depth=args.queue_depth,
            compute_threads=args.compute_threads,
            timeline=args.timeline,
            on_text=show,
            progress=loading.enter_context(output.progress("loading layers", in_bytes=False)),
        )
    if args.json:
        output.print_json(asdict(report))
        return 0
    print("\n")
    fallback = f" ({report.fallback})" if report.fallback else ""
    draft = []
    if report.draft is not None:
        tokens = f"{report.draft.accepted} of {report.draft.proposed} tokens accepted"
        share = output.share(report.draft.accepted, report.draft.proposed)
        draft = [("draft", f"{tokens} ({share}), {report.draft.tokens_per_pass:.2f} per pass")]
    output.print_fields(
        [
            ("mode, backend", f"{report.mode}, {report.backend}{fallback}"),
            ("tokens/s", f"{report.tokens_per_second:.1f}"),
            *draft,
            (
                "read per token",
                f"{output.size(report.bytes_read_per_token)} in "
                f"{report.requests_per_token:.0f} requests, of {output.size(report.ffn_bytes)} "
                "of FFN",
            ),
            ("read amplification", f"{report.read_amplification:.2f}"),
            ("I/O, compute", f"{report.io_seconds:.2f} s, {report.compute_seconds:.2f} s"),
            (
                "ms per token",
                ", ".join(
                    f"{stage} {1e3 * seconds:.1f}"
                    for stage, seconds in report.stage_seconds_per_token.items()
                ),
            ),
            ("peak memory", output.size(report.peak_memory)),
        ]
    )
    return 0

"""bundlefmt train-predictors: predictors of active neurons, into the bundle file."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bundlefmt.cli import arguments, output
from bundlefmt.errors import printable

HELP = "train predictors of active neurons on a trace, and append them to the bundle file"
RANK, RECALL, EPOCHS = 128, 0.95, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="a bundle file, which gets the predictors")
    parser.add_argument(
        "--traces", required=True, metavar="DIR", help="the folder that `trace` wrote"
    )
    parser.add_argument(
        "--rank", type=int, default=RANK, metavar="N", help="rank of each predictor"
    )
    parser.add_argument(
        "--last-layers", type=int, default=0, metavar="N", help="how many layers get --last-rank"
    )
    parser.add_argument("--last-rank", type=int, metavar="N", help="rank in the last layers")
    parser.add_argument(
        "--recall",
        type=float,
        default=RECALL,
        metavar="SHARE",
        help="the share of active neurons to find, which sets the thresholds",
    )
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, metavar="N", help="how often to go over the trace"
    )
    arguments.add_core(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train, append, and print how well each layer's predictor does."""
    from bundlefmt.prediction import train_predictors

    with output.progress("training", in_bytes=False) as progress:
        report = train_predictors(
            args.model,
            args.traces,
            rank=args.rank,
            last_layers=args.last_layers,
            last_rank=args.last_rank,
            recall=args.recall,
            epochs=args.epochs,
            progress=progress,
        )
    if args.json:
        output.print_json(asdict(report))
        return 0
    print(
        f"{printable(report.path)}: generation {report.generation}, predictors of "
        f"{output.size(report.predictor_bytes)} from {report.tokens:,} tokens in "
        f"{report.seconds:.1f} s"
    )
    output.print_table(
        ["layer", "rank", "threshold", "active", "recall", "precision", "predicted/active"],
        [
            [
                layer.layer,
                layer.rank,
                f"{layer.threshold:.3f}",
                output.share(layer.active_share, 1),
                output.share(layer.recall, 1),
                output.share(layer.precision, 1),
                f"{layer.predicted_per_active:.2f}",
            ]
            for layer in report.layers
        ],
    )
    return 0

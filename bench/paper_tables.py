"""The tables of "LLM in a flash" (arXiv 2312.11514), measured here under a real memory limit.

    python -m bench.paper_tables --folder /big/disk --json tables.json --plot tables.png

makes a checkpoint in the model's true shape with random weights, packs it, and runs each step in a
process of its own in a control group with half the model's size as its limit (which takes Linux's
memory controller and the right to make groups: root). What a real model's predictors would name is
replayed from synthetic traces. Files that are there already are used: `--bundle`, `--checkpoint`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

import bundlefmt
from bench.paper import device, outside, tables
from bench.paper.figures import PAPER
from bench.paper.limits import MemoryGroup
from bench.paper.records import Settings
from bench.paper.running import ROOT, Row, run
from bench.paper.traces import Trace, fit
from bundlefmt import native
from bundlefmt.cli.arguments import parse_size
from bundlefmt.errors import BundleError
from bundlefmt.measurement import machine
from tools import make_checkpoint

RESULTS = ROOT / "bench" / "RESULTS.md"
SLOW = ("naive", "mapped", "accelerate", "torch", "hybrid")  # of which few tokens are made
OUTSIDE = ("accelerate", "torch")
STATISTICS_TOKENS = 48


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--limit", type=parse_size, help="memory (default: half the file)")
    parser.add_argument("--steps", nargs="+", choices=tables.TITLES, default=list(tables.TITLES))
    parser.add_argument("--tokens", type=int, default=40, help="measured of each fast step")
    parser.add_argument("--slow-tokens", type=int, default=3, help="measured of each slow step")
    parser.add_argument("--recall", type=float, default=0.75, help="of the early guesses")
    parser.add_argument("--wrong", type=float, default=0.05, help="share of the early guesses")
    parser.add_argument("--timeline", type=Path, help="SVG to draw a token of the last step in")
    args = parser.parse_args()
    try:
        with MemoryGroup(1 << 30):  # says at once where no limit can be set
            pass
        bundle, checkpoint = files(args)
        report = measure(args, bundle, checkpoint)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    publish(
        args,
        tables.markdown(report),
        report.as_dict(),
        lambda path: tables.draw(report, path),
        "the paper's tables",
    )
    return 0


def publish(
    args: argparse.Namespace,
    text: str,
    figures: dict[str, Any],
    draw: Callable[[Path], None],
    heading: str,
) -> None:
    """Print the section, and write what was asked for; pictures beside the results are shown
    there."""
    print(text)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.plot:
        draw(args.plot)
    if args.write_results:
        pictures = [args.plot, getattr(args, "timeline", None)]
        beside = [path for path in pictures if path and path.resolve().parent == RESULTS.parent]
        shown = "".join(f"\n\n![{heading}]({path.name})" for path in beside)
        tables.write_section(RESULTS, f"{args.model}: {heading}", text + shown)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model is measured, where its files are, for how long, and where
    results go."""
    parser.add_argument("--model", choices=PAPER, default="opt-6.7b")
    parser.add_argument("--folder", type=Path, help="where its files are, or are made")
    parser.add_argument("--bundle", type=Path, help="its bundle file, if it is elsewhere")
    parser.add_argument("--checkpoint", type=Path, help="its checkpoint's folder, likewise")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="before those measured")
    parser.add_argument("--seconds", type=float, default=240, help="at most, of each run")
    parser.add_argument("--json", type=Path, help="file to write everything measured to")
    parser.add_argument("--plot", type=Path, help="PNG or SVG to draw")
    parser.add_argument("--write-results", action="store_true", help=f"into {RESULTS.name}")


def files(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The bundle file and the checkpoint, which are made where they are not there."""
    native.require()
    if args.bundle is not None:
        return args.bundle, args.checkpoint
    if args.folder is None:
        raise bundlefmt.UsageError("where are the files?", field="--folder or --bundle")
    checkpoint = args.checkpoint or args.folder / args.model
    bundle = args.folder / f"{args.model}.bundle"
    if not checkpoint.exists():
        say(f"making {checkpoint}")
        make_checkpoint.make(checkpoint, model=args.model)
    if not bundle.exists():
        say(f"packing {bundle}")
        bundlefmt.pack(checkpoint, bundle)
    return bundle, checkpoint


def measure(args: argparse.Namespace, bundle: Path, checkpoint: Path | None) -> tables.Report:
    """Run the steps."""
    paper = PAPER[args.model]
    reuse = fit(paper.predicted, paper.held, paper.fresh, paper.window)
    size = bundle.stat().st_size
    with bundlefmt.open(bundle) as file:
        groups = file.groups
    settings = Settings(
        step="",
        bundle=str(bundle),
        checkpoint=None if checkpoint is None else str(checkpoint),
        model=args.model,
        limit=args.limit or size // 2,
        tokens=args.tokens,
        prompt_tokens=args.prompt_tokens,
        recall=args.recall,
        wrong=args.wrong,
    )
    say("measuring the device")
    return tables.Report(
        model=args.model,
        file_bytes=size,
        ffn_bytes=sum(group.bundles.length for group in groups),
        limit=settings.limit,
        prompt_tokens=settings.prompt_tokens,
        machine=facts(bundle),
        device=device.measure(str(bundle)),
        generator=reuse._asdict(),
        statistics=Trace(reuse, 4, groups[0].neurons, STATISTICS_TOKENS).statistics(),
        early={"recall": args.recall, "wrong": args.wrong},
        rows=list(rows(args, settings)),
        date=today(),
        commit=commit(),
        commands=[command()],
    )


def rows(args: argparse.Namespace, settings: Settings) -> Iterator[Row]:
    """The steps that were asked for, in the table's order."""
    for step in (step for step in tables.TITLES if step in args.steps):
        tokens = args.slow_tokens if step in SLOW else args.tokens
        say(f"{tables.TITLES[step]}: {tokens} tokens")
        reason = None
        if step in OUTSIDE:
            reason = outside.missing() if settings.checkpoint else "no checkpoint"
        if reason is not None:
            yield Row(step, settings.limit, 0, 0, None, None, note=f"left out: {reason}")
            continue
        drawn = str(args.timeline.resolve()) if args.timeline and step == tables.BEST else None
        said = msgspec.structs.replace(settings, step=step, tokens=tokens, timeline=drawn)
        row = run(said, args.seconds)
        say(f"  {row.note or ''} {tables.milliseconds(row.seconds)} ms per token")
        yield row


def facts(bundle: Path) -> dict[str, Any]:
    """The machine's."""
    found = machine.facts(str(bundle))
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    load = os.getloadavg()[0]
    return found | {
        "load": load,
        "cpu": names[0].split(":")[1].strip() if names else platform.machine(),
    }


def today() -> str:
    return datetime.date.today().isoformat()


def commit() -> str:
    """This checkout's, `-dirty` with changes; `unknown` outside of one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def command() -> str:
    """How this was run; of absolute paths, only the names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return f"python -m bench.{Path(sys.argv[0]).stem} {shlex.join(words)}"


def say(text: str) -> None:
    """On standard error: what is done meanwhile."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

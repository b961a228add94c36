"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import os
import re

BACKENDS = ("auto", "uring", "direct", "buffered", "mmap")
THREADS = 32
QUEUE_DEPTH = 128
BATCH = 512  # neurons
ORDERS = ("random", "sorted")
CORES = ("native", "python")
POSITIONAL = ("model", "source", "path")
POLICIES = ("lfu", "lru", "window", "none")

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """`4096`, `4K`, `1.5GiB` -> bytes; units are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4096, 16K or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_sizes(text: str) -> list[int]:
    """`4K,16K,64K` -> bytes."""
    return [parse_size(item) for item in text.split(",")]


def text_of(argument: str) -> str:
    """An argument as text: where the locale's encoding could not take it, as UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode(errors="surrogateescape")
    return argument


def parse_counts(text: str) -> list[int]:
    """`1,8,32` -> integers."""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,8,32") from None


def parse_share(text: str) -> float:
    """`0.25` or `25%` -> 0.25"""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0.25 or 25%") from None


def as_typed(field: str | None, args: argparse.Namespace) -> str | None:
    """The field that an error is about: an option as it is typed, `max_new_tokens` as
    `--max-new-tokens`."""
    if field is None or field in POSITIONAL or field not in vars(args):
        return field
    return "--" + field.replace("_", "-")


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`"""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def add_core(parser: argparse.ArgumentParser) -> None:
    """`--core`, as every command that runs a model or measures takes it."""
    parser.add_argument(
        "--core",
        choices=CORES,
        help="python: compute and read in Python and NumPy, without the compiled core; much slower",
    )


def choose_core(args: argparse.Namespace) -> None:
    """Heed --core, in this process, which has not looked for its core yet, and in its children."""
    if getattr(args, "core", None) is not None:
        os.environ["BUNDLEFMT_CORE"] = args.core


def add_reading(parser: argparse.ArgumentParser) -> None:
    """`--no-verify`, as every command that reads bundles takes it."""
    parser.add_argument(
        "--no-verify", action="store_true", help="do not check each bundle against its checksum"
    )


def add_caching(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """`--memory`, `--policy`, `--window`, as every command that runs or plans a model has them."""
    parser.add_argument(
        "--memory",
        type=parse_size,
        required=required,
        metavar="SIZE",
        help="memory for the whole process, such as 7GiB; what nothing else needs caches neurons",
    )
    parser.add_argument(
        "--policy",
        default="lfu",
        choices=POLICIES,
        help="which neurons the cache evicts; none leaves caching to the operating system",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="how many of the last tokens policy window keeps neurons of",
    )

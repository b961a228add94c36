"""The command line: one small module per command, imported when it is asked for.

Exit status: 0 done, 1 the file's or the device's fault, 2 the caller's. Errors are one line on
standard error.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from bundlefmt import __version__
from bundlefmt.cli import arguments
from bundlefmt.errors import BundleError, UsageError, printable

COMMANDS = (
    "pack",
    "inspect",
    "verify",
    "unpack",
    "plan",
    "run",
    "eval",
    "trace",
    "train-predictors",
    "reorder",
    "demo",
    "bench",
    "calibrate",
    "doctor",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has gone: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    arguments.choose_core(args)
    try:
        status: int = args.run(args)
    except BundleError as error:
        print(f"bundlefmt {args.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"bundlefmt {args.command}: {printable(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"bundlefmt {args.command}: interrupted", file=sys.stderr)
        return 130
    return status


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bundlefmt",
        description="Run language models larger than memory, neuron by neuron from flash.",
    )
    parser.add_argument("--version", action="version", version=f"bundlefmt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"bundlefmt.cli.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser

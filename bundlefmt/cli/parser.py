"""The parser of the command line, with the arguments of every command."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable
from typing import NoReturn

from bundlefmt import __version__
from bundlefmt.errors import printable


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def make_parser(commands: Iterable[str]) -> argparse.ArgumentParser:
    """A parser of these commands; each brings its own arguments, and `run` to call with them."""
    parser = _Parser(
        prog="bundlefmt",
        description="Run language models larger than memory, neuron by neuron from flash.",
    )
    parser.add_argument("--version", action="version", version=f"bundlefmt {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in commands:
        module = importlib.import_module(f"bundlefmt.cli.{name.replace('-', '_')}")
        command = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser

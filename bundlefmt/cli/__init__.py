"""The command line: one small module per command, imported when it is asked for.

Exit status: 0 done, 1 the file's or the device's fault, 2 the caller's, 130 interrupted. Errors are
one line on standard error. This module imports next to nothing, so that interrupts are soon dealt
with.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as in typing, which takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence

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
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Without `argv`, it is the whole process: the
    arguments are its own, and once the command is done, no interrupt changes its status."""
    try:
        from bundlefmt.cli.interrupts import Interrupts
    except KeyboardInterrupt:
        if argv is None:  # nothing is begun, and another one would not be dealt with
            _say_interrupted(argv)
            os._exit(INTERRUPTED)
        raise
    try:
        with Interrupts(lasting=argv is None):
            return _run(argv)
    except KeyboardInterrupt:
        _say_interrupted(argv)
        return INTERRUPTED


def _say_interrupted(argv: Sequence[str] | None) -> None:
    given = sys.argv[1:] if argv is None else argv
    name = next((f"bundlefmt {arg}" for arg in given if arg in COMMANDS), "bundlefmt")
    try:  # without `output`, whose imports take time that may not be left
        sys.stderr.write(f"{name}: interrupted\n")
        sys.stderr.flush()
    except (AttributeError, OSError):  # closed, or nobody reads it
        pass


def _run(argv: Sequence[str] | None) -> int:
    from bundlefmt.cli.output import abandon_stdout, complain, prepare_streams

    prepare_streams()
    try:
        try:
            return _command(argv)
        finally:
            sys.stdout.flush()
    except OSError as error:  # of standard output: the command has dealt with any other
        abandon_stdout()
        if not isinstance(error, BrokenPipeError):  # else nobody is there to read about it
            complain(f"standard output cannot be written: {error.strerror}")
        return 1


def _command(argv: Sequence[str] | None) -> int:
    import warnings

    from bundlefmt.cli.arguments import as_typed, choose_core
    from bundlefmt.cli.output import complain
    from bundlefmt.cli.parser import make_parser
    from bundlefmt.errors import BundleError, UsageError

    args = make_parser(COMMANDS).parse_args(argv)
    choose_core(args)

    def show(message: Warning | str, *where: object, **more: object) -> None:
        complain(f"warning: {message}", args.command)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            status: int = args.run(args)
    except BundleError as error:
        if isinstance(error, UsageError):
            error.field = as_typed(error.field, args)
        complain(error, args.command)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout.flush()  # raises again if it was standard output's
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}", args.command)
        return 1
    except MemoryError as error:
        complain(f"out of memory: {error}" if str(error) else "out of memory", args.command)
        return 1
    return status

"""What commands print: tables and progress for people, one JSON object for machines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from bundlefmt.errors import printable, printable_text

_PIPE_WIDTH = 160  # columns of a table that no terminal shows


def prepare_streams() -> None:
    """Make standard output and error usable, whatever they are.

    Characters that their encoding lacks are escaped. A closed one gets /dev/null in its place, so
    that no file that is opened takes its number: for standard output one that cannot be written,
    which is an error like a full disk, for standard error one that swallows what it gets.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(number, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        elif getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def abandon_stdout() -> None:
    """Standard output goes nowhere from now on, with what it has not written yet."""
    _abandon(sys.stdout)


def complain(what: object, command: str | None = None) -> None:
    """One line on standard error, if it can be written."""
    name = f"bundlefmt {command}" if command else "bundlefmt"
    try:
        print(f"{name}: {printable(what)}", file=sys.stderr, flush=True)
    except OSError:
        _abandon(sys.stderr)


def _abandon(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def print_text(text: str) -> None:
    """Text as it is, at once; for a terminal, without the control characters that could drive
    it."""
    sys.stdout.write(printable_text(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; a column whose cells are all numbers or sizes is set to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        cells = [str(row[i]) for row in rows]
        numeric = all(cell[:1].isdigit() or cell in ("", "-") for cell in cells)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    console.print(table)


def print_fields(fields: Sequence[tuple[str, object]]) -> None:
    """Lines of `name  value`, the values lined up."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        print(f"{name:<{width}}  {printable(value)}")


@contextmanager
def progress(title: str, *, in_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error while the block runs; none where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    if in_bytes:
        columns += [DownloadColumn(binary_units=True), TransferSpeedColumn()]
    else:
        columns += [MofNCompleteColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(nbytes: float) -> str:
    """`1.5 MiB`"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def share(part: float, whole: float) -> str:
    """`12.5 %`"""
    return f"{100 * part / whole:.1f} %" if whole else "-"

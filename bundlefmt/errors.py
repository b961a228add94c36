"""The errors of bundlefmt, split by whose fault it is.

Every message is one line that names what is known of: file, field, offset, expected, found.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager

_UNSET = object()


def printable(text: object) -> str:
    """`text` with control and other unprintable characters escaped, so that a hostile name
    cannot drive a terminal or break a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def printable_text(text: str) -> str:
    """Like `printable`, for text of several lines: line ends and tabs stay."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


class BundleError(Exception):
    """Base of all errors that bundlefmt raises on purpose.

    `what` says what is wrong; the keywords say where, and are attributes too. `offset` is in
    bytes from the start of `file`.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        field: str | None = None,
        offset: int | None = None,
        expected: object = _UNSET,
        found: object = _UNSET,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.file = file
        self.field = field
        self.offset = offset
        self.expected = None if expected is _UNSET else expected
        self.found = None if found is _UNSET else found
        self._compared = [
            f"{word} {value}"
            for word, value in (("expected", expected), ("found", found))
            if value is not _UNSET
        ]

    def __str__(self) -> str:
        where = [os.fspath(self.file)] if self.file is not None else []
        place = self.field or ""
        if self.offset is not None:
            place = f"{place} at byte {self.offset}".strip()
        where += [place] if place else []
        return printable(": ".join([*where, self.what, *filter(None, [", ".join(self._compared)])]))


class UsageError(BundleError):
    """The caller's fault: an argument, an option, a path that cannot be served."""


class FormatError(BundleError):
    """The file's fault: a bundle file or a checkpoint that breaks its format's rules."""


class ReadError(BundleError):
    """The device's fault: a read that failed or came up short."""


class WriteError(BundleError):
    """The device's fault: a write that failed, a disk that is full."""


def integer(value: object, field: str, least: int, most: int | None = None) -> int:
    """An argument as a plain int. Raises UsageError unless it is an integer (a bool is none) of
    least..most."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        expected = f"{least} or more" if most is None else f"{least}..{most}"
        raise UsageError("out of range", field=field, expected=expected, found=value)
    return number


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give errors that pass through the name of the file that they are about."""
    try:
        yield
    except BundleError as error:
        if error.file is None:
            error.file = path
        raise

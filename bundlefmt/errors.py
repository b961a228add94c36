"""The errors of bundlefmt, split by whose fault it is.

Every message is one line that names what is known of: file, field, offset, expected, found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_UNSET = object()


_CONTROLS = re.compile("[\\0-\\x08\\x0b-\\x1f\\x7f-\\x9f]")


def printable(text: object) -> str:
    """`text` in one line: control and other unprintable characters escaped, so that a hostile name
    cannot drive a terminal or break a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def printable_text(text: str) -> str:
    """Text for a terminal: control characters are escaped, since they could drive it, but for line
    ends and tabs. All else is text: blanks of every width, joiners, direction marks."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


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


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give errors that pass through the name of the file that they are about."""
    try:
        yield
    except BundleError as error:
        if error.file is None:
            error.file = path
        raise

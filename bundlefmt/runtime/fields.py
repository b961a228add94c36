"""The values of a config.json, each of the kind that its key means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bundlefmt.errors import FormatError, UsageError

_LARGEST = (1 << 31) - 1  # of an integer
_LARGEST_NUMBER = 1e30
_SHOWN = 60  # characters of a value in an error


def is_number(value: object, *, zero: bool = False) -> bool:
    """Whether a value is a finite number above 0, or, where it may be `zero`, from 0 on."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= _LARGEST_NUMBER and (zero or value > 0)


class Fields:
    """The values of a config.json, or of an object in it, by key. Where a key is absent, its value
    is the default of the model's class; so it is looked up only by keys that have one. Raises
    FormatError for a value of another kind, or out of range."""

    def __init__(
        self, config: Mapping[str, Any], defaults: Mapping[str, Any], within: str = ""
    ) -> None:
        self._config = config
        self._defaults = defaults
        self._within = f"{within}." if within else ""

    def knows(self, key: str) -> bool:
        """Whether the model's class has such a key."""
        return key in self._defaults

    def value(self, key: str) -> Any:
        """The value as it is."""
        return self._config[key] if key in self._config else self._defaults[key]

    def integer(self, key: str, least: int = 1) -> int:
        """An integer, at least `least`."""
        found = self.value(key)
        if type(found) is not int or not least <= found <= _LARGEST:
            raise self.wrong(key, f"an integer from {least} to {_LARGEST}")
        return found

    def optional_integer(self, key: str) -> int | None:
        """A positive integer, or null."""
        return None if self.value(key) is None else self.integer(key)

    def number(self, key: str, *, zero: bool = False) -> float:
        """A finite number above 0, or, where it may be `zero`, from 0 on."""
        found = self.value(key)
        if not is_number(found, zero=zero):
            raise self.wrong(key, f"a number {'from 0 on' if zero else 'above 0'}")
        return float(found)

    def flag(self, key: str) -> bool:
        """True or false; null is false."""
        found = self.value(key)
        if found is not None and not isinstance(found, bool):
            raise self.wrong(key, "true or false")
        return bool(found)

    def wrong(self, key: str, expected: str) -> FormatError:
        """The error for a value that is not what the key means."""
        return FormatError(
            "value not understood",
            field=self._place(key),
            expected=expected,
            found=_cut(repr(self.value(key))),
        )

    def unsupported(self, key: str, expected: str) -> UsageError:
        """The error for a value that means something that is not computed."""
        return UsageError(
            "not supported by this runtime",
            field=self._place(key),
            expected=expected,
            found=_cut(str(self.value(key))),
        )

    def _place(self, key: str) -> str:
        return f"config.json, {self._within}{key}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

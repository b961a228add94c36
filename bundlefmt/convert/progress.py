"""How long work reports its progress to whoever asked for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]  # called with (bytes done, bytes in all)


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""

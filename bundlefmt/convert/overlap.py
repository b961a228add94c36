"""Work on one item while the next is under way."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def overlapped(work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """The results of `work` on each item, in order, one item at a time on another thread.

    That thread is at most one item ahead of the results taken: when an item is asked for, at most
    the one before it is in use. What `work` raises is raised in its result's place; no work is
    under way any more once the iterator has ended or was closed.
    """
    with ThreadPoolExecutor(1) as pool:
        pending: Future[R] | None = None
        for item in items:
            previous, pending = pending, pool.submit(work, item)
            if previous is not None:
                yield previous.result()
        if pending is not None:
            yield pending.result()

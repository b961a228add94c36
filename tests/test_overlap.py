"""Work on another thread: results in order, errors in place, nothing left running."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from bundlefmt.convert.overlap import overlapped


def test_results_come_in_order() -> None:
    assert list(overlapped(lambda item: item * item, range(20))) == [i * i for i in range(20)]
    assert list(overlapped(lambda item: item, [])) == []


def test_an_item_is_done_before_the_next_but_one_is_made() -> None:
    done: list[int] = []

    def items() -> Iterator[int]:
        for item in range(50):
            assert len(done) >= item - 1
            yield item

    list(overlapped(done.append, items()))
    assert done == list(range(50))


def test_what_the_work_raises_is_raised_and_the_thread_ends() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise OSError("device failed")
        return item

    threads = threading.active_count()
    taken = []
    with pytest.raises(OSError, match="device failed"):
        for result in overlapped(work, range(20)):
            taken.append(result)
    assert taken == [0, 1, 2]
    assert threading.active_count() == threads


def test_what_the_items_raise_is_raised_and_the_thread_ends() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("no more")

    threads = threading.active_count()
    with pytest.raises(ValueError, match="no more"):
        list(overlapped(lambda item: item, items()))
    assert threading.active_count() == threads

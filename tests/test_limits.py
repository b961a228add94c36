"""Programs run under a memory limit of the cgroup controller, where there is one."""

from __future__ import annotations

import sys

import pytest

from bench.paper.limits import MemoryGroup
from bundlefmt.errors import UsageError
from tests.conftest import without_sanitizers

LIMIT = 96 << 20
TAKE = "import sys; held = bytearray(b'x') * (int(sys.argv[1]) << 20); print(len(held))"


def command(mebibytes: int) -> list[str]:
    return [sys.executable, "-P", "-c", TAKE, str(mebibytes)]


@pytest.fixture
def group() -> MemoryGroup:
    try:
        made = MemoryGroup(LIMIT)
    except UsageError as error:
        pytest.skip(str(error))
    return made


@without_sanitizers("they keep memory of their own")
def test_a_program_below_the_limit_ends_well_and_its_peak_is_known(group: MemoryGroup) -> None:
    with group:
        ended = group.run([*command(32)], seconds=60)
    assert (ended.status, ended.out) == (0, f"{32 << 20}\n"), ended.err
    assert not ended.killed_for_memory
    assert ended.peak is None or 32 << 20 <= ended.peak <= LIMIT
    assert ended.anonymous_peak <= LIMIT


@without_sanitizers("they keep memory of their own")
def test_anonymous_memory_is_seen_while_a_program_holds_it(group: MemoryGroup) -> None:
    holding = TAKE + "; sys.stdout.flush(); import time; time.sleep(30)"
    with group:
        ended = group.run([sys.executable, "-P", "-c", holding, "48"], seconds=2)
    assert ended.timed_out
    assert ended.out == f"{48 << 20}\n"  # what was said before the end is there
    assert 48 << 20 <= ended.anonymous_peak <= LIMIT


@without_sanitizers("they keep memory of their own")
def test_a_program_beyond_the_limit_is_stopped(group: MemoryGroup) -> None:
    with group:
        ended = group.run(command(256), seconds=60)
    assert ended.killed_for_memory
    assert ended.status != 0
    assert not ended.out


def test_the_group_is_gone_afterwards(group: MemoryGroup) -> None:
    with group:
        assert group.path.is_dir()
    assert not group.path.exists()

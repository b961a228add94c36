"""A program under a memory limit that the kernel holds it to: the cgroup memory controller.

Facts: a group counts its processes' own memory (anonymous) and the page cache of what they have
read, and takes page cache back before it refuses; a process that still wants more is killed. In v1
any group may have groups below it; in v2 only one whose controllers are switched on for those
below (`cgroup.subtree_control`), which takes that it has no processes of its own, or is the root.
Neither version keeps a peak of anonymous memory: it is sampled while the program runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bundlefmt.errors import UsageError

_SAMPLE_SECONDS = 0.02
_REMOVE_SECONDS = 5.0  # a group is busy until the last of its processes has been reaped


@dataclass(frozen=True)
class Version:
    """What the two versions of the controller call things: the files of limit, swap limit, peak
    and kills, and anonymous memory's line of memory.stat."""

    number: int
    limit: str
    swap: str
    peak: str
    kills: str
    anonymous: str


V1 = Version(
    1,
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.oom_control",
    "rss",
)
V2 = Version(2, "memory.max", "memory.swap.max", "memory.peak", "memory.events", "anon")


@dataclass(frozen=True)
class Finished:
    """How a program ended. `peak` is the most that its group used, page cache included (None where
    the kernel does not say); `anonymous_peak` the most anonymous memory seen."""

    status: int
    out: str
    err: str
    peak: int | None
    anonymous_peak: int
    killed_for_memory: bool
    timed_out: bool


class MemoryGroup:
    """A control group with a limit in bytes; a context manager, which removes it. Raises
    UsageError, saying why, where no limit can be set."""

    def __init__(self, limit: int) -> None:
        self.version, places = _controller()
        refusals: list[str] = []
        for parent in places:
            self.path = parent / f"bundlefmt-{os.getpid()}-{time.monotonic_ns()}"
            try:
                self._make(limit)
                return
            except OSError as error:
                refusals.append(f"{error.filename or self.path}: {error.strerror}")
                with suppress(OSError):
                    self.path.rmdir()
        raise UsageError(f"no memory limit can be set here: {refusals[0]}", field="cgroup")

    def _make(self, limit: int) -> None:
        switch = self.path.parent / "cgroup.subtree_control"
        if self.version is V2 and "memory" not in switch.read_text().split():
            switch.write_text("+memory")
        self.path.mkdir()
        (self.path / self.version.limit).write_text(str(limit))
        swap = self.path / self.version.swap
        if swap.exists():  # v1 counts memory and swap together, v2 swap alone
            swap.write_text(str(limit) if self.version is V1 else "0")

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._kill()
        deadline = time.monotonic() + _REMOVE_SECONDS
        while True:
            try:
                self.path.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_SAMPLE_SECONDS)

    def run(self, command: Sequence[str], *, seconds: float, cwd: Path | None = None) -> Finished:
        """Run a program in the group until it ends, or for that many seconds."""
        entering = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._processes)]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            started = subprocess.Popen([*entering, *command], stdout=out, stderr=err, cwd=cwd)
            anonymous, timed_out = self._watch(started, time.monotonic() + seconds)
            out.seek(0), err.seek(0)
            return Finished(
                started.returncode,
                out.read(),
                err.read(),
                self._peak(),
                anonymous,
                self._number(self.version.kills, "oom_kill") > 0,
                timed_out,
            )

    def _watch(self, program: subprocess.Popen[bytes], deadline: float) -> tuple[int, bool]:
        """The most anonymous memory until the program ends, and whether it had to be ended."""
        most, timed_out = 0, False
        while program.poll() is None:
            most = max(most, self._number("memory.stat", self.version.anonymous))
            if time.monotonic() > deadline:
                timed_out = True
                self._kill()
            with suppress(subprocess.TimeoutExpired):
                program.wait(_SAMPLE_SECONDS)
        return most, timed_out

    def _peak(self) -> int | None:
        try:
            return int((self.path / self.version.peak).read_text())
        except FileNotFoundError:  # v2 has it from Linux 5.19 on
            return None

    def _number(self, name: str, key: str) -> int:
        """The number after `key` in one of the group's files; 0 when there is none."""
        for line in (self.path / name).read_text().splitlines():
            found, _, value = line.partition(" ")
            if found == key:
                return int(value)
        return 0

    @property
    def _processes(self) -> Path:
        return self.path / "cgroup.procs"

    def _kill(self) -> None:
        for process in self._processes.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


def _controller() -> tuple[Version, list[Path]]:
    """The controller's version, and where a group may be made: below this process's own group,
    or below those above it, the nearest first."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for version, kind in ((V1, "cgroup"), (V2, "cgroup2")):
        for _, mount, found, options, *_ in mounts:
            if found != kind or (version is V1 and "memory" not in options.split(",")):
                continue
            root = Path(mount)
            if version is V2 and "memory" not in (root / "cgroup.controllers").read_text().split():
                continue
            for _, controllers, path in own:
                if ("memory" in controllers.split(",")) if version is V1 else not controllers:
                    return version, _upwards(root, path)
    raise UsageError(
        "no memory limit can be set here: no cgroup memory controller is mounted", field="cgroup"
    )


def _upwards(root: Path, path: str) -> list[Path]:
    inside = root / path.lstrip("/")
    places = [inside, *inside.parents]
    return [place for place in places[: places.index(root) + 1] if place.is_dir()]

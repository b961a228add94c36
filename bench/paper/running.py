"""Steps as child processes under a memory limit, and what they report."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from bench.paper.limits import Finished, MemoryGroup
from bench.paper.records import Caching, Settings, Token
from bundlefmt.storage.device import drop_cache

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """One step: medians over its tokens, in seconds and bytes per token (None: cannot be told
    apart), the most anonymous memory, and the most that its group used, page cache included.
    `note` says what kept a row from being whole."""

    step: str
    limit: int
    tokens: int
    anonymous_peak: int
    peak: int | None
    seconds: float | None
    io: float | None = None
    waited: float | None = None
    manage: float | None = None
    nbytes: float | None = None
    requests: float | None = None
    caching: Caching | None = None
    note: str | None = None

    @property
    def compute(self) -> float | None:
        """What is neither waiting nor management."""
        if self.seconds is None or self.waited is None:
            return None
        return self.seconds - self.waited - (self.manage or 0.0)

    @property
    def overlapped(self) -> float | None:
        """The token's time / I/O, management and compute done one after the other."""
        if self.seconds is None or self.io is None or self.compute is None:
            return None
        return self.seconds / (self.io + (self.manage or 0.0) + self.compute)

    @property
    def cache_share(self) -> float | None:
        """Of the FFN's neurons, how many the cache has room for."""
        return None if self.caching is None else self.caching.share

    @property
    def rate(self) -> float | None:
        """Bytes per second of I/O."""
        return self.nbytes / self.io if self.nbytes and self.io else None


def run(settings: Settings, seconds: float) -> Row:
    """Run a step under its limit, from cold files, for at most that many seconds. Raises
    UsageError where no limit can be set."""
    for path in _files(settings):
        drop_cache(path)
    text = msgspec.json.encode(settings).decode()
    with MemoryGroup(settings.limit) as group:
        command = [sys.executable, "-m", "bench.paper.steps", text]
        return row_of(settings, group.run(command, seconds=seconds, cwd=ROOT), seconds)


def row_of(settings: Settings, ended: Finished, seconds: float) -> Row:
    """What a step's lines, and how it ended, say."""
    tokens: list[dict[str, Any]] = []
    caching = None
    for line in ended.out.splitlines():
        record = json.loads(line)
        tokens += [record["Token"]] if "Token" in record else []
        caching = Caching(**record["Caching"]) if "Caching" in record else caching

    def middle(key: str) -> float | None:
        found = [token[key] for token in tokens if token[key] is not None]
        return median(found) if found else None

    return Row(
        step=settings.step,
        limit=settings.limit,
        tokens=len(tokens),
        anonymous_peak=ended.anonymous_peak,
        peak=ended.peak,
        **{field.name: middle(field.name) for field in fields(Token)},
        caching=caching,
        note=_note(ended, len(tokens), seconds),
    )


def _note(ended: Finished, tokens: int, seconds: float) -> str | None:
    after = f" after {tokens} tokens" if tokens else ""
    if ended.killed_for_memory:
        return f"killed{after}: more memory than the limit"
    if ended.timed_out:
        return f"did not finish within {seconds:.0f} s{f': {tokens} tokens' if tokens else ''}"
    if ended.status:
        last = ended.err.strip().splitlines()[-1:] or ["no reason given"]
        return f"failed{after}: {last[0][:200]}"
    return None


def _files(settings: Settings) -> list[Path]:
    folder = [] if settings.checkpoint is None else Path(settings.checkpoint).glob("*.safetensors")
    return [Path(settings.bundle), *folder]

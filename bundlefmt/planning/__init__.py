"""How a model would run in so much memory, told without running it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bundlefmt.errors import BundleError, naming
from bundlefmt.file import BundleFile
from bundlefmt.flash import profiles, reuse
from bundlefmt.flash.budget import Budget
from bundlefmt.flash.costmodel import DeviceProfile
from bundlefmt.planning import advice
from bundlefmt.planning.activity import TRACED_MODES, Activity, activity
from bundlefmt.planning.advice import Advice
from bundlefmt.planning.token import Costs, Token
from bundlefmt.runtime import memory as memory_of
from bundlefmt.runtime import selection
from bundlefmt.runtime.config import decoder_config
from bundlefmt.runtime.memory import Caching
from bundlefmt.runtime.selection import Selecting


@dataclass(frozen=True)
class PlannedStage:
    """Of one token: bytes that are read or computed from, requests, and milliseconds (None where
    the device has no profile)."""

    name: str
    bytes: float
    requests: float
    milliseconds: float | None


@dataclass(frozen=True)
class Plan:
    """How the memory is divided, in bytes, and what a token is expected to take once the cache is
    full. `streamed` are the layers whose attention finds no room, `window` how many tokens' active
    neurons the cache holds; `activity` is `every`, `traced` or `assumed`, and
    `activity_from` what it was taken from. Milliseconds are None where `untimed` says why."""

    path: str
    mode: str
    memory: int
    tokens: int
    split: dict[str, int]
    ffn_bytes: int
    cached_share: float
    streamed: list[int]
    window: int
    activity: str
    activity_from: str
    active_share: float
    hit_rate: float
    stages: list[PlannedStage]
    bytes_per_token: float
    requests_per_token: float
    milliseconds_per_token: float | None
    untimed: str | None
    advice: list[Advice]


def plan(
    path: str | os.PathLike[str],
    memory: int,
    *,
    mode: str = "dense",
    share: float = 0.3,
    tokens: int | None = None,
    traces: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """What `run` would do with so many bytes of memory in that mode, for a text of up to `tokens`
    tokens, prompt included (None: as in `load_model`). `traces`, a folder that `trace` wrote,
    says which neurons are active; without it the paper's shares are assumed. Times come from the
    profile of the device that the file lies on, where `calibrate` has made one.

    Raises UsageError when the memory is too little, with the smallest that works, and for a model,
    mode or trace that cannot be; FormatError for a damaged file.
    """
    selecting, caching = Selecting(mode, share), Caching(memory, tokens=tokens)
    with BundleFile(path) as file, naming(path):
        config = decoder_config(file.config, len(file.groups))
        budget = memory_of.plan(file, config, selecting, caching)
        for group in file.groups:
            selection.check(mode, group)
        profile, untimed = _profile(file.path)
        found = activity(file, selecting, traces, progress)
        costs = Costs(file, config, selecting, found.groups)
        token = costs.token(budget.slots, budget.streamed)
        whole = sum(group.bundles.length for group in file.groups)
        neurons = sum(group.neurons for group in file.groups)
        total = None if profile is None else 1e3 * token.total_seconds(profile)
        return Plan(
            path=file.path,
            mode=mode,
            memory=memory,
            tokens=caching.tokens_of(config),
            split=_split(budget),
            ffn_bytes=whole,
            cached_share=budget.cache / whole,
            window=reuse.window(found.groups, sum(budget.slots)),
            activity=found.origin,
            activity_from=found.remark,
            active_share=sum(group.active for group in found.groups) / neurons,
            hit_rate=token.hit_rate,
            stages=_stages(token, profile),
            bytes_per_token=token.bytes_read,
            requests_per_token=sum(token.requests.values()),
            streamed=list(budget.streamed),
            milliseconds_per_token=total,
            untimed=untimed,
            advice=_advice(file, selecting, budget, found, costs, profile),
        )


def _profile(path: str) -> tuple[DeviceProfile | None, str | None]:
    """The device's, or why there is none that is of use."""
    try:
        found = profiles.load(path)
    except BundleError as error:
        return None, str(error)
    return found, None if found else "this device was not calibrated"


def _split(budget: Budget) -> dict[str, int]:
    used = {**asdict(budget.needs), "slack": budget.slack, "cache": budget.cache}
    return {**used, "unused": budget.limit - sum(used.values())}


def _stages(token: Token, profile: DeviceProfile | None) -> list[PlannedStage]:
    seconds = {} if profile is None else token.seconds(profile)
    return [
        PlannedStage(
            name,
            nbytes,
            token.requests.get(name, 0.0),
            1e3 * seconds[name] if name in seconds else None,
        )
        for name, nbytes in token.stages.items()
    ]


def _advice(
    file: BundleFile,
    selecting: Selecting,
    budget: Budget,
    found: Activity,
    costs: Costs,
    profile: DeviceProfile | None,
) -> list[Advice]:
    given = [
        *advice.memory(file.groups, budget, found.groups, costs),
        *advice.encoding(file.groups, budget, costs),
        *advice.choosing(file, selecting),
    ]
    if found.origin == "assumed" and selecting.mode in TRACED_MODES:
        given.append(Advice("trace, then plan --traces counts what is active"))
    if profile is None:
        given.append(Advice("calibrate, then plan tells times"))
    return given

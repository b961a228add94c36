"""How a model would run in so much memory, told without running it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from bundlefmt.errors import BundleError, integer, naming
from bundlefmt.file import BundleFile
from bundlefmt.flash import predictor, profiles, reuse
from bundlefmt.flash.budget import Budget
from bundlefmt.flash.costmodel import DeviceProfile
from bundlefmt.planning import advice
from bundlefmt.planning.activity import TRACED_MODES, Activity, activity
from bundlefmt.planning.advice import Advice, Divided
from bundlefmt.planning.token import Costs, Token
from bundlefmt.runtime import memory as memory_of
from bundlefmt.runtime import roles, selection
from bundlefmt.runtime.config import decoder_config
from bundlefmt.runtime.draft import draft_bytes
from bundlefmt.runtime.memory import Caching
from bundlefmt.runtime.selection import Selecting
from bundlefmt.runtime.text import Tokenizer
from bundlefmt.storage.backends import DEFAULT_THREADS


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
    full, for a text of up to `tokens` tokens. `least_memory` is the smallest limit that works for
    it; `streamed` are the layers whose attention finds no room, `window` how many tokens' active
    neurons the cache holds; `activity` is `every`, `traced` or `assumed`, and
    `activity_from` what it was taken from. Milliseconds are None where `untimed` says why."""

    path: str
    mode: str
    policy: str
    memory: int
    least_memory: int
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
    policy: str = "lfu",
    window: int | None = None,
    tokens: int | None = None,
    draft: str | os.PathLike[str] | None = None,
    threads: int = DEFAULT_THREADS,
    traces: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """What `run` would do with so many bytes of memory in that mode, for a text of up to `tokens`
    tokens, prompt included (None: the model's context, at most 2048). The options are those of
    `run`, and change the answer as they change a run. `traces`, a folder that `trace` wrote, says
    which neurons are active; without it the paper's shares are assumed. Times come from the profile
    of the device that the file lies on, where `calibrate` has made one.

    Raises UsageError when the memory is too little, with the smallest that works, and for a model,
    mode or trace that cannot be; FormatError for a damaged file.
    """
    selecting = Selecting(mode, share)
    caching = Caching(memory, policy, window, tokens, threads=threads)
    with BundleFile(path) as file, naming(path):
        config = decoder_config(file.config, len(file.groups))
        longest = integer(caching.tokens_of(config), "tokens", 1, config.context)
        reserved = 0
        if "tokenizer.json" in file.blob_names or draft is not None:
            # A run has it in memory when the process is measured, and its draft's then and now.
            reserved = draft_bytes(draft, Tokenizer(file), longest, threads)
        caching = replace(caching, reserved=reserved)
        divided = Divided(file, config, selecting, caching, memory_of.process_bytes())
        budget = divided.budget
        roles.find(config, {tensor.name: tensor for tensor in file.header.tensors})
        for group in file.groups:
            roles.check_ffn(group, config)
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
            policy=policy,
            memory=memory,
            least_memory=divided.least_memory,
            tokens=longest,
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
            advice=_advice(divided, found, costs, profile),
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
    divided: Divided, found: Activity, costs: Costs, profile: DeviceProfile | None
) -> list[Advice]:
    given = [
        *advice.memory(divided, found.groups, costs),
        *advice.encoding(divided, costs),
        *advice.choosing(divided, costs),
    ]
    file, mode = divided.file, divided.selecting.mode
    traceable = mode == "exact" or all(predictor.trained(file, group) for group in file.groups)
    if found.origin == "assumed" and mode in TRACED_MODES and traceable:
        given.append(Advice("trace, then plan --traces counts what is active"))
    if profile is None:
        given.append(Advice("calibrate, then plan tells times"))
    return given

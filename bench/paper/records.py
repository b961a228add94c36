"""What a step is told, and what it says: one line of JSON each."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


class Settings(msgspec.Struct, frozen=True):
    """What a step runs with: the table's name for it; the bundle file and its checkpoint's folder;
    one of PAPER; bytes of memory; tokens counted, and of the prompt before them; what gives way in
    the neuron cache (with policy window: after the paper's number of tokens); a file to draw the
    last token in. Early guesses are about as good as those on a small trained OPT, layer 0 aside:
    0.6 to 0.95 of the neurons that the last tokens did not use were found, and 0.1 to 0.25 of those
    guessed were wrong."""

    step: str
    bundle: str
    checkpoint: str | None
    model: str
    limit: int
    tokens: int
    prompt_tokens: int
    policy: str = "lfu"
    timeline: str | None = None
    seed: int = 0
    recall: float = 0.75
    wrong: float = 0.05


@dataclass(frozen=True)
class Token:
    """What one token took, in seconds and bytes; None where it cannot be told apart."""

    seconds: float
    io: float | None = None
    waited: float | None = None
    manage: float | None = None
    nbytes: int | None = None
    requests: int | None = None


@dataclass(frozen=True)
class Caching:
    """What the limit has room for: the share of the FFN's neurons that the cache can hold, how many
    those are in each layer, and the layers whose attention is read anew for every token."""

    share: float
    slots: list[int]
    streamed: list[int]

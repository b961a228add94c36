"""Speculative decoding: a small draft model proposes tokens, which the model checks in one pass
(Leviathan et al., arXiv 2211.17192).

The model itself chooses every token; a proposal only says what to compute next to it, so that the
text is the greedy one, whatever the draft. What is read and computed for proposals that turn out
wrong is in vain: their keys and values are dropped, and their neurons do not count in the cache.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from bundlefmt.errors import integer, naming
from bundlefmt.kernels import FEW_TOKENS
from bundlefmt.runtime.attention import LayerCache
from bundlefmt.runtime.decoder import Decoder
from bundlefmt.runtime.sampling import likeliest

DRAFT_TOKENS = 4  # as in "LLM in a flash" (lambda)


@dataclass
class DraftStats:
    """Counters since a model was loaded: passes that checked proposals or made a token without,
    tokens proposed, those of them that became text, and all tokens made so; seconds that drafts
    took."""

    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    made: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(
        self,
        *,
        passes: int = 0,
        proposed: int = 0,
        accepted: int = 0,
        made: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Count these, too."""
        with self._lock:
            self.passes += passes
            self.proposed += proposed
            self.accepted += accepted
            self.made += made
            self.seconds += seconds

    @property
    def accepted_rate(self) -> float:
        """Accepted / proposed; 0 when nothing was."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens made / passes of the model; 0 without any."""
        return self.made / self.passes if self.passes else 0.0


class Draft:
    """A draft model, from the bundle file `path`, at work on one text: `seen` keeps its keys and
    values. Raises UsageError for a number of `tokens` per pass that cannot be."""

    def __init__(
        self,
        decoder: Decoder,
        path: str | os.PathLike[str],
        seen: list[LayerCache],
        tokens: int,
        stats: DraftStats,
    ) -> None:
        self._decoder = decoder
        self._path = path
        self._seen = seen
        # With the token before them, they go through the cache.
        self._tokens = integer(tokens, "draft_tokens", 1, FEW_TOKENS - 1)
        self._stats = stats

    def read(self, text: Sequence[int]) -> None:
        """Take in a prompt, if the draft's context holds it."""
        start = time.perf_counter()
        if self._room(text) > 0:
            self._decoder.forward(text, self._seen)
        self._stats.add(seconds=time.perf_counter() - start)

    def continued(
        self,
        target: Decoder,
        seen: list[LayerCache],
        text: Sequence[int],
        count: int,
        eos: Set[int],
    ) -> Iterator[int]:
        """The target's greedy continuation of `text`, up to `count` tokens or one of `eos`; its
        keys and values of all of the text but the last token are in `seen`. Raises FormatError
        when the predictions of either are not numbers."""
        text, end = list(text), len(text) + count
        while len(text) < end:
            proposed = self._propose(text, end - len(text) - 1, eos)
            hidden = target.forward([text[-1], *proposed], seen)
            chosen = likeliest(target.logits(hidden))
            agreed = _agreed(proposed, chosen)
            target.drop(len(proposed) - agreed, seen)
            self._keep(len(text) + agreed)
            made = _up_to(eos, chosen[: agreed + 1])
            self._stats.add(
                passes=1,
                proposed=len(proposed),
                accepted=min(agreed, len(made)),
                made=len(made),
            )
            yield from made
            if made[-1] in eos:
                return
            text += made

    def _propose(self, text: list[int], most: int, eos: Set[int]) -> list[int]:
        """Tokens that may follow, at most so many, none after one of `eos`."""
        start = time.perf_counter()
        count = min(self._tokens, most, self._room(text))
        fed, proposed = text[self._seen[0].length :], list[int]()
        for _ in range(count):
            hidden = self._decoder.forward(fed, self._seen)
            with naming(self._path):
                token = likeliest(self._decoder.logits(hidden[-1:]))[0]
            proposed.append(token)
            if token in eos:
                break
            fed = [token]
        self._stats.add(seconds=time.perf_counter() - start)
        return proposed

    def _room(self, text: Sequence[int]) -> int:
        """How many tokens the draft's context lets it propose after `text`: it need not read the
        last of them."""
        return self._decoder.config.context - len(text) + 1

    def _keep(self, length: int) -> None:
        """Forget what the draft has read beyond that many tokens of the text."""
        self._decoder.drop(max(self._seen[0].length - length, 0), self._seen)


def _agreed(proposed: list[int], chosen: list[int]) -> int:
    """The length of the longest beginning of `proposed` that was chosen too."""
    for i, token in enumerate(proposed):
        if token != chosen[i]:
            return i
    return len(proposed)


def _up_to(eos: Set[int], tokens: list[int]) -> list[int]:
    """The tokens up to and with the first of `eos`."""
    for i, token in enumerate(tokens):
        if token in eos:
            return tokens[: i + 1]
    return tokens

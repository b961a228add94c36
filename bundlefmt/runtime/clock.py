"""Where the time of a model goes: every moment of a pass belongs to one stage."""

from __future__ import annotations

import time
from typing import NamedTuple

# attention with its norms; predict, choosing neurons; manage, the cache's tables and the submission
# of reads; wait, for reads; ffn; head, embeddings and logits.
STAGES = ("attention", "predict", "manage", "wait", "ffn", "head")


class Span(NamedTuple):
    """A stage of a layer (None: of the whole pass), or bytes read for it, from one moment to
    another in ns as `time.perf_counter_ns` counts."""

    stage: str
    layer: int | None
    began: int
    ended: int


class Clock:
    """Seconds by stage since it was made; the spans, too, from `keep_spans` on."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.spans: list[Span] | None = None
        self._since = time.perf_counter_ns()

    def keep_spans(self) -> None:
        """From now on keep every span, forgetting those before."""
        self.spans = []

    def start(self) -> None:
        """What was before this moment belongs to no stage."""
        self._since = time.perf_counter_ns()

    def lap(self, stage: str, layer: int | None = None) -> None:
        """What was since the last lap belongs to the stage."""
        now = time.perf_counter_ns()
        self.seconds[stage] += (now - self._since) / 1e9
        if self.spans is not None:
            self.spans.append(Span(stage, layer, self._since, now))
        self._since = now

    def read(self, layer: int | None, span: tuple[int, int]) -> None:
        """Reads for a layer were in flight meanwhile."""
        if self.spans is not None:
            self.spans.append(Span("read", layer, *span))

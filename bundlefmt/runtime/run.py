"""One generation from prompt to text, and how it went."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bundlefmt.errors import UsageError, integer
from bundlefmt.file import BundleFile
from bundlefmt.runtime.clock import Span
from bundlefmt.runtime.draft import DraftReport, draft_bytes, opened_draft, report_of
from bundlefmt.runtime.generate import MOST_TOKENS, Model, load_model
from bundlefmt.runtime.sampling import Sampling
from bundlefmt.runtime.speculative import DRAFT_TOKENS
from bundlefmt.runtime.text import Tokenizer
from bundlefmt.runtime.timeline import drawing
from bundlefmt.storage.atomic import refuse_existing, replacing, write_all
from bundlefmt.storage.backends import DEFAULT_QUEUE_DEPTH, DEFAULT_THREADS
from bundlefmt.storage.device import resident_memory


@dataclass(frozen=True)
class RunReport:
    """How a generation went. Bytes and seconds are of the whole generation, prompt included, but
    for those `per_token`, which are means over the tokens after the first. Bytes and requests, of
    neurons and of attention that finds no room, are the model's, without its draft's.
    `stage_seconds_per_token` are those of `runtime.clock.STAGES`, and `reading_seconds_per_token`
    those during which reads were in flight, overlapped or not. `peak_memory` is the process's, in
    bytes."""

    text: str
    mode: str
    backend: str
    fallback: str | None
    in_flight: int
    prompt_tokens: int
    new_tokens: int
    load_seconds: float
    load_bytes: int
    prompt_seconds: float
    seconds: float
    tokens_per_second: float
    ffn_bytes: int
    bytes_read: int
    bytes_read_per_token: float
    requests_per_token: float
    read_amplification: float
    io_seconds: float
    compute_seconds: float
    stage_seconds_per_token: dict[str, float]
    reading_seconds_per_token: float
    peak_memory: int
    draft: DraftReport | None = None


def run(
    path: str | os.PathLike[str],
    prompt: str,
    max_new_tokens: int = 64,
    *,
    mode: str = "dense",
    share: float = 0.3,
    memory: int | None = None,
    policy: str = "lfu",
    window: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    draft: str | os.PathLike[str] | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    backend: str = "auto",
    verify: bool = True,
    threads: int = DEFAULT_THREADS,
    queue_depth: int = DEFAULT_QUEUE_DEPTH,
    compute_threads: int | None = None,
    timeline: str | os.PathLike[str] | None = None,
    on_text: Callable[[str], None] = lambda piece: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunReport:
    """Load a bundle file's model and continue `prompt`; `on_text` gets the text as it is made,
    `progress` (layers loaded, layers in all). `timeline` is a file to draw the last pass in, as
    SVG.

    `draft` is another bundle file, whose model proposes `draft_tokens` tokens for each pass; it
    stays in memory whole, and `memory` counts it. Raises what `load_model` and `Model.generate`
    raise, UsageError when a file carries no tokenizer or the draft's has other tokens, WriteError
    for a timeline that cannot be written.
    """
    start = time.perf_counter()
    if timeline is not None:
        _check_picture(Path(timeline))
    sampling = Sampling(temperature, top_p, seed)
    max_new_tokens = integer(max_new_tokens, "max_new_tokens", 0, MOST_TOKENS)
    with BundleFile(path) as file:  # first, since it is part of the process that is budgeted for
        tokenizer = Tokenizer(file)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UsageError("no text to continue", field="prompt")
    tokens = len(ids) + max(max_new_tokens, 1)
    reading: dict[str, Any] = {
        "backend": backend,
        "verify": verify,
        "threads": threads,
        "queue_depth": queue_depth,
        "compute_threads": compute_threads,
    }
    with (
        load_model(
            path,
            mode=mode,
            share=share,
            memory=memory,
            policy=policy,
            window=window,
            tokens=tokens,
            reserved=draft_bytes(draft, tokenizer, tokens, threads),
            progress=progress,
            **reading,
        ) as model,
        opened_draft(draft, tokens, **reading) as drafting,
    ):
        tokenizer.check(ids, model.decoder.vocabulary)
        keeps_spans = timeline is not None
        generation = _Timed(
            model, ids, max_new_tokens, sampling, drafting, draft_tokens, keeps_spans
        )
        load_seconds = time.perf_counter() - start
        text = ""
        for piece in tokenizer.pieces(generation, after=ids):
            text += piece
            on_text(piece)
        if timeline is not None:
            picture = drawing(generation.spans, f"{Path(path).name}, mode {mode}: the last pass")
            with replacing(timeline, force=True) as file:
                write_all(file.fileno(), picture.encode(), 0)
        return generation.report(text, load_seconds)


def _check_picture(path: Path) -> None:
    """Raise UsageError unless `path` may be written, and is named as what it will be."""
    if path.suffix != ".svg":
        raise UsageError("unknown kind of picture", file=path, expected=".svg", found=path.suffix)
    refuse_existing(path, force=True)


class _Timed:
    """A generation that keeps account of itself; iterate over it once."""

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        draft: Model | None,
        draft_tokens: int,
        keeps_spans: bool,
    ) -> None:
        self.spans: list[Span] = []  # of the last pass
        self._keeps_spans = keeps_spans
        self._model = model
        self._draft = draft
        self._ids = ids
        self._tokens = model.tokens(ids, max_new_tokens, sampling, draft, draft_tokens)
        self._made = 0
        self._prompt_seconds = self._seconds = 0.0
        self._before = self._after_prompt = replace(model.reader.stats)
        self._stages_before = dict(model.clock.seconds)

    def __iter__(self) -> Iterator[int]:
        clock = self._model.clock
        while True:  # what is done with a token, between two of them, is not counted
            if self._keeps_spans:
                clock.keep_spans()
            start = time.perf_counter()
            token = next(self._tokens, None)
            self._seconds += time.perf_counter() - start
            if token is None:
                return
            self.spans = clock.spans or self.spans
            if not self._made:
                self._prompt_seconds = self._seconds
                self._after_prompt = replace(self._model.reader.stats)
                self._stages_before = dict(clock.seconds)
            self._made += 1
            yield token

    def report(self, text: str, load_seconds: float) -> RunReport:
        """The account, once every token is made."""
        reader = self._model.reader
        whole = reader.stats.since(self._before)
        decoding = reader.stats.since(self._after_prompt)
        decoded = self._made - 1  # the first token comes out of the prompt's pass
        decode_seconds = self._seconds - self._prompt_seconds

        def per_token(total: float) -> float:
            return total / decoded if decoded > 0 else 0.0

        return RunReport(
            text=text,
            mode=self._model.mode,
            backend=reader.backend,
            fallback=reader.fallback,
            in_flight=reader.in_flight,
            prompt_tokens=len(self._ids),
            new_tokens=self._made,
            load_seconds=load_seconds,
            load_bytes=self._before.bytes_read,
            prompt_seconds=self._prompt_seconds,
            seconds=self._seconds,
            tokens_per_second=decoded / decode_seconds if decoded > 0 else 0.0,
            ffn_bytes=sum(group.bundles.length for group in self._model.file.groups),
            bytes_read=whole.bytes_read,
            bytes_read_per_token=per_token(decoding.bytes_read),
            requests_per_token=per_token(decoding.requests),
            read_amplification=whole.read_amplification,
            io_seconds=whole.seconds,
            compute_seconds=self._seconds - whole.seconds,
            stage_seconds_per_token={
                stage: per_token(seconds - self._stages_before[stage])
                for stage, seconds in self._model.clock.seconds.items()
            },
            reading_seconds_per_token=per_token(decoding.busy_seconds),
            peak_memory=resident_memory(peak=True),
            draft=None if self._draft is None else report_of(self._draft, self._model),
        )

"""One step of the table, in a process of its own: `python -m bench.paper.steps SETTINGS` prints a
line of JSON per token as it is made, so that what is not done in time leaves something too.

I/O is the time that the device was busy with reads, `waited` the part of it for which the process
did nothing else; manage is finding and making place in the cache, and handing out reads; compute
is the rest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.paper import dense, outside
from bench.paper.figures import PAPER
from bench.paper.records import Caching, Settings, Token
from bench.paper.replay import Replayed, fill_caches, random_predictors
from bench.paper.traces import Trace, fit
from bench.paper.unbundled import unbundle
from bundlefmt.file import BundleFile
from bundlefmt.runtime.decoder import Decoder
from bundlefmt.runtime.generate import Model, load_model
from bundlefmt.runtime.timeline import drawing

_FIRST = 3  # tokens of a replay that are not counted: memory is touched, the cache settles


def text(settings: Settings, vocabulary: int) -> list[int]:
    """The prompt and what follows it: the same in each step."""
    random = np.random.default_rng(settings.seed)
    count = settings.prompt_tokens + settings.tokens + _FIRST
    return [int(token) for token in random.integers(4, vocabulary, count)]


def made(
    decoder: Decoder, settings: Settings, before: Callable[[], None], skipped: int
) -> Iterator[None]:
    """Feeds the prompt (at the first `next`), then one token at a time."""
    ids = text(settings, decoder.vocabulary)
    prompt, rest = ids[: settings.prompt_tokens], ids[settings.prompt_tokens :]
    cache = decoder.new_cache(len(ids))
    decoder.logits(decoder.forward(prompt, cache)[-1:])
    yield
    for token in rest[: settings.tokens + skipped]:
        hidden = decoder.forward([token], cache)
        before()
        decoder.logits(hidden)
        yield


def dense_step(settings: Settings) -> Iterator[Token]:
    """naive, mapped, hybrid."""
    make = {"naive": dense.naive, "mapped": dense.mapped, "hybrid": dense.hybrid}[settings.step]
    made_of = make(settings.bundle, settings.limit, settings.prompt_tokens + settings.tokens)
    decoder, before_head, loads = made_of
    tokens = made(decoder, settings, before_head, skipped=0)
    next(tokens)
    while True:
        before = (loads.seconds, loads.nbytes) if loads else (0.0, 0)
        start = time.perf_counter()
        if next(tokens, tokens) is tokens:
            return
        seconds = time.perf_counter() - start
        if loads is None:
            yield Token(seconds)
        else:
            io = loads.seconds - before[0]
            yield Token(seconds, io, io, 0.0, loads.nbytes - before[1])


def sparse_step(settings: Settings) -> Iterator[Token | Caching]:
    """predictor, window, bundling, overlap."""
    paper = PAPER[settings.model]
    with BundleFile(settings.bundle) as file:
        groups = file.groups
    reuse = fit(paper.predicted, paper.held, paper.fresh, paper.window)
    tokens = settings.tokens + _FIRST
    trace = Trace(reuse, len(groups), groups[0].neurons, tokens, settings.seed)
    early = settings.recall, settings.wrong
    replays = {
        group.layer: Replayed(group.layer, predictor, trace, early)
        for group, predictor in zip(groups, random_predictors(groups, paper), strict=True)
    }
    with load_model(settings.bundle, **_options(settings)) as model:
        if settings.step in ("predictor", "window"):
            unbundle(model)
        steps = made(model.decoder, settings, lambda: None, skipped=_FIRST)
        next(steps)
        if model.budget is not None:
            fill_caches(model, trace)
            yield caching(model)
        model.decoder.select_by(lambda group, selection: replays[group.layer])
        for token in _timed(model, steps):
            spans = model.clock.spans or []
            yield token
        if settings.timeline is not None:
            title = f"A token of {settings.model}'s shape, {settings.limit / 1e9:.2f} GB of memory"
            Path(settings.timeline).write_text(drawing(spans, title))


def caching(model: Model) -> Caching:
    """What the limit has room for."""
    assert model.budget is not None
    slots, neurons = model.budget.slots, sum(group.neurons for group in model.file.groups)
    return Caching(sum(slots) / neurons, list(slots), list(model.budget.streamed))


def _options(settings: Settings) -> dict[str, Any]:
    """How the step has the model loaded. What is to keep within the limit counts what this process
    holds already: the predictors and the trace."""
    if settings.step == "predictor":
        return {"verify": False, "gap": 0}
    return {
        "memory": settings.limit,
        "policy": settings.policy,
        "window": PAPER[settings.model].window if settings.policy == "window" else None,
        "tokens": settings.prompt_tokens + settings.tokens + _FIRST,
        "verify": settings.step != "window",
        "gap": 0 if settings.step == "window" else None,
        "ahead": settings.step == "overlap",
    }


def _timed(model: Model, tokens: Iterator[None]) -> Iterator[Token]:
    for number in range(sys.maxsize):
        before, stages = replace(model.reader.stats), dict(model.clock.seconds)
        model.clock.keep_spans()
        start = time.perf_counter()
        if next(tokens, tokens) is tokens:
            return
        seconds, stats = time.perf_counter() - start, model.reader.stats.since(before)
        if number >= _FIRST:
            yield Token(
                seconds,
                io=stats.busy_seconds,
                waited=model.clock.seconds["wait"] - stages["wait"],
                manage=model.clock.seconds["manage"] - stages["manage"],
                nbytes=stats.bytes_read,
                requests=stats.requests,
            )


def outside_step(settings: Settings) -> Iterator[Token]:
    """accelerate, torch."""
    assert settings.checkpoint is not None
    load = {"accelerate": outside.offloaded, "torch": outside.mapped}[settings.step]
    ids = text(settings, 32000)[: settings.prompt_tokens + settings.tokens]
    for seconds in outside.tokens(
        load(settings.checkpoint, settings.limit), ids, settings.prompt_tokens
    ):
        yield Token(seconds)


STEPS: dict[str, Callable[[Settings], Iterator[Any]]] = {
    **dict.fromkeys(("naive", "mapped", "hybrid"), dense_step),
    **dict.fromkeys(("predictor", "window", "bundling", "overlap"), sparse_step),
    **dict.fromkeys(("accelerate", "torch"), outside_step),
}


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    for record in STEPS[settings.step](settings):
        print(json.dumps({type(record).__name__: asdict(record)}), flush=True)


if __name__ == "__main__":
    main()

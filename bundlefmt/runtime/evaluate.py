"""How well a model in a bundle file predicts a text, and how near a mode stays to dense."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, UsageError, integer, naming
from bundlefmt.file import BundleFile
from bundlefmt.kernels import Floats
from bundlefmt.runtime.generate import Model, load_model
from bundlefmt.runtime.sampling import check_logits
from bundlefmt.runtime.text import Tokenizer, read_text

# Modes in which a token's logits do not depend on the tokens that are fed with it.
WHOLE_MODES = ("dense", "exact")

_CONTEXT = 512  # tokens of a window, where the model's context is not smaller
_LOGITS_BYTES = 32 << 20  # of log-probabilities in memory at once, for one model


@dataclass(frozen=True)
class EvalReport:
    """How a mode predicts a text. `tokens` are those scored: all but the first; `text_bytes` is
    their UTF-8. `nll` is the mean negative log-likelihood, in nats per token. Bytes read, of
    bundles and of attention that finds no room, are per token fed, with `tokens_at_once` of them
    sharing their reads at most.

    `dense` is the same text in mode dense; against it stand `top1_agreement`, the share of tokens
    whose likeliest prediction is the same, and `kl`, the mean KL(dense || mode) in nats per token.
    All three are None when the mode is dense.
    """

    mode: str
    tokens: int
    text_bytes: int
    context: int
    tokens_at_once: int
    nll: float
    perplexity: float
    bits_per_byte: float
    ffn_bytes: int
    bytes_read_per_token: float
    seconds: float
    dense: EvalReport | None = None
    top1_agreement: float | None = None
    kl: float | None = None


class Window(NamedTuple):
    """The tokens `begin`..`end - 1` are fed; what they predict is scored from `first` on."""

    begin: int
    first: int
    end: int


def evaluate(
    path: str | os.PathLike[str],
    text_path: str | os.PathLike[str],
    *,
    mode: str = "dense",
    memory: int | None = None,
    policy: str = "lfu",
    window: int | None = None,
    max_tokens: int | None = None,
    context: int | None = None,
    one_at_a_time: bool | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvalReport:
    """Score a UTF-8 text, or its first `max_tokens` tokens, by the model in a bundle file.

    The text is fed in windows of `context` tokens (default: the model's context, at most 512) that
    overlap by half, so that each token is scored once, and after the first window with at least
    half a window before it. `one_at_a_time` feeds tokens as generation does, each with the reads
    of its own: the default with `memory`, and for a mode that would otherwise look at all of a
    window's tokens to choose its neurons. `memory`, `policy` and `window` are those of `run`: the
    cache is the one of a run of `context` tokens within that limit, which what scores them and the
    dense model beside it do not count in. `progress` gets (tokens scored, tokens in all).

    Raises what `load_model` raises, UsageError for a text that cannot be scored, FormatError for a
    model whose predictions are not numbers.
    """
    if context is not None:
        context = integer(context, "context", 2)
    with BundleFile(path) as file:  # before the model: it is part of the process that is limited
        tokenizer = Tokenizer(file)
    with ExitStack() as stack:
        model = stack.enter_context(
            load_model(
                path,
                mode=mode,
                memory=memory,
                policy=policy,
                window=window,
                tokens=context or _CONTEXT,
            )
        )
        width = window_width(model, context)
        text = _text(text_path, tokenizer, max_tokens)
        tokenizer.check(text.ids, model.decoder.vocabulary)
        single = one_at_a_time
        if single is None:
            single = mode not in WHOLE_MODES or memory is not None
        scored = _Account(model, 1 if single else width)
        if mode == "dense":
            for span in _watched(text, width, progress):
                hidden = scored.feed(text.ids[span.begin : span.end])
                for rows, targets in _scored(text, span, model):
                    scored.score(hidden[rows], targets)
            return scored.report(text, width)

        dense = _Account(stack.enter_context(load_model(path)), width)
        agreed, divergence = 0, 0.0
        for span in _watched(text, width, progress):
            fed = text.ids[span.begin : span.end]
            hidden, reference = scored.feed(fed), dense.feed(fed)
            for rows, targets in _scored(text, span, model):
                ours = scored.score(hidden[rows], targets)
                theirs = dense.score(reference[rows], targets)
                agreed += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
                divergence += float((np.exp(theirs) * (theirs - ours)).sum())
        tokens = len(text.ids) - 1
        return replace(
            scored.report(text, width),
            dense=dense.report(text, width),
            top1_agreement=agreed / tokens,
            kl=divergence / tokens,
        )


def windows(tokens: int, width: int) -> Iterator[Window]:
    """Windows of at most `width` fed tokens that score each of tokens 1..`tokens` - 1 once."""
    stride = width // 2
    first = 1
    while first < tokens:
        begin = max(first - 1 - (width - stride), 0)
        end = min(begin + width, tokens - 1)
        yield Window(begin, first, end)
        first = end + 1


def window_width(model: Model, context: int | None = None) -> int:
    """Tokens fed in one window: `context`, or what the model allows. Raises UsageError for a
    context that is not the model's, FormatError for a model whose own holds no token and the one
    that follows it."""
    allowed = model.decoder.config.context
    if allowed < 2:
        raise FormatError(
            "the model's context is too short to score",
            file=model.file.path,
            field="config.json",
            expected="2 or more tokens",
            found=allowed,
        )
    if context is None:
        return min(allowed, _CONTEXT)
    if context > allowed:
        raise UsageError(
            "out of range",
            field="context",
            expected=f"2 to {allowed}, the model's",
            found=context,
        )
    return context


def hidden_states(model: Model, ids: Sequence[int], at_once: int) -> Floats:
    """Hidden states float32 [tokens, width of the head] of the tokens, fed `at_once` at a time."""
    cache = model.decoder.new_cache(len(ids))
    return np.concatenate(
        [
            model.decoder.forward(ids[start : start + at_once], cache)
            for start in range(0, len(ids), at_once)
        ]
    )


def log_probabilities(model: Model, hidden: Floats) -> NDArray[np.float64]:
    """log P(token) after each hidden state: [tokens, vocabulary]. Raises FormatError when the
    model's predictions are not numbers."""
    logits = model.decoder.logits(hidden).astype(np.float64)
    with naming(model.file.path):
        check_logits(logits)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def rows_at_once(model: Model) -> int:
    """How many tokens' log-probabilities are in memory at once."""
    return max(_LOGITS_BYTES // (8 * model.decoder.vocabulary), 1)


class _Text(NamedTuple):
    """A text's tokens, and the bytes that all but the first of them stand for."""

    ids: list[int]
    nbytes: int


def _text(path: str | os.PathLike[str], tokenizer: Tokenizer, max_tokens: int | None) -> _Text:
    if max_tokens is not None:
        max_tokens = integer(max_tokens, "max_tokens", 2)
    text = read_text(path)
    if not text:
        raise UsageError("text is empty", file=path)
    ids, ends = tokenizer.encode_with_ends(text)
    ids, ends = ids[:max_tokens], ends[:max_tokens]
    if len(ids) < 2:
        raise UsageError("nothing to score", file=path, expected="2 or more tokens", found=len(ids))
    scored = text[ends[0] : max(ends)].encode()
    if not scored:
        raise UsageError("nothing to score", file=path, expected="text after the first token")
    return _Text(ids, len(scored))


def _watched(text: _Text, width: int, progress: Callable[[int, int], None]) -> Iterator[Window]:
    """The windows of a text; `progress` hears of each when it is done."""
    for window in windows(len(text.ids), width):
        yield window
        progress(window.end, len(text.ids) - 1)


def _scored(text: _Text, window: Window, model: Model) -> Iterator[tuple[slice, list[int]]]:
    """The rows of a window that are scored, some at a time, and the tokens that follow them."""
    step = rows_at_once(model)
    for start in range(window.first, window.end + 1, step):
        stop = min(start + step, window.end + 1)
        yield slice(start - 1 - window.begin, stop - 1 - window.begin), text.ids[start:stop]


class _Account:
    """One model's score, and what it cost."""

    def __init__(self, model: Model, at_once: int) -> None:
        self._model = model
        self._at_once = at_once
        self._before = model.reader.stats.bytes_read
        self._fed = 0
        self._nll = self._seconds = 0.0

    def feed(self, ids: Sequence[int]) -> Floats:
        """Hidden states of a window's tokens."""
        start = time.perf_counter()
        hidden = hidden_states(self._model, ids, self._at_once)
        self._seconds += time.perf_counter() - start
        self._fed += len(ids)
        return hidden

    def score(self, hidden: Floats, targets: Sequence[int]) -> NDArray[np.float64]:
        """Count what the hidden states predict of the tokens that follow; returns all of their
        log-probabilities, [tokens, vocabulary]."""
        start = time.perf_counter()
        found = log_probabilities(self._model, hidden)
        self._nll -= float(found[np.arange(len(targets)), targets].sum())
        self._seconds += time.perf_counter() - start
        return found

    def report(self, text: _Text, context: int) -> EvalReport:
        """The account, once every token is scored."""
        tokens = len(text.ids) - 1
        nll = self._nll / tokens
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(nll))
        if not math.isfinite(perplexity):
            raise FormatError(
                "the model's predictions are not numbers",
                file=self._model.file.path,
                field="nats per token",
                found=nll,
            )
        read = self._model.reader.stats.bytes_read - self._before
        return EvalReport(
            mode=self._model.mode,
            tokens=tokens,
            text_bytes=text.nbytes,
            context=context,
            tokens_at_once=self._at_once,
            nll=nll,
            perplexity=perplexity,
            bits_per_byte=self._nll / math.log(2) / text.nbytes,
            ffn_bytes=sum(group.bundles.length for group in self._model.file.groups),
            bytes_read_per_token=read / self._fed,
            seconds=self._seconds,
        )

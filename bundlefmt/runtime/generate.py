"""A model loaded from a bundle file, and the loop that makes tokens with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels, native
from bundlefmt.errors import BundleError, UsageError, integer, naming
from bundlefmt.file import BundleFile
from bundlefmt.flash import profiles
from bundlefmt.flash.budget import Budget
from bundlefmt.reader import Reader
from bundlefmt.runtime.attention import LayerCache
from bundlefmt.runtime.clock import Clock
from bundlefmt.runtime.config import DecoderConfig, decoder_config, eos_of
from bundlefmt.runtime.decoder import Decoder
from bundlefmt.runtime.memory import Caches, Caching, make_caches, plan
from bundlefmt.runtime.rotation import Rotation
from bundlefmt.runtime.sampling import Sampling, choose
from bundlefmt.runtime.selection import Selecting
from bundlefmt.runtime.speculative import DRAFT_TOKENS, Draft, DraftStats
from bundlefmt.runtime.streamer import Streamer
from bundlefmt.runtime.weights import attention_matrices
from bundlefmt.storage.backends import DEFAULT_QUEUE_DEPTH, DEFAULT_THREADS
from bundlefmt.storage.buffers import PAGE

MOST_TOKENS = (1 << 31) - 1  # that anyone asks for

_STREAMING = 8  # reads in flight, of a megabyte each: enough, and they leave room for neurons


class Model:
    """A language model on a bundle file; a context manager. Made by `load_model`.

    Threads may share it, and generations may alternate: their passes take turns.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        selecting: Selecting,
        caching: Caching | None,
        backend: str,
        verify: bool,
        threads: int,
        queue_depth: int,
        gap: int | None,
        ahead: bool,
        progress: Callable[[int, int], None],
    ) -> None:
        self.mode = selecting.mode
        self.budget: Budget | None = None
        self.draft_stats = DraftStats()
        self._process = os.getpid()
        self._texts: WeakKeyDictionary[LayerCache, int] = WeakKeyDictionary()  # and their tokens
        with ExitStack() as stack, naming(path):
            self.file = stack.enter_context(BundleFile(path))
            config = decoder_config(self.file.config, len(self.file.groups))
            self._eos = config.eos | _eos(self.file)
            self._tokens: int | None = None  # that the budget is for
            caches = Caches([None] * len(self.file.groups), None)
            if caching is not None:
                backend = caching.backend(backend)
                self._tokens = caching.tokens_of(config)
                self.budget = plan(self.file, config, selecting, caching)
                caches = make_caches(self.budget, self.file.groups, caching)
            self.caches = caches.groups
            self.reader: Reader = stack.enter_context(
                self.file.reader(
                    backend,
                    verify=verify,
                    threads=threads,
                    queue_depth=queue_depth,
                    memory=caches.memory,
                    gap=_paying_gap(self.file) if gap is None else gap,
                )
            )
            rotation: Rotation | None = None
            if self.budget is not None and self.budget.streamed:
                rotation = self._rotation(config, self.budget.streamed, verify)
                stack.callback(rotation.close)
            self.decoder = Decoder(
                config,
                self.file,
                Streamer(self.reader),
                selecting,
                caches.groups,
                rotation,
                ahead=ahead,
                progress=progress,
            )
            self._open = stack.pop_all()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def clock(self) -> Clock:
        """Where the time of its passes goes."""
        return self.decoder.clock

    def close(self) -> None:
        """Let go of the file, once no thread computes. May be called twice."""
        turn = self.decoder.exclusive() if os.getpid() == self._process else nullcontext()
        with turn:
            self._open.close()

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [tokens, vocabulary], which no memory limit counts; keys and values are not kept
        between calls."""
        tokens = self.decoder.check(ids)
        return self.decoder.logits(self.decoder.forward(tokens, self._new_cache(len(tokens))))

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 16,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        draft: Model | None = None,
        draft_tokens: int = DRAFT_TOKENS,
    ) -> list[int]:
        """The new ids that follow `ids`, up to and with an end-of-text token.

        With a `draft`, a model of the same tokens, each pass checks up to `draft_tokens` of its
        proposals (`runtime.speculative`): the ids are the same, up to float32 rounding. Raises
        UsageError for a draft with another vocabulary and for a temperature beside it.
        """
        sampling = Sampling(temperature, top_p, seed)
        return list(self.tokens(ids, max_new_tokens, sampling, draft, draft_tokens))

    def tokens(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        draft: Model | None = None,
        draft_tokens: int = DRAFT_TOKENS,
    ) -> Iterator[int]:
        """Like `generate`, one id at a time as they are made."""
        max_new_tokens = integer(max_new_tokens, "max_new_tokens", 0, MOST_TOKENS)
        fed = max(max_new_tokens - 1, 0)  # the last token that is made is never itself an input
        tokens = self.decoder.check(ids, fed)
        length = len(tokens) + fed
        sampling = sampling or Sampling()
        drafting = None
        if draft is not None:
            drafting = self._drafting(draft, draft_tokens, sampling, length)
        return self._made(tokens, max_new_tokens, sampling, self._new_cache(length), drafting)

    def _drafting(self, draft: Model, tokens: int, sampling: Sampling, length: int) -> Draft:
        """The draft at work on a text of that length."""
        if not isinstance(draft, Model):
            raise UsageError("a draft is a loaded model", field="draft", found=repr(draft)[:40])
        if sampling.temperature:
            raise UsageError(
                "a draft is for greedy text",
                field="temperature",
                expected=0,
                found=sampling.temperature,
            )
        if draft.decoder.vocabulary != self.decoder.vocabulary:
            raise UsageError(
                "the draft has another vocabulary",
                file=draft.file.path,
                expected=f"{self.decoder.vocabulary} tokens, as {os.fspath(self.file.path)} has",
                found=draft.decoder.vocabulary,
            )
        cache = draft._new_cache(min(length, draft.decoder.config.context))
        return Draft(draft.decoder, draft.file.path, cache, tokens, self.draft_stats)

    def _rotation(self, config: DecoderConfig, streamed: Sequence[int], verify: bool) -> Rotation:
        layers = {layer: attention_matrices(self.file, config, layer) for layer in streamed}
        backend, _ = self.file.backend(threads=_STREAMING, queue_depth=_STREAMING)
        return Rotation(self.file.path, backend, layers, verify, self.reader.stats)

    def _new_cache(self, tokens: int) -> list[LayerCache]:
        """Room for the keys and values of that many tokens."""
        with self.decoder.exclusive():
            left = tokens if self._tokens is None else self._tokens - sum(self._texts.values())
            if tokens > left:
                raise UsageError(
                    "a longer text than the memory was divided for",
                    field="tokens",
                    expected=f"at most {left}" + (", beside other texts" if self._texts else ""),
                    found=tokens,
                )
            cache = self.decoder.new_cache(tokens)
            self._texts[cache[0]] = tokens
            return cache

    def _made(
        self,
        ids: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        cache: list[LayerCache],
        draft: Draft | None,
    ) -> Iterator[int]:
        random = np.random.default_rng(sampling.seed)
        context = ids
        if draft is not None and max_new_tokens > 1:
            draft.read(ids)
        for _ in range(max_new_tokens):
            hidden = self.decoder.forward(context, cache)
            with naming(self.file.path):
                token = choose(self.decoder.logits(hidden[-1:])[0], sampling, random)
            yield token
            if token in self._eos:
                return
            context = [token]
            if draft is not None:
                text = [*ids, token]
                with naming(self.file.path):
                    yield from draft.continued(
                        self.decoder, cache, text, max_new_tokens - 1, self._eos
                    )
                return


def load_model(
    path: str | os.PathLike[str],
    *,
    mode: str = "dense",
    share: float = 0.3,
    memory: int | None = None,
    policy: str = "lfu",
    window: int | None = None,
    tokens: int | None = None,
    reserved: int = 0,
    backend: str = "auto",
    verify: bool = True,
    threads: int = DEFAULT_THREADS,
    queue_depth: int = DEFAULT_QUEUE_DEPTH,
    gap: int | None = None,
    compute_threads: int | None = None,
    ahead: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Model:
    """The model in a bundle file, ready to compute.

    `dense` streams every neuron; `exact`, for ReLU-like activations, reads only bundles whose
    activation is not zero, and gives the same tokens; `predict` takes the neurons that the file's
    predictors name, or, where it has none, predictors made from the weights at once; `topk` takes
    each token's strongest ones, a `share` of them: approximations. With `memory`, in bytes, the
    process keeps within it, and what is left of it holds neurons from token to token (`policy`,
    `window`, `tokens`, `reserved`: see `Caching`); with `ahead`, a layer's likely neurons are read
    while its attention is computed. `threads`, `queue_depth` and `gap` (None: what
    pays on the file's device, if it was calibrated) are the reader's
    (`BundleFile.reader`); `compute_threads`, where given, becomes the process's number of threads
    to compute with (`kernels.set_threads`). `progress` gets (layers loaded, layers in all). Raises
    UsageError for a model, mode or memory that cannot be and where the native core is missing
    unasked (`native.require`), FormatError for a damaged file.
    """
    native.require()
    if compute_threads is not None:
        kernels.set_threads(compute_threads, "compute_threads")
    return Model(
        path,
        selecting=Selecting(mode, share),
        caching=None
        if memory is None
        else Caching(memory, policy, window, tokens, reserved, threads),
        backend=backend,
        verify=verify,
        threads=threads,
        queue_depth=queue_depth,
        gap=gap,
        ahead=ahead,
        progress=progress,
    )


def _paying_gap(file: BundleFile) -> int:
    """Up to how many bytes between two bundles it pays to read along, but no more than a bundle or
    a page has, so that most of what is read was asked for; 0 on a device that nobody has measured,
    or whose profile cannot be used."""
    try:
        profile = profiles.load(file.path)
    except BundleError:
        return 0
    if profile is None or not file.groups:
        return 0
    stride = max(group.stride for group in file.groups)
    return min(profile.break_even_gap(stride), max(stride, PAGE))


def _eos(file: BundleFile) -> frozenset[int]:
    """The end-of-text tokens of generation_config.json, which knows more of them than config.json
    for models that were taught to chat."""
    name = "generation_config.json"
    return eos_of(file.document(name), name)

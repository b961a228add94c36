"""A draft model beside a model: wholly in memory, which the model's limit counts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bundlefmt.errors import UsageError, naming
from bundlefmt.file import BundleFile
from bundlefmt.flash.budget import with_slack
from bundlefmt.runtime.config import decoder_config
from bundlefmt.runtime.generate import Model, load_model
from bundlefmt.runtime.memory import Caching, plan
from bundlefmt.runtime.selection import Selecting
from bundlefmt.runtime.text import Tokenizer

_UNLIMITED = sys.maxsize


@dataclass(frozen=True)
class DraftReport:
    """What a draft brought: passes of the model after the prompt's, and tokens made per pass;
    tokens proposed, and those of them that became text. Seconds and bytes read are the draft's
    own, prompt included."""

    path: str
    passes: int
    tokens_per_pass: float
    proposed: int
    accepted: int
    accepted_rate: float
    bytes_read: int
    seconds: float


def draft_bytes(
    path: str | os.PathLike[str] | None, tokenizer: Tokenizer, tokens: int, threads: int
) -> int:
    """What the draft model of a bundle file takes of memory for texts of that many tokens, with all
    of its neurons; 0 for no path. Raises UsageError when `tokenizer`, the model's, has other tokens
    than the draft's."""
    if path is None:
        return 0
    with BundleFile(path) as file, naming(path):
        if Tokenizer(file).vocabulary != tokenizer.vocabulary:
            raise UsageError(
                "the draft's tokenizer has other tokens",
                file=path,
                expected=f"those of {os.fspath(tokenizer.path)}",
            )
        config = decoder_config(file.config, len(file.groups))
        caching = Caching(_UNLIMITED, tokens=tokens, threads=threads)
        budget = plan(file, config, Selecting(), caching, process=0)
    return budget.needs.total + with_slack(budget.cache)


@contextmanager
def opened_draft(
    path: str | os.PathLike[str] | None, tokens: int, **reading: Any
) -> Iterator[Model | None]:
    """The draft model of a bundle file for texts of that many tokens, all of its neurons to stay
    in memory; None for no path. `reading` is for `load_model`."""
    if path is None:
        yield None
        return
    # Its own memory is not limited: the limit of the model beside it counts all that it takes.
    with load_model(path, memory=_UNLIMITED, tokens=tokens, **reading) as draft:
        yield draft


def report_of(draft: Model, model: Model) -> DraftReport:
    """The account of the draft of a model just loaded, after one generation."""
    stats = model.draft_stats
    return DraftReport(
        path=os.fspath(draft.file.path),
        passes=stats.passes,
        tokens_per_pass=stats.tokens_per_pass,
        proposed=stats.proposed,
        accepted=stats.accepted,
        accepted_rate=stats.accepted_rate,
        bytes_read=draft.reader.stats.bytes_read,
        seconds=stats.seconds,
    )

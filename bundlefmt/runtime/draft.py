"""A draft model beside a model: loaded first, and wholly in memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bundlefmt.errors import UsageError
from bundlefmt.file import BundleFile
from bundlefmt.runtime.generate import Model, load_model
from bundlefmt.runtime.text import Tokenizer


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


@contextmanager
def opened_draft(
    path: str | os.PathLike[str] | None, tokenizer: Tokenizer, tokens: int, **reading: Any
) -> Iterator[Model | None]:
    """The draft model of a bundle file for texts of that many tokens, all of its neurons to stay
    in memory; None for no path. `reading` is for `load_model`.

    Raises UsageError when `tokenizer`, the model's, has other tokens than the draft's.
    """
    if path is None:
        yield None
        return
    with BundleFile(path) as file:
        if Tokenizer(file).vocabulary != tokenizer.vocabulary:
            raise UsageError(
                "the draft's tokenizer has other tokens",
                file=path,
                expected=f"those of {os.fspath(tokenizer.path)}",
            )
    # Its own memory is not limited: the limit of the model beside it counts all that it takes.
    with load_model(path, memory=sys.maxsize, tokens=tokens, **reading) as draft:
        yield draft


def yet_to_take(draft: Model | None) -> int:
    """Bytes that a draft just loaded will take besides what it has."""
    if draft is None or draft.budget is None:
        return 0
    needs = draft.budget.needs
    return draft.budget.cache + needs.kv_cache + needs.buffers


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

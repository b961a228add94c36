"""Predictors for a model of one's own: record a trace of it, train on the trace."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bundlefmt.convert.update import append
from bundlefmt.errors import UsageError, naming
from bundlefmt.file import BundleFile
from bundlefmt.flash.predictor import (
    RANK,
    RECALL,
    Predictor,
    Quality,
    check_rank,
    read_selector,
)
from bundlefmt.flash.traces import Trace, new_trace, parted
from bundlefmt.flash.training import Training, require_torch, train
from bundlefmt.layout.constants import BlockEncodingName
from bundlefmt.layout.encodings import numbers_in
from bundlefmt.layout.header import Predictor as PredictorEntry
from bundlefmt.runtime.generate import load_model
from bundlefmt.runtime.text import Tokenizer, read_text

EPOCHS = 2
_WINDOW = 512  # tokens that see each other, as in a run of that length


@dataclass(frozen=True)
class TracedActivity:
    """The share of a layer's neurons that were active, mean over the tokens."""

    layer: int
    neurons: int
    active_share: float


@dataclass(frozen=True)
class TraceReport:
    """What was recorded, and where it lies."""

    path: str
    tokens: int
    seconds: float
    layers: list[TracedActivity]


@dataclass(frozen=True)
class TrainedLayer:
    """How well a layer's predictor does on the part of the trace that was held out.
    `predicted_per_active` is the number of neurons predicted, over that of those active."""

    layer: int
    rank: int
    threshold: float
    active_share: float
    recall: float
    precision: float
    predicted_per_active: float


@dataclass(frozen=True)
class TrainReport:
    """The predictors that were appended; `predictor_bytes` is what they take of memory."""

    path: str
    generation: int
    tokens: int
    predictor_bytes: int
    seconds: float
    layers: list[TrainedLayer]


def trace(
    path: str | os.PathLike[str],
    text: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TraceReport:
    """Run a model densely over the text of a file, and record in the folder `out` (default: the
    model's name with `.traces`) which neurons were active for each token.

    Raises UsageError for a file or folder that cannot be used and a model without exact zeros,
    WriteError when the device refuses.
    """
    start = time.perf_counter()
    if max_tokens is not None and max_tokens < 1:
        raise UsageError("out of range", field="max_tokens", expected="1 or more", found=max_tokens)
    with load_model(path, mode="dense") as model, naming(path):
        tokenizer = Tokenizer(model.file)
        ids = tokenizer.encode(read_text(text))[:max_tokens]
        tokenizer.check(ids, model.decoder.vocabulary)
        if not ids:
            raise UsageError("no text to run over", file=text)
        window = min(model.decoder.config.context, _WINDOW)
        target = Path(out) if out is not None else Path(path).with_suffix(".traces")
        file_id, groups = model.file.superblock.file_id, model.file.groups
        with new_trace(target, file_id, groups) as writer:
            model.decoder.observe(writer.record)
            for done in range(0, len(ids), window):
                progress(done, len(ids))
                model.decoder.forward(ids[done : done + window], model.decoder.new_cache())
            info = writer.finish()
    return TraceReport(
        path=os.fspath(target),
        tokens=info.tokens,
        seconds=time.perf_counter() - start,
        layers=[
            TracedActivity(layer.layer, layer.neurons, layer.active / (layer.neurons * info.tokens))
            for layer in info.layers
        ],
    )


def train_predictors(
    path: str | os.PathLike[str],
    traces: str | os.PathLike[str],
    *,
    rank: int = RANK,
    last_layers: int = 0,
    last_rank: int | None = None,
    recall: float = RECALL,
    epochs: int = EPOCHS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainReport:
    """Train a predictor for every layer on a trace of this model, and append them to its file,
    in place of those that it has. The `last_layers` layers get `last_rank`, the others `rank`.

    Raises UsageError for settings that cannot be, a trace of another model, and where PyTorch is
    not installed; what `append` raises.
    """
    start = time.perf_counter()
    require_torch()
    recorded = Trace(traces)
    layers = recorded.info.layers
    if not 0 <= last_layers <= len(layers):
        raise UsageError(
            "out of range", field="last_layers", expected=f"0..{len(layers)}", found=last_layers
        )
    if bool(last_layers) != (last_rank is not None):
        raise UsageError("last_layers and last_rank go together", field="last_rank")
    ranks = [rank] * (len(layers) - last_layers) + [
        rank if last_rank is None else last_rank
    ] * last_layers
    settings = [Training(layer_rank, recall, epochs) for layer_rank in ranks]
    trained: dict[int, tuple[Predictor, Quality]] = {}
    with BundleFile(path) as file, file.reader() as reader:
        groups = recorded.groups_of(file)
        for group, setting in zip(groups, settings, strict=True):
            check_rank(setting.rank, group.d_model)
        done, total = 0, epochs * len(layers) * parted(recorded.info.tokens)[0].size

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done, total)

        for index, (group, setting) in enumerate(zip(groups, settings, strict=True)):
            selector = read_selector(file, reader, group)
            found = recorded.layer(index)
            with naming(traces):
                trained[group.layer] = train(found, selector, setting, advance)
    tensors: dict[str, NDArray[Any]] = {}
    entries = []
    for layer, (predictor, _) in trained.items():
        a, b = (f"bundlefmt.predictor.{layer}.{matrix}" for matrix in "ab")
        in_blocks = predictor.a.encoding == "q8_0"
        for name, part in ((a, predictor.a), (b, predictor.b)):
            tensors[name] = part.stored if in_blocks else numbers_in(part.stored, part.encoding)
        encoding: BlockEncodingName | None = "q8_0" if in_blocks else None
        entries.append(PredictorEntry(layer, a, b, predictor.threshold, encoding=encoding))
    block = append(path, tensors=tensors, predictors=entries)
    return TrainReport(
        path=os.fspath(path),
        generation=block.generation,
        tokens=recorded.info.tokens,
        predictor_bytes=sum(matrix.nbytes for matrix in tensors.values()),
        seconds=time.perf_counter() - start,
        layers=[_row(layer, *found) for layer, found in trained.items()],
    )


def _row(layer: int, predictor: Predictor, found: Quality) -> TrainedLayer:
    return TrainedLayer(
        layer=layer,
        rank=predictor.a.stored.shape[0],
        threshold=predictor.threshold,
        active_share=found.active / found.pairs,
        recall=found.recall,
        precision=found.precision,
        predicted_per_active=found.predicted / max(found.active, 1),
    )

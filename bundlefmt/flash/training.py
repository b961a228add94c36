"""Training predictors on a trace, with PyTorch.

Each layer's predictor starts as the untrained one (`flash.predictor`) and learns which neurons
were active, a yes or no for each: cross entropy, with the rare yes weighted up ("LLM in a flash",
section 3.1 and appendix B). The last part of the trace is held out: the threshold is set there,
and recall and precision are counted there, with the numbers as they will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import FormatError, UsageError
from bundlefmt.flash.predictor import (
    TOKENS,
    Predictor,
    Quality,
    Sample,
    Selector,
    as_stored,
    calibrated,
    quality,
    untrained,
)
from bundlefmt.flash.traces import LayerTrace, parted
from bundlefmt.kernels import Floats

_FEWEST_TOKENS = 100
_START_TOKENS = 4096  # that the untrained predictor is made from
_BATCH = 256  # tokens
_RATE, _DECAY = 3e-3, 0.01
_MOST_WEIGHT = 10.0
_SEED = 1


@dataclass(frozen=True)
class Training:
    """What to train: the rank, the share of active neurons to find, passes over the trace."""

    rank: int
    recall: float
    epochs: int

    def __post_init__(self) -> None:
        if not 0 < self.recall < 1:
            raise UsageError(
                "out of range", field="recall", expected="between 0 and 1", found=self.recall
            )
        if self.epochs < 1:
            raise UsageError(
                "out of range", field="epochs", expected="1 or more", found=self.epochs
            )


def train(
    trace: LayerTrace,
    selector: Selector,
    training: Training,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[Predictor, Quality]:
    """A layer's predictor as it is stored, and how well it does on the held-out part of the trace.
    `advance` is told of tokens as they are trained on, each once in every epoch.

    Raises UsageError for a rank out of range, a trace too short, or PyTorch not installed,
    FormatError for inputs that are not numbers.
    """
    torch = require_torch()
    tokens = trace.inputs.shape[0]
    if tokens < _FEWEST_TOKENS:
        raise UsageError(
            "too few tokens to train on", expected=f"{_FEWEST_TOKENS} or more", found=tokens
        )
    seen, held_out = parted(tokens)
    start = seen[:: -(-seen.size // _START_TOKENS)]
    predictor = untrained(selector, _inputs(trace, start), training.rank, training.recall)
    a, b = (torch.nn.Parameter(torch.from_numpy(matrix)) for matrix in predictor.matrices())
    _fit(torch, a, b, trace, seen, training, advance)
    predictor = as_stored(a.detach().numpy(), b.detach().numpy())
    predictor = calibrated(predictor, samples(trace, held_out), training.recall)
    return predictor, quality(predictor, samples(trace, held_out))


def samples(trace: LayerTrace, tokens: NDArray[np.int64]) -> Iterator[Sample]:
    """Those tokens of a trace, some at a time."""
    for start in range(0, tokens.size, TOKENS):
        piece = tokens[start : start + TOKENS]
        yield _inputs(trace, piece), trace.active(piece)


def require_torch() -> Any:
    """The module torch. Raises UsageError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise UsageError(
            "training needs PyTorch", expected="pip install 'bundlefmt[train]'"
        ) from None
    return torch


def _fit(
    torch: Any,
    a: Any,
    b: Any,
    trace: LayerTrace,
    tokens: NDArray[np.int64],
    training: Training,
    advance: Callable[[int], None],
) -> None:
    """Gradient descent on a and b."""
    active, pairs = trace.info.active, trace.inputs.shape[0] * trace.info.neurons
    weight = torch.tensor(min((pairs - active) / max(active, 1), _MOST_WEIGHT))
    steps = training.epochs * -(-tokens.size // _BATCH)
    optimizer = torch.optim.AdamW([a, b], lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = np.random.default_rng(_SEED)
    for _ in range(training.epochs):
        shuffled = random.permutation(tokens)
        for start in range(0, tokens.size, _BATCH):
            batch = shuffled[start : start + _BATCH]
            x = torch.from_numpy(_inputs(trace, batch))
            wanted = torch.from_numpy(trace.active(batch)).float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                x @ a.T @ b.T, wanted, pos_weight=weight
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(batch.size)


def _inputs(trace: LayerTrace, tokens: NDArray[np.int64]) -> Floats:
    inputs = trace.inputs[tokens].astype(np.float32)
    if not np.isfinite(inputs).all():
        raise FormatError("not numbers, in a trace's inputs", field=f"layer {trace.info.layer}")
    return inputs

"""How the next token is chosen from a model's logits."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import FormatError, UsageError, integer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else from the most likely tokens
    that make up a share `top_p` of the probability. Raises UsageError for values of another type
    or out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (_is_real(self.temperature) and 0 <= self.temperature < math.inf):
            raise UsageError(
                "out of range",
                field="temperature",
                expected="a number, 0 or more",
                found=repr(self.temperature)[:40],
            )
        if not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            raise UsageError(
                "out of range",
                field="top_p",
                expected="a number above 0, at most 1",
                found=repr(self.top_p)[:40],
            )
        if self.seed is not None:
            integer(self.seed, "seed", 0)


def check_logits(logits: NDArray[Any]) -> None:
    """Raise FormatError unless every row of logits [..., vocabulary] has a likeliest token."""
    most = logits.max(axis=-1)
    if not np.isfinite(most).all():
        raise FormatError(
            "the model's predictions are not numbers",
            field="logits",
            found=float(np.ravel(most[~np.isfinite(most)])[0]),
        )


def likeliest(logits: NDArray[Any]) -> list[int]:
    """The likeliest token of each row of logits [tokens, vocabulary]. Raises FormatError when
    they are not numbers."""
    check_logits(logits)
    tokens: list[int] = logits.argmax(axis=-1).tolist()
    return tokens


def choose(logits: NDArray[Any], sampling: Sampling, random: np.random.Generator) -> int:
    """A token by its logits [vocabulary]. Raises FormatError when they are not numbers."""
    if sampling.temperature == 0:
        return likeliest(logits[None])[0]
    check_logits(logits)
    # The likeliest token's logit becomes 0, so that no temperature divides it beyond float64.
    below = (logits - logits.max()).astype(np.float64)
    with np.errstate(over="ignore"):  # what is infinitely far below has no share
        shares = kernels.softmax(below / float(sampling.temperature))
    best = np.argsort(-shares, kind="stable")
    kept = best[: int(np.searchsorted(np.cumsum(shares[best]), sampling.top_p)) + 1]
    weights = shares[kept]
    return int(random.choice(kept, p=weights / weights.sum()))


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)

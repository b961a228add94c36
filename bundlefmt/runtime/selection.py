"""Which neurons of a layer a token needs: one class per mode.

The selector is the part that the activation is applied to: `gate`, or `up` without a gate.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import UsageError
from bundlefmt.flash.predictor import Predictor
from bundlefmt.kernels import Floats
from bundlefmt.layout.header import Group

Ids = NDArray[np.int64]

MODES = ("dense", "exact", "predict", "topk")


@dataclass(frozen=True)
class Selecting:
    """A mode, and the share of the neurons that mode topk takes. Raises UsageError for a mode
    that there is not and a share that cannot be."""

    mode: str = "dense"
    share: float = 0.3

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(
                "unknown mode", field="mode", expected=", ".join(MODES), found=self.mode
            )
        if not isinstance(self.share, numbers.Real) or not 0 < self.share <= 1:
            raise UsageError(
                "out of range", field="share", expected="above 0, at most 1", found=self.share
            )

    @property
    def holds_selector(self) -> bool:
        """Whether the mode keeps every neuron's selector in DRAM."""
        return self.mode in ("exact", "topk")


class Selected(NamedTuple):
    """Neurons, and their activations [tokens, n] where they are known by now; where they are not,
    `mask` [tokens, n] says which neurons each token gets, None that it gets all of them."""

    ids: Ids
    activations: Floats | None
    mask: NDArray[np.bool_] | None = None

    def some(self, which: Ids | slice) -> Selected:
        """Those at some positions."""
        activations, mask = self.activations, self.mask
        return Selected(
            self.ids[which],
            None if activations is None else activations[:, which],
            None if mask is None else mask[:, which],
        )

    def used_by(self, token: int) -> Ids:
        """The neurons of one of the tokens."""
        mask = self.mask if self.activations is None else self.activations != 0
        return self.ids if mask is None else self.ids[mask[token]]


class Selection(Protocol):
    """Chooses neurons for tokens x [tokens, d_model], in the order in which the file has them."""

    guess_bytes: int  # of the weights that a guess is computed from

    def __call__(self, x: Floats) -> Selected: ...

    def guess(self, x: Floats) -> Ids | None:
        """Neurons that will probably be chosen for an input near to x [1, d_model]; None where
        a guess would cost as much as the choice."""


class Dense:
    """All of them."""

    guess_bytes = 0

    def __init__(self, order: Ids) -> None:
        self._all = Selected(order, None)

    def __call__(self, x: Floats) -> Selected:
        return self._all

    def guess(self, x: Floats) -> Ids | None:
        return None


class Exact:
    """Those whose activation is not zero for every token, by the selector itself."""

    guess_bytes = 0

    def __init__(self, order: Ids, selector: kernels.Part, act: kernels.ActivationFunction) -> None:
        self._order = order
        self._selector = selector
        self._act = act

    def __call__(self, x: Floats) -> Selected:
        activations = self._kept(self._act(kernels.biased_products(x, self._selector)))
        active: NDArray[np.bool_] = np.any(activations, axis=0)
        ids = self._order[active[self._order]]
        return Selected(ids, activations[:, ids])

    def guess(self, x: Floats) -> Ids | None:
        return None

    def _kept(self, activations: Floats) -> Floats:
        return activations


class Predicted:
    """Those that a predictor names, for each of a few tokens (the paper's section 3.1); for the
    many of a prompt, nearly all of which some token needs, all of them."""

    def __init__(self, order: Ids, predictor: Predictor) -> None:
        self.guess_bytes = predictor.nbytes
        self._order = order
        self._predictor = predictor

    def __call__(self, x: Floats) -> Selected:
        if x.shape[0] > kernels.FEW_TOKENS:
            return Selected(self._order, None)
        predicted = self._predictor.predicted(x)
        ids = self._in_order(predicted)
        return Selected(ids, None, predicted[:, ids] if x.shape[0] > 1 else None)

    def guess(self, x: Floats) -> Ids:
        return self._in_order(self._predictor.predicted(x))

    def _in_order(self, predicted: NDArray[np.bool_]) -> Ids:
        """The neurons that any of the tokens gets."""
        wanted: NDArray[np.bool_] = np.any(predicted, axis=0)
        return self._order[wanted[self._order]]


class TopK(Exact):
    """Each token's strongest neurons, a `share` of them, by the selector itself (CATS, arXiv
    2404.08763; TEAL, arXiv 2408.14690): an approximation."""

    def __init__(
        self, order: Ids, selector: kernels.Part, act: kernels.ActivationFunction, share: float
    ) -> None:
        super().__init__(order, selector, act)
        self._beaten = order.size - max(round(share * order.size), 1)

    def _kept(self, activations: Floats) -> Floats:
        if self._beaten > 0:
            strengths = np.abs(activations)
            weakest = np.partition(strengths, self._beaten, axis=1)[:, self._beaten, None]
            activations[strengths < weakest] = 0
        return activations


def check(mode: str, group: Group) -> None:
    """Raise UsageError unless the group can be computed in that mode."""
    if mode in ("exact", "predict") and group.activation not in kernels.SPARSE_ACTIVATIONS:
        raise UsageError(
            f"mode {mode} needs an activation with exact zeros: use mode dense or topk",
            field=group.label,
            expected=", ".join(kernels.SPARSE_ACTIVATIONS),
            found=group.activation,
        )

"""What "LLM in a flash" (arXiv 2312.11514) says of its models and measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Times(NamedTuple):
    """Table 3, milliseconds per token on a CPU."""

    io: float
    manage: float
    compute: float

    @property
    def total(self) -> float:
        return self.io + self.manage + self.compute


class Reads(NamedTuple):
    """Table 2: gigabytes in DRAM, gigabytes from flash per token, GB/s, milliseconds of I/O."""

    dram: float
    flash: float
    rate: float
    io: float


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper: which neurons its predictors name, as shares of an FFN's neurons
    (`predicted` for one token, `held` by a window of `window` tokens, `fresh` of those needed
    after such a window), the truly `active` share, its predictors' ranks, and what was measured by
    step. `sources` says where the shares come from."""

    predicted: float
    held: float
    fresh: float
    window: int
    active: float
    rank: int
    last_layers: int
    last_rank: int
    times: dict[str, Times]
    sources: str
    reads: dict[str, Reads] | None = None

    def rank_of(self, layer: int, layers: int) -> int:
        """The rank of a layer's predictor."""
        return self.last_rank if layer >= layers - self.last_layers else self.rank


# Reads of 8 KiB reached 1.25 GB/s there, of 16 KiB 2.25 (Table 2).
_DERIVED = (
    "fresh: Table 3's I/O time at the rate of Table 2 for bundles of that size; the rest assumed"
)

PAPER = {
    "opt-6.7b": PaperModel(
        predicted=0.10,
        held=0.24,
        fresh=0.024,
        window=5,
        active=0.03,
        rank=128,
        last_layers=4,
        last_rank=1024,
        times={"naive": Times(2196, 0, 986), "bundling": Times(105, 58, 506)},
        sources="predicted: Table 2 (0.9 GB of 8.6); held, fresh: section 4",
        reads={
            "naive": Reads(0, 13.4, 6.10, 2196),
            "hybrid": Reads(6.7, 6.7, 6.10, 1090),
            "predictor": Reads(4.8, 0.9, 1.25, 738),
            "window": Reads(6.5, 0.2, 1.25, 164),
            "bundling": Reads(6.5, 0.2, 2.25, 87),
        },
    ),
    "falcon-7b": PaperModel(
        predicted=0.14,
        held=0.33,
        fresh=0.034,
        window=4,
        active=0.05,
        rank=256,
        last_layers=4,
        last_rank=1152,
        times={
            "naive": Times(2295, 0, 800),
            "hybrid": Times(1147, 0, 800),
            "bundling": Times(161, 92, 453),
        },
        sources=f"held: section 4; {_DERIVED}",
    ),
    "persimmon-8b": PaperModel(
        predicted=0.20,
        held=0.49,
        fresh=0.066,
        window=4,
        active=0.10,
        rank=256,
        last_layers=4,
        last_rank=1152,
        times={
            "naive": Times(2622, 0, 1184),
            "hybrid": Times(1311, 0, 1184),
            "bundling": Times(283, 98, 660),
        },
        sources=_DERIVED,
    ),
    "phi-2": PaperModel(
        predicted=0.25,
        held=0.385,
        fresh=0.094,
        window=2,
        active=0.10,
        rank=160,
        last_layers=8,
        last_rank=480,
        times={
            "naive": Times(885, 0, 402),
            "hybrid": Times(309, 0, 402),
            "bundling": Times(211, 76, 259),
        },
        sources=_DERIVED,
    ),
    "llama-2-7b": PaperModel(
        predicted=0.20,
        held=0.30,
        fresh=0.0725,
        window=2,
        active=0.10,
        rank=1024,
        last_layers=0,
        last_rank=1024,
        times={
            "naive": Times(2166, 0, 929),
            "hybrid": Times(974, 0, 929),
            "bundling": Times(279, 152, 563),
        },
        sources=_DERIVED,
    ),
}

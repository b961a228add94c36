"""Rotary positions, as a config.json describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt.errors import FormatError
from bundlefmt.runtime.fields import Fields

MAX_HEAD_DIM = 1 << 16  # no model is near it: a config with wrong numbers makes no large table
_THETA = 10000.0  # of every class here


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary positions: one frequency per pair of a head's first numbers, float64 [pairs]; what
    is left of the head does not turn."""

    frequencies: NDArray[np.float64]


def rope_of(
    config: Mapping[str, Any], head_dim: int, context: int, turning: float | None = None
) -> Rope:
    """The rotary positions of a config with `rope_parameters` (newer ones) or `rope_theta` and
    `rope_scaling`. Like transformers: `rope_scaling`, where it says anything, replaces
    `rope_parameters` as a whole; what the one that holds does not say comes from the keys beside
    it. `turning` is the share of a head that turns where the config does not say; None where the
    model's class turns the whole head.

    Raises UsageError for a kind that is not computed, FormatError for values of the wrong kind.
    """
    outer = Fields(config, {"rope_scaling": None, "rope_parameters": None})
    chosen = "rope_scaling" if outer.value("rope_scaling") else "rope_parameters"
    given = outer.value(chosen)
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise outer.wrong(chosen, "an object")
    share = 1.0 if turning is None else turning
    defaults = {
        "rope_type": given.get("type", "default"),
        "rope_theta": config.get("rope_theta", _THETA),
        "partial_rotary_factor": config.get("partial_rotary_factor", share),
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": context,
    }
    fields = Fields(given, defaults, within=chosen)
    if any(isinstance(value, dict) for value in given.values()):
        raise outer.unsupported(chosen, "the same for all layers")
    kind = fields.value("rope_type")
    if kind not in ("default", "linear", "llama3"):
        raise fields.unsupported("rope_type", "default, linear, llama3")
    if turning is None and fields.value("partial_rotary_factor") not in (None, 1):
        raise fields.unsupported("partial_rotary_factor", "1: the whole head turns")
    if turning is None:
        width = head_dim
    else:
        width = int(head_dim * min(fields.number("partial_rotary_factor"), 2.0))
    if width > head_dim:
        raise fields.wrong("partial_rotary_factor", "a share of the head, at most 1")
    frequencies = frequencies_of(fields.number("rope_theta"), width)
    if kind == "linear":
        frequencies = frequencies / fields.number("factor")
    elif kind == "llama3":
        frequencies = _llama3(frequencies, fields, config)
    return Rope(frequencies)


def frequencies_of(theta: float, width: int) -> NDArray[np.float64]:
    """The frequencies of `width` numbers that turn in pairs."""
    if not 2 <= width <= MAX_HEAD_DIM or width % 2:
        raise FormatError(
            "rotary positions do not fit the heads",
            field="config.json",
            expected=f"an even count of numbers that turn, from 2 to {MAX_HEAD_DIM}",
            found=width,
        )
    exponents = np.arange(0, width, 2, dtype=np.float64) / width
    frequencies: NDArray[np.float64] = theta**-exponents
    return frequencies


def _llama3(
    frequencies: NDArray[np.float64], fields: Fields, config: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Llama 3.1's scaling: long wavelengths are slowed by `factor`, short ones kept, those in
    between blended. The context of old comes from beside the object where it is there too."""
    key = "original_max_position_embeddings"
    context = (Fields(config, {}) if key in config else fields).integer(key)
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low >= high:
        raise fields.wrong("low_freq_factor", f"less than high_freq_factor, {high}")
    turns = context * frequencies / (2 * math.pi)  # turns that a pair makes in the old context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / fields.number("factor"))

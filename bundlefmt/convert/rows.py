"""The vectors of one part, read from the checkpoint and encoded, some neurons at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundlefmt.checkpoints.families import Ffn
from bundlefmt.convert.plan import PartPlan
from bundlefmt.errors import FormatError
from bundlefmt.layout import dtypes
from bundlefmt.layout.encodings import ENCODINGS, numbers_in
from bundlefmt.native import CPUS, core

CHUNK_NUMBERS = 1 << 22  # numbers in flight per chunk: bounds memory whatever the width

_TRANSPOSE_ROWS = 256  # rows of a matrix transposed at a time: keeps the reads within the caches


class PartRows:
    """The vectors of one part, by neuron, encoded."""

    def __init__(self, plan: PartPlan, ffn: Ffn) -> None:
        self._plan = plan
        self._ffn = ffn
        self._tensor = plan.source.tensor
        self._kind = np.dtype(f"u{dtypes.DTYPES[self._tensor.dtype][0] // 8}")
        self._matrix: NDArray[Any] | None = None

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """All vectors, uint8 [n, part length] at a time."""
        step = max(CHUNK_NUMBERS // self._ffn.d_model, 1)
        for start in range(0, self._ffn.neurons, step):
            rows = np.empty(
                (min(step, self._ffn.neurons - start), self._plan.length), dtype=np.uint8
            )
            self.copy(start, rows)
            yield rows

    def copy(self, start: int, out: NDArray[np.uint8]) -> None:
        """Write the vectors of neurons start .. start + n - 1 into `out`, uint8 [n, part
        length]. Raises FormatError when a number does not fit the encoding."""
        stored = dtypes.ENCODING_OF[self._tensor.dtype]
        if stored == self._plan.encoding:
            self._copy_stored(start, out.view(self._kind))
            return
        rows = np.empty((out.shape[0], self._ffn.d_model), dtype=self._kind)
        self._copy_stored(start, rows)
        numbers = np.asarray(numbers_in(rows.view(np.uint8), stored), dtype=np.float32)
        encoding = ENCODINGS[self._plan.encoding]
        if not encoding.fits(numbers):
            raise FormatError(
                f"a number does not fit {encoding.name}: pack with --dtype bf16 or keep",
                file=self._tensor.path,
                field=self._tensor.name,
                expected=f"finite, at most {encoding.largest:g}",
                found=f"{np.max(np.abs(numbers)):g}",
            )
        out[:] = encoding.encode(numbers)

    def _copy_stored(self, start: int, out: NDArray[Any]) -> None:
        """The vectors as the checkpoint stores them, into `out` [n, d_model] of their width."""
        first, count = self._plan.source.start + start, out.shape[0]
        if self._plan.source.axis == 0:
            width = self._ffn.d_model * self._kind.itemsize
            rows = self._tensor.read(first * width, count * width)
            out[:] = rows.view(self._kind).reshape(count, -1)
            return
        if self._matrix is None:
            self._matrix = self._tensor.read().view(self._kind).reshape(self._tensor.shape)
        columns = self._matrix[:, first : first + count]
        if core is not None:
            item = self._kind.itemsize
            core.transpose(columns.view(np.uint8), out.view(np.uint8), item, CPUS)
            return
        for row in range(0, columns.shape[0], _TRANSPOSE_ROWS):
            out[:, row : row + _TRANSPOSE_ROWS] = columns[row : row + _TRANSPOSE_ROWS].T

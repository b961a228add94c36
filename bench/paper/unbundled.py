"""What reading would be without bundles: each part of a neuron in a place of its own.

The parts are read as if a group's region held one matrix per part, [neurons, d_model] each, one
after the other (so `down` transposed already, which no checkpoint has: there a neuron's column
would be d_model reads). So as many bytes are read as with bundles, in as many more requests as a
bundle has parts. What is read is not what the file means by it: that takes random weights, and no
checks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bundlefmt.layout.header import Group
from bundlefmt.runtime.generate import Model
from bundlefmt.storage.backends import Backend, Batch, Requests


class Unbundled:
    """Passes requests for bundles on to a backend, each as one for every part."""

    def __init__(self, backend: Backend, groups: Sequence[Group]) -> None:
        self._backend = backend
        self.name = backend.name
        self.in_flight = backend.in_flight
        self.offset_alignment = backend.offset_alignment
        self.memory_alignment = backend.memory_alignment
        self._groups = sorted(groups, key=lambda group: group.bundles.offset)
        self._begins = np.array([group.bundles.offset for group in self._groups])

    def submit(self, requests: Requests) -> Batch:
        """As `Backend.submit`, for requests of whole bundles of one group."""
        return self._backend.submit(self._by_part(requests))

    def close(self) -> None:
        self._backend.close()

    def _by_part(self, requests: Requests) -> Requests:
        if not requests.offsets.size:
            return requests
        at = np.searchsorted(self._begins, requests.offsets[0], side="right") - 1
        group = self._groups[at]
        stride, neurons = group.stride, group.neurons
        slots = (requests.offsets - group.bundles.offset) // stride
        in_views = requests.lengths // stride  # bundles
        firsts = np.cumsum(in_views) - in_views
        rows = np.repeat(requests.starts, in_views)
        rows += (np.arange(rows.size) - np.repeat(firsts, in_views)) * stride
        bounds = np.append(firsts, rows.size)[requests.bounds]
        offsets, starts, lengths, begin = [], [], [], group.bundles.offset
        for part in group.bundled:
            offsets.append(begin + slots * part.length)
            starts.append(rows + part.offset)
            lengths.append(np.full(rows.size, part.length))
            begin += neurons * part.length
        parts = range(len(offsets))
        return Requests(
            requests.memory,
            np.concatenate(offsets),
            np.concatenate(
                [bounds[:-1] + k * rows.size for k in parts] + [[rows.size * len(parts)]]
            ),
            np.concatenate(starts),
            np.concatenate(lengths),
        )


def unbundle(model: Model) -> None:
    """From now on the model reads each part by itself. It must have been loaded without checks
    and without gaps."""
    model.reader._backend = Unbundled(model.reader._backend, model.file.groups)

"""What a token costs: bytes, requests and time, stage by stage.

Arithmetic takes as long as its weights take from memory. What the cache holds of a layer's FFN is
computed while the rest is being read, and attention that finds no room in memory is read during all
other arithmetic; otherwise one stage follows the other. Guesses that pay, by which neurons are read
ahead of their layer's turn, make tokens faster than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bundlefmt.file import BundleFile
from bundlefmt.flash import predictor, reuse
from bundlefmt.flash.budget import sharing
from bundlefmt.flash.costmodel import Batch, DeviceProfile
from bundlefmt.flash.reuse import Reuse
from bundlefmt.layout.header import Group
from bundlefmt.reader import MAX_REQUEST
from bundlefmt.runtime.config import DecoderConfig
from bundlefmt.runtime.selection import Selecting
from bundlefmt.runtime.weights import attention_matrices

STREAMING = "reading attention"
ATTENTION = "attention and head"
CHOOSING = "choosing neurons"
READING = "reading neurons"
COMPUTING = "computing neurons"


@dataclass(frozen=True)
class Token:
    """A token, on average: bytes that each stage computes from, or reads; the batches in which it
    reads neurons (`in_sequence`: all, as they lie in the file); and which share of its active
    neurons the cache holds."""

    stages: dict[str, float]
    batches: list[Batch]
    in_sequence: bool
    hit_rate: float

    @property
    def requests(self) -> dict[str, float]:
        """Of the stages that read."""
        return {
            STREAMING: self.stages[STREAMING] / MAX_REQUEST,
            READING: sum(batch.requests for batch in self.batches),
        }

    @property
    def bytes_read(self) -> float:
        """Of all stages that read."""
        return sum(self.stages[name] for name in self.requests)

    def seconds(self, profile: DeviceProfile) -> dict[str, float]:
        """By stage, on the device with that profile."""
        rate, sequential = profile.compute_bytes_per_second, profile.sequential_bytes_per_second
        found = {name: nbytes / rate for name, nbytes in self.stages.items()}
        found[STREAMING] = self.stages[STREAMING] / sequential
        found[READING] = (
            self.stages[READING] / sequential if self.in_sequence else profile.predict(self.batches)
        )
        return found

    def total_seconds(self, profile: DeviceProfile) -> float:
        """Of all stages, what overlaps counted once."""
        by_stage = self.seconds(profile)
        overlap = min(by_stage[READING], by_stage[COMPUTING] * self.hit_rate)
        arithmetic = by_stage[ATTENTION] + by_stage[CHOOSING] + by_stage[COMPUTING]
        overlap += min(by_stage[STREAMING], arithmetic - overlap)
        return sum(by_stage.values()) - overlap


class Costs:
    """What tokens of one model cost in one mode, when neurons are used as `used` says of each
    group."""

    def __init__(
        self,
        file: BundleFile,
        config: DecoderConfig,
        selecting: Selecting,
        used: Sequence[Reuse],
    ) -> None:
        self._groups = file.groups
        self._reuse = used
        self._dense = selecting.mode == "dense"
        self._resident = _resident_bytes(file, config)
        self._choosing = _choosing_bytes(file, selecting)
        self._attention = [
            sum(tensor.data.length for tensor in attention_matrices(file, config, layer))
            for layer in range(len(config.layers))
        ]
        self._known = [_known_bytes(group, selecting) for group in file.groups]

    def token(
        self, slots: Sequence[int], streamed: Sequence[int] = (), scale: float = 1.0
    ) -> Token:
        """With a neuron cache to which each group adds so many slots (those of one stride share
        them), layers whose attention is `streamed`, and neurons of `scale` times the bytes that
        they have."""
        batches: list[Batch] = []
        active = missing = computed = 0.0
        rows = zip(self._groups, self._reuse, self._known, self._by_use(slots), strict=True)
        for group, used, known, count in rows:
            misses = float(used.misses[count])
            batches.append(self._batch(group, misses, (group.stride - known) * scale))
            active += used.active
            missing += misses
            computed += used.active * (group.used - known) * scale
        stages = {
            STREAMING: float(sum(self._attention[layer] for layer in streamed)),
            ATTENTION: float(self._resident),
            CHOOSING: float(self._choosing),
            READING: sum(batch.nbytes for batch in batches),
            COMPUTING: computed,
        }
        return Token(stages, batches, self._dense, 1 - missing / active if active else 0.0)

    def _by_use(self, slots: Sequence[int]) -> list[int]:
        """The slots as the groups come to have them; where all need all, none yields."""
        found = list(slots)
        for alike in [] if self._dense else sharing(self._groups):
            used = [self._reuse[index] for index in alike]
            counts = reuse.shared(used, sum(slots[index] for index in alike))
            for index, count in zip(alike, counts, strict=True):
                found[index] = count
        return found

    def _batch(self, group: Group, misses: float, each: float) -> Batch:
        """Of neurons that lie anywhere: n of N make n (N - n + 1) / N runs, on average. All of
        them, in the order of the file, make one."""
        runs = misses * (group.neurons - misses + 1) / group.neurons
        fewest = min(misses, 1.0) if self._dense else min(misses, runs)
        return Batch(max(fewest, misses * each / MAX_REQUEST), misses * each)


def _known_bytes(group: Group, selecting: Selecting) -> int:
    """Bytes of each bundle that are not read: the selector's, where the mode holds it in DRAM."""
    selector = group.parts[0]
    return selector.length if selecting.holds_selector and selector.offset is not None else 0


def _choosing_bytes(file: BundleFile, selecting: Selecting) -> int:
    """What is computed from to choose neurons: selectors, or predictors."""
    if selecting.holds_selector:
        return sum(group.neurons * group.parts[0].length for group in file.groups)
    if selecting.mode != "predict":
        return 0
    entries = [predictor.trained(file, group) for group in file.groups]
    return sum(
        predictor.predictor_bytes(group)
        if entry is None
        else _length(file, entry.a) + _length(file, entry.b)
        for group, entry in zip(file.groups, entries, strict=True)
    )


def _resident_bytes(file: BundleFile, config: DecoderConfig) -> int:
    """What each token is computed from besides the FFN: resident tensors, but for predictors and
    for embeddings, of which it takes a row, unless they are the head's weights too."""
    unused = {name for entry in file.header.predictors for name in (entry.a, entry.b)}
    roles = ["positions"]
    if any(name.endswith(f"{config.names['head']}.weight") for name in file.tensor_names):
        roles.append("embed")
    suffixes = tuple(f"{config.names[role]}.weight" for role in roles if role in config.names)
    return sum(
        _length(file, name)
        for name in file.tensor_names
        if name not in unused and not name.endswith(suffixes)
    )


def _length(file: BundleFile, name: str) -> int:
    data = file.tensor_entry(name).data
    return data.decoded_length or data.length

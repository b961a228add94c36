"""Which neurons will be active, by a low-rank product instead of the selector's rows.

Neuron i is predicted active for the FFN's input x when sigmoid(b @ (a @ x))[i] > threshold (spec,
section 4.8). Predictors are trained (`flash.training`) and lie in the bundle file, or are made
from the selector's weights alone, which takes no training: `untrained`.

Strategy of the untrained one: with inputs at hand, the best map of rank r from x to the selector's
outputs goes through the first r principal components of those outputs. What it misses differs from
neuron to neuron, so each neuron's score is put in units of its own error; then one threshold fits
them all. The bias goes in without a field of its own: after a LayerNorm there is a vector u with
u @ x = 1 for every x (nearly so for other inputs), which becomes one row of `a`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bundlefmt import kernels
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.kernels import Floats
from bundlefmt.layout.constants import BlockEncodingName, EncodingName
from bundlefmt.layout.dtypes import ENCODING_OF
from bundlefmt.layout.encodings import ENCODINGS, all_finite, numbers_in
from bundlefmt.layout.header import Group
from bundlefmt.layout.header import Predictor as Entry
from bundlefmt.reader import Reader
from bundlefmt.storage.buffers import aligned_empty

RANK = 128  # of a predictor, where nobody says; the paper's for most of its layers
RECALL = 0.95  # likewise
SAMPLES = 1024  # inputs that an untrained predictor draws
TOKENS = 512  # scored at a time: tokens x neurons of float32 are 64 MiB for 32768 neurons
_OVERSAMPLING = 16  # of the randomised range finder (Halko, Martinsson, Tropp 2011)
_POWER_ITERATIONS = 2
_LEAST_SQUARE = 1e-10  # of a direction's length, against the longest one's: below is rounding
_PROBIT = 1.702  # sigmoid(1.702 z) is the normal distribution function within 0.01
_LEAST_ERROR = 1e-2  # of an output's deviation: keeps scores of neurons without error finite
_RIDGE = 1e-4  # of the inputs' mean square
_MOST_CUT = 30.0  # sigmoid(40) is 1 in float64, and nothing is above it
_SEED = 1
_CHECKED = 1024  # rows at a time
_PIECE_BYTES = 8 << 20  # of bundles, read at a time

# Inputs x [tokens, d_model] and which neurons were active for them [tokens, neurons].
Sample = tuple[Floats, NDArray[np.bool_]]


@dataclass(frozen=True)
class Predictor:
    """The rows of `a` [rank, d_model] and `b` [neurons, rank]; `threshold` in 0..1."""

    a: kernels.Part
    b: kernels.Part
    threshold: float

    @property
    def nbytes(self) -> int:
        """What its matrices take of memory."""
        return self.a.stored.nbytes + self.b.stored.nbytes

    @cached_property
    def cut(self) -> np.float32:
        """The score that the threshold stands for: sigmoid(cut) = threshold."""
        with np.errstate(divide="ignore"):
            return np.float32(np.log(self.threshold) - np.log1p(-self.threshold))

    def matrices(self) -> tuple[Floats, Floats]:
        """a and b, float32."""
        a, b = (ENCODINGS[part.encoding].decode(part.stored) for part in (self.a, self.b))
        return a, b

    def scores(self, x: Floats) -> Floats:
        """x [tokens, d_model] -> b @ (a @ x), float32 [tokens, neurons]."""
        return kernels.biased_products(kernels.biased_products(x, self.a), self.b)

    def predicted(self, x: Floats) -> NDArray[np.bool_]:
        """x [tokens, d_model] -> which neurons are predicted active, [tokens, neurons]."""
        return self.scores(x) > self.cut

    def active(self, x: Floats) -> NDArray[np.int64]:
        """The neurons predicted active for any token of x, in ascending order."""
        return np.flatnonzero(self.predicted(x).any(axis=0))


class Quality(NamedTuple):
    """How well predictions were: counts of (token, neuron) pairs."""

    active: int
    predicted: int
    found: int  # predicted and active
    pairs: int

    @property
    def recall(self) -> float:
        """The share of what was active that was predicted; 1 where nothing was."""
        return self.found / self.active if self.active else 1.0

    @property
    def precision(self) -> float:
        """The share of what was predicted that was active; 1 where nothing was."""
        return self.found / self.predicted if self.predicted else 1.0


def quality(predictor: Predictor, samples: Iterable[Sample]) -> Quality:
    """How well the predictor does on samples."""
    counts: list[tuple[int, int, int, int]] = []
    for x, active in samples:
        predicted = predictor.predicted(x)
        found = predicted & active
        counts.append((int(active.sum()), int(predicted.sum()), int(found.sum()), active.size))
    return Quality(*map(sum, zip(*counts, strict=True)))


def calibrated(predictor: Predictor, samples: Iterable[Sample], recall: float) -> Predictor:
    """The predictor with the highest threshold at which it finds a share `recall` of what is
    active in the samples."""
    scores = np.concatenate([predictor.scores(x)[active] for x, active in samples])
    if not scores.size:
        return replace(predictor, threshold=1.0)
    missed = min(int((1 - recall) * scores.size), scores.size - 1)
    lowest = float(np.partition(scores, missed)[missed])
    cut = min(lowest - 1e-4 * max(abs(lowest), 1.0), _MOST_CUT)
    with np.errstate(over="ignore"):
        return replace(predictor, threshold=float(1 / (1 + np.exp(-np.float64(cut)))))


def trained(file: BundleFile, group: Group) -> Entry | None:
    """The header's entry of the predictor that the file carries for a group; None for none."""
    for entry in file.header.predictors:
        if (entry.layer, entry.expert) == (group.layer, group.expert):
            return entry
    return None


def load(file: BundleFile, group: Group) -> Predictor | None:
    """The predictor of a group that the file carries; None where none was trained. Raises
    FormatError for one whose numbers are not finite: it would name no neurons, without a word."""
    entry = trained(file, group)
    if entry is None:
        return None
    a, b = (_part(file, name, entry.encoding) for name in (entry.a, entry.b))
    return Predictor(a, b, entry.threshold)


def _part(file: BundleFile, name: str, encoding: BlockEncodingName | None) -> kernels.Part:
    stored = file.tensor(name).view(np.uint8)
    kind = encoding or ENCODING_OF[file.tensor_entry(name).dtype]
    rows = range(0, stored.shape[0], _CHECKED)
    if not all(all_finite(stored[start : start + _CHECKED], kind) for start in rows):
        raise FormatError("a predictor's numbers are not finite", file=file.path, field=name)
    return kernels.Part(stored, kind)


def as_stored(a: Floats, b: Floats) -> Predictor:
    """The predictor of a [rank, d_model] and b [neurons, rank], with a threshold of 0.5, as it is
    kept in memory and in files: in q8_0, or in f16 where rows are not whole blocks of it. Numbers
    that are out of range become the largest there is."""
    kind = ENCODINGS[encoding_of(*a.shape)]

    def part(matrix: Floats) -> kernels.Part:
        return kernels.Part(kind.encode(matrix.clip(-kind.largest, kind.largest)), kind.name)

    return Predictor(part(a), part(b), 0.5)


def encoding_of(rank: int, d_model: int) -> EncodingName:
    """What a predictor of that rank is stored in. Half of f16's bytes are as good: an error of
    1/254 of a block's largest number is little against what a low rank misses."""
    return "f16" if rank % ENCODINGS["q8_0"].block or d_model % ENCODINGS["q8_0"].block else "q8_0"


class Selector(NamedTuple):
    """The part that the activation is applied to. Neuron i is active for x when
    (weights @ x + bias)[i] > 0: weights float32 [neurons, d_model], bias [neurons]."""

    weights: Floats
    bias: Floats
    label: str = "selector"  # of its group, for errors

    def active(self, x: Floats) -> NDArray[np.bool_]:
        """Which neurons are active for each token of x: [tokens, neurons]."""
        active: NDArray[np.bool_] = kernels.matmul(x, self.weights) + self.bias > 0
        return active


def read_selector(file: BundleFile, reader: Reader, group: Group) -> Selector:
    """The group's selector: `gate`, or `up` without a gate."""
    part = group.parts[0]
    if part.resident is not None:
        stored = file.resident_part(group, part.name)
        weights = kernels.widened(numbers_in(stored, part.encoding))
    else:
        weights = np.empty((group.neurons, group.d_model), dtype=np.float32)
        step = max(_PIECE_BYTES // group.stride, 1)
        # Memory of its own: what the reader recycles would stay for as long as it is open.
        rows = aligned_empty(step * group.stride).reshape(step, group.stride)
        for start in range(0, group.neurons, step):
            ids = range(start, min(start + step, group.neurons))
            bundles = reader.read(group.layer, ids, expert=group.expert, out=rows[: len(ids)])
            weights[start : ids.stop] = kernels.widened(bundles.part(part.name))
    bias = file.bias(group, part.name)
    bias = np.zeros(group.neurons, dtype=np.float32) if bias is None else bias
    if group.activation == "fatrelu":
        bias = bias - np.float32(group.activation_threshold or 0.0)
    return Selector(weights, bias, group.label)


def untrained(selector: Selector, inputs: Floats, rank: int, recall: float) -> Predictor:
    """A predictor of that rank from the selector's weights. `inputs` [samples, d_model] are FFN
    inputs, or are drawn as such; the threshold finds a share `recall` of what is active for them.

    Raises UsageError for a rank that is not in 2..d_model, FormatError for weights or inputs that
    are not finite, or so large that their products are not.
    """
    check_rank(rank, selector.weights.shape[1])
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = _low_rank(selector, inputs, rank)
        finite = np.isfinite(a).all() and np.isfinite(b).all()
    except np.linalg.LinAlgError:
        finite = np.False_
    if not finite:
        raise FormatError(
            "no predictor can be made of these weights",
            field=selector.label,
            expected="finite numbers, and finite products with the norm before them",
        )
    return calibrated(as_stored(a, b), _sampled(selector, inputs), recall)


def _low_rank(selector: Selector, inputs: Floats, rank: int) -> tuple[Floats, Floats]:
    """a [rank, d_model] and b [neurons, rank] of an untrained predictor."""
    mean = inputs.mean(axis=0)
    outputs = kernels.matmul(inputs - mean, selector.weights)
    basis = _principal(outputs, rank - 1)
    a = basis.T @ selector.weights
    tiny, least = _tiny(outputs), _LEAST_ERROR * outputs.std(axis=0)
    outputs -= (outputs @ basis) @ basis.T  # what it misses, in the same memory
    errors = np.maximum(outputs.std(axis=0), least) + tiny
    del outputs
    middle = selector.weights @ mean + selector.bias - basis @ (a @ mean)
    scale = (inputs @ a.T).std(axis=0) + tiny
    a = np.concatenate([a / scale[:, None], [_constant(inputs)]])
    b = np.concatenate([basis * scale, middle[:, None]], axis=1) * (_PROBIT / errors)[:, None]
    return a, b


def untrained_on_random(selector: Selector, like: Callable[[Floats], Floats]) -> Predictor:
    """An untrained predictor from no sample at all: its inputs are `like` (the norm before the FFN)
    of normally distributed ones, SAMPLES of them."""
    width = selector.weights.shape[1]
    drawn = np.random.default_rng(_SEED).standard_normal((SAMPLES, width), dtype=np.float32)
    return untrained(selector, like(drawn), min(RANK, width), RECALL)


def predictor_bytes(group: Group) -> int:
    """What an untrained predictor takes of memory."""
    rank = min(RANK, group.d_model)
    kind = ENCODINGS[encoding_of(rank, group.d_model)]
    return rank * kind.nbytes(group.d_model) + group.neurons * kind.nbytes(rank)


def untrained_bytes(group: Group) -> int:
    """Memory that `read_selector` and `untrained_on_random` take besides while they compute: the
    selector widened, the drawn inputs, and beside them either what the selector is widened from,
    outputs (twice, and a few narrow matrices), or the products of a ridge regression."""
    neurons, width = group.neurons, group.d_model
    piece = min(_PIECE_BYTES, group.bundles.length)
    read = 6 * piece if group.parts[0].resident is None else 8 * neurons * width
    outputs = (2 * SAMPLES + 6 * RANK) * 4 * neurons
    regression = 4 * (5 * width * width + 4 * RANK * neurons)
    inputs = 5 * 4 * SAMPLES * width
    return 4 * neurons * width + inputs + max(read, outputs, regression)


def _sampled(selector: Selector, inputs: Floats) -> Iterator[Sample]:
    for start in range(0, inputs.shape[0], TOKENS):
        x = inputs[start : start + TOKENS]
        yield x, selector.active(x)


def check_rank(rank: int, d_model: int) -> None:
    """Raise UsageError for a rank that no predictor for d_model can have."""
    if not 2 <= rank <= d_model:
        raise UsageError(
            "rank out of range", field="rank", expected=f"2..{d_model} (d_model)", found=rank
        )


def _principal(outputs: Floats, rank: int) -> Floats:
    """The first principal components of centred outputs: orthonormal columns [neurons, rank]."""
    random = np.random.default_rng(_SEED)
    columns = min(rank + _OVERSAMPLING, *outputs.shape)
    sketch = outputs @ random.standard_normal((outputs.shape[1], columns), dtype=np.float32)
    for _ in range(_POWER_ITERATIONS):
        sketch = outputs @ (outputs.T @ _orthonormal(sketch))
    found = _orthonormal((_orthonormal(sketch).T @ outputs).T)[:, :rank]
    basis: Floats = np.zeros((outputs.shape[1], rank), dtype=np.float32)
    basis[:, : found.shape[1]] = found
    return basis


def _orthonormal(columns: Floats) -> Floats:
    """Orthonormal columns of the same span, those along which `columns` are largest first. By way
    of the small matrix of their products: a QR decomposition or an SVD of the tall one are many
    small steps, which threads of BLAS that share their cores with others take ages for."""
    wide = columns.astype(np.float64)
    values, vectors = np.linalg.eigh(wide.T @ wide)
    largest = np.flatnonzero(values > values.max(initial=0) * _LEAST_SQUARE)[::-1]
    scaled = vectors[:, largest] / np.sqrt(values[largest])
    basis: Floats = columns @ scaled.astype(np.float32)
    return basis


def _constant(inputs: Floats) -> Floats:
    """u with u @ x nearest to 1 over the inputs: ridge regression."""
    products = inputs.T @ inputs
    ridge = _RIDGE * np.trace(products) / inputs.shape[1]
    products[np.diag_indices_from(products)] += max(ridge, np.finfo(np.float32).tiny)
    constant: Floats = np.linalg.solve(products, inputs.sum(axis=0))
    return constant


def _tiny(outputs: Floats) -> np.float32:
    largest = max(float(outputs.max()), -float(outputs.min()))
    return np.float32(np.finfo(np.float16).tiny * (1 + largest))

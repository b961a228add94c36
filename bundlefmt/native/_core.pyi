"""What the extension module offers. Arrays are C-contiguous; rows of bytes may lie apart."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Slots = NDArray[np.int64]

class Part:
    """One part of every row: uint8 [rows, bytes] of an encoding, with a bias per row."""

    def __init__(
        self, stored: NDArray[np.uint8], encoding: str, bias: Floats | None = None
    ) -> None: ...

def simd() -> str:
    """The kernels' instruction set: avx512, avx2 or portable."""

def products(x: Floats, part: Part, slots: Slots | None = None, threads: int = 1) -> Floats:
    """x [tokens, n] . each row -> [tokens, rows or slots]. ValueError, IndexError (a slot)."""

def weighted_sum(
    h: Floats, part: Part, width: int, slots: Slots | None = None, threads: int = 1
) -> Floats:
    """h [tokens, rows or slots] @ rows of `width` numbers -> [tokens, width]."""

def ffn(
    x: Floats,
    slots: Slots | None,
    selector: Part | None,
    up: Part | None,
    down: Part,
    activation: str,
    threshold: float = 0.0,
    active: Floats | None = None,
    threads: int = 1,
) -> Floats:
    """Sum over slots of down * act(selector . x) * (up . x) -> [tokens, d_model]; `active`
    [tokens, slots] stands for act(selector . x) where it is known."""

def digests(rows: NDArray[np.uint8], threads: int = 1) -> NDArray[np.uint64]:
    """xxh3-64 of each row."""

def transpose(rows: NDArray[np.uint8], out: NDArray[np.uint8], item: int, threads: int = 1) -> None:
    """out[i][j] = rows[j][i], for items of 1, 2 or 4 bytes."""

MAX_IN_FLIGHT: int  # the largest count that an engine takes

class Batch:
    """Reads under way. Letting go of it waits for them."""

    @property
    def latencies(self) -> list[int]: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def finished(self) -> int:
        """When the last read was done, in ns on the monotonic clock; 0 before that."""

    def wait(self) -> tuple[str, int, int, int, int, int] | None:
        """None, or what failed first, once nothing is in flight: (`failed`, `ended` or `damaged`,
        request, errno, bytes that came, bundle, its digest)."""

class Engine:
    """`threads` (count of them) or `uring` (its depth) over an open file; a ring registers `memory`
    with the kernel, where it may, so that reads into it cost less. RuntimeError where there
    is no io_uring or no such number of threads, ValueError for alignments that are no powers
    of two."""

    def __init__(
        self,
        kind: str,
        fd: int,
        count: int,
        offset_alignment: int = 1,
        memory_alignment: int = 1,
        memory: NDArray[np.uint8] | None = None,
    ) -> None: ...
    def submit(
        self,
        memory: NDArray[np.uint8],
        offsets: Slots,
        bounds: Slots,
        starts: Slots,
        lengths: Slots,
        bundle_bounds: Slots | None = None,
        bundle_starts: Slots | None = None,
        stride: int = 0,
        expected: NDArray[np.uint64] | None = None,
        spare: NDArray[np.uint8] | None = None,
    ) -> Batch:
        """Request k reads from offsets[k] on into memory[starts[v]:][:lengths[v]], or where
        starts[v] is -1 into spare[:lengths[v]], for v in bounds[k] .. bounds[k + 1] - 1; its
        bundles, `stride` bytes each, are then compared with `expected`. ValueError for what lies
        beyond the memory and for checks of which a part is missing, RuntimeError once closed."""

    def close(self) -> None: ...

"""Updates in place: what they change, and that a crash at any moment leaves one whole state."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import bundlefmt
from bundlefmt.errors import BundleError, FormatError, UsageError, WriteError
from bundlefmt.layout.header import Predictor
from tests.conftest import VECTORS

A = np.arange(16, dtype=np.float32).reshape(2, 8)
B = np.arange(8, dtype=np.float32).reshape(4, 2)
UPDATE: dict[str, Any] = {
    "tensors": {"p.a": A, "p.b": B, "norm": np.ones(5, np.float16)},
    "blobs": {"config.json": b"{}", "note.txt": b"hello"},
    "predictors": [Predictor(0, "p.a", "p.b", 0.5)],
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return Path(shutil.copy(VECTORS / "plain.bundle", tmp_path / "plain.bundle"))


def assert_old(path: Path) -> None:
    """The file holds the state before UPDATE."""
    with bundlefmt.open(path) as file:
        assert file.superblock.generation == 1
        assert file.tensor_names == ["norm"]
        assert file.tensor("norm").tolist() == [1.5, -2.0, 0.25]
        assert file.config == {"model_type": "example"}
        assert file.header.predictors == []


def assert_new(path: Path, generation: int = 2) -> None:
    """The file holds the state after UPDATE."""
    with bundlefmt.open(path) as file:
        assert file.superblock.generation == generation
        assert sorted(file.tensor_names) == ["norm", "p.a", "p.b"]
        for name, array in UPDATE["tensors"].items():
            found = file.tensor(name)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
        assert file.config == {}
        assert file.blob("note.txt") == b"hello"
        assert file.header.predictors == UPDATE["predictors"]


# What an update does


def test_an_update_adds_and_replaces(plain: Path) -> None:
    block = bundlefmt.append(plain, **UPDATE)
    assert block.generation == 2
    assert block.file_length == plain.stat().st_size
    assert_new(plain)
    assert bundlefmt.verify(plain).ok
    with (
        bundlefmt.open(plain) as file,
        bundlefmt.open(VECTORS / "plain.bundle") as old,
        file.reader() as reader,
        old.reader() as old_reader,
    ):
        found, expected = reader.read(0, range(4)), old_reader.read(0, range(4))
        np.testing.assert_array_equal(found.raw, expected.raw)
        assert file.superblock.file_id == old.superblock.file_id


def test_an_update_leaves_every_old_byte_but_one_slot(plain: Path) -> None:
    old = plain.read_bytes()
    bundlefmt.append(plain, **UPDATE)
    new = plain.read_bytes()
    assert new[:4096] == old[:4096]
    assert new[8192 : len(old)] == old[8192:]
    assert new[4096:8192] != old[4096:8192]


def test_updates_take_the_slots_in_turn(plain: Path) -> None:
    for generation in range(2, 8):
        before = plain.read_bytes()
        bundlefmt.append(plain, blobs={"count": str(generation).encode()})
        after = plain.read_bytes()
        slot = (generation - 1) % 2 * 4096
        assert after[4096 - slot : 8192 - slot] == before[4096 - slot : 8192 - slot]
        assert after[8192 : len(before)] == before[8192:]
        report = bundlefmt.verify(plain)
        assert report.ok
        assert report.generation == generation
        with bundlefmt.open(plain) as file:
            assert file.blob("count") == str(generation).encode()
            assert len(file.header.retired) == 2 * generation - 3  # headers, and counts


def test_an_empty_update_is_a_generation_all_the_same(plain: Path) -> None:
    assert bundlefmt.append(plain).generation == 2
    assert bundlefmt.verify(plain).ok


@pytest.mark.parametrize(
    "array",
    [
        np.array(2.5, np.float32),
        np.zeros((0, 3), np.int64),
        np.array([True, False]),
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4)[:, ::2, 1:],
        np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
        np.array([1, -2], dtype=ml_dtypes.bfloat16),
    ],
    ids=["0-d", "empty", "bool", "strided", "fortran", "bf16"],
)
def test_any_array_of_a_known_dtype_comes_back(array: np.ndarray[Any, Any], plain: Path) -> None:
    bundlefmt.append(plain, tensors={"x": array})
    with bundlefmt.open(plain) as file:
        found = file.tensor("x")
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)
    assert bundlefmt.verify(plain).ok


def test_a_predictor_replaces_the_one_of_its_group(plain: Path) -> None:
    bundlefmt.append(plain, **UPDATE)
    bundlefmt.append(plain, predictors=[Predictor(0, "p.a", "p.b", 0.25)])
    with bundlefmt.open(plain) as file:
        assert [predictor.threshold for predictor in file.header.predictors] == [0.25]


def test_an_updated_file_still_unpacks_byte_for_byte(small_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(small_bundle, tmp_path / "x.bundle"))
    bundlefmt.append(path, tensors={"extra": A}, blobs={"note.txt": b"hello"})
    bundlefmt.unpack(small_bundle, tmp_path / "before")
    assert bundlefmt.unpack(path, tmp_path / "after").identical
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "after" / "note.txt").read_bytes() == b"hello"


# What it refuses: the file stays what it was

TENSORS = {"p.a": A, "p.b": B}
REFUSED: dict[str, dict[str, Any]] = {
    "a predictor of no group": {
        "tensors": TENSORS,
        "predictors": [Predictor(9, "p.a", "p.b", 0.5)],
    },
    "a predictor of the wrong shape": {
        "tensors": TENSORS,
        "predictors": [Predictor(0, "p.b", "p.a", 0.5)],
    },
    "a predictor of integers": {
        "tensors": {"p.a": A.astype(np.int32), "p.b": B},
        "predictors": [Predictor(0, "p.a", "p.b", 0.5)],
    },
    "a predictor of floats with an encoding": {
        "tensors": TENSORS,
        "predictors": [Predictor(0, "p.a", "p.b", 0.5, encoding="q8_0")],
    },
    "a predictor whose rows are no whole blocks": {
        "tensors": {"p.a": np.empty((2, 0), np.uint8), "p.b": np.empty((4, 0), np.uint8)},
        "predictors": [Predictor(0, "p.a", "p.b", 0.5, encoding="q8_0")],
    },
    "a predictor without tensors": {"predictors": [Predictor(0, "p.a", "p.b", 0.5)]},
    "two predictors of one group": {
        "tensors": TENSORS,
        "predictors": [Predictor(0, "p.a", "p.b", 0.5), Predictor(0, "p.a", "p.b", 0.1)],
    },
    "a threshold above 1": {"tensors": TENSORS, "predictors": [Predictor(0, "p.a", "p.b", 2.0)]},
    "a threshold that is no number": {
        "tensors": TENSORS,
        "predictors": [Predictor(0, "p.a", "p.b", float("nan"))],
    },
    "a negative layer": {"tensors": TENSORS, "predictors": [Predictor(-1, "p.a", "p.b", 0.5)]},
    "a blob with a path": {"blobs": {"../note": b"x"}},
    "a blob without a name": {"blobs": {"": b"x"}},
    "a blob named as a source": {"blobs": {"model.safetensors": b"x"}},
    "a blob of a long name": {"blobs": {"x" * 256: b"x"}},
    "a blob whose name is not text": {"blobs": {"\ud800": b"x"}},
    "a tensor whose name is not text": {"tensors": {"\ud800": A}},
    "an array of objects": {"tensors": {"x": np.array([object()])}},
    "an array of dates": {"tensors": {"x": np.array(["2024-01-01"], "M8[D]")}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_update_that_no_reader_would_accept_is_refused(name: str, plain: Path) -> None:
    with pytest.raises((UsageError, FormatError)) as caught:
        bundlefmt.append(plain, **REFUSED[name])
    assert "\n" not in str(caught.value)
    assert_old(plain)
    assert bundlefmt.verify(plain).ok
    bundlefmt.append(plain, **UPDATE)
    assert_new(plain)
    assert bundlefmt.verify(plain).notes == []


def test_a_refused_update_names_the_file(plain: Path) -> None:
    with pytest.raises(BundleError) as caught:
        bundlefmt.append(plain, predictors=[Predictor(9, "p.a", "p.b", 0.5)])
    assert str(plain) in str(caught.value)


def test_two_writers_at_once_are_refused(plain: Path) -> None:
    content = plain.read_bytes()
    with plain.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another writer") as caught:
            bundlefmt.append(plain, **UPDATE)
        assert str(plain) in str(caught.value)
        assert plain.read_bytes() == content
    bundlefmt.append(plain, **UPDATE)
    assert_new(plain)


def test_readers_do_not_stop_a_writer_and_keep_their_state(plain: Path) -> None:
    with bundlefmt.open(plain) as file:
        bundlefmt.append(plain, **UPDATE)
        assert file.config == {"model_type": "example"}
        assert file.tensor("norm").tolist() == [1.5, -2.0, 0.25]


def test_a_damaged_file_is_not_updated(plain: Path) -> None:
    with bundlefmt.open(plain) as file:
        at = file.superblock.header_offset
    data = bytearray(plain.read_bytes())
    data[at] ^= 1
    plain.write_bytes(data)
    with pytest.raises(FormatError, match="header damaged"):
        bundlefmt.append(plain, **UPDATE)
    assert plain.read_bytes() == data


def test_what_is_not_there_is_the_callers_fault(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        bundlefmt.append(tmp_path / "nowhere", **UPDATE)


# Crashes


class Crash(BaseException):
    """The moment at which the power goes."""


Step = Callable[..., Any]


class Faults:
    """Counts the calls that change a file, and lets the k-th of them do what `at_fault` does."""

    def __init__(self, patch: pytest.MonkeyPatch, k: int, at_fault: Callable[..., Any]) -> None:
        self.calls: list[str] = []
        for name in ("pwrite", "ftruncate", "fsync"):
            patch.setattr(os, name, self._wrapped(name, getattr(os, name), k, at_fault))

    def _wrapped(self, name: str, real: Step, k: int, at_fault: Callable[..., Any]) -> Step:
        def step(*args: Any) -> Any:
            self.calls.append(name)
            return at_fault(real, *args) if len(self.calls) == k else real(*args)

        return step


def before(real: Step, *args: Any) -> Any:
    raise Crash


def after(real: Step, *args: Any) -> Any:
    real(*args)
    raise Crash


def halfway(real: Step, fd: int, *args: Any) -> Any:
    """A write of which only the first half, in whole sectors of a slot, reached the device."""
    if len(args) == 2:
        data, offset = args
        real(fd, memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2], offset)
    raise Crash


def no_fault(real: Step, *args: Any) -> Any:
    return real(*args)


def steps_of_an_update(path: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, 0, no_fault)
        bundlefmt.append(path, **UPDATE)
    return faults.calls


def test_the_superblock_is_written_between_two_fsyncs(plain: Path) -> None:
    assert steps_of_an_update(plain)[-3:] == ["fsync", "pwrite", "fsync"]


@pytest.mark.parametrize("crash", [before, after, halfway])
@pytest.mark.parametrize("leavings", [False, True])
def test_a_crash_at_any_step_leaves_the_old_state_or_the_new(
    crash: Callable[..., Any], leavings: bool, plain: Path, tmp_path: Path
) -> None:
    steps = len(steps_of_an_update(Path(shutil.copy(plain, tmp_path / "count.bundle"))))
    assert steps > 8
    path = tmp_path / "crash.bundle"
    outcomes = []
    for k in range(1, steps + 1):
        shutil.copy(plain, path)
        if leavings:  # of an update that crashed before this one
            path.write_bytes(path.read_bytes() + b"leavings" * 1000)
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, k, crash)
            with pytest.raises(Crash):
                bundlefmt.append(path, **UPDATE)
        report = bundlefmt.verify(path)
        assert report.faults == []
        assert all("interrupted update" in note for note in report.notes)
        outcomes.append(report.generation)
        (assert_old if report.generation == 1 else assert_new)(path)

        bundlefmt.append(path, **UPDATE)
        assert_new(path, report.generation + 1)
        report = bundlefmt.verify(path)
        assert report.ok
        assert report.notes == []
    assert outcomes == sorted(outcomes)
    assert outcomes[0] == 1
    assert outcomes[-1] == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_device_that_refuses_a_write_leaves_the_old_state(
    code: int, plain: Path, tmp_path: Path
) -> None:
    def refuse(real: Step, *args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    steps = steps_of_an_update(Path(shutil.copy(plain, tmp_path / "count.bundle")))
    for k in range(1, len(steps)):
        path = Path(shutil.copy(plain, tmp_path / "refused.bundle"))
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, k, refuse)
            with pytest.raises(WriteError) as caught:
                bundlefmt.append(path, **UPDATE)
        assert str(path) in str(caught.value)
        assert os.strerror(code) in str(caught.value)
        assert_old(path)
        assert bundlefmt.verify(path).ok


@pytest.mark.parametrize("removed", [False, True])
def test_an_update_of_a_file_that_lost_its_name_never_reports_success(
    removed: bool, plain: Path, tmp_path: Path
) -> None:
    """Another file takes the name, or none has it any more, before the k-th step."""
    other, path = tmp_path / "other.bundle", tmp_path / "renamed.bundle"
    kept = tmp_path / "kept.bundle"  # the file under a name that it keeps

    def lose_the_name(real: Step, *args: Any) -> Any:
        path.unlink()
        if not removed:
            other.rename(path)
        return real(*args)

    steps = len(steps_of_an_update(Path(shutil.copy(plain, tmp_path / "count.bundle"))))
    for k in range(1, steps + 1):
        shutil.copy(plain, path)
        shutil.copy(plain, other)
        kept.unlink(missing_ok=True)
        kept.hardlink_to(path)
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, k, lose_the_name)
            with pytest.raises(UsageError, match="another file has taken this name") as caught:
                bundlefmt.append(path, **UPDATE)
        assert str(path) in str(caught.value)
        assert removed or path.read_bytes() == plain.read_bytes()
        (assert_old if k < steps - 1 else assert_new)(kept)  # the superblock is the last but one


def test_short_writes_are_carried_on(plain: Path) -> None:
    real = os.pwrite

    def short(fd: int, data: Any, offset: int) -> int:
        return real(fd, memoryview(data).cast("B")[:7], offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", short)
        bundlefmt.append(plain, **UPDATE)
    assert_new(plain)
    assert bundlefmt.verify(plain).ok


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_updated_all_the_same(
    number: int, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refusing)
    bundlefmt.append(plain, tensors={"x": np.ones(5, np.float32)})
    assert bundlefmt.verify(plain).ok
    with bundlefmt.open(plain) as file:
        assert file.tensor("x").tolist() == [1] * 5

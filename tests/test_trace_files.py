"""Traces on disk: whole or not there, readable by mmap-ninja, and harmless whatever they say."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bundlefmt
from bundlefmt.errors import BundleError, FormatError, UsageError, WriteError
from bundlefmt.flash.order import make_order, requests
from bundlefmt.flash.traces import Trace, new_trace
from bundlefmt.storage.regular import read_regular
from tests.conftest import FIXTURES, killed_before, mounted

NEURONS, D_MODEL, TOKENS = 72, 32, 110  # of the fixture, and of its trace


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("opt") / "opt.bundle"
    bundlefmt.pack(FIXTURES / "opt", path)
    return path


def record(opt: Path, folder: Path, tokens: int = TOKENS, silent: bool = False) -> None:
    """A trace of random inputs, in two pieces; `silent` where no neuron fires."""
    with bundlefmt.open(opt) as file:
        groups, file_id = file.groups, file.superblock.file_id
    dice = np.random.default_rng(1)
    x = dice.standard_normal((tokens, D_MODEL)).astype(np.float32)
    firing = (dice.random((tokens, NEURONS)) < (0 if silent else 0.2)).astype(np.float32)
    with new_trace(folder, file_id, groups) as writer:
        for group in groups:
            for half in (slice(0, tokens // 2), slice(tokens // 2, tokens)):
                writer.record(group, x[half], firing[half])
        writer.finish()


@pytest.fixture(scope="module")
def recorded(opt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace") / "opt.traces"
    record(opt, folder)
    return folder


@pytest.fixture
def spoilt(recorded: Path, tmp_path: Path) -> Path:
    """A copy of the trace that a test may spoil."""
    return Path(shutil.copytree(recorded, tmp_path / "opt.traces"))


def read_all(folder: Path) -> None:
    """Read every layer, and make an order from it."""
    trace = Trace(folder)
    tokens = np.arange(trace.info.tokens)
    for index in range(len(trace.info.layers)):
        layer = trace.layer(index)
        requests(layer, tokens, make_order(layer, tokens), 3)
        layer.active(tokens)


# Written


@pytest.mark.parametrize("silent", [False, True])
def test_mmap_ninja_reads_what_was_written(silent: bool, opt: Path, tmp_path: Path) -> None:
    ninja = pytest.importorskip("mmap_ninja")
    record(opt, tmp_path / "x", silent=silent)
    layer = Trace(tmp_path / "x").layer(1)
    ragged = ninja.RaggedMmap(tmp_path / "x" / "layer-1" / "active")
    inputs = ninja.numpy.open_existing(tmp_path / "x" / "layer-1" / "inputs")
    np.testing.assert_array_equal(inputs, layer.inputs)
    assert len(ragged) == TOKENS
    active = layer.active(np.arange(TOKENS))
    assert bool(active.any()) is not silent
    for token in range(TOKENS):
        np.testing.assert_array_equal(np.flatnonzero(active[token]), ragged[token])


def test_mmap_ninjas_own_arrays_are_read(spoilt: Path) -> None:
    ninja = pytest.importorskip("mmap_ninja")
    layer = Trace(spoilt).layer(0)
    rows = [layer.ids[start:end] for start, end in zip(layer.starts, layer.ends, strict=True)]
    inputs = layer.inputs.copy()
    shutil.rmtree(spoilt / "layer-0")
    (spoilt / "layer-0").mkdir()
    ninja.RaggedMmap.from_lists(spoilt / "layer-0" / "active", rows[:3]).extend(rows[3:])
    ninja.numpy.from_ndarray(spoilt / "layer-0" / "inputs", inputs)
    again = Trace(spoilt).layer(0)
    for name in ("inputs", "ids", "starts", "ends"):
        np.testing.assert_array_equal(getattr(again, name), getattr(layer, name))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_disk_that_fills_up_during_a_trace_leaves_nothing(opt: Path, small_disk: Path) -> None:
    record(opt, small_disk / "fits", tokens=2)
    with pytest.raises(WriteError, match=os.strerror(errno.ENOSPC)):
        record(opt, small_disk / "x", tokens=10_000)
    assert [path.name for path in small_disk.iterdir()] == ["fits"]


@pytest.mark.parametrize("most", [0, 10, 5000])
def test_files_that_may_not_grow_leave_no_trace(most: int, opt: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(WriteError, match=os.strerror(errno.EFBIG)):
            record(opt, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_trace_leaves_nothing_under_its_name(opt: Path, tmp_path: Path) -> None:
    for calls in range(3, 10_000, 61):
        if killed_before(calls, lambda: record(opt, tmp_path / "x")):
            break
        assert not (tmp_path / "x").exists()
        assert len(list(tmp_path.iterdir())) <= 1, "an earlier run's leavings were kept"
    read_all(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_layer_that_is_not_computed_is_not_recorded(opt: Path, tmp_path: Path) -> None:
    with bundlefmt.open(opt) as file:
        groups = file.groups
    x, firing = np.ones((2, D_MODEL), np.float32), np.ones((2, NEURONS), np.float32)
    for computed in ([], groups[:1]):
        with (
            pytest.raises(FormatError, match="does not compute this layer"),
            new_trace(tmp_path / "x", bytes(16), groups) as writer,
        ):
            for group in computed:
                writer.record(group, x, firing)
            writer.finish()
    with pytest.raises(UsageError, match="no FFN"), new_trace(tmp_path / "x", bytes(16), []):
        pytest.fail("the block ran")
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_are_no_numbers_are_not_recorded(opt: Path, tmp_path: Path) -> None:
    with bundlefmt.open(opt) as file:
        groups = file.groups
    x = np.full((1, D_MODEL), np.nan, dtype=np.float32)
    with (
        pytest.raises(FormatError, match="NaN"),
        new_trace(tmp_path / "x", bytes(16), groups) as writer,
    ):
        writer.record(groups[0], x, np.zeros((1, NEURONS), dtype=np.float32))
    assert list(tmp_path.iterdir()) == []


# Read

Edit = Callable[[Path], Any]


def _words(name: str, at: int, value: int, kind: str = "<q") -> Edit:
    """Overwrite a number of a data file."""

    def edit(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        struct.pack_into(kind, content, at * struct.calcsize(kind), value)
        (folder / name).write_bytes(content)

    return edit


def _info(**changed: Any) -> Edit:
    def edit(folder: Path) -> None:
        info = json.loads((folder / "trace.json").read_text())
        for key, value in changed.items():
            (info if key in info else info["layers"][0])[key] = value
        (folder / "trace.json").write_text(json.dumps(info))

    return edit


def _content(name: str, content: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content)


def _in_place_of(name: str, make: Edit) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def _twice(folder: Path) -> None:
    info = json.loads((folder / "trace.json").read_text())
    _info(layers=[info["layers"][0]] * 2)(folder)


IDS, STARTS, ENDS = (f"layer-0/active/{name}data.ninja" for name in ("", "starts/", "ends/"))
FAULTS: dict[str, tuple[Edit, str]] = {
    "no JSON": (_content("trace.json", b"{"), "trace.json: not understood"),
    "deep JSON": (_content("trace.json", b'{"x":' + b"[" * 10**6), "trace.json: not understood"),
    "no UTF-8": (_content("trace.json", b'{"file_id":"\xff"}'), "trace.json: not understood"),
    "long JSON": (_content("trace.json", b" " * (17 << 20)), "trace.json: no trace: longer than"),
    "a version of tomorrow": (_info(version=2), "another version: expected 1, found 2"),
    "no tokens": (_info(tokens=0), "tokens"),
    "more tokens than an array": (_info(tokens=TOKENS + 1), "expected [111, 32], found [110, 32]"),
    "tokens beyond all numbers": (_info(tokens=1 << 80), "tokens"),
    "no layers": (_info(layers=[]), "layers"),
    "a layer twice": (_twice, "layers: a layer is there twice"),
    "a layer below zero": (_info(layer=-1), "layer"),
    "another layer": (_info(layer=7), "layer-7/inputs/dtype.ninja: cannot read: No such file"),
    "fewer neurons": (_info(neurons=70), "active: no such neuron: expected less than 70"),
    "a long name": (_info(file_id="x" * 10**6), "file_id"),
    "another dtype": (
        _content("layer-0/active/dtype.ninja", b"object"),
        "layer-0/active/dtype.ninja: another array than trace.json tells of: "
        "expected uint32, found object",
    ),
    "no dtype": (_content("layer-0/active/dtype.ninja", b""), "expected uint32, found"),
    "another order": (_content("layer-0/inputs/order.ninja", b"F"), "expected C, found F"),
    "odd shape": (_content("layer-0/inputs/shape.ninja", b"123"), "inputs/shape.ninja"),
    "no array": (lambda folder: shutil.rmtree(folder / "layer-0" / "inputs"), "cannot read"),
    "data cut": (lambda folder: os.truncate(folder / IDS, 8), "data.ninja: wrong length"),
    "data longer": (lambda folder: os.truncate(folder / IDS, 1 << 40), "data.ninja: wrong length"),
    "an id of no neuron": (_words(IDS, 5, NEURONS, "<I"), "expected less than 72, found 72"),
    "an id twice": (_words(IDS, 1, 0, "<I"), "not in ascending order"),
    "first start": (_words(STARTS, 0, 1), "starts and ends"),
    "a start below zero": (_words(STARTS, 3, -1), "starts and ends"),
    "a start far off": (_words(STARTS, 3, 1 << 62), "starts and ends"),
    "last end": (_words(ENDS, TOKENS - 1, 1 << 62), "starts and ends"),
    "a folder": (_in_place_of(IDS, Path.mkdir), "not a regular file"),
    "a FIFO": (_in_place_of(IDS, os.mkfifo), "not a regular file"),
    "a FIFO for JSON": (_in_place_of("trace.json", os.mkfifo), "no trace: not a regular file"),
    "a device": (
        _in_place_of(IDS, lambda path: path.symlink_to("/dev/zero")),
        "not a regular file",
    ),
    "a ring of links": (_in_place_of(IDS, lambda path: path.symlink_to(path)), "cannot read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_trace_is_refused_naming_file_and_field(fault: str, spoilt: Path) -> None:
    edit, message = FAULTS[fault]
    edit(spoilt)
    with pytest.raises((FormatError, UsageError)) as caught:
        read_all(spoilt)
    assert isinstance(caught.value, UsageError) is ("no trace" in message)
    assert message in str(caught.value)
    assert str(spoilt) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_links_to_regular_files_are_followed(spoilt: Path, recorded: Path) -> None:
    _in_place_of(IDS, lambda path: path.symlink_to(recorded / IDS))(spoilt)
    read_all(spoilt)


@pytest.mark.parametrize("folder", ["missing", "a\0b", "x" * 5000, "/dev/null"])
def test_a_path_that_holds_no_trace_is_a_usage_error(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trace"):
        Trace(tmp_path / folder)


def test_a_small_file_takes_little_memory_to_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"small")
    (tmp_path / "y").touch()
    os.truncate(tmp_path / "y", 1 << 40)
    tracemalloc.start()
    try:
        assert read_regular(tmp_path / "x", 1 << 50) == b"small"
        assert read_regular(tmp_path / "x", 5) == b"small"
        with pytest.raises(OSError, match="longer than 4 bytes"):
            read_regular(tmp_path / "x", 4)
        with pytest.raises(OSError, match="longer than"):
            read_regular(tmp_path / "y", 1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["missing", "a\0b", "\ud800", "x" * 5000, "fifo", "zero", "."])
def test_a_text_that_is_no_file_is_a_usage_error(
    name: str, demo_bundle: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="cannot be read"):
        bundlefmt.trace(demo_bundle, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


VALUES = (-1, 0, 1, 2, 71, 73, 1 << 31, 1 << 47, 1 << 63, 1 << 200, 1e308, None, "x", [], {}, True)


def mutate(path: Path, dice: random.Random) -> None:
    """Make something else of a file."""
    content = bytearray(path.read_bytes())
    match dice.choice(["json", "cut", "grow", "flip", "word", "words", "other", "gone"]):
        case "json" if path.name == "trace.json":
            info = json.loads(content)
            place = dice.choice([info, *info["layers"]])
            place[dice.choice(sorted(place))] = dice.choice(VALUES)
            path.write_text(json.dumps(info))
        case "cut":
            os.truncate(path, dice.randrange(len(content)))
        case "grow":
            path.write_bytes(content + dice.randbytes(dice.choice([1, 4, 8, 4096])))
        case "word" | "words" as many if len(content) >= 8:
            for _ in range(1 if many == "word" else len(content) // 8):
                value = dice.choice([0, 1, -1, 1 << 62, dice.randrange(3000)])
                struct.pack_into("<q", content, 8 * dice.randrange(len(content) // 8), value)
            path.write_bytes(content)
        case "other":
            path.write_bytes(dice.choice([b"object", b"O", b"<f2", b"float64", b"\xff", b"[" * 9]))
        case "gone":
            path.unlink()
        case _:
            for _ in range(dice.choice([1, 2, 8])):
                content[dice.randrange(len(content))] = dice.randrange(256)
            path.write_bytes(content)


def mutations(folder: Path, count: int) -> Iterator[None]:
    """The trace with one file changed, again and again."""
    dice = random.Random(7)
    unread = ("shapes", "type.ninja")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(word in str(path.relative_to(folder)) for word in unread)
    )
    for _ in range(count):
        path = dice.choice([*files, *[folder / "trace.json"] * 10])
        content = path.read_bytes()
        mutate(path, dice)
        yield
        path.write_bytes(content)


def is_harmless(use: Callable[[], Any]) -> bool:
    """Whether it came to a result; any error but a BundleError is raised."""
    try:
        use()
    except BundleError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 1000
        return False
    return True


def test_any_trace_gives_a_result_or_a_bundle_error(opt: Path, spoilt: Path) -> None:
    read = planned = 0
    for _ in mutations(spoilt, 500):
        if is_harmless(lambda: read_all(spoilt)):
            read += 1
            plan = lambda: bundlefmt.plan(opt, 1 << 30, mode="exact", traces=spoilt)  # noqa: E731
            planned += is_harmless(plan)
    assert 20 < planned <= read < 250


@pytest.mark.skipif(find_spec("torch") is None, reason="needs PyTorch: pip install '.[train]'")
def test_any_trace_is_trained_on_or_refused(opt: Path, spoilt: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(opt, tmp_path / "x.bundle"))
    inputs = spoilt / "layer-0" / "inputs" / "data.ninja"
    content = inputs.read_bytes()
    trained = 0
    for value in (0, 0x7BFF, 0x0001, 0x7C00, 0x7E00):  # nothing, most, least, infinite, NaN
        for many in (1, len(content) // 2):
            inputs.write_bytes(struct.pack("<H", value) * many + content[2 * many :])
            trained += is_harmless(
                lambda: bundlefmt.train_predictors(path, spoilt, rank=4, epochs=1)
            )
    assert trained == 6
    assert bundlefmt.verify(path).ok

"""Hostile files: each is read, or refused with FormatError or ReadError; nothing else happens."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bundlefmt
from bundlefmt.checkpoints.sources import read_safetensors
from bundlefmt.errors import LONGEST, BundleError, FormatError, ReadError, UsageError
from bundlefmt.layout import header as headers
from bundlefmt.layout import superblock
from bundlefmt.layout.constants import (
    MAX_BLOB_LENGTH,
    MAX_HEADER_DEPTH,
    MAX_HEADER_LENGTH,
    MAX_HEADER_MARKS,
)
from tests.conftest import FIXTURES, VECTORS
from tools import fuzz_files
from tools.alterations import edited, header_of, rle_frame, with_header, with_superblock
from tools.bad_vectors import group
from tools.hostile_files import Case, paths_in, put_together, read_everything, run_of, taken_apart

BAD: dict[str, dict[str, str]] = json.loads((VECTORS / "bad" / "errors.json").read_text())
PLAIN = (VECTORS / "plain.bundle").read_bytes()

FUZZ = settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def try_inspect(path: Path) -> None:
    """Reports and restoring may refuse the file, but only so."""
    folder = path.with_suffix(".out")
    for use in (lambda: bundlefmt.inspect(path), lambda: bundlefmt.unpack(path, folder)):
        try:
            use()
        except (FormatError, ReadError):
            continue
        finally:
            if folder.is_dir():
                for file in folder.iterdir():
                    file.unlink()


def assert_harmless(path: Path) -> None:
    """Opening, verifying, reading, reporting and restoring end well, or in those two errors."""
    bundlefmt.verify(path)
    try:
        read_everything(path)
    except (FormatError, ReadError) as error:
        assert str(error).isprintable()
    try_inspect(path)


# The bad vectors


def test_every_bad_vector_has_its_error() -> None:
    assert {path.stem for path in (VECTORS / "bad").glob("*.bundle")} == BAD.keys()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_vector_is_refused_where_and_why_it_must_be(name: str) -> None:
    path, expected = VECTORS / "bad" / f"{name}.bundle", BAD[name]
    report = bundlefmt.verify(path)
    assert not report.ok
    assert report.faults[0].startswith(
        (f"{path}: {expected['field']}: ", f"{path}: {expected['field']} at byte ")
    )
    if expected["refused_by"] == "open":
        with pytest.raises(FormatError) as caught:
            bundlefmt.open(path)
        assert caught.value.field == expected["field"]
        assert str(caught.value) == report.faults[0]
        assert report.fault_count == 1
    else:
        bundlefmt.open(path).close()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_vector_is_harmless(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes((VECTORS / "bad" / f"{name}.bundle").read_bytes())
    assert_harmless(path)


# Lies cost no memory


def many(lie: Callable[[dict[str, Any]], Any]) -> bytes:
    return edited(lie)(PLAIN)


LIES = {
    "neurons": lambda: many(lambda h: group(h).update(neurons=1 << 32)),
    "neurons and their lengths": lambda: many(
        lambda h: (
            group(h).update(neurons=1 << 30),
            group(h)["bundles"].update(length=64 << 30),
            group(h)["checksums"].update(length=8 << 30),
        )
    ),
    "d_model": lambda: many(lambda h: group(h).update(d_model=1 << 50)),
    "stride": lambda: many(lambda h: group(h).update(stride=1 << 50)),
    "a part's length": lambda: many(lambda h: group(h)["parts"][0].update(length=1 << 50)),
    "a shape": lambda: many(lambda h: h["tensors"][0].update(shape=[1 << 50] * 64)),
    "a shape and its length": lambda: many(
        lambda h: (
            h["tensors"][0].update(shape=[1 << 40]),
            h["tensors"][0]["data"].update(length=4 << 40),
        )
    ),
    "a blob's length": lambda: many(lambda h: h["blobs"][0]["data"].update(length=1 << 52)),
    "a region at the end of the world": lambda: many(
        lambda h: h["blobs"][0]["data"].update(offset=(1 << 53) - 4096, length=4096)
    ),
    "the header's length": lambda: with_superblock(PLAIN, header_length=100 << 20),
    "the file's length": lambda: with_superblock(
        PLAIN,
        header_length=60 << 20,
        file_length=superblock.decode(PLAIN[:4096]).header_offset + (60 << 20),
    ),
}


def peak_of(use: Callable[[], Any]) -> int:
    """The most bytes that Python and NumPy held at once, beyond those held before."""
    tracemalloc.start()
    try:
        use()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", LIES)
def test_a_lie_about_sizes_is_refused_without_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "lie.bundle"
    path.write_bytes(LIES[name]())

    def use() -> None:
        with pytest.raises(FormatError):
            bundlefmt.open(path)
        assert not bundlefmt.verify(path).ok

    use()  # modules imported, caches filled
    assert peak_of(use) < 1 << 20


def compressed_blob(frame: bytes, declared: int) -> bytes:
    """The plain vector with its blob replaced by a zstd frame at the end of the data."""
    header = header_of(PLAIN)
    block = superblock.decode(PLAIN[:4096])
    header["retired"] = [header["blobs"][0]["data"]]
    header["blobs"][0]["data"] = {
        "offset": block.header_offset,
        "length": len(frame),
        "xxh3": xxhash.xxh3_64_hexdigest(frame),
        "codec": "zstd",
        "decoded_length": declared,
    }
    room = -(-len(frame) // 4096) * 4096
    data = PLAIN[: block.header_offset] + frame.ljust(room, b"\0")
    moved = with_superblock(
        data + bytes(4096),
        header_offset=len(data),
        file_length=len(data) + 4096,
    )
    return with_header(moved, json.dumps(header, separators=(",", ":")).encode())


@pytest.mark.parametrize(
    ("frame", "declared"),
    [
        (rle_frame(0x20, 100), (1 << 53) - 1),
        (rle_frame(0x20, 100), 0),
        (rle_frame(0x20, 100), 99),
        (rle_frame(0x20, 100)[:-1], 100),
        (rle_frame(0x20, 100)[:4], 100),
        (rle_frame(0x20, 100) + b"rest", 100),
        (rle_frame(0x20, 100) + rle_frame(0x20, 9)[:6], 100),
        (rle_frame(0x20, 100) * 2, 100),
        (b"", 1),
        (b"not a frame at all", 100),
        # a frame that claims 2^50 bytes of content in its own header
        (b"\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little") + rle_frame(0, 9)[6:], 1 << 50),
        # 64 MiB of zeros in a few bytes, where 1000 are declared
        (zstandard.ZstdCompressor().compress(bytes(64 << 20)), 1000),
    ],
)
def test_zstd_data_of_another_length_is_refused_without_memory(
    frame: bytes, declared: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes(compressed_blob(frame, declared))

    def use() -> None:
        with pytest.raises(FormatError), bundlefmt.open(path) as file:
            file.blob("config.json")
        assert not bundlefmt.verify(path).ok

    use()
    assert peak_of(use) < 8 << 20


def test_several_zstd_frames_are_one_region(tmp_path: Path) -> None:
    frames = rle_frame(0x41, 100) + rle_frame(0x42, 50)
    path = tmp_path / "x.bundle"
    path.write_bytes(compressed_blob(frames, 150))
    with bundlefmt.open(path) as file:
        assert file.blob("config.json") == b"A" * 100 + b"B" * 50
    assert bundlefmt.verify(path).ok


# The header's text

TEXTS = {
    "empty object": b"{}",
    "null": b"null",
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(header_of(PLAIN)).encode(),
    "two values": json.dumps(header_of(PLAIN)).encode() + b"{}",
    "a zero byte at the end": json.dumps(header_of(PLAIN)).encode() + b"\0",
    "unfinished": json.dumps(header_of(PLAIN)).encode()[:-1],
    "UTF-16": json.dumps(header_of(PLAIN)).encode("utf-16"),
    "lone surrogate": b'{"family":"\\ud800",' + json.dumps(header_of(PLAIN)).encode()[1:],
    "key twice, once escaped": b'{"\\u0066amily":"x",' + json.dumps(header_of(PLAIN)).encode()[1:],
    "infinity": b'{"x":Infinity,' + json.dumps(header_of(PLAIN)).encode()[1:],
    "minus infinity": b'{"x":-Infinity,' + json.dumps(header_of(PLAIN)).encode()[1:],
    "10000 digits": b'{"x":' + b"9" * 10000 + b"," + json.dumps(header_of(PLAIN)).encode()[1:],
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_header_that_is_no_header_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes(with_header(PLAIN, TEXTS[name]))
    with pytest.raises(FormatError) as caught:
        bundlefmt.open(path)
    assert caught.value.field == "header"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1e999", "-1e999", "1" + "0" * 400 + ".0"])
@pytest.mark.parametrize("place", ["a known field", "an unknown field"])
def test_numbers_beyond_a_double_are_infinite_and_refused(
    text: str, place: str, tmp_path: Path
) -> None:
    header = json.dumps(header_of(PLAIN))
    if place == "a known field":
        header = header.replace('"activation":', f'"activation_threshold": {text}, "activation":')
    else:
        header = f'{{"x": {text}, {header[1:]}'
    path = tmp_path / "x.bundle"
    path.write_bytes(with_header(PLAIN, header.encode()))
    with pytest.raises(FormatError):
        bundlefmt.open(path)


@pytest.mark.parametrize(("levels", "accepted"), [(31, True), (32, False), (33, False)])
@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
def test_nesting_is_limited_to_the_level(
    levels: int, accepted: bool, left: str, right: str, tmp_path: Path
) -> None:
    inner = "1" if left != "[" else ""
    text = f'{{"x":{left * levels}{inner}{right * levels},'
    path = tmp_path / "x.bundle"
    path.write_bytes(with_header(PLAIN, text.encode() + json.dumps(header_of(PLAIN)).encode()[1:]))
    assert levels + 1 <= MAX_HEADER_DEPTH or not accepted
    assert bundlefmt.verify(path).ok is accepted


@pytest.mark.parametrize("piece", [b"[", b'{"a":', b'[{"a":'])
@pytest.mark.parametrize("closed", [True, False])
def test_nesting_as_deep_as_a_header_can_be_is_refused(
    piece: bytes, closed: bool, tmp_path: Path
) -> None:
    levels = (16 << 20) // len(piece)
    ends = b"1" + piece[::-1].translate(bytes.maketrans(b"[{", b"]}"), b'"a:') * levels
    path = tmp_path / "x.bundle"
    path.write_bytes(
        with_header(PLAIN, b'{"x":' + piece * levels + (ends + b"}" if closed else b""))
    )
    with pytest.raises(FormatError):
        bundlefmt.open(path)


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'"",', b"0,"])
@pytest.mark.parametrize("place", [b'{"x":[', b'{"required_features":['])
def test_a_header_of_too_many_values_is_not_parsed(
    piece: bytes, place: bytes, tmp_path: Path
) -> None:
    text = place + piece * (MAX_HEADER_MARKS + 1) + b'""],'
    path = tmp_path / "x.bundle"
    path.write_bytes(with_header(PLAIN, text + json.dumps(header_of(PLAIN)).encode()[1:]))
    with pytest.raises(FormatError, match="too many values") as caught:
        bundlefmt.open(path)
    assert caught.value.field == "header"


@pytest.mark.parametrize("length", [MAX_HEADER_LENGTH + 1, 100 << 20])
def test_a_header_beyond_the_limit_is_not_even_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes(with_superblock(PLAIN, header_length=length))
    with path.open("r+b") as file:
        file.truncate(200 << 20)
    with pytest.raises(FormatError) as caught:
        bundlefmt.open(path)
    assert caught.value.field == "superblock.header_length"
    assert peak_of(lambda: bundlefmt.verify(path)) < 1 << 20


# Names

NAMES = ["", ".", "..", "/", "/etc/passwd", "../evil", "a/b", "a\\b", "..\\evil", "a\0b", "é" * 128]


@pytest.mark.parametrize("kind", ["blobs", "sources"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_a_path_cannot_leave_the_folder(
    name: str, kind: str, tmp_path: Path
) -> None:
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    path = inside / "x.bundle"
    path.write_bytes(many(lambda h: h[kind][0].update(name=name)))
    with pytest.raises(FormatError):
        bundlefmt.unpack(path, inside / "out")
    found = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert found == [path]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "-rf", "~", "a b", "\n", "..."])
def test_any_plain_name_unpacks_inside_the_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes(many(lambda h: h["blobs"][0].update(name=name)))
    bundlefmt.unpack(path, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {name, "model.safetensors"}


# Mutations


VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 31, 32, 33, 64, 255, 4095, 4096, 8192, 12288, 16384, 28672]),
    st.sampled_from([-1, 1 << 31, 1 << 32, (1 << 53) - 1, 1 << 53, 1 << 63, 1 << 64, 1 << 200]),
    st.sampled_from([None, True, False, 0.5, -0.0, 1e308, [], {}, [0], [[]], "", "raw", "zstd"]),
    st.sampled_from(["f16", "q4_0", "F16", "F4", "C64", "gate", "down", "0.up", "norm", "\x1b["]),
    st.sampled_from(["0" * 16, "f" * 16, "../x", "config.json", "model.safetensors", "\0"]),
    st.integers(-5, 40000),
    st.text(max_size=5),
)
SEEDS = {
    path.stem: path.read_bytes()
    for path in sorted(VECTORS.glob("*.bundle"))
    if superblock.choose(path.read_bytes()[:8192])[1].generation == 1
}


@FUZZ
@given(data=st.data())
def test_any_header_value_changed_is_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = SEEDS[data.draw(st.sampled_from(sorted(SEEDS)))]
    header = header_of(seed)
    for _ in range(data.draw(st.integers(1, 3))):
        *outer, last = data.draw(st.sampled_from(sorted(paths_in(header), key=repr)))
        place: Any = header
        for key in outer:
            place = place[key]
        match data.draw(st.sampled_from(["replace", "delete", "double"])):
            case "replace":
                place[last] = copy.deepcopy(data.draw(VALUES))  # it may be changed next
            case "delete":
                del place[last]
            case "double":
                if isinstance(place, list):
                    place.append(place[last])
        if not header:
            break
    try:
        text = json.dumps(header).encode()
    except ValueError:
        return
    path = tmp_path_factory.getbasetemp() / "mutated-header.bundle"
    path.write_bytes(with_header(seed, text))
    assert_harmless(path)


@FUZZ
@given(
    seed=st.sampled_from(sorted(SEEDS)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=4)), min_size=1),
)
def test_any_header_text_changed_is_harmless(
    seed: str, changes: list[tuple[int, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = json.dumps(header_of(SEEDS[seed])).encode()
    for at, piece in changes:
        place = at % (len(text) + 1)
        text = text[:place] + piece + text[place + len(piece) // 2 + 1 :]
    path = tmp_path_factory.getbasetemp() / "mutated-text.bundle"
    path.write_bytes(with_header(SEEDS[seed], text))
    assert_harmless(path)


def test_any_bytes_changed_are_harmless(tmp_path: Path) -> None:
    dice = random.Random(1)
    path = tmp_path / "mutated.bundle"
    for seed in SEEDS.values():
        for _ in range(60):
            content = bytearray(seed)
            for _ in range(dice.choice([1, 2, 8, 64])):
                at = dice.randrange(len(content))
                if dice.random() < 0.5:  # where the file says something
                    at = dice.choice([dice.randrange(80), 4096 + dice.randrange(80)])
                content[at] = dice.randrange(256)
            if dice.random() < 0.2:
                del content[dice.randrange(len(content)) :]
            path.write_bytes(content)
            assert_harmless(path)


@settings(FUZZ, max_examples=200)
@given(
    fields=st.dictionaries(st.sampled_from(superblock.FIELDS[1:-1]), st.integers(0, (1 << 64) - 1))
)
def test_any_sealed_superblock_is_harmless(
    fields: dict[tuple[str, int, int], int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    slot = bytearray(PLAIN[:4096])
    for (_, offset, length), value in fields.items():
        slot[offset : offset + length] = (value >> 3).to_bytes(16, "little")[:length]
    slot[72:80] = xxhash.xxh3_64_intdigest(bytes(slot[:72])).to_bytes(8, "little")
    path = tmp_path_factory.getbasetemp() / "mutated-superblock.bundle"
    for content in (bytes(slot) * 2 + PLAIN[8192:], PLAIN[:4096] + bytes(slot) + PLAIN[8192:]):
        path.write_bytes(content)
        assert_harmless(path)


def resealed_source(text: bytes) -> bytes:
    """The plain vector whose safetensors header is another text, every checksum right."""
    header = header_of(PLAIN)
    region = header["sources"][0]["header"]
    content = text[:4096]
    region.update(length=len(content), xxh3=xxhash.xxh3_64_hexdigest(content))
    at = region["offset"]
    data = PLAIN[:at] + content.ljust(4096, b"\0") + PLAIN[at + 4096 :]
    return with_header(data, json.dumps(header, separators=(",", ":")).encode())


SOURCE = PLAIN[24576 : 24576 + 192].rstrip()


@settings(FUZZ, max_examples=300)
@given(
    changes=st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=4)), min_size=1, max_size=4)
)
def test_any_source_header_is_harmless(
    changes: list[tuple[int, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = SOURCE
    for at, piece in changes:
        text = text[:at] + piece + text[at + len(piece) // 2 + 1 :]
    path = tmp_path_factory.getbasetemp() / "mutated-source.bundle"
    path.write_bytes(resealed_source(text))
    assert_harmless(path)
    weights = path.with_suffix(".safetensors")
    weights.write_bytes(len(text).to_bytes(8, "little") + text + bytes(268))
    try:
        read_safetensors(weights)
    except FormatError as error:
        assert str(error).isprintable()


def test_a_source_header_nested_deeply_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes(resealed_source(b'{"__metadata__":' + b"[" * 2000 + b"]" * 2000 + b"}"))
    assert_harmless(path)


def test_the_headers_own_types_refuse_what_is_not_json(tmp_path: Path) -> None:
    for length in range(200):
        with pytest.raises(FormatError):
            headers.decode(random.Random(length).randbytes(length))


# A whole process


def test_a_deeply_nested_config_does_not_kill_the_process(tmp_path: Path) -> None:
    """In a process of its own, since what it guards against would end this one."""
    (tmp_path / "config.json").write_bytes(b"[" * (20 << 20))
    (tmp_path / "model.safetensors").write_bytes(
        (FIXTURES / "llama" / "model.safetensors").read_bytes()
    )
    code = "import sys, bundlefmt; bundlefmt.pack(sys.argv[1], sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, tmp_path, tmp_path / "x.bundle"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "bundlefmt.errors.FormatError" in done.stderr
    assert "config.json: not JSON" in done.stderr


@pytest.mark.parametrize(
    "source",
    [
        {"tensor": "norm", "start": 1},  # a resident tensor: what it says is not written there
        {"tensor": "norm", "axis": 1, "start": 1 << 40},
    ],
    ids=str,
)
def test_a_part_cannot_write_into_a_tensor_that_it_does_not_make_up(
    source: dict[str, Any], tmp_path: Path
) -> None:
    header = header_of(PLAIN)
    header["groups"][0]["parts"][0]["source"] = source
    path = tmp_path / "x.bundle"
    path.write_bytes(with_header(PLAIN, json.dumps(header).encode()))
    with pytest.raises(FormatError, match="does not hold this tensor whole"):
        bundlefmt.unpack(path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_verifying_a_compressed_tensor_takes_no_memory_for_what_it_decodes_to(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.bundle"
    zeros = zstandard.ZstdCompressor().compressobj()
    frame = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(64)) + zeros.flush()
    path.write_bytes(compressed_blob(frame, 64 << 20))
    assert peak_of(lambda: bundlefmt.verify(path)) < 8 << 20
    assert bundlefmt.verify(path).ok


def test_a_blob_is_held_in_memory_once(tmp_path: Path) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes(compressed_blob(run_of(0x20, 32 << 20), 32 << 20))
    with bundlefmt.open(path) as file:
        assert peak_of(lambda: file.blob("config.json")) < 40 << 20


@pytest.mark.parametrize("length", [MAX_BLOB_LENGTH + (1 << 17), 1 << 30])
def test_a_blob_beyond_the_limit_is_not_even_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes(compressed_blob(run_of(0x20, length), length))
    with pytest.raises(FormatError) as caught:
        bundlefmt.open(path)
    assert caught.value.field == "header.blobs[0].data"
    assert peak_of(lambda: bundlefmt.verify(path)) < 1 << 20


def test_a_config_of_many_megabytes_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes(compressed_blob(run_of(0x20, 17 << 20), 17 << 20))
    with bundlefmt.open(path) as file, pytest.raises(FormatError, match="too long"):
        _ = file.config


# Models whose parts do not fit each other


def changed_model(path: Path, copy: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy with another content, every length and checksum right."""
    data = path.read_bytes()
    parts = taken_apart(data)
    change(parts)
    copy.write_bytes(put_together(parts, data))
    return copy


def halve_a_layer(parts: dict[str, Any]) -> None:
    layer = parts["groups"][1]
    layer["d_model"] //= 2
    for part in layer["parts"]:
        part["length"] //= 2


@pytest.mark.parametrize("tokens", [1, 20], ids=["the core", "NumPy"])
def test_an_ffn_of_another_width_than_the_model_is_refused(
    tokens: int, small_bundle: Path, tmp_path: Path
) -> None:
    path = changed_model(small_bundle, tmp_path / "x.bundle", halve_a_layer)
    with (
        pytest.raises(FormatError, match=r"layer 1.*expected 32, found 16"),
        bundlefmt.load_model(path) as model,
    ):
        model.logits([1] * tokens)


@pytest.fixture(scope="module")
def relu_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("relu") / "opt.bundle"
    bundlefmt.pack(FIXTURES / "opt", path)
    return path


def fill_bundles(parts: dict[str, Any], pattern: bytes) -> None:
    layer = parts["groups"][0]
    layer["bundles"] = pattern * (len(layer["bundles"]) // len(pattern))


NOT_A_NUMBER, INFINITY, LARGEST, ZERO = (
    np.float32(number).tobytes() for number in (np.nan, np.inf, np.finfo(np.float32).max, 0)
)


@pytest.mark.parametrize("pattern", [NOT_A_NUMBER, INFINITY, LARGEST])
def test_no_predictor_is_made_of_weights_that_are_not_finite(
    pattern: bytes, relu_bundle: Path, tmp_path: Path
) -> None:
    path = changed_model(relu_bundle, tmp_path / "x.bundle", lambda p: fill_bundles(p, pattern))
    with pytest.raises(FormatError, match="layer 0: no predictor can be made"):
        bundlefmt.load_model(path, mode="predict")


def test_a_predictor_of_weights_that_are_zero_changes_nothing(
    relu_bundle: Path, tmp_path: Path
) -> None:
    path = changed_model(relu_bundle, tmp_path / "x.bundle", lambda p: fill_bundles(p, ZERO))
    with (
        bundlefmt.load_model(path) as dense,
        bundlefmt.load_model(path, mode="predict") as predict,
    ):
        found, expected = predict.logits([1, 2, 3] * 6), dense.logits([1, 2, 3] * 6)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("rank", "stored"), [(8, np.full((8, 32), np.nan, "<f2")), (32, np.full((32, 34), 255, "u1"))]
)
def test_a_predictor_whose_numbers_are_not_finite_is_refused(
    rank: int, stored: np.ndarray[Any, Any], relu_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.bundle"
    path.write_bytes(relu_bundle.read_bytes())
    b = np.zeros((72, rank), "<f2") if rank == 8 else np.zeros((72, 34), "u1")
    encoding = None if rank == 8 else "q8_0"
    entry = headers.Predictor(0, "p.a", "p.b", 0.5, encoding=encoding)
    bundlefmt.append(path, tensors={"p.a": stored, "p.b": b}, predictors=[entry])
    with pytest.raises(FormatError, match=r"p\.a: .*not finite"):
        bundlefmt.load_model(path, mode="predict")


# Lines of errors

PIECES = ["", "x", "x" * 5000, "\x1b[31m" * 900, "é" * 3000, "\U0001f600" * 2000, "\ud800" * 400]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("other", [PIECES[1], PIECES[5]])
def test_an_error_is_one_short_line_whatever_it_says(piece: str, other: str) -> None:
    error = FormatError(other, file=piece, field=other, offset=1 << 60, expected=piece, found=other)
    assert str(error).isprintable()
    assert len(str(error).encode()) <= LONGEST


def kind_of(value: object) -> str:
    """A name for a test; not of its value, which may have no text."""
    return type(value).__name__


@pytest.mark.parametrize(
    "found", [10**5000, [10**5000], list(range(100000)), b"\xff" * 5000], ids=kind_of
)
def test_an_error_can_say_that_it_found_anything(found: object) -> None:
    line = str(UsageError("out of range", field="gap", expected="0 or more", found=found))
    assert line.startswith("gap: out of range: expected 0 or more, found ")
    assert len(line.encode()) <= LONGEST


def test_a_long_error_keeps_the_ends_of_what_it_names() -> None:
    folder = "/a" + "/deep" * 400
    error = FormatError("wrong", file=f"{folder}/model.bundle", field="x", found="7" * 4000 + "8")
    line = str(error)
    assert line.startswith("/a/deep/deep")
    assert "/deep/model.bundle: x: wrong: found 777" in line
    assert line.endswith("7778")


def test_a_short_error_is_whole() -> None:
    error = FormatError("wrong", file="f", field="x", offset=3, expected=[1], found="y" * 900)
    assert str(error) == f"f: x at byte 3: wrong: expected [1], found {'y' * 900}"


# Arguments

NO_INTEGERS = [0.0, 0.5, float("nan"), "0", [0], (0,), {}, np.array([0]), np.float64(0)]


@pytest.mark.parametrize("layer", [-1, 2, 1 << 200, 10**5000, None, *NO_INTEGERS], ids=kind_of)
def test_a_group_that_cannot_be_is_refused(layer: Any, small_bundle: Path) -> None:
    with bundlefmt.open(small_bundle) as file, file.reader() as reader:
        for call in (
            lambda: file.group(layer),
            lambda: reader.read(layer, [0]),
            lambda: reader.read(0, [0], expert=0 if layer is None else layer),
        ):
            with pytest.raises(UsageError, match="no such group"):
                call()


@pytest.mark.parametrize(
    "ids",
    [
        *[[-1], [72], [1 << 63], [1 << 200], [10**5000], [np.int8(-1)]],
        *[[True], [None], ["0"], [[0]], [[0], [1, 2]], NO_INTEGERS[:3]],
        *[None, 5, 0.5, "0", b"0", {1}, iter([1])],
        *[np.array([0, None]), np.array([0], "M8[s]"), np.array([1 << 63], np.uint64)],
    ],
    ids=kind_of,
)
def test_neurons_that_cannot_be_are_refused(ids: Any, small_bundle: Path) -> None:
    with bundlefmt.open(small_bundle) as file, file.reader() as reader, pytest.raises(UsageError):
        reader.read(0, ids)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("gap", [-1, 1 << 60, *NO_INTEGERS]),
        ("threads", [-1, 0, None, *NO_INTEGERS]),
        ("queue_depth", [-1, 0, None, *NO_INTEGERS]),
        ("compute_threads", [-1, 0, 10**9, 1 << 200, *NO_INTEGERS]),
        ("share", [-1, 0, 1.5, float("inf"), None, "x", []]),
        ("mode", ["", "x", None, 5, []]),
        ("backend", ["", "x", None, 5]),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    field: str, values: list[Any], small_bundle: Path
) -> None:
    for value in values:
        with pytest.raises(UsageError):
            bundlefmt.load_model(small_bundle, **{field: value}).close()


def test_what_is_no_bundle_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").touch()
    beside = [str(tmp_path / name) for name in ("fifo", "loop", "empty", "none", "")]
    for path in [
        *beside,
        *["/dev/zero", "/dev/null", "/proc/self/mem", "/proc/self/status"],
        *["", "a\0b", "x" * 5000, "x/" * 3000, "\ud800", b"none", None, 5, 1.5],
    ]:
        for use in (bundlefmt.open, bundlefmt.inspect, bundlefmt.load_model):
            with pytest.raises(BundleError) as caught:
                use(path)
            assert len(str(caught.value).encode()) <= LONGEST


# Broken files and calls on them


def fails() -> None:
    raise ZeroDivisionError("of no BundleError")


def test_the_fuzzer_counts_other_errors_and_long_lines_as_failures(tmp_path: Path) -> None:
    def refuses() -> None:
        raise FormatError("wrong")

    for call, failed in ((fails, True), (refuses, False), (lambda: None, False)):
        assert fuzz_files.outcome_of(Case("", tmp_path, call))[1] is failed


def test_broken_files_are_refused_or_read_within_time_and_memory(tmp_path: Path) -> None:
    """Some of the cases that .ci/run runs, which are some of those that `tools.fuzz_files` has."""
    results = list(fuzz_files.fuzz(range(150), seed=0, folder=tmp_path / "files"))
    assert len(results) == 150
    assert not [result for result in results if result.failed]

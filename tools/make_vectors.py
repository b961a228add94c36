"""Makes the test vectors of the format: spec/vectors/*.bundle with their contents as JSON, and
spec/vectors/bad/*.bundle with the error that each must give.

    python -m tools.make_vectors [FOLDER]     # default: spec/vectors

Everything is fixed: making them again gives the same bytes. A new good file is one function in
GOOD; the bad ones stand in bad_vectors.py.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

from bundlefmt.convert.unpack import unpack
from bundlefmt.convert.update import append
from bundlefmt.convert.writer import RegionWriter
from bundlefmt.file import BundleFile
from bundlefmt.layout import dtypes
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.constants import DATA_OFFSET, PARTS
from bundlefmt.layout.encodings import ENCODINGS
from bundlefmt.layout.header import (
    Blob,
    Group,
    Header,
    Part,
    Predictor,
    Region,
    Source,
    SourceFile,
    Tensor,
)
from bundlefmt.layout.planner import place_parts
from tools.alterations import Json, added, rle_frame, with_superblock
from tools.bad_vectors import BAD_OPEN, BAD_VERIFY

VECTORS = Path(__file__).resolve().parent.parent / "spec" / "vectors"
FILE_ID = bytes(range(16))
ALIGNMENT = 4096


class Builder:
    """A bundle file under construction."""

    def __init__(self, path: Path, alignment: int) -> None:
        self.path = path
        self._file = path.open("xb")
        self._writer = RegionWriter(self._file.fileno(), alignment, DATA_OFFSET)
        self.groups: list[Group] = []
        self.tensors: list[Tensor] = []
        self.blobs: list[Blob] = []
        self.sources: list[SourceFile] = []
        self.predictors: list[Predictor] = []

    def region(self, data: bytes) -> Region:
        """Append a region."""
        return self._writer.region(lambda: [data])

    def tensor(self, name: str, array: NDArray[Any]) -> None:
        """Append a resident tensor."""
        self.raw_tensor(name, dtypes.NAMES[array.dtype], array.shape, array.tobytes())

    def raw_tensor(self, name: str, dtype: str, shape: Sequence[int], data: bytes) -> None:
        """Append a resident tensor of any dtype."""
        self.tensors.append(Tensor(name, dtype, list(shape), self.region(data)))

    def group(
        self,
        layer: int,
        *,
        neurons: int,
        d_model: int,
        encoding: str,
        parts: Sequence[str] = ("up", "down"),
        resident: str | None = None,
        expert: int | None = None,
        alignment: int = 64,
        activation: str = "relu",
        order: Sequence[int] | None = None,
        sources: Mapping[str, Source] | None = None,
        biases: Mapping[str, str] | None = None,
    ) -> None:
        """Append a group of invented numbers."""
        kind = ENCODINGS[encoding]
        stored = {
            name: kind.encode(numbers(neurons, d_model, seed=layer * 7 + (expert or 0) + at))
            for at, name in enumerate(parts)
        }
        bundled = [name for name in parts if name != resident]
        places, used = place_parts([encoding] * len(bundled), d_model)
        stride = round_up(used, alignment)
        bundles = np.zeros((neurons, stride), dtype=np.uint8)
        for name, (offset, length) in zip(bundled, places, strict=True):
            bundles[:, offset : offset + length] = stored[name]
        residents = {resident: self.region(stored[resident].tobytes())} if resident else {}
        span, checksums = self._writer.bundles([bundles if order is None else bundles[list(order)]])
        offsets = {name: offset for name, (offset, _) in zip(bundled, places, strict=True)}
        self.groups.append(
            Group(
                layer=layer,
                expert=expert,
                neurons=neurons,
                d_model=d_model,
                activation=activation,
                stride=stride,
                stride_alignment=alignment,
                parts=[
                    Part(
                        name,
                        encoding,
                        kind.nbytes(d_model),
                        offsets.get(name),
                        residents.get(name),
                        (sources or {}).get(name),
                        (biases or {}).get(name),
                    )
                    for name in PARTS
                    if name in parts
                ],
                bundles=span,
                checksums=checksums,
                order=None
                if order is None
                else self.region(np.array(order, dtype="<u4").tobytes()),
            )
        )

    def source(self, name: str, tensors: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        """Append a safetensors header that describes (name, dtype, shape) tensors."""
        entries: Json = {}
        end = 0
        for tensor, dtype, shape in tensors:
            length = dtypes.nbytes(dtype, shape)
            entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
            end += length
        data = json.dumps(entries, separators=(",", ":")).encode()
        self.sources.append(SourceFile(name, self.region(data + b" " * (-len(data) % 8))))

    def close(self) -> None:
        """Write header and superblocks."""
        header = Header(
            family="example",
            groups=self.groups,
            tensors=self.tensors,
            blobs=self.blobs,
            sources=self.sources,
            predictors=self.predictors,
        )
        self._writer.superblock(self._writer.header(header, 1, FILE_ID), slots=(0, 1))
        self._file.close()


def numbers(neurons: int, d_model: int, seed: int) -> NDArray[np.float32]:
    """Invented numbers that f16 and bf16 hold exactly."""
    index = np.arange(neurons * d_model).reshape(neurons, d_model)
    return (((index * 37 + seed * 11) % 64 - 32) / 8).astype(np.float32)


def plain(builder: Builder) -> None:
    """f32, no gate; a resident tensor, a blob and a source file."""
    builder.tensor("norm", np.array([1.5, -2.0, 0.25], dtype=np.float32))
    sources = {"up": Source("0.up"), "down": Source("0.down", axis=1)}
    builder.group(0, neurons=4, d_model=8, encoding="f32", sources=sources)
    builder.blobs.append(Blob("config.json", builder.region(b'{"model_type": "example"}')))
    builder.source(
        "model.safetensors",
        [("0.up", "F32", [4, 8]), ("norm", "F32", [3]), ("0.down", "F32", [8, 4])],
    )


def gated_f16(builder: Builder) -> None:
    """f16 with a gate, and padding in each bundle."""
    builder.group(0, neurons=5, d_model=8, encoding="f16", parts=PARTS, activation="silu")


def gated_bf16(builder: Builder) -> None:
    """bf16 with a gate; two layers of different widths."""
    builder.group(0, neurons=3, d_model=16, encoding="bf16", parts=PARTS, activation="silu")
    builder.group(1, neurons=6, d_model=16, encoding="bf16", parts=PARTS, activation="silu")


def q8_0(builder: Builder) -> None:
    """q8_0, no gate."""
    builder.group(0, neurons=3, d_model=64, encoding="q8_0")


def q4_0(builder: Builder) -> None:
    """q4_0 with a gate."""
    builder.group(0, neurons=3, d_model=32, encoding="q4_0", parts=PARTS, activation="silu")


def ordered(builder: Builder) -> None:
    """An order: slot j holds neuron order[j]."""
    builder.group(0, neurons=6, d_model=8, encoding="f32", order=[4, 0, 5, 2, 1, 3])


def experts(builder: Builder) -> None:
    """A dense layer, then a layer of three experts."""
    builder.group(0, neurons=4, d_model=8, encoding="f16", parts=PARTS, activation="silu")
    for expert in range(3):
        builder.group(
            1,
            expert=expert,
            neurons=2,
            d_model=8,
            encoding="f16",
            parts=PARTS,
            activation="silu",
        )


def resident_gate(builder: Builder) -> None:
    """The gate outside the bundles."""
    builder.group(
        0, neurons=4, d_model=16, encoding="f16", parts=PARTS, resident="gate", alignment=512
    )


def zstd(builder: Builder) -> None:
    """A resident tensor under the zstd codec."""
    builder.group(0, neurons=2, d_model=8, encoding="f32")
    frame = rle_frame(0x3C, 48)
    region = builder.region(frame)
    data = Region(region.offset, region.length, region.xxh3, "zstd", 48)
    builder.tensors.append(Tensor("packed", "F16", [2, 12], data))


def fused(builder: Builder) -> None:
    """A resident gate and an up from one fused matrix, with biases and an order."""
    for name, count in (("gate_up.bias", 6), ("down.bias", 8)):
        builder.tensor(name, np.arange(count, dtype=np.float16) / 4)
    sources = {
        "gate": Source("gate_up"),
        "up": Source("gate_up", start=3),
        "down": Source("down", axis=1),
    }
    biases = {"gate": "gate_up.bias", "up": "gate_up.bias", "down": "down.bias"}
    builder.group(
        0,
        neurons=3,
        d_model=8,
        encoding="f16",
        parts=PARTS,
        activation="gelu_tanh",
        order=[2, 0, 1],
        resident="gate",
        sources=sources,
        biases=biases,
    )
    builder.source(
        "model.safetensors",
        [
            ("down", "F16", [8, 3]),
            ("gate_up.bias", "F16", [6]),
            ("gate_up", "F16", [6, 8]),
            ("down.bias", "F16", [8]),
        ],
    )


def odd_tensors(builder: Builder) -> None:
    """A single number, an empty tensor, four bits a number, a name beyond ASCII; regions aligned
    to 16384."""
    builder.raw_tensor("scalar", "I64", [], (-3).to_bytes(8, "little", signed=True))
    builder.raw_tensor("empty", "F32", [0, 5], b"")
    builder.raw_tensor("four bits", "F4", [3], b"\x21\x03")
    builder.raw_tensor("größe", "BOOL", [2], b"\x01\x00")


def encoded_predictor(builder: Builder) -> None:
    """A predictor in q8_0, for a group in q4_0."""
    builder.group(0, neurons=3, d_model=64, encoding="q4_0")
    for name, rows, columns in (("a", 32, 64), ("b", 3, 32)):
        encoded = ENCODINGS["q8_0"].encode(numbers(rows, columns, seed=rows))
        builder.tensor(f"predictors.0.{name}", encoded)
    names = "predictors.0.a", "predictors.0.b"
    builder.predictors.append(Predictor(0, *names, 0.25, encoding="q8_0"))


def newer_minor(builder: Builder) -> None:
    """Made whole here; `make` gives it a minor version and keys that this reader ignores."""
    builder.group(0, neurons=2, d_model=8, encoding="f32")


def two_generations(builder: Builder) -> None:
    """Made whole here, then updated by `make`: slot 1 is in force."""
    builder.group(0, neurons=4, d_model=8, encoding="f16")
    builder.blobs.append(Blob("note.txt", builder.region(b"first")))


def interrupted_update(builder: Builder) -> None:
    """Made whole here; `make` adds what a crashed update leaves after the end."""
    builder.group(0, neurons=2, d_model=8, encoding="f32")


GOOD: tuple[Callable[[Builder], None], ...] = (
    plain,
    gated_f16,
    gated_bf16,
    q8_0,
    q4_0,
    ordered,
    experts,
    resident_gate,
    zstd,
    fused,
    odd_tensors,
    encoded_predictor,
    newer_minor,
    two_generations,
    interrupted_update,
)


def update(path: Path) -> None:
    """The second generation of `two_generations`."""
    a = np.arange(16, dtype=np.float32).reshape(2, 8) / 8
    b = np.arange(8, dtype=np.float32).reshape(4, 2) - 4
    append(
        path,
        tensors={"predictors.0.a": a, "predictors.0.b": b},
        blobs={"note.txt": b"second"},
        predictors=[Predictor(0, "predictors.0.a", "predictors.0.b", 0.5)],
    )


def contents(path: Path) -> Json:
    """What a reader must find in a good file: numbers by neuron, other bytes in hex."""
    with BundleFile(path) as file, file.reader("buffered") as reader:
        block = file.superblock
        groups = []
        for group in file.groups:
            neurons = list(range(group.neurons))
            bundles = reader.read(group.layer, neurons, expert=group.expert)
            parts = {
                part.name: np.asarray(bundles.part(part.name), dtype=np.float64).tolist()
                for part in group.bundled
            }
            for part in group.parts:
                if part.resident is not None:
                    stored = file.resident_part(group, part.name)
                    parts[part.name] = ENCODINGS[part.encoding].decode(stored).tolist()
            groups.append({"layer": group.layer, "expert": group.expert, "parts": parts})
        return {
            "generation": block.generation,
            "alignment": block.alignment,
            "file_id": block.file_id.hex(),
            "groups": groups,
            "tensors": {
                tensor.name: {
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "bytes": file.tensor_bytes(tensor.name).hex(),
                }
                for tensor in file.header.tensors
            },
            "blobs": {name: file.blob(name).hex() for name in file.blob_names},
            "restored": restored(path),
            "predictors": [
                {key: value for key, value in asdict(p).items() if value is not None}
                for p in file.header.predictors
            ],
        }


def restored(path: Path) -> dict[str, str]:
    """The source files, in hex."""
    with BundleFile(path) as file:
        names = [source.name for source in file.header.sources]
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, folder)
        return {name: (Path(folder) / name).read_bytes().hex() for name in names}


def make(folder: Path) -> None:
    """Write all vectors into an empty or missing folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for build in GOOD:
        path = folder / f"{build.__name__.replace('_', '-')}.bundle"
        builder = Builder(path, 16384 if build is odd_tensors else ALIGNMENT)
        build(builder)
        builder.close()
        if build is two_generations:
            update(path)
        if build is newer_minor:
            later = added('"later":{"x":[1.5,null]}')(path.read_bytes())
            path.write_bytes(with_superblock(later, minor=7))
        if build is interrupted_update:
            path.write_bytes(path.read_bytes() + b"half of an update")
        path.with_suffix(".json").write_text(json.dumps(contents(path), indent=1) + "\n")
    sound = (folder / "plain.bundle").read_bytes()
    bad = folder / "bad"
    bad.mkdir()
    errors: dict[str, Json] = {}
    for stage, table in (("open", BAD_OPEN), ("verify", BAD_VERIFY)):
        for name, (change, field) in table.items():
            (bad / f"{name}.bundle").write_bytes(change(sound))
            errors[name] = {"refused_by": stage, "field": field}
    (bad / "errors.json").write_text(json.dumps(errors, indent=1) + "\n")


def main() -> None:
    """Replace the vectors' folder."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else VECTORS
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        make(Path(fresh) / "vectors")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(fresh) / "vectors").rename(folder)


if __name__ == "__main__":
    main()

"""The bytes on disk: superblocks, encodings, orders, the planner; and who may import whom."""

from __future__ import annotations

import ast
import warnings
from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import xxhash
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

import bundlefmt
from bundlefmt.checkpoints.families import FAMILIES
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.layout import superblock
from bundlefmt.layout.constants import SLOT_LENGTH
from bundlefmt.layout.encodings import ENCODINGS, numbers_in
from bundlefmt.layout.order import is_permutation, slots_of
from bundlefmt.layout.planner import choose_stride, place_parts, region_alignment
from bundlefmt.layout.superblock import Superblock

# The superblock

EXAMPLE = Superblock(
    alignment=4096,
    generation=1,
    file_length=0x8000,
    header_offset=0x7000,
    header_length=0x2DA,
    header_xxh3=0x070B03CF7A1CE7C9,
    file_id=bytes(range(16)),
)
EXAMPLE_BYTES = bytes.fromhex(  # section 11 of the specification
    "89 42 4e 44 4c 0d 0a 1a 01 00 00 00 00 10 00 00"
    "01 00 00 00 00 00 00 00 00 80 00 00 00 00 00 00"
    "00 70 00 00 00 00 00 00 da 02 00 00 00 00 00 00"
    "c9 e7 1c 7a cf 03 0b 07 00 01 02 03 04 05 06 07"
    "08 09 0a 0b 0c 0d 0e 0f ff 45 14 f6 0b db ee 55"
) + bytes(4096 - 80)


def sealed(slot: bytes) -> bytes:
    """The slot with the checksum that its fields ask for."""
    return slot[:72] + xxhash.xxh3_64_intdigest(slot[:72]).to_bytes(8, "little") + slot[80:]


def pair(a: Superblock, b: Superblock) -> bytes:
    """Both slots of a file."""
    return a.encode() + b.encode()


def test_a_superblock_is_exactly_these_bytes() -> None:
    assert EXAMPLE.encode() == EXAMPLE_BYTES
    assert superblock.decode(EXAMPLE_BYTES) == EXAMPLE


def test_every_field_of_a_superblock_comes_back() -> None:
    block = Superblock(
        alignment=65536,
        generation=(1 << 53) - 1,
        file_length=3 << 40,
        header_offset=(3 << 40) - 65536,
        header_length=65536,
        header_xxh3=(1 << 64) - 2,
        file_id=b"sixteen bytes id",
        minor=65535,
    )
    assert superblock.decode(block.encode()) == block


def test_the_field_table_tiles_the_used_bytes() -> None:
    end = 0
    for _, offset, length in superblock.FIELDS:
        assert offset == end
        end += length
    assert end == superblock.LENGTH == 80


DAMAGED = [
    # field, offset, what stands there instead
    ("major", 0x08, b"\x02\x00"),
    ("major", 0x08, b"\x00\x00"),
    ("alignment", 0x0C, (0).to_bytes(4, "little")),
    ("alignment", 0x0C, (512).to_bytes(4, "little")),
    ("alignment", 0x0C, (8192).to_bytes(4, "little")),
    ("alignment", 0x0C, b"\xff\xff\xff\xff"),
    ("generation", 0x10, bytes(8)),
    ("file_length", 0x18, (0x7000).to_bytes(8, "little")),
    ("file_length", 0x18, (0x9000).to_bytes(8, "little")),
    ("file_length", 0x18, (0x8001).to_bytes(8, "little")),
    ("file_length", 0x18, b"\xff" * 8),
    ("header_offset", 0x20, (0x7200).to_bytes(8, "little")),
    ("header_offset", 0x20, (0x1000).to_bytes(8, "little")),
    ("header_offset", 0x20, bytes(8)),
    ("header_length", 0x28, bytes(8)),
    ("header_length", 0x28, (1).to_bytes(8, "little")),
    ("header_length", 0x28, ((64 << 20) + 1).to_bytes(8, "little")),
    ("header_length", 0x28, b"\xff" * 8),
]


@pytest.mark.parametrize(("field", "offset", "value"), DAMAGED)
def test_a_field_out_of_range_is_refused_by_name(field: str, offset: int, value: bytes) -> None:
    slot = EXAMPLE_BYTES[:offset] + value + EXAMPLE_BYTES[offset + len(value) :]
    with pytest.raises(FormatError) as caught:
        superblock.decode(sealed(slot), 4096)
    assert caught.value.field == f"superblock.{field}"
    assert caught.value.offset == 4096 + offset


@pytest.mark.parametrize("at", range(80))
def test_any_flipped_byte_of_a_superblock_is_refused(at: int) -> None:
    slot = bytearray(EXAMPLE_BYTES)
    slot[at] ^= 0x40
    with pytest.raises(FormatError) as caught:
        superblock.decode(bytes(slot))
    assert caught.value.field == ("superblock.magic" if at < 8 else "superblock.checksum")


@pytest.mark.parametrize("length", [0, 1, 79, 80, 4095])
def test_a_slot_cut_short_is_refused(length: int) -> None:
    with pytest.raises(FormatError) as caught:
        superblock.decode(EXAMPLE_BYTES[:length])
    assert caught.value.field == "superblock"


def test_any_minor_version_is_accepted() -> None:
    assert superblock.decode(replace(EXAMPLE, minor=7).encode()).minor == 7


def test_the_slot_of_the_higher_generation_is_in_force() -> None:
    newer = replace(EXAMPLE, generation=2, file_length=0x9000, header_offset=0x8000)
    assert superblock.choose(pair(EXAMPLE, newer)) == (1, newer)
    assert superblock.choose(pair(newer, EXAMPLE)) == (0, newer)
    assert superblock.choose(pair(EXAMPLE, EXAMPLE)) == (0, EXAMPLE)


@pytest.mark.parametrize("damaged", [0, 1])
def test_an_invalid_slot_is_passed_over(damaged: int) -> None:
    newer = replace(EXAMPLE, generation=2)
    slots = bytearray(pair(EXAMPLE, newer))
    slots[damaged * SLOT_LENGTH + 0x10] ^= 1
    assert superblock.choose(bytes(slots)) == (1 - damaged, [EXAMPLE, newer][1 - damaged])


def test_two_invalid_slots_are_refused() -> None:
    with pytest.raises(FormatError) as caught:
        superblock.choose(bytes(8192))
    assert caught.value.field == "superblock.magic"


CONTRADICTIONS = {
    "another file": replace(EXAMPLE, generation=2, file_id=bytes(16)),
    "another alignment": replace(
        EXAMPLE, generation=2, alignment=16384, header_offset=0x8000, file_length=0xC000
    ),
    "another header at the same generation": replace(EXAMPLE, header_xxh3=1),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
@pytest.mark.parametrize("turned", [False, True])
def test_slots_that_contradict_each_other_are_refused(name: str, turned: bool) -> None:
    slots = [EXAMPLE, CONTRADICTIONS[name]]
    with pytest.raises(FormatError, match="contradict"):
        superblock.choose(pair(*(reversed(slots) if turned else slots)))


# Encodings

BLOCKS = {
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
LEVELS = {"q8_0": 127, "q4_0": 8}


def random(scale: float, rows: int = 4000) -> NDArray[np.float32]:
    numbers = np.random.default_rng(7).standard_normal((rows, 96)) * scale
    return numbers.astype(np.float32)


def halves(levels: int) -> NDArray[np.float32]:
    """Blocks whose numbers lie on, and exactly half-way between, the levels of their scale."""
    steps = np.random.default_rng(8).integers(-2 * levels, 2 * levels + 1, (6000, 32))
    steps[:, 5] = -2 * levels  # the largest: it sets the scale
    return (steps / 2 * 2.0 ** np.arange(-10, 10).repeat(300)[:, None]).astype(np.float32)


def signs(levels: int) -> NDArray[np.float32]:
    """Blocks whose largest magnitude stands twice, with both signs."""
    numbers = np.random.default_rng(9).uniform(-1, 1, (2000, 32))
    numbers[np.arange(2000), np.arange(2000) % 31] = 1
    numbers[:, 31] = -1
    return numbers.astype(np.float32)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(lambda levels: random(0.02, 20000), id="weights"),
        pytest.param(lambda levels: random(1), id="random"),
        pytest.param(
            lambda levels: random(0.02).astype(np.float16).astype(np.float32), id="from f16"
        ),
        pytest.param(
            lambda levels: random(0.02).astype(ml_dtypes.bfloat16).astype(np.float32),
            id="from bf16",
        ),
        pytest.param(lambda levels: np.zeros((4, 64), np.float32), id="zero"),
        pytest.param(lambda levels: -np.zeros((4, 64), np.float32), id="minus zero"),
        pytest.param(lambda levels: random(1e-7), id="scales that are f16 subnormals"),
        pytest.param(lambda levels: random(1e-12), id="scales below f16"),
        pytest.param(lambda levels: random(65504 * levels / 6), id="huge"),
        pytest.param(halves, id="half-way"),
        pytest.param(signs, id="ties of both signs"),
    ],
)
def test_block_encodings_are_those_of_ggml(name: str, numbers: object) -> None:
    assert callable(numbers)
    values = numbers(LEVELS[name])
    encoding = ENCODINGS[name]
    assert encoding.fits(values)
    stored = encoding.encode(values)
    assert stored.shape == (len(values), encoding.nbytes(values.shape[1]))
    np.testing.assert_array_equal(stored, quantize(values, BLOCKS[name]))
    decoded = encoding.decode(stored)
    np.testing.assert_array_equal(decoded, dequantize(stored, BLOCKS[name]))
    np.testing.assert_array_equal(numbers_in(stored, name), decoded)


@pytest.mark.parametrize("name", BLOCKS)
def test_any_block_decodes_as_ggml_decodes_it(name: str) -> None:
    width = ENCODINGS[name].block_bytes
    stored = np.random.default_rng(3).integers(0, 256, (4000, 2 * width), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = dequantize(stored, BLOCKS[name])
        np.testing.assert_array_equal(ENCODINGS[name].decode(stored), expected)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-44])
def test_blocks_too_small_for_a_scale_decode_to_zero_and_encode_without_a_warning(
    name: str, scale: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = ENCODINGS[name].encode(random(scale, 100))
    assert not ENCODINGS[name].decode(stored).any()


@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [("f16", np.dtype("<f2"), 16), ("bf16", np.dtype(ml_dtypes.bfloat16), 16)],
)
def test_every_16_bit_pattern_survives_decoding_and_encoding(
    name: str, kind: np.dtype[np.generic], bits: int
) -> None:
    stored = np.arange(1 << bits, dtype="<u2").view(np.uint8).reshape(256, -1)
    numbers = numbers_in(stored, name)
    assert numbers.dtype == kind
    assert np.shares_memory(numbers, stored)
    decoded = ENCODINGS[name].decode(stored)
    assert decoded.dtype == np.float32
    nan = np.isnan(decoded)
    again = ENCODINGS[name].encode(decoded).view("<u2")
    np.testing.assert_array_equal(again[~nan], stored.view("<u2")[~nan])
    assert np.isnan(ENCODINGS[name].decode(ENCODINGS[name].encode(decoded))[nan]).all()


def test_bf16_rounds_to_nearest_even() -> None:
    numbers = np.array([0x3F808000, 0x3F818000, 0x3F808001], dtype="<u4").view(np.float32)
    assert ENCODINGS["bf16"].encode(numbers).view("<u2").tolist() == [0x3F80, 0x3F82, 0x3F81]


def test_f32_keeps_every_bit() -> None:
    bits = np.random.default_rng(4).integers(0, 1 << 32, (8, 64), dtype=np.uint32)
    numbers = bits.view(np.float32)
    stored = ENCODINGS["f32"].encode(numbers)
    np.testing.assert_array_equal(stored.view("<u4"), bits)
    np.testing.assert_array_equal(ENCODINGS["f32"].decode(stored).view("<u4"), bits)


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("f32", 3.4e38, True),
        ("f32", np.inf, True),
        ("f16", 65504.0, True),
        ("f16", -65504.0, True),
        ("f16", 65536.0, False),
        ("f16", -65536.0, False),
        ("f16", np.inf, True),
        ("f16", np.nan, True),
        ("bf16", 3.38e38, True),
        ("bf16", 3.4e38, False),
        ("q8_0", 127 * 65504.0, True),
        ("q8_0", 128 * 65536.0, False),
        ("q8_0", np.inf, False),
        ("q8_0", np.nan, False),
        ("q4_0", -8 * 65504.0, True),
        ("q4_0", 8 * 65536.0, False),
        ("q4_0", -np.inf, False),
        ("q4_0", np.nan, False),
    ],
)
def test_fits_tells_whether_a_number_survives(name: str, value: float, fits: bool) -> None:
    numbers = np.zeros((2, 32), np.float32)
    numbers[1, 17] = value
    encoding = ENCODINGS[name]
    assert encoding.fits(numbers) is fits
    if fits:
        found = encoding.decode(encoding.encode(numbers))[1, 17]
        np.testing.assert_allclose(found, numbers[1, 17], rtol=2**-8)


@pytest.mark.parametrize(
    ("name", "length", "nbytes"),
    [("f32", 3, 12), ("f16", 3, 6), ("bf16", 3, 6), ("q8_0", 64, 68), ("q4_0", 64, 36)],
)
def test_a_vector_takes_as_many_bytes_as_its_blocks(name: str, length: int, nbytes: int) -> None:
    assert ENCODINGS[name].nbytes(length) == nbytes


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("length", [1, 31, 33, 72])
def test_half_a_block_is_refused(name: str, length: int) -> None:
    with pytest.raises(UsageError, match="a multiple of 32, found"):
        ENCODINGS[name].nbytes(length)


# Orders


@pytest.mark.parametrize(
    ("order", "holds"),
    [
        ([], True),
        ([0], True),
        ([2, 0, 1], True),
        ([0, 0, 1], False),
        ([1, 2, 3], False),
        ([0, 1, (1 << 32) - 1], False),
    ],
)
def test_a_permutation_holds_each_neuron_once(order: list[int], holds: bool) -> None:
    assert is_permutation(np.array(order, dtype=np.uint32)) is holds


def test_slots_are_the_inverse_of_the_order() -> None:
    order = np.random.default_rng(5).permutation(1000).astype(np.uint32)
    np.testing.assert_array_equal(order[slots_of(order)], np.arange(1000))


# The planner

STRIDES = [
    # model, d_model, parts, bundle bytes in 16 bits, (stride, alignment) by `auto`
    ("OpenELM 270M", 1280, 3, 7680, (8192, 4096)),
    ("OpenELM 450M", 1536, 3, 9216, (9216, 512)),
    ("OpenELM 1.1B", 2048, 3, 12288, (12288, 4096)),
    ("OpenELM 3B", 3072, 3, 18432, (20480, 4096)),
    ("Falcon 7B", 4544, 2, 18176, (18432, 512)),
    ("OPT 6.7B", 4096, 2, 16384, (16384, 4096)),
]


@pytest.mark.parametrize(("model", "d_model", "parts", "used", "expected"), STRIDES)
def test_auto_takes_pages_unless_they_waste_an_eighth(
    model: str, d_model: int, parts: int, used: int, expected: tuple[int, int]
) -> None:
    places, end = place_parts(["f16"] * parts, d_model)
    assert places == [(part * d_model * 2, d_model * 2) for part in range(parts)]
    assert end == used
    assert choose_stride(used) == expected


@pytest.mark.parametrize(
    ("used", "expected"),
    [
        (1, (512, 512)),
        (512, (512, 512)),
        (3640, (4096, 512)),  # 12.53 % of padding
        (3641, (4096, 4096)),  # 12.496 %
        (4096, (4096, 4096)),
        (4097, (4608, 512)),
    ],
)
def test_auto_turns_at_an_eighth(used: int, expected: tuple[int, int]) -> None:
    assert choose_stride(used) == expected


@pytest.mark.parametrize("align", [512, 4096, 16384, 65536])
@pytest.mark.parametrize("used", [1, 511, 512, 18176, 65536, 65537])
def test_a_stride_asked_for_is_the_least_that_holds_the_bundle(used: int, align: int) -> None:
    stride, declared = choose_stride(used, str(align))
    assert declared == align
    assert stride % align == 0
    assert used <= stride < used + align


@pytest.mark.parametrize("align", ["", "0", "64", "1000", "131072", "4K"])
def test_another_alignment_is_refused(align: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_stride(100, align)
    assert caught.value.field == "align"


@pytest.mark.parametrize(
    ("align", "expected"),
    [("auto", 4096), ("512", 4096), ("4096", 4096), ("16384", 16384), ("65536", 65536)],
)
def test_regions_are_aligned_to_pages_at_least(align: str, expected: int) -> None:
    assert region_alignment(align) == expected


def test_parts_of_different_encodings_are_each_aligned() -> None:
    places, used = place_parts(["q8_0", "f32", "bf16"], 32)
    assert places == [(0, 34), (36, 128), (164, 64)]
    assert used == 228


# The house: imports only go down

PACKAGE = Path(bundlefmt.__file__).parent
# What single commands do.
TOOLS = {
    "measurement",
    "diagnosis",
    "demonstration",
    "inspection",
    "ordering",
    "packing",
    "planning",
    "prediction",
}
STOREYS = (
    {"errors"},
    {"native"},
    {"layout"},
    {"kernels"},
    {"storage"},
    {"reader"},
    {"file"},
    {"checkpoints"},
    {"convert"},
    {"flash"},
    {"runtime"},
    {"integrations"},
    {
        "measurement",
        "diagnosis",
        "demonstration",
        "inspection",
        "ordering",
        "packing",
        "planning",
        "prediction",
    },
    {"cli"},
    {"__init__", "__main__"},  # the facade: names from everywhere, imported when first used
)
HEIGHT = {name: height for height, names in enumerate(STOREYS) for name in names}


def modules() -> dict[str, ast.Module]:
    """Dotted name inside the package -> syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imported_by(name: str) -> set[str]:
    """Dotted names that a module imports, wherever in it; those of the package start with
    `bundlefmt.`."""
    found: set[str] = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def storeys_below(name: str) -> set[str]:
    """The storeys that a module imports from."""
    dotted = {found for found in imported_by(name) if found.startswith("bundlefmt.")}
    return {found.split(".")[1] for found in dotted} - {"__version__"}


def in_storey(name: str, storey: str) -> bool:
    return name.split(".")[0] == storey


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_go_down(name: str) -> None:
    storey = name.split(".")[0]
    assert storey in HEIGHT, "a module outside the house"
    for below in storeys_below(name) - {storey}:
        assert HEIGHT[below] < HEIGHT[storey], f"{name} imports {below}"


def test_tools_of_one_storey_do_not_lean_on_each_other() -> None:
    for name in MODULES:
        storey = name.split(".")[0]
        assert storey not in TOOLS or not storeys_below(name) & (TOOLS - {storey}), name


ARITHMETIC = ["flash.costmodel", "flash.reuse", "planning.token", "planning.advice"]


@pytest.mark.parametrize(
    "name", [*(name for name in MODULES if in_storey(name, "layout")), *ARITHMETIC]
)
def test_layout_and_cost_model_do_no_io(name: str) -> None:
    roots = {found.split(".")[0] for found in imported_by(name)}
    assert not roots & {"os", "io", "pathlib", "mmap", "shutil", "socket", "tempfile"}
    called = {
        node.func.id
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "open" not in called


@pytest.mark.parametrize("name", [name for name in MODULES if in_storey(name, "storage")])
def test_storage_knows_nothing_of_models(name: str) -> None:
    allowed = (
        "bundlefmt.errors.",
        "bundlefmt.native",
        "bundlefmt.storage.",
        "bundlefmt.layout.arithmetic.",
    )
    for found in imported_by(name):
        assert not found.startswith("bundlefmt") or found.startswith(allowed), found


@pytest.mark.parametrize("name", [name for name in MODULES if in_storey(name, "runtime")])
def test_the_runtime_knows_nothing_of_checkpoints(name: str) -> None:
    assert not storeys_below(name) & {"checkpoints", "convert"}


def test_families_are_named_where_their_facts_stand_only() -> None:
    families = {name for family in FAMILIES for name in (family.name, *family.model_types)}
    homes = {"checkpoints.families", "runtime.config", "runtime.tokenizer_files"}
    for name, tree in MODULES.items():
        if name not in homes:
            texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            assert not texts & families, name


def test_heavy_libraries_are_imported_in_one_place_each() -> None:
    for name in MODULES:
        roots = {found.split(".")[0] for found in imported_by(name)}
        assert "transformers" not in roots or name == "runtime.tokenizer_files", name
        assert "torch" not in roots or name == "flash.training", name

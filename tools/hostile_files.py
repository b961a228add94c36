"""Broken bundle files, checkpoints and traces, made by number: case N of a seed is always the same
file and the same call on it. `tools.fuzz_files` runs them, and says what must come of each.

Strategy: small real models are packed once (`make_seeds`). A case takes one of them apart, changes
one kind of its content (the config, a predictor, an order table, ...), puts it together again with
every length and checksum right, and draws a call that reads what was changed.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zstandard

import bundlefmt
from bundlefmt.convert.reorder import rewrite
from bundlefmt.flash.predictor import as_stored
from bundlefmt.flash.traces import Trace
from bundlefmt.layout import dtypes, superblock
from bundlefmt.layout.arithmetic import round_up
from bundlefmt.layout.constants import DATA_OFFSET, SLOT_LENGTH
from bundlefmt.layout.encodings import numbers_in
from bundlefmt.layout.header import Predictor
from tools.alterations import Json, header_of, with_header, with_superblock

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
TEXT = "the cat sat on the mat, and the dog lay by the door. "

# seed's name -> fixture, what `pack` is told, rank of its predictors (0: none), shuffled
SEEDS: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "opt": ("opt", {"zstd": True}, 32, True),
    "opt-post-norm": ("opt-post-norm", {}, 8, False),
    "fatrelu": ("llama-fatrelu", {"dtype": "q8_0"}, 32, False),
    "phi": ("phi-relu", {"dtype": "f16", "resident": "up"}, 8, True),
    "llama": ("llama3-rope", {"dtype": "q4_0", "zstd": True}, 0, False),
    "mistral": ("mistral", {}, 0, False),
    "qwen3": ("qwen3", {}, 0, True),
    "falcon": ("falcon-grouped", {}, 0, False),
    "persimmon": ("persimmon", {"dtype": "bf16"}, 0, False),
    "mixtral": ("mixtral", {}, 0, False),
}
TRACED = "opt"


class Compressed(bytes):
    """Content that is stored with zstd."""


class Bomb(NamedTuple):
    """A zstd frame, and how much it decodes to."""

    frame: bytes
    length: int


class Case(NamedTuple):
    """A broken file, and what is done with it. `label` is "seed, what was changed, call"."""

    label: str
    path: Path
    call: Callable[[], object]


# Bundle files apart, and together again


def taken_apart(data: bytes) -> Json:
    """A file's header, each of its regions replaced by its content, decoded; a group's checksums by
    None, for those of its bundles. Regions of older generations are left out."""

    def content(span: Json) -> bytes:
        stored = data[span["offset"] : span["offset"] + span["length"]]
        if span.get("codec") != "zstd":
            return stored
        return Compressed(zstandard.decompress(stored, max_output_size=span["decoded_length"]))

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        if value.keys() >= {"offset", "length"} and "encoding" not in value:
            return content(value)
        return {key: filled(inner) for key, inner in value.items()}

    header: Json = filled({**header_of(data), "retired": []})
    for group in header["groups"]:
        group["checksums"] = None
    return header


def put_together(parts: Json, data: bytes) -> bytes:
    """The file of a header that holds its regions' contents; the superblock is that of `data`, but
    for what follows from the contents."""
    alignment = superblock.decode(data[:SLOT_LENGTH]).alignment
    body = bytearray(data[:DATA_OFFSET])

    def placed(stored: bytes, decoded_length: int | None) -> Json:
        body.extend(bytes(-len(body) % alignment))
        region: Json = {"offset": len(body), "length": len(stored)}
        region["xxh3"] = xxhash.xxh3_64_hexdigest(stored)
        if decoded_length is not None:
            region |= {"codec": "zstd", "decoded_length": decoded_length}
        body.extend(stored)
        return region

    def emptied(value: Any) -> Any:
        if isinstance(value, Bomb):
            return placed(*value)
        if isinstance(value, Compressed):
            return placed(zstandard.compress(value), len(value))
        if isinstance(value, bytes):
            return placed(value, None)
        if isinstance(value, list):
            return [emptied(inner) for inner in value]
        if isinstance(value, dict):
            return {key: emptied(inner) for key, inner in value.items()}
        return value

    parts = copy.deepcopy(parts)
    for group in parts["groups"]:
        if group["checksums"] is None:
            rows = np.frombuffer(group["bundles"], np.uint8).reshape(-1, group["stride"])
            digests = [xxhash.xxh3_64_intdigest(row) for row in rows]
            group["checksums"] = np.array(digests, dtype="<u8").tobytes()
    header = emptied(parts)
    for group in header["groups"]:
        del group["bundles"]["xxh3"]
    offset = round_up(len(body), alignment)
    end = offset + alignment
    padded = bytes(body).ljust(end, b"\0")
    moved = with_superblock(padded, header_offset=offset, header_length=2, file_length=end)
    return with_header(moved, dumped(header))


# JSON


DIGITS = "\x00digits"
DEEP = "\x00deep"
VALUES: list[Any] = [
    *[0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 95, 96, 97, 128, 255, 4096, 8192, 12288],
    *[-1, -2, -4096, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) - 1, 1 << 53],
    *[(1 << 63) - 1, 1 << 63, 1 << 64, 1 << 200, -(1 << 63), DIGITS, DEEP],
    *[0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-8, 1e-300, 1e30, 1e308, float("inf"), float("nan")],
    *[None, True, False, [], {}, [0], [[]], [None], {"": 0}, [1] * 100, ["a"], [-1, 1 << 40]],
    *["", "0", "-1", "a", "\0", "\n", "\x1b[31m", "\ud800", "\udcff", "é", "x" * 5000],
    *["../x", "/dev/zero", "config.json", "model.safetensors", "zstd", "f16", "q8_0", "q4_0"],
    *["F32", "F16", "BF16", "F4", "U8", "I64", "BOOL", "C64", "gate", "up", "down", "relu", "silu"],
    *["fatrelu", "gelu", "opt", "llama", "yarn", "linear", "dynamic", "NaN", "1" * 400],
]


def dumped(value: Any) -> bytes:
    """JSON, with what `json` cannot write in place of its marks."""
    text = json.dumps(value, separators=(",", ":"))
    text = text.replace(json.dumps(DIGITS), "9" * 5000)
    return text.replace(json.dumps(DEEP), "[" * 20000 + "]" * 20000).encode()


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON document."""
    if path:
        yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from paths_in(inner, (*path, key))


def mutated(dice: random.Random, document: Any, changes: int | None = None) -> Any:
    """The document with up to three of its values changed, removed, doubled, renamed or swapped."""
    document = copy.deepcopy(document)
    for _ in range(changes or dice.choice([1, 1, 1, 2, 3])):
        places = list(paths_in(document))
        if not places:
            return document
        # As likely at each depth: one long list would otherwise draw all of them.
        depth = dice.choice(sorted({len(place) for place in places}))
        chosen = [place for place in places if len(place) == depth]
        *outer, last = dice.choice(chosen)
        inside = document
        for key in outer:
            inside = inside[key]
        match dice.choice(["replace"] * 4 + ["nudge"] * 3 + ["delete", "double", "rename", "swap"]):
            case "replace":
                inside[last] = copy.deepcopy(dice.choice(VALUES))
            case "nudge":
                inside[last] = _nudged(dice, inside[last])
            case "delete":
                del inside[last]
            case "double" if isinstance(inside, list):
                inside.append(copy.deepcopy(inside[last]))
            case "rename" if isinstance(inside, dict):
                inside[_nudged(dice, last)] = inside.pop(last)
            case "swap":
                keys = list(inside) if isinstance(inside, dict) else range(len(inside))
                other = dice.choice(keys)
                inside[last], inside[other] = inside[other], inside[last]
    return document


def _nudged(dice: random.Random, value: Any) -> Any:
    """A neighbour of a value."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        factor, summand = dice.choice([(1, 1), (1, -1), (2, 0), (-1, 0), (0.5, 0), (1 << 20, 0)])
        return type(value)(value * factor + summand)
    if isinstance(value, str):
        at, character = dice.randint(0, len(value)), dice.choice("0aZ._/\\-\0\n\x1bé\ud800")
        return dice.choice([value[:at] + character + value[at + 1 :], value[at:], value * 2])
    return type(value)()


# Zero, NaN, infinity and the largest number in f16; infinity and NaN in f32.
WORDS = [b"\0\0", b"\xff\xff", b"\0\x7c", b"\xff\x7b", b"\0\0\x80\x7f", b"\0\0\xc0\x7f"]


def changed_bytes(dice: random.Random, content: bytes) -> bytes:
    """A few bytes changed, cut out or put in, or all of them drawn anew."""
    changed = bytearray(content)
    match dice.choice(["flip"] * 4 + ["cut", "cut short", "put in", "random", "special"]):
        case "flip":
            for _ in range(dice.choice([1, 4, 64]) if changed else 0):
                changed[dice.randrange(len(changed))] = dice.randrange(256)
        case "cut":
            at = dice.randint(0, len(changed))
            del changed[at : at + dice.choice([1, 2, 4, 64])]
        case "cut short":
            del changed[dice.randint(0, len(changed)) :]
        case "put in":
            at = dice.randint(0, len(changed))
            changed[at:at] = dice.randbytes(dice.choice([1, 2, 8, 100]))
        case "random":
            changed[:] = dice.randbytes(len(changed))
        case "special":
            word = dice.choice(WORDS)
            changed[:] = (word * (len(changed) // len(word) + 1))[: len(changed)]
    return bytes(changed)


def changed_json(dice: random.Random, content: bytes) -> bytes:
    """A JSON file's values changed, or now and then its text."""
    if dice.random() < 0.15:
        return changed_bytes(dice, content)
    return dumped(mutated(dice, json.loads(content)))


def same_kind(like: bytes, content: bytes) -> bytes:
    """Content, stored as `like` was."""
    return type(like)(content)


# What is changed in a bundle file


def _blob(parts: Json, name: str) -> Json | None:
    return next((blob for blob in parts["blobs"] if blob["name"] == name), None)


# Keys that models of these families are computed by.
KEYS = """activation_function alibi attention_bias bias do_layer_norm_before eos_token_id head_dim
    hidden_act hidden_size layer_norm_epsilon layer_types max_position_embeddings max_window_layers
    model_type multi_query new_decoder_architecture num_attention_heads num_hidden_layers
    num_key_value_heads num_kv_heads parallel_attn partial_rotary_factor qk_layernorm rms_norm_eps
    rope_parameters rope_scaling rope_theta sliding_window text_config tie_word_embeddings
    use_sliding_window vocab_size word_embed_proj_dim"""


def _change_config(dice: random.Random, parts: Json) -> None:
    """Values that the model is computed by, and others."""
    blob = _blob(parts, "config.json")
    if blob is None or dice.random() < 0.3:
        return _change_blob("config.json")(dice, parts)
    config = json.loads(blob["data"])
    for _ in range(dice.choice([1, 1, 2])):
        key = dice.choice([*KEYS.split(), *config, *config])
        rope = {"rope_type": dice.choice(["yarn", "linear", "llama3", "dynamic", "default"])}
        rope |= dict.fromkeys(("factor", "original_max_position_embeddings"), dice.choice(VALUES))
        config[key] = dice.choice([_nudged(dice, config.get(key)), dice.choice(VALUES), rope])
    blob["data"] = same_kind(blob["data"], dumped(config))
    return None


_PADDING: Json = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
_PADDING |= {"strategy": {"Fixed": 0}, "pad_to_multiple_of": None}
_TRUNCATION: Json = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
_REPLACE: Json = {"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""}
_SPLIT: Json = {"type": "Split", "behavior": "Isolated", "invert": False}
_ADDED: Json = {"content": "the", "single_word": False, "lstrip": False, "rstrip": False}
_ADDED |= {"normalized": False, "special": False}
_WORDS: Json = {"type": "WordPiece", "unk_token": "no", "continuing_subword_prefix": "##"}
COMPONENTS: list[Json] = [
    *[{"padding": {**_PADDING, "strategy": {"Fixed": n}}} for n in (1000, 1 << 30, 8 << 30)],
    *[{"padding": {**_PADDING, "pad_to_multiple_of": n}} for n in (0, 7, 1 << 33)],
    *[{"truncation": {**_TRUNCATION, "max_length": n}} for n in (0, 1, 6)],
    {"truncation": {**_TRUNCATION, "stride": 7}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 100000}},
    *[{"normalizer": {**_REPLACE, "content": "the" * n}} for n in (0, 1 << 20)],
    {"normalizer": {**_REPLACE, "pattern": {"Regex": ""}, "content": "x" * 1000}},
    {"normalizer": {**_REPLACE, "pattern": {"Regex": "("}}},
    {"normalizer": {**_REPLACE, "pattern": {"String": "t"}, "content": "t" * 100000}},
    {"pre_tokenizer": {**_SPLIT, "pattern": {"Regex": "(a+)+$"}}},
    {"pre_tokenizer": {**_SPLIT, "pattern": {"Regex": ".*"}, "behavior": "Removed"}},
    {"pre_tokenizer": None, "decoder": None, "post_processor": None},
    *[{"added_tokens": [{**_ADDED, "id": n}]} for n in (5, 96, 1 << 20, (1 << 32) - 1)],
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
    {"model": {"type": "WordLevel", "vocab": {"the": 1 << 31, "<s>": 5000}, "unk_token": "<s>"}},
    {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0}},
    {"model": {"type": "Unigram", "vocab": [["<s>", 0.0], ["t", 1e308]], "unk_id": None}},
    {"model": {**_WORDS, "vocab": {"<s>": 0}, "max_input_chars_per_word": 1}},
    {"decoder": {"type": "Replace", "pattern": {"String": ""}, "content": "y" * 1000}},
    {"decoder": {"type": "Strip", "content": "t", "start": 1 << 40, "stop": 1 << 40}},
]


def _change_tokenizer(dice: random.Random, parts: Json) -> None:
    """Other components, and values of those that there are."""
    blob = _blob(parts, "tokenizer.json")
    if blob is None or dice.random() < 0.6:
        return _change_blob("tokenizer.json")(dice, parts)
    document = {**json.loads(blob["data"]), **dice.choice(COMPONENTS)}
    blob["data"] = same_kind(blob["data"], dumped(document))
    return None


def _change_blob(name: str) -> Callable[[random.Random, Json], None]:
    def change(dice: random.Random, parts: Json) -> None:
        blob = _blob(parts, name)
        if blob is not None:
            blob["data"] = same_kind(blob["data"], changed_json(dice, bytes(blob["data"])))

    return change


def _change_source(dice: random.Random, parts: Json) -> None:
    source = dice.choice(parts["sources"])
    document = json.loads(source["header"])
    document.setdefault("__metadata__", {"format": "pt"})
    if dice.random() < 0.3:
        document["__metadata__"] = mutated(dice, document["__metadata__"])
    text = dumped(mutated(dice, document))
    if dice.random() < 0.15:
        text = changed_bytes(dice, text)
    source["header"] = same_kind(source["header"], text)


def _reshape(dice: random.Random, tensor: Json) -> None:
    """Other dtype and shape, of about as many bytes."""
    nbytes = len(tensor["data"])
    dtype = dice.choice([*dtypes.DTYPES, "F32", "F16", "BF16", "U8"])
    count = nbytes * 8 // dtypes.DTYPES[dtype][0]
    width = dice.choice([1, 2, 8, 32, 96])
    shapes = [[count], [count // width, width], [1, count], [count, 1], [0, 5], [], [1] * 20]
    shape = dice.choice(shapes)
    tensor["dtype"], tensor["shape"] = dtype, shape
    content = bytes(tensor["data"])
    length = dtypes.nbytes(dtype, shape)
    tensor["data"] = same_kind(tensor["data"], content[:length].ljust(length, b"\0"))


def _change_tensor(dice: random.Random, parts: Json) -> None:
    _alter(dice, dice.choice(parts["tensors"]))


def _alter(dice: random.Random, tensor: Json) -> None:
    match dice.choice(["content", "content", "shape", "transpose", "name", "dtype"]):
        case "content":
            content = changed_bytes(dice, bytes(tensor["data"]))
            length = len(tensor["data"])
            tensor["data"] = same_kind(tensor["data"], content[:length].ljust(length, b"\0"))
        case "shape":
            _reshape(dice, tensor)
        case "transpose":
            tensor["shape"] = tensor["shape"][::-1]
        case "name":
            tensor["name"] = _nudged(dice, tensor["name"])
        case "dtype":
            twin = {"F32": "I32", "F16": "BF16", "BF16": "F16", "U8": "I8"}
            tensor["dtype"] = twin.get(tensor["dtype"], "U8")


def _change_predictor(dice: random.Random, parts: Json) -> None:
    if not parts.get("predictors"):
        return _change_tensor(dice, parts)
    entry = dice.choice(parts["predictors"])
    named = [tensor for tensor in parts["tensors"] if tensor["name"] in (entry["a"], entry["b"])]
    match dice.choice(["entry", "matrix", "matrix", "matrix", "rank", "values"]):
        case "entry":
            parts["predictors"] = mutated(dice, parts["predictors"])
        case "matrix":
            _alter(dice, dice.choice(named))
        case "rank":  # both matrices consistent, at an odd rank
            rank = dice.choice([1, 2, 3, 31, 33, 64, 100])
            group = next(group for group in parts["groups"] if group["layer"] == entry["layer"])
            entry.pop("encoding", None)
            for tensor, shape in zip(named, _shapes(entry, named, rank, group), strict=True):
                tensor["dtype"], tensor["shape"] = "F16", shape
                tensor["data"] = dice.randbytes(2 * shape[0] * shape[1])
        case "values":
            for tensor in named:
                word = dice.choice(WORDS[:4])
                tensor["data"] = same_kind(tensor["data"], word * (len(tensor["data"]) // 2))
            entry["threshold"] = dice.choice([0, 1, 0.5, 1e-300])
    return None


def _shapes(entry: Json, named: list[Json], rank: int, group: Json) -> list[list[int]]:
    shapes = {entry["a"]: [rank, group["d_model"]], entry["b"]: [group["neurons"], rank]}
    return [shapes[tensor["name"]] for tensor in named]


def _change_order(dice: random.Random, parts: Json) -> None:
    group = dice.choice(parts["groups"])
    order = np.arange(group["neurons"], dtype="<u4")
    dice.shuffle(order)
    match dice.choice(["twice", "beyond", "random", "fine"]):
        case "twice":
            order[dice.randrange(order.size)] = order[dice.randrange(order.size)]
        case "beyond":
            order[dice.randrange(order.size)] = dice.choice([order.size, 1 << 31, (1 << 32) - 1])
        case "random":
            order = np.frombuffer(dice.randbytes(4 * order.size), dtype="<u4")
    group["order"] = order.tobytes()


def _change_bundles(dice: random.Random, parts: Json) -> None:
    group = dice.choice(parts["groups"])
    length = len(group["bundles"])
    resident = [part for part in group["parts"] if part.get("resident")]
    if resident and dice.random() < 0.5:
        group, key = dice.choice(resident), "resident"
        length = len(group[key])
    else:
        key = "bundles"
    group[key] = changed_bytes(dice, group[key])[:length].ljust(length, b"\0")
    if key == "bundles" and dice.random() < 0.2:
        group["checksums"] = dice.randbytes(length // group["stride"] * 8)


def _change_description(dice: random.Random, parts: Json) -> None:
    """What the header says of groups and tensors, before places and checksums are worked out."""
    for group in parts["groups"] if dice.random() < 0.3 else [dice.choice(parts["groups"])]:
        match dice.choice(["activation", "layer", "bias", "part", "delete", "source", "experts"]):
            case "activation":
                group["activation"] = dice.choice(["relu", "relu2", "fatrelu", "silu", "x", ""])
                group["activation_threshold"] = dice.choice([0.0, -1.0, 1e308, -1e308, None])
            case "layer":
                group["layer"] = dice.choice([0, 1, 2, 5, (1 << 53) - 1])
            case "bias":
                part = dice.choice(group["parts"])
                part["bias"] = dice.choice(parts["tensors"])["name"]
            case "part":
                if len(group["parts"]) > 1:
                    group["parts"].pop(dice.randrange(len(group["parts"])))
            case "delete" if len(parts["groups"]) > 1:
                parts["groups"].remove(group)
            case "source":
                part = dice.choice(group["parts"])
                part["source"] = mutated(dice, part.get("source") or {"tensor": "x"})
            case "experts":
                group["expert"] = dice.choice([0, 1, 1 << 40])
    if dice.random() < 0.3:
        parts["tensors"].pop(dice.randrange(len(parts["tensors"])))


def _bomb(dice: random.Random, parts: Json) -> None:
    """A blob, source or tensor that says much in few bytes."""
    target = dice.choice(["blobs", "blobs", "sources", "tensors"])
    entry = dice.choice(parts[target])
    if dice.random() < 0.5:  # small values of JSON, which take more once they are parsed
        opening, piece, closing = dice.choice(SWELLING)
        content = opening + piece * (dice.choice([1 << 16, 8 << 20]) // len(piece)) + closing
        bomb = Bomb(zstandard.compress(content), len(content))
    else:
        length = dice.choice([1, 16, 200, 256, 300, 1024]) << 20
        bomb = Bomb(run_of(dice.choice(RUNS), length), length)
    entry["header" if target == "sources" else "data"] = bomb
    if target == "tensors":  # a caller who asks for a tensor gets all of it
        length = dice.choice([1, 256]) << 20
        entry["dtype"], entry["shape"] = "U8", [length]
        entry["data"] = Bomb(run_of(0, length), length)


RUNS = b" \0[{9"
SWELLING = [(b"[", b"[],", b"0]"), (b"[", b"{},", b"0]"), (b'{"a":[', b'"",', b"0]}")]


def run_of(byte: int, count: int) -> bytes:
    """A zstd frame of `count` (whole blocks of 128 KiB) times `byte`: four bytes for a block."""
    blocks = count >> 17
    body = b"".join(
        ((n == blocks - 1) | 1 << 1 | 1 << 17 << 3).to_bytes(3, "little") + bytes([byte])
        for n in range(blocks)
    )
    return b"\x28\xb5\x2f\xfd\x00\x38" + body  # a window of 128 KiB, no content size


CHANGES: dict[str, Callable[[random.Random, Json], None]] = {
    "config": _change_config,
    "tokenizer": _change_tokenizer,
    "generation config": _change_blob("generation_config.json"),
    "source": _change_source,
    "tensor": _change_tensor,
    "predictor": _change_predictor,
    "order": _change_order,
    "bundles": _change_bundles,
    "description": _change_description,
    "bomb": _bomb,
}


def _in_header(dice: random.Random, data: bytes) -> bytes:
    text = dumped(mutated(dice, header_of(data)))
    return with_header(data, changed_bytes(dice, text) if dice.random() < 0.15 else text)


def _in_superblock(dice: random.Random, data: bytes) -> bytes:
    slot = bytearray(data[:SLOT_LENGTH])
    for _ in range(dice.choice([1, 1, 2])):
        _, offset, length = dice.choice(superblock.FIELDS[:-1])
        value = dice.choice([0, 1, 255, 4096, 8192, (1 << 64) - 1, dice.randrange(1 << 64)])
        slot[offset : offset + length] = value.to_bytes(16, "little")[:length]
    slot[72:80] = xxhash.xxh3_64_intdigest(bytes(slot[:72])).to_bytes(8, "little")
    halves = [bytes(slot), data[:SLOT_LENGTH]]
    dice.shuffle(halves)
    return b"".join(dice.choice([halves, [bytes(slot)] * 2])) + data[2 * SLOT_LENGTH :]


WHOLE: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "header": _in_header,
    "superblock": _in_superblock,
    "bytes": changed_bytes,
}


# What is done with them


def read_everything(path: Path) -> None:
    """Open the file and read all that it declares, in every way there is."""
    with bundlefmt.open(path) as file:
        for tensor in file.header.tensors:
            file.tensor_bytes(tensor.name)
            if dtypes.DTYPES[tensor.dtype][1] is not None:
                file.tensor(tensor.name)
        for name in file.blob_names:
            file.blob(name)
        _ = file.config
        with file.reader("buffered", threads=1) as reader:
            for found in file.groups:
                file.order(found)
                batch = reader.read(found.layer, np.arange(found.neurons), expert=found.expert)
                for part in found.parts:
                    file.bias(found, part.name)
                    if part.offset is None:
                        file.resident_part(found, part.name)
                    else:
                        batch.part(part.name)


def _logits(path: Path, mode: str, memory: int | None) -> None:
    with bundlefmt.load_model(path, mode=mode, memory=memory) as model:
        model.logits([1, 2, 3])
        model.generate([1, 2, 3], max_new_tokens=3)


def _append(path: Path) -> None:
    bundlefmt.append(path, blobs={"config.json": b"{}"}, tensors={"new": np.zeros(3, np.float32)})


def read_trace(path: Path) -> None:
    """All of a trace, in every way there is."""
    trace = Trace(path)
    for index in range(len(trace.info.layers)):
        layer = trace.layer(index)
        tokens = np.arange(min(trace.info.tokens, 100))
        layer.fired(tokens)  # not `active`, whose size is what the trace says of the model
        np.asarray(layer.inputs).sum(dtype=np.float64)


def _call(
    dice: random.Random, path: Path, seeds: Path, seed: str
) -> tuple[str, Callable[[], object]]:
    """A call that reads a bundle file."""
    mode = dice.choice(["dense", "exact", "predict", "topk"])
    memory = dice.choice([None, None, None, 300 << 20])
    out = path.parent / "out"
    text = seeds / "text.txt"
    few = {"max_tokens": dice.choice([2, 40]), "context": dice.choice([None, None, 2, 8])}
    traced = seed == TRACED and mode in ("exact", "predict")
    traces = seeds / "traces" if traced and dice.random() < 0.7 else None
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: read_everything(path),
        "verify": lambda: bundlefmt.verify(path),
        "inspect": lambda: bundlefmt.inspect(path),
        "unpack": lambda: bundlefmt.unpack(path, out),
        f"logits {mode}": lambda: _logits(path, mode, memory),
        f"run {mode}": lambda: bundlefmt.run(path, "the cat", 4, mode=mode, memory=memory),
        f"eval {mode}": lambda: bundlefmt.evaluate(path, text, mode=mode, memory=memory, **few),
        f"plan {mode}": lambda: bundlefmt.plan(path, 300 << 20, mode=mode, traces=traces),
        "trace": lambda: bundlefmt.trace(path, text, out, max_tokens=20),
        "reorder": lambda: bundlefmt.reorder(path, seeds / "traces", out),
        "append": lambda: _append(path),
    }
    runs = 0 if seed == "mixtral" else 3
    weights = [1, 1, 1, 2, runs, runs, runs, 2, runs / 3, 4 * (seed == TRACED), 0.5]
    (name,) = dice.choices(list(calls), weights)
    return name, calls[name]


def _bundle_case(dice: random.Random, seeds: Path, folder: Path) -> Case:
    seed = dice.choice([*SEEDS, TRACED, TRACED, TRACED, "opt-post-norm", "fatrelu", "phi"])
    data = (seeds / f"{seed}.bundle").read_bytes()
    kinds = [*CHANGES, *WHOLE]
    (kind,) = dice.choices(kinds, [5, 4, 1, 2, 3, 4, 1, 2, 3, 0.5, 3, 1, 1])
    if kind in CHANGES:
        parts = taken_apart(data)
        CHANGES[kind](dice, parts)
        others = [other for other in ("config", "tensor", "bundles") if other != kind]
        if kind not in ("description", "bomb") and dice.random() < 0.2:
            CHANGES[dice.choice(others)](dice, parts)
        data = put_together(parts, data)
    else:
        data = WHOLE[kind](dice, data)
    path = folder / "model.bundle"
    path.write_bytes(data)
    name, call = _call(dice, path, seeds, seed)
    return Case(f"{seed}, {kind}, {name}", path, call)


def _checkpoint_case(dice: random.Random, seeds: Path, folder: Path) -> Case:
    seed = dice.choice([*SEEDS, "sharded", "sharded", "sharded"])
    path = folder / "checkpoint"
    shutil.copytree(seeds / seed, path)
    names = sorted(file.name for file in path.iterdir())
    name = dice.choice([*names, *(name for name in names if name.startswith("model"))])
    file = path / name
    content = file.read_bytes()
    kind = dice.choice(["values", "values", "values", "values", "bytes", "special"])
    if kind == "values" and name.endswith(".safetensors"):
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        text = dumped(mutated(dice, header))
        length = dice.choice([len(text)] * 9 + [0, len(text) - 1, 1 << 40, (1 << 64) - 1])
        file.write_bytes(length.to_bytes(8, "little") + text + content[8 + len(text) :])
    elif kind == "values":
        file.write_bytes(changed_json(dice, content))
    elif kind == "bytes":
        file.write_bytes(changed_bytes(dice, content))
    else:
        kind = dice.choice(["gone", "fifo", "folder", "link", "device", "empty", "loop"])
        _replace(file, kind)
    source = dice.choice([path, path, next(iter(sorted(path.glob("model*"))), path)])
    options = {
        "dtype": dice.choice(["keep", "keep", "f16", "q8_0", "q4_0", "f32"]),
        "zstd": dice.random() < 0.2,
        "dry_run": dice.random() < 0.2,
        "resident": dice.choice([None, None, None, "gate", "up"]),
    }
    target = folder / "packed.bundle"
    label = f"{seed}, {name} {kind}, pack"
    return Case(label, path, lambda: bundlefmt.pack(source, target, **options))


def _replace(file: Path, kind: str) -> None:
    """Something else takes the file's place."""
    file.unlink()
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "link":
            file.symlink_to("/etc/passwd")
        case "device":
            file.symlink_to("/dev/zero")
        case "empty":
            file.touch()
        case "loop":
            file.symlink_to(file.name)


def _trace_case(dice: random.Random, seeds: Path, folder: Path) -> Case:
    path = folder / "traces"
    shutil.copytree(seeds / "traces", path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for _ in range(dice.choice([1, 1, 2])):
        file = dice.choice([*files, path / "trace.json", path / "trace.json"])
        if not file.is_file():
            continue
        content = file.read_bytes()
        match dice.choice(["bytes", "bytes", "word", "swap", "special"]):
            case "word" if file.name != "trace.json":
                file.write_bytes(dice.choice(_NINJA_WORDS))
            case "swap":
                file.write_bytes(dice.choice([f for f in files if f.is_file()]).read_bytes())
            case "special":
                _replace(file, dice.choice(["gone", "fifo", "folder", "device", "empty", "loop"]))
            case _ if file.name == "trace.json":
                file.write_bytes(changed_json(dice, content))
            case _:
                file.write_bytes(changed_bytes(dice, content))
    model, out = seeds / f"{TRACED}.bundle", folder / "new.bundle"
    mode = dice.choice(["exact", "predict"])
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: read_trace(path),
        "reorder": lambda: bundlefmt.reorder(model, path, out),
        "plan": lambda: bundlefmt.plan(model, 300 << 20, mode=mode, traces=path),
    }
    name = dice.choice(list(calls))
    return Case(f"traces, {file.relative_to(path)}, {name}", path, calls[name])


_NINJA_WORDS = [
    *[b"", b"int64", b"uint32", b"float16", b"object", b"O", b"U9", b"V4", b"M8[s]", b"<f4,<i4"],
    *[b"i4,i4", b"(2,)i4", b"1000000i4", b"numpy", b"ragged", b"torch", b"C", b"F", b"x", b"\xff"],
    *[n.to_bytes(8, "little", signed=True) for n in (0, 1, -1, 120, 1 << 40, (1 << 63) - 1)],
    *[n.to_bytes(8, "little") * 2 for n in (0, 1, 10, 1 << 32, 1 << 62)],
]


def case(number: int, seed: int, seeds: Path, folder: Path) -> Case:
    """Case `number` of a seed, made in an empty folder from `make_seeds`'s files."""
    dice = random.Random(f"{seed}:{number}")
    (make,) = dice.choices([_bundle_case, _checkpoint_case, _trace_case], [7, 2, 1])
    return make(dice, seeds, folder)


# The files that are broken


def tokenizer(vocabulary: int) -> Json:
    """A tokenizer.json that knows printable ASCII, one character a token, and some pairs."""
    characters = [chr(33 + n) for n in range(94)]
    vocab = {token: n for n, token in enumerate(["<s>", "Ġ", *characters][:vocabulary])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        ],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<s>", "fuse_unk": False,
                  "byte_fallback": False, "vocab": vocab, "merges": []},
    }  # fmt: skip


def make_seeds(folder: Path) -> None:
    """Write the checkpoints, bundle files, traces and text that cases are made from."""
    dice = np.random.default_rng(1)
    (folder / "text.txt").write_text(TEXT * 3)
    for name, (fixture, options, rank, shuffled) in SEEDS.items():
        checkpoint, packed = folder / name, folder / f"{name}.bundle"
        shutil.copytree(FIXTURES / fixture, checkpoint, ignore=shutil.ignore_patterns("*.npz"))
        vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer(vocabulary)))
        (checkpoint / "generation_config.json").write_text('{"bos_token_id":0,"eos_token_id":[2]}')
        bundlefmt.pack(checkpoint, packed, **options)
        if rank:
            _add_predictors(packed, rank, dice)
        if shuffled:
            _shuffle(packed, dice)
    _shard(folder / TRACED, folder / "sharded")
    long = folder / "long.txt"
    long.write_text(TEXT * 4)
    bundlefmt.trace(folder / f"{TRACED}.bundle", long, folder / "traces", max_tokens=120)


def _add_predictors(path: Path, rank: int, dice: np.random.Generator) -> None:
    tensors, entries = {}, []
    with bundlefmt.open(path) as file:
        for group in file.groups:
            a = dice.standard_normal((rank, group.d_model), dtype=np.float32)
            b = dice.standard_normal((group.neurons, rank), dtype=np.float32)
            predictor = as_stored(a, b)
            names = [f"predictor.{group.layer}.{matrix}" for matrix in "ab"]
            in_blocks = predictor.a.encoding == "q8_0"
            for name, part in zip(names, (predictor.a, predictor.b), strict=True):
                stored = part.stored
                tensors[name] = stored if in_blocks else numbers_in(stored, part.encoding)
            encoding: Any = "q8_0" if in_blocks else None
            entries.append(Predictor(group.layer, *names, 0.5, encoding=encoding))
    bundlefmt.append(path, tensors=tensors, predictors=entries)


def _shuffle(path: Path, dice: np.random.Generator) -> None:
    new = path.with_suffix(".new")
    with bundlefmt.open(path) as file:
        rewrite(file, new, lambda group: dice.permutation(group.neurons).astype(np.uint32))
    new.replace(path)


def _shard(source: Path, target: Path) -> None:
    """The checkpoint in two shards with an index."""
    shutil.copytree(source, target)
    whole = target / "model.safetensors"
    content = whole.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    weight_map = {}
    names = sorted(header)
    for number, held in enumerate((names[::2], names[1::2]), 1):
        shard, entries, data = f"model-0000{number}-of-00002.safetensors", {}, b""
        for name in held:
            begin, end = header[name]["data_offsets"]
            piece = content[start + begin : start + end]
            entries[name] = {**header[name], "data_offsets": [len(data), len(data) + len(piece)]}
            data += piece
            weight_map[name] = shard
        text = json.dumps(entries).encode()
        (target / shard).write_bytes(len(text).to_bytes(8, "little") + text + data)
    whole.unlink()
    index = {"metadata": {"total_size": len(content)}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))

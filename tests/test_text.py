"""Text in, text out: the tokenizers that bundle files carry."""

from __future__ import annotations

import base64
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

import bundlefmt
from bundlefmt.cli import main
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.runtime import text as text_module
from bundlefmt.runtime.text import Tokenizer
from tests.conftest import FIXTURES

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PADDING = {
    "strategy": {"Fixed": 8 << 30},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<unk>",
}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}


def bundle(folder: Path, files: dict[str, Any], model: str = "llama") -> Path:
    """A packed fixture model with these files beside it, objects as JSON."""
    checkpoint = folder / "checkpoint"
    shutil.copytree(FIXTURES / model, checkpoint)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (checkpoint / name).write_text(text)
    bundlefmt.pack(checkpoint, folder / "model.bundle")
    return folder / "model.bundle"


def opened(path: Path) -> Tokenizer:
    with bundlefmt.open(path) as file:
        return Tokenizer(file)


def sentencepiece() -> tokenizers.Tokenizer:
    """Like Llama's: blanks are `▁`, a text begins with one, and bytes stand for what is missing."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", "▁▁", "a", "▁a", "b", "é", "日", "!"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *BYTES, "Ġa", "ab"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    tokens = ["<unk>", "▁", "▁a", "a", "▁▁", "日"]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    tokens = ["[UNK]", "a", "##b", ".", "n", "'", "t", "do", "not", "##'t", ","]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def word_ends() -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["a</w>", "b</w>", "c", "d"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return tokenizer


KINDS = [sentencepiece, byte_level, metaspace, word_piece, word_ends]


def stored(tokenizer: tokenizers.Tokenizer, **changes: object) -> dict[str, Any]:
    """A tokenizer.json, changed."""
    return {**json.loads(tokenizer.to_str()), **changes}


# Text in.


def test_a_stored_truncation_and_padding_are_not_obeyed(tmp_path: Path) -> None:
    saved = stored(sentencepiece(), truncation=TRUNCATION, padding=PADDING)
    tokenizer = opened(bundle(tmp_path, {"tokenizer.json": saved}))
    assert tokenizer.encode("a a a!") == [1, 262, 262, 262, 266]
    assert tokenizer.encode_with_ends("a a!") == ([1, 262, 262, 266], [0, 1, 3, 4])


VOCABULARY = {token: i for i, token in enumerate(["<pad>", "</s>", *BYTES, "Ġa", "ab", "ĠĠ"])}
MERGES = "#version: 0.2\nĠ a\na b\nĠ Ġ\n"
OPT = {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("config", "text", "ids"),
    [
        ({}, "ab a", [259, 258]),
        ({"add_prefix_space": True}, "ab a", [258, VOCABULARY["b"], 258]),
        (OPT, "ab a</s>", [1, 259, 258, 1]),
        ({"tokenizer_class": "GPT2Tokenizer", **OPT}, "é", [1, *map(VOCABULARY.get, "Ã©")]),
    ],
)
def test_a_vocabulary_and_merges_are_gpt2s_tokenizer(
    tmp_path: Path, config: dict[str, Any], text: str, ids: list[int]
) -> None:
    files = {
        "vocab.json": VOCABULARY,
        "merges.txt": MERGES,
        "tokenizer_config.json": config,
    }
    tokenizer = opened(bundle(tmp_path, files, "opt"))
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids).strip() == text.removesuffix("</s>")


def transformers_ids(folder: Path, text: str) -> list[int]:
    transformers = pytest.importorskip("transformers")
    return list(transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "stored truncation": (
        "llama",
        {
            "tokenizer.json": stored(sentencepiece(), truncation=TRUNCATION),
            "tokenizer_config.json": FAST,
        },
    ),
    "a beginning only by configuration": (
        "llama",
        {
            "tokenizer.json": stored(byte_level()),
            "tokenizer_config.json": {**FAST, "add_bos_token": True, "bos_token": "<|endoftext|>"},
        },
    ),
    "GPT-2's files": ("gpt2", {"vocab.json": VOCABULARY, "merges.txt": MERGES}),
    "GPT-2's files with a blank before": (
        "gpt2",
        {
            "vocab.json": {**VOCABULARY, "<|endoftext|>": 261},
            "merges.txt": MERGES,
            "tokenizer_config.json": {"add_prefix_space": True, "unk_token": "<|endoftext|>"},
        },
    ),
    "OPT's files": (
        "opt",
        {"vocab.json": VOCABULARY, "merges.txt": MERGES, "tokenizer_config.json": OPT},
    ),
    "Qwen's files": (
        "qwen2",
        {
            "vocab.json": {**VOCABULARY, "<|endoftext|>": 261},
            "merges.txt": MERGES,
            "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"},
        },
    ),
}


@pytest.mark.parametrize("case", COMPARED)
def test_ids_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    model, files = COMPARED[case]
    path = bundle(tmp_path, files, model)
    for text in ("a a ab  a!", " ab</s> a12", "é日 a\n\nb"):
        ids = transformers_ids(tmp_path / "checkpoint", text)  # skips where there is none
        assert opened(path).encode(text) == ids


def test_what_only_transformers_converts_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bundle(tmp_path, {"vocab.json": VOCABULARY, "merges.txt": MERGES}, "qwen2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install transformers .*save_pretrained"):
        opened(path)


def test_ids_that_the_model_lacks_are_refused_with_both_sizes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = stored(byte_level())
    vocabulary = saved["model"]["vocab"]
    vocabulary["b"] = 70000
    path = bundle(tmp_path, {"tokenizer.json": saved})
    (tmp_path / "text").write_text("a b")
    for command in (["run", "--prompt", "a b"], ["eval", "--text", str(tmp_path / "text")]):
        assert main([command[0], str(path), *command[1:]]) == 1
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert "70000" in said and f"{len(vocabulary)} in the tokenizer" in said
        assert "the model's " in said


# Text out.


@pytest.mark.parametrize("make", KINDS)
def test_pieces_joined_are_the_text_that_follows(
    tmp_path: Path, make: Callable[[], tokenizers.Tokenizer]
) -> None:
    reference = make()
    tokenizer = opened(bundle(tmp_path, {"tokenizer.json": stored(reference)}))
    chance = random.Random(make.__name__)
    texts = ["日本", "é", " a", "👩\u200d👩", "a  b", "\N{REPLACEMENT CHARACTER}"]
    for _ in range(300):
        ids: list[int] = []
        while len(ids) < 2 or chance.random() < 0.9:
            ids += reference.encode(chance.choice(texts), add_special_tokens=False).ids
            ids += chance.choices(range(reference.get_vocab_size()), k=chance.choice([0, 0, 1, 5]))
        start = chance.randrange(len(ids))
        whole, before = reference.decode(ids), reference.decode(ids[:start])
        assert "".join(tokenizer.pieces(ids[start:], ids[:start])) == whole[len(before) :]


@pytest.mark.parametrize(
    ("make", "before", "text", "pieces"),
    [
        (sentencepiece, "a", " a!", [" a", "!", ""]),  # the blank is not the first one
        (sentencepiece, "", "a!", ["a", "!", ""]),
        (sentencepiece, "a", "語!", ["語!", ""]),  # three bytes, which may turn out wrong
        (byte_level, "a", "日本", ["日", "本", ""]),
        (byte_level, "a", b"\xe6\x97", ["\ufffd"]),
        (
            byte_level,
            "",
            b"\xff\xffa",
            ["\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}a", ""],
        ),
    ],
)
def test_a_piece_comes_as_soon_as_it_is_certain(
    tmp_path: Path,
    make: Callable[[], tokenizers.Tokenizer],
    before: str,
    text: str | bytes,
    pieces: list[str],
) -> None:
    reference = make()
    tokenizer = opened(bundle(tmp_path, {"tokenizer.json": stored(reference)}))
    after = tokenizer.encode(before)
    if isinstance(text, bytes):
        ids = [tokenizer.vocabulary[byte_character(byte)] for byte in text]
    else:
        ids = tokenizer.encode(before + text)[len(after) :]
    assert list(tokenizer.pieces(ids, after)) == pieces


def byte_character(byte: int) -> str:
    """How byte-level tokens write a byte: the printable ones of Latin-1 as they are, the others
    from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return chr(byte if byte in shown else 256 + hidden.index(byte))


def test_special_tokens_are_not_shown(tmp_path: Path) -> None:
    tokenizer = opened(bundle(tmp_path, {"tokenizer.json": stored(sentencepiece())}))
    assert "".join(tokenizer.pieces([1, 262, 2, 262, 1], after=[1])) == "a a"


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
def test_each_token_is_decoded_a_bounded_number_of_times(
    tmp_path: Path, make: Callable[[], tokenizers.Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = opened(bundle(tmp_path, {"tokenizer.json": stored(make())}))
    decoded = 0
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    broken = tokenizer.vocabulary.get("<0xFF>") or tokenizer.vocabulary["ÿ"]
    for ids in ([3] * 5000, [262 % len(tokenizer.vocabulary)] * 5000, [broken] * 5000):
        decoded = 0
        assert sum(map(len, tokenizer.pieces(ids))) > 0
        assert decoded < 50 * len(ids)


# Hostile tokenizers.


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps), "decoders": list(steps)}


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def template(pieces: int, ids: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special] * pieces,
        "pair": [special],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * ids, "tokens": ["<s>"] * ids}},
    }


def added(content: str, number: int = 0) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": content, **flags}


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "doubling": ({"normalizer": sequence(*[replace("a", "aa")] * 40)}, "normalizer: .*too many"),
    "a megabyte for a character": ({"normalizer": replace("a", "x" * (1 << 20))}, "normalizer"),
    "a megabyte before": ({"normalizer": {"type": "Prepend", "prepend": "x" * 9999}}, "normalizer"),
    "a long decoder": ({"decoder": sequence(*[replace("a", "aa")] * 40)}, "decoder: .*too many"),
    "a decoder that panics": (
        {"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}},
        "decoder: .*panics",
    ),
    "no character map": ({"normalizer": charsmap(b"")}, "precompiled_charsmap: damaged"),
    "a character map cut short": ({"normalizer": charsmap(b"\4\0\0\0\0")}, "damaged"),
    "a character map of long texts": (
        {"normalizer": charsmap(b"\4\0\0\0\0\0\0\0" + b"x" * 9999 + b"\0")},
        "normalizer: .*too many",
    ),
    "a template of a million": ({"post_processor": template(1000, 1000)}, "too many added"),
    "a template of many copies": (
        {
            "post_processor": {
                **template(1, 1),
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 900,
            }
        },
        "too many copies of the text",
    ),
    "a long added token": ({"added_tokens": [added("x" * 5000)]}, "too many bytes of an added"),
    "a long pattern": (
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "a" * 99999}}},
        "too many characters",
    ),
    "a pattern that gives up": (
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": r"(?:[a-e]+▁?)*[^a-e▁]"}}},
        "retry-limit",
    ),
    "a broken pattern": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "["}}}, "not understood"),
    "an unknown token that is missing": (
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}},
        "UNK",
    ),
    "nothing but steps": ({"decoder": sequence(*[{"type": "Fuse"}] * 300)}, "too many steps"),
    "a long normalizer": ({"normalizer": [""] * (2 << 20)}, "normalizer: .*too many bytes"),
    "many values": ({"junk": [0] * 4_000_001}, "too many values"),
    "a long suffix": (
        {"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "x" * 999}},
        "model: .*suffix",
    ),
    "no model": ({"model": None}, "not understood"),
    "deep nesting": ({"normalizer": None, "version": "1.0", "model": []}, "not understood"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    changes, said = HOSTILE[case]
    path = bundle(tmp_path, {"tokenizer.json": stored(sentencepiece(), **changes)})
    with pytest.raises(FormatError, match=said) as caught:
        opened(path).encode("abc de " * 300)
    line = str(caught.value)
    assert line.startswith(f"{path}: tokenizer.json") and line.isprintable() and len(line) < 1024
    assert capfd.readouterr().err == ""  # nor does the library say anything


def test_a_tokenizer_that_takes_for_ever_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = opened(bundle(tmp_path, {"tokenizer.json": stored(byte_level())}))
    monkeypatch.setattr(text_module, "_PATIENCE", 0.0)
    monkeypatch.setattr(text_module, "_BYTES_PER_SECOND", float("inf"))
    with pytest.raises(FormatError, match="takes more than 0 s for 600000 bytes"):
        tokenizer.encode("ab " * 200_000)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "vocab.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_files_that_are_no_objects_are_refused(tmp_path: Path, name: str, content: str) -> None:
    files = {"vocab.json": VOCABULARY, "merges.txt": MERGES, name: content}
    path = bundle(tmp_path, files, "opt")
    with pytest.raises(FormatError, match="not understood") as caught:
        opened(path)
    assert str(caught.value).startswith(f"{path}: {name}") and str(caught.value).isprintable()


@pytest.mark.parametrize("merges", ["a", "a b c", "a zz", "\x00"])
def test_broken_merges_are_refused(tmp_path: Path, merges: str) -> None:
    files = {"vocab.json": VOCABULARY, "merges.txt": merges}
    with pytest.raises(FormatError, match=r"merges\.txt: .*not understood"):
        opened(bundle(tmp_path, files, "opt"))

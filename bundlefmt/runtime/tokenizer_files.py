"""From the tokenizer files that a bundle file carries to a tokenizer of the `tokenizers` library.

Facts: the library trusts its input. A stored padding of 8 GiB aborts the process, a normalizer may
turn one character into a gigabyte, a character map that is cut short panics, which also writes to
standard error. Neither an abort nor an allocation can be caught, so that what could cause one is
looked for before the library sees it. Truncation and padding are for training in batches; like
transformers, this leaves both out.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from msgspec import Raw

from bundlefmt.errors import BundleError, FormatError, UsageError
from bundlefmt.file import BundleFile

TOKENIZER = "tokenizer.json"

_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_VOCABULARY, _MERGES, _ADDED = "vocab.json", "merges.txt", "added_tokens.json"
_CONVERTIBLE = ("tokenizer.model", _VOCABULARY, "vocab.txt")  # what transformers converts
_COMPANIONS = (_CONFIG, _SPECIAL, _ADDED, _MERGES, "config.json")

_MOST_BYTES = 64 << 20  # of a file; the largest tokenizer.json in use has 34 MB
_MOST_VALUES = 4_000_000  # in it; some 1.5 million are used, each may take the library 94 bytes
_MOST_STEP_BYTES = 4 << 20  # of all normalizers, say; a character map has 0.5 MB
_MOST_STEPS = 256  # normalizers, pre-tokenizers, decoders and post-processors in all
_MOST_PATTERN = 16 << 10  # characters of a regular expression
_MOST_EXPANSION = 1024  # bytes that one byte of text may become; T5's may become 99
_MOST_AFFIX = 64  # bytes; `##` and `</w>` are in use
_MOST_ADDED_TOKEN = 1024  # bytes
_MOST_ADDED = 8 << 20  # bytes of all added tokens: the library builds one automaton of them
_MOST_TEMPLATE = 1024  # special tokens that are added to a text

# Whose vocab.json and merges.txt are used as GPT-2's tokenizer uses them, where the tokenizer's
# configuration names no class.
_GPT2_MODELS = ("gpt2", "opt", "phi")
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_END = "<|endoftext|>"


_NOTHING = Raw(b"null")
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


class _File(msgspec.Struct):
    """A tokenizer.json; what is not looked at stays as it is."""

    model: Raw
    version: Raw = Raw(b'"1.0"')
    truncation: Raw = _NOTHING
    padding: Raw = _NOTHING
    added_tokens: Raw = Raw(b"[]")
    normalizer: Raw = _NOTHING
    pre_tokenizer: Raw = _NOTHING
    post_processor: Raw = _NOTHING
    decoder: Raw = _NOTHING


class _Model(msgspec.Struct):
    """What the library adds to each character or piece of a word."""

    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _AddedToken(msgspec.Struct):
    content: str


def load_tokenizer(file: BundleFile) -> tokenizers.Tokenizer:
    """The tokenizer of a bundle file, as transformers would use it: without truncation and
    padding.

    It is made from tokenizer.json; else from vocab.json and merges.txt, for models with GPT-2's
    tokenizer; else by transformers, where that is installed. Raises UsageError when there is none,
    or none that can be used without transformers, FormatError for one that is damaged or hostile.
    """
    carried = file.blob_names
    if TOKENIZER in carried:
        return _from_json(file)
    config = _json_object(file, _SPECIAL) | _json_object(file, _CONFIG)
    if _VOCABULARY in carried and _MERGES in carried and _is_gpt2(file, config):
        return _gpt2(file, config)
    if any(name in carried for name in _CONVERTIBLE):
        return _converted(file)
    raise UsageError("the file carries no tokenizer", file=file.path, field=TOKENIZER)


@contextmanager
def understood(path: str | os.PathLike[str], field: str) -> Iterator[None]:
    """What the library raises, panics included, as FormatErrors that name the file."""
    try:
        yield
    except FormatError as error:
        if error.file is None:
            error.file, error.field = path, f"{field}, {error.field}" if error.field else field
        raise
    except (BundleError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic is no Exception
        raise FormatError(f"tokenizer not understood: {error}", file=path, field=field) from None


def _from_json(file: BundleFile) -> tokenizers.Tokenizer:
    with understood(file.path, TOKENIZER):
        return tokenizers.Tokenizer.from_buffer(_checked(_blob(file, TOKENIZER)))


def _blob(file: BundleFile, name: str) -> bytes:
    data = file.blob(name)
    if len(data) > _MOST_BYTES:
        raise FormatError(
            "tokenizer refused: too many bytes",
            file=file.path,
            field=name,
            expected=f"at most {_MOST_BYTES}",
            found=len(data),
        )
    return data


def _checked(data: bytes) -> bytes:
    """The tokenizer.json without truncation and padding. Raises FormatError for what the library
    would take too much time or memory for."""
    if data.count(b",") > _MOST_VALUES:
        raise _too_much("values", _MOST_VALUES, data.count(b","))
    try:
        file = msgspec.json.decode(data, type=_File)
        parts = {name: getattr(file, name) for name in _STEPS}
        for name, part in parts.items():
            if len(part) > _MOST_STEP_BYTES:
                raise _too_much("bytes", _MOST_STEP_BYTES, len(part), field=name)
        steps = {name: list(_steps(msgspec.json.decode(part))) for name, part in parts.items()}
        added = msgspec.json.decode(file.added_tokens, type=list[_AddedToken])
        model = msgspec.json.decode(file.model, type=_Model)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"tokenizer not understood: {error}") from None
    _check_steps([step for found in steps.values() for step in found])
    for name in ("normalizer", "decoder"):
        _check_expansion(name, steps[name])
    _check_templates(steps["post_processor"])
    affix = max(_length(model.continuing_subword_prefix), _length(model.end_of_word_suffix))
    if affix > _MOST_AFFIX:
        raise _too_much("bytes of a prefix or suffix", _MOST_AFFIX, affix, field="model")
    lengths = [len(token.content.encode()) for token in added]
    if max(lengths, default=0) > _MOST_ADDED_TOKEN:
        raise _too_much("bytes of an added token", _MOST_ADDED_TOKEN, max(lengths))
    if sum(lengths) > _MOST_ADDED:
        raise _too_much("bytes of added tokens", _MOST_ADDED, sum(lengths))
    file.truncation = file.padding = _NOTHING
    return msgspec.json.encode(file)


def _steps(value: object) -> Iterator[dict[str, Any]]:
    """Every JSON object in a value: the steps of a sequence, and what they hold."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _steps(item)


def _check_steps(steps: list[dict[str, Any]]) -> None:
    typed = sum("type" in step for step in steps)
    if typed > _MOST_STEPS:
        raise _too_much("steps", _MOST_STEPS, typed)
    for step in steps:
        pattern = step.get("Regex")
        if isinstance(pattern, str) and len(pattern) > _MOST_PATTERN:
            raise _too_much("characters of a pattern", _MOST_PATTERN, len(pattern))
        if step.get("type") == "Strip" and step.get("stop"):
            raise FormatError(
                "tokenizer refused: the library panics where a decoder strips the ends of tokens",
                field="decoder",
                expected="stop 0",
                found=step["stop"],
            )


def _check_expansion(name: str, steps: list[dict[str, Any]]) -> None:
    """Refuse steps that may make more than so many bytes of one."""
    expansion = 1.0
    for step in steps:
        expansion *= _expansion(step)
    if expansion > _MOST_EXPANSION:
        raise _too_much("bytes out of one", _MOST_EXPANSION, f"{expansion:.3g}", field=name)


def _expansion(step: dict[str, Any]) -> float:
    """How many bytes one step may make of one byte, at most."""
    kind = step.get("type")
    if kind == "Replace":
        content, pattern = step.get("content"), step.get("pattern")
        replaced = pattern.get("String") if isinstance(pattern, dict) else pattern
        shortest = max(_length(replaced), 1)
        return max(_length(content) / shortest, 1.0)
    if kind == "Prepend":
        return max(_length(step.get("prepend")), 1.0)
    if kind == "Precompiled":
        return max(_longest(step.get("precompiled_charsmap")), 1.0)
    return 1.0


def _length(text: object) -> int:
    return len(text.encode()) if isinstance(text, str) else 0


def _longest(charsmap: object) -> int:
    """Bytes of the longest text in SentencePiece's character map: a trie's length, the trie, and
    what its entries become, each ended by a zero."""
    try:
        data = base64.b64decode(charsmap if isinstance(charsmap, str) else "", validate=True)
    except (binascii.Error, ValueError):
        raise FormatError("not base64", field="precompiled_charsmap") from None
    trie = int.from_bytes(data[:4], "little")
    texts = data[4 + trie :]
    try:
        if len(data) < 4 or trie % 4 or 4 + trie > len(data):
            raise ValueError
        texts.decode()
    except ValueError:
        raise FormatError("damaged", field="precompiled_charsmap") from None
    return max(map(len, texts.split(b"\0")))


def _check_templates(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        if step.get("type") != "TemplateProcessing":
            continue
        special = step.get("special_tokens")
        ids = [
            len(token["ids"])
            for token in (special.values() if isinstance(special, dict) else ())
            if isinstance(token, dict) and isinstance(token.get("ids"), list)
        ]
        pieces = step.get("single")
        pieces = pieces if isinstance(pieces, list) else []
        texts = sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces)
        if texts > 1:
            raise _too_much("copies of the text", 1, texts, field="post_processor")
        count = len(pieces) * max([1, *ids])
        if count > _MOST_TEMPLATE:
            raise _too_much("added special tokens", _MOST_TEMPLATE, count, field="post_processor")


def _too_much(what: str, most: int, found: object, *, field: str | None = None) -> FormatError:
    return FormatError(
        f"tokenizer refused: too many {what}",
        field=field,
        expected=f"at most {most}",
        found=found,
    )


def _json_object(file: BundleFile, name: str) -> dict[str, Any]:
    """A carried JSON file; {} where there is none."""
    if name not in file.blob_names:
        return {}
    try:
        found = json.loads(_blob(file, name))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not understood: {error}", file=file.path, field=name) from None
    return found


def _token(config: dict[str, Any], name: str) -> str | None:
    """A special token of a configuration, which writes it as text or as an object."""
    found = config.get(name)
    content = found.get("content") if isinstance(found, dict) else found
    return content if isinstance(content, str) else None


def _is_gpt2(file: BundleFile, config: dict[str, Any]) -> bool:
    """Whether the tokenizer is GPT-2's and its files say all of it."""
    named = config.get("tokenizer_class")
    if named is None:
        return file.config.get("model_type") in _GPT2_MODELS and _ADDED not in file.blob_names
    return named in _GPT2_CLASSES and _ADDED not in file.blob_names


def _gpt2(file: BundleFile, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE, as transformers' GPT2Tokenizer makes it of vocab.json and merges.txt."""
    vocabulary = _json_object(file, _VOCABULARY)
    with understood(file.path, f"{_VOCABULARY}, {_MERGES}"):
        lines = _blob(file, _MERGES).decode().split("\n")
        merges = []
        for line in lines:
            if line and not line.startswith("#version"):
                left, right = line.rstrip("\r").split(" ")
                merges.append((left, right))
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    prefix = bool(config.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = {_token(config, name) for name in _NAMED} | {_END}
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in sorted(filter(None, special))
            if token in vocabulary
        ]
    )
    first = _token(config, "bos_token") or _END
    if config.get("add_bos_token") and first in vocabulary:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=[first, "$A"],
            pair=[first, "$A", "$B"],
            special_tokens=[(first, vocabulary[first])],
        )
    return tokenizer


def _converted(file: BundleFile) -> tokenizers.Tokenizer:
    """Any other tokenizer, converted by transformers."""
    carried = [name for name in (*_CONVERTIBLE, *_COMPANIONS) if name in file.blob_names]
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UsageError(
            f"the tokenizer is {carried[0]}, which transformers converts: pip install "
            "transformers sentencepiece; or save the checkpoint's tokenizer with "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) and pack it again",
            file=file.path,
            field=TOKENIZER,
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        for name in carried:
            Path(folder, name).write_bytes(_blob(file, name))
        with understood(file.path, carried[0]):
            found = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            tokenizer = tokenizers.Tokenizer.from_str(found.backend_tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

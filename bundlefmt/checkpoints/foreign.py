"""What is given for a checkpoint and is none: what it is, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch

from bundlefmt.layout.superblock import MAGIC

_SAVE = "save it as safetensors with transformers: from_pretrained(FOLDER).save_pretrained(OUT)"
_TORCH = f"PyTorch weights: {_SAVE}"
_KERAS = "TensorFlow weights: take the model's safetensors from the Hub"
_FLAX = "Flax weights: take the model's safetensors from the Hub"
_ARRAYS = "NumPy arrays (mlx): take the model's safetensors from the Hub"
_GGUF = "a GGUF file: take the safetensors that it was made from"
ADAPTER = (
    "a LoRA adapter, not a model: merge it into its model with PEFT: "
    "merge_and_unload().save_pretrained(OUT)"
)
_CACHE = "a repository of the Hub's cache: name the folder of a revision in its snapshots/"
_DIFFUSERS = "a diffusion pipeline: name the folder of one of its models"

_BUNDLE = "a bundle file already: `bundlefmt unpack` writes back the checkpoint that it was made of"

_MAGIC = (  # first bytes of a file -> what it is
    (MAGIC, _BUNDLE),
    (b"GGUF", _GGUF),
    (b"\x89HDF", _KERAS),
    (b"\x93NUMPY", _ARRAYS),
    (b"\x80\x02", _TORCH),
    (b"\x80\x04", _TORCH),
    (b"\x80\x05", _TORCH),
)
_ARCHIVE = b"PK\x03\x04"  # torch.save's, and NumPy's

_NAMES = (  # a name in a folder without safetensors -> what the folder is
    ("adapter_config.json", ADAPTER),
    ("adapter_model.*", ADAPTER),
    ("model_index.json", _DIFFUSERS),
    ("pytorch_model*.bin*", _TORCH),
    ("*.pth", _TORCH),
    ("*.pt", _TORCH),
    ("*.ckpt", _TORCH),
    ("*.gguf", _GGUF),
    ("*.npz", _ARRAYS),
    ("flax_model*", _FLAX),
    ("*.msgpack", _FLAX),
    ("tf_model*", _KERAS),
    ("*.h5", _KERAS),
    ("snapshots", _CACHE),
)

_HUB = re.compile(r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/?")


def content(start: bytes, name: str) -> str | None:
    """What a file that starts so is, where that is known."""
    if start.startswith(_ARCHIVE):
        return _ARRAYS if name.endswith(".npz") else _TORCH
    return next((what for magic, what in _MAGIC if start.startswith(magic)), None)


def folder(names: Sequence[str]) -> str | None:
    """What a folder with files of these names, none of them weights, is, where that is known."""
    for pattern, what in _NAMES:
        if any(fnmatch(name, pattern) for name in names):
            return what
    return None


def hub_id(path: str) -> str | None:
    """The repository on the Hub that a path which is not there seems to mean."""
    match = _HUB.fullmatch(path)
    return match.group(1) if match else None

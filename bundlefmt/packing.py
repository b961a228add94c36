"""What `pack` does: a checkpoint into a bundle file, and a word on what `run` makes of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from bundlefmt.checkpoints.sources import SourceTensor
from bundlefmt.convert import pack as convert
from bundlefmt.convert.pack import PackReport
from bundlefmt.convert.progress import Progress, silent
from bundlefmt.errors import BundleError
from bundlefmt.runtime import roles


def pack(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    family: str | None = None,
    dtype: str = "keep",
    align: str = "auto",
    resident: str | None = None,
    zstd: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> PackReport:
    """Write the bundle file of a checkpoint: a safetensors file, a folder or a sharded index.

    `path` defaults to the source's name with `.bundle`, beside it; of a model in the Hub's cache,
    to the repository's name in the current folder. `family` says whose rules to pack by, where
    config.json's `model_type` is of no family or there is none. `dtype` is the encoding of the
    bundles, `keep` the checkpoint's own. `align` is the stride's alignment. `resident` names a
    part (`gate` or `up`) to leave out of the bundles; it keeps the checkpoint's encoding. `zstd`
    compresses resident tensors and blobs. The file appears whole or not at all.

    Raises UsageError, FormatError (the checkpoint's fault), ReadError (a file of it changed, or
    cannot be read), WriteError (disk full).
    """
    return convert.pack(
        source,
        path,
        judge=_judge,
        family=family,
        dtype=dtype,
        align=align,
        resident=resident,
        zstd=zstd,
        force=force,
        dry_run=dry_run,
        progress=progress,
    )


def _judge(
    config: Mapping[str, Any], layers: int, tensors: Mapping[str, SourceTensor]
) -> tuple[str | None, list[str]]:
    try:
        return None, roles.unused(config, layers, tensors)
    except BundleError as error:
        return str(error), []

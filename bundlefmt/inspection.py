"""What a bundle file holds, as plain data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bundlefmt.file import BundleFile
from bundlefmt.layout.header import Group, Region


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A description of the file, ready for JSON: sizes in bytes, groups by layer and expert.

    Raises UsageError when there is no such file, FormatError when it is not a valid one.
    """
    with BundleFile(path) as file:
        header, block = file.header, file.superblock
        resident = [tensor.data for tensor in header.tensors]
        resident += [part.resident for g in header.groups for part in g.parts if part.resident]
        return {
            "path": file.path,
            "file_bytes": Path(file.path).stat().st_size,
            "version": f"{block.major}.{block.minor}",
            "generation": block.generation,
            "file_id": block.file_id.hex(),
            "alignment": block.alignment,
            "writer": header.writer,
            "family": header.family,
            "required_features": header.required_features,
            "layers": len({group.layer for group in header.groups}),
            "neurons": sum(group.neurons for group in header.groups),
            "bundle_bytes": sum(group.bundles.length for group in header.groups),
            "padding_bytes": sum(_padding(group) * group.neurons for group in header.groups),
            "resident_bytes": sum(map(_decoded, resident)),
            "retired_bytes": sum(region.length for region in header.retired),
            "groups": [_group(group) for group in header.groups],
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "bytes": _decoded(tensor.data),
                    "codec": tensor.data.codec,
                }
                for tensor in header.tensors
            ],
            "blobs": [
                {"name": blob.name, "bytes": _decoded(blob.data), "codec": blob.data.codec}
                for blob in header.blobs
            ],
            "sources": [source.name for source in header.sources],
            "predictors": [
                {
                    "layer": predictor.layer,
                    "expert": predictor.expert,
                    "rank": file.tensor_entry(predictor.a).shape[0],
                    "encoding": predictor.encoding,
                    "threshold": predictor.threshold,
                }
                for predictor in header.predictors
            ],
        }


def _group(group: Group) -> dict[str, Any]:
    return {
        "layer": group.layer,
        "expert": group.expert,
        "neurons": group.neurons,
        "d_model": group.d_model,
        "activation": group.activation,
        "activation_threshold": group.activation_threshold,
        "stride": group.stride,
        "padding": _padding(group),
        "offset": group.bundles.offset,
        "bytes": group.bundles.length,
        "ordered": group.order is not None,
        "parts": [
            {
                "name": part.name,
                "encoding": part.encoding,
                "offset": part.offset,
                "bytes": part.length,
                "resident": part.resident is not None,
            }
            for part in group.parts
        ],
    }


def _padding(group: Group) -> int:
    """Bytes of a bundle that no part uses."""
    return group.stride - sum(part.length for part in group.bundled)


def _decoded(region: Region) -> int:
    return region.length if region.decoded_length is None else region.decoded_length

"""bundlefmt inspect: what a bundle file holds."""

from __future__ import annotations

import argparse
from typing import Any

from bundlefmt.cli import arguments, output

HELP = "show what a bundle file holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="a bundle file")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Inspect and print."""
    from bundlefmt.inspection import inspect

    found = inspect(args.model)
    if args.json:
        output.print_json(found)
        return 0
    features = ", ".join(found["required_features"]) or "none"
    predictors = ", ".join(f"layer {p['layer']} (rank {p['rank']})" for p in found["predictors"])
    output.print_fields(
        [
            ("file", f"{found['path']}, {output.size(found['file_bytes'])}"),
            ("format", f"version {found['version']}, generation {found['generation']}"),
            ("required features", features),
            ("family", found["family"]),
            ("layers", f"{found['layers']}, {found['neurons']:,} neurons"),
            (
                "bundles",
                f"{output.size(found['bundle_bytes'])}, padding "
                f"{output.share(found['padding_bytes'], found['bundle_bytes'])}",
            ),
            (
                "resident",
                f"{output.size(found['resident_bytes'])} in {len(found['tensors'])} tensors",
            ),
            ("files carried", ", ".join(blob["name"] for blob in found["blobs"]) or "none"),
            ("predictors", predictors or "none"),
        ]
    )
    output.print_table(
        ["layer", "expert", "neurons", "d_model", "activation", "stride", "padding", "parts"],
        [_row(group) for group in found["groups"]],
    )
    return 0


def _row(group: dict[str, Any]) -> list[object]:
    parts = " ".join(
        f"{part['name']}:{part['encoding']}" + (" (resident)" if part["resident"] else "")
        for part in group["parts"]
    )
    return [
        group["layer"],
        "-" if group["expert"] is None else group["expert"],
        f"{group['neurons']:,}",
        f"{group['d_model']:,}",
        group["activation"],
        f"{group['stride']:,}",
        output.share(group["padding"], group["stride"]),
        parts,
    ]

"""Writes what spec/ derives from the code: the JSON Schema of the header and the worked example
of the document.

    python -m tools.make_spec            # writes them
    python -m tools.make_spec --check    # exits 1 when one is stale
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bundlefmt.file import BundleFile
from bundlefmt.layout import header

SPEC = Path(__file__).resolve().parent.parent / "spec"
DOCUMENT = SPEC / "bundle-v1.md"
SCHEMA = SPEC / "header.schema.json"


def schema_text() -> str:
    """The schema file's content."""
    return json.dumps(header.schema(), indent=2) + "\n"


def document_text() -> str:
    """The document, with the indented block after each example's marker made anew."""
    text = DOCUMENT.read_text()
    for marker, make in (
        (r"<!-- example: (\S+) (\d+) (\d+) -->", _hex_dump),
        (r"<!-- example-header: (\S+) -->", _header_json),
    ):

        def filled(match: re.Match[str], make: Callable[..., list[str]] = make) -> str:
            block = "".join(f"    {line}\n" for line in make(*match.groups()))
            comment = match[0].split("\n", 1)[0]
            return f"{comment}\n\n{block}\n"

        text = re.sub(rf"{marker}\n\n(?:    .*\n)*\n?", filled, text)
    return text


def _hex_dump(name: str, start: str, length: str) -> list[str]:
    data = (SPEC / name).read_bytes()[int(start) : int(start) + int(length)]
    return [
        f"{int(start) + at:04x}  {data[at : at + 16].hex(' ')}" for at in range(0, len(data), 16)
    ]


def _header_json(name: str) -> list[str]:
    with BundleFile(SPEC / name) as file:
        value = json.loads(header.encode(file.header))
    return json.dumps(value, indent=2).splitlines()


def main() -> int:
    """Write the files, or with --check compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path, text in ((SCHEMA, schema_text()), (DOCUMENT, document_text())):
        if not check:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            stale.append(path.name)
    for name in stale:
        print(f"spec/{name} is stale: python -m tools.make_spec", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

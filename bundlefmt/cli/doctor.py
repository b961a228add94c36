"""bundlefmt doctor: what this machine offers."""

from __future__ import annotations

import argparse

from bundlefmt.cli import arguments, output

HELP = "show what this machine offers: direct I/O, CPU features, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--dir", default=".", help="a folder on the device to look at")
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Look and print."""
    from bundlefmt.diagnosis import doctor

    found = doctor(args.dir)
    if args.json:
        output.print_json(found)
        return 0
    direct, memory, auto = found["direct_io"], found["memory"], found["auto"]
    why = f" ({auto['fallback']})" if auto["fallback"] else ""
    limit = "none" if memory["limit"] is None else output.size(memory["limit"])
    output.print_fields(
        [
            ("bundlefmt", f"{found['bundlefmt']}, Python {found['python']}, {found['system']}"),
            ("core", f"{found['core']['name']} ({found['core']['reason']})"),
            ("folder", found["folder"]),
            ("direct I/O", "works" if direct["works"] else f"no: {direct['refusal']}"),
            (
                "alignment",
                f"memory {direct['memory_alignment']}, offset {direct['offset_alignment']} "
                f"(from: {direct['alignment_source']})",
            ),
            *((f"backend {name}", state) for name, state in found["backends"].items()),
            ("backend auto", f"{auto['backend']}{why}"),
            ("CPUs", f"{found['cpus']}: {' '.join(found['cpu_features']) or 'no vector features'}"),
            (
                "memory",
                f"{output.size(memory['total'])}, {output.size(memory['available'])} available, "
                f"limit {limit}",
            ),
        ]
    )
    return 0

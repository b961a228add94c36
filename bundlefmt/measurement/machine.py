"""What a figure depends on besides its settings."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from bundlefmt import __version__, native
from bundlefmt.storage.device import memory_limit, total_memory


def facts(path: str) -> dict[str, Any]:
    """The machine's and the file's; sizes in bytes. `cold` says how a read came to be cold."""
    size, memory = Path(path).stat().st_size, total_memory()
    limit = memory_limit()
    least = min(memory, limit or memory)
    cold = "cached pages are dropped before every repetition"
    if size < least:
        cold += f" (the file, {size:,} bytes, is smaller than the memory, {least:,})"
    return {
        "bundlefmt": __version__,
        "core": native.reason,
        "system": f"{platform.system()} {platform.release()}",
        "cpus": len(os.sched_getaffinity(0)),
        "memory": {"total": memory, "limit": limit},
        "file": path,
        "file_bytes": size,
        "cold": cold,
    }

"""What this machine offers to bundlefmt."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from bundlefmt import __version__, native
from bundlefmt.errors import BundleError
from bundlefmt.storage import device
from bundlefmt.storage.atomic import scratch_file
from bundlefmt.storage.backends import BACKENDS, open_backend


def doctor(folder: str | os.PathLike[str] = ".") -> dict[str, Any]:
    """Direct I/O and its alignment on `folder`'s file system (tried on a temporary file), read
    backends, CPU features, memory; sizes in bytes. Raises UsageError when the folder cannot be
    written to."""
    with scratch_file(folder) as file:
        file.write(bytes(device.SAFE_ALIGNMENT))
        direct = device.probe_direct(file.name)
        backends = {name: _try_backend(name, file.name) for name in BACKENDS}
        backend, fallback = open_backend(file.name, threads=1)
        backend.close()
    return {
        "bundlefmt": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "core": {"name": "python" if native.core is None else "native", "reason": native.reason},
        "folder": str(Path(folder).resolve()),
        "direct_io": {
            "works": direct.refusal is None,
            "refusal": direct.refusal,
            "memory_alignment": direct.memory_alignment,
            "offset_alignment": direct.offset_alignment,
            "alignment_source": direct.source,
        },
        "backends": backends,
        "auto": {"backend": backend.name, "fallback": fallback},
        "cpus": len(os.sched_getaffinity(0)),
        "cpu_features": device.cpu_features(),
        "memory": {
            "total": device.total_memory(),
            "available": device.available_memory(),
            "limit": device.memory_limit(),
        },
    }


def _try_backend(name: str, path: str) -> str:
    """`ok`, or why the backend cannot read the file."""
    try:
        open_backend(path, name, threads=1)[0].close()
    except BundleError as error:
        return error.what
    return "ok"

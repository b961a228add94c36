"""The native core: the batch reader and the arithmetic in C++, where it was built.

Everything it does has a twin in Python and NumPy, which serves in its place and is its reference
in the tests. BUNDLEFMT_CORE=python, at run time, keeps to the twins; BUNDLEFMT_NATIVE=off, at
install time, leaves the core out. BUNDLEFMT_SIMD (avx512, avx2, portable) forces the kernels'
instruction set.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from bundlefmt.errors import UsageError

CORES = ("native", "python")
CPUS = len(os.sched_getaffinity(0))  # threads to compute with, where nobody says another number


def _load() -> tuple[Any, str]:
    wanted = os.environ.get("BUNDLEFMT_CORE", "native")
    if wanted not in CORES:
        raise UsageError(
            "unknown core", field="BUNDLEFMT_CORE", expected=", ".join(CORES), found=wanted
        )
    if wanted == "python":
        return None, "BUNDLEFMT_CORE=python"
    try:
        loaded = importlib.import_module("bundlefmt.native._core")
    except ModuleNotFoundError:
        return None, "not built: BUNDLEFMT_NATIVE=off, or `pip install -v .` says what failed"
    except ImportError as error:
        return None, f"cannot be loaded: {error}"
    try:
        return loaded, f"kernels: {loaded.simd()}"
    except ValueError as error:
        raise UsageError(
            "instruction set not to be had",
            field="BUNDLEFMT_SIMD",
            expected=str(error),
            found=os.environ["BUNDLEFMT_SIMD"],
        ) from None


# The extension module or None, and what there is to say of it: its instruction set, or why not.
core, reason = _load()

"""The native core: the batch reader and the arithmetic in C++, where it was built.

Everything it does has a twin in Python and NumPy, which is its reference in the tests, and serves
in its place where it was asked for: by BUNDLEFMT_CORE=python (`--core python`) at run time, or by
BUNDLEFMT_NATIVE=off at install time. Where nobody asked, nothing runs without the core, which is
many times faster. BUNDLEFMT_SIMD (avx512, avx2, portable) forces the kernels' instruction set.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bundlefmt.errors import UsageError

CORES = ("native", "python")
CPUS = len(os.sched_getaffinity(0))  # threads to compute with, where nobody says another number


def _load() -> tuple[Any, str, bool]:
    wanted = os.environ.get("BUNDLEFMT_CORE", "native")
    if wanted not in CORES:
        raise UsageError(
            "unknown core", field="BUNDLEFMT_CORE", expected=", ".join(CORES), found=wanted
        )
    if wanted == "python":
        return None, "BUNDLEFMT_CORE=python", True
    try:
        loaded = importlib.import_module("bundlefmt.native._core")
    except ModuleNotFoundError:
        return None, *_why_there_is_none()
    except ImportError as error:
        return None, f"cannot be loaded: {error}", False
    try:
        return loaded, f"kernels: {loaded.simd()}", False
    except ValueError as error:
        raise UsageError(
            "instruction set not available",
            field="BUNDLEFMT_SIMD",
            expected=str(error),
            found=os.environ["BUNDLEFMT_SIMD"],
        ) from None


def _why_there_is_none() -> tuple[str, bool]:
    """Why no core was built, and whether that was asked for."""
    if find_spec("bundlefmt.native.left_out"):  # a module that such an install adds
        return "installed with BUNDLEFMT_NATIVE=off", "BUNDLEFMT_CORE" not in os.environ
    source = Path(__file__).parents[2]
    if (source / "pyproject.toml").is_file():
        return f"{source} is a source tree: start in another folder, or `pip install -e .`", False
    return "not built: `pip install -v .` says what failed", False


# The extension module or None; its instruction set, or why there is none; whether Python was asked
# for instead.
core, reason, python_asked_for = _load()


def require() -> None:
    """Raise UsageError where there is no core and nobody asked to do without."""
    if core is None and not python_asked_for:
        raise UsageError(
            "the native core is missing",
            expected="it, or --core python (BUNDLEFMT_CORE=python), which is much slower",
            found=reason,
        )

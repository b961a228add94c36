"""bundlefmt: run language models larger than memory, neuron by neuron from flash.

    with bundlefmt.open("model.bundle") as b, b.reader() as r:
        batch = r.read(layer=3, neurons=[17, 5, 900])
        batch.up, batch.down  # arrays [3, d_model], in that order

Every command of the command line is a function here too. Names are imported when first used.
"""

from __future__ import annotations

import importlib
import os

TYPE_CHECKING = False  # as in typing, which takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from bundlefmt.convert.unpack import unpack as unpack
    from bundlefmt.convert.update import append as append
    from bundlefmt.convert.verify import verify as verify
    from bundlefmt.demonstration import demo as demo
    from bundlefmt.diagnosis import doctor as doctor
    from bundlefmt.errors import BundleError as BundleError
    from bundlefmt.errors import FormatError as FormatError
    from bundlefmt.errors import ReadError as ReadError
    from bundlefmt.errors import UsageError as UsageError
    from bundlefmt.errors import WriteError as WriteError
    from bundlefmt.file import BundleFile as BundleFile
    from bundlefmt.inspection import inspect as inspect
    from bundlefmt.measurement import bench as bench
    from bundlefmt.measurement.calibration import calibrate as calibrate
    from bundlefmt.ordering import reorder as reorder
    from bundlefmt.packing import pack as pack
    from bundlefmt.planning import plan as plan
    from bundlefmt.prediction import trace as trace
    from bundlefmt.prediction import train_predictors as train_predictors
    from bundlefmt.runtime.evaluate import evaluate as evaluate
    from bundlefmt.runtime.generate import load_model as load_model
    from bundlefmt.runtime.run import run as run

__version__ = "0.1.0"

_HOMES = {
    "BundleError": "errors",
    "BundleFile": "file",
    "FormatError": "errors",
    "ReadError": "errors",
    "UsageError": "errors",
    "WriteError": "errors",
    "append": "convert.update",
    "bench": "measurement",
    "calibrate": "measurement.calibration",
    "demo": "demonstration",
    "doctor": "diagnosis",
    "evaluate": "runtime.evaluate",
    "inspect": "inspection",
    "load_model": "runtime.generate",
    "pack": "packing",
    "plan": "planning",
    "reorder": "ordering",
    "run": "runtime.run",
    "trace": "prediction",
    "train_predictors": "prediction",
    "unpack": "convert.unpack",
    "verify": "convert.verify",
}

__all__ = ["__version__", "open", *_HOMES]


def open(path: str | os.PathLike[str]) -> BundleFile:
    """Open a bundle file for reading. See `BundleFile`."""
    from bundlefmt.file import BundleFile

    return BundleFile(path)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bundlefmt' has no attribute {name!r}")
    module = importlib.import_module(f"bundlefmt.{_HOMES[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""The native reader on a device that stumbles: faults that pass are not seen, others are named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bundlefmt import native
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.skipif(native.core is None, reason=f"no native core: {native.reason}"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

# times, errno, most bytes -> kind, errno of the failure; None where the fault passes.
CASES: dict[str, tuple[tuple[int, int, int], list[Any] | None]] = {
    "EINTR": ((3, 4, 0), None),
    "EAGAIN": ((3, 11, 0), None),
    "short, aligned": ((1, 0, 4096), None),
    "short, odd": ((3, 0, 777), None),
    "nothing for ever": ((1000, 0, 0), ["ended", 0]),
    "EIO once": ((1, 5, 0), ["failed", 5]),
}

CASE = """
import ctypes, json, os, sys
import numpy as np
from bundlefmt import native
faults = ctypes.CDLL(sys.argv[1])
content = open(sys.argv[2], "rb").read()
fd = os.open(sys.argv[2], os.O_RDONLY)
engine = native.core.Engine("threads", fd, 1)
memory = np.zeros(65536, np.uint8)
table = lambda *numbers: np.array(numbers, np.int64)
read = lambda: engine.submit(memory, table(100), table(0, 1), table(0), table(65536)).wait()
found = {}
for name, fault in json.loads(sys.argv[3]).items():
    memory[:] = 0
    faults.stumble(*fault)
    failure = read()
    right = memory.tobytes() == content[100:65636]
    faults.stumble(0, 0, 0)
    after = read() is None and memory.tobytes() == content[100:65636]
    found[name] = [failure and [failure[0], failure[2]], right, after]
engine.close()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each case gave: the failure, whether the bytes were right, and whether the next
    read's were."""
    folder = tmp_path_factory.mktemp("faults")
    shim, data = folder / "faults.so", folder / "data"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    data.write_bytes(os.urandom(100_000))
    faults = json.dumps({name: fault for name, (fault, _) in CASES.items()})
    run = subprocess.run(
        [sys.executable, "-P", "-c", CASE, shim, data, faults],
        env=os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_fault_that_passes_is_not_seen_and_one_that_lasts_is_named(found: Any, case: str) -> None:
    failure, right, served_on = found[case]
    expected = CASES[case][1]
    assert failure == expected
    assert right == (expected is None)
    assert served_on

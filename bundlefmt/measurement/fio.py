"""The device's ceiling, as fio finds it."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass

from bundlefmt.errors import ReadError

DEPTHS = (16, 32, 64, 128)

_PROBE = "300ms"
_RUN = "1s"


@dataclass(frozen=True)
class Ceiling:
    """What fio reached with reads of one size at one queue depth."""

    chunk_bytes: int
    depth: int
    bytes_per_second: float
    reads_per_second: float
    cpu_us_per_read: float


def installed() -> bool:
    """Whether there is a fio to run."""
    return shutil.which("fio") is not None


def best_depth(path: str, chunk: int) -> int:
    """The queue depth that serves most random reads of `chunk` bytes, after a short try of each.
    Raises ReadError when fio fails."""
    tried = [run(path, chunk, depth, _PROBE) for depth in DEPTHS]
    return max(tried, key=lambda found: found.reads_per_second).depth


def run(path: str, chunk: int, depth: int, runtime: str = _RUN) -> Ceiling:
    """Random direct reads through io_uring, file and buffers registered. Raises ReadError when
    fio fails."""
    escaped = path.replace(":", r"\:")  # fio parts file names at colons
    command = [
        *("fio", "--name=ceiling", "--readonly", "--ioengine=io_uring", "--direct=1"),
        *("--registerfiles=1", "--fixedbufs=1", "--rw=randread", "--randrepeat=0"),
        *("--time_based", f"--runtime={runtime}", "--output-format=json"),
        *(f"--filename={escaped}", f"--bs={chunk}", f"--iodepth={depth}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or ["it says nothing"]
        raise ReadError(f"fio failed: {lines[0]}", file=path)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    read = job["read"]
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] * 1e3
    return Ceiling(chunk, depth, read["bw_bytes"], read["iops"], cpu / max(read["total_ios"], 1))

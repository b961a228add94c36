"""The device's ceiling, as fio finds it."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import NamedTuple

from bundlefmt.errors import ReadError

DEPTHS = (16, 32, 64)


class Ceiling(NamedTuple):
    """What fio's best queue depth reached."""

    depth: int
    bytes_per_second: float
    cpu_us_per_read: float


def ceiling(path: str, chunk: int) -> Ceiling | None:
    """Random direct reads of `chunk` bytes through io_uring; None where fio is not installed.
    Raises ReadError when fio fails."""
    if shutil.which("fio") is None:
        return None
    return max((_run(path, chunk, depth) for depth in DEPTHS), key=lambda found: found[1])


def _run(path: str, chunk: int, depth: int) -> Ceiling:
    escaped = path.replace(":", r"\:")  # fio parts file names at colons
    command = [
        *("fio", "--name=ceiling", "--readonly", "--ioengine=io_uring", "--direct=1"),
        *("--rw=randread", "--time_based", "--runtime=1", "--output-format=json"),
        *(f"--filename={escaped}", f"--bs={chunk}", f"--iodepth={depth}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or ["it says nothing"]
        raise ReadError(f"fio failed: {lines[0]}", file=path)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] * 1e3
    return Ceiling(depth, job["read"]["bw_bytes"], cpu / max(job["read"]["total_ios"], 1))

"""Feeds broken files to bundlefmt: each case ends well, or with one BundleError of one short line,
within SECONDS and MEMORY.

    python -m tools.fuzz_files 20000                    # cases 0..19999 of seed 0
    python -m tools.fuzz_files 1000 --first 500 --seed 3
    python -m tools.fuzz_files --case 1234              # one case here, with its traceback

Cases run in worker processes, one after the other in each; a worker that dies or takes too long is
replaced, and its case counted as failed. The broken file of every failed case is kept.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import queue
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bundlefmt import kernels, native
from bundlefmt.errors import BundleError
from tools import hostile_files

SECONDS = 20
MEMORY = 1 << 30  # of one process: what it writes to, and what it keeps resident
LINE = 1024  # bytes of an error
SHOWN = 5  # failures of a kind

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}


class Result(NamedTuple):
    """How a case ended: `ok`, the name of a BundleError, or, where it `failed`, how."""

    number: int
    outcome: str
    failed: bool
    label: str
    detail: str = ""


def outcome_of(case: hostile_files.Case) -> tuple[str, bool, str]:
    """Make the call; (how it ended, whether that is a failure, more of it)."""
    try:
        case.call()
    except BundleError as error:
        line = str(error)
        if not line.isprintable() or len(line.encode()) > LINE:
            return "an error of many bytes or lines", True, f"{len(line)} {line[:200]!a}"
        return type(error).__name__, False, line
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return _where(error), True, f"{error}"[:300]
    return "ok", False, ""


def _where(error: BaseException) -> str:
    """The exception's type, and the last line of bundlefmt's that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "bundlefmt/" in frame.filename] or frames
    name = ours[-1].filename.rpartition("bundlefmt/")[2]
    return f"{type(error).__name__} at {name}:{ours[-1].lineno}"


def run_case(number: int, seed: int, seeds: Path, folder: Path) -> Result:
    """Make a case in a folder of its own, which stays if it fails, and run it here."""
    place = folder / str(number)
    place.mkdir()
    made = hostile_files.case(number, seed, seeds, place)
    _forget_peak()
    start = time.monotonic()
    outcome, failed, detail = outcome_of(made)
    seconds, peak = time.monotonic() - start, _peak()
    if not failed and seconds > SECONDS:
        outcome, failed, detail = "too long", True, f"{seconds:.1f} s"
    if not failed and peak > MEMORY:
        outcome, failed, detail = "too much memory", True, f"{peak >> 20} MiB"
    if not failed:
        shutil.rmtree(place)
    return Result(number, outcome, failed, made.label, detail)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most memory that was resident since it was last forgotten, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def work(numbers: range, seed: int, seeds: Path, folder: Path) -> None:
    """A worker: one line of JSON for each case."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: none outlives its parent
    kernels.set_threads(1)
    warnings.simplefilter("ignore")
    for number in numbers:
        print(json.dumps(run_case(number, seed, seeds, folder)), flush=True)


def _results(numbers: range, seed: int, seeds: Path, folder: Path) -> Iterator[Result]:
    """The results of cases, of one worker after the other."""
    left = numbers
    while left:
        for result in _of_one_worker(left, seed, seeds, folder):
            left = left[1:]
            yield result


def _of_one_worker(numbers: range, seed: int, seeds: Path, folder: Path) -> Iterator[Result]:
    """The results of cases, up to the first that ends the worker."""
    bounds = (numbers.start, numbers.stop, numbers.step)
    command = [sys.executable, "-m", "tools.fuzz_files", "--seed", str(seed), "--work"]
    command += [*map(str, bounds), str(seeds), str(folder)]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            bufsize=0,  # nothing may wait in a buffer of ours, where `select` does not see it
            stderr=said,
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, **_ENVIRONMENT},
        ) as worker,
    ):
        assert worker.stdout is not None
        try:
            for number in numbers:
                # It says itself what only just takes too long; and the first has to start.
                ready, _, _ = select.select([worker.stdout], [], [], SECONDS + 10)
                line = worker.stdout.readline() if ready else b""
                if not line.endswith(b"\n"):
                    worker.kill()
                    outcome = f"died with status {worker.wait()}" if ready else "too long"
                    said.seek(0)
                    detail = said.read().decode(errors="replace")[-300:] if ready else ""
                    yield Result(number, outcome, True, _label(number, seed, seeds), detail)
                    return
                yield Result(*json.loads(line))
        finally:
            worker.kill()


def _label(number: int, seed: int, seeds: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return hostile_files.case(number, seed, seeds, Path(folder)).label


def fuzz(numbers: range, seed: int, folder: Path, workers: int = 2) -> Iterator[Result]:
    """The results of cases, as they come. `folder`, which must not exist, holds the files that they
    are made from, and in `cases`, in the end, those that failed."""
    seeds, cases = folder / "seeds", folder / "cases"
    seeds.mkdir(parents=True)
    cases.mkdir()
    hostile_files.make_seeds(seeds)
    found: queue.SimpleQueue[Result | Exception | None] = queue.SimpleQueue()

    def follow(share: range) -> None:
        try:
            for result in _results(share, seed, seeds, cases):
                found.put(result)
            found.put(None)
        except Exception as error:
            found.put(error)

    for index in range(workers):
        threading.Thread(target=follow, args=(numbers[index::workers],), daemon=True).start()
    while workers:
        result = found.get()
        if isinstance(result, Exception):
            raise result
        if result is None:
            workers -= 1
        else:
            yield result


def report(results: Iterable[Result]) -> int:
    """Print failures as they come, and how many cases ended how; returns how many failed."""
    counts: Counter[tuple[bool, str]] = Counter()
    for result in results:
        if result.failed and counts[True, result.outcome] < SHOWN:
            print(
                f"{result.number}: {result.outcome} [{result.label}] {result.detail!a}", flush=True
            )
        counts[result.failed, result.outcome] += 1
        if sum(counts.values()) % 1000 == 0:
            print(f"{sum(counts.values())} cases", file=sys.stderr)
    for (failed, outcome), count in sorted(counts.items()):
        print(f"{count:7} {'FAILED ' if failed else ''}{outcome}")
    return sum(count for (failed, _), count in counts.items() if failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, nargs="?", default=1000, help="how many cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=0, help="which sequence of cases")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--folder", type=Path, help="where files go (a new one in the default's)")
    parser.add_argument("--case", type=int, help="run one case here, with its traceback")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    native.require()
    if args.work:
        start, stop, step, seeds, cases = args.work
        numbers = range(int(start), int(stop), int(step))
        work(numbers, args.seed, Path(seeds), Path(cases))
        return 0
    folder = args.folder or Path(tempfile.mkdtemp(prefix="bundlefmt-fuzz-")) / "files"
    if args.case is not None:
        return one(args.case, args.seed, folder)
    failed = report(
        fuzz(range(args.first, args.first + args.count), args.seed, folder, args.workers)
    )
    if failed:
        print(f"{failed} failed; their files are in {folder / 'cases'}")
    else:
        shutil.rmtree(folder)
    return 1 if failed else 0


def one(number: int, seed: int, folder: Path) -> int:
    """Run one case here."""
    (folder / "case").mkdir(parents=True)
    (folder / "seeds").mkdir()
    hostile_files.make_seeds(folder / "seeds")
    made = hostile_files.case(number, seed, folder / "seeds", folder / "case")
    print(f"{made.label}: {made.path}", flush=True)
    made.call()
    print("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())

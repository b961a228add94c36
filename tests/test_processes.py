"""Readers in processes that fork, and in processes that end while something is being read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bundlefmt import native
from tests.conftest import REFUSED

# Native engines, and in Python the pool of threads.
SERVED = [
    *(("native", name) for name in ("uring", "direct", "buffered") if native.core is not None),
    *(("python", name) for name in ("direct", "mmap")),
]
SERVED = [(core, backend) for core, backend in SERVED if backend not in REFUSED]
served = pytest.mark.parametrize(
    ("core", "backend"), SERVED, ids=[f"{backend}, {core}" for core, backend in SERVED]
)

PRELUDE = """
import json, multiprocessing, os, signal, sys, threading
import bundlefmt
path, backend = sys.argv[1:3]
file = bundlefmt.open(path)
layers = len(file.groups)
neurons = range(file.groups[0].neurons)

def opened():
    return file.reader(backend, threads=4, queue_depth=32)

def submitted(reader, count=40):
    return [reader.submit(k % layers, neurons) for k in range(count)]
"""


def run(code: str, core: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", PRELUDE + code, *map(str, arguments)],
        env={**os.environ, "BUNDLEFMT_CORE": core},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def printed(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What a child does whose parent has a reader open -> what it says. It is given 20 s.
CHILDREN = {
    "ends": ("unused", "sys.exit(0)", "0"),
    "ends after a read": ("used", "sys.exit(0)", "0"),
    "ends during reads": ("reading", "sys.exit(0)", "0"),
    "closes": ("used", "reader.close()", "0"),
    "closes during reads": ("reading", "reader.close()", "0"),
    "drops the reader": ("used", "del reader", "0"),
    "drops the reader during reads": ("reading", "del reader", "0"),
    "drops reads": ("reading", "reads.clear()", "0"),
    "asks for a result": ("reading", "reads[-1].result()", "opened by another process"),
    "reads": ("used", "reader.read(0, [0])", "opened by another process"),
    "reads by a reader of its own": (
        "reading",
        "assert (opened().read(0, neurons).raw == expected).all()",
        "0",
    ),
}
FORKS = """
expected = opened().read(0, neurons).raw.copy()

def child(code):
    signal.alarm(20)
    try:
        exec(code, globals())
    except bundlefmt.UsageError as error:
        os.write(2, str(error).encode())
        os._exit(3)

said = {}
for name, (state, code, _) in json.loads(sys.argv[3]).items():
    reader = opened()
    if state != "unused":
        reader.read(0, neurons)
    reads = submitted(reader) if state == "reading" else []
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(into, 2)
        child(code)
        os._exit(0)
    os.close(into)
    with open(out) as errors:
        said[name] = errors.read() or str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    for read in reads:  # which the child has not disturbed
        read.result()
    assert (reader.read(0, neurons).raw == expected).all()

reader = opened()
reads = submitted(reader)
worker = multiprocessing.get_context("fork").Process(target=child, args=("reads.clear()",))
worker.start()
worker.join()
said["multiprocessing"] = str(worker.exitcode)
print(json.dumps(said))
"""


@served
def test_a_forked_child_ends_whatever_it_does_with_its_parents_reader(
    demo_bundle: Path, core: str, backend: str
) -> None:
    said = printed(run(FORKS, core, demo_bundle, backend, json.dumps(CHILDREN)))
    expected = {name: says for name, (_, _, says) in CHILDREN.items()} | {"multiprocessing": "0"}
    assert {name: says for name, says in said.items() if expected[name] not in says} == {}
    assert said.keys() == expected.keys()


TEXTS = """
from bundlefmt.runtime.text import Tokenizer

tokenizer, encoding = Tokenizer(file), threading.Event()
nowhere = os.open(os.devnull, os.O_WRONLY)

def encode():
    while True:
        encoding.set()
        tokenizer.encode("some text " * 10_000)

threading.Thread(target=encode, daemon=True).start()
encoding.wait()
said = []
for _ in range(5):
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        tokenizer.encode("more")
        os._exit(os.path.sameopenfile(2, nowhere))
    said.append(os.waitpid(pid, 0)[1])
print(json.dumps(said), flush=True)
os._exit(0)
"""


def test_a_forked_child_encodes_whatever_its_parent_encodes_meanwhile(demo_bundle: Path) -> None:
    core = "python" if native.core is None else "native"
    assert printed(run(TEXTS, core, demo_bundle, "auto")) == [0] * 5


EXITS = {
    "daemon threads read": """
reader = opened()
reading = threading.Semaphore(0)

def read():
    while True:
        reader.read(0, neurons)
        reading.release()

for _ in range(4):
    threading.Thread(target=read, daemon=True).start()
for _ in range(8):
    reading.acquire()
""",
    "nobody fetches the results": "reads = submitted(opened())",
    "the reader is in a cycle": "cycle = [opened()]; cycle += [cycle, submitted(cycle[0])]",
}


@served
@pytest.mark.parametrize("exit", EXITS)
def test_a_process_ends_while_something_is_being_read(
    demo_bundle: Path, core: str, backend: str, exit: str
) -> None:
    done = run(EXITS[exit], core, demo_bundle, backend)
    assert done.returncode == 0, done.stderr
    assert "leak" not in done.stderr

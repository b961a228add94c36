"""What the tests share: paths to fixtures, small checkpoints packed once, and their bundles."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import bundlefmt
from bundlefmt import native
from bundlefmt.errors import ReadError, UsageError
from bundlefmt.runtime import memory as memory_of
from bundlefmt.storage.backends import BACKENDS, open_backend

# Whoever starts the tests may ignore SIGINT, as a shell's background does; children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
VECTORS = ROOT / "spec" / "vectors"
SHARED = ROOT.parent / "shared"
DEMO = Path(bundlefmt.__file__).parent / "demo_model"


def pytest_sessionstart() -> None:
    """Stop where there is no core to test, and nobody asked to do without."""
    try:
        native.require()
    except UsageError as error:
        pytest.exit(str(error), returncode=2)


def without_sanitizers(why: str) -> pytest.MarkDecorator:
    """Skips a test that tools/sanitize.sh cannot run."""
    sanitized = "san.so" in os.environ.get("LD_PRELOAD", "")
    return pytest.mark.skipif(sanitized, reason=f"under sanitizers: {why}")


def _refusals() -> dict[str, str]:
    """The backends that cannot work where these tests read (the folder for temporary files, the
    vectors'), and why."""
    found = {}
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(65536))
        file.flush()
        for name, path in itertools.product(BACKENDS, (file.name, VECTORS / "plain.bundle")):
            try:
                open_backend(path, name)[0].close()
            except ReadError as error:
                found[name] = error.what
    return found


REFUSED = _refusals()
backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(name in REFUSED, reason=REFUSED.get(name, "")))
        for name in BACKENDS
    ],
)


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in a new folder; skips the test that may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small tmpfs takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session", autouse=True)
def no_profiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whether this machine's devices were calibrated changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def steady_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load finds a process of the same size, whatever the tests before it have left."""
    monkeypatch.setattr(memory_of, "resident_memory", lambda: 100 << 20)


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, packed. Read it, do not change it."""
    path = tmp_path_factory.mktemp("demo") / "demo.bundle"
    bundlefmt.pack(DEMO, path)
    return path


@pytest.fixture(scope="session")
def demo_traces(demo_bundle: Path) -> Path:
    """A trace of the demo model, beside its bundle file."""
    path = demo_bundle.with_suffix(".traces")
    bundlefmt.trace(demo_bundle, DEMO / "README.md", path, max_tokens=200)
    return path


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `llama` fixture (gated, f32, 2 layers), packed. Read it, do not change it."""
    path = tmp_path_factory.mktemp("small") / "llama.bundle"
    bundlefmt.pack(FIXTURES / "llama", path)
    return path


@pytest.fixture(scope="session")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in f32: 512 bytes of `up`, 512 of `down`. Read it, do not change it."""
    path = tmp_path_factory.mktemp("wide") / "demo-f32.bundle"
    bundlefmt.pack(DEMO, path, dtype="f32")
    return path


def slices(path: Path, layer: int, neurons: list[int]) -> list[bytes]:
    """The neurons' bundles, cut out of the file by the rule of the spec, section 7."""
    data = path.read_bytes()
    with bundlefmt.open(path) as file:
        group = file.group(layer)
        order = list(range(group.neurons))
        if group.order is not None:
            table = data[group.order.offset :][: group.order.length]
            order = np.frombuffer(table, dtype="<u4").tolist()
        at = [group.bundles.offset + order.index(n) * group.stride for n in neurons]
        return [data[offset : offset + group.stride] for offset in at]


def flipped(source: Path, copy: Path, offset: int) -> Path:
    """A copy of the file with one byte changed."""
    shutil.copy(source, copy)
    with copy.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    return copy


def prefixes(path: Path, width: int) -> NDArray[np.uint8]:
    """The first bytes of every bundle of layer 0: uint8 [neurons, width]."""
    with bundlefmt.open(path) as file, file.reader("buffered") as reader:
        return reader.read(0, range(file.groups[0].neurons)).raw[:, :width].copy()


def killed_before(calls: int, use: Callable[[], None]) -> bool:
    """Run `use` in a child that is killed before its n-th call of the system that touches files;
    whether it ended before that."""
    watched = {"mkdir", "open", "pwrite", "fsync", "link", "rename", "replace", "unlink", "rmdir"}
    left = iter(range(calls))

    def profile(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in watched and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            sys.setprofile(profile)
            use()
            os._exit(0)
        finally:
            os._exit(1)  # whatever it raised: the child must not go on with the tests
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0

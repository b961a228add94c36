"""The native kernels: each against float64, and against its twin in NumPy."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

import bundlefmt
from bundlefmt import kernels, native
from bundlefmt.layout.encodings import ENCODINGS, numbers_in

core = native.core
needs_core = pytest.mark.skipif(core is None, reason=f"no native core: {native.reason}")
RANDOM = np.random.default_rng()

ACTIVATIONS = {
    "relu": lambda v: np.maximum(v, 0),
    "relu2": lambda v: np.maximum(v, 0) ** 2,
    "fatrelu": lambda v: np.where(v > 0.3, v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: v * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(v / np.sqrt(2))),
    "gelu_new": lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
}
ACTIVATIONS["gelu_tanh"] = ACTIVATIONS["gelu_new"]


def floats(*shape: int) -> NDArray[np.float32]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def stored(encoding: str, rows: int, n: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Random rows in an encoding, apart in memory as in bundles, and their exact numbers."""
    encoded = ENCODINGS[encoding].encode(floats(rows, n) / np.float32(np.sqrt(n)))
    apart = np.full((rows, encoded.shape[1] + 24), 255, dtype=np.uint8)
    apart[:, 8 : 8 + encoded.shape[1]] = encoded
    view = apart[:, 8 : 8 + encoded.shape[1]]
    return view, ENCODINGS[encoding].decode(encoded).astype(np.float64)


def error(found: NDArray[Any], exact: NDArray[Any], magnitude: NDArray[Any]) -> float:
    """The largest difference, each relative to the sum of the magnitudes of what was added up."""
    return float((np.abs(found - exact) / (magnitude + 1e-30)).max(initial=0))


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code with the installed package, not the folder at hand."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


SHAPES = [
    # encoding, numbers: multiples of a vector, and not where the encoding takes them
    *(("f32", n) for n in (1, 31, 32, 100, 4096)),
    *((name, n) for name in ("f16", "bf16") for n in (1, 33, 71, 1280)),
    *((name, n) for name in ("q8_0", "q4_0") for n in (32, 96, 4096)),
]


@needs_core
@pytest.mark.parametrize(("encoding", "n"), SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("rows", [0, 1, 6, 50])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_and_sums_are_exact_to_float32(
    encoding: str, n: int, tokens: int, rows: int, threads: int
) -> None:
    part, numbers = stored(encoding, 40, n)
    slots = RANDOM.integers(0, 40, rows)
    x, h = floats(tokens, n), floats(tokens, rows)
    found = core.products(x, core.Part(part, encoding), slots, threads)
    a, b = x.astype(np.float64), numbers[slots].T
    assert error(found, a @ b, np.abs(a) @ np.abs(b)) <= 1e-5
    found = core.weighted_sum(h, core.Part(part, encoding), n, slots, threads)
    assert error(found, h @ b.T, np.abs(h) @ np.abs(b.T)) <= 1e-5


@needs_core
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_the_ffn_is_exact_to_float32(
    activation: str, encoding: str, gated: bool, rows: int
) -> None:
    n = 96
    (first, a), (up, b), (down, c) = (stored(encoding, 40, n) for _ in range(3))
    bias = floats(40)
    slots, x = RANDOM.integers(0, 40, rows), floats(2, n)
    found = core.ffn(
        x,
        slots,
        core.Part(first, encoding, bias),
        core.Part(up, encoding) if gated else None,
        core.Part(down, encoding),
        activation,
        0.3,
        threads=2,
    )
    wide = x.astype(np.float64)
    h = ACTIVATIONS[activation](wide @ a[slots].T + bias[slots])
    magnitude = np.abs(wide) @ np.abs(a[slots].T) + np.abs(bias[slots])
    if activation == "relu2":
        magnitude = magnitude**2
    if gated:
        h = h * (wide @ b[slots].T)
        magnitude = magnitude * (np.abs(wide) @ np.abs(b[slots].T))
    magnitude = magnitude @ np.abs(c[slots])
    assert error(found, h @ c[slots], magnitude) <= 1e-5
    again = core.ffn(
        x,
        slots,
        None,
        core.Part(up, encoding) if gated else None,
        core.Part(down, encoding),
        activation,
        0.3,
        ACTIVATIONS[activation](wide @ a[slots].T + bias[slots]).astype(np.float32),
    )
    assert error(again, h @ c[slots], magnitude) <= 1e-5


@needs_core
@pytest.mark.parametrize("encoding", ["f32", "f16", "bf16"])
def test_special_numbers_are_widened_as_they_are(encoding: str) -> None:
    patterns = np.array([np.inf, -np.inf, np.nan, 0.0, 6e-8, -6e-8, 65504.0], dtype=np.float32)
    part = ENCODINGS[encoding].encode(patterns[:, None])
    found = core.products(np.ones((1, 1), np.float32), core.Part(part, encoding))
    expected = numbers_in(part, encoding).astype(np.float32).T
    np.testing.assert_array_equal(found, expected)


@needs_core
@pytest.mark.parametrize("slots", [[-1], [40], [0, 1 << 40]])
def test_a_slot_that_is_not_there_is_refused(slots: list[int]) -> None:
    part, _ = stored("f16", 40, 32)
    with pytest.raises(IndexError):
        core.products(floats(1, 32), core.Part(part, "f16"), np.array(slots))


@needs_core
def test_arguments_that_do_not_fit_each_other_are_refused() -> None:
    part, _ = stored("q8_0", 4, 64)
    whole = core.Part(part, "q8_0")
    refused = [
        lambda: core.Part(part, "q5_0"),
        lambda: core.Part(part, "q8_0", floats(3)),
        lambda: core.Part(part[:, ::2], "f16"),
        lambda: core.products(floats(1, 32), whole),
        lambda: core.products(floats(1, 63), whole),
        lambda: core.products(floats(1, 64), whole, threads=0),
        lambda: core.weighted_sum(floats(1, 3), whole, 64),
        lambda: core.weighted_sum(floats(1, 4), whole, -64),
        lambda: core.ffn(floats(1, 64), None, None, None, whole, "relu"),
        lambda: core.ffn(floats(1, 64), None, whole, None, whole, "tanh"),
        lambda: core.ffn(floats(1, 64), None, None, None, whole, "relu", 0.0, floats(1, 3)),
        lambda: core.transpose(part, part, 2),
        lambda: core.transpose(part, part, 3),
    ]
    for call in refused:
        with pytest.raises(ValueError):
            call()


@needs_core
def test_sizes_that_wrap_around_to_what_is_there_are_refused() -> None:
    nothing = core.Part(np.zeros((4, 0), np.uint8), "f32")
    no_rows = core.Part(np.zeros((0, 128), np.uint8), "f32")
    vast = np.empty((1 << 60, 0), np.float32)
    with pytest.raises(ValueError, match="that many numbers"):
        core.weighted_sum(floats(1, 4), nothing, 1 << 57)
    with pytest.raises(ValueError, match="too much"):
        core.weighted_sum(vast, no_rows, 32)
    with pytest.raises(ValueError, match="too much"):
        core.products(vast, nothing, np.zeros(16, np.int64))


@needs_core
@pytest.mark.parametrize("item", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(0, 3), (1, 1), (70, 33), (200, 129)])
def test_a_transposition_moves_every_item(item: int, height: int, width: int) -> None:
    matrix = RANDOM.integers(0, 256, (height, width, item), dtype=np.uint8)
    out = np.full((width, height * item + 8), 9, dtype=np.uint8)
    core.transpose(matrix.reshape(height, width * item), out[:, : height * item], item, threads=2)
    expected = matrix.transpose(1, 0, 2).reshape(width, height * item)
    np.testing.assert_array_equal(out[:, : height * item], expected)
    assert (out[:, height * item :] == 9).all()


@needs_core
@pytest.mark.parametrize("length", [0, 1, 17, 240, 241, 4096])
def test_digests_are_those_of_xxhash(length: int) -> None:
    rows = RANDOM.integers(0, 256, (50, length + 5), dtype=np.uint8)[:, :length]
    expected = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows]
    assert core.digests(rows, threads=2).tolist() == expected


@needs_core
@pytest.mark.parametrize("simd", ["avx512", "avx2", "portable", "mmx"])
def test_simd_can_be_forced(simd: str) -> None:
    """Each instruction set gives what the first choice gives; one that is not there is refused."""
    code = (
        "import numpy as np; from bundlefmt.native import core\n"
        "x = np.linspace(-1, 1, 70, dtype=np.float32)[None]\n"
        "rows = np.linspace(-2, 3, 700).astype(np.float16).reshape(10, 70).view(np.uint8)\n"
        "print(core.simd(), core.products(x, core.Part(rows, 'f16')).sum())"
    )
    done = in_a_new_process(code, BUNDLEFMT_SIMD=simd)
    if done.returncode:
        assert "BUNDLEFMT_SIMD: instruction set not available" in done.stderr
        assert f"found {simd}" in done.stderr
        assert simd != "portable"
        return
    name, total = done.stdout.split()
    assert name == simd
    x = np.linspace(-1, 1, 70, dtype=np.float32)
    rows = np.linspace(-2, 3, 700).astype(np.float16).reshape(10, 70).astype(np.float64)
    assert float(total) == pytest.approx((rows @ x).sum(), rel=1e-5)


@needs_core
def test_a_forked_child_computes_too() -> None:
    code = (
        "import os, numpy as np; from bundlefmt.native import core\n"
        "x, rows = np.ones((1, 4096), np.float32), np.ones((4096, 4096), np.float32)\n"
        "part = core.Part(rows.view(np.uint8), 'f32')\n"
        "assert (core.products(x, part, threads=2) == 4096).all()\n"
        "child = os.fork()\n"
        "if not child: os._exit(int((core.products(x, part, threads=2) != 4096).any()))\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", code], check=True, timeout=60)


@needs_core
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_runtime_computes_the_same_with_and_without_the_core(
    encoding: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group: Any = SimpleNamespace(activation="silu", activation_threshold=None)
    x = floats(tokens, 64)
    parts = [kernels.Part(stored(encoding, 40, 64)[0], encoding, floats(40)) for _ in range(3)]
    parts[2] = parts[2]._replace(bias=None)
    first = kernels.ffn(x, *parts, group)
    first_product = kernels.matmul_encoded(x, parts[0].stored, encoding)
    monkeypatch.setattr(kernels, "core", None)
    np.testing.assert_allclose(kernels.ffn(x, *parts, group), first, rtol=1e-4, atol=1e-6)
    second_product = kernels.matmul_encoded(x, parts[0].stored, encoding)
    np.testing.assert_allclose(second_product, first_product, rtol=1e-4, atol=1e-6)


@pytest.fixture
def without_core(tmp_path: Path) -> Path:
    """A folder with the package as a source tree has it: not built."""
    package = Path(bundlefmt.__file__).parent
    shutil.copytree(
        package, tmp_path / "bundlefmt", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "bench --size 1M",
        "calibrate",
        "run demo.bundle --prompt x",
        "eval demo.bundle --text x",
    ],
)
def test_nothing_runs_or_is_measured_without_the_core_unless_asked(
    command: str, without_core: Path, demo_bundle: Path
) -> None:
    (without_core / "pyproject.toml").touch()
    (without_core / "demo.bundle").symlink_to(demo_bundle)
    code = [sys.executable, "-m", "bundlefmt", *command.split()]
    done = subprocess.run(code, cwd=without_core, capture_output=True, text=True, env=_no_core())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the native core is missing" in done.stderr
    assert "--core python" in done.stderr
    assert f"{without_core} is a source tree" in done.stderr


@pytest.mark.parametrize("asked", ["by option", "at install"])
def test_the_core_is_done_without_where_that_was_asked_for(asked: str, without_core: Path) -> None:
    options = ["--core", "python"] if asked == "by option" else []
    if not options:
        (without_core / "bundlefmt" / "native" / "left_out.py").touch()
    code = [sys.executable, "-m", "bundlefmt", "demo", *options]
    done = subprocess.run(code, cwd=without_core, capture_output=True, text=True, env=_no_core())
    assert done.returncode == 0, done.stderr


def test_a_core_that_is_asked_for_by_name_is_not_done_without(without_core: Path) -> None:
    (without_core / "bundlefmt" / "native" / "left_out.py").touch()
    code = [sys.executable, "-m", "bundlefmt", "demo", "--core", "native"]
    done = subprocess.run(code, cwd=without_core, capture_output=True, text=True, env=_no_core())
    assert done.returncode == 2
    assert "the native core is missing" in done.stderr
    assert "found installed with BUNDLEFMT_NATIVE=off" in done.stderr


def _no_core() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "BUNDLEFMT_CORE"}


def test_the_core_can_be_switched_off() -> None:
    code = "from bundlefmt import native; print(native.core, native.reason)"
    done = in_a_new_process(code, BUNDLEFMT_CORE="python")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None BUNDLEFMT_CORE=python"

"""What `calibrate` measures, where it keeps it, and what of that is believed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import bundlefmt
from bundlefmt.errors import BundleError, FormatError, UsageError, WriteError
from bundlefmt.flash import profiles
from bundlefmt.flash.costmodel import decode, encode
from bundlefmt.measurement.calibration import SIZES, Calibration
from bundlefmt.storage.backends import open_backend
from bundlefmt.storage.device import device_identity

SIZE = 64 << 20


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the profiles of these tests are kept."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, cache_folder: Path) -> Calibration:
    """As quickly as it goes, on the disk that the tests write to."""
    folder = tmp_path_factory.mktemp("device")
    seen: list[tuple[int, int]] = []
    found = bundlefmt.calibrate(
        folder, size=SIZE, seconds=0, progress=lambda done, total: seen.append((done, total))
    )
    assert list(folder.iterdir()) == []
    assert len(seen) == found.rounds + 1
    return found


def test_a_device_is_measured_by_the_readers_own_backend(
    measured: Calibration, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    backend, fallback = open_backend(tmp_path / "file")
    backend.close()
    profile = measured.profile
    assert (profile.backend, profile.in_flight) == (backend.name, backend.in_flight)
    assert (measured.fallback is None) == (fallback is None)
    assert [cost.bytes for cost in profile.sizes] == list(SIZES)
    assert [gap.bundle_bytes for gap in measured.gaps] == list(SIZES)
    assert [cost.counts[0] for cost in profile.sizes] == [1] * len(SIZES)
    assert all(cost.cpu_seconds > 0 for cost in profile.sizes)


def test_every_file_on_the_device_finds_the_profile(
    measured: Calibration, cache_folder: Path, demo_bundle: Path
) -> None:
    assert Path(measured.path).is_relative_to(cache_folder / "bundlefmt" / "devices")
    assert profiles.load(demo_bundle) == measured.profile
    assert profiles.load(demo_bundle.parent) == measured.profile
    assert decode(Path(measured.path).read_bytes()) == measured.profile


def test_a_bundle_file_is_measured_on_and_stays_as_it_is(
    measured: Calibration, tmp_path: Path
) -> None:
    up = np.zeros((16384, 1024), dtype=np.float16)
    tensors = {"model.decoder.layers.0.fc1.weight": up}
    tensors["model.decoder.layers.0.fc2.weight"] = np.ascontiguousarray(up.T)
    save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "model.bundle"
    bundlefmt.pack(tmp_path / "model.safetensors", path)
    before, names = path.stat(), sorted(tmp_path.iterdir())
    found = bundlefmt.calibrate(path, seconds=0)
    assert found.machine["file"] == str(path)
    after = path.stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
    assert sorted(tmp_path.iterdir()) == names
    assert profiles.load(path) == found.profile


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"size": SIZE - 1}, UsageError),
        ({"size": 0}, UsageError),
        ({"size": 1 << 60}, WriteError),
        ({"seconds": -1.0}, UsageError),
        ({"seconds": float("nan")}, UsageError),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_and_leave_nothing(
    tmp_path: Path, settings: dict[str, Any], error: type[BundleError]
) -> None:
    with pytest.raises(error):
        bundlefmt.calibrate(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_file_too_small_to_tell_of_its_device_is_refused(demo_bundle: Path) -> None:
    with pytest.raises(UsageError, match="too small"):
        bundlefmt.calibrate(demo_bundle)


# Where profiles are kept.


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff", b"{" * 100_000])
def test_a_damaged_profile_is_one_clear_line(
    measured: Calibration, empty_cache: Path, tmp_path: Path, damage: bytes
) -> None:
    path = profiles.save(measured.profile)
    path.write_bytes(damage)
    with pytest.raises(FormatError) as refused:
        profiles.load(tmp_path)
    said = str(refused.value)
    assert said.startswith(str(path)) and said.isprintable()
    assert "bundlefmt calibrate" in said
    profiles.save(measured.profile)  # takes its place
    assert profiles.load(tmp_path) == measured.profile


def test_there_is_no_profile_before_one_was_made(empty_cache: Path, tmp_path: Path) -> None:
    assert profiles.load(tmp_path) is None
    with pytest.raises(UsageError, match="no such file"):
        profiles.load(tmp_path / "missing")


def test_a_cache_folder_that_cannot_be_made_is_said(
    measured: Calibration, empty_cache: Path
) -> None:
    empty_cache.write_text("a file in its place")
    with pytest.raises(WriteError, match=str(empty_cache)):
        profiles.save(measured.profile)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("serial 1/2-500", "serial_1_2-500.json"),
        ("../../etc/passwd", "_.._etc_passwd.json"),
        ("", "unnamed.json"),
        ("é" * 500, "_.json"),
        ("x" * 500, "x" * 100 + ".json"),
    ],
)
def test_a_device_of_any_name_has_one_file_in_the_folder(
    empty_cache: Path, device: str, name: str
) -> None:
    assert profiles.profile_path(device) == empty_cache / "bundlefmt" / "devices" / name


def test_a_relative_cache_folder_is_no_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profiles.profile_path("x").is_relative_to(tmp_path / ".cache")


def test_the_identity_of_a_device_is_that_of_all_its_files(demo_bundle: Path) -> None:
    assert device_identity(demo_bundle) == device_identity(demo_bundle.parent)
    assert device_identity("/proc") != device_identity(demo_bundle)


def test_a_profile_is_text_that_people_can_read(measured: Calibration) -> None:
    assert len(encode(measured.profile).splitlines()) > len(SIZES)

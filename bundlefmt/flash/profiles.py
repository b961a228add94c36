"""Device profiles in the user's cache folder: one file for each device, which every file on that
device finds."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bundlefmt.errors import ReadError, UsageError, WriteError, naming
from bundlefmt.flash.costmodel import DeviceProfile, decode, encode
from bundlefmt.storage.atomic import replacing, write_all
from bundlefmt.storage.device import device_identity

_MOST_NAME = 100  # characters of a device's identity in a file's name


def profile_path(device: str) -> Path:
    """Where the profile of the device with that identity lies, or would. Raises UsageError for a
    user without a home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # as the XDG base directory specification has it
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            raise UsageError("no home folder", expected="XDG_CACHE_HOME set") from None
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", device)[-_MOST_NAME:].lstrip(".")
    return cache / "bundlefmt" / "devices" / f"{name or 'unnamed'}.json"


def load(path: str | os.PathLike[str]) -> DeviceProfile | None:
    """The profile of the device that a file or folder lies on; None where none was made.

    Raises UsageError when there is no such file and no home, FormatError for a profile that is
    damaged or of another version, ReadError for one that cannot be read.
    """
    found = profile_path(device_identity(path))
    try:
        data = found.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ReadError(f"cannot read: {error.strerror}", file=found) from error
    with naming(found):
        return decode(data)


def save(profile: DeviceProfile) -> Path:
    """Keep a profile, in place of the one that its device had; returns where. Raises WriteError
    when it cannot be written."""
    target = profile_path(profile.device)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make: {error.strerror}", file=target.parent) from error
    with replacing(target, force=True) as file:
        write_all(file.fileno(), encode(profile), 0)
    return target

"""The files of a checkpoint on disk: each opened once, and the same until the end.

Facts: a folder from the Hub's cache (`models--ORG--NAME/snapshots/REVISION`) holds symbolic links
to files in `models--ORG--NAME/blobs`. File times move in ticks of some milliseconds: of two writes
within one tick the second leaves no trace in them.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from io import FileIO
from pathlib import Path

from bundlefmt.errors import BundleError, FormatError, ReadError, UsageError

_STILL = 0.01  # seconds: the longest tick of file times, at 100 Hz
_LOOKS = 3  # a file that is written to all the time is found changed at the end
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class File:
    """A regular file, open for reading until `close`. `real` is where its links lead, where that
    was looked at: it is opened there or not at all.

    Raises UsageError when it cannot be opened, or is a folder, a device or a pipe.
    """

    def __init__(self, path: Path, real: Path | None = None) -> None:
        self.path = path
        follow = 0 if real is None else os.O_NOFOLLOW
        try:
            _require_regular(path, os.stat(path))  # noqa: PTH116 - opening a device may do something
            self._file = FileIO(os.open(real or path, _FLAGS | follow), "rb")
            self._stat = _settled(self._file.fileno())
        except (OSError, ValueError) as error:
            raise _cannot_open(path, error) from error
        _require_regular(path, self._stat)
        self.size = self._stat.st_size

    def read_into(self, view: memoryview, offset: int, field: str | None = None) -> None:
        """Fill `view` with the bytes from `offset` on. Raises ReadError when the device refuses,
        or the file ends before."""
        wanted = len(view)
        try:
            while view:
                count = os.preadv(self._file.fileno(), [view], offset)
                if not count:
                    raise ReadError(
                        "file ends early",
                        file=self.path,
                        field=field,
                        expected=f"{wanted} bytes",
                        found=wanted - len(view),
                    )
                view, offset = view[count:], offset + count
        except OSError as error:
            raise ReadError(
                f"read failed: {error.strerror}", file=self.path, field=field
            ) from error

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; fewer where the file is shorter."""
        data = bytearray(max(min(length, self.size - offset), 0))
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def content(self, most: int) -> bytes:
        """The whole file. Raises FormatError when that is more than `most` bytes."""
        if self.size > most:
            raise FormatError(
                "file too large", file=self.path, expected=f"at most {most} bytes", found=self.size
            )
        return self.read(0, self.size)

    def require_unchanged(self) -> None:
        """Raise ReadError unless the file, and what its name leads to, are as they were."""
        try:
            same = _identity(os.fstat(self._file.fileno())) == _identity(self._stat)
            same = same and _identity(os.stat(self.path)) == _identity(self._stat)  # noqa: PTH116
        except OSError:
            same = False
        if not same:
            raise ReadError("changed while it was packed: pack it again", file=self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Folder:
    """The folder of a checkpoint. What is opened in it must lie in it, links followed, or in the
    Hub cache's `blobs` that it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[File] = []
        real = resolved(path)
        repository = hub_repository(real)
        self._roots = [real] + ([repository / "blobs"] if repository else [])

    def has(self, name: str) -> bool:
        """Whether there is anything of that name. Raises UsageError when that cannot be told."""
        return exists(self.path / name)

    def names(self) -> list[str]:
        """The names of what lies in the folder, sorted."""
        try:
            return sorted(entry.name for entry in self.path.iterdir())
        except OSError as error:
            raise _cannot_open(self.path, error) from error

    def open(self, name: str) -> File:
        """A file of the folder, kept open until `close`. Raises UsageError as File does, and for a
        link that leads out of the folder."""
        path = self.path / name
        real = resolved(path)
        if not any(real.is_relative_to(root) for root in self._roots):
            raise UsageError(
                "leads out of the checkpoint's folder: copy the file there",
                file=path,
                found=real,
            )
        return self.adopt(File(path, real))

    def adopt(self, file: File) -> File:
        """Keep a file open until `close`."""
        self.files.append(file)
        return file

    def require_unchanged(self) -> None:
        """Raise ReadError unless all files are as they were when they were opened."""
        for file in self.files:
            file.require_unchanged()

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()


def exists(path: Path) -> bool:
    """Whether there is anything at `path`, a link to nothing included. Raises UsageError for a
    path that the system does not take, or may not look at."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from error
    return True


def resolved(path: Path) -> Path:
    """Where `path` leads, links followed. Raises UsageError where that cannot be told."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from error


def hub_repository(path: Path) -> Path | None:
    """The repository's folder in the Hub's cache (`models--ORG--NAME`) that `path` lies in."""
    for place in (path, *path.parents):
        if place.name.startswith("models--") and (place / "snapshots").is_dir():
            return place
    return None


def _cannot_open(path: Path, error: OSError | ValueError) -> BundleError:
    why = str(error)
    if isinstance(error, OSError):
        loop = error.errno == errno.ELOOP
        why = "a loop of symbolic links" if loop else error.strerror or why
    return UsageError(f"cannot open: {why}", file=path)


def _require_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        raise UsageError("not a regular file", file=path, found=kind)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return (found.st_dev, found.st_ino, found.st_size, *times)


def _settled(fd: int) -> os.stat_result:
    """What fstat says, once the file has been still for so long that a further write would show in
    its times."""
    for _ in range(_LOOKS):
        found = os.fstat(fd)
        still = (time.time_ns() - found.st_ctime_ns) / 1e9
        if still >= _STILL:
            break
        time.sleep(_STILL - max(still, 0))
    return found

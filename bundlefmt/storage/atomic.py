"""Files and folders that appear whole or not at all.

Strategy: write under a temporary name in the same folder, fsync, rename, fsync the folder. The
temporary one stays locked while its writer lives, so that whoever comes next can tell a dead
writer's leavings from a living writer's work, and removes only the former.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from bundlefmt.errors import UsageError, WriteError

_SUFFIX = ".partial"
_MOST_NAME = 200  # bytes of the target's name in a temporary one: file systems take 255 in all


@contextmanager
def replacing(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[BinaryIO]:
    """A writable, seekable, unbuffered file that takes the name `path` when the block ends well.

    When the block raises, nothing is left. Raises UsageError when `path` exists and `force` is
    false or its folder does not exist, WriteError when the device refuses (a full disk).
    """
    target = Path(path)
    refuse_existing(target, force=force)
    _remove_leavings(target)
    temporary = _temporary(target)
    try:
        with temporary.open("xb", buffering=0) as file:
            # Until it is locked, another writer may take it for a dead one's and remove it: then
            # the rename fails, and nothing is lost.
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            os.fsync(file.fileno())
            refuse_existing(target, force=force)
            temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise WriteError(f"cannot write: {error.strerror}", file=target) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends well.

    When the block raises, nothing is left. Raises UsageError when `path` exists or the folder that
    it is to lie in does not, WriteError when the device refuses.
    """
    target = Path(path)
    _refuse_taken(target)
    _remove_leavings(target)
    temporary = _temporary(target)
    try:
        temporary.mkdir()
        with _locked(temporary):
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in [*names, "."]:
                    _sync(Path(folder, name))
            _refuse_taken(target)
            temporary.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise WriteError(f"cannot write: {error.strerror}", file=target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_taken(target: Path) -> None:
    if not target.parent.is_dir():
        raise UsageError("no such folder", file=target.parent)
    if target.exists():
        raise UsageError("already there", file=target, expected="a name that is free")


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise UsageError unless `target` may be written: its folder is there, and it is not."""
    if not target.parent.is_dir():
        raise UsageError("no such folder", file=target.parent)
    if target.is_dir():
        raise UsageError("is a folder", file=target, expected="a file's name")
    if target.exists() and not force:
        raise UsageError("already there: --force (force=True) replaces it", file=target)


def require_free_space(folder: Path, needed: int) -> None:
    """Raise WriteError when the file system of `folder` has fewer than `needed` bytes free,
    UsageError when there is no such folder."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(f"no such folder: {error.strerror}", file=folder) from error
    if free < needed:
        raise WriteError(
            "not enough free space", file=folder, expected=f"{needed:,} bytes", found=f"{free:,}"
        )


def write_all(fd: int, data: Any, offset: int) -> int:
    """Write all bytes of a contiguous buffer at `offset` of a file; returns how many."""
    view = memoryview(data).cast("B")
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:], offset + done)
    return done


def scratch_file(folder: str | os.PathLike[str]) -> IO[bytes]:
    """A temporary file in that folder, gone when it is closed. Raises UsageError when the folder
    takes none."""
    try:
        return tempfile.NamedTemporaryFile(dir=folder, prefix=".bundlefmt-")
    except OSError as error:
        raise UsageError(f"cannot make a file here: {error.strerror}", file=folder) from error


def _remove_leavings(target: Path) -> None:
    """Unlink the temporary files that dead writers of `target` left behind."""
    for path in target.parent.iterdir():
        if not (path.name.startswith(_prefix(target)) and path.name.endswith(_SUFFIX)):
            continue
        with suppress(OSError), _locked(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file or folder. Raises OSError when another process does."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{os.getpid()}-{os.urandom(4).hex()}{_SUFFIX}")


def _prefix(target: Path) -> str:
    """How the names of temporary files for `target` begin; cut where they would be too long."""
    return f".{os.fsdecode(os.fsencode(target.name)[:_MOST_NAME])}."


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""Files and folders that appear whole or not at all.

Strategy: write under a temporary name in the same folder, fsync, rename, fsync the folder. The
temporary one stays locked while its writer lives, so that whoever comes next can tell a dead
writer's leavings from a living writer's work, and removes only the former.

Facts: file systems lack some of this. Lustre, NFS and FUSE may have no flock, and NFS locks no
folder, and no file that is not open for writing. CIFS, vboxsf and DrvFs refuse to fsync a folder,
and no folder that may not be listed can be opened for it. Some do not know how much space is free,
and say that they have no blocks at all. None of these is a failure to write. Where nothing can be
locked, leavings stay: their writer may be alive, on another machine.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bundlefmt.errors import UsageError, WriteError

_MOST_NAME = 100  # bytes of the target's name in a temporary one: some file systems take 143 in all
_WRITER = r"[0-9]+-[0-9a-f]+\.partial"  # what a temporary name ends in: process id, random bits
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_NO_SYNC = (*_NO_LOCKS, errno.EACCES, errno.EPERM)


@contextmanager
def replacing(
    path: str | os.PathLike[str], *, force: bool = False, needed: int = 0
) -> Iterator[BinaryIO]:
    """A writable, seekable, unbuffered file that takes the name `path` when the block ends well:
    without `force` only if nobody else has taken it meanwhile.

    Where `path` is a link, what it leads to is replaced. When the block raises, nothing is left;
    nor is a new file when its folder cannot be synced after the rename. Raises UsageError when
    `path` exists and `force` is false, is no regular file, or its folder does not exist, WriteError
    when the device refuses (a full disk) or has fewer than `needed` bytes free.
    """
    target = _followed(Path(path))
    _remove_leavings(target, stat.S_ISREG, Path.unlink)
    refuse_existing(Path(path), force=force)
    require_free_space(target.parent, needed)
    with _reporting(path), _temporary_file(target) as file:
        yield file
        os.fsync(file.fileno())
        refuse_existing(Path(path), force=force)
        if force:
            _rename(Path(file.name), target)
        else:
            _link_all([(Path(file.name), target)])


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends well.

    When the block raises, nothing is left. Raises UsageError when `path` exists or the folder that
    it is to lie in does not, WriteError when the device refuses.
    """
    target = Path(path)
    _remove_leavings(target, stat.S_ISDIR, shutil.rmtree)
    _refuse_taken(target)
    with _reporting(path), _temporary_folder(target) as temporary:
        yield temporary
        _sync_all(temporary)
        _refuse_taken(target)
        _rename(temporary, target)


@contextmanager
def new_files(
    folder: str | os.PathLike[str], names: Sequence[str], *, needed: int = 0
) -> Iterator[Path]:
    """A temporary folder to fill with files of these names, which all take their names in `folder`
    when the block ends well, or none does.

    A `folder` that is not there is made, and appears with all of them. In one that is there, the
    files are linked in one by one, and the links taken back should one fail; of a writer that is
    killed meanwhile, they are taken back by the next. (Without hard links the files are renamed:
    then the next writer finds those of a killed one in its way.)

    When the block raises, nothing is left. Raises UsageError when one of the files exists,
    WriteError when the device refuses or has fewer than `needed` bytes free.
    """
    target = Path(folder)
    if _kind(target) is None:
        with _parents(target), new_folder(target) as temporary:
            require_free_space(target.parent, needed)
            yield temporary
        return
    if _kind(target) != stat.S_IFDIR:
        raise UsageError("not a folder", file=target)
    staging = target / "bundlefmt-files"
    _remove_leavings(staging, stat.S_ISDIR, _settle)
    for name in names:
        _refuse_taken(target / name)
    require_free_space(target, needed)
    with _reporting(folder), _temporary_folder(staging) as temporary:
        yield temporary
        _sync_all(temporary)
        _link_all([(temporary / name, target / name) for name in names])


@contextmanager
def scratch_file(folder: str | os.PathLike[str], *, needed: int = 0) -> Iterator[BinaryIO]:
    """A temporary, unbuffered file in that folder, gone when the block ends. Raises UsageError when
    the folder takes none, WriteError when the device has fewer than `needed` bytes free."""
    target = Path(folder, "bundlefmt-scratch")
    _remove_leavings(target, stat.S_ISREG, Path.unlink)
    require_free_space(target.parent, needed)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(_temporary_file(target))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot make a file here: {_reason(error)}", file=folder) from error
        yield file


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise UsageError unless `target` may be written: its folder is there, and it is not, or it is
    a regular file and `force` is true."""
    folder = _followed(target).parent
    if _kind(folder) != stat.S_IFDIR:
        raise UsageError("no such folder", file=folder)
    kind = _kind(target)
    if kind == stat.S_IFDIR:
        raise UsageError("is a folder", file=target, expected="a file's name")
    if kind not in (None, stat.S_IFREG):
        raise UsageError("not a regular file", file=target)
    if not force and (kind is not None or target.is_symlink()):
        raise UsageError("already there: --force (force=True) replaces it", file=target)


def require_free_space(folder: Path, needed: int) -> None:
    """Raise WriteError when the file system of `folder` has fewer than `needed` bytes free,
    UsageError when there is no such folder."""
    try:
        usage = shutil.disk_usage(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"no such folder: {error.strerror}", file=folder) from error
    except (OSError, ValueError):  # not known: whether it is enough will be seen
        return
    if usage.total and usage.free < needed:
        raise WriteError(
            "not enough free space",
            file=folder,
            expected=f"{needed:,} bytes",
            found=f"{usage.free:,}",
        )


def lock(fd: int, *, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; false where the file system has no locks.
    Raises BlockingIOError when another process has the lock, unless it is to `wait`."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def write_all(fd: int, data: Any, offset: int) -> int:
    """Write all bytes of a contiguous buffer at `offset` of a file; returns how many."""
    view = memoryview(data).cast("B")
    done = 0
    while done < view.nbytes:
        count = os.pwrite(fd, view[done:], offset + done)
        if not count:
            raise OSError(errno.EIO, "the device took no byte")
        done += count
    return done


@contextmanager
def _reporting(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system as WriteErrors that name the file."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write: {_reason(error)}", file=path) from error


@contextmanager
def _temporary_file(target: Path) -> Iterator[BinaryIO]:
    """A locked file beside `target`, which is removed if it still has its name in the end."""
    temporary = _temporary(target)
    try:
        with temporary.open("xb", buffering=0) as file:
            # Until it is locked, another writer may take it for a dead one's and remove it: then
            # the rename fails, and nothing is lost.
            lock(file.fileno(), wait=True)
            yield file
    finally:
        with suppress(OSError, ValueError):
            try:
                temporary.unlink(missing_ok=True)
            except KeyboardInterrupt:  # it may have come before the call
                temporary.unlink(missing_ok=True)
                raise


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A locked folder beside `target`, which is removed if it still has its name in the end."""
    temporary = _temporary(target)
    try:
        temporary.mkdir()
        with _locked(temporary):
            yield temporary
    finally:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
        except KeyboardInterrupt:  # removing many files takes time
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _rename(temporary: Path, target: Path) -> None:
    """Give `target`'s name to what is there under the temporary one. Raises OSError when that may
    not last; then a name that was free is free again."""
    _sync_folder(target.parent)  # one that cannot be synced is found while nothing is replaced
    new = _kind(target) is None
    temporary.replace(target)
    try:
        _sync_folder(target.parent)
    except OSError:
        if new:
            target.replace(temporary)
        raise


def _link_all(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Give temporary files the names of their targets, in one folder, unless one of those is taken:
    then, or when that may not last, none of them. What others put there meanwhile stays."""
    linked: list[Path] = []
    try:
        for temporary, target in pairs:
            _link(temporary, target)
            linked.append(target)
        for folder in {target.parent for target in linked}:
            _sync_folder(folder)
    except BaseException:
        _unlink([*linked, *(target for file, target in pairs if _is_link_to(target, file))])
        raise


def _link(temporary: Path, target: Path) -> None:
    """Give the file the name `target` too, or, without hard links, instead."""
    try:
        target.hardlink_to(temporary)
    except FileExistsError:
        _refuse_taken(target)
        raise
    except OSError:
        _refuse_taken(target)
        temporary.rename(target)


def _settle(staging: Path) -> None:
    """Remove what a dead writer of files left: its folder, and links to some of what is in it. Once
    all were linked, the files stay."""
    pairs = [(path, staging.parent / path.name) for path in staging.iterdir()]
    linked = [target for path, target in pairs if _is_link_to(target, path)]
    if len(linked) < len(pairs):
        _unlink(linked)
    shutil.rmtree(staging)


def _is_link_to(path: Path, other: Path) -> bool:
    try:
        return os.path.samestat(path.lstat(), other.lstat())
    except OSError:
        return False


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make the folders that `folder` is to lie in; when the block raises, they go again."""
    missing = [parent for parent in folder.parents if _kind(parent) is None]
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder: {_reason(error)}", file=folder) from error
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


def _refuse_taken(target: Path) -> None:
    if _kind(target.parent) != stat.S_IFDIR:
        raise UsageError("no such folder", file=target.parent)
    if _kind(target) is not None or target.is_symlink():
        raise UsageError("already there: remove it, or choose another name", file=target)


def _followed(path: Path) -> Path:
    """Where a link leads to; `path` itself when it is none."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114 - no error


def _kind(path: Path) -> int | None:
    """The type of file that a path leads to, as stat.S_IFMT has it; None where there is none.
    Raises UsageError for what cannot be looked up: a name too long, a ring of links."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be written: {_reason(error)}", file=path) from error


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _remove_leavings(
    target: Path, is_kind: Callable[[int], bool], remove: Callable[[Path], object]
) -> None:
    """Remove the temporary files or folders that dead writers of `target`, with this user's rights,
    left behind."""
    with suppress(OSError, ValueError):  # a folder that cannot be listed keeps them
        ours = re.compile(re.escape(_prefix(target)) + _WRITER)
        for path in target.parent.iterdir():
            if ours.fullmatch(path.name):
                with suppress(OSError):
                    found = path.lstat()
                    if is_kind(found.st_mode) and found.st_uid == os.geteuid():
                        with _locked(path) as locked:
                            if locked:
                                remove(path)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock on a file or folder; false where the file system has no locks. Raises OSError
    when another process holds it."""
    access = os.O_RDONLY if path.is_dir() else os.O_RDWR
    fd = os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield lock(fd)
    finally:
        os.close(fd)


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{os.getpid()}-{os.urandom(4).hex()}.partial")


def _prefix(target: Path) -> str:
    """How the names of temporary files for `target` begin; cut where they would be too long."""
    return f".{os.fsencode(target.name)[:_MOST_NAME].decode(errors='ignore')}."


def _sync_all(folder: Path) -> None:
    """Sync all that is in a folder, and the folder."""
    for inner, _, names in os.walk(folder):
        for name in names:
            _sync(Path(inner, name))
        _sync_folder(Path(inner))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(path: Path) -> None:
    """Sync a folder, where the file system has such a call."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise

"""Files and folders appear whole or not at all, whatever the file system lacks."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bundlefmt.errors import UsageError, WriteError
from bundlefmt.storage import atomic
from bundlefmt.storage.atomic import (
    new_files,
    new_folder,
    replacing,
    require_free_space,
    scratch_file,
    write_all,
)
from tests.conftest import killed_before

# A writer in a process of its own: it reports its temporary file, waits for a line, then ends well.
WRITER = """
import sys
from bundlefmt.storage.atomic import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"from the other writer")
    print(file.name, flush=True)
    sys.stdin.readline()
"""


def _other_writer(target: Path) -> tuple[subprocess.Popen[str], Path]:
    """A writer of `target` in the middle of its work, and its temporary file."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "model.bundle"
    with replacing(target) as file:
        file.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert _names(tmp_path) == ["model.bundle"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_raises(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), replacing(tmp_path / "model.bundle") as file:
        file.write(b"half")
        raise error
    assert _names(tmp_path) == []


def test_a_device_error_in_the_block_is_a_write_error(tmp_path: Path) -> None:
    target = tmp_path / "model.bundle"
    with pytest.raises(WriteError, match=os.strerror(errno.EIO)) as caught, replacing(target):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert caught.value.file == target
    assert _names(tmp_path) == []


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    target = tmp_path / "model.bundle"
    target.write_bytes(b"old")
    with pytest.raises(UsageError, match="--force"), replacing(target):
        pytest.fail("the block ran")
    assert target.read_bytes() == b"old"
    with pytest.raises(ValueError, match="halfway"), replacing(target, force=True) as file:
        file.write(b"new")
        raise ValueError("halfway")
    assert target.read_bytes() == b"old"
    with replacing(target, force=True) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert _names(tmp_path) == ["model.bundle"]


def test_a_folder_in_the_way_and_a_folder_missing_are_usage_errors(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "missing" / "model.bundle"):
        with pytest.raises(UsageError, match="folder"), replacing(target, force=True):
            pytest.fail("the block ran")


@pytest.mark.parametrize("name", ["model.bundle", "m[o]d?l*.bundle"])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    writer, temporary = _other_writer(target)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert _names(tmp_path) == [temporary.name]
    with replacing(target) as file:
        assert not temporary.exists()
        file.write(b"whole")
    assert _names(tmp_path) == [name]


def test_a_living_writers_file_is_let_be(tmp_path: Path) -> None:
    target = tmp_path / "model.bundle"
    writer, temporary = _other_writer(target)
    with replacing(target) as file:
        file.write(b"ours")
    assert temporary.read_bytes() == b"from the other writer"
    assert target.read_bytes() == b"ours"
    writer.communicate("\n")  # which finds the name taken, and keeps what is there
    assert writer.returncode != 0
    assert target.read_bytes() == b"ours"
    assert _names(tmp_path) == ["model.bundle"]


def test_files_that_only_look_alike_are_let_be(tmp_path: Path) -> None:
    others = [".model.bundle.swp", "model.bundle.partial", ".other.bundle.1-ab.partial"]
    for name in others:
        (tmp_path / name).write_bytes(b"not ours")
    with replacing(tmp_path / "model.bundle") as file:
        file.write(b"whole")
    assert _names(tmp_path) == sorted([*others, "model.bundle"])


def test_too_little_free_space_is_named(tmp_path: Path) -> None:
    require_free_space(tmp_path, 0)
    with pytest.raises(WriteError, match="not enough free space") as caught:
        require_free_space(tmp_path, 1 << 60)
    assert caught.value.expected == f"{1 << 60:,} bytes"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount a small disk: {error.strerror}")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_write_error_and_nothing_is_left(small_disk: Path) -> None:
    target = small_disk / "model.bundle"
    with pytest.raises(WriteError, match=os.strerror(errno.ENOSPC)) as caught:  # noqa: SIM117
        with replacing(target) as file:
            for _ in range(100):
                file.write(bytes(65536))
    assert caught.value.file == target
    assert _names(small_disk) == []
    with replacing(target) as file:
        file.write(b"fits")
    assert target.read_bytes() == b"fits"


# Each way of writing: what it makes under the name, and a block that writes it.

Write = Callable[[Path], None]


def _a_file(target: Path) -> None:
    with replacing(target) as file:
        write_all(file.fileno(), b"whole", 0)


def _a_folder(target: Path) -> None:
    with new_folder(target) as folder:
        (folder / "one").write_bytes(b"whole")


def _files(target: Path) -> None:
    with new_files(target, ["one", "two"]) as folder:
        for name in ("one", "two"):
            (folder / name).write_bytes(b"whole")


def _more_files(target: Path) -> None:
    target.mkdir(exist_ok=True)
    _files(target)


ways = pytest.mark.parametrize("write", [_a_file, _a_folder, _files, _more_files])


def _everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# File systems that lack something.


def _failing(
    real: Callable[..., Any], number: int, of: Callable[[int], bool]
) -> Callable[..., Any]:
    """A call on descriptors that fails where `of` says so."""

    def call(fd: int, *rest: Any) -> Any:
        if of(fd):
            raise OSError(number, os.strerror(number))
        return real(fd, *rest)

    return call


def _is_folder(fd: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{fd}")  # noqa: PTH112 - a link


@ways
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_all_is_written_and_leavings_stay(
    write: Write, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = tmp_path / ".x.1-00000000.partial"
    leaving.touch()
    monkeypatch.setattr(fcntl, "flock", _failing(fcntl.flock, number, lambda fd: True))
    write(tmp_path / "x")
    assert leaving.exists()  # its writer may be alive, on another machine
    assert _names(tmp_path) == [leaving.name, "x"]


@ways
@pytest.mark.parametrize(
    "number", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.ENOSYS]
)
def test_a_folder_that_has_no_fsync_is_no_error(
    write: Write, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _failing(os.fsync, number, _is_folder))
    write(tmp_path / "x")
    assert _names(tmp_path) == ["x"]


@ways
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("good", [0, 1, 2])
def test_a_folder_whose_fsync_fails_leaves_nothing(
    write: Write, number: int, good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether before the rename or after it."""
    target = tmp_path / "x"
    if write is _more_files:
        target.mkdir()
    left = iter(range(good))
    fails = lambda fd: _is_folder(fd) and next(left, None) is None  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _failing(os.fsync, number, fails))
        try:
            write(target)
        except WriteError as error:
            assert str(error).endswith(f"x: cannot write: {os.strerror(number)}")
            assert _everything(tmp_path) == (["x"] if write is _more_files else [])
        else:
            return
    write(target)
    assert _names(tmp_path) == ["x"]


def test_a_folder_that_cannot_be_synced_keeps_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", _failing(os.fsync, errno.EIO, _is_folder))
    with pytest.raises(WriteError), replacing(target, force=True) as file:
        file.write(b"new")
    assert target.read_bytes() == b"old"
    assert _names(tmp_path) == ["x"]


def test_free_space_that_is_not_known_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(0, 0, 0))
    require_free_space(tmp_path, 1 << 60)
    with replacing(tmp_path / "x", needed=1 << 60) as file:
        file.write(b"whole")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(100, 100, 0))
    with pytest.raises(WriteError, match="not enough free space"):
        require_free_space(tmp_path, 1)


def test_space_that_leavings_take_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = tmp_path / ".x.1-00000000.partial"
    leaving.touch()

    def usage(path: Path) -> Any:
        return shutil._ntuple_diskusage(100, 0, 0 if leaving.exists() else 100)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with replacing(tmp_path / "x", needed=50) as file:
        file.write(b"whole")
    assert _names(tmp_path) == ["x"]


# Links.


@pytest.mark.parametrize("steps", [1, 2])
def test_what_a_link_leads_to_is_replaced_where_it_is(steps: int, tmp_path: Path) -> None:
    real = tmp_path / "disk" / "real"
    real.parent.mkdir()
    real.write_bytes(b"old")
    link = tmp_path / "x"
    link.symlink_to(Path("disk", "real"))
    if steps == 2:
        link = tmp_path / "y"
        link.symlink_to("x")
    with pytest.raises(UsageError, match="already there"), replacing(link):
        pytest.fail("the block ran")
    with replacing(link, force=True) as file:
        assert Path(file.name).parent == real.parent
        file.write(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert _names(real.parent) == ["real"]


def test_a_link_to_nothing_is_followed_only_by_force(tmp_path: Path) -> None:
    link, real = tmp_path / "x", tmp_path / "disk" / "real"
    link.symlink_to(real)
    with pytest.raises(UsageError, match="no such folder"), replacing(link, force=True):
        pytest.fail("the block ran")
    real.parent.mkdir()
    for write in (_a_file, _a_folder, _files):
        with pytest.raises(UsageError, match="already there"):
            write(link)
    with replacing(link, force=True) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


# Names that nothing can be written under.


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(path))  # the name of a socket is short


def _ring(path: Path) -> None:
    path.symlink_to(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("make", [_fifo, _socket, _ring, _device, Path.mkdir])
def test_what_is_no_file_is_not_replaced(make: Callable[[Path], None], tmp_path: Path) -> None:
    target = tmp_path / "x"
    make(target)
    before = target.lstat()
    with pytest.raises(UsageError) as caught, replacing(target, force=True):
        pytest.fail("the block ran")
    assert caught.value.file == target
    assert os.path.samestat(before, target.lstat())
    assert _names(tmp_path) == ["x"]


@pytest.mark.parametrize("write", [_a_file, _a_folder, _files])
@pytest.mark.parametrize("name", ["x" * 256, "x" * 5000, "a\0b", "\ud800", "é" * 128])
def test_a_name_that_no_file_can_have_is_a_usage_error(
    write: Write, name: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        write(tmp_path / name)
    assert _names(tmp_path) == []


@ways
@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "\udcff", "-rf", "a b\n", "m[o]d?l*", "~"])
def test_any_name_that_a_file_can_have_is_written(write: Write, name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert _names(tmp_path) == [name]


@pytest.mark.parametrize("write", [_a_file, _a_folder, _files])
def test_a_folder_that_takes_no_file_is_an_error(write: Write) -> None:
    with pytest.raises((UsageError, WriteError)):
        write(Path("/proc/x"))


# Leavings.


@pytest.mark.parametrize("kind", ["a folder", "a link", "a fifo", "another user's"])
def test_what_no_writer_of_files_made_is_kept(kind: str, tmp_path: Path) -> None:
    stranger = tmp_path / ".x.123-0123abcd.partial"
    match kind:
        case "a folder":
            stranger.mkdir()
            (stranger / "precious").touch()
        case "a link":
            (tmp_path / "precious").touch()
            stranger.symlink_to("precious")
        case "a fifo":
            os.mkfifo(stranger)
        case _:
            if os.geteuid():
                pytest.skip("giving a file away takes root")
            stranger.touch()
            os.chown(stranger, 12345, -1)
    before = _everything(tmp_path)
    _a_file(tmp_path / "x")
    assert _everything(tmp_path) == sorted([*before, "x"])


@pytest.mark.parametrize(
    "name",
    [".x.partial", ".x.1.partial", ".x.a-00.partial", ".x.1-0g.partial", ".x.1-00.partial.old"],
)
@ways
def test_names_that_no_writer_makes_are_kept(write: Write, name: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "in"):
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
        (folder / f"{name}d").mkdir()
        write(folder / "x")
        assert {name, f"{name}d", "x"} <= set(_names(folder))


def test_a_writer_of_folders_keeps_files(tmp_path: Path) -> None:
    (tmp_path / ".x.123-0123abcd.partial").write_bytes(b"precious")
    _a_folder(tmp_path / "x")
    assert _names(tmp_path) == [".x.123-0123abcd.partial", "x"]


def test_leavings_go_even_when_the_target_is_refused(tmp_path: Path) -> None:
    for target, write in ((tmp_path / "file", _a_file), (tmp_path / "folder", _a_folder)):
        write(target)
        leaving = tmp_path / f".{target.name}.1-00000000.partial"
        leaving.touch() if write is _a_file else leaving.mkdir()
        with pytest.raises(UsageError, match="already there"):
            write(target)
        assert not leaving.exists()


# Devices that refuse.


@ways
def test_a_file_that_may_not_grow_is_a_write_error(write: Write, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, before[1]))
    try:
        with pytest.raises(WriteError, match=os.strerror(errno.EFBIG)):
            write(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert _everything(tmp_path) == (["x"] if write is _more_files else [])


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_bytes_that_the_device_took_only_in_part_are_written_all(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:step], at))
    with replacing(tmp_path / "x") as file:
        assert write_all(file.fileno(), b"0123456789", 5) == 10
    assert (tmp_path / "x").read_bytes() == b"\0\0\0\0\x000123456789"


def test_a_device_that_takes_no_byte_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(WriteError, match="took no byte"), replacing(tmp_path / "x") as file:
        write_all(file.fileno(), b"x", 0)
    assert _names(tmp_path) == []


def test_a_scratch_file_is_gone_in_the_end_and_a_killed_ones_too(tmp_path: Path) -> None:
    (tmp_path / ".bundlefmt-scratch.1-00000000.partial").touch()
    with scratch_file(tmp_path) as file:
        file.write(b"x")
        assert _names(tmp_path) == [Path(file.name).name]
    assert _names(tmp_path) == []
    with pytest.raises(UsageError), scratch_file(tmp_path / "missing"):
        pytest.fail("the block ran")


# Several files at once.

NAMES = ["one", "two", "three"]


def _write(folder: Path, content: str) -> None:
    with new_files(folder, NAMES) as made:
        for name in NAMES:
            (made / name).write_text(content)


@pytest.fixture(params=[True, False], ids=["hard links", "no hard links"])
def filled(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file in it."""
    if not request.param:

        def refusing(*_: Any) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refusing)
    folder = tmp_path / "filled"
    folder.mkdir()
    (folder / "stranger").touch()
    return folder


def test_files_appear_together_beside_others(filled: Path) -> None:
    with new_files(filled, NAMES) as made:
        for name in NAMES:
            (made / name).write_text("whole")
        assert [path.name for path in filled.iterdir() if path.is_file()] == ["stranger"]
    assert _everything(filled) == sorted([*NAMES, "stranger"])
    assert all((filled / name).stat().st_nlink == 1 for name in NAMES)


@pytest.mark.parametrize("taken", NAMES)
@pytest.mark.parametrize("early", [True, False])
def test_when_one_name_is_taken_no_file_appears(filled: Path, taken: str, early: bool) -> None:
    if early:
        (filled / taken).write_text("precious")
    with pytest.raises(UsageError, match=f"{taken}: already there"):  # noqa: SIM117
        with new_files(filled, NAMES) as made:
            assert not early
            for name in NAMES:
                (made / name).write_text("whole")
            (filled / taken).write_text("precious")
    assert (filled / taken).read_text() == "precious"
    assert _everything(filled) == sorted([taken, "stranger"])


def test_folders_made_on_the_way_go_again_when_the_block_raises(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="halfway"), new_files(tmp_path / "a/b/c", NAMES):
        raise ValueError("halfway")
    assert _everything(tmp_path) == ["a"]
    _write(tmp_path / "a/b/c", "whole")
    assert _names(tmp_path / "a/b/c") == sorted(NAMES)


@ways
def test_whenever_a_writer_is_interrupted_all_is_there_or_nothing(
    write: Write, tmp_path: Path
) -> None:
    """Before each call of the system that touches files."""
    target = tmp_path / "x"
    write(target)
    whole = _everything(tmp_path)
    watched = {"mkdir", "open", "pwrite", "fsync", "link", "rename", "replace", "unlink", "rmdir"}
    for calls in range(1000):
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        left = iter(range(calls))

        def interrupt(frame: Any, event: str, called: Any, left: Iterator[int] = left) -> None:
            if event == "c_call" and called.__name__ in watched and next(left, None) is None:
                sys.setprofile(None)
                raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            write(target)
        except KeyboardInterrupt:
            assert _everything(tmp_path) in ([], ["x"] * target.is_dir(), whole)
        else:
            break
        finally:
            sys.setprofile(None)
    assert calls > 6
    assert _everything(tmp_path) == whole


@pytest.mark.parametrize("there", [True, False], ids=["a folder that is there", "a new folder"])
def test_whenever_a_writer_of_files_is_killed_the_next_finds_all_or_nothing(
    there: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    states = []
    for calls in range(1000):
        if there:
            folder.mkdir()
            (folder / "stranger").touch()
        finished = killed_before(calls, lambda: _write(folder, "killed"))
        present = {name for name in NAMES if (folder / name).exists()}
        states.append(len(present))
        if there or len(present) < len(NAMES):
            assert there or not present
            if len(present) == len(NAMES):
                with pytest.raises(UsageError, match="already there"):
                    _write(folder, "next")
                assert {(folder / name).read_text() for name in NAMES} == {"killed"}
            else:
                _write(folder, "next")
                assert {(folder / name).read_text() for name in NAMES} == {"next"}
            assert _everything(folder) == sorted([*NAMES, *["stranger"] * there])
            assert _names(tmp_path) == ["x"]
        shutil.rmtree(folder)
        if finished:
            break
    assert states[-1] == len(NAMES)
    assert set(states) == (set(range(len(NAMES) + 1)) if there else {0, len(NAMES)})


def test_what_takes_the_name_at_the_last_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "x", atomic._link

    def taken(temporary: Path, target: Path) -> None:
        path.write_bytes(b"a stranger's")
        link(temporary, target)

    monkeypatch.setattr(atomic, "_link", taken)
    with pytest.raises(UsageError, match="already there"), replacing(path) as file:
        file.write(b"ours")
    assert path.read_bytes() == b"a stranger's"
    assert list(tmp_path.iterdir()) == [path]

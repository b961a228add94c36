"""What the device under a file demands of direct I/O, and what this machine offers.

Facts: O_DIRECT wants offsets, lengths and addresses aligned. Linux 6.1 tells by how much
(statx, STATX_DIOALIGN); before that the block device's logical block size is the best guess,
and 4096 is safe everywhere. Whether O_DIRECT works at all is a property of the file system, and
the only honest test is to open the file and read.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from dataclasses import dataclass
from pathlib import Path

from bundlefmt.errors import UsageError
from bundlefmt.storage.buffers import aligned_empty

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_STATX_MASK = struct.Struct("=I")
_STATX_DIO = struct.Struct("=II")  # memory alignment, offset alignment
_STATX_DIO_OFFSET = 152
SAFE_ALIGNMENT = 4096


@dataclass(frozen=True)
class DirectIO:
    """Direct I/O on one file: alignments in bytes, who said so, and why it is not to be had."""

    memory_alignment: int
    offset_alignment: int
    source: str
    refusal: str | None = None


def probe_direct(path: str | os.PathLike[str]) -> DirectIO:
    """Open the file with O_DIRECT and read its first block."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return DirectIO(
            SAFE_ALIGNMENT, SAFE_ALIGNMENT, "default", f"open with O_DIRECT: {error.strerror}"
        )
    try:
        memory, offset, source = _alignments(fd)
        try:
            os.preadv(fd, [aligned_empty(offset, memory)], 0)
        except OSError as error:
            return DirectIO(memory, offset, source, f"read with O_DIRECT: {error.strerror}")
        return DirectIO(memory, offset, source)
    finally:
        os.close(fd)


def _alignments(fd: int) -> tuple[int, int, str]:
    """(memory alignment, offset alignment, who said so) for an open file."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if statx is not None and statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) == 0:
        (mask,) = _STATX_MASK.unpack_from(buffer, 0)
        memory, offset = _STATX_DIO.unpack_from(buffer, _STATX_DIO_OFFSET)
        if mask & _STATX_DIOALIGN and memory and offset:
            return memory, offset, "statx"
    block = _sys_entry(os.fstat(fd).st_dev)
    for queue in (block / "queue", block.resolve().parent / "queue"):  # a disk, a partition of one
        try:
            size = int((queue / "logical_block_size").read_text())
        except (OSError, ValueError):
            continue
        return size, size, "logical block size"
    return SAFE_ALIGNMENT, SAFE_ALIGNMENT, "default"


def device_identity(path: str | os.PathLike[str]) -> str:
    """What tells the device under a file or folder from others, as long as the machine keeps it:
    of a disk, whichever its partition, an identifier of its own (its name, where it has none) and
    its size; of what is no disk, the file system. Raises UsageError when there is no such file."""
    try:
        number = Path(path).stat().st_dev
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UsageError(f"no such file: {reason}", file=path) from error
    kind, source = _mounted(number)
    if not _sys_entry(number).exists() and Path(source).is_block_device():
        number = Path(source).stat().st_rdev  # btrfs, say, has numbers that are no device's
    block = _sys_entry(number).resolve()
    if not block.exists():
        return f"{kind}-{source}"
    disk = block.parent if (block / "partition").exists() else block
    names = ("wwid", "device/wwid", "device/serial", "serial", "dm/uuid", "md/uuid")
    texts = [line.strip() for name in names for line in _lines(f"{disk}/{name}")[:1]]
    sectors = "".join(_lines(f"{disk}/size")[:1])
    return f"{next(filter(None, texts), disk.name)}-{sectors}"


def _mounted(number: int) -> tuple[str, str]:
    """The file system with that device number: its kind and what is mounted there (man 5 proc,
    mountinfo)."""
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in _lines("/proc/self/mountinfo"):
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            kind, name = source.split(" ")[:2]
            return kind, name
    return "unknown", wanted


def _sys_entry(number: int) -> Path:
    """What /sys says of the block device with that number."""
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")


def drop_cache(path: str | os.PathLike[str]) -> None:
    """Ask the kernel to forget the file's cached pages, so that the next read is cold."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def memory_limit() -> int | None:
    """Bytes that this process's control group, or one above it, may use (v1 or v2); None when
    unlimited."""
    found: list[int] = []
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        for group in (Path(path), *Path(path).parents):  # a group's limit binds those below it
            found += [int(text) for text in _lines(f"{root}{group}/{name}") if text.isdigit()]
    limits = [limit for limit in found if limit < 1 << 60]  # v1 writes "unlimited" as a huge number
    return min(limits, default=None)


def total_memory() -> int:
    """Bytes of memory in the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes that could be had without swapping."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return total_memory()


def resident_memory(peak: bool = False) -> int:
    """Bytes of this process that are in memory, or the most that ever were. (What getrusage calls
    the peak includes the parent's memory at the fork.)"""
    wanted = "VmHWM:" if peak else "VmRSS:"
    for line in _lines("/proc/self/status"):
        if line.startswith(wanted):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_features() -> list[str]:
    """Which of the vector features that kernels care about the CPU has."""
    wanted = ("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_bf16", "asimd", "sve")
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            return [feature for feature in wanted if feature in flags]
    return []


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(errors="surrogateescape")  # a mount point may have any name
    except OSError:
        return []
    return [line for line in text.split("\n") if line]

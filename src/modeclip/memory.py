"""How much memory a process has used at most, and giving back what it no longer needs (Linux; elsewhere less exact)."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress
from pathlib import Path


def peak_memory_gb() -> float:
    """Return the highest memory of this process since `reset_peak_memory`, in 10^9 bytes.

    Memory that processes share, such as the code of libraries, is counted in parts, so that the sum over processes is
    what they really take.
    """
    try:
        highest = _field("/proc/self/status", "VmHWM")
        rollup = "/proc/self/smaps_rollup"
        shared = _field(rollup, "Rss") - _field(rollup, "Pss")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return (highest - shared) * 1024 / 1e9


def reset_peak_memory() -> None:
    """Start the record of this process's highest memory anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def return_memory() -> None:
    """Give what has been freed back to the system: the processes that work next need it, this one does not."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _field(file: str, name: str) -> int:
    """Return a field of one of the kernel's files about this process, in kibibytes."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{file} has no field {name}")

"""The device that this machine computes on: which one, how fast it multiplies, and how much memory is free or taken.

Memory that processes share, such as the code of libraries, is counted in parts (the kernel's "proportional set size"),
so the sum over processes is what they really take. This is known on Linux only; elsewhere `memory_gb` returns the
highest resident size of this process.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from modeclip.errors import ModeclipError

if TYPE_CHECKING:
    import torch

SAMPLE_SECONDS = 0.5
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt
_LARGEST_BLOCK = 32 << 20  # glibc accepts no more; larger blocks are given back at once, as by default


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device to compute on; ``auto`` is the GPU if there is one.

    Raises:
        ModeclipError: PyTorch does not know the name, or this machine has no such device.
    """
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ModeclipError(f"device: expected auto, cpu, cuda or cuda:1, got {wanted!r}") from None
    if not _is_there(device):
        what = "no GPU" if device.type == "cuda" and not torch.cuda.is_available() else "no such device"
        raise ModeclipError(f"device {wanted!r}: this machine has {what} that PyTorch can use; give --device cpu")
    return device


@cache
def _is_there(device: torch.device) -> bool:
    """Whether this machine has a device; ``mps``, ``xpu`` and ``meta`` are names that PyTorch knows on any machine.

    GPUs are counted, not used: a process that has used one cannot be forked any more, and a full one is there all the
    same.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    try:
        return bool(torch.ones(1, device=device).item() == 1)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; none without CUDA."""
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if given is None else given.split(",")[:count]


def leave_a_core(is_left: bool) -> None:
    """Have PyTorch compute on all cores in this thread, or on all but one, at least one.

    A thread that computes on every core stops for each other thread that has something to do, since every product
    waits for its slowest part.
    """
    import torch

    torch.set_num_threads(max(1, _num_threads() - is_left))


@cache
def _num_threads() -> int:
    """Return how many threads PyTorch was set to use."""
    import torch

    return torch.get_num_threads()


def choose_precision(wanted: str) -> str:
    """Return the precision to train in: ``auto`` is bf16 where the device multiplies it fast, else float32."""
    if wanted != "auto":
        return wanted
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return "bf16-mixed" if _multiplies_bf16() else "32-true"


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device, or of this machine if it is the CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class PeakMemory:
    """A context that watches this process and its children; ``gb`` is their highest sum so far in 10^9 bytes."""

    def __init__(self) -> None:
        self.gb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.gb = max(self.gb, memory_gb())

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.gb = max(self.gb, memory_gb())


def memory_gb() -> float:
    """Return the memory of this process and its children now, in 10^9 bytes."""
    try:
        return sum(map(_kibibytes, [os.getpid(), *_children()])) * 1024 / 1e9
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def return_memory() -> None:
    """Give freed memory back to the system, for the processes that work next."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Keep freed memory in this process for later use, until ``return_memory`` is called.

    Otherwise a training step may give its activations back to the system, which then has to make and zero every page
    again for the next step. How much that costs depends on what else runs: ``benchmarks/feed.py`` prints it, and
    docs/log.md (2026-11-25) has what was seen.
    """
    with suppress(OSError, AttributeError):  # glibc only
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def _multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bfloat16; without them bf16 is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _children() -> list[int]:
    """Return the running processes that any thread of this one has started."""
    found: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has just ended
            found += map(int, (thread / "children").read_text(encoding="utf-8").split())
    return found


def _kibibytes(process: int) -> int:
    """Return the proportional set size of a process; 0 if it has just ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        if process == os.getpid():
            raise
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)

"""Processes that end with the one that started them, also where that one is killed and can tell nobody.

``python -m modeclip.system.processes MODULE WORDS...`` ties itself to its parent, then runs the module. On Linux the
kernel kills it when the parent ends. Everywhere, its standard input is a pipe of which the parent alone holds the other
end, and a thread that reads it kills the process when that end closes. Nothing is polled, so a busy machine delays
neither; the first works even where the process is stopped or stuck in a library.

Rejected: looking for the parent between two steps, since a process that waits for another one takes no step.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

PARENT_VARIABLE = "MODECLIP_PARENT"
"""Environment variable with the id of the process with which this one ends."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STANDARD_INPUT = 0


def tied(module: str, *words: str) -> list[str]:
    """Return the words of Python that run a module tied to the process of ``PARENT_VARIABLE``, its parent."""
    return ["-m", __name__, module, *words]


def start_tied(
    module: str, words: Sequence[str], environment: Mapping[str, str | None], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a module in a process that ends when this one does, in a session of its own, where no Ctrl-C reaches it.

    The calling thread must live as long as the process: on Linux the process ends with that thread.

    Args:
        module: Module of Python that is run as a program.
        words: Its arguments.
        environment: Variables that differ from those of this process; None: such as the new one does not have.
        output: Where both its outputs go.
    """
    changed = {**os.environ, **environment, PARENT_VARIABLE: str(os.getpid())}
    return subprocess.Popen(
        [sys.executable, *tied(module, *words)],
        env={name: value for name, value in changed.items() if value is not None},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, where there is such a thing (Linux).

    Args:
        parent: Id of the parent; if another process has taken its place, it is gone already and this process ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _end()


def end_with_input() -> None:
    """Kill this process when all that could write to its standard input have closed it."""

    def read() -> None:
        while os.read(_STANDARD_INPUT, 1024):
            pass
        _end()

    threading.Thread(target=read, daemon=True).start()


def end_with_owner() -> None:
    """Kill this process of Python's multiprocessing when the one that asked for it ends.

    Under a fork server that one is not its parent, and the server stays as long as one of its children does.
    """
    owner = multiprocessing.parent_process()
    assert owner is not None, "it was started by multiprocessing"

    def wait() -> None:
        owner.join()
        _end()

    threading.Thread(target=wait, daemon=True).start()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(words: Sequence[str]) -> None:
    """Tie this process to its parent and run a module in it."""
    end_with_parent(int(os.environ[PARENT_VARIABLE]))
    end_with_input()
    sys.argv[1:] = words[1:]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What ``modeclip`` and ``python -m modeclip`` call, also under ``torchrun``: it runs the commands and takes Ctrl-C.

Importing takes seconds, also inside the commands. Ctrl-C in the middle of it would end in a traceback, or abort in the
C++ of a library. No work is done during an import, so the process may simply end there.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
SPINS = "10000"
"""How often a thread of GNU's OpenMP looks for work before it sleeps. By default it looks 300,000 times, and so takes a
core from the thread that it waits for where other programs run (``benchmarks/busy.py``)."""


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupt)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when PyTorch is imported
    from modeclip.commands import main as run

    run()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, which the commands handle, or end the process where that would meet an import."""
    below = frame
    while below is not None:
        if below.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"modeclip: interrupted\n")
            os._exit(INTERRUPTED)
        below = below.f_back
    signal.default_int_handler(number, frame)


if __name__ == "__main__":
    main()

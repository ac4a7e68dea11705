"""What ``modeclip`` and ``python -m modeclip`` call, also under ``torchrun``: sees to Ctrl-C, then runs the commands.

Importing takes seconds, in the commands too, and Ctrl-C in the midst of it would end in a traceback, or abort in
the C++ of a library. Nothing is at work during an import, so there the process just ends.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, _interrupt)
    from modeclip.commands import main as run

    run()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, which the commands handle; end the process if an import would be what it meets."""
    below = frame
    while below is not None:
        if below.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"modeclip: interrupted\n")
            os._exit(INTERRUPTED)
        below = below.f_back
    signal.default_int_handler(number, frame)


if __name__ == "__main__":
    main()

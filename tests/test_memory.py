"""The memory that a stage is said to take, against memory taken on purpose."""

from __future__ import annotations

import subprocess
import sys
import time

from modeclip.memory import PeakMemory, memory_gb

HOLD = "import sys, time; x = b'x' * int(sys.argv[1]); print('held', flush=True); time.sleep(60)"


def test_peak_counts_this_process_and_its_children() -> None:
    before = memory_gb()
    with PeakMemory() as peak:
        own = b"x" * 200_000_000
        with subprocess.Popen([sys.executable, "-c", HOLD, "300000000"], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(1.2)
            child.kill()
        del own
    assert 0.5 <= peak.gb - before <= 0.6
    assert memory_gb() - before < 0.1

"""Devices that are there or not, and the memory that a stage is said to take, against memory taken on purpose."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from modeclip.errors import ModeclipError
from modeclip.system.devices import choose_device

MEASURE = """
import json, subprocess, sys, time
from modeclip.system.devices import PeakMemory, memory_gb

HOLD = "import sys, time; x = b'x' * int(sys.argv[1]); print('held', flush=True); time.sleep(60)"
before = memory_gb()
with PeakMemory() as peak:
    own = b"x" * 200_000_000
    with subprocess.Popen([sys.executable, "-c", HOLD, "300000000"], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        time.sleep(1.2)
        child.kill()
    del own
print(json.dumps([peak.gb - before, memory_gb() - before]))
"""


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(ModeclipError, match=f"^device '{name}': this machine has no .*give --device cpu$"):
        choose_device(name)
    with pytest.raises(ModeclipError, match="expected auto, cpu, cuda or cuda:1, got 'gpu'"):
        choose_device("gpu")
    assert choose_device("cpu").type == "cpu"


def test_peak_counts_a_process_and_its_children() -> None:
    # in a process of its own: this one has memory of other tests, which may be given back at any time
    output = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True).stdout
    peak, after = json.loads(output)
    assert 0.5 <= peak <= 0.6
    assert after < 0.1

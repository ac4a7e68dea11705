"""Processes that end with the one that started them: by the kernel, by a pipe, and where the parent is gone already."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeclip.system.processes import PARENT_VARIABLE, start_tied

PARENT = """
import sys, time
from modeclip.system import processes
child = processes.start_tied("child", [sys.argv[1]], {}, open(sys.argv[2], "wb"))
print(child.pid, flush=True)
time.sleep(600)
"""
CHILD = """
import sys, time
from pathlib import Path
unfinished = Path(sys.argv[1] + ".part")
unfinished.write_text(" ".join(sys.argv[1:]))
unfinished.rename(sys.argv[1])  # there at once, with all of its words
time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module ``child``, which says that it runs and then sleeps."""
    (tmp_path / "child.py").write_text(CHILD)
    source = str(Path(__file__).parents[2] / "src")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{source}")
    return tmp_path


def wait_for_end(process: int) -> None:
    """Return when a process that is no child of this one has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    raise AssertionError("it has outlived its parent")


@pytest.mark.parametrize("way", ["kernel", "pipe"])
def test_a_process_ends_when_its_parent_is_killed(program: Path, way: str) -> None:
    hidden = {"kernel": "end_with_input", "pipe": "end_with_parent"}[way]  # each way by itself
    (program / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'modeclip.system.processes' in ' '.join(sys.orig_argv) and 'child' in sys.orig_argv:\n"
        "    import runpy\n"
        "    from modeclip.system import processes\n"
        f"    processes.{hidden} = lambda *_: None\n"
        "    processes.main(sys.orig_argv[sys.orig_argv.index('child'):])\n"
    )
    words = [sys.executable, "-c", PARENT, str(program / "runs"), str(program / "output")]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert parent.stdout
    child = int(parent.stdout.readline())
    while not (program / "runs").is_file():
        assert parent.poll() is None
    if way == "kernel":
        os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.communicate()
    wait_for_end(child)
    assert (program / "runs").read_text() == str(program / "runs")
    assert (program / "output").read_bytes() == b""


def test_a_process_whose_parent_is_gone_already_does_not_begin(program: Path) -> None:
    with (program / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "modeclip.system.processes", "child", str(program / "runs")],
            env=os.environ | {PARENT_VARIABLE: "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
        )
        assert process.wait() == -signal.SIGKILL
    assert not (program / "runs").exists()


def test_a_process_runs_as_the_module_with_its_words(program: Path) -> None:
    (program / "child.py").write_text("import sys; print(__name__, sys.argv[1:]); sys.exit(3)")
    with (program / "output").open("w+b") as output:
        process = start_tied("child", ["a", "b"], {}, output)
        assert process.wait() == 3
        assert process.stdin
        process.stdin.close()
        output.seek(0)
        assert output.read() == b"__main__ ['a', 'b']\n"

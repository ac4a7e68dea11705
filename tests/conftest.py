"""What every test runs under: no network, one thread, the same examples each time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

# Before torch or a tokenizer is imported. Subprocesses inherit it, so that the commands that tests run are
# deterministic and cannot reach for a download.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import hypothesis
import pytest
from filelock import FileLock

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


SMALL_RECIPE = """
name: small
data: {source: icons, train_sets: [octicons], tasks: [heroicons, lucide]}
cluster: {num_fine: 16, num_experts: 2}
train: {samples: 1024, batch_size: 32}
evaluate: {rule: per_class}
"""


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of the whole method on a few hundred real icons, seconds long."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(SMALL_RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_run(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A finished run folder of that recipe, made by the real command once for all processes that test."""
    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent
    out = root / "small"
    with FileLock(root / "small.lock"):
        if not (out / "report.html").exists():
            done = run_in_process("run", small_recipe, "--out", out)
            assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def modeclip_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line: a function that runs it with these words."""
    return run_here


@pytest.fixture(scope="session")
def modeclip_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same in a process of its own, for what a process is needed for: it imports everything anew."""
    return run_in_process


def run_here(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process."""
    from modeclip.commands import main

    arguments, code = list(map(str, words)), 0
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        try:
            main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def run_in_process(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-m", "modeclip", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

"""What every test runs under: no network, one thread, the same examples each time."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

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

from support import LARGE_LIBRARIES, training_here

if TYPE_CHECKING:
    from modeclip.data.catalog import Catalog

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
multiprocessing.set_forkserver_preload([*LARGE_LIBRARIES])
gc.disable()  # until all tests are collected


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that look at what took long to train as slow; skip tests marked ``gpu`` where there is no GPU."""
    for item in items:
        if {"small_run", "trained", "tuned"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_collection_finish() -> None:
    """Spare the tests what costs every one of them a little.

    The collector leaves alone what lives as long as the process, some million objects of libraries and tests: each
    stage of a run collects once, and looked at all of them.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    if (factory := sys.modules.get("open_clip.factory")) is not None:  # its tokenizer reads 49,000 merges each time
        factory.SimpleTokenizer = functools.cache(factory.SimpleTokenizer)  # type: ignore[attr-defined]


def pytest_unconfigure() -> None:
    """Let the interpreter free all of it at its end."""
    gc.unfreeze()


SMALL_RECIPE = """
name: small
data: {source: icons, train_sets: [octicons], tasks: [heroicons, lucide]}
cluster: {num_fine: 16, num_experts: 2}
train: {model: modeclip-icon-xxxs, samples: 1024, batch_size: 32}
evaluate: {rule: per_class}
"""


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of the whole method on a few hundred real icons, seconds long."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(SMALL_RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """Make a folder once for all processes that test: a function of its name and of what fills it."""
    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        out = root / name
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.whole").exists():
                fill(out)
                (root / f"{name}.whole").touch()
        return out

    return make


@pytest.fixture(scope="session")
def small_run(small_recipe: Path, made_once: Callable[..., Path]) -> Path:
    """A finished run folder of that recipe, made by the real command; `test_pipeline` makes it with real processes."""

    def fill(out: Path) -> None:
        with training_here():
            done = run_here("run", small_recipe, "--out", out)
        assert done.returncode == 0, done.stderr

    return made_once("small", fill)


@pytest.fixture(scope="session")
def icons_catalog(made_once: Callable[..., Path]) -> Path:
    """A catalog of a few hundred real icons with their names, for reading; `icons_copy` may be changed."""

    def fill(out: Path) -> None:
        from modeclip.data.indexing import index
        from modeclip.data.sources import DataConfig

        index(DataConfig.from_flat({"source": "icons", "train_sets": ("octicons",)}), out)

    return made_once("icons", fill) / "catalog.lance"


@pytest.fixture(scope="module")
def icons_copy(icons_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A copy of that catalog that the tests of a module may add columns to."""
    from modeclip.data.catalog import Catalog

    return Catalog.open(shutil.copytree(icons_catalog, tmp_path_factory.mktemp("icons") / "catalog.lance"))


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty bucket of an S3 server on a free port of this machine, which the usual environment variables name."""
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    S3FileSystem.clear_instance_cache()  # one that another module opened knows another server
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        name = request.module.__name__.rpartition(".")[2].replace("_", "-")  # all servers of a process share buckets
        boto3.client("s3").create_bucket(Bucket=name)
        yield f"s3://{name}"
    S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def trains_here() -> Iterator[None]:
    """For tests that are not about processes: jobs are trained in this one."""
    with training_here():
        yield


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

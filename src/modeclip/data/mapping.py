"""Computing new columns of a catalog, one fragment at a time, in this process or on a Ray cluster.

Each fragment is one task: read its rows, do the work, write a file, note that it is finished. Tasks do not depend on
each other. They run one after the other in this process, or on a Ray cluster, which repeats a task whose worker died. A
killed map continues with the fragments that are not noted as finished; one commit shows all of them. When the same work
is given again, only fragments that were appended since are computed.

Price: what the work costs. Memory: the inputs and outputs of a fragment. Ray workers read and write the catalog
themselves, so its path must mean the same for all of them: one machine, a shared folder, or an object store.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from modeclip.data.catalog import Catalog, to_table
from modeclip.data.storage import (
    NEW,
    Ledger,
    missing_fragments,
    only_writer,
    read_schema,
    remove_files,
    write_column_file,
)
from modeclip.errors import ModeclipError
from modeclip.system.console import log, progress
from modeclip.system.files import writing

IMAGE = "image"
"""Input that stands for the encoded image, wherever it is stored."""
IMAGES_AT_ONCE = 1024
"""Rows of a block when images are read: about 100 MB of photographs."""
MAX_RETRIES = 3
"""How often Ray repeats a fragment whose worker died, so that one that always kills its worker fails in the end."""
TASKS_AHEAD = 4
"""Ray tasks submitted per processor; the others wait here, so that an interrupt has few to cancel."""


@runtime_checkable
class Work(Protocol):
    """A computation that `map_columns` applies to a catalog, block by block, wherever the blocks are.

    A stage that adds columns subclasses this, says what it reads and makes, and computes one block when it is called.
    Every Ray worker gets a pickled copy, so a work holds small things only and loads models at its first call.
    """

    inputs: tuple[str, ...]
    """Names of the columns that it reads; ``image`` stands for the encoded images."""
    outputs: tuple[str, ...]
    """Names of the columns that it makes."""
    unit: str
    """What the progress bar calls rows, in the plural ("captions")."""
    facts: dict[str, Any]
    """Everything that decides the result, as JSON. It is stored with the columns, which are stale once it differs."""

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Return the outputs for a block, which is a fragment or, if images are read, a part of one."""
        ...


def map_columns(catalog: Catalog, work: Work, description: str, *, ray: bool = False) -> int:
    """Add or replace the columns that some work makes, and return the number of rows that were computed.

    Args:
        catalog: A catalog; the columns are added to it.
        work: What to compute.
        description: Title of the progress bar.
        ray: Use the Ray cluster that ``RAY_ADDRESS`` names, one that runs on this machine, or a new one.

    Raises:
        ModeclipError: The work fails, ray is not installed, or another process is writing to the catalog.
    """
    dataset = catalog.dataset
    sizes = {fragment.fragment_id: fragment.physical_rows for fragment in dataset.get_fragments()}
    if any(fragment.num_deletions for fragment in dataset.get_fragments()):
        raise ModeclipError(f"catalog {catalog.path!r} has deleted rows: index again with --replace")
    is_new = any(name not in catalog.columns or catalog.facts(name) != work.facts for name in work.outputs)
    todo = set(sizes) if is_new else missing_fragments(dataset, work.outputs)
    if not todo:
        log(f"{description}: nothing to do, all {len(catalog):,} {work.unit} are done")
        return 0
    with writing(catalog.path), only_writer(catalog.path):
        ledger = Ledger(catalog.path, "-".join(("map", *work.outputs)), tuple[str, str])
        task = _Task(catalog.path, work, NEW if is_new else "", ledger, _plan(catalog, work, todo))
        done = task.finished()
        with progress(description, sum(sizes[part] for part in todo), work.unit) as advance:
            if done:
                log(f"{description}: continuing after {len(done):,} of {len(todo):,} fragments of an earlier run")
                advance(sum(sizes[part] for part in done))
            for part in (_run_on_ray if ray else _run_here)(task, sorted(todo - set(done))):
                advance(sizes[part])
        files = task.finished()
        if is_new:
            catalog.show(read_schema(catalog.path, next(iter(files.values()))), files, work.facts)
        else:
            catalog.add_files(files)
        ledger.clear()
    return sum(sizes[part] for part in todo)


def _plan(catalog: Catalog, work: Work, todo: set[int]) -> str:
    """Return a hash that is the same only for fragments of the same map."""
    identity = [catalog.fingerprint, work.inputs, work.outputs, work.facts, sorted(todo)]
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class _Task:
    """What to do with each fragment, in whichever process."""

    path: str
    work: Work
    prefix: str
    """Prefix of the names of the columns in the files."""
    ledger: Ledger[tuple[str, str]]
    plan: str

    def __call__(self, part: int) -> int:
        """Compute one fragment, write its file and note that it is finished."""
        catalog = Catalog.open(self.path, verify=False)  # whoever planned the map has looked at all files
        blocks = [self.work(block) for block in _blocks(catalog, part, self.work.inputs)]
        table = to_table({name: np.concatenate([block[name] for block in blocks]) for name in self.work.outputs})
        self.ledger.add(f"{part:06d}", (self.plan, write_column_file(self.path, table, self.prefix)))
        return part

    def finished(self) -> dict[int, str]:
        """Return the file of each finished fragment; files that another map left behind are removed."""
        parts = self.ledger.parts()
        if any(plan != self.plan for plan, _ in parts.values()):
            remove_files(self.path, [file for _, file in parts.values()])
            self.ledger.clear()
            return {}
        return {int(part): file for part, (_, file) in parts.items()}


def _blocks(catalog: Catalog, part: int, inputs: Sequence[str]) -> Iterator[dict[str, Shaped[np.ndarray, "n *_"]]]:
    """Read the inputs of a fragment as one block, or as several if images are among them."""
    if IMAGE not in inputs:
        yield catalog.read_fragment(inputs, part)
        return
    fragments = {fragment.fragment_id: fragment.physical_rows for fragment in catalog.dataset.get_fragments()}
    first = sum(rows for fragment, rows in fragments.items() if fragment < part)
    for start in range(first, first + fragments[part], IMAGES_AT_ONCE):
        rows = np.arange(start, min(start + IMAGES_AT_ONCE, first + fragments[part]))
        others = [name for name in inputs if name != IMAGE]
        block = catalog.read(others, rows) if others else {}
        encoded = np.empty(len(rows), object)
        encoded[:] = catalog.encoded_images(rows)
        yield block | {IMAGE: encoded}


def _run_here(task: _Task, parts: Sequence[int]) -> Iterator[int]:
    """Compute fragments one after the other."""
    yield from map(task, parts)


def _run_on_ray(task: _Task, parts: Sequence[int]) -> Iterator[int]:
    """Compute fragments as tasks of a Ray cluster, which repeats a task whose worker died."""
    try:
        import ray
    except ImportError:
        raise ModeclipError('--ray needs the package ray: pip install "modeclip[ray]"') from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    processors = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    log(f"on Ray with {processors} processors")
    shared, ahead = ray.put(task), TASKS_AHEAD * max(1, processors)
    remote = ray.remote(max_retries=MAX_RETRIES, num_cpus=1)(_do)
    waiting, under_way = deque(parts), set[Any]()
    try:
        while waiting or under_way:
            while waiting and len(under_way) < ahead:
                under_way.add(remote.remote(shared, waiting.popleft()))
            finished, _ = ray.wait(list(under_way), num_returns=1)
            under_way -= set(finished)
            yield from ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ModeclipError(
            f"Ray gave up on a fragment: {str(error).splitlines()[0]}; give the command again"
        ) from None
    finally:
        for reference in under_way:
            ray.cancel(reference)


_known_tasks: dict[tuple[str, str], _Task] = {}


def _do(task: _Task, part: int) -> int:
    """Compute a fragment in a Ray worker, which keeps the work and with it a loaded model for the next fragment."""
    identity = (task.path, task.plan)
    if identity not in _known_tasks:
        _known_tasks.clear()
        _known_tasks[identity] = task
    return _known_tasks[identity](part)

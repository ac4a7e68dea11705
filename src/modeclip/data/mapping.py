"""Computing over a catalog, one fragment at a time, in this process or on a Ray cluster: new columns, or statistics.

Each fragment is one task: read its rows, do the work, write a file, note that it is finished. Tasks do not depend on
each other. They run one after the other in this process, or on a Ray cluster, which repeats a task whose worker died. A
killed map continues with the fragments that are not noted as finished. When the same work is given again, only
fragments that were appended since are computed.

`map_columns` makes columns of the catalog, all of them visible in one commit. `map_fragments` keeps what it computes
beside the catalog: counts that add up over all fragments, or vectors that later stages read fragment by fragment.

Price: what the work costs. Memory: the inputs and outputs of a fragment. Ray workers read and write the catalog
themselves, so its path must mean the same for all of them: one machine, a shared folder, or an object store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from modeclip.data.catalog import Catalog, to_table
from modeclip.data.storage import (
    NEW,
    Ledger,
    files_with,
    missing_fragments,
    only_writer,
    read_column_file,
    read_schema,
    remove_files,
    write_column_file,
)
from modeclip.errors import DamagedError, ModeclipError
from modeclip.system.console import log, progress
from modeclip.system.files import writing

IMAGE = "image"
"""Input that stands for the encoded image, wherever it is stored."""
POSITION = "position"
"""Input that stands for the positions of the rows in the catalog, int64."""
IMAGES_AT_ONCE = 1024
"""Rows of a block when images are read: about 100 MB of photographs."""
MAX_RETRIES = 3
"""How often Ray repeats a fragment whose worker died, so that one that always kills its worker fails in the end."""
MAPPED_AT_ONCE = 256
"""Files of fragments that are open at a time; a process may have about a thousand."""
KINDS = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64, "U8": np.uint8}
"""Types of arrays that are read in parts, as safetensors names them."""
TASKS_AHEAD = 4
"""Ray tasks submitted per processor; the others wait here, so that an interrupt has few to cancel."""


@runtime_checkable
class Work(Protocol):
    """A computation that `map_columns` applies to a catalog, block by block, wherever the blocks are.

    A stage that adds columns subclasses this, says what it reads and makes, and computes one block when it is called.
    Every Ray worker gets a pickled copy, so a work holds small things only and loads models at its first call.
    """

    inputs: tuple[str, ...]
    """Names of the columns that it reads; ``image`` stands for the encoded images, ``position`` for the positions of
    the rows."""
    outputs: tuple[str, ...]
    """Names of the columns that it makes."""
    unit: str
    """What the progress bar calls rows, in the plural ("captions")."""
    facts: dict[str, Any]
    """Everything that decides the result, as JSON. It is stored with the columns, which are stale once it differs."""

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Return the outputs for a block, which is a fragment or, if images are read, a part of one."""
        ...


@runtime_checkable
class Statistic(Protocol):
    """A computation that `map_fragments` applies to a catalog: arrays of any length that can be merged.

    Counts are merged by adding them up, vectors by `concatenate`. As for a `Work`, every Ray worker gets a copy.
    """

    inputs: tuple[str, ...]
    """Names of the columns that it reads, as for a `Work`."""
    unit: str
    """What the progress bar calls rows, in the plural."""
    facts: dict[str, Any]
    """Everything that decides the result, as JSON."""

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Return the arrays of a block of rows, of numbers or booleans."""
        ...

    def merge(self, parts: Sequence[dict[str, Shaped[np.ndarray, "..."]]]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Return the arrays of consecutive blocks, or fragments, as those of one; there is at least one."""
        ...


def concatenate(parts: Sequence[dict[str, Shaped[np.ndarray, "..."]]]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Merge arrays that have a row for each row of their block, such as vectors."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def map_columns(
    catalog: Catalog,
    work: Work,
    description: str,
    *,
    ray: bool = False,
    check: Callable[[Iterator[dict[str, Shaped[np.ndarray, "n *_"]]]], None] | None = None,
) -> int:
    """Add or replace the columns that some work makes, and return the number of rows that were computed.

    Args:
        catalog: A catalog; the columns are added to it.
        work: What to compute.
        description: Title of the progress bar.
        ray: Use the Ray cluster that ``RAY_ADDRESS`` names, one that runs on this machine, or a new one.
        check: Looks at the new columns, fragment by fragment, before they are shown; where it raises, none is.

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
        if check is not None:
            try:
                check(read_column_file(catalog.path, files[part]) for part in sorted(files))
            except BaseException:
                remove_files(catalog.path, files.values())
                ledger.clear()
                raise
        if is_new:
            catalog.show(read_schema(catalog.path, next(iter(files.values()))), files, work.facts)
        else:
            catalog.add_files(files)
        ledger.clear()
    return sum(sizes[part] for part in todo)


def map_fragments(
    catalog: Catalog,
    statistic: Statistic,
    description: str,
    *,
    ray: bool = False,
    selected: Bool[np.ndarray, " N"] | None = None,
) -> Fragments:
    """Compute arrays for each fragment of a catalog and keep them beside it; return them.

    Args:
        catalog: A catalog; no column of it changes.
        statistic: What to compute. The same facts on the same rows are not computed again.
        description: Title of the progress bar.
        ray: As for `map_columns`.
        selected: Rows that the blocks shall hold, the others are left out; all by default.

    Raises:
        ModeclipError: The statistic fails, ray is not installed, or another process is writing to the catalog.
    """
    rows = {part.fragment_id: part.physical_rows for part in catalog.dataset.get_fragments()}
    chosen = {}
    if selected is not None:
        if len(selected) != len(catalog):
            raise ValueError(f"selected: expected {len(catalog):,} rows, got {len(selected):,}")
        ends = np.cumsum(list(rows.values()))
        chosen = {part: np.packbits(selected[end - rows[part] : end]) for part, end in zip(rows, ends, strict=True)}
    files = files_with(catalog.dataset, ("key", *statistic.inputs))  # the file with the keys has all of the pair
    states = {part: _hash([*files[part], chosen[part].tobytes().hex() if chosen else ""]) for part in rows}
    digest = _hash([statistic.inputs, statistic.facts])
    ledger = Ledger(catalog.path, f"fragments-{digest}", tuple[str, str])
    task = _Partial(catalog.path, statistic, ledger, digest, states, chosen)
    with writing(catalog.path), only_writer(catalog.path):
        done = task.finished()
        todo = sorted(rows.keys() - done)
        if todo:
            with progress(description, sum(rows[part] for part in todo), statistic.unit) as advance:
                for part in (_run_on_ray if ray else _run_here)(task, todo):
                    advance(rows[part])
    return Fragments(task, tuple(sorted(rows)), tuple(todo))


@dataclass(frozen=True)
class Fragments:
    """What `map_fragments` has computed: for each fragment, arrays by name, read when they are asked for."""

    _task: _Partial
    _parts: tuple[int, ...]
    computed: tuple[int, ...]
    """Fragments that were computed now; the others were there already."""

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[dict[str, Shaped[np.ndarray, "..."]]]:
        """Yield the arrays of one fragment after the other, in the order of their rows."""
        yield from map(self._task.read, self._parts)

    def rows(self, name: str) -> FragmentRows:
        """Return arrays that have a row for each row of their block, such as vectors, as one that is read in parts."""
        return FragmentRows(self._task, self._parts, name)

    def forget(self) -> None:
        """Remove what was kept: whoever computed it has written it elsewhere."""
        self._task.ledger.clear()

    def total(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Return the arrays of all fragments, merged; two fragments and the sum are in memory at a time."""
        total: dict[str, np.ndarray] = {}
        for arrays in self:
            total = self._task.statistic.merge([total, arrays]) if total else arrays
        return total


class FragmentRows:
    """The rows of one array of all fragments, in order: those that are asked for are read, by slices or positions.

    The files of a local catalog are memory-mapped, after each has been read once to see that it is whole.
    """

    def __init__(self, task: _Partial, parts: Sequence[int], name: str) -> None:
        self._task, self._parts, self._name = task, parts, name
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()
        lengths = []
        for part in parts:
            array = task.read(part)[name]
            lengths.append(len(array))
            self._row, self.dtype = array.shape[1:], array.dtype
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: slice | Int[np.ndarray, " n"]) -> Shaped[np.ndarray, "n *_"]:
        """Return some rows, in the order in which they are asked for."""
        positions = np.arange(len(self))[rows] if isinstance(rows, slice) else rows
        found = np.empty((len(positions), *self._row), self.dtype)
        of_part = np.searchsorted(self._ends, positions, side="right")
        for part in np.unique(of_part).tolist():
            here = of_part == part
            start = self._ends[part - 1] if part else 0
            found[here] = self._array(part)[positions[here] - start]
        return found

    def _array(self, part: int) -> Shaped[np.ndarray, "n *_"]:
        """Return the array of one fragment; a few that were used last stay open."""
        if part not in self._mapped:
            self._mapped[part] = self._task.map(self._parts[part], self._name)
            if len(self._mapped) > MAPPED_AT_ONCE:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(part)
        return self._mapped[part]


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _plan(catalog: Catalog, work: Work, todo: set[int]) -> str:
    """Return a hash that is the same only for fragments of the same map."""
    return _hash([catalog.fingerprint, work.inputs, work.outputs, work.facts, sorted(todo)])


@dataclass(frozen=True)
class _Partial:
    """Computes the arrays of each fragment, and reads them."""

    path: str
    statistic: Statistic
    ledger: Ledger[tuple[str, str]]
    plan: str
    states: dict[int, str]
    """A hash of each fragment's pairs and columns that are read, and of which of its rows are selected."""
    chosen: dict[int, UInt8[np.ndarray, " _"]] = field(repr=False)
    """The selected rows of each fragment as bits; empty: all are."""

    def __call__(self, part: int) -> int:
        """Compute the arrays of a fragment, write them, and note that it is finished."""
        from safetensors.numpy import save

        catalog = Catalog.open(self.path, verify=False)  # whoever planned the map has looked at all files
        bits = None
        if self.chosen:
            count = catalog.dataset.get_fragment(part).physical_rows
            bits = np.unpackbits(self.chosen[part], count=count).astype(bool)
        parts = [self.statistic(block) for block in _blocks(catalog, part, self.statistic.inputs, bits)]
        arrays = parts[0] if len(parts) == 1 else self.statistic.merge(parts)
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        self.ledger.add_file(f"{part:06d}", content)
        self.ledger.add(f"{part:06d}", (self.states[part], hashlib.blake2b(content, digest_size=16).hexdigest()))
        return part

    def finished(self) -> set[int]:
        """Return the fragments whose arrays are there; those of fragments that are gone or have changed are removed."""
        found = set()
        for name, (state, _) in self.ledger.parts().items():
            if self.states.get(int(name)) == state:
                found.add(int(name))
            else:
                self.ledger.remove(name)
        return found

    def read(self, part: int) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Read the arrays of a fragment; if they are damaged, they are computed again."""
        from safetensors.numpy import load

        name = f"{part:06d}"
        for _ in range(2):
            content, note = self.ledger.read_file(name), self.ledger.note(name)
            if content and note and hashlib.blake2b(content, digest_size=16).hexdigest() == note[1]:
                return dict(load(content))
            log(f"{self.path}: what was kept of the {self.statistic.unit} of fragment {part} is damaged; done again")
            self(part)
        raise DamagedError(f"{self.path}: what was computed of fragment {part} cannot be read back; check the disk")

    def map(self, part: int, name: str) -> Shaped[np.ndarray, "n *_"]:
        """Return one array of a fragment that has been read before, memory-mapped where its file is local."""
        path = self.ledger.local_file(f"{part:06d}")
        if path is None:
            return self.read(part)[name]
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(size))[name]
        kind = np.dtype(KINDS[about["dtype"]])
        if not math.prod(about["shape"]):
            return np.empty(about["shape"], kind)
        return np.memmap(path, kind, "r", 8 + size + about["data_offsets"][0], tuple(about["shape"]))


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


def map_blocks(catalog: Catalog, work: Work, description: str) -> dict[str, Shaped[np.ndarray, "N *_"]]:
    """Return what some work makes of all rows, without adding it to the catalog; all of it is in memory."""
    fragments = {part.fragment_id: part.physical_rows for part in catalog.dataset.get_fragments()}
    found: list[dict[str, np.ndarray]] = []
    with progress(description, sum(fragments.values()), work.unit) as advance:
        for part, rows in fragments.items():
            found += [work(block) for block in _blocks(catalog, part, work.inputs)]
            advance(rows)
    return {name: np.concatenate([block[name] for block in found]) for name in work.outputs}


def _blocks(
    catalog: Catalog, part: int, inputs: Sequence[str], chosen: Bool[np.ndarray, " n"] | None = None
) -> Iterator[dict[str, Shaped[np.ndarray, "n *_"]]]:
    """Read the inputs of a fragment, or of some of its rows, as one block, or as several if images are among them."""
    fragments = {fragment.fragment_id: fragment.physical_rows for fragment in catalog.dataset.get_fragments()}
    first = sum(rows for fragment, rows in fragments.items() if fragment < part)
    columns = [name for name in inputs if name not in {IMAGE, POSITION}]
    rows = first + (np.arange(fragments[part]) if chosen is None else np.flatnonzero(chosen))
    if IMAGE not in inputs:
        block = catalog.read_fragment(columns, part) if columns else {}
        block = block if chosen is None else {name: values[chosen] for name, values in block.items()}
        yield block | ({POSITION: rows} if POSITION in inputs else {})
        return
    for start in range(0, max(1, len(rows)), IMAGES_AT_ONCE):
        some = rows[start : start + IMAGES_AT_ONCE]
        block = catalog.read(columns, some) if columns else {}
        encoded = np.empty(len(some), object)
        encoded[:] = catalog.encoded_images(some)
        yield block | {IMAGE: encoded} | ({POSITION: some} if POSITION in inputs else {})


def _run_here(task: _Task | _Partial, parts: Sequence[int]) -> Iterator[int]:
    """Compute fragments one after the other."""
    yield from map(task, parts)


def _run_on_ray(task: _Task | _Partial, parts: Sequence[int]) -> Iterator[int]:
    """Compute fragments as tasks of a Ray cluster, which repeats a task whose worker died."""
    try:
        import ray
    except ImportError:
        raise ModeclipError('--ray needs the package ray: pip install "modeclip[ray]"') from None
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray's own, of many kinds
            reason = " ".join(str(error).split())[:200]
            raise ModeclipError(
                f"--ray: Ray cannot be started or reached ({reason}); give the same command again, correct RAY_ADDRESS,"
                " or leave out --ray"
            ) from error
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


_known_tasks: dict[tuple[str, str], _Task | _Partial] = {}


def _do(task: _Task | _Partial, part: int) -> int:
    """Compute a fragment in a Ray worker, which keeps the work and with it a loaded model for the next fragment."""
    identity = (task.path, task.plan)
    if identity not in _known_tasks:
        _known_tasks.clear()
        _known_tasks[identity] = task
    return _known_tasks[identity](part)

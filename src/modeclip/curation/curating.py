"""Curating a catalog: ask a method, and add what it decides about each pair as columns.

Price: that of the method; the decisions themselves take a byte per pair of memory while they are explained. Killed at
any moment, the same call goes on: statistics of finished fragments and decided fragments are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast, get_origin, get_type_hints

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from modeclip.curation.method import KEPT, MAX_CAUSES, OUTSIDE, Context, Method, Prepared
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import POSITION, Work, map_blocks, map_columns
from modeclip.data.selection import Selection
from modeclip.data.storage import files_with
from modeclip.errors import ModeclipError, unknown
from modeclip.system.files import only_process
from modeclip.system.paths import is_url

METHODS: dict[str, str] = {
    "align": "align:AlignConfig",
    "klite": "klite:KliteConfig",
    "dfn": "dfn:DfnConfig",
    "duplicates": "duplicates:DuplicatesConfig",
    "metaclip": "metaclip:MetaclipConfig",
}
"""Where the config of each method is: its module in this package, and its class."""
NAMES = re.compile("[a-z][a-z0-9_]{0,40}")
"""What the name of a curation looks like."""
CURATION_FOLDER = "_modeclip/curation"
"""Folder in a local catalog whose lock a curation holds."""
FORMAT = 1
"""Part of every curation's facts; raise it when the same settings start to decide otherwise."""


@dataclass(frozen=True, kw_only=True)
class Curated:
    """What a curation has decided about a catalog's pairs."""

    catalog: Catalog
    """The catalog, with the columns if they were written."""
    name: str
    """What the names of the columns begin with."""
    method: Method
    """The method and its settings."""
    prepared: Prepared
    """What the method found out about the pool."""
    num_computed: int
    """Pairs that were decided about now; the others had been before, by the same settings."""
    values: dict[str, Shaped[np.ndarray, "N *_"]] | None = field(default=None, repr=False)
    """The columns, where they were not written."""

    @property
    def causes(self) -> dict[int, str]:
        """The words for each cause."""
        return {KEPT: "kept", **dict(enumerate(self.prepared.causes, 1)), OUTSIDE: "not in the selection"}

    def column(self, what: str) -> Shaped[np.ndarray, "N *_"]:
        """Return a column of all rows by the end of its name: ``cause``, ``kept``, ``score``, ..."""
        full = f"{self.name}_{what}"
        if self.values is not None:
            return self.values[full]
        return self.catalog.read([full])[full]

    @property
    def added(self) -> tuple[str, ...]:
        """Ends of the names of its columns."""
        names = self.prepared.work.outputs
        return ("kept", *(name.removeprefix(f"{self.name}_") for name in names))


def load_method(name: str) -> type[Any]:
    """Return the class of a method's config.

    Raises:
        ModeclipError: There is no such method.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    module, _, config = METHODS[name].partition(":")
    found: type[Any] = getattr(import_module(f"modeclip.curation.{module}"), config)
    return found


def make_method(name: str, **settings: Any) -> Method:
    """Return a method with some settings; where several values may be given, one need not be in a list.

    Raises:
        ModeclipError: There is no such method, it has no such setting, or it refuses a value.
    """
    from pydantic import TypeAdapter, ValidationError

    config = load_method(name)
    kinds = _check_settings(name, config, settings)
    for setting, given in list(settings.items()):
        value = str(given) if isinstance(given, Path) else given
        is_one = get_origin(kinds[setting]) is tuple and not isinstance(value, list | tuple)
        settings[setting] = (value,) if is_one else value
    try:
        found: Method = TypeAdapter(config).validate_python(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "value_error":  # a range that the config itself checks; its message names the field
            raise ModeclipError(problem["msg"].removeprefix("Value error, ")) from None
        place = ".".join(map(str, (name, *problem["loc"])))
        raise ModeclipError(f"{place}: {problem['msg']}, got {problem['input']!r}") from None
    return found


def _check_settings(place: str, config: type[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Raise for the first setting that a config, or one inside it, does not have; return the types of its fields."""
    kinds = {known.name: get_type_hints(config)[known.name] for known in fields(config)}
    for setting, value in settings.items():
        if setting not in kinds:
            raise unknown(f"setting of {place}", setting, kinds)
        if is_dataclass(kinds[setting]) and isinstance(value, dict):
            _check_settings(f"{place}.{setting}", kinds[setting], value)
    return kinds


def check_name(name: str) -> None:
    """Raise for what cannot be the beginning of the names of columns."""
    if not NAMES.fullmatch(name):
        raise ModeclipError(
            f"curate: a name of columns has a letter first and then lower-case letters, digits and _, got {name!r}"
        )


def curate(
    catalog: Catalog,
    method: Method | str,
    *,
    name: str | None = None,
    selection: Selection | None = None,
    dry_run: bool = False,
    ray: bool = False,
    **settings: Any,
) -> Curated:
    """Decide with a method about each pair of a catalog, and add the decisions as columns.

    The same call again does nothing; pairs that were added since are decided about, and all others again only where
    these change what holds for the whole pool.

    Args:
        catalog: Any catalog.
        method: The config of a method, or its name.
        name: What the names of the columns begin with; the method's name by default.
        selection: Pairs that are curated; the others are marked as not looked at. All by default.
        dry_run: Decide, but add no column. What is dear to compute is kept beside the catalog all the same.
        ray: Compute on a Ray cluster, as `modeclip.data.mapping.map_columns` says.
        **settings: Settings of the method where its name is given.

    Raises:
        ModeclipError: There is no such method or setting, the settings do not fit the pool, nothing would be kept, or
            another process is curating or writing to the catalog.
    """
    method = make_method(method, **settings) if isinstance(method, str) else method
    name = method.method if name is None else name
    check_name(name)
    with _only_curation(catalog):
        selected = None if selection is None or selection.is_all else selection.mask_of(catalog)
        chosen_by = None if selected is None or selection is None else selection.facts(catalog)
        context = Context(catalog=catalog, name=name, selected=selected, selection=chosen_by, ray=ray)
        prepared = method.prepare(context)
        if len(prepared.causes) > MAX_CAUSES:
            raise ValueError(f"{method.method}: at most {MAX_CAUSES} causes, got {len(prepared.causes)}")
        facts = {"format": FORMAT, "name": name, "method": method.method, "config": asdict(cast(Any, method))}
        facts |= {"selection": chosen_by, "causes": list(prepared.causes), "decided_by": prepared.work.facts}
        bits = None if selected is None else np.packbits(selected)
        facts |= _content(catalog, prepared.work, bits)
        facts = json.loads(json.dumps(facts))  # as they are read back, with lists for tuples
        decision = _Decision(name=name, work=prepared.work, bits=bits, facts=facts)
        _check_columns(catalog, decision)
        if dry_run:
            values = map_blocks(catalog, decision, f"{name}: decide, writing nothing")
            _check_kept(name, prepared, [values])
            return Curated(
                catalog=catalog, name=name, method=method, prepared=prepared, num_computed=len(catalog), values=values
            )
        grows = decision.outputs[0] in catalog.columns and catalog.facts(decision.outputs[0]) == decision.facts
        num_computed = map_columns(
            catalog,
            decision,
            f"{name}: decide",
            ray=ray,
            check=None if grows else lambda found: _check_kept(name, prepared, found),
        )
        if old := [column for column in columns_of(catalog, name) if column not in decision.outputs]:
            catalog.remove_columns(old)  # of earlier settings
        return Curated(catalog=catalog, name=name, method=method, prepared=prepared, num_computed=num_computed)


@dataclass(frozen=True, kw_only=True)
class _Decision(Work):
    """A method's work on the selected rows; the others are marked as not looked at."""

    name: str
    work: Work
    bits: UInt8[np.ndarray, " _"] | None
    """Whether each row of the catalog is selected; None if all are."""
    facts: dict[str, Any]
    unit: str = "pairs"

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the columns that it reads."""
        return tuple(dict.fromkeys((*self.work.inputs, POSITION)))

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the columns that it makes."""
        return (f"{self.name}_kept", *self.work.outputs)

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Decide about the rows of a block."""
        chosen = self.selected(block[POSITION])
        if chosen.all():
            found = self.work(block)
        else:
            some = self.work({name: values[chosen] for name, values in block.items()})
            found = {name: _scatter(name, values, chosen) for name, values in some.items()}
            found[f"{self.name}_cause"][~chosen] = OUTSIDE
        return {f"{self.name}_kept": found[f"{self.name}_cause"] == KEPT} | found

    def selected(self, positions: Shaped[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Return whether rows are among those that are curated."""
        if self.bits is None:
            return np.ones(len(positions), bool)
        places = (7 - (positions & 7)).astype(np.uint8)
        return np.asarray(self.bits[positions >> 3] >> places & 1, bool)


def _scatter(
    name: str, values: Shaped[np.ndarray, "m *_"], chosen: Bool[np.ndarray, " n"]
) -> Shaped[np.ndarray, "n *_"]:
    """Bring the values of a column to the chosen rows; the others have none, the probability 0, and the row -1."""
    whole = np.zeros((len(chosen), *values.shape[1:]), values.dtype)
    if values.dtype.kind == "O":
        whole[:] = None
    elif values.dtype.kind == "f" and not name.endswith("_probability"):
        whole[:] = np.nan
    elif name.endswith("_of"):
        whole[:] = -1
    whole[chosen] = values
    return whole


def _content(catalog: Catalog, work: Work, bits: UInt8[np.ndarray, " _"] | None) -> dict[str, str]:
    """Return hashes of what may be another under the same name: the rows that are selected, columns that were added."""
    found = {} if bits is None else {"selected": hashlib.blake2b(bits.tobytes(), digest_size=16).hexdigest()}
    added = [name for name in work.inputs if name in catalog.columns and catalog.facts(name) is not None]
    if added:
        files = json.dumps(sorted(files_with(catalog.dataset, added).items()))
        found["columns"] = hashlib.blake2b(files.encode(), digest_size=16).hexdigest()
    return found


def _check_columns(catalog: Catalog, decision: _Decision) -> None:
    """Raise if a column of another origin would be replaced."""
    for column in decision.outputs:
        if column in catalog.columns and column not in columns_of(catalog, decision.name):
            raise ModeclipError(
                f"curate: {catalog.path!r} has a column {column!r} that no curation made: choose another --column"
            )


def _check_kept(name: str, prepared: Prepared, blocks: Iterable[dict[str, Shaped[np.ndarray, "n *_"]]]) -> None:
    """Raise if nothing is kept."""
    counts: Counter[int] = Counter()
    for block in blocks:
        codes, numbers = np.unique(block[f"{name}_cause"], return_counts=True)
        counts.update(dict(zip(codes.tolist(), numbers.tolist(), strict=True)))
    if not counts[KEPT]:
        reasons = [f"{counts[code]:,} {cause}" for code, cause in enumerate(prepared.causes, 1) if counts[code]]
        raise ModeclipError(
            f"curate: {name} would keep none of {counts.total() - counts[OUTSIDE]:,} pairs ({'; '.join(reasons)}),"
            " so nothing was written; choose milder settings"
        )


def _only_curation(catalog: Catalog) -> AbstractContextManager[None]:
    """Keep others from curating a local catalog at the same time."""
    if is_url(catalog.path):
        return nullcontext()
    folder = Path(catalog.path) / CURATION_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return only_process(folder)


def columns_of(catalog: Catalog, name: str) -> list[str]:
    """Return the columns that a curation of some name has added to a catalog."""
    facts = {column: catalog.facts(column) or {} for column in catalog.columns}
    return [column for column, known in facts.items() if "decided_by" in known and known["name"] == name]


def curations_of(catalog: Catalog) -> list[str]:
    """Return the names of the curations whose columns a catalog has."""
    facts = [catalog.facts(column) or {} for column in catalog.columns]
    return list(dict.fromkeys(known["name"] for known in facts if "decided_by" in known))

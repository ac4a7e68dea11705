"""Selections: which pairs of a catalog a stage works on, by conditions on columns and by a mask.

A condition is ``COLUMN=VALUE``, such as ``expert=3`` or ``site=north``, a column of booleans, or whatever Lance takes
as a filter in SQL: ``dfn_score > 0.3 AND site = 'north'``. A mask is a column of booleans, which a curation adds, or a
list of ids as DataComp exchanges them. A pair is selected if all conditions and the mask hold; a missing value fits no
condition that does not ask for it (``site IS NULL``).

Every stage takes a selection in the same words, ``--where`` and ``--mask``, and nothing is ever deleted.

Price: one pass over the columns that are named. Memory: a byte for each row, and the positions of the selected ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, Shaped

from modeclip.data.catalog import Catalog
from modeclip.data.storage import missing_fragments
from modeclip.data.subsets import read_uids, uid_mask
from modeclip.errors import ModeclipError, unknown
from modeclip.system.paths import home_path

EXPECTED = "expected COLUMN=VALUE, such as expert=3 or site=north, or a condition in SQL: \"width > 64 AND site = 'x'\""
_EQUAL = re.compile(r"\s*`?(?P<column>[^`=<>!]*[^`=<>!\s])`?\s*=\s*(?P<value>[^=\s].*?)\s*", re.DOTALL)
"""A condition of the form COLUMN=VALUE."""
_QUOTED = re.compile(r"(?P<quote>['\"])(?:(?!(?P=quote)).)*(?P=quote)", re.DOTALL)
"""A text in quotes that holds no such quote."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which pairs of a catalog are meant: those for which all conditions and the mask hold."""

    where: tuple[str, ...] = ()
    """Conditions: COLUMN=VALUE, a column of booleans, or SQL."""
    mask: str | None = None
    """Column of booleans, or a .npy list of ids (`modeclip.data.subsets`)."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Selection:
        """Return the selection that JSON holds, as ``asdict`` makes it."""
        return cls(where=tuple(content.get("where", ())), mask=content.get("mask"))

    @property
    def is_all(self) -> bool:
        """Whether all pairs are meant."""
        return not self.where and self.mask is None

    def __str__(self) -> str:
        """Return it as on a command line."""
        words = [f"--where {word!r}" for word in self.where] + ([f"--mask {self.mask}"] if self.mask else [])
        return " ".join(words) or "all pairs"

    def absolute(self) -> Selection:
        """Return it with the whole path of its list of ids, for work that may go on in another folder."""
        is_list = self.mask is not None and _is_list(self.mask)
        return replace(self, mask=str(home_path(self.mask or "").resolve())) if is_list else self

    def narrowed(self, *where: str) -> Selection:
        """Return the selection of those pairs for which further conditions hold too."""
        return Selection(where=(*self.where, *where), mask=self.mask)

    def mask_of(self, catalog: Catalog) -> Bool[np.ndarray, " N"]:
        """Return for each row of a catalog whether it is selected.

        Raises:
            ModeclipError: A condition is none or names no column, the mask is no column of booleans, a stage has not
                filled a column for all rows, or nothing is selected.
        """
        chosen = np.ones(len(catalog), bool)
        if self.is_all:
            return chosen
        for word in self.where:
            with _naming(word):
                chosen &= _holds(catalog, word)
        if self.mask is not None:
            chosen &= self._marked(catalog, self.mask)
        if not chosen.any():
            raise ModeclipError(
                f"catalog {catalog.path!r} has no pair that {self} selects; choose others"
                + (" (a text in SQL has single quotes, a name of a column none)" if self.where else "")
            )
        return chosen

    def rows(self, catalog: Catalog) -> Int[np.ndarray, " n"]:
        """Return the positions of the selected rows, ascending; errors as for ``mask_of``."""
        return np.arange(len(catalog)) if self.is_all else np.flatnonzero(self.mask_of(catalog))

    def part_of(self, catalog: Catalog) -> Catalog:
        """Return the selected pairs as a catalog of their own to look at, whose rows are counted from 0."""
        return catalog if self.is_all else CatalogPart(catalog, self.rows(catalog))

    def facts(self, catalog: Catalog) -> dict[str, Any]:
        """Return all that decides, for the same pairs, which of them are selected, as JSON; nothing for all pairs.

        Raises:
            ModeclipError: A condition or the mask names no column, or the list of ids cannot be read.
        """
        if self.is_all:
            return {}
        columns = set[str]()
        for word in self.where:
            with _naming(word):
                columns |= set(_columns_of(catalog, word))
        found: dict[str, Any] = {"where": list(self.where), "mask": self.mask}
        if self.mask is not None and _is_list(self.mask):
            found["ids"] = hashlib.blake2b(read_uids(self.mask).tobytes(), digest_size=16).hexdigest()
        elif self.mask is not None:
            columns.add(self.mask)
        return found | {"columns": {name: catalog.facts(name) for name in sorted(columns)}}

    def split(self, catalog: Catalog) -> tuple[dict[str, int | float | str | bool], Selection]:
        """Return what is said as COLUMN=VALUE, as values of columns, and the selection of all the rest.

        Raises:
            ModeclipError: A condition names no column, or a value that it cannot have.
        """
        values: dict[str, int | float | str | bool] = {}
        others: list[str] = []
        for word in self.where:
            with _naming(word):
                ((column, value),) = (_parse_equal(catalog, word) or {"": None}).items()
            if isinstance(value, int | float | str | bool) and column not in values:
                values[column] = value
            else:
                others.append(word)
        return values, Selection(where=tuple(others), mask=self.mask)

    def _marked(self, catalog: Catalog, mask: str) -> Bool[np.ndarray, " N"]:
        if _is_list(mask):
            return _listed(catalog, mask, home_path(mask).stat().st_mtime_ns if home_path(mask).is_file() else 0)
        try:
            _check_filled(catalog, [mask])
            kind = catalog.type_of(mask)
            if kind != "bool":
                raise ModeclipError(f"column {mask!r} holds {kind}, expected booleans or a .npy list of ids")
        except ModeclipError as error:
            raise type(error)(f"--mask {mask}: {error}") from error
        return _to_mask(catalog, catalog.select_equal({mask: True}))


class CatalogPart(Catalog):
    """Some rows of a catalog, to be read as if there were no others; nothing can be added to it."""

    def __init__(self, whole: Catalog, rows: Int[np.ndarray, " n"]) -> None:
        super().__init__(whole.dataset, whole.path)
        self._damaged = dict(whole.damaged)
        self.rows = rows
        """Positions in the whole catalog, ascending."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Hash of the whole catalog's fingerprint and of the rows."""
        return hashlib.blake2b(super().fingerprint.encode() + self.rows.tobytes(), digest_size=16).hexdigest()

    def select_where(self, condition: str) -> Int[np.ndarray, " n"]:
        """Return the positions, among these rows, of those for which a condition in SQL holds."""
        return np.flatnonzero(np.isin(self.rows, super().select_where(condition), assume_unique=True))

    def read_fragment(self, columns: Sequence[str], fragment: int) -> dict[str, Shaped[np.ndarray, "n *_"]]:
        """Refuse: fragments belong to the whole catalog."""
        raise NotImplementedError("a part of a catalog is read by rows")

    def add_columns(
        self, values: Mapping[str, Any] | Iterable[Mapping[str, Any]], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Refuse: columns belong to the whole catalog."""
        raise NotImplementedError("columns are added to the whole catalog")

    def show(self, schema: pa.Schema, files: Mapping[int, str], facts: Mapping[str, Any]) -> None:
        """Refuse: columns belong to the whole catalog."""
        raise NotImplementedError("columns are added to the whole catalog")

    def _table(self, columns: Sequence[str], rows: Int[np.ndarray, " n"] | None) -> pa.Table:
        return super()._table(columns, self.rows if rows is None else self.rows[rows])

    def _batches(self, columns: Sequence[str], batch_size: int | None = None) -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in super()._batches(columns, batch_size):
            low, high = np.searchsorted(self.rows, [start, start + batch.num_rows])
            yield batch.take(pa.array(self.rows[low:high] - start))
            start += batch.num_rows


ALL = Selection()
"""All pairs."""


@contextmanager
def _naming(word: str) -> Iterator[None]:
    """Say which condition is wrong."""
    try:
        yield
    except ModeclipError as error:
        raise type(error)(f"--where {word!r}: {error}") from error


def _is_list(mask: str) -> bool:
    return mask.endswith(".npy")


@lru_cache(maxsize=1)
def _listed(catalog: Catalog, path: str, _changed: int) -> Bool[np.ndarray, " N"]:
    """Return which rows a list of ids names; all models of a run ask for the same list."""
    mask = uid_mask(catalog, path)
    mask.flags.writeable = False
    return mask


def _to_mask(catalog: Catalog, rows: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " N"]:
    found = np.zeros(len(catalog), bool)
    found[rows] = True
    return found


def _holds(catalog: Catalog, word: str) -> Bool[np.ndarray, " N"]:
    """Return for each row whether a condition holds."""
    _check_filled(catalog, _columns_of(catalog, word))
    equals = _parse_equal(catalog, word)
    return _to_mask(catalog, catalog.select_where(word) if equals is None else catalog.select_equal(equals))


def _parse_equal(catalog: Catalog, word: str) -> dict[str, object] | None:
    """Return the column and its value if a condition is COLUMN=VALUE or a column of booleans; None if it is SQL.

    ``group=a AND b`` is a text of the column ``group``. ``expert=3 AND width > 9`` cannot be a number, so it is SQL.
    So is ``group = 'a' OR group = 'b'``, since the quotes are not around all of it.
    """
    name = word.strip()
    if name in catalog.columns:
        if catalog.type_of(name) != "bool":
            raise ModeclipError(f"column {name!r} holds {catalog.type_of(name)}, no booleans; {EXPECTED}")
        return {name: True}
    found = _EQUAL.fullmatch(word)
    if found is None:
        return None
    name, value = found["column"].strip(), found["value"]
    if name not in catalog.columns:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            return None
        raise unknown(f"column of {catalog.path!r}", name, catalog.columns)
    if value[0] in "'\"" and not _QUOTED.fullmatch(value):
        return None
    try:
        return {name: catalog.parse_value(name, value)}
    except ModeclipError:
        if re.fullmatch(r"\S+|['\"].*", value, re.DOTALL):  # one word: a value of another type, and no SQL
            raise
        return None


def _columns_of(catalog: Catalog, word: str) -> list[str]:
    """Return the columns that a condition reads."""
    equals = _parse_equal(catalog, word)
    return catalog.columns_of(word) if equals is None else list(equals)


def _check_filled(catalog: Catalog, columns: Iterable[str]) -> None:
    """Raise if a stage has not filled one of some columns for rows that were added later."""
    for name in columns:
        if catalog.facts(name) is not None and missing_fragments(catalog.dataset, [name]):
            raise ModeclipError(
                f"column {name} of {catalog.path!r} has no values for pairs that were added later: give the command"
                " that made it again, which computes only what is missing"
            )

"""Subsets as DataComp exchanges them: lists of ids that say which pairs were chosen.

A uid is 128 bits, written as 32 hexadecimal digits. A subset is a .npy file with a sorted array of dtype ``u8,u8``: the
first 16 digits and the last 16 as numbers. A catalog made from DataComp's shards has the uids in a column. If there is
no such column, a pair's uid is the MD5 of its key in UTF-8, which stays the same wherever the data are indexed.

Price: one pass over the column. Memory: twice the list, and a byte per row.

Source: the DataComp benchmark (arXiv 2304.14108), whose tools read and write such files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Shaped, UInt8

from modeclip.data.catalog import PAIR_COLUMNS, Catalog
from modeclip.errors import ModeclipError
from modeclip.system.console import log, progress
from modeclip.system.files import replacing, writing
from modeclip.system.paths import home_path

UID_DTYPE = np.dtype("<u8,<u8")
DIGITS = 32

_NIBBLES = np.full(256, 255, np.uint8)
_NIBBLES[list(b"0123456789abcdef")] = range(16)
_NIBBLES[list(b"ABCDEF")] = range(10, 16)

Uids = Shaped[np.ndarray, " U"]
"""Array of dtype ``UID_DTYPE``."""


@dataclass(frozen=True, kw_only=True)
class UidMatch:
    """The rows of a catalog whose uids are in a list."""

    mask: Bool[np.ndarray, " N"]
    """Whether the uid of each row is in the list."""
    num_uids: int
    """Distinct uids in the list."""
    num_unknown: int
    """Uids that no row has."""
    first_unknown: str
    """The first of these; empty if there are none."""
    origin: str
    """Where the uids of the rows come from, in words."""


def read_uids(path: Path | str) -> Uids:
    """Read a subset, and sort it if it is not sorted.

    Returns:
        Distinct uids, ascending, dtype ``u8,u8``.

    Raises:
        ModeclipError: The file is missing or does not hold such a list.
    """
    path = home_path(path)
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ModeclipError(f"no id list at {str(path)!r}: expected a .npy file of dtype u8,u8") from None
    except (ValueError, EOFError, OSError) as error:
        raise ModeclipError(f"id list {str(path)!r} cannot be read ({error}): expected a .npy of u8,u8") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or not _is_pairs(array.dtype):
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise ModeclipError(
            f"id list {str(path)!r} holds {found}: expected DataComp's one-dimensional array of dtype u8,u8;"
            " modeclip.data.subsets.write_uids makes one from hexadecimal uids"
        )
    return _sort(array.astype(UID_DTYPE, copy=False))


def write_uids(path: Path | str, uids: Uids | Sequence[str]) -> None:
    """Write a subset that DataComp's tools can read: distinct uids, sorted.

    Args:
        path: The .npy file; an existing one is replaced as a whole.
        uids: Array of dtype ``u8,u8``, or texts of 32 hexadecimal digits, in any order.

    Raises:
        ModeclipError: A text is no uid, or the disk is full.
    """
    path = home_path(path)
    array = uids if isinstance(uids, np.ndarray) and _is_pairs(uids.dtype) else parse_uids(list(uids))
    with writing(path), replacing(path) as part, part.open("wb") as file:
        np.save(file, _sort(array.astype(UID_DTYPE, copy=False)))


def parse_uids(texts: Sequence[str]) -> Uids:
    """Return texts of 32 hexadecimal digits as pairs of numbers, in their order.

    Raises:
        ModeclipError: A text is no uid.

    Examples:
        >>> parse_uids(["000000000000000a00000000000000ff"]).tolist()
        [(10, 255)]
    """
    digits = _read_digits(pa.array(texts, pa.large_string()))
    return _to_pairs(digits)


def format_uids(uids: Uids) -> list[str]:
    """Return uids as texts of 32 hexadecimal digits."""
    return [f"{high:016x}{low:016x}" for high, low in uids.tolist()]


def uids_of(catalog: Catalog, rows: Int[np.ndarray, " n"] | None = None, column: str = "uid") -> Uids:
    """Return the uids of some rows in their order, or of all rows.

    Args:
        catalog: The catalog.
        rows: The rows; all by default.
        column: Column of uids. If there is no column ``uid``, the uids are made from the keys.

    Raises:
        ModeclipError: A row has no uid, or there is no such column.
    """
    source, _ = _choose(catalog, column)
    if rows is not None:
        return _uids_in(catalog.read([source], rows)[source], source, column)
    parts = [_uids_in(block[source], source, column) for block in catalog.batches([source])]
    return np.concatenate([np.empty(0, UID_DTYPE), *parts])


def uid_mask(catalog: Catalog, uids: Path | str | Uids, column: str = "uid") -> Bool[np.ndarray, " N"]:
    """Return for each row whether its uid is in a list, and log how many uids no row has.

    Args:
        catalog: The catalog.
        uids: The list, or the file that holds it.
        column: Column of uids. If there is no column ``uid``, the uids are made from the keys.

    Raises:
        ModeclipError: No row has any of the uids, a row's text is no uid, or there is no such column.
    """
    match = match_uids(catalog, uids, column)
    log(f"id list: {match.mask.sum():,} of {len(match.mask):,} pairs, {match.num_uids:,} ids ({match.origin})")
    if match.num_unknown:
        log(f"id list: {match.num_unknown:,} ids belong to no pair of the catalog, such as {match.first_unknown}")
    if match.num_uids and match.num_unknown == match.num_uids:
        raise ModeclipError(
            f"none of {match.num_uids:,} ids is in {str(catalog.path)!r} ({match.origin}): expected ids of this"
            " catalog's pairs; correct the list or the column"
        )
    return match.mask


def mark_uids(catalog: Catalog, uids: Path | str | Uids, into: str = "kept", column: str = "uid") -> UidMatch:
    """Mark in a column of booleans which rows have a uid of a list; arguments and errors as for `match_uids`.

    Args:
        catalog: The catalog.
        uids: The list, or the file that holds it.
        into: Name of the column. One that holds booleans is replaced.
        column: Column of uids.

    Raises:
        ModeclipError: There is a column of this name that holds something else, or that belongs to the pairs.
    """
    if into in PAIR_COLUMNS or (into in catalog.columns and catalog.type_of(into) != "bool"):
        raise ModeclipError(
            f"column {into!r} of {catalog.path!r} is no mask, but holds {catalog.type_of(into)}; give another name"
        )
    if not re.fullmatch(r"\w[\w.-]*", into):
        raise ModeclipError(f"{into!r} is no name of a column; expected letters, digits and _, such as my_pairs")
    wanted = _sort(uids.astype(UID_DTYPE, copy=False)) if isinstance(uids, np.ndarray) else read_uids(uids)
    match = match_uids(catalog, wanted, column)
    facts = {"uids": "" if isinstance(uids, np.ndarray) else str(uids), "ids": match.origin}
    facts["digest"] = hashlib.blake2b(wanted.tobytes(), digest_size=16).hexdigest()
    catalog.add_columns({into: match.mask}, facts=facts)
    return match


def match_uids(catalog: Catalog, uids: Path | str | Uids, column: str = "uid") -> UidMatch:
    """Find the rows whose uid is in a list.

    Args:
        catalog: The catalog. Rows without a uid (null) match nothing.
        uids: The list, or the file that holds it.
        column: Column of uids. If there is no column ``uid``, the uids are made from the keys.

    Raises:
        ModeclipError: A row's text is no uid, or there is no such column.
    """
    wanted = _sort(uids.astype(UID_DTYPE, copy=False)) if isinstance(uids, np.ndarray) else read_uids(uids)
    source, origin = _choose(catalog, column)
    table, found = _as_bytes(wanted), np.zeros(len(wanted), bool)
    mask, start = np.zeros(len(catalog), bool), 0
    with progress("match ids", len(catalog), "pairs") as advance:
        for known, values in _stream(catalog, source, column):
            places = np.searchsorted(table, values)
            places[places == len(table)] = 0
            hits = table[places] == values if len(table) else np.zeros(len(values), bool)
            found[places[hits]] = True
            mask[start : start + len(known)][known] = hits
            start += len(known)
            advance(len(known))
    unknown = np.flatnonzero(~found)
    return UidMatch(
        mask=mask,
        num_uids=len(wanted),
        num_unknown=len(unknown),
        first_unknown=format_uids(wanted[unknown[:1]])[0] if len(unknown) else "",
        origin=origin,
    )


def _choose(catalog: Catalog, column: str) -> tuple[str, str]:
    """Return the column to read and a line about it: the keys if there is no column ``uid``."""
    if column != "uid" or "uid" in catalog.columns:
        return column, f"column {column!r}"
    return "key", "no column 'uid': made from the keys by MD5"


def _stream(catalog: Catalog, source: str, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for consecutive blocks of rows which have a uid, and these uids as sortable bytes."""
    for block in catalog.batches([source]):
        values = block[source]
        known = np.array(pc.is_valid(pa.array(values, pa.large_string())))
        yield known, _as_bytes(_uids_in(values[known], source, column))


def _uids_in(values: np.ndarray, source: str, column: str) -> Uids:
    if source == column:
        return _to_pairs(_read_digits(pa.array(values, pa.large_string())))
    digests = b"".join([hashlib.md5(key.encode(), usedforsecurity=False).digest() for key in values.tolist()])
    return _to_pairs(np.frombuffer(digests, np.uint8).reshape(-1, 16))


def _read_digits(texts: pa.Array) -> UInt8[np.ndarray, "n 16"]:
    """Return the 16 bytes that each text of 32 hexadecimal digits stands for."""
    right = pc.fill_null(pc.equal(pc.binary_length(texts), DIGITS), False).to_numpy(zero_copy_only=False)
    if right.all():
        begin = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset] if len(texts) else 0
        letters = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[begin : begin + DIGITS * len(texts)]
        nibbles = _NIBBLES[letters].reshape(-1, DIGITS)
        right = (nibbles < 16).all(axis=1)
        if right.all():
            return nibbles[:, 0::2] << 4 | nibbles[:, 1::2]
    wrong = texts[int(np.argmin(right))].as_py()
    raise ModeclipError(f"{wrong!r} is no uid: expected {DIGITS} hexadecimal digits as in DataComp")


def _to_pairs(digits: UInt8[np.ndarray, "n 16"]) -> Uids:
    numbers = np.ascontiguousarray(digits).view(">u8").astype("<u8")
    return np.asarray(numbers.reshape(-1).view(UID_DTYPE))


def _as_bytes(uids: Uids) -> Shaped[np.ndarray, " U"]:
    """Return uids as texts of 16 bytes, which numpy sorts in the same order and searches three times as fast."""
    return np.ascontiguousarray(uids).view("<u8").astype(">u8").view("S16")


def _sort(uids: Uids) -> Shaped[np.ndarray, " V"]:
    order = np.lexsort((uids["f1"], uids["f0"]))
    uids = uids[order]
    is_new = np.concatenate([[True], uids[1:] != uids[:-1]])[: len(uids)]
    return np.asarray(uids[is_new])


def _is_pairs(dtype: np.dtype) -> bool:
    names = dtype.names or ()
    return len(names) == 2 and all(dtype[name].kind == "u" and dtype[name].itemsize == 8 for name in names)

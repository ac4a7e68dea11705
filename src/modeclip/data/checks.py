"""The data check: what a catalog holds, and what is wrong with its pairs.

Every row's text, file and size is looked at. Images are decoded for a random sample of a given size, or all of them.
What is found is counted as a `Finding` with its first example and what to do. Its severity says how bad it is: an error
makes training fail or learn nonsense, a warning costs quality, a note is something to know.

Repeats are found by 64-bit hashes: the chance that a billion texts are counted one short is 3 % (n² / 2^65). Only
captions that may be too long are tokenised (10,000 a second), and only captions with other characters than ASCII are
searched for broken encodings.

Price: one pass over each small column. Memory: the hashes of one column at a time, 8 bytes a row, and a quarter more
while they are sorted; everything else is one block of rows.
"""

from __future__ import annotations

import heapq
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from modeclip.data.catalog import Catalog
from modeclip.data.images import examine_all, strict_pillow
from modeclip.data.indexing import SKIPPED, IndexNote
from modeclip.data.samples import BOMB, CHANGED, EMPTY, MISSING, SHORT_FILE, UNDECODABLE, UNREADABLE, UNSCALABLE
from modeclip.data.storage import Ledger
from modeclip.errors import check_between, check_least
from modeclip.system.console import progress
from modeclip.system.paths import file_size

Json = dict[str, Any]

MAX_FILES_LISTED = 10_000
FREQUENT_SHARE = 0.01
"""A caption with a larger share of the pairs than this is reported."""
UNIT_TOLERANCE = 0.01
"""Largest distance of a unit vector's length from 1; rounding to float16 is responsible for 0.0005."""
TOP = 10
"""Most frequent values that are named."""
PARTS = 16
"""Parts in which equal values are counted, which bounds the memory."""

_UNPRINTABLE = r"[\x{0}-\x{8}\x{b}\x{c}\x{e}-\x{1f}\x{7f}-\x{9f}\x{fffd}\p{Co}]"
_HALF_OCTAVES = tuple(sorted({float(round(2 ** (k / 2))) for k in range(29)}))
_ASPECTS = tuple(round(2 ** (k / 4 - 1 / 8), 4) for k in range(-12, 14))

ERROR, WARNING, NOTE = "error", "warning", "note"
DUPLICATE_KEYS = "key occurs more than once"
DUPLICATE_CAPTIONS = "caption occurs more than once"
FREQUENT_CAPTION = "one caption is that of more than 1 % of the pairs"
DUPLICATE_IMAGES = "image occurs more than once"
EMPTY_CAPTION = "caption is empty"
SHORT_CAPTION = "caption is very short"
LONG_CAPTION = "caption is cut by the tokenizer"
UNPRINTABLE = "caption has unprintable characters"
MOJIBAKE = "caption was decoded wrongly (mojibake)"
NOT_FINITE = "caption embedding is not finite"
NOT_UNIT = "caption embedding does not have length 1"
ZERO = "caption embedding is zero: the encoder knows nothing of it"

LEFT_OUT = "only a part of the source is indexed"
STOPPED = "an index was stopped"

KINDS = {
    MISSING: (ERROR, "restore the file, or index again with --replace"),
    SHORT_FILE: (ERROR, "restore the whole file, or index again with --replace"),
    EMPTY: (ERROR, "restore the image, or index again with --replace"),
    UNREADABLE: (ERROR, "check the permissions and the disk"),
    UNDECODABLE: (ERROR, "restore the image, or index again with --replace, which leaves it out"),
    UNSCALABLE: (ERROR, "save it with 8 bits, or index again with --replace, which leaves it out"),
    BOMB: (ERROR, "index again with --replace, which leaves it out"),
    CHANGED: (ERROR, "the file was overwritten: restore it, or index again with --replace"),
    NOT_FINITE: (ERROR, "embed again"),
    NOT_UNIT: (ERROR, "embed again with unit vectors"),
    STOPPED: (WARNING, "give the same modeclip index again, which finishes it"),
    DUPLICATE_KEYS: (WARNING, "give each pair its own key: id lists cannot tell these apart"),
    ZERO: (WARNING, "choose an encoder that knows these words; such pairs are equally far from every cluster"),
    FREQUENT_CAPTION: (WARNING, "balance or filter: equal captions are false negatives of each other"),
    EMPTY_CAPTION: (WARNING, "index again with --replace: pairs without a caption are left out"),
    LONG_CAPTION: (WARNING, "put what matters first, or choose a model with a longer context"),
    MOJIBAKE: (WARNING, "repair the encoding at the source, for example with ftfy.fix_text"),
    UNPRINTABLE: (WARNING, "clean the captions at the source"),
    LEFT_OUT: (NOTE, "see the causes; mend what should be there, and index again"),
    DUPLICATE_IMAGES: (NOTE, "remove repeats unless they are meant as several captions of one image"),
    DUPLICATE_CAPTIONS: (NOTE, "equal captions are false negatives in a batch: mask them, or balance the captions"),
    SHORT_CAPTION: (NOTE, "check whether such captions say anything"),
}
"""Severity of each kind of finding and what to do about it, the gravest first."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with pairs of a catalog, or that is worth knowing."""

    severity: str
    """``error``, ``warning`` or ``note``."""
    what: str
    """What was found."""
    count: int
    """Pairs that have it."""
    looked_at: int
    """Pairs that were searched for it."""
    first: str
    """The first example."""
    advice: str
    """What to do."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many values lie in each bin."""

    edges: tuple[float, ...]
    """Lower edge of each bin; the last bin has no upper edge."""
    counts: tuple[int, ...]
    """Values in each bin; those below the first edge are in the first bin."""


def format_share(count: float | int, total: float | int) -> str:
    """Write a share in percent; it is never 0 if something was counted, and not 100 if something was not.

    Examples:
        >>> format_share(1, 3), format_share(1, 10**6), format_share(0, 5), format_share(9999, 10000)
        ('33.3 %', '<0.1 %', '0.0 %', '>99.9 %')
    """
    percent = 100 * count / max(total, 1)
    return "<0.1 %" if 0 < percent < 0.05 else ">99.9 %" if 99.95 <= percent < 100 else f"{percent:.1f} %"


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What a check looks at, and how closely."""

    decode_samples: int = 10_000
    """Images to decode, drawn at random; 0 decodes none."""
    decode_all: bool = False
    """Decode every image."""
    duplicate_images: bool = False
    """Find equal images by reading and decoding all of them, not by the hashes made when indexing."""
    context_length: int = 77
    """Tokens of a caption that a model reads, start and end included; CLIP reads 77. Longer captions are cut."""
    short_characters: int = 3
    """A caption with fewer characters than this counts as very short."""
    threads: int = 4
    """Threads that read and decode images."""
    seed: int = 0
    """Decides which images and pairs are drawn."""

    def __post_init__(self) -> None:
        check_least("check", self, decode_samples=0, context_length=3, short_characters=0, seed=0)
        check_between("check", self, threads=(1, 4096))


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a catalog holds and what is wrong with it."""

    catalog: str
    """Path of the catalog."""
    num_pairs: int
    num_captions: int
    """Distinct captions."""
    num_groups: int
    """Distinct groups, such as shards, folders or icon sets."""
    num_files: int
    """Distinct files that rows refer to."""
    num_decoded: int
    """Images that were decoded, or failed to."""
    findings: tuple[Finding, ...]
    """The gravest first."""
    frequent_captions: tuple[tuple[str, int], ...]
    """The most frequent captions with their counts; captions that occur once are left out."""
    frequent_groups: tuple[tuple[str, int], ...]
    """The largest groups with their counts."""
    damaged_files: tuple[tuple[str, str, int], ...]
    """At most 10,000 files that are missing or too short, as (path, cause, pairs), those with most pairs first."""
    caption_lengths: Histogram
    """Characters per caption."""
    shorter_sides: Histogram
    """Shorter side of each image in pixels, as indexed."""
    aspects: Histogram
    """Width divided by height."""
    sizes: tuple[tuple[float, float, int], ...]
    """Images by size, as (lower edge of width, lower edge of height, count) in the bins of ``shorter_sides``."""
    seconds: float

    @property
    def has_errors(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.severity == ERROR for finding in self.findings)

    def to_json(self) -> Json:
        """Return everything as plain values for ``json``."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of a table for each finding: what, severity, pairs, share, first example, what to do."""
        return [
            (f.what, f.severity, f"{f.count:,}", format_share(f.count, f.looked_at), f.first, f.advice)
            for f in self.findings
        ]


def check(
    catalog: Catalog, config: CheckConfig | None = None, *, tokenize: Callable[..., Any] | None = None
) -> CheckResult:
    """Find out what a catalog holds and what is wrong with its pairs. The catalog stays as it is.

    Args:
        catalog: The catalog.
        config: What to look at.
        tokenize: A tokenizer as open_clip makes it: called with texts and ``context_length=n`` it returns token ids of
            shape (texts, n). It is called only if a caption may be too long. Without it no caption is found too long.
    """
    config, started = config or CheckConfig(), time.monotonic()
    found = Findings()
    keys = _count_values(catalog, "key")
    _report_repeats(found, catalog, "key", keys, DUPLICATE_KEYS)
    captions = _count_values(catalog, "caption")
    _report_repeats(found, catalog, "caption", captions, DUPLICATE_CAPTIONS)
    groups = _count_values(catalog, "group")
    _report_what_is_left_out(found, catalog)
    lengths = _look_at_captions(catalog, config, found, tokenize)
    images = _look_at_files(catalog, config, found)
    first = catalog.read(["digest"], np.zeros(min(1, len(catalog)), np.int64)) if "digest" in catalog.columns else {}
    has_digests = any(digest is not None for digest in first.get("digest", ()))
    if has_digests and not config.duplicate_images:
        _report_repeats(found, catalog, "digest", _count_values(catalog, "digest"), DUPLICATE_IMAGES)
    num_decoded = _decode_images(catalog, config, found, config.duplicate_images)
    if "caption_embedding" in catalog.columns:
        _look_at_embeddings(catalog, found)
    return CheckResult(
        catalog=str(catalog.path),
        num_pairs=len(catalog),
        num_captions=captions.num_distinct,
        num_groups=groups.num_distinct,
        num_decoded=num_decoded,
        findings=found.sorted(),
        frequent_captions=_name_values(catalog, "caption", captions),
        frequent_groups=_name_values(catalog, "group", groups),
        caption_lengths=lengths,
        **images,
        seconds=time.monotonic() - started,
    )


# ---------------------------------------------------------------- repeats


def _count_values(catalog: Catalog, column: str) -> Repeats:
    hashes, start = np.empty(len(catalog), np.int64), 0
    with progress(f"check {column}s", len(catalog), "pairs") as advance:
        for block in catalog.batches([column]):
            values = block[column]
            hashes[start : start + len(values)] = np.fromiter(map(hash, values.tolist()), np.int64, len(values))
            start += len(values)
            advance(len(values))
    return count_repeats(hashes)


def _name_values(catalog: Catalog, column: str, repeats: Repeats) -> tuple[tuple[str, int], ...]:
    """Return the most frequent values with their counts."""
    top = [(count, row) for count, row in repeats.top if count > 1]
    if not top:
        return ()
    values = catalog.read([column], np.array([row for _, row in top]))[column]
    return tuple((str(value), count) for value, (count, _) in zip(values, top, strict=True))


def _report_repeats(found: Findings, catalog: Catalog, column: str, repeats: Repeats, what: str) -> None:
    if not repeats.num_repeated:
        return
    count, row = repeats.top[0]
    if column == "digest":  # bytes that nobody knows it by
        key, path = (values[0] for values in catalog.read(["key", "path"], np.array([row])).values())
        example = f"{path or 'held in the row'}, {count:,} times, first in row {row:,}, key {key!r}"
    else:
        value = str(catalog.read([column], np.array([row]))[column][0])
        example = f"{value!r}, {count:,} times, first in row {row:,}"
    found.add(what, repeats.num_repeated, len(catalog), example)
    if column == "caption" and count > FREQUENT_SHARE * len(catalog) and count >= 2 * TOP:
        found.add(FREQUENT_CAPTION, count, len(catalog), example)


def _report_what_is_left_out(found: Findings, catalog: Catalog) -> None:
    """Say how much of the source is not in the catalog: what was skipped, and what a stopped index has read."""
    skipped = {cause: int(count) for cause, count in json.loads(catalog.metadata.get(SKIPPED, "{}")).items()}
    if total := sum(skipped.values()):
        causes = ", ".join(f"{count:,} {cause}" for cause, count in sorted(skipped.items(), key=lambda item: -item[1]))
        found.add(LEFT_OUT, total, len(catalog) + total, causes)
    notes = Ledger(catalog.path, "index", IndexNote).parts().values()
    if waiting := sum(rows for note in notes for _, rows in note["files"][0]):
        found.add(STOPPED, waiting, len(catalog) + waiting, f"{waiting:,} pairs are read, and not in the catalog yet")


# ---------------------------------------------------------------- captions


def _look_at_captions(
    catalog: Catalog, config: CheckConfig, found: Findings, tokenize: Callable[..., Any] | None
) -> Histogram:
    """Count captions that are empty, short, too long or damaged; return the histogram of their lengths."""
    from ftfy.badness import is_bad

    total, start = len(catalog), 0
    lengths = HistogramCounter((0.0, *_HALF_OCTAVES))
    with progress("check captions' text", total, "pairs") as advance:
        for block in catalog.batches(["key", "caption"]):
            values: np.ndarray = block["caption"]
            texts = pc.fill_null(pa.array(values, pa.large_string()), "")
            characters = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
            stripped = pc.utf8_length(pc.utf8_trim_whitespace(texts)).to_numpy(zero_copy_only=False)
            num_bytes = pc.binary_length(texts).to_numpy(zero_copy_only=False)
            foreign = num_bytes > characters
            broken = np.zeros(len(values), bool)
            broken[foreign] = [is_bad(text) for text in values[foreign]]
            cut = np.zeros(len(values), bool)
            maybe = np.flatnonzero(_may_be_cut(num_bytes, foreign, config.context_length))
            if tokenize is not None and len(maybe):
                cut[maybe] = _are_cut(texts.take(pa.array(maybe)).to_pylist(), config.context_length, tokenize)
            unprintable = pc.match_substring_regex(texts, _UNPRINTABLE).to_numpy(zero_copy_only=False)
            lengths.add(characters)
            for what, mask in (
                (EMPTY_CAPTION, stripped == 0),
                (SHORT_CAPTION, (stripped > 0) & (stripped < config.short_characters)),
                (LONG_CAPTION, cut),
                (UNPRINTABLE, unprintable & ~broken),
                (MOJIBAKE, broken),
            ):
                found.add_rows(what, mask, total, CheckedBlock(start, block["key"]), partial(_quote, values))
            start += len(values)
            advance(len(values))
    return lengths.finish()


def _quote(captions: np.ndarray, row: int) -> str:
    caption = str(captions[row])
    return repr(caption if len(caption) <= 80 else caption[:77] + "...")


def _may_be_cut(
    num_bytes: Int[np.ndarray, " n"], foreign: Bool[np.ndarray, " n"], context_length: int
) -> Bool[np.ndarray, " n"]:
    """Return which captions may have too many tokens, judged by their bytes.

    A token of CLIP covers at least one byte. Cleaning makes ASCII text no longer, and other text at most five times as
    long (NFC and lower case).
    """
    room = context_length - 4  # start, end, and two more that other tokenizers add
    return num_bytes * np.where(foreign, 5, 1) > room


def _are_cut(captions: list[str], context_length: int, tokenize: Callable[..., Any]) -> Bool[np.ndarray, " n"]:
    """Return which captions fill one more position than a model has, where the empty text has padding."""
    last_tokens = np.asarray(tokenize(["", *captions], context_length=context_length + 1)[:, -1])
    return np.asarray(last_tokens[1:] != last_tokens[0])


# ---------------------------------------------------------------- files and sizes


def _look_at_files(catalog: Catalog, config: CheckConfig, found: Findings) -> Json:
    """Find rows whose file is missing or too short; return what is known of files and of sizes."""
    total, start = len(catalog), 0
    sides, aspects = HistogramCounter(_HALF_OCTAVES), HistogramCounter(_ASPECTS)
    sizes, damaged = Counter[int](), Counter[tuple[str, str]]()
    paths = np.empty(total, np.int64)
    num_paths, last = 0, None
    size_of = lru_cache(1 << 16)(_size_of)
    with progress("check files", total, "pairs") as advance, ThreadPoolExecutor(config.threads) as pool:
        for block in catalog.batches(["key", "path", "offset", "size", "width", "height"]):
            coded = pa.array(block["path"], pa.string()).dictionary_encode()
            names = coded.dictionary.to_pylist()
            code = coded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
            actual = np.array([*pool.map(size_of, names), np.iinfo(np.int64).max], np.int64)[code]
            referenced = code < len(names)
            wanted = np.where(block["size"] < 0, block["offset"] + 1, block["offset"] + block["size"])
            missing = referenced & (actual < 0)
            empty = ~missing & ((block["size"] == 0) | (referenced & (block["size"] < 0) & (actual == 0)))
            short = referenced & ~missing & ~empty & (actual < wanted)
            for what, mask in ((MISSING, missing), (SHORT_FILE, short), (EMPTY, empty)):
                found.add_rows(what, mask, total, CheckedBlock(start, block["key"]), partial(_place, block["path"]))
                if what != EMPTY and mask.any():
                    for name, count in zip(*np.unique(code[mask], return_counts=True), strict=True):
                        if (names[name], what) in damaged or len(damaged) < MAX_FILES_LISTED:
                            damaged[names[name], what] += int(count)
            for name in names:  # a file's rows are neighbours as a rule: few are hashed twice
                if name != last:
                    paths[num_paths], last = hash(name), name
                    num_paths += 1
            width, height = (block[name][block["width"] > 0] for name in ("width", "height"))  # 0: not looked at
            sides.add(np.minimum(width, height))
            aspects.add(width / np.maximum(height, 1))
            cells, counts = np.unique(sides.bins(width) * 256 + sides.bins(height), return_counts=True)
            sizes.update(dict(zip(cells.tolist(), counts.tolist(), strict=True)))
            start += len(block["key"])
            advance(len(block["key"]))
    files = [(name, cause, count) for (name, cause), count in damaged.items()]
    edges = _HALF_OCTAVES
    return {
        "num_files": count_repeats(paths[:num_paths]).num_distinct,
        "damaged_files": tuple(sorted(files, key=lambda item: (-item[2], item[0]))),
        "shorter_sides": sides.finish(),
        "aspects": aspects.finish(),
        "sizes": tuple((edges[cell // 256], edges[cell % 256], count) for cell, count in sorted(sizes.items())),
    }


def _place(paths: np.ndarray, row: int) -> str:
    return str(paths[row] or "held in the row")


def _size_of(path: str) -> int:
    """Return the size of a file or object in bytes, or -1 if it does not exist."""
    try:
        return file_size(path)
    except (FileNotFoundError, NotADirectoryError):
        return -1


# ---------------------------------------------------------------- images


def _decode_images(catalog: Catalog, config: CheckConfig, found: Findings, find_repeats: bool) -> int:
    """Decode a sample of the images, or all; return how many were decoded."""
    decode_all = config.decode_all or find_repeats
    total = len(catalog) if decode_all else min(config.decode_samples, len(catalog))
    if not total:
        return 0
    rows = None
    if total < len(catalog):
        rows = np.sort(np.random.default_rng(config.seed).choice(len(catalog), total, replace=False, shuffle=False))
    hashes, origin = np.empty(total if find_repeats else 0, np.int64), np.empty(total if find_repeats else 0, np.int64)
    whole = 0
    with strict_pillow(), progress("check images", total, "images") as advance:
        known = [name for name in ("width", "height", "digest") if name in catalog.columns]
        blocks = catalog.samples(rows, extra=known)
        numbers = range(total) if rows is None else rows.tolist()
        for row, seen in zip(numbers, examine_all(blocks, config.threads, catalog.exif), strict=True):
            advance(1)
            sample, what, detail = seen.sample, seen.cause, seen.detail
            sides, digest = (sample.extra["width"], sample.extra["height"]), sample.extra.get("digest")
            if not what and sides not in ((0, 0), (seen.width, seen.height)):
                what, detail = CHANGED, f"{seen.width} x {seen.height}, was {sides[0]} x {sides[1]}"
            elif not what and digest not in (None, seen.digest):
                what, detail = CHANGED, "it has other bytes than when it was indexed"
            if what in (MISSING, SHORT_FILE, EMPTY) and (sample.path is not None or sample.size == 0):
                what = ""  # _look_at_files has counted it
            if what:
                place = ": ".join(part for part in (sample.path or "held in the row", detail) if part)
                found.add(what, 1, total, f"row {row:,}, key {sample.key!r}: {place}")
            if find_repeats and seen.digest is not None:
                hashes[whole], origin[whole] = int.from_bytes(seen.digest[:8], signed=True), row
                whole += 1
    if find_repeats and (repeats := count_repeats(hashes[:whole])).num_repeated:
        count, first = repeats.top[0]
        row = int(origin[first])
        key = catalog.read(["key"], np.array([row]))["key"][0]
        found.add(DUPLICATE_IMAGES, repeats.num_repeated, whole, f"row {row:,}, key {key!r}: {count:,} times")
    return total


# ---------------------------------------------------------------- embeddings


def _look_at_embeddings(catalog: Catalog, found: Findings) -> None:
    total, start = len(catalog), 0
    with progress("check embeddings", total, "pairs") as advance:
        for block in catalog.batches(["key", "caption_embedding"]):
            vectors = np.asarray(block["caption_embedding"], np.float32)
            norms = np.linalg.norm(vectors, axis=1)  # NaN and infinity spread
            finite = np.isfinite(norms)
            zero = norms == 0
            odd = finite & ~zero & (np.abs(np.where(finite, norms, 1) - 1) > UNIT_TOLERANCE)
            for what, mask in ((NOT_FINITE, ~finite), (NOT_UNIT, odd), (ZERO, zero)):
                found.add_rows(what, mask, total, CheckedBlock(start, block["key"]), partial(_length, norms))
            start += len(norms)
            advance(len(norms))


def _length(norms: np.ndarray, row: int) -> str:
    return f"length {norms[row]:.3g}"


# ---------------------------------------------------------------- counting


class CheckedBlock(NamedTuple):
    """Consecutive rows of a catalog that are checked together."""

    start: int
    """Position of the first row in the catalog."""
    keys: Sequence[str] | np.ndarray
    """Key of each row."""


class Findings:
    """Counts by kind of finding, with the first example of each."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._looked_at: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, what: str, count: int, looked_at: int, first: str) -> None:
        """Count pairs.

        Args:
            what: A kind of finding, one of ``KINDS``.
            count: Pairs that have it.
            looked_at: Number of pairs that are searched for it.
            first: An example. That of the first call is kept.
        """
        if count:
            self._count[what] += count
            self._looked_at[what] = looked_at
            self._first.setdefault(what, " ".join(first.split()))

    def add_rows(
        self,
        what: str,
        mask: Bool[np.ndarray, " n"],
        looked_at: int,
        block: CheckedBlock,
        describe: Callable[[int], str],
    ) -> None:
        """Count the pairs of a block that a mask marks; ``describe`` says more about one of them."""
        if mask.any():
            row = int(np.argmax(mask))
            first = f"row {block.start + row:,}, key {block.keys[row]!r}: {describe(row)}"
            self.add(what, int(mask.sum()), looked_at, first)

    def sorted(self) -> tuple[Finding, ...]:
        """Return the findings in the order of ``KINDS``."""
        return tuple(
            Finding(
                severity=severity,
                what=what,
                count=self._count[what],
                looked_at=self._looked_at[what],
                first=self._first[what],
                advice=advice,
            )
            for what, (severity, advice) in KINDS.items()
            if self._count[what]
        )


class Repeats(NamedTuple):
    """How often values occur."""

    num_distinct: int
    """Distinct values."""
    num_repeated: int
    """Rows that share their value with another row."""
    top: list[tuple[int, int]]
    """(count, first row) of the most frequent values; among equals the earlier row comes first."""


def count_repeats(hashes: Int[np.ndarray, " N"]) -> Repeats:
    """Count equal values, one of ``PARTS`` parts at a time: values whose hashes end alike."""
    ends = hashes.view(np.uint8)[:: hashes.itemsize]  # the low byte on a little-endian machine, some byte on another
    num_distinct, num_repeated, top = 0, 0, list[tuple[int, int]]()
    for part in range(PARTS):
        rows = np.flatnonzero(ends % PARTS == part)
        values = hashes[rows]
        order = np.argsort(values, kind="stable")  # so that a value's first row leads its run
        values = values[order]
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
        counts = np.diff(starts, append=len(values))
        first = rows[order[starts]]
        num_distinct += len(starts)
        num_repeated += int(counts[counts > 1].sum())
        best = np.lexsort((first, -counts))[:TOP]
        top += zip(counts[best].tolist(), first[best].tolist(), strict=True)
    return Repeats(num_distinct, num_repeated, heapq.nsmallest(TOP, top, key=lambda pair: (-pair[0], pair[1])))


class HistogramCounter:
    """Counts values that come in blocks into the bins of a histogram."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = np.array(edges)
        self._counts = np.zeros(len(edges), np.int64)

    def bins(self, values: np.ndarray) -> Int[np.ndarray, " n"]:
        """Return the bin of each value."""
        return np.maximum(np.searchsorted(self._edges, values, "right") - 1, 0)

    def add(self, values: np.ndarray) -> None:
        """Count values."""
        self._counts += np.bincount(self.bins(values), minlength=len(self._counts))

    def finish(self) -> Histogram:
        """Return the counts so far."""
        return Histogram(edges=tuple(self._edges.tolist()), counts=tuple(self._counts.tolist()))

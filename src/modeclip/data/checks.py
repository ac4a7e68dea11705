"""A catalog goes in; what is wrong with its pairs comes out: counts, histograms, findings with what to do about them.

Method: every row's text, file and size is looked at; images are decoded for a random sample of stated size, or all of
them. A finding has a severity: an error makes training fail or learn nonsense, a warning costs quality, a note is to be
known. Repeats are found by 64-bit hashes: the chance that a billion texts are counted one short is 3 % (n² / 2^65).

Price: one pass over each small column. Memory: the hashes of one column at a time, 8 bytes a row and a quarter of that
while they are sorted; all else is one batch. Only captions that may be too long are tokenised (10,000 a second), only
captions that are not plain ASCII are searched for broken encodings.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeclip.data.catalog import Catalog
from modeclip.data.findings import (
    CHANGED,
    DUPLICATE_CAPTIONS,
    DUPLICATE_IMAGES,
    DUPLICATE_KEYS,
    EMPTY_CAPTION,
    ERROR,
    FREQUENT_CAPTION,
    LONG_CAPTION,
    MOJIBAKE,
    NOT_FINITE,
    NOT_UNIT,
    SHORT_CAPTION,
    TOP,
    UNPRINTABLE,
    Batch,
    Finding,
    Findings,
    Histogram,
    HistogramCounter,
    Repeats,
    count_repeats,
    format_share,
)
from modeclip.data.images import examine_all, strict_pillow
from modeclip.data.samples import EMPTY, MISSING, SHORT_FILE
from modeclip.errors import ModeclipError
from modeclip.system.console import progress
from modeclip.system.paths import file_size

Json = dict[str, Any]

MAX_FILES_LISTED = 10_000
FREQUENT_SHARE = 0.01
UNIT_TOLERANCE = 0.01  # float16 rounds to 0.0005

_UNPRINTABLE = r"[\x{0}-\x{8}\x{b}\x{c}\x{e}-\x{1f}\x{7f}-\x{9f}\x{fffd}\p{Co}]"
_HALF_OCTAVES = tuple(sorted({float(round(2 ** (k / 2))) for k in range(29)}))
_ASPECTS = tuple(round(2 ** (k / 4 - 1 / 8), 4) for k in range(-12, 14))


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is looked at, and how closely."""

    decode_samples: int = 10_000
    """Images that are decoded, drawn at random; 0 decodes none."""
    decode_all: bool = False
    """Decode every image."""
    duplicate_images: bool = False
    """Look for equal images by reading and decoding all, and not by the hashes of indexing."""
    model: str = "modeclip-icon"
    """Model whose tokenizer counts; the default's is CLIP's, that of nearly every open_clip model."""
    context_length: int = 77
    """Tokens that a model reads of a caption, start and end included; 77 is CLIP's."""
    short_characters: int = 3
    """A caption of fewer characters is very short."""
    threads: int = 4
    """Threads that read and decode images."""
    seed: int = 0
    """Of the draw of images."""

    def __post_init__(self) -> None:
        for name, least in (("decode_samples", 0), ("context_length", 3), ("short_characters", 0), ("threads", 1)):
            if getattr(self, name) < least:
                raise ModeclipError(f"check.{name}: expected {least} or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a catalog holds and what is wrong with it."""

    catalog: str
    """Path of the catalog."""
    num_pairs: int
    num_captions: int
    """Distinct captions."""
    num_groups: int
    """Distinct groups: shards, folders, icon sets."""
    num_files: int
    """Distinct files that rows refer to."""
    num_decoded: int
    """Images that were decoded."""
    findings: tuple[Finding, ...]
    """The gravest first."""
    frequent_captions: tuple[tuple[str, int], ...]
    """The captions that occur most often, with their counts; none that occurs once."""
    frequent_groups: tuple[tuple[str, int], ...]
    """The largest groups."""
    damaged_files: tuple[tuple[str, str, int], ...]
    """Files that are gone or too short: (path, cause, pairs), those with most pairs first, at most 10,000."""
    caption_lengths: Histogram
    """Characters of a caption."""
    shorter_sides: Histogram
    """Shorter side of an image in pixels, as indexed."""
    aspects: Histogram
    """Width divided by height."""
    sizes: tuple[tuple[float, float, int], ...]
    """Images by width and height: (lower edge of width, lower edge of height, count), bins of ``shorter_sides``."""
    seconds: float

    @property
    def has_errors(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.severity == ERROR for finding in self.findings)

    def to_json(self) -> Json:
        """Return everything as plain values that ``json`` writes."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of text for each finding: what, severity, pairs, share, first example, what to do."""
        return [
            (f.what, f.severity, f"{f.count:,}", format_share(f.count, f.looked_at), f.first, f.advice)
            for f in self.findings
        ]


def check(catalog: Catalog, config: CheckConfig | None = None) -> CheckResult:
    """Look at all pairs of a catalog and say what is wrong with them.

    Nothing is changed. What is found does not raise: it is in the result.

    Raises:
        ModeclipError: The tokenizer's model is unknown.
    """
    config, started = config or CheckConfig(), time.monotonic()
    found = Findings()
    keys = _count_values(catalog, "key")
    _report_repeats(found, catalog, "key", keys, DUPLICATE_KEYS)
    captions = _count_values(catalog, "caption")
    _report_repeats(found, catalog, "caption", captions, DUPLICATE_CAPTIONS)
    groups = _count_values(catalog, "group")
    lengths = _look_at_captions(catalog, config, found)
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
    value = str(catalog.read([column], np.array([row]))[column][0])
    example = f"{value!r}, {count:,} times, first in row {row:,}"
    found.add(what, repeats.num_repeated, len(catalog), example)
    if column == "caption" and count > FREQUENT_SHARE * len(catalog) and count >= 2 * TOP:
        found.add(FREQUENT_CAPTION, count, len(catalog), example)


# ---------------------------------------------------------------- captions


def _look_at_captions(catalog: Catalog, config: CheckConfig, found: Findings) -> Histogram:
    """Count captions that are empty, short, too long or damaged; return the histogram of their lengths."""
    from ftfy.badness import is_bad

    is_cut, total, start = _Truncation(config), len(catalog), 0
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
            unprintable = pc.match_substring_regex(texts, _UNPRINTABLE).to_numpy(zero_copy_only=False)
            lengths.add(characters)
            for what, mask in (
                (EMPTY_CAPTION, stripped == 0),
                (SHORT_CAPTION, (stripped > 0) & (stripped < config.short_characters)),
                (LONG_CAPTION, is_cut(texts, num_bytes, foreign)),
                (UNPRINTABLE, unprintable & ~broken),
                (MOJIBAKE, broken),
            ):
                found.add_rows(what, mask, total, Batch(start, block["key"]), partial(_quote, values))
            start += len(values)
            advance(len(values))
    return lengths.finish()


def _quote(captions: np.ndarray, row: int) -> str:
    caption = str(captions[row])
    return repr(caption if len(caption) <= 80 else caption[:77] + "...")


class _Truncation:
    """Tells which captions have more tokens than a model reads.

    A token of CLIP's covers at least one byte, and cleaning makes an ASCII text no longer; other texts grow at most
    fivefold (NFC and lower case). So captions with fewer bytes need no tokenizer; for the rest the tokenizer is asked
    for one position more than the model has, and whether it is filled.
    """

    def __init__(self, config: CheckConfig) -> None:
        self._config = config
        self._tokenizer: Any = None
        self._padding = 0

    def __call__(self, texts: pa.Array, num_bytes: np.ndarray, foreign: np.ndarray) -> np.ndarray:
        cut = np.zeros(len(texts), bool)
        room = self._config.context_length - 4  # start, end, and two that other tokenizers add
        maybe = np.flatnonzero(num_bytes * np.where(foreign, 5, 1) > room)
        if len(maybe):
            cut[maybe] = self._last_tokens(texts.take(pa.array(maybe)).to_pylist()) != self._padding
        return cut

    def _last_tokens(self, texts: list[str]) -> np.ndarray:
        length = self._config.context_length + 1
        if self._tokenizer is None:
            from modeclip.models.clip import load_clip

            self._tokenizer = load_clip(self._config.model).tokenizer
            self._padding = int(self._tokenizer([""], context_length=length)[0, -1])
        return np.asarray(self._tokenizer(texts, context_length=length)[:, -1])


# ---------------------------------------------------------------- files and sizes


def _look_at_files(catalog: Catalog, config: CheckConfig, found: Findings) -> Json:
    """Find rows whose file is gone or too short; return what is known of files and of sizes."""
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
                found.add_rows(what, mask, total, Batch(start, block["key"]), partial(_place, block["path"]))
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
    """Return the size of a file or object in bytes, -1 if it is not there."""
    try:
        return file_size(path)
    except (FileNotFoundError, NotADirectoryError):
        return -1


# ---------------------------------------------------------------- images


def _decode_images(catalog: Catalog, config: CheckConfig, found: Findings, find_repeats: bool) -> int:
    """Decode a sample of the images, or all; return how many were decoded or failed."""
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
        blocks = catalog.samples(rows, extra=("width", "height"))
        numbers = range(total) if rows is None else rows.tolist()
        for row, seen in zip(numbers, examine_all(blocks, config.threads), strict=True):
            advance(1)
            sample, what, detail = seen.sample, seen.cause, seen.detail
            sides = sample.extra["width"], sample.extra["height"]
            if not what and sides not in ((0, 0), (seen.width, seen.height)):
                what, detail = CHANGED, f"{seen.width} x {seen.height}, was {sides[0]} x {sides[1]}"
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
            odd = finite & (np.abs(np.where(finite, norms, 1) - 1) > UNIT_TOLERANCE)
            for what, mask in ((NOT_FINITE, ~finite), (NOT_UNIT, odd)):
                found.add_rows(what, mask, total, Batch(start, block["key"]), partial(_length, norms))
            start += len(norms)
            advance(len(norms))


def _length(norms: np.ndarray, row: int) -> str:
    return f"length {norms[row]:.3g}"

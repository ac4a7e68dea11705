"""ALIGN's filters: rules about an image, a text, and how often each occurs, for a raw pool of alt-texts.

A pair is dropped for the first of these reasons that holds:

    1 the image's shorter side is not longer than ``side_above``
    2 its longer side is ``aspect_below`` or more times the shorter
    3 the image has more than ``max_texts`` texts
    4 the text belongs to more than ``max_images`` images
    5 the text has fewer than ``min_words`` words
    6 it has more than ``max_words`` words
    7 it has a word, or two words in a row, outside the ``frequent_ngrams`` most frequent ones of the pool
    8 the image looks like one of an evaluation (cosine above ``max_cosine``), so that no task leaks into training

The first pass counts: n-grams by a 64-bit hash, and which images (by the hash of their bytes) have which texts. A pair
that occurs several times counts once. What a fragment holds is kept beside the catalog, so other thresholds count
nothing again. The totals are formed one range of keys after the other, as many keys at a time as ``KEYS_AT_ONCE``. The
second pass notes for each pair which rules it breaks, so that the table can say what each rule does by itself.

A word is what stands between white space, in lower case, without punctuation at its ends. For languages that put no
space between words, set ``min_words`` to 1.

Source: ALIGN (arXiv 2102.05918), Sec. 3.1, whose numbers are the preset ``paper``. It does not say what becomes of
n-grams that are exactly as frequent as the first one too many: here they all count as rare.
Price: docs/scale.md. Memory: 16 bytes a key and range, 8 bytes for each frequent n-gram, a byte a pair. With tasks, one
pass of the image tower and 2 D bytes of disk a pair, then D products for each pair and image of the tasks.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int64, Shaped, UInt8, UInt64

from modeclip.clustering.distances import assign_nearest
from modeclip.curation.counting import Counts, add_counts, hash_images, hash_text, in_ranges
from modeclip.curation.method import Context, Decided, Histogram, Prepared, Table
from modeclip.data.catalog import Catalog
from modeclip.data.checksums import SIDE_FOLDER
from modeclip.data.mapping import Fragments, Statistic, concatenate, map_fragments
from modeclip.data.tasks.open import load_tasks
from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError, check_least, unknown
from modeclip.models.encoders import OWN, PairEncoder, check_encoder, load_any_encoder
from modeclip.models.feature_cache import FeatureCache
from modeclip.models.features import embed_images, encoder_identity
from modeclip.system.console import log
from modeclip.system.devices import choose_device
from modeclip.system.paths import absolute, home, home_path, is_url

WORDS_SHOWN = 40
"""Words of a text from which on the histogram has one bin."""
COSINE_BINS = 50


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The numbers of the filters."""

    side_above: int
    aspect_below: float
    max_texts: int
    max_images: int
    min_words: int
    max_words: int
    frequent_ngrams: int
    max_cosine: float


PRESETS = {
    "paper": Limits(
        side_above=200,
        aspect_below=3.0,
        max_texts=1000,
        max_images=10,
        min_words=3,
        max_words=20,
        frequent_ngrams=100_000_000,
        max_cosine=0.975,
    ),
    "small": Limits(
        side_above=31,
        aspect_below=3.0,
        max_texts=10,
        max_images=100,
        min_words=1,
        max_words=20,
        frequent_ngrams=1_000_000,
        max_cosine=0.975,
    ),
}
"""The paper's numbers, for billions of web pages; and numbers for pools of up to a million short captions, in which a
word that is rare says nothing about a pair (docs/curation.md has the reasons)."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Drop pairs by the rules of ALIGN. Every number that is not given is that of the preset."""

    method: ClassVar[str] = "align"

    preset: Literal["paper", "small"] = "paper"
    """Numbers of the rules: paper, or small for pools of up to a million short captions (side above 31 px, at most 10
    texts an image, at most 100 images a text, 1 to 20 words, 1,000,000 words and pairs of words: all, as a rule)."""
    side_above: int | None = None
    """Pixels that the shorter side of an image must exceed; paper: 200, small: 31."""
    aspect_below: float | None = None
    """Longer side divided by the shorter, which must be less than this; paper: 3, small: 3."""
    max_texts: int | None = None
    """Different texts that an image may have; paper: 1000, small: 10."""
    max_images: int | None = None
    """Different images that a text may have; paper: 10, small: 100."""
    min_words: int | None = None
    """Words that a text must have; paper: 3, small: 1."""
    max_words: int | None = None
    """Words that a text may have; paper: 20, small: 20."""
    frequent_ngrams: int | None = None
    """Words and pairs of words that count as frequent, of those that occur in the pool; a text with any other is
    dropped. Paper: 100,000,000, small: 1,000,000."""
    max_cosine: float | None = None
    """Cosine that an image may have with an image of the tasks; paper: 0.975, small: 0.975."""
    tasks: tuple[str, ...] = ()
    """Tasks whose images are not to be trained on, in the words of `modeclip evaluate --tasks`. Without them this rule
    is off."""
    model: str | None = None
    """What compares images with those of the tasks: a model folder, NAME@TAG of open_clip, timm:NAME_OR_FOLDER, or
    MODULE:ATTRIBUTE (your own encoder of images)."""
    data: str = "data"
    """Folder that holds the data of published tasks, each in a folder of its name."""

    def __post_init__(self) -> None:
        """Check every number, and that tasks have a model."""
        if self.preset not in PRESETS:
            raise unknown("preset", self.preset, PRESETS)
        check_least("align", self, side_above=0, max_texts=1, max_images=1, min_words=0, max_words=1, frequent_ngrams=1)
        limits = self.limits
        if not limits.aspect_below > 1:
            raise ModeclipError(
                f"align.aspect_below: expected more than 1, the aspect of a square, got {limits.aspect_below:g}"
            )
        if not -1 <= limits.max_cosine <= 1:
            raise ModeclipError(f"align.max_cosine: expected a cosine, -1 to 1, got {limits.max_cosine:g}")
        if limits.min_words > limits.max_words:
            raise ModeclipError(
                f"align.min_words is {limits.min_words} and align.max_words {limits.max_words}: no text has both"
            )
        if self.tasks and self.model is None:
            raise ModeclipError("align.tasks needs align.model, which compares images with those of the tasks")

    @property
    def limits(self) -> Limits:
        """The numbers given, and those of the preset for the others."""
        own = {field.name: getattr(self, field.name) for field in fields(Limits)}
        return replace(PRESETS[self.preset], **{name: number for name, number in own.items() if number is not None})

    def prepare(self, context: Context) -> Prepared:
        """Count the pool, and note which rules each pair breaks."""
        return _prepare(self, context)


def _prepare(config: AlignConfig, context: Context) -> Prepared:
    limits = config.limits

    def counted(statistic: Statistic, description: str) -> Fragments:
        return map_fragments(
            context.catalog, statistic, f"align: {description}", ray=context.ray, selected=context.selected
        )

    tasks = load_tasks(config.tasks, root=config.data) if config.tasks else []
    name = None if config.model is None else _encoder_name(config.model)
    if name is not None:
        check_encoder(name)
    found = frequent_ngrams(counted(Ngrams(), "count words"), limits.frequent_ngrams)
    owners = counted(Owners(), "count texts of images")
    verdicts = counted(
        Verdicts(
            limits=limits,
            frequent=found.keys,
            images=keys_with_more(owners, "image", "text", limits.max_texts),
            texts=keys_with_more(owners, "text", "image", limits.max_images),
        ),
        "apply the rules",
    )
    words, sizeless, parts = np.zeros(WORDS_SHOWN + 1, np.int64), 0, []
    for part in verdicts:
        parts.append(part["broken"])
        words += np.bincount(np.minimum(part["words"], WORDS_SHOWN), minlength=WORDS_SHOWN + 1)
        sizeless += int(part["sizeless"].sum())
    broken, charts, tables = np.concatenate(parts), [_words_chart(words, limits)], [_ngram_table(found)]
    if tasks and name is not None:
        try:
            vectors = counted(ImageVectors(name), "embed images")
            near = _find_near(context.catalog, name, vectors, tasks, limits.max_cosine)
        finally:
            _load.cache_clear()  # the stages that follow need the memory
        broken |= near.is_near.astype(np.uint8) << np.uint8(7)
        charts.append(_cosine_chart(near.histogram, limits))
        tables.append(_task_table(tasks, near.of_task))
    else:
        log("align: no tasks given, so no image is compared with those of evaluations (--tasks and --model)")
    if sizeless:
        log(f"align: {sizeless:,} images of unknown size (they were not checked) pass the rules about sides")
    causes = _causes(limits)
    cause = FIRST_CAUSE[broken]
    values = np.zeros(len(context.catalog), np.uint8)
    values[slice(None) if context.selected is None else context.selected] = cause
    facts = {"limits": asdict(limits), "decisions": _digest(cause), "counted": FORMAT}
    return Prepared(
        work=Decided(values={f"{context.name}_cause": values}, facts=facts),
        causes=causes,
        tables=(_filter_table(causes, broken, cause), *tables),
        charts=tuple(charts),
    )


FORMAT = 1
"""Part of the facts; raise it when the same words start to have other hashes."""
FIRST_CAUSE = np.array([0, *((rules & -rules).bit_length() for rules in range(1, 256))], np.uint8)
"""For each set of broken rules, as bits, the number of the first of them; 0 for none."""


def _causes(limits: Limits) -> tuple[str, ...]:
    return (
        f"a side of {limits.side_above} pixels or less",
        f"an aspect ratio of {limits.aspect_below:g} or more",
        f"an image with more than {limits.max_texts:,} texts",
        f"a text of more than {limits.max_images:,} images",
        f"fewer than {limits.min_words} words",
        f"more than {limits.max_words} words",
        f"a word or pair of words outside the {limits.frequent_ngrams:,} most frequent",
        f"near-duplicate of an evaluation image (cosine above {limits.max_cosine:g})",
    )


# ---------------------------------------------------------------- words


def split_words(
    captions: Sequence[str] | Shaped[np.ndarray, " n"],
) -> tuple[UInt64[np.ndarray, " W"], Int64[np.ndarray, " n"]]:
    """Return the hashes of the words of all captions, in order, and how many words each caption has.

    Examples:
        >>> hashes, counts = split_words(["A dog, a Dog!", "& -"])
        >>> counts.tolist(), bool(hashes[0] == hashes[2] and hashes[1] == hashes[3])
        ([4, 0], True)
    """
    lists = pc.utf8_split_whitespace(pa.array(captions, pa.string(), from_pandas=True).fill_null(""))
    tokens = lists.flatten().dictionary_encode()
    of_token = np.array([_hash_word(token) for token in tokens.dictionary.to_pylist()], np.uint64)
    hashes = of_token[tokens.indices.to_numpy(zero_copy_only=False)] if len(of_token) else of_token
    rows = np.repeat(np.arange(len(lists)), np.diff(lists.offsets.to_numpy()))
    is_word = hashes != 0
    return hashes[is_word], np.bincount(rows[is_word], minlength=len(lists)).astype(np.int64)


@lru_cache(maxsize=1 << 18)
def _hash_word(token: str) -> int:
    """Return the hash of a token without punctuation at its ends, in lower case; 0 if nothing is left."""
    start, end = 0, len(token)
    while start < end and _is_sign(token[start]):
        start += 1
    while start < end and _is_sign(token[end - 1]):
        end -= 1
    return hash_text(token[start:end].lower()) if start < end else 0


def _is_sign(letter: str) -> bool:
    return not letter.isalnum() and unicodedata.category(letter)[0] in "PS"


def bigrams(
    hashes: UInt64[np.ndarray, " W"], counts: Int64[np.ndarray, " n"]
) -> tuple[UInt64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
    """Return the hash of each two words in a row, and the caption that it stands in; arguments as of `split_words`."""
    rows = np.repeat(np.arange(len(counts)), counts)
    together = rows[1:] == rows[:-1]
    return _mixed(_mixed(hashes[:-1]) + hashes[1:])[together], rows[1:][together]


def _mixed(numbers: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Return other numbers, one for each, whose bits all depend on all bits (the finaliser of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = numbers ^ (numbers >> np.uint64(31))
    return mixed


# ---------------------------------------------------------------- counting


class Ngrams(Counts):
    """Counts the words and pairs of words of captions: ``keys`` ascending, and ``counts``."""

    inputs = ("caption",)
    unit = "captions"

    def __init__(self) -> None:
        self.facts = {"statistic": "n-grams", "format": FORMAT}

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, " k"]]:
        """Count those of a block."""
        hashes, counts = split_words(block["caption"])
        return self.counted(np.concatenate([hashes, bigrams(hashes, counts)[0]]))


class Owners(Statistic):
    """Finds which image has which text, each by its hash: ``image`` and ``text``, each pair once, sorted."""

    inputs = ("digest", "path", "offset", "key", "caption")
    unit = "pairs"

    def __init__(self) -> None:
        self.facts = {"statistic": "texts of images", "format": FORMAT}

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, UInt64[np.ndarray, " k"]]:
        """Find those of a block."""
        return self.merge([{"image": hash_images(block), "text": hash_captions(block["caption"])}])

    def merge(self, parts: Sequence[dict[str, Shaped[np.ndarray, "..."]]]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Leave out pairs that occur twice."""
        image, text = _distinct(*(np.concatenate([part[name] for part in parts]) for name in ("image", "text")))
        return {"image": image, "text": text}


def hash_captions(captions: Shaped[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Return a hash of each caption as it stands."""
    encoded = pa.array(captions, pa.string(), from_pandas=True).fill_null("").dictionary_encode()
    hashes = np.array([hash_text(text) for text in encoded.dictionary.to_pylist()], np.uint64)
    return hashes[encoded.indices.to_numpy(zero_copy_only=False)] if len(hashes) else hashes


@dataclass(frozen=True)
class Frequent:
    """The n-grams that are frequent."""

    keys: UInt64[np.ndarray, " k"]
    """Their hashes, ascending."""
    num_distinct: int
    """How many n-grams occur at all."""
    least: int
    """How often an n-gram must occur to be frequent."""


def frequent_ngrams(fragments: Iterable[dict[str, Any]], most: int, at_once: int | None = None) -> Frequent:
    """Return the n-grams that are more frequent than the one behind the ``most`` most frequent ones.

    Args:
        fragments: What `Ngrams` found in each.
        most: How many may be frequent; those that tie with the first one too many are not.
        at_once: Keys whose totals are in memory at a time; None: ``KEYS_AT_ONCE``.
    """
    keys, counts = np.empty(0, np.uint64), np.empty(0, np.int64)
    floor = num_distinct = 0  # what occurs this often or less is rare; it never becomes less
    for some, times in in_ranges(fragments, "keys", "counts", add_counts, at_once):
        num_distinct += len(some)
        is_left = times > floor
        keys, counts = np.concatenate([keys, some[is_left]]), np.concatenate([counts, times[is_left]])
        if len(keys) > most:
            place = len(keys) - most - 1
            floor = int(np.partition(counts, place)[place])
            keys, counts = keys[counts > floor], counts[counts > floor]
    return Frequent(keys, num_distinct, floor + 1)


def keys_with_more(
    fragments: Iterable[dict[str, Any]], key: str, value: str, most: int, at_once: int | None = None
) -> UInt64[np.ndarray, " k"]:
    """Return the images with more than so many texts, or the texts with more images: their hashes, ascending.

    Args:
        fragments: What `Owners` found in each.
        key: ``image`` or ``text``, whichever is asked for.
        value: The other one.
        most: How many it may have.
        at_once: As for `frequent_ngrams`.
    """

    def join(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys, values = _distinct(keys, values)
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, np.int64)
        rank = np.arange(len(keys)) - np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
        return keys[rank <= most], values[rank <= most]  # one too many suffices

    found = [np.empty(0, np.uint64)]
    for keys, _ in in_ranges(fragments, key, value, join, at_once):
        each, counts = np.unique(keys, return_counts=True)
        found.append(each[counts > most])
    return np.concatenate(found)


def _distinct(
    first: UInt64[np.ndarray, " n"], second: UInt64[np.ndarray, " n"]
) -> tuple[UInt64[np.ndarray, " k"], UInt64[np.ndarray, " k"]]:
    """Return pairs of numbers sorted, each once."""
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    is_new = np.ones(len(first), bool)
    is_new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return first[is_new], second[is_new]


# ---------------------------------------------------------------- decisions


@dataclass(frozen=True, kw_only=True)
class Verdicts(Statistic):
    """Notes for each pair which rules it breaks (bit i of ``broken`` is rule i + 1), and how many words it has."""

    limits: Limits
    frequent: UInt64[np.ndarray, " k"]
    """The frequent n-grams."""
    images: UInt64[np.ndarray, " i"]
    """Images with too many texts."""
    texts: UInt64[np.ndarray, " t"]
    """Texts with too many images."""
    inputs = ("width", "height", *Owners.inputs)
    unit = "pairs"
    merge = staticmethod(concatenate)

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What decides: the numbers, and what the counts came to."""
        return asdict(self.limits) | {
            "statistic": "broken rules",
            "format": FORMAT,
            **{name: _digest(getattr(self, name)) for name in ("frequent", "images", "texts")},
        }

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, " n"]]:
        """Apply the rules to a block, all but the one about evaluation images."""
        limits, width, height = self.limits, block["width"].astype(float), block["height"].astype(float)
        hashes, counts = split_words(block["caption"])
        pairs, row_of_pair = bigrams(hashes, counts)
        rare = np.zeros(len(counts), bool)
        rare[np.repeat(np.arange(len(counts)), counts)[~_is_in(hashes, self.frequent)]] = True
        rare[row_of_pair[~_is_in(pairs, self.frequent)]] = True
        short, long = np.minimum(width, height), np.maximum(width, height)
        is_known = short > 0
        rules = (
            is_known & (short <= limits.side_above),
            is_known & (long >= limits.aspect_below * short),
            _is_in(hash_images(block), self.images),
            _is_in(hash_captions(block["caption"]), self.texts),
            counts < limits.min_words,
            counts > limits.max_words,
            rare,
        )
        broken = np.zeros(len(counts), np.uint8)
        for place, breaks in enumerate(rules):
            broken |= breaks.astype(np.uint8) << np.uint8(place)
        return {"broken": broken, "words": np.minimum(counts, 255).astype(np.uint8), "sizeless": ~is_known}


def _is_in(keys: UInt64[np.ndarray, " n"], known: UInt64[np.ndarray, " k"]) -> Bool[np.ndarray, " n"]:
    """Return whether each key is among known ones, which are ascending."""
    if not len(known):
        return np.zeros(len(keys), bool)
    found: np.ndarray = known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys
    return found


def _digest(values: Shaped[np.ndarray, "..."]) -> str:
    return hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()


# ---------------------------------------------------------------- evaluation images


class ImageVectors(Statistic):
    """Embeds images: ``vectors`` (n, D) float16."""

    inputs = ("caption", "image")
    unit = "images"
    merge = staticmethod(concatenate)

    def __init__(self, encoder: str) -> None:
        self.encoder = encoder
        identity = encoder_identity(encoder) or {"encoder": encoder, "fingerprint": _load(encoder).fingerprint}
        self.facts = {"statistic": "image vectors", "identity": identity}

    def __call__(self, block: dict[str, Shaped[np.ndarray, "n *_"]]) -> dict[str, Shaped[np.ndarray, "n D"]]:
        """Embed the images of a block."""
        captions, images = block["caption"].tolist(), block["image"].tolist()
        return {"vectors": _load(self.encoder).encode_pairs(captions, images).astype(np.float16)}


def _encoder_name(model: str) -> str:
    """Return what `load_any_encoder` calls the images' encoder of a model, in any folder of this machine."""
    prefix = model.partition(":")[0]
    is_encoder = prefix in {"timm", "clip-image"} or (prefix != "local-dir" and OWN.fullmatch(model))
    if is_encoder:
        return model
    return f"clip-image:{absolute(home(model)) if home_path(model).is_dir() else model}"


@cache
def _load(name: str) -> Any:
    """Return this process's encoder of images."""
    encoder = load_any_encoder(name, trust_encoder=True)  # the user's settings name it
    if not isinstance(encoder, PairEncoder) or encoder.encodes != "image":
        raise ModeclipError(f"align.model {name!r}: expected an encoder of images; give a CLIP or timm:NAME_OR_FOLDER")
    return encoder


@dataclass(frozen=True)
class Near:
    """Which images of a pool are near to an image of the tasks."""

    is_near: Bool[np.ndarray, " n"]
    """Whether each pair's image is a near-duplicate."""
    of_task: Int64[np.ndarray, " T"]
    """How many pairs are, by the task of the nearest image."""
    histogram: Int64[np.ndarray, " _"]
    """Pairs by the cosine with the nearest image, from 0 to 1."""


def _find_near(catalog: Catalog, encoder: str, fragments: Fragments, tasks: Sequence[Task], max_cosine: float) -> Near:
    """Compare the images of a pool with those of tasks, a fragment at a time."""
    folder = None if is_url(catalog.path) else Path(catalog.path) / SIDE_FOLDER / "task-vectors"
    kept = FeatureCache(folder)
    of_task = [embed_images(encoder, lambda some: _embed(encoder, some), task.images, kept) for task in tasks]
    number = np.repeat(np.arange(len(tasks)), [len(vectors) for vectors in of_task])
    wanted, is_near = np.concatenate(of_task), list[np.ndarray]()
    counts, histogram = np.zeros(len(tasks), np.int64), np.zeros(COSINE_BINS, np.int64)
    for part in fragments:
        vectors = part["vectors"].astype(np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        nearest, squared = assign_nearest(vectors, wanted, device=str(choose_device()))
        cosines = 1 - squared / 2  # of unit vectors
        is_near.append(cosines > max_cosine)
        counts += np.bincount(number[nearest[is_near[-1]]], minlength=len(tasks))
        histogram += np.histogram(np.clip(cosines, 0, 1), bins=COSINE_BINS, range=(0, 1))[0]
    return Near(np.concatenate(is_near), counts, histogram)


def _embed(encoder: str, pictures: Sequence[Any]) -> Float[np.ndarray, "n D"]:
    images = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        images.append(buffer.getvalue())
    vectors: np.ndarray = _load(encoder).encode_pairs([""] * len(images), images)
    return vectors


# ---------------------------------------------------------------- what is shown


def _filter_table(causes: Sequence[str], broken: UInt8[np.ndarray, " n"], cause: UInt8[np.ndarray, " n"]) -> Table:
    total, rows = max(1, len(broken)), []
    for place, words in enumerate(causes):
        bit = np.uint8(1 << place)
        alone = int(np.count_nonzero(broken & bit))
        only = int(np.count_nonzero(broken == bit))
        first = int(np.count_nonzero(cause == place + 1))
        rows.append((words, f"{alone:,}", f"{alone / total:.2%}", f"{only:,}", f"{first:,}"))
    return Table(
        title="what each rule does, in pairs",
        columns=("rule", "would drop by itself", "share", "dropped by no other", "given as the cause"),
        rows=tuple(rows),
    )


def _ngram_table(found: Frequent) -> Table:
    return Table(
        title="words and pairs of words",
        columns=("", "number"),
        rows=(
            ("that occur in the pool", f"{found.num_distinct:,}"),
            ("of these frequent", f"{len(found.keys):,}"),
            ("times that a frequent one occurs at least", f"{found.least:,}"),
        ),
    )


def _task_table(tasks: Sequence[Task], counts: Int64[np.ndarray, " T"]) -> Table:
    rows = tuple(
        (task.name, f"{len(task.images):,}", f"{count:,}") for task, count in zip(tasks, counts.tolist(), strict=True)
    )
    return Table(
        title="pairs whose image is a near-duplicate of an evaluation image",
        columns=("task", "its images", "pairs near to one"),
        rows=rows,
    )


def _words_chart(counts: Int64[np.ndarray, " w"], limits: Limits) -> Histogram:
    numbers = list(enumerate(counts.tolist()))
    return Histogram(
        title=f"pairs by words of the text ({limits.min_words} to {limits.max_words} are kept)",
        edges=tuple(number - 0.5 for number in range(len(counts) + 1)),
        counts=tuple(counts.tolist()),
        kept=tuple(float(n) if limits.min_words <= number <= limits.max_words else 0.0 for number, n in numbers),
        threshold=limits.max_words + 0.5 if limits.max_words < WORDS_SHOWN else None,
    )


def _cosine_chart(counts: Int64[np.ndarray, " _"], limits: Limits) -> Histogram:
    return Histogram(
        title="pairs by cosine with the nearest evaluation image",
        edges=tuple(np.linspace(0, 1, len(counts) + 1).tolist()),
        counts=tuple(counts.tolist()),
        threshold=limits.max_cosine,
    )

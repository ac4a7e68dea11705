"""Duplicates: drops what is there already, or what is there too often.

Of pairs that are duplicates of each other one stays: that with the longest caption, and of these the one with the first
key in alphabetical order. So neither the order of the fragments nor which pairs came later plays a part. Pairs are
compared one with the other, never through a third: what is dropped has a duplicate among the pairs that stay.

    exact       same encoded image; with --pixels same decoded image
    perceptual  images whose dHashes differ in few of 64 bits (`modeclip.data.holdout`) and whose small grey pictures
                correlate; hashes alone took two of five line drawings for copies of others
    semantic    vectors that are near inside a cluster (`modeclip.curation.semdedup`); there the pair farthest from the
                cluster's centre stays, and the rule above decides between equal ones
    density     a part of each cluster, larger for sparse ones (`modeclip.curation.density`): its pairs farthest from
                the centre stay
    balanced    a part of each cluster, as even as its size allows, drawn by chance; experts first, then clusters

Price: exact reads the column of digests; perceptual decodes each image once; the others read all vectors once or twice.
A search of vectors that is killed goes on, and one that is asked again is read: its answers take 16 bytes of disk a
pair, for a kept fraction of each threshold that was tried.
Memory: about 100 bytes a pair, and their captions and keys where vectors are equal, in one process. docs/scale.md has
the rates.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from PIL import Image
from tyro.conf import arg

from modeclip.clustering.distances import blocks
from modeclip.curation.clustered import Clustered, center_of, cluster_pairs
from modeclip.curation.density import density_sizes, equal_sizes_by_level, mean_distance_to_nearest
from modeclip.curation.method import KEPT, Context, Curve, Decided, Histogram, Prepared, Table, draw
from modeclip.curation.semdedup import find_near_copies, nearest_before
from modeclip.data.catalog import Catalog
from modeclip.data.holdout import dhash, similar_pairs
from modeclip.data.images import Exif, cause_of, decode_image, hash_image
from modeclip.data.mapping import IMAGE, Statistic, concatenate, map_fragments
from modeclip.errors import ModeclipError, check_between, check_least
from modeclip.system.files import remove, replacing
from modeclip.system.paths import is_url

Kind = Literal["exact", "perceptual", "semantic", "density", "balanced"]
"""What counts as a duplicate."""
FORMAT = 2
"""Part of the facts; raise it when the same settings start to decide otherwise."""
BY_IMAGE: tuple[Kind, ...] = ("exact", "perceptual")
BY_SHARE: tuple[Kind, ...] = ("density", "balanced")
DROPPED = 1
CAUSES: dict[Kind, str] = {
    "exact": "same image as a pair that stays",
    "perceptual": "image like that of a pair that stays",
    "semantic": "vector near that of a pair that stays",
    "density": "nearer to the centre of its cluster than those that stay",
    "balanced": "more than its cluster's share",
}
SEARCHES = 10
"""Thresholds that are tried for a kept fraction: it is met within a thousandth of itself."""
HIGHEST_THRESHOLD = 1 - 1e-6
"""Highest cosine that is tried: vectors that are equal up to rounding are always near copies."""
SEARCHES_FOLDER = "_modeclip/searches"
"""Folder in a local catalog where the answers of its searches are kept."""
NOT_SEARCHED = -2
"""Stands in the answers for a pair whose cluster is still to be searched."""
PICTURE_SIDE = 16
"""Width and height of the grey pictures that are compared."""
PICTURES_AT_ONCE = 1 << 12
"""Pairs of pictures that are compared at a time."""
SHOWN = 10
"""Rows of a table of groups or clusters."""
BINS = 50
"""Bins of a histogram."""


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """Drop pairs that are there already, or too often: by image, by vector, or by cluster."""

    by: Kind = "exact"
    """exact (encoded image), perceptual (hash of the picture), semantic (SemDeDup: near vectors in a cluster), density
    (fewer pairs of dense clusters) or balanced (as even clusters as possible)."""
    pixels: bool = False
    """exact: compare decoded pixels instead of encoded bytes, so that the same picture as PNG and as WebP counts."""
    bits: int = 6
    """perceptual: bits of 64 in which the hashes of like images may differ, 0 to 15."""
    correlation: float = 0.98
    """perceptual: least correlation of the greys of like images at 16 x 16 pixels, 0 to 1. Hashes alone take
    drawings for the same that only share their outline."""
    eps: float = 0.05
    """semantic: a pair is dropped if its cosine with one that stays is above 1 - eps; above 0, at most 1. The paper
    sweeps it."""
    kept_fraction: float | None = None
    """Share of the pairs that stays, in (0, 1]. semantic: the threshold that gives it is found, and eps is not used;
    density and balanced need it."""
    chain: bool = False
    """semantic: dropped pairs drop others too, as published."""
    model: str | None = None
    """semantic, density, balanced: take image vectors of this model (ViT-B-32@openai, a folder, timm:NAME) in clusters
    of their own. None: caption_embedding."""
    clusters: int | None = None
    """semantic, density, balanced: fit so many clusters. None: the catalog's fine clusters, or where there are none or
    a model is given one for every 1,000 pairs."""
    temperature: float = 0.1
    """density: temperature of the softmax over clusters, above 0; the lower, the more goes to sparse clusters. 0.1 is
    the paper's."""
    num_nearest: Annotated[int, arg(name="nearest")] = 20
    """density: other clusters to which the distance of a cluster is taken, 1 or more; 20 is the paper's."""
    seed: int = 0
    """Decides clusters that are fitted, and what balanced draws."""

    method: ClassVar[str] = "duplicates"

    def __post_init__(self) -> None:
        """Check the ranges, and that no setting is of another kind of duplicate."""
        if self.by not in get_args(Kind):
            raise ModeclipError(f"duplicates.by: expected one of {', '.join(get_args(Kind))}, got {self.by!r}")
        check_least("duplicates", self, num_nearest=1, seed=0)
        check_between("duplicates", self, bits=(0, 15))
        if self.clusters is not None:
            check_least("duplicates", self, clusters=1)
        for name in ("eps", "kept_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ModeclipError(f"duplicates.{name}: expected a number above 0, at most 1, got {value}")
        if not 0 <= self.correlation <= 1:
            raise ModeclipError(f"duplicates.correlation: expected 0 to 1, got {self.correlation}")
        if not 0 < self.temperature < np.inf:
            raise ModeclipError(f"duplicates.temperature: expected a number above 0, got {self.temperature}")
        if self.by in BY_SHARE and self.kept_fraction is None:
            raise ModeclipError(
                f"duplicates.kept_fraction: --by {self.by} needs the share that stays, got none: set it, such as 0.5"
            )
        others = {
            "pixels": ("exact",),
            "chain": ("semantic",),
            "model": ("semantic", *BY_SHARE),
            "clusters": ("semantic", *BY_SHARE),
            "kept_fraction": ("semantic", *BY_SHARE),
        }
        for name, kinds in others.items():
            if getattr(self, name) and self.by not in kinds:
                raise ModeclipError(f"duplicates.{name} is for {', '.join(kinds)}, but --by is {self.by}: leave it out")

    def prepare(self, context: Context) -> Prepared:
        """Find the duplicates of the whole pool.

        Raises:
            ModeclipError: The pool lacks what they are found by.
        """
        kinds: dict[Kind, Callable[[DuplicatesConfig, Context], _Found]] = {
            "exact": _find_by_image,
            "perceptual": _find_by_image,
            "semantic": _find_by_vector,
            "density": _choose_by_cluster,
            "balanced": _choose_by_cluster,
        }
        found = kinds[self.by](self, context)
        whole = np.full(len(context.catalog), KEPT, np.uint8)
        whole[found.dropped] = DROPPED
        values: dict[str, np.ndarray] = {f"{context.name}_cause": whole}
        for name, column in found.columns.items():
            values[f"{context.name}_{name}"] = column
        facts = {"format": FORMAT, "pairs": context.catalog.fingerprint, **found.facts}
        return Prepared(
            work=Decided(values=values, facts=facts),
            causes=(CAUSES[self.by],),
            tables=found.tables,
            charts=found.charts,
        )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What is dropped, and why."""

    dropped: Int[np.ndarray, " d"]
    """Positions in the catalog."""
    columns: dict[str, Shaped[np.ndarray, " N"]]
    """Further columns, by the ends of their names."""
    facts: dict[str, Any]
    """What decided it beside the settings and the pairs."""
    tables: tuple[Table, ...] = ()
    charts: tuple[Histogram | Curve, ...] = ()


# ---------------------------------------------------------------- which of several stays


def preferred(
    catalog: Catalog, rows: Int[np.ndarray, " n"], *before: Shaped[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Return the places of rows in the order in which they are welcome.

    That is the order of some numbers that come first, then the longest caption, then the first key.

    Args:
        catalog: Holds captions and keys; only those of rows whose numbers are equal are read.
        rows: Positions in the catalog.
        before: What comes first, the most important one first, ascending.
    """
    order = np.lexsort((rows, *reversed(before)))
    equal = np.ones(max(len(rows) - 1, 0), bool)
    for numbers in before:
        equal &= numbers[order][1:] == numbers[order][:-1]
    tied = order[np.append(equal, False) | np.insert(equal, 0, False)] if len(rows) else order
    rank = np.zeros(len(rows), np.int64)
    if tied.size:
        pairs = catalog.read(["caption", "key"], rows[tied])
        lengths = np.array([len(caption or "") for caption in pairs["caption"]])
        keys = np.unique(pairs["key"].astype(str), return_inverse=True)[1]
        rank[tied[np.lexsort((rows[tied], keys, -lengths))]] = np.arange(len(tied))
    return np.lexsort((rank, *reversed(before)))


def _groups_table(title: str, catalog: Catalog, kept: Int[np.ndarray, " d"]) -> tuple[Table, ...]:
    """Show of which pairs the most copies were dropped; ``kept`` is for each dropped row the one that stays."""
    stays, copies = np.unique(kept, return_counts=True)
    if not stays.size:
        return ()
    most = np.argsort(-copies, kind="stable")[:SHOWN]
    pairs = catalog.read(["key", "caption"], stays[most])
    rows = tuple(
        (str(key), str(caption), f"{count:,}")
        for key, caption, count in zip(pairs["key"], pairs["caption"], copies[most].tolist(), strict=True)
    )
    return (Table(title=title, columns=("pair that stays", "caption", "copies dropped"), rows=rows),)


def _whole(catalog: Catalog, rows: Int[np.ndarray, " n"], values: Shaped[np.ndarray, " n"], missing: Any) -> np.ndarray:
    """Return a column of all rows from values of some."""
    column = np.full(len(catalog), missing, values.dtype)
    column[rows] = values
    return column


# ---------------------------------------------------------------- by image


@dataclass(frozen=True)
class _Pixels(Statistic):
    """Hashes of decoded images, as a statistic that is kept beside the catalog."""

    facts: dict[str, Any]
    inputs = (IMAGE, "key", "path")
    unit = "images"
    merge = staticmethod(concatenate)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, UInt8[np.ndarray, "n 16"]]:
        """Return the hash of each image's size and pixels."""

        def of(image: Image.Image) -> np.ndarray:
            return np.frombuffer(hash_image(f"{image.size}".encode() + image.tobytes()), np.uint8)

        return {"hash": _of_images(block, self.facts["exif"], of, 16)}


@dataclass(frozen=True)
class _Pictures(Statistic):
    """dHashes and small grey pictures of images, as a statistic that is kept beside the catalog."""

    facts: dict[str, Any]
    inputs = (IMAGE, "key", "path")
    unit = "images"
    merge = staticmethod(concatenate)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, UInt8[np.ndarray, "n _"]]:
        """Return for each image the bytes of its dHash, and of its grey picture."""

        def of(image: Image.Image) -> np.ndarray:
            grey = image.convert("L").resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BOX)
            return np.frombuffer(dhash(image).to_bytes(8) + grey.tobytes(), np.uint8)

        return {"picture": _of_images(block, self.facts["exif"], of, 8 + PICTURE_SIDE**2)}


def _of_images(
    block: dict[str, Shaped[np.ndarray, " n"]], exif: Exif, of: Callable[[Image.Image], np.ndarray], width: int
) -> UInt8[np.ndarray, "n _"]:
    """Decode images in threads, and return the bytes that are made of each.

    Raises:
        ModeclipError: An image does not decode.
    """

    def of_one(key: str, path: str | None, data: bytes) -> np.ndarray:
        try:
            return of(decode_image(data, exif))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            raise ModeclipError(
                f"image of {key!r} (path {path}): {cause_of(error)}; restore it, or give modeclip index with --replace"
                " and check_images, which leaves it out"
            ) from error

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = list(pool.map(of_one, block["key"], block["path"], block[IMAGE]))
    return np.stack(found) if found else np.empty((0, width), np.uint8)


def _find_by_image(config: DuplicatesConfig, context: Context) -> _Found:
    """Find pairs with the same image, or with images that look the same."""
    catalog = context.catalog
    rows = np.arange(len(catalog)) if context.selected is None else np.flatnonzero(context.selected)
    if config.by == "exact" and not config.pixels:
        digests = catalog.read(["digest"], rows)["digest"]
        missing = np.array([digest is None for digest in digests], bool)
        if missing.any():
            digests[missing] = np.array(catalog.digests(rows[missing]), object)
        rows, digests = rows[digests != None], digests[digests != None]  # noqa: E711
        content = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    else:
        statistic = (_Pixels if config.by == "exact" else _Pictures)({"hash": config.by, "exif": catalog.exif})
        found = map_fragments(catalog, statistic, "look at images", ray=context.ray, selected=context.selected)
        (content,) = found.total().values()
    number = np.unique(content.view(f"V{content.shape[1]}").reshape(-1), return_inverse=True)[1]
    order = preferred(catalog, rows, number)
    first = order[np.diff(number[order], prepend=-1) > 0]  # the most welcome pair of each image
    kept = first
    if config.by == "perceptual":
        kept = first[_stays(content[first], preferred(catalog, rows[first]), config)]
    kept = kept[number]
    copies = np.flatnonzero(kept != np.arange(len(rows)))
    return _Found(
        dropped=rows[copies],
        columns={"of": _whole(catalog, rows[copies], rows[kept[copies]], -1)},
        facts={},
        tables=_groups_table("images with the most copies", catalog, rows[kept[copies]]),
    )


def _stays(
    content: UInt8[np.ndarray, "n _"], order: Int[np.ndarray, " n"], config: DuplicatesConfig
) -> Int[np.ndarray, " n"]:
    """Return for each picture which one stays in its place: itself, or the most welcome like it that stays itself."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    hashes = np.ascontiguousarray(content[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
    pictures, found = content[:, 8:], [np.empty((2, 0), np.int64)]
    for one, other in similar_pairs(hashes, config.bits):
        later = rank[one] > rank[other]
        some = np.stack([one[later], other[later]])
        found.append(some[:, correlations(pictures, *some) >= config.correlation])
    one, other = np.concatenate(found, axis=1)
    stays = np.arange(len(hashes))
    for place in np.lexsort((rank[other], rank[one])).tolist():
        if stays[one[place]] == one[place] and stays[other[place]] == other[place]:
            stays[one[place]] = other[place]
    return stays


def correlations(
    pictures: UInt8[np.ndarray, "n p"], one: Int[np.ndarray, " m"], other: Int[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """Return the correlations of the greys of pairs of pictures; a picture of one grey is like no other."""
    found = np.zeros(len(one))
    for part in blocks(len(one), PICTURES_AT_ONCE):
        x, y = pictures[one[part]].astype(np.int64), pictures[other[part]].astype(np.int64)
        count, sum_x, sum_y = x.shape[1], x.sum(1), y.sum(1)
        both = count * np.vecdot(x, y) - sum_x * sum_y
        spread = (count * np.vecdot(x, x) - sum_x**2) * (count * np.vecdot(y, y) - sum_y**2).astype(np.float64)
        found[part] = both / np.sqrt(np.maximum(spread, 1))
    return found


# ---------------------------------------------------------------- by vector


def _clustered(config: DuplicatesConfig, context: Context, *, with_vectors: bool = True) -> Clustered:
    return cluster_pairs(
        context.catalog,
        context.selected,
        model=config.model,
        num_clusters=config.clusters,
        seed=config.seed,
        ray=context.ray,
        with_vectors=with_vectors,
    )


def _distances(pairs: Clustered) -> Float[np.ndarray, " n"]:
    """Return the cosine distance of each pair to the centre of its cluster; what differs by rounding only is equal."""
    distance = np.empty(len(pairs.rows))

    def measure(cluster: int) -> None:
        x = pairs.unit_vectors(cluster)
        distance[pairs.place(cluster)] = (1 - np.vecdot(x, center_of(x))).round(12)

    pairs.for_each(measure, "distances to the centres")
    return distance


def _find_by_vector(config: DuplicatesConfig, context: Context) -> _Found:
    """Find pairs whose vectors are near in their cluster."""
    catalog, pairs = context.catalog, _clustered(config, context)
    label = np.repeat(np.arange(len(pairs.ends)), pairs.sizes)
    order = preferred(catalog, pairs.rows, label, -_distances(pairs))

    searches = _Searches(catalog, pairs, order)

    def search_at(threshold: float) -> tuple[np.ndarray, np.ndarray]:
        return searches.run(
            partial(find_near_copies, threshold=threshold), f"find near copies, cosine {threshold:.4f}", repr(threshold)
        )

    threshold = 1 - config.eps
    if config.chain or config.kept_fraction is not None:
        copy_of, cosine = searches.run(nearest_before, "find the nearest before each", "nearest")
        if config.kept_fraction is not None:
            wanted = max(1, round(config.kept_fraction * len(order)))
            threshold = _threshold(np.sort(cosine), wanted, None if config.chain else search_at)
    if not config.chain:
        copy_of, cosine = search_at(threshold)
    searches.forget_others()
    dropped = np.flatnonzero((copy_of >= 0) & (cosine > threshold))
    found = cosine[~np.isnan(cosine) & (cosine >= 0)]
    counts, edges = np.histogram(found, BINS, (float(found.min()), 1.0) if found.size else (threshold, 1.0))
    title = "cosine with the nearest pair before it" if config.chain else "cosine of dropped pairs with one that stays"
    groups = () if config.chain else pairs.rows[copy_of[dropped]]
    return _Found(
        dropped=pairs.rows[dropped],
        columns={
            "of": _whole(catalog, pairs.rows[dropped], pairs.rows[copy_of[dropped]], -1),
            "score": _whole(catalog, pairs.rows, cosine.astype(np.float32), np.nan),
        },
        facts=pairs.facts,
        tables=(
            Table(
                title="near copies",
                columns=("", "value"),
                rows=(
                    ("threshold of the cosine", f"{threshold:.6f}"),
                    ("eps", f"{1 - threshold:.6f}"),
                    ("share that stays", f"{1 - len(dropped) / max(len(order), 1):.4f}"),
                    ("clusters", f"{np.count_nonzero(pairs.sizes):,}"),
                    ("pairs of the largest", f"{pairs.sizes.max():,}"),
                ),
            ),
            *_groups_table("pairs with the most near copies", catalog, np.asarray(groups, np.int64)),
        ),
        charts=(
            Histogram(title=title, edges=tuple(edges.tolist()), counts=tuple(counts.tolist()), threshold=threshold),
        ),
    )


class _Searches:
    """Searches for near copies in every cluster, whose answers are kept beside the catalog cluster by cluster.

    So a search that was killed goes on, and one that is asked again is read. A file holds for each pair the position of
    the pair that it is a copy of (-1: of none, `NOT_SEARCHED`: its turn has not come) and their cosine; it is written
    through the page cache, so what a killed process had found is there. Its name is a digest of all that decides the
    answers: the vectors, the clusters, the order of the pairs, and what was looked for.
    """

    def __init__(self, catalog: Catalog, pairs: Clustered, order: Int[np.ndarray, " n"]) -> None:
        self._pairs, self._order, self._used = pairs, order, set[Path]()
        self._folder = None if is_url(catalog.path) else Path(catalog.path) / SEARCHES_FOLDER
        self._content = hashlib.blake2b(digest_size=16)
        for part in (pairs.vectors, pairs.ends, order):
            assert part is not None, "these pairs have vectors"
            self._content.update(np.ascontiguousarray(part).data)

    def run(
        self, find: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], what: str, decided_by: str
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Return what each pair is a copy of, and their cosine, NaN for a copy of none."""
        found, pairs = self._open(decided_by), self._pairs

        def in_cluster(cluster: int) -> None:
            place = pairs.place(cluster)
            members = self._order[place]
            if (found["of"][members] != NOT_SEARCHED).all():
                return
            near, cosine = find(pairs.unit_vectors(cluster)[members - place.start])
            found["cosine"][members] = cosine  # first, so that no pair is done without it
            found["of"][members] = np.where(near < 0, -1, members[near])

        pairs.for_each(in_cluster, what)
        return np.array(found["of"]), np.array(found["cosine"])

    def forget_others(self) -> None:
        """Remove the answers of searches that this curation did not ask for."""
        for path in set() if self._folder is None else set(self._folder.iterdir()) - self._used:
            remove(path)

    def _open(self, decided_by: str) -> np.ndarray:
        new = np.zeros(len(self._order), [("of", np.int64), ("cosine", np.float64)])
        new["of"], new["cosine"] = NOT_SEARCHED, np.nan
        if self._folder is None or not len(new):
            return new
        self._folder.mkdir(parents=True, exist_ok=True)
        content = self._content.copy()
        content.update(decided_by.encode())
        path = self._folder / content.hexdigest()
        self._used.add(path)
        if not path.is_file() or path.stat().st_size != new.nbytes:
            with replacing(path) as part:
                new.tofile(part)
        return np.memmap(path, new.dtype, "r+")


def _threshold(
    ascending: Float[np.ndarray, " n"],
    wanted: int,
    search_at: Callable[[float], tuple[np.ndarray, np.ndarray]] | None,
) -> float:
    """Return the cosine above which pairs are dropped so that a given number stays.

    Args:
        ascending: Cosine of each pair with the nearest before it.
        wanted: How many are to stay.
        search_at: Finds what is dropped at a threshold where dropped pairs drop no others; None: they do, and the
            cosines say it all.
    """

    def at(place: int) -> float:
        return float(np.clip(ascending[place], 0, HIGHEST_THRESHOLD))

    if search_at is None:
        return at(wanted - 1)
    low, high = 0, wanted - 1  # at the higher place enough stay: never fewer than if dropped pairs dropped others
    for _ in range(SEARCHES):
        if high - low <= 1 or at(low) == at(high):
            break
        middle = (low + high) // 2
        enough = np.count_nonzero(search_at(at(middle))[0] < 0) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return at(high)


# ---------------------------------------------------------------- by cluster


def _choose_by_cluster(config: DuplicatesConfig, context: Context) -> _Found:
    """Find what is more than the share of a cluster."""
    catalog, is_dense = context.catalog, config.by == "density"
    pairs = _clustered(config, context, with_vectors=is_dense)
    assert config.kept_fraction is not None, "the config has checked it"
    total = max(1, round(config.kept_fraction * len(pairs.rows)))
    filled = np.flatnonzero(pairs.sizes)
    sizes, label = pairs.sizes[filled], np.repeat(np.arange(len(pairs.ends)), pairs.sizes)
    further: dict[str, np.ndarray] = {}
    if is_dense:
        first = _distances(pairs)
        intra = np.bincount(label, weights=first)[filled] / sizes
        centers = np.stack([center_of(pairs.unit_vectors(cluster)) for cluster in filled.tolist()])
        inter = mean_distance_to_nearest(centers, config.num_nearest)
        kept = density_sizes(intra, inter, sizes, total, config.temperature)
        further = {"distance in it": intra, "distance to others": inter}
        order = preferred(catalog, pairs.rows, label, -first)
    else:
        kept = equal_sizes_by_level(sizes, pairs.parents[filled], total)
        identity = catalog.read(["key", "caption"], pairs.rows)
        captions = [caption or "" for caption in identity["caption"]]
        drawn = draw(config.seed, identity["key"].tolist(), captions, purpose="balanced")
        order = np.lexsort((pairs.rows, drawn, label))
    place = np.arange(len(order)) - np.repeat(pairs.ends[filled] - sizes, sizes)  # of each pair in its cluster
    return _Found(
        dropped=pairs.rows[order[place >= np.repeat(kept, sizes)]],
        columns={},
        facts=pairs.facts,
        tables=(_clusters_table(filled, sizes, kept, further),),
        charts=(
            Curve(
                title="pairs of each cluster",
                x=tuple(map(float, range(1, len(sizes) + 1))),
                lines={
                    "before": tuple(np.sort(sizes)[::-1].astype(float).tolist()),
                    "after": tuple(kept[np.argsort(-sizes, kind="stable")].astype(float).tolist()),
                },
                x_label="cluster, the largest first",
            ),
        ),
    )


def _clusters_table(
    clusters: Int[np.ndarray, " M"],
    sizes: Int[np.ndarray, " M"],
    kept: Int[np.ndarray, " M"],
    further: dict[str, Float[np.ndarray, " M"]],
) -> Table:
    """Show the clusters that keep the largest and the smallest share of their pairs."""
    order = np.argsort(-kept / sizes, kind="stable")
    shown = order if len(order) <= 2 * SHOWN else np.concatenate([order[:SHOWN], order[-SHOWN:]])
    return Table(
        title="clusters that keep most and least of their pairs",
        columns=("cluster", "pairs", "stay", "share", *further),
        rows=tuple(
            (
                str(clusters[j]),
                f"{sizes[j]:,}",
                f"{kept[j]:,}",
                f"{kept[j] / sizes[j]:.3f}",
                *(f"{values[j]:.4f}" for values in further.values()),
            )
            for j in shown.tolist()
        ),
    )

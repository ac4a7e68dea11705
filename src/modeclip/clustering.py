"""A catalog's caption embeddings in; fine clusters, experts, and for every row its fine cluster and expert out.

Method: balanced k-means of a uniform sample of the rows makes M fine centres (a caption counts as often as it occurs),
balanced k-means of these makes K experts, and every row goes to its nearest fine centre and to that centre's expert.
So balance holds where the clustering is fitted, not where it is applied: `ClusterResult.imbalance` says what came out.
Experts are numbered by decreasing range, the order in which the paper trains them.

Source: MoDE (arXiv 2404.16030) Sec. 3.2, 4.2 and 5.5. The released code keeps the centres of its last shard; here one
fit sees the whole sample.

Price: the fit holds at most ``fit_samples`` embeddings as float32 (3 GB for two million of 384 numbers); after it the
catalog is read once, a block of rows at a time. Not for one caption: `modeclip.kmeans.nearest` is that.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped

from modeclip.cards import ExpertCard, FineCard, Tally, pick_keywords, split_words
from modeclip.catalog import Catalog
from modeclip.encoders import COLUMN
from modeclip.errors import ModeclipError
from modeclip.files import write_atomically
from modeclip.kmeans import kmeans, nearest
from modeclip.progress import progress

CLUSTERING_FILE = "clustering.safetensors"
CARDS_FILE = "cards.json"
FORMAT = "modeclip.clustering"
FORMAT_VERSION = "1"
ROWS_AT_ONCE = 1 << 17
"""Rows of a block; 200 MB of float32 at 384 dimensions."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How captions are clustered and experts are formed."""

    num_fine: int = 256
    """Fine clusters M, 1 or more; at most the distinct captions. Paper: 1024 for 400 million pairs."""
    num_experts: int = 4
    """Experts K, 1 to ``num_fine``. Paper: 2 to 32."""
    max_size_ratio: float | None = 1.5
    """Largest fine cluster of the fit as a multiple of the mean, 1 or more; null: sizes are free."""
    max_expert_ratio: float | None = 1.25
    """Most fine clusters of an expert as a multiple of the mean, 1 or more; null: free."""
    fit_samples: int = 2_000_000
    """Rows that the fine centres are fitted on, drawn uniformly; fewer rows are all used. Paper: 2M suffice."""
    num_iterations: int = 25
    """Most iterations of each k-means, 0 or more; it stops by itself when the objective stands still."""
    seed: int = 0
    """Decides the sample and the starts of both k-means."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("num_fine", 1), ("num_experts", 1), ("num_iterations", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ModeclipError(f"cluster.{name}: expected {least} or more, got {getattr(self, name)}")
        for name in ("max_size_ratio", "max_expert_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not ratio >= 1:
                raise ModeclipError(f"cluster.{name}: expected 1 or more, or null for no limit, got {ratio}")
        if self.num_experts > self.num_fine:
            raise ModeclipError(
                f"cluster.num_experts: expected at most num_fine, which is {self.num_fine}, got {self.num_experts}: "
                "every expert needs a fine cluster"
            )
        if self.fit_samples < self.num_fine:
            raise ModeclipError(
                f"cluster.fit_samples: expected at least num_fine, which is {self.num_fine}, got {self.fit_samples}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustering:
    """Fine centres, the expert of each, and the experts' own centres."""

    fine_centers: Float[np.ndarray, "M D"]
    """Centres of the fine clusters, float32."""
    expert_of_fine: Int[np.ndarray, " M"]
    """Expert of each fine cluster, int64."""
    coarse_centers: Float[np.ndarray, "K D"]
    """Mean of each expert's fine centres, float32."""

    @property
    def num_fine(self) -> int:
        """Fine clusters, M."""
        return len(self.fine_centers)

    @property
    def num_experts(self) -> int:
        """Experts, K."""
        return len(self.coarse_centers)

    @property
    def range_of_expert(self) -> Float[np.ndarray, " K"]:
        """Mean distance of each expert's fine centres to its coarse centre (MoDE Sec. 5.5)."""
        return _ranges(self.fine_centers, self.expert_of_fine, self.coarse_centers)

    def save(self, folder: Path | str) -> None:
        """Write ``clustering.safetensors`` into a folder, which is made; readers see the old file or the new one."""
        from safetensors.numpy import save_file

        path = Path(folder) / CLUSTERING_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata={FORMAT: FORMAT_VERSION})  # one entry: the order of two is random
        part.replace(path)

    @classmethod
    def load(cls, folder: Path | str) -> Clustering:
        """Read what `save` wrote.

        Raises:
            ModeclipError: The file is not there, is damaged, or is of another format.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / CLUSTERING_FILE
        again = "cluster again with modeclip run"
        if not path.is_file():
            raise ModeclipError(f"no clustering at {str(path)!r}: make one with modeclip run, or correct the path")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                names = sorted(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ModeclipError(f"clustering {str(path)!r} is damaged ({error}): {again}") from error
        if metadata.get(FORMAT) != FORMAT_VERSION or names != sorted(_TENSORS):
            raise ModeclipError(
                f"{str(path)!r} is no clustering of format {FORMAT_VERSION}: expected {', '.join(_TENSORS)}, "
                f"got format {metadata.get(FORMAT, 'none')} with {', '.join(names) or 'nothing'}: {again}"
            )
        return cls(**tensors)


_TENSORS = ("fine_centers", "expert_of_fine", "coarse_centers")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterResult:
    """A clustering and what came out when it was applied to the catalog."""

    clustering: Clustering
    """Centres and the map from fine clusters to experts."""
    fine: tuple[FineCard, ...]
    """A card per fine cluster, in their order."""
    experts: tuple[ExpertCard, ...]
    """A card per expert, in their order."""
    imbalance: float
    """Rows of the largest expert as a multiple of the mean, 1 or more."""
    objective: float
    """Mean over all rows of the squared distance to the nearest fine centre."""

    def save(self, folder: Path | str) -> None:
        """Write ``clustering.safetensors`` and ``cards.json`` into a folder."""
        self.clustering.save(folder)
        cards = {
            "fine": [asdict(card) for card in self.fine],
            "experts": [asdict(card) for card in self.experts],
            "imbalance": self.imbalance,
            "objective": self.objective,
        }
        write_atomically(Path(folder) / CARDS_FILE, json.dumps(cards, indent=1, ensure_ascii=False) + "\n")


def cluster(catalog: Catalog, config: ClusterConfig) -> ClusterResult:
    """Fit fine clusters and experts, and add the columns ``fine_cluster`` and ``expert`` (int32) to the catalog.

    The same embeddings, config, machine and number of threads give the same bytes.

    Args:
        catalog: With the column ``caption_embedding``.
        config: Numbers of clusters and experts, limits of their sizes, sample, seed.

    Raises:
        ModeclipError: The column is missing or holds NaN, or there are fewer distinct captions than fine clusters.
    """
    if COLUMN not in catalog.columns:
        raise ModeclipError(
            f"catalog {str(catalog.path)!r} has no column {COLUMN}: embed its captions first (stage embed)"
        )
    rows = _sample_rows(len(catalog), config)
    x = _read_embeddings(catalog, rows)
    _check_distinct(catalog, x, config)
    with progress("fit fine clusters", config.num_iterations, "iterations") as advance:
        fit = kmeans(
            x,
            config.num_fine,
            max_size_ratio=config.max_size_ratio,
            num_iterations=config.num_iterations,
            seed=config.seed,
            on_iteration=lambda: advance(1),
        )
    clustering = _group(fit.centers, config)
    fine_of_sample = nearest(x, fit.centers)[0]
    del x
    tally = Tally(config.num_fine)
    with progress("assign captions", len(catalog), "captions") as advance:
        catalog.add_columns(_assign(catalog, clustering, tally, advance))
    words = _count_words(catalog, rows, fine_of_sample, config.num_fine)
    return _result(clustering, tally, words)


def _sample_rows(num_rows: int, config: ClusterConfig) -> Int[np.ndarray, " n"]:
    """Return the rows of the fit, ascending."""
    if num_rows <= config.fit_samples:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(config.seed).choice(num_rows, config.fit_samples, replace=False))


def _read_embeddings(catalog: Catalog, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
    """Read the embeddings of some rows as float32."""
    parts = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        parts.append(_checked(catalog.read([COLUMN], some)[COLUMN], some, catalog))
    return np.concatenate(parts) if parts else np.empty((0, 1), np.float32)


def _checked(
    vectors: Shaped[np.ndarray, "n D"], rows: Int[np.ndarray, " n"], catalog: Catalog
) -> Float[np.ndarray, "n D"]:
    """Return embeddings as float32, after a look for NaN and infinity."""
    vectors = np.asarray(vectors, np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if bad.size:
        raise ModeclipError(
            f"column {COLUMN} of {str(catalog.path)!r} has NaN or infinite values, first in row {rows[bad[0]]}: "
            "embed its captions again (stage embed)"
        )
    return vectors


def _check_distinct(catalog: Catalog, x: Float[np.ndarray, "n D"], config: ClusterConfig) -> None:
    """Refuse more fine clusters than there are different points to put them."""
    seen: set[bytes] = set()
    for vector in x:
        seen.add(vector.tobytes())
        if len(seen) >= config.num_fine:
            return
    sampled = f" in the {len(x):,} rows sampled for the fit" if len(x) < len(catalog) else ""
    raise ModeclipError(
        f"cluster.num_fine is {config.num_fine}, but {str(catalog.path)!r} has only {len(seen)} distinct captions"
        f"{sampled}: set num_fine to {len(seen)} or less" + (", or raise fit_samples" if sampled else "")
    )


def _group(fine_centers: Float[np.ndarray, "M D"], config: ClusterConfig) -> Clustering:
    """Group fine centres into experts, numbered by decreasing range, then by their first fine cluster."""
    coarse = kmeans(
        fine_centers,
        config.num_experts,
        max_size_ratio=config.max_expert_ratio,
        num_iterations=config.num_iterations,
        seed=config.seed,
    )
    centers = coarse.centers.copy()  # those of the last but one assignment, or of an expert with nothing
    for k in np.unique(coarse.assignment):
        centers[k] = fine_centers[coarse.assignment == k].mean(0, dtype=np.float64)
    first = np.full(config.num_experts, config.num_fine)
    np.minimum.at(first, coarse.assignment, np.arange(config.num_fine))
    order = np.lexsort((first, -_ranges(fine_centers, coarse.assignment, centers)))
    number = np.empty_like(order)
    number[order] = np.arange(config.num_experts)
    return Clustering(
        fine_centers=fine_centers, expert_of_fine=number[coarse.assignment], coarse_centers=centers[order]
    )


def _ranges(
    fine_centers: Float[np.ndarray, "M D"],
    expert_of_fine: Int[np.ndarray, " M"],
    coarse_centers: Float[np.ndarray, "K D"],
) -> Float[np.ndarray, " K"]:
    distance = np.linalg.norm(fine_centers.astype(np.float64) - coarse_centers[expert_of_fine], axis=1)
    return _means_by_group(distance, expert_of_fine, len(coarse_centers))


def _means_by_group(
    values: Float[np.ndarray, " n"], group: Int[np.ndarray, " n"], num_groups: int
) -> Float[np.ndarray, " G"]:
    """Return the mean of the values of each group, 0 for an empty one."""
    sums = np.bincount(group, weights=values, minlength=num_groups)
    return sums / np.maximum(np.bincount(group, minlength=num_groups), 1)


def _assign(
    catalog: Catalog, clustering: Clustering, tally: Tally, advance: Callable[[int], None]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield both columns block by block, and count them on the way."""
    start = 0
    for block in catalog.batches([COLUMN, "caption"], ROWS_AT_ONCE):
        rows = np.arange(start, start + len(block["caption"]))
        fine, squared = nearest(_checked(block[COLUMN], rows, catalog), clustering.fine_centers)
        tally.add(fine, squared, block["caption"])
        expert = clustering.expert_of_fine[fine]
        yield {"fine_cluster": fine.astype(np.int32), "expert": expert.astype(np.int32)}
        start += len(rows)
        advance(len(rows))


def _count_words(
    catalog: Catalog, rows: Int[np.ndarray, " n"], fine: Int[np.ndarray, " n"], num_fine: int
) -> list[Counter[str]]:
    """Count the words of each fine cluster in the captions of the fit: a uniform sample, so words keep their shares."""
    words: list[Counter[str]] = [Counter() for _ in range(num_fine)]
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        captions = catalog.read(["caption"], rows[part])["caption"]
        for index, caption in zip(fine[part].tolist(), captions, strict=True):
            words[index].update(split_words(caption))
    return words


def _result(clustering: Clustering, tally: Tally, words: list[Counter[str]]) -> ClusterResult:
    """Write the cards."""
    corpus: Counter[str] = Counter()
    words_of_expert: list[Counter[str]] = [Counter() for _ in range(clustering.num_experts)]
    for counts, expert in zip(words, clustering.expert_of_fine.tolist(), strict=True):
        corpus.update(counts)
        words_of_expert[expert].update(counts)
    radius = tally.distances / np.maximum(tally.sizes, 1)
    fine = tuple(
        FineCard(
            index=index,
            expert=int(clustering.expert_of_fine[index]),
            size=int(tally.sizes[index]),
            radius=float(radius[index]),
            nearest_captions=tuple(caption for _, caption in tally.captions[index]),
            keywords=pick_keywords(words[index], corpus),
        )
        for index in range(clustering.num_fine)
    )
    num_fine = np.bincount(clustering.expert_of_fine, minlength=clustering.num_experts)
    sizes = np.zeros(clustering.num_experts, np.int64)
    np.add.at(sizes, clustering.expert_of_fine, tally.sizes)
    experts = tuple(
        ExpertCard(
            index=index,
            size=int(sizes[index]),
            range=float(clustering.range_of_expert[index]),
            num_fine=int(num_fine[index]),
            keywords=pick_keywords(words_of_expert[index], corpus),
        )
        for index in range(clustering.num_experts)
    )
    return ClusterResult(
        clustering=clustering,
        fine=fine,
        experts=experts,
        imbalance=float(sizes.max() * len(sizes) / sizes.sum()),
        objective=tally.squares / int(sizes.sum()),
    )

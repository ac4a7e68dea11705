"""A catalog's caption embeddings in; fine clusters, experts, and for every row its fine cluster and experts out.

Method: balanced k-means of a uniform sample of the rows makes M fine centres (a caption counts as often as it occurs),
balanced k-means of these makes K experts, and every row goes to its nearest fine centre and to that centre's expert.
So balance holds where the clustering is fitted, not where it is applied: `ClusterResult.imbalance` says what came out.
Experts are numbered by decreasing range, the order in which the paper trains them. With ``overlap`` a fine cluster also
belongs to the experts with the next nearest coarse centres; the first is always the one of the balanced clustering.

Three steps that can be taken one by one: `fit` makes a `Clustering`, `apply` assigns a catalog's rows to it and writes
the cards, `regroup` makes other experts of the same fine clusters.

Source: MoDE (arXiv 2404.16030) Sec. 3.2, 4.2 and 5.5; overlapping clusters are named there as future work, and this way
of having them is ours. The released code keeps the centres of its last shard; here one fit sees the whole sample.

Price: the fit holds at most ``fit_samples`` embeddings as float32 (3 GB for two million of 384 numbers); after it the
catalog's embeddings are read once, then its captions once, a block of rows at a time. Not for one caption:
`modeclip.clustering.kmeans.nearest` is that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from tyro.conf import arg

from modeclip.clustering.cards import ExpertCard, FineCard, Tally, make_cards
from modeclip.clustering.clusters import Clustering, group
from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.embedding import COLUMN
from modeclip.clustering.kmeans import kmeans
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import map_columns
from modeclip.errors import ModeclipError
from modeclip.system.console import progress
from modeclip.system.files import write_atomically

__all__ = [
    "Assignment",
    "ClusterConfig",
    "ClusterResult",
    "Clustering",
    "apply",
    "cluster",
    "count_pairs",
    "fit",
    "fit_embeddings",
    "imbalance_of",
    "read_config",
    "read_embeddings",
    "regroup",
    "sample_rows",
]

CARDS_FILE = "cards.json"
CONFIG_FILE = "config.json"
ROWS_AT_ONCE = 1 << 17
"""Rows of a block; 200 MB of float32 at 384 dimensions."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How captions are clustered and experts are formed."""

    num_fine: Annotated[int, arg(name="fine")] = 256
    """Fine clusters M, 1 or more; at most the distinct captions. Paper: 1024 for 400 million pairs."""
    num_experts: Annotated[int, arg(name="experts")] = 4
    """Experts K, 1 to ``num_fine``. Paper: 2 to 32."""
    max_size_ratio: float | None = 1.5
    """Largest fine cluster of the fit as a multiple of the mean, 1 or more; null: sizes are free."""
    max_expert_ratio: float | None = 1.25
    """Most fine clusters of an expert as a multiple of the mean, 1 or more; null: free."""
    fit_samples: int = 2_000_000
    """Rows that the fine centres are fitted on, drawn uniformly; fewer rows are all used. Paper: 2M suffice."""
    overlap: int = 1
    """Experts that each fine cluster belongs to, 1 to ``num_experts``. Paper: 1."""
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
        if not 1 <= self.overlap <= self.num_experts:
            raise ModeclipError(
                f"cluster.overlap: expected 1 to num_experts, which is {self.num_experts}, got {self.overlap}"
            )
        if self.fit_samples < self.num_fine:
            raise ModeclipError(
                f"cluster.fit_samples: expected at least num_fine, which is {self.num_fine}, got {self.fit_samples}"
            )


@dataclass(kw_only=True, eq=False)
class Assignment:
    """Work on blocks of rows, for `map_columns`: embeddings in; fine cluster, distance and experts out."""

    clustering: Clustering
    """Centres and experts."""
    facts: dict[str, Any]
    """What the columns are remembered by: hash of the clustering, facts of the embeddings."""
    inputs: tuple[str, ...] = (COLUMN,)
    """Columns that it reads."""
    outputs: tuple[str, ...] = ("fine_cluster", "fine_distance", "expert")
    """Columns that it makes."""
    unit: str = "captions"
    """What a row is to it."""

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Assign the rows of a block.

        Returns:
            ``fine_cluster`` (int32), ``fine_distance`` (float32, Euclidean distance to that centre) and ``expert``
            (int32; with overlapping experts a row of them, the first one first).

        Raises:
            ModeclipError: An embedding holds NaN or infinity.
        """
        fine, squared = assign_nearest(_finite(block[COLUMN]), self.clustering.fine_centers)
        experts = self.clustering.experts_of_fine[fine].astype(np.int32)
        return {
            "fine_cluster": fine.astype(np.int32),
            "fine_distance": np.sqrt(squared),
            "expert": experts if self.clustering.overlap > 1 else experts[:, 0],
        }


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
    config: ClusterConfig | None = None
    """What the clustering was made with; None where an earlier version made it."""

    def save(self, folder: Path | str) -> None:
        """Write ``clustering.safetensors``, ``cards.json`` and ``config.json`` into a folder."""
        self.clustering.save(folder)
        cards = {
            "fine": [asdict(card) for card in self.fine],
            "experts": [asdict(card) for card in self.experts],
            "imbalance": self.imbalance,
            "objective": self.objective,
        }
        write_atomically(Path(folder) / CARDS_FILE, json.dumps(cards, indent=1, ensure_ascii=False) + "\n")
        if self.config is not None:
            write_atomically(Path(folder) / CONFIG_FILE, json.dumps(asdict(self.config), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> ClusterResult:
        """Read what `save` wrote.

        Raises:
            ModeclipError: A file is not there, is damaged, or comes from an earlier version.
        """
        clustering, path = Clustering.load(folder), Path(folder) / CARDS_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                clustering=clustering,
                fine=tuple(FineCard(**_tuples(card)) for card in content["fine"]),
                experts=tuple(ExpertCard(**_tuples(card)) for card in content["experts"]),
                imbalance=content["imbalance"],
                objective=content["objective"],
                config=read_config(folder),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModeclipError(f"cluster cards {str(path)!r} cannot be read ({error}): cluster again") from error


def read_config(folder: Path | str) -> ClusterConfig | None:
    """Return what the clustering in a folder was made with; None where an earlier version made it.

    Raises:
        ModeclipError: The file is damaged.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        return ClusterConfig(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ModeclipError(f"{str(path)!r} cannot be read ({error}): cluster again") from error


def _tuples(card: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in card.items()}


def cluster(catalog: Catalog, config: ClusterConfig, *, ray: bool = False) -> ClusterResult:
    """Fit fine clusters and experts to a catalog and apply them to it: `fit`, then `apply`.

    The same embeddings, config, machine and number of threads give the same bytes.
    """
    return apply(catalog, fit(catalog, config), config, ray=ray)


def fit(catalog: Catalog, config: ClusterConfig) -> Clustering:
    """Fit fine clusters to a uniform sample of the rows, and group them into experts.

    Args:
        catalog: With the column ``caption_embedding``.
        config: Numbers of clusters and experts, limits of their sizes, sample, seed.

    Raises:
        ModeclipError: The column is missing or holds NaN, or there are fewer distinct captions than fine clusters.
    """
    x = read_embeddings(catalog, sample_rows(len(catalog), config.fit_samples, config.seed))
    _check_distinct(catalog, x, config)
    with progress("fit fine clusters", config.num_iterations, "iterations") as advance:
        return fit_embeddings(x, config, on_iteration=lambda: advance(1))


def fit_embeddings(
    x: Float[np.ndarray, "N D"], config: ClusterConfig, *, on_iteration: Callable[[], object] | None = None
) -> Clustering:
    """Fit fine clusters to embeddings and group them into experts.

    Args:
        x: One row a caption, a caption that occurs twice twice; all of them are used.
        config: As for `fit`; ``fit_samples`` plays no part.
        on_iteration: Called after each iteration of the first k-means.
    """
    fine = kmeans(
        x,
        config.num_fine,
        max_size_ratio=config.max_size_ratio,
        num_iterations=config.num_iterations,
        seed=config.seed,
        on_iteration=on_iteration,
    )
    return _group(fine.centers, config.num_experts, config)


def regroup(clustering: Clustering, num_experts: int, config: ClusterConfig) -> Clustering:
    """Make another number of experts of the same fine clusters, which takes no second look at the captions.

    Args:
        clustering: Whose fine clusters are kept, numbers included.
        num_experts: Experts, 1 to the number of fine clusters.
        config: Overlap (at most ``num_experts`` of it), limit of an expert's size, iterations and seed of the coarse
            k-means; the config of the fit gives what the fit with this number of experts would have given.

    Raises:
        ModeclipError: There are fewer fine clusters than experts.
    """
    return _group(clustering.fine_centers, num_experts, config)


def _group(fine_centers: Float[np.ndarray, "M D"], num_experts: int, config: ClusterConfig) -> Clustering:
    return group(
        fine_centers,
        num_experts,
        overlap=min(config.overlap, num_experts),
        max_expert_ratio=config.max_expert_ratio,
        num_iterations=config.num_iterations,
        seed=config.seed,
    )


def apply(catalog: Catalog, clustering: Clustering, config: ClusterConfig, *, ray: bool = False) -> ClusterResult:
    """Add ``fine_cluster``, ``fine_distance`` and ``expert`` to a catalog, and write the cards of what came out.

    ``expert`` is int32, or with overlapping experts a fixed-size list of them. The columns of another clustering are
    replaced; those of this one are kept, and only rows that were added since are assigned.

    Args:
        catalog: With the column ``caption_embedding``, from the encoder that the clustering was fitted with.
        clustering: Centres and experts.
        config: ``fit_samples`` rows, at most, are sampled for key words and quantiles, by ``seed``.
        ray: Assign on a Ray cluster, as `modeclip.data.mapping.map_columns` says; the same bytes come out.

    Raises:
        ModeclipError: The column is missing or holds NaN.
    """
    _require_embeddings(catalog)
    facts = {"clustering": clustering.digest, "embedding": catalog.facts(COLUMN)}
    map_columns(catalog, Assignment(clustering=clustering, facts=facts), "assign captions", ray=ray)
    tally = Tally(clustering.num_fine, sample_rows(len(catalog), config.fit_samples, config.seed), config.seed)
    with progress("count words", len(catalog), "captions") as advance:
        for block in catalog.batches(["fine_cluster", "fine_distance", "caption"], ROWS_AT_ONCE):
            tally.add(block["fine_cluster"], block["fine_distance"], block["caption"])
            advance(len(block["caption"]))
    fine, experts = make_cards(tally, clustering.experts_of_fine, clustering.range_of_expert)
    return ClusterResult(
        clustering=clustering,
        fine=fine,
        experts=experts,
        imbalance=imbalance_of([card.size for card in experts]),
        objective=tally.squares / max(len(catalog), 1),
        config=config,
    )


def count_pairs(catalog: Catalog, num_experts: int, column: str = "expert") -> Int[np.ndarray, " K"]:
    """Count the rows of each expert, as a column of the catalog has them; a row of two experts counts for both."""
    counts = np.zeros(num_experts, np.int64)
    for block in catalog.batches([column]):
        counts += np.bincount(block[column].reshape(-1), minlength=num_experts)[:num_experts]
    return counts


def imbalance_of(sizes: Sequence[int] | Int[np.ndarray, " K"]) -> float:
    """Return the largest size as a multiple of the mean; 1 if all are 0.

    Examples:
        >>> imbalance_of([10, 20, 30])
        1.5
    """
    total = int(np.sum(sizes))
    return float(np.max(sizes) * len(sizes) / total) if total else 1.0


def sample_rows(num_rows: int, count: int, seed: int) -> Int[np.ndarray, " n"]:
    """Return ``count`` rows drawn uniformly without repeats, ascending; all where there are fewer."""
    if num_rows <= count:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, count, replace=False))


def read_embeddings(catalog: Catalog, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
    """Read the embeddings of some rows as float32.

    Raises:
        ModeclipError: The catalog has no embeddings, or one of these holds NaN or infinity.
    """
    _require_embeddings(catalog)
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    read = [_finite(catalog.read([COLUMN], part)[COLUMN], part) for part in parts]
    return np.concatenate(read) if read else np.empty((0, 1), np.float32)


def _require_embeddings(catalog: Catalog) -> None:
    if COLUMN not in catalog.columns:
        raise ModeclipError(
            f"catalog {str(catalog.path)!r} has no column {COLUMN}: embed its captions first (stage embed)"
        )


def _finite(vectors: Shaped[np.ndarray, "n D"], rows: Int[np.ndarray, " n"] | None = None) -> Float[np.ndarray, "n D"]:
    """Return embeddings as float32, after a look for NaN and infinity."""
    vectors = np.asarray(vectors, np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if bad.size:
        where = f"row {bad[0]} of a block of {len(vectors):,}" if rows is None else f"row {rows[bad[0]]}"
        raise ModeclipError(
            f"column {COLUMN} has NaN or infinite values, first in {where}: embed the captions again (stage embed)"
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

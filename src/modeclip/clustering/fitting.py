"""Fits fine clusters and experts to caption embeddings, and assigns every row of a catalog to them.

Method: balanced k-means of a uniform sample of the selected rows makes M fine centres (a caption counts as often as it
occurs), balanced k-means of these makes K experts, and every row of the catalog, selected or not, goes to its nearest
fine centre and so to that centre's expert.
The clustering is balanced on the sample that it is fitted to, but not where it is applied: `ClusterResult.imbalance`
says what came out.

There are three steps: `fit` makes a `Clustering`, `apply` assigns the rows of a catalog to it and writes the cards,
and `regroup` makes other experts of the same fine clusters. `cluster` does the first two.

Source: MoDE (arXiv 2404.16030) Sec. 3.2 and 4.2. The released code keeps the centres of its last shard; here one fit
sees the whole sample.

Price: the fit holds at most ``fit_samples`` embeddings as float32 (3 GB for two million of 384 numbers). Applying it
reads the embeddings once and then the captions once, a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int
from typing_extensions import TypedDict
from tyro.conf import arg

from modeclip.clustering.cards import ExpertCard, FineCard, Tally, make_cards
from modeclip.clustering.clusters import Clustering, group
from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.embedding import COLUMN, ROWS_AT_ONCE, check_finite, read_embeddings, require_embeddings
from modeclip.clustering.kmeans import kmeans
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import Work, map_columns
from modeclip.data.selection import ALL, Selection
from modeclip.errors import ModeclipError, check_least
from modeclip.system.console import log, progress
from modeclip.system.files import read_json, write_json

CARDS_FILE = "cards.json"
CONFIG_FILE = "config.json"
PAIRS_PER_FINE = 100
"""Pairs for each fine cluster where their number is not given: enough for key words, a range and quantiles. The demo
has 92, the paper 390,000."""
FINE_PER_EXPERT, MOST_FINE = 4, 1024
"""Fewest fine clusters for each expert, and most in all, where their number is not given; the paper's number."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How captions are clustered, and how experts are formed of the clusters."""

    num_fine: Annotated[int | None, arg(name="fine")] = None
    """Number of fine clusters, M: 1 to the number of distinct captions. Paper: 1024 for 400 million pairs. None: one
    for every 100 pairs, at least 4 for each expert and at most 1024, as far as there are distinct captions."""
    num_experts: Annotated[int, arg(name="experts")] = 4
    """Number of experts, K: 1 to the number of fine clusters. Paper: 2 to 32."""
    max_size_ratio: float | None = 1.5
    """Largest size that a fine cluster may have in the fit, as a multiple of the mean, 1 or more. None: any size."""
    max_expert_ratio: float | None = 1.25
    """Most fine clusters that an expert may have, as a multiple of the mean, 1 or more. None: any number."""
    fit_samples: int = 2_000_000
    """Rows that the fine centres are fitted on, drawn uniformly; all if there are fewer. Paper: 2 million suffice."""
    overlap: int = 1
    """Number of experts that each fine cluster belongs to, 1 to the number of experts. Paper: 1."""
    num_iterations: int = 25
    """Most iterations of each k-means, 0 or more; it stops earlier when the objective stands still."""
    seed: int = 0
    """Decides which rows are sampled and where both k-means start."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_least("cluster", self, num_experts=1, num_iterations=0, fit_samples=1, seed=0)
        if self.num_fine is not None:
            self._check_fine(self.num_fine)
        elif self.fit_samples < self.num_experts:
            raise ModeclipError(
                f"cluster.fit_samples: expected at least num_experts, which is {self.num_experts}, got"
                f" {self.fit_samples}"
            )
        for name in ("max_size_ratio", "max_expert_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 1 <= ratio < math.inf:
                raise ModeclipError(
                    f"cluster.{name}: expected 1 or more, or null (None on the command line) for no limit, got {ratio}"
                )
        if not 1 <= self.overlap <= self.num_experts:
            raise ModeclipError(
                f"cluster.overlap: expected 1 to num_experts, which is {self.num_experts}, got {self.overlap}"
            )

    def _check_fine(self, num_fine: int) -> None:
        check_least("cluster", self, num_fine=1)
        if self.num_experts > num_fine:
            raise ModeclipError(
                f"cluster.num_experts: expected at most num_fine, which is {num_fine}, got {self.num_experts}: "
                "every expert needs a fine cluster"
            )
        if self.fit_samples < num_fine:
            raise ModeclipError(
                f"cluster.fit_samples: expected at least num_fine, which is {num_fine}, got {self.fit_samples}"
            )


@dataclass(kw_only=True, eq=False)
class AssignWork(Work):
    """Assigns blocks of embedded captions to fine clusters and experts."""

    clustering: Clustering
    """Centres and experts."""
    facts: dict[str, Any]
    """Hash of the clustering, and the facts of the embeddings."""
    inputs = (COLUMN,)
    outputs: tuple[str, ...] = ("fine_cluster", "fine_distance", "expert")
    unit = "captions"

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Assign the rows of a block.

        Returns:
            ``fine_cluster`` (int32), ``fine_distance`` (float32, Euclidean distance to that centre) and ``expert``
            (int32; with overlap a row of experts, the one of the balanced grouping first).

        Raises:
            ModeclipError: An embedding holds NaN or infinity.
        """
        fine, squared = assign_nearest(check_finite(block[COLUMN]), self.clustering.fine_centers)
        experts = self.clustering.experts_of_fine[fine].astype(np.int32)
        return {
            "fine_cluster": fine.astype(np.int32),
            "fine_distance": np.sqrt(squared),
            "expert": experts if self.clustering.overlap > 1 else experts[:, 0],
        }


class Cards(TypedDict):
    """What ``cards.json`` holds."""

    fine: list[FineCard]
    """A card for each fine cluster."""
    experts: list[ExpertCard]
    """A card for each expert."""
    imbalance: float
    """As in `ClusterResult`."""
    objective: float
    """As in `ClusterResult`."""


AGAIN = "cluster again (modeclip cluster)"


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterResult:
    """A clustering, and what came out when it was applied to a catalog."""

    clustering: Clustering
    """Centres and experts."""
    fine: tuple[FineCard, ...]
    """A card for each fine cluster, in their order."""
    experts: tuple[ExpertCard, ...]
    """A card for each expert, in their order."""
    imbalance: float
    """Rows of the largest expert as a multiple of the mean, 1 or more."""
    objective: float
    """Mean over the selected rows of the squared distance to the nearest fine centre."""
    config: ClusterConfig | None = None
    """Settings that the clustering was made with; None if an earlier version made it."""

    def save(self, folder: Path | str) -> None:
        """Write ``clustering.safetensors``, ``cards.json`` and ``config.json`` into a folder."""
        self.clustering.save(folder)
        cards: dict[str, Any] = {
            "fine": [asdict(card) for card in self.fine],
            "experts": [asdict(card) for card in self.experts],
            "imbalance": self.imbalance,
            "objective": self.objective,
        }
        write_json(Path(folder) / CARDS_FILE, cards, ensure_ascii=False)
        if self.config is not None:
            write_json(Path(folder) / CONFIG_FILE, asdict(self.config))

    @classmethod
    def load(cls, folder: Path | str) -> ClusterResult:
        """Read what `save` wrote.

        Raises:
            ModeclipError: A file is not there, is damaged, or comes from an earlier version.
        """
        clustering, path = Clustering.load(folder), Path(folder) / CARDS_FILE
        cards = read_json(path, Cards, AGAIN)
        return cls(
            clustering=clustering,
            fine=tuple(cards["fine"]),
            experts=tuple(cards["experts"]),
            imbalance=cards["imbalance"],
            objective=cards["objective"],
            config=read_config(folder),
        )


def read_config(folder: Path | str) -> ClusterConfig | None:
    """Return the settings that the clustering in a folder was made with; None if an earlier version made it.

    Raises:
        ModeclipError: The file is damaged.
    """
    path = Path(folder) / CONFIG_FILE
    return read_json(path, ClusterConfig, AGAIN) if path.exists() else None


def cluster(catalog: Catalog, config: ClusterConfig, *, selection: Selection = ALL, ray: bool = False) -> ClusterResult:
    """Fit fine clusters and experts to the selected pairs of a catalog, and apply them to all: `fit`, then `apply`.

    The same embeddings, config, selection, machine and number of threads give the same bytes.
    """
    clustering = fit(catalog, config, selection)
    config = replace(config, num_fine=clustering.num_fine)
    return apply(catalog, clustering, config, selection=selection, ray=ray)


def choose_num_fine(num_pairs: int, num_experts: int) -> int:
    """Return a number of fine clusters for so many pairs, if there are as many distinct captions.

    Examples:
        >>> choose_num_fine(8_867, 4), choose_num_fine(500, 4), choose_num_fine(400_000_000, 32)
        (89, 16, 1024)
    """
    return max(min(max(round(num_pairs / PAIRS_PER_FINE), FINE_PER_EXPERT * num_experts), MOST_FINE), num_experts)


def fit(catalog: Catalog, config: ClusterConfig, selection: Selection = ALL) -> Clustering:
    """Fit fine clusters to a uniform sample of the selected rows, and group them into experts.

    Args:
        catalog: With the column ``caption_embedding``.
        config: Numbers of clusters and experts, limits on their sizes, sample and seed.
        selection: Rows that are clustered.

    Raises:
        ModeclipError: The column is missing or holds NaN, or there are fewer distinct captions than fine clusters.
    """
    rows = selection.rows(catalog)
    x = read_embeddings(catalog, rows[sample_rows(len(rows), config.fit_samples, config.seed)])
    config = _check_distinct(catalog, x, config, len(rows))
    with progress("fit fine clusters", config.num_iterations, "iterations") as advance:
        return fit_embeddings(x, config, on_iteration=lambda: advance(1))


def fit_embeddings(
    x: Float[np.ndarray, "N D"], config: ClusterConfig, *, on_iteration: Callable[[], object] | None = None
) -> Clustering:
    """Fit fine clusters to embeddings and group them into experts.

    Args:
        x: The embedding of one caption in each row, repeated as often as the caption occurs. All rows are used.
        config: As for `fit`; ``fit_samples`` is not used.
        on_iteration: Called after each iteration of the first k-means.
    """
    fine = kmeans(
        x,
        config.num_fine or choose_num_fine(len(x), config.num_experts),
        max_size_ratio=config.max_size_ratio,
        num_iterations=config.num_iterations,
        seed=config.seed,
        on_iteration=on_iteration,
    )
    return _group(fine.centers, config.num_experts, config)


def regroup(clustering: Clustering, num_experts: int, config: ClusterConfig) -> Clustering:
    """Make another number of experts of the same fine clusters, without looking at the captions again.

    With the config of the fit, this gives what the fit would have given with that number of experts.

    Args:
        clustering: The clustering whose fine clusters are kept, with their numbers.
        num_experts: Experts, 1 to the number of fine clusters.
        config: Overlap (reduced to ``num_experts`` if it is more), limit on an expert's size, iterations and seed.

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


def apply(
    catalog: Catalog,
    clustering: Clustering,
    config: ClusterConfig,
    *,
    selection: Selection = ALL,
    ray: bool = False,
) -> ClusterResult:
    """Add ``fine_cluster``, ``fine_distance`` and ``expert`` to a catalog, and describe the clusters in cards.

    ``expert`` is int32, or with overlap a fixed-size list of int32. Columns of another clustering are replaced. If the
    columns are of this clustering already, only the rows that were added since are assigned.

    Args:
        catalog: With the column ``caption_embedding``, made by the encoder that the clustering was fitted with.
        clustering: Centres and experts.
        config: Key words and quantiles come from a sample of at most ``fit_samples`` rows, drawn by ``seed``.
        selection: Rows that the cards and the other numbers describe; every row is assigned.
        ray: Assign on a Ray cluster, as `modeclip.data.mapping.map_columns` says; the same bytes come out.

    Raises:
        ModeclipError: The column is missing or holds NaN.
    """
    require_embeddings(catalog)
    facts = {"clustering": clustering.digest, "embedding": catalog.facts(COLUMN)}
    map_columns(catalog, AssignWork(clustering=clustering, facts=facts), "assign captions", ray=ray)
    chosen = selection.mask_of(catalog)
    rows, start = np.flatnonzero(chosen), 0
    sample = rows[sample_rows(len(rows), config.fit_samples, config.seed)]
    tally = Tally(clustering.num_fine, sample, config.seed)
    with progress("count words", len(catalog), "captions") as advance:
        for block in catalog.batches(["fine_cluster", "fine_distance", "caption"], ROWS_AT_ONCE):
            count = len(block["caption"])
            tally.add(block["fine_cluster"], block["fine_distance"], block["caption"], chosen[start : start + count])
            start += count
            advance(count)
    fine, experts = make_cards(tally, clustering.experts_of_fine, clustering.range_of_expert)
    return ClusterResult(
        clustering=clustering,
        fine=fine,
        experts=experts,
        imbalance=imbalance_of([card.size for card in experts]),
        objective=tally.squares / max(len(rows), 1),
        config=config,
    )


def count_pairs(
    catalog: Catalog, num_experts: int, column: str = "expert", selection: Selection = ALL
) -> Int[np.ndarray, " K"]:
    """Count the selected rows of each expert in a column of the catalog; a row with two experts counts for both."""
    counts, chosen, start = np.zeros(num_experts, np.int64), selection.mask_of(catalog), 0
    for block in catalog.batches([column]):
        own = block[column][chosen[start : start + len(block[column])]]
        counts += np.bincount(own.reshape(-1), minlength=num_experts)[:num_experts]
        start += len(block[column])
    return counts


def imbalance_of(sizes: Sequence[int] | Int[np.ndarray, " K"]) -> float:
    """Return the largest size as a multiple of the mean size, or 1 if all sizes are 0.

    Examples:
        >>> imbalance_of([10, 20, 30])
        1.5
    """
    total = int(np.sum(sizes))
    return float(np.max(sizes) * len(sizes) / total) if total else 1.0


def sample_rows(num_rows: int, count: int, seed: int) -> Int[np.ndarray, " n"]:
    """Draw ``count`` rows uniformly without repeats, ascending; if there are not more, return all."""
    if num_rows <= count:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, count, replace=False))


def _check_distinct(
    catalog: Catalog, x: Float[np.ndarray, "n D"], config: ClusterConfig, num_pairs: int
) -> ClusterConfig:
    """Return the config with its number of fine clusters; raise if there are fewer distinct embeddings than these."""
    wanted = config.num_fine or choose_num_fine(num_pairs, config.num_experts)
    seen: set[bytes] = set()
    for vector in x:
        seen.add(vector.tobytes())
        if len(seen) >= wanted:
            break
    if config.num_fine is None and len(seen) >= config.num_experts:
        log(f"cluster: {len(seen):,} fine clusters for {num_pairs:,} pairs (num_fine sets another number)")
        return replace(config, num_fine=len(seen))
    if len(seen) >= wanted:
        return config
    if config.num_fine is None:
        raise ModeclipError(
            f"cluster.num_experts is {config.num_experts}, but {str(catalog.path)!r} has only {len(seen)} distinct"
            f" captions: set num_experts to {len(seen)} or less"
        )
    sampled = f" in the {len(x):,} rows sampled for the fit" if len(x) < num_pairs else ""
    raise ModeclipError(
        f"cluster.num_fine is {config.num_fine}, but {str(catalog.path)!r} has only {len(seen)} distinct captions"
        f"{sampled}: set num_fine to {len(seen)} or less" + (", or raise fit_samples" if sampled else "")
    )

"""Tells what the choices behind a clustering are worth: other numbers of clusters, other seeds, false negatives.

- Sweep of K: the same fine clusters are grouped into other numbers of experts; no fine cluster is fitted again.
- Sweep of M: fine clusters are fitted to a sample again, for each number of them.
- Stability: the whole clustering is fitted to a sample again with other seeds. The adjusted Rand index of two of these
  is 1 if they agree on which rows belong together, and 0 if they agree as much as chance would.
- False negatives: `modeclip.clustering.negatives`.

Source: adjusted Rand index by Hubert and Arabie 1985, as scikit-learn computes it; range by MoDE (Sec. 5.5).

Price: the sweep of K takes a second for 1024 fine clusters, and counting negatives a few. The sweep of M and the
stability cost a fit of ``num_samples`` rows for each number and each seed, and the memory of that sample.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int
from typing_extensions import TypedDict
from tyro.conf import arg

from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.embedding import ROWS_AT_ONCE, read_embeddings
from modeclip.clustering.fitting import ClusterConfig, ClusterResult, fit_embeddings, imbalance_of, regroup, sample_rows
from modeclip.clustering.kmeans import kmeans
from modeclip.clustering.negatives import DEFAULT_THRESHOLD, NegativeReport, Negatives, measure_negatives
from modeclip.data.catalog import Catalog
from modeclip.data.selection import ALL, Selection
from modeclip.errors import LIMIT, ModeclipError, check_least
from modeclip.system.console import log, progress
from modeclip.system.files import read_json, write_json

DIAGNOSTICS_FILE = "diagnostics.json"

Table = tuple[str, list[str], list[list[str]]]
"""Title, names of the columns, rows: the arguments of `modeclip.system.console.print_table`."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """What is compared with the clustering that was made, and how its false negatives are counted."""

    experts: Annotated[tuple[int, ...], arg(name="sweep-experts")] = (2, 4, 8, 16, 32)
    """Numbers of experts to compare; those above the number of fine clusters are left out."""
    fine: Annotated[tuple[int, ...], arg(name="sweep-fine")] = ()
    """Numbers of fine clusters to compare, each at most the number of samples. Paper: 2 to 2048."""
    num_seeds: Annotated[int, arg(name="stability")] = 0
    """How many seeds to compare, 2 or more; 0: none."""
    num_samples: int = 50_000
    """Rows, drawn uniformly, on which numbers of fine clusters and seeds are compared, 2 or more."""
    batch_size: int = 256
    """Pairs of a batch in which false negatives are counted, 2 or more: give the batch size of the training."""
    num_batches: int = 100
    """Batches of each kind in which false negatives are counted; 0: they are not counted."""
    threshold: float = DEFAULT_THRESHOLD
    """Cosine from which two captions count as saying the same, in (0, 1]."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(*self.experts, *self.fine, 1, 1) < 1:
            raise ModeclipError(f"diagnose: expected numbers of 1 or more, got {[*self.experts, *self.fine]}")
        if not 0 <= self.num_seeds < LIMIT or self.num_seeds == 1:
            raise ModeclipError(f"diagnose.num_seeds: expected 0, or 2 or more to compare, got {self.num_seeds}")
        check_least("diagnose", self, num_samples=2, batch_size=2, num_batches=0)
        if not 0 < self.threshold <= 1:
            raise ModeclipError(f"diagnose.threshold: expected a cosine in (0, 1], got {self.threshold}")


@dataclass(frozen=True, kw_only=True)
class ExpertsTrial:
    """What comes of one number of experts, made from the same fine clusters."""

    num_experts: int
    """Number of experts, K."""
    imbalance: float
    """Rows of the largest expert as a multiple of the mean, 1 or more."""
    smallest: int
    """Rows of the smallest expert, which is all that it has to train on."""
    mean_range: float
    """Mean over the experts of their range: the mean distance of their own fine centres to their coarse centre."""
    objective: float
    """Mean over fine clusters of the squared distance to their expert's coarse centre."""


@dataclass(frozen=True, kw_only=True)
class FineTrial:
    """What comes of one number of fine clusters, fitted to the sample."""

    num_fine: int
    """Number of fine clusters, M."""
    objective: float
    """Mean over the sample of the squared distance to the nearest centre."""
    imbalance: float
    """Rows of the largest cluster as a multiple of the mean, with each row in its nearest cluster."""
    num_empty: int
    """Number of clusters that are nearest to no row."""
    seconds: float
    """Time that the fit took."""


@dataclass(frozen=True, kw_only=True)
class SeedPair:
    """How far the clusterings of two seeds agree on the rows of the sample."""

    seeds: tuple[int, int]
    """The seeds."""
    fine: float
    """Adjusted Rand index of the fine clusters, at most 1."""
    experts: float
    """Adjusted Rand index of the experts, at most 1."""


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How far clusterings by different seeds agree."""

    pairs: tuple[SeedPair, ...]
    """All pairs of seeds."""

    @property
    def fine(self) -> tuple[float, float]:
        """Mean and standard deviation, over the pairs, of the index of the fine clusters."""
        return _mean_and_deviation([pair.fine for pair in self.pairs])

    @property
    def experts(self) -> tuple[float, float]:
        """Mean and standard deviation, over the pairs, of the index of the experts."""
        return _mean_and_deviation([pair.experts for pair in self.pairs])


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """What `diagnose` found; a part that was not looked into is empty or None."""

    experts: tuple[ExpertsTrial, ...] = ()
    """Numbers of experts that were compared."""
    fine: tuple[FineTrial, ...] = ()
    """Numbers of fine clusters that were compared."""
    stability: Stability | None = None
    """Agreement of the seeds that were compared."""
    negatives: NegativeReport | None = None
    """False negatives in random batches and in batches of one cluster."""
    num_samples: int = 0
    """Rows of the sample that fine clusters and seeds were compared on."""

    def tables(self) -> list[Table]:
        """Return a table for each part that was looked into."""
        tables: list[Table] = []
        if self.experts:
            tables.append(
                (
                    "experts from the same fine clusters",
                    ["experts", "largest / mean", "fewest rows", "mean range", "objective"],
                    [
                        [
                            str(trial.num_experts),
                            f"{trial.imbalance:.2f}",
                            f"{trial.smallest:,}",
                            f"{trial.mean_range:.3f}",
                            f"{trial.objective:.4f}",
                        ]
                        for trial in self.experts
                    ],
                )
            )
        if self.fine:
            tables.append(
                (
                    f"fine clusters of {self.num_samples:,} sampled rows",
                    ["fine clusters", "objective", "largest / mean", "empty", "seconds"],
                    [
                        [
                            str(trial.num_fine),
                            f"{trial.objective:.4f}",
                            f"{trial.imbalance:.2f}",
                            str(trial.num_empty),
                            f"{trial.seconds:.1f}",
                        ]
                        for trial in self.fine
                    ],
                )
            )
        if self.stability:
            pairs = [
                [f"{pair.seeds[0]} and {pair.seeds[1]}", f"{pair.fine:.3f}", f"{pair.experts:.3f}"]
                for pair in self.stability.pairs
            ]
            means = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in (self.stability.fine, self.stability.experts)]
            tables.append(
                (
                    f"agreement of seeds on {self.num_samples:,} sampled rows, adjusted Rand index",
                    ["seeds", "fine clusters", "experts"],
                    [*pairs, ["mean ± deviation", *means]],
                )
            )
        if self.negatives:
            tables.append(
                (
                    f"negatives in batches of {self.negatives.batch_size:,}, false from cosine "
                    f"{self.negatives.threshold:g} on",
                    ["batches", "identical %", "false %", "95 %", "false per pair", "cosine of the others"],
                    [_negatives_row(kind) for kind in self.negatives.kinds],
                )
            )
        return tables

    def save(self, folder: Path | str) -> None:
        """Write ``diagnostics.json`` into a folder, which is made."""
        path = Path(folder) / DIAGNOSTICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        if self.negatives:
            content["negatives"]["verdict"] = self.negatives.verdict
        write_json(path, content)

    @classmethod
    def load(cls, folder: Path | str) -> Diagnostics:
        """Read what `save` wrote.

        Raises:
            ModeclipError: The file is not there, is damaged, or comes from another version.
        """
        return cls(**read_json(Path(folder) / DIAGNOSTICS_FILE, _Content, "cluster again (modeclip cluster)"))


class _Content(TypedDict):
    """The fields of `Diagnostics`, all of which its file has."""

    experts: tuple[ExpertsTrial, ...]
    fine: tuple[FineTrial, ...]
    stability: Stability | None
    negatives: NegativeReport | None
    num_samples: int


def diagnose(
    catalog: Catalog,
    result: ClusterResult,
    config: ClusterConfig,
    what: DiagnoseConfig | None = None,
    *,
    selection: Selection = ALL,
) -> Diagnostics:
    """Examine a clustering that was applied to a catalog.

    Args:
        catalog: A catalog with the columns that `modeclip.clustering.fitting.apply` adds.
        result: What `apply` returned.
        config: Settings of the clustering; their seed also decides the samples and the batches.
        what: What to look into, and with how many rows.
        selection: Rows that were clustered.

    Raises:
        ModeclipError: The catalog is not clustered, or the sample is smaller than a number of clusters.
    """
    what = what or DiagnoseConfig()
    rows = selection.rows(catalog)
    num_samples = min(what.num_samples, len(rows))
    config = replace(config, num_fine=config.num_fine or result.clustering.num_fine)
    most = max([*what.fine, *([result.clustering.num_fine] if what.num_seeds else [])], default=0)
    if most > num_samples:
        raise ModeclipError(
            f"diagnose.num_samples: expected at least {most:,}, the most fine clusters that are fitted, got "
            f"{num_samples:,} rows; raise it, or ask for fewer clusters"
        )
    fits = len(what.fine) or what.num_seeds
    x = read_embeddings(catalog, rows[sample_rows(len(rows), num_samples, config.seed)]) if fits else None
    numbers = [number for number in what.experts if number <= result.clustering.num_fine]
    if len(numbers) < len(what.experts):
        log(f"sweep of experts: left out numbers above {result.clustering.num_fine}, the number of fine clusters")
    return Diagnostics(
        experts=sweep_experts(result, numbers, config),
        fine=sweep_fine(x, what.fine, config) if x is not None else (),
        stability=measure_stability(x, what.num_seeds, config) if x is not None and what.num_seeds else None,
        negatives=_count_negatives(catalog, result, config, what, rows) if what.num_batches else None,
        num_samples=num_samples if fits else 0,
    )


def sweep_experts(result: ClusterResult, numbers: Sequence[int], config: ClusterConfig) -> tuple[ExpertsTrial, ...]:
    """Group the same fine clusters into several numbers of experts, without assigning the catalog to them.

    Args:
        result: Fine clusters and their sizes.
        numbers: Numbers of experts, each at most the number of fine clusters.
        config: As for `modeclip.clustering.fitting.regroup`.
    """
    sizes = np.array([card.size for card in result.fine])
    trials = []
    for number in numbers:
        clustering = regroup(result.clustering, number, config)
        own = clustering.coarse_centers[clustering.expert_of_fine]
        rows = [int(sizes[(clustering.experts_of_fine == k).any(1)].sum()) for k in range(number)]
        squares = np.square(clustering.fine_centers.astype(np.float64) - own).sum(1)
        trial = ExpertsTrial(
            num_experts=number,
            imbalance=imbalance_of(rows),
            smallest=min(rows),
            mean_range=float(clustering.range_of_expert.mean()),
            objective=float(squares.mean()),
        )
        trials.append(trial)
    return tuple(trials)


def sweep_fine(x: Float[np.ndarray, "N D"], numbers: Sequence[int], config: ClusterConfig) -> tuple[FineTrial, ...]:
    """Fit several numbers of fine clusters to the same embeddings.

    Args:
        x: Embeddings of the sample.
        numbers: Numbers of fine clusters, each at most N.
        config: Limit on a cluster's size, iterations and seed.
    """
    trials = []
    with progress("sweep fine clusters", sum(numbers), "clusters") as advance:
        for number in numbers:
            started = time.monotonic()
            fit = kmeans(
                x,
                number,
                max_size_ratio=config.max_size_ratio,
                num_iterations=config.num_iterations,
                seed=config.seed,
            )
            seconds = time.monotonic() - started
            assignment, squared = assign_nearest(x, fit.centers)
            sizes = np.bincount(assignment, minlength=number)
            trial = FineTrial(
                num_fine=number,
                objective=float(squared.mean(dtype=np.float64)),
                imbalance=imbalance_of(sizes),
                num_empty=int((sizes == 0).sum()),
                seconds=seconds,
            )
            trials.append(trial)
            advance(number)
    return tuple(trials)


def measure_stability(x: Float[np.ndarray, "N D"], num_seeds: int, config: ClusterConfig) -> Stability:
    """Compare the clusterings that different seeds make of the same embeddings.

    Args:
        x: Embeddings of the sample.
        num_seeds: How many seeds to compare, 2 or more: the config's seed and the numbers after it.
        config: Settings of the clustering.
    """
    from sklearn.metrics import adjusted_rand_score

    labels = {}
    with progress("compare seeds", num_seeds, "seeds") as advance:
        for seed in range(config.seed, config.seed + num_seeds):
            clustering = fit_embeddings(x, replace(config, seed=seed))
            fine = assign_nearest(x, clustering.fine_centers)[0]
            labels[seed] = fine, clustering.expert_of_fine[fine]
            advance(1)
    return Stability(
        pairs=tuple(
            SeedPair(
                seeds=(first, second),
                fine=float(adjusted_rand_score(labels[first][0], labels[second][0])),
                experts=float(adjusted_rand_score(labels[first][1], labels[second][1])),
            )
            for first, second in itertools.combinations(labels, 2)
        )
    )


def _count_negatives(
    catalog: Catalog,
    result: ClusterResult,
    config: ClusterConfig,
    what: DiagnoseConfig,
    selected: Int[np.ndarray, " n"],
) -> NegativeReport:
    """Count false negatives in batches of the selected rows; of those in no batch, only labels are held."""
    rows = selected[sample_rows(len(selected), config.fit_samples, config.seed)]
    fine, caption_ids = [], []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = catalog.read(["fine_cluster", "caption"], rows[start : start + ROWS_AT_ONCE])
        fine.append(part["fine_cluster"])
        caption_ids.append(np.array([hash(caption) for caption in part["caption"]]))
    clusters = np.concatenate(fine)
    with progress("count false negatives", 3 * what.num_batches, "batches") as advance:

        def read_batch(positions: np.ndarray) -> np.ndarray:
            advance(1)
            return read_embeddings(catalog, rows[positions])

        return measure_negatives(
            read_batch,
            np.concatenate(caption_ids),
            clusters,
            result.clustering.experts_of_fine[clusters],
            batch_size=what.batch_size,
            num_batches=what.num_batches,
            threshold=what.threshold,
            seed=config.seed,
        )


def _negatives_row(kind: Negatives) -> list[str]:
    name = {"random": "random", "expert": "of one expert", "fine": "of one fine cluster"}[kind.kind]
    low, high = kind.false.interval
    return [
        name,
        f"{100 * kind.identical:.3g}",
        f"{100 * kind.false.mean:.3g}",
        f"{100 * max(low, 0):.3g} to {100 * high:.3g}",
        f"{kind.false_per_pair.mean:.2f}",
        f"{kind.cosine.mean:.3f}" if kind.cosine else "",
    ]


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

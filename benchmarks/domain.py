"""How often routing says "out of domain": on held-out captions of a run's own data, and on names from elsewhere.

    python benchmarks/domain.py runs/demo

Half of the captions are clustered into as many fine clusters as the run has, and the other half is compared with the
quantiles of the first, once with all rows and once with each caption in one half only. Then the class names of the
run's tasks and others are compared with the run's bundle.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.embedding import read_embeddings
from modeclip.clustering.kmeans import kmeans
from modeclip.clustering.novelty import fit_quantiles
from modeclip.data.catalog import Catalog
from modeclip.data.tasks.task import catalog_tasks
from modeclip.mixture.explain import Domain
from modeclip.mixture.mode import MoDE
from modeclip.models.clip import imagenet_words
from modeclip.system.paths import RunPaths

CHEMISTRY = [
    "benzene ring nucleophilic substitution",
    "enthalpy of formation",
    "sodium bicarbonate titration",
    "polymerase chain reaction",
]


def held_out(x: np.ndarray, order: np.ndarray, num_fine: int) -> float:
    """Return the share of the second half of some rows that lies out of the domain of the first half."""
    first, second = x[order[: len(order) // 2]], x[order[len(order) // 2 :]]
    centers = kmeans(first, num_fine, max_size_ratio=1.5, seed=0).centers
    fine, squared = assign_nearest(first, centers)
    quantiles = fit_quantiles(fine, np.sqrt(squared), num_fine)
    fine, squared = assign_nearest(second, centers)
    domain = Domain.of(fine, np.sqrt(squared), quantiles)
    assert domain is not None
    return float(domain.out.mean())


def main(folder: Path) -> None:
    """Print the shares of a run."""
    paths, draw = RunPaths(folder=folder), np.random.default_rng(0)
    catalog, mode = Catalog.open(paths.catalog_path), MoDE.load(paths.bundle)
    x = read_embeddings(catalog, np.arange(len(catalog)))
    captions = np.concatenate([block["caption"] for block in catalog.batches(["caption"])])
    distinct = np.unique(captions, return_index=True)[1]
    num_fine = len(mode.bundle.fine_centers)
    for what, rows in (("rows", np.arange(len(catalog))), ("distinct captions", distinct)):
        print(f"held-out {what}: {held_out(x, draw.permutation(rows), num_fine):.1%} of {len(rows) // 2:,}")
    tasks = {task.name: list(task.classnames) for task in catalog_tasks(Catalog.open(paths.tasks_path))}
    for name, names in (tasks | {"ImageNet": list(imagenet_words()[0])[:400], "chemistry": CHEMISTRY}).items():
        domain = mode.route(names).domain
        assert domain is not None
        print(
            f"{name}: {domain.out.mean():.1%} of {len(names):,} names, the task {'is' if domain.is_out else 'is not'}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

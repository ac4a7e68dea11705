"""How well routing tells "out of domain": by the nearest caption, and as before by the nearest cluster's centre.

    python benchmarks/domain.py runs/demo
    python benchmarks/domain.py runs/demo --wordnet /usr/share/wordnet        the Debian package wordnet-base

The names of the run's held-out tasks are at home; ImageNet's classes, Fashion-MNIST's and 600 nouns of WordNet of which
no word is in a caption (seed 0) are strangers. For both measures, the area under the curve of strangers against names
that are at home (the chance that a stranger lies farther; half if the measure says nothing), and the share of each that
is called out of domain. Then half of the captions are kept, and the other half is asked for, once with all rows and
once with each caption in one half only.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.embedding import read_embeddings
from modeclip.clustering.kmeans import kmeans
from modeclip.clustering.novelty import KEPT_CAPTIONS, FineQuantiles, NearCaptions, fit_quantiles, fitted_quantiles
from modeclip.data.catalog import Catalog
from modeclip.data.tasks.task import catalog_tasks
from modeclip.mixture.explain import Domain
from modeclip.mixture.mode import MoDE
from modeclip.models.clip import imagenet_words
from modeclip.system.paths import RunPaths

FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
NOUNS = 600
"""Nouns of WordNet that are asked."""


def domain_of(x: np.ndarray, centers: np.ndarray, quantiles: FineQuantiles) -> Domain:
    """Return where vectors lie."""
    fine, squared = assign_nearest(x, centers)
    domain = Domain.of(x, fine, np.sqrt(squared), quantiles)
    assert domain is not None
    return domain


def area(home: np.ndarray, strangers: np.ndarray) -> float:
    """Return the chance that a stranger lies farther than a name that is at home."""
    ranks = rankdata(np.concatenate([home, strangers]))[len(home) :]
    return float((ranks.sum() - len(strangers) * (len(strangers) + 1) / 2) / (len(home) * len(strangers)))


def held_out(x: np.ndarray, order: np.ndarray, num_fine: int) -> tuple[float, float]:
    """Return the share of the second half of some rows that is out of the first half's domain, by both measures."""
    first, second = x[order[: len(order) // 2]], x[order[len(order) // 2 :]]
    centers = kmeans(first, num_fine, max_size_ratio=1.5, seed=0).centers
    fine, squared = assign_nearest(first, centers)
    by_centre = fit_quantiles(fine, np.sqrt(squared), num_fine)
    by_caption = replace(by_centre, near=NearCaptions.fit(first[:KEPT_CAPTIONS]))
    one, other = (domain_of(second, centers, quantiles).out.mean() for quantiles in (by_centre, by_caption))
    return float(one), float(other)


def nouns(folder: Path, captions: np.ndarray) -> list[str]:
    """Return nouns of WordNet that have no word with any caption in common."""
    words = {word for caption in captions.tolist() for word in caption.lower().split()}
    lines = (folder / "index.noun").read_text(encoding="utf-8").splitlines()
    found = [line.split()[0].replace("_", " ") for line in lines if not line.startswith(" ")]
    strange = [noun for noun in found if not set(noun.split()) & words]
    return [strange[row] for row in np.random.default_rng(0).permutation(len(strange))[:NOUNS]]


def main() -> None:
    """Print the shares of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--wordnet", type=Path, help="Folder with index.noun.")
    arguments = parser.parse_args()
    paths, draw = RunPaths(folder=arguments.run), np.random.default_rng(0)
    catalog, mode = Catalog.open(paths.catalog_path), MoDE.load(paths.bundle)
    x, centers = read_embeddings(catalog, np.arange(len(catalog))), mode.bundle.fine_centers
    captions = np.concatenate([block["caption"] for block in catalog.batches(["caption"])])
    quantiles = fitted_quantiles(catalog, len(centers))
    assert quantiles.near is not None
    print(
        f"{datetime.now(UTC).date()}: {len(quantiles.near.vectors):,} captions, {quantiles.near.vectors.nbytes:,} bytes"
    )
    home = {task.name: list(task.classnames) for task in catalog_tasks(Catalog.open(paths.tasks_path))}
    strangers = {"ImageNet": list(imagenet_words()[0]), "Fashion-MNIST": FASHION}
    if arguments.wordnet is not None:
        strangers["WordNet"] = nouns(arguments.wordnet, captions)
    vectors = {}
    for name, names in (home | strangers).items():
        embedded = mode.route(names).embeddings
        assert embedded is not None
        vectors[name] = embedded
    for what, known in (("centre", replace(quantiles, near=None)), ("caption", quantiles)):
        found = {name: domain_of(rows, centers, known) for name, rows in vectors.items()}
        at_home = np.concatenate([found[name].quantile + found[name].distance * 1e-6 for name in home])
        print(f"by the nearest {what}:")
        for name, domain in found.items():
            away = area(at_home, domain.quantile + domain.distance * 1e-6) if name in strangers else None
            verdict = "is" if domain.is_out else "is not"
            share = f"{domain.out.mean():.1%} of {len(domain.out):,} names out, the task {verdict}"
            print(f"  {name}: {share}" + (f"; area {away:.3f}" if away is not None else ""))
        print("  of Fashion-MNIST:", [n for n, out in zip(FASHION, found["Fashion-MNIST"].out, strict=True) if out])
    distinct = np.unique(captions, return_index=True)[1]
    for what, rows in (("rows", np.arange(len(catalog))), ("distinct captions", distinct)):
        one, other = held_out(x, draw.permutation(rows), len(centers))
        print(f"held-out {what}: {one:.1%} by the centre, {other:.1%} by the caption, of {len(rows) // 2:,}")


if __name__ == "__main__":
    main()

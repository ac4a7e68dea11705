"""The vectors of a catalog's pairs, cluster by cluster: what near copies and densities are found in.

The vectors are those of the column ``caption_embedding`` in the catalog's fine clusters, or those of images by a model,
which are kept beside the catalog, in clusters of their own (spherical k-means of a sample). One pass brings them into
the order of their clusters, in a temporary file, so that afterwards a cluster is read as one piece.

Price: one pass over the vectors, 2 D bytes of temporary disk a pair (in ``TMPDIR``), and 40 bytes of memory a pair. For
images one forward pass of the model each, once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float16, Int

from modeclip.clustering.clusters import group
from modeclip.clustering.distances import assign_nearest, blocks, for_each_block
from modeclip.clustering.embedding import COLUMN, ROWS_AT_ONCE, EmbedWork, check_finite
from modeclip.clustering.fitting import sample_rows
from modeclip.clustering.kmeans import kmeans
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import Statistic, concatenate, map_fragments
from modeclip.errors import ModeclipError
from modeclip.models.encoders import BATCH_SIZE, PREFIXES, PairEncoder, load_any_encoder
from modeclip.system.console import progress

FINE, EXPERT = "fine_cluster", "expert"
PAIRS_PER_CLUSTER, MOST_CLUSTERS = 1000, 50_000
"""Pairs for each cluster where their number is not given, and most clusters; the paper has 50,000 for 440 million."""
ROWS_PER_CENTER, ITERATIONS = 64, 8
"""Rows that centres are fitted on, and iterations. A better fit takes longer than the search and finds no more: near
copies go to the same cluster in any (``benchmarks/semdedup.py``)."""

Blocks = Callable[[], Iterator[np.ndarray]]
"""Yields the vectors of the selected pairs in their order, part by part, whenever it is called."""


class ImageVectors(EmbedWork, Statistic):
    """Vectors of images by a model, as a statistic that is kept beside the catalog."""

    unit = "images"
    merge = staticmethod(concatenate)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustered:
    """Pairs in the order of their clusters, with their vectors."""

    rows: Int[np.ndarray, " n"]
    """Positions in the catalog: cluster by cluster, ascending in each."""
    ends: Int[np.ndarray, " M"]
    """Where each cluster ends among these."""
    vectors: Float16[np.ndarray, "n D"] | None
    """Their vectors, as they were stored; None where only the clusters are wanted."""
    parents: Int[np.ndarray, " M"]
    """Expert of each cluster, or the group of clusters that it belongs to."""
    facts: dict[str, Any]
    """What decided all of it."""

    @property
    def sizes(self) -> Int[np.ndarray, " M"]:
        """Pairs of each cluster."""
        return np.asarray(np.diff(self.ends, prepend=0))

    def place(self, cluster: int) -> slice:
        """Return where the pairs of a cluster are."""
        return slice(int(self.ends[cluster - 1]) if cluster else 0, int(self.ends[cluster]))

    def unit_vectors(self, cluster: int) -> Float[np.ndarray, "m D"]:
        """Read the vectors of a cluster at unit length, float32; those of zero length stay zero."""
        assert self.vectors is not None, "these pairs have no vectors"
        return to_unit(self.vectors[self.place(cluster)])

    def for_each(self, work: Callable[[int], None], description: str) -> None:
        """Call ``work`` for every cluster that has pairs, in threads, with a progress bar."""
        filled = np.flatnonzero(self.sizes)
        with progress(description, len(self.rows), "pairs") as advance:

            def one(block: slice) -> None:
                cluster = int(filled[block.start])
                work(cluster)
                advance(int(self.sizes[cluster]))

            for_each_block(len(filled), 1, one, "cpu")


def to_unit(x: np.ndarray) -> Float[np.ndarray, "m D"]:
    """Return rows at unit length, float32, and rows of zero length as they are; each by itself, whatever the others."""
    x = x.astype(np.float32)
    norms = np.sqrt(np.vecdot(x, x, dtype=np.float64))
    return (x / np.where(norms > 0, norms, 1)[:, None]).astype(np.float32)


def center_of(x: Float[np.ndarray, "m D"]) -> Float[np.ndarray, " D"]:
    """Return the direction of the mean of unit vectors, zero if it has none."""
    total: np.ndarray = x.sum(0, dtype=np.float64)
    return total / max(float(np.linalg.norm(total)), np.finfo(float).tiny)


def cluster_pairs(
    catalog: Catalog,
    selected: Bool[np.ndarray, " N"] | None,
    *,
    model: str | None,
    num_clusters: int | None,
    seed: int,
    ray: bool = False,
    with_vectors: bool = True,
) -> Clustered:
    """Bring the selected pairs into the order of their clusters.

    Args:
        catalog: With the column ``caption_embedding``, unless a model is given.
        selected: Which pairs; None: all.
        model: A CLIP, or an encoder of images, whose vectors are taken instead of the captions'.
        num_clusters: Fit so many clusters; None: the fine clusters of the catalog where captions are meant and there
            are some, else one for every 1,000 pairs.
        seed: Decides clusters that are fitted.
        ray: Compute the vectors of images on Ray.
        with_vectors: Whether the vectors are wanted.

    Raises:
        ModeclipError: The catalog has no embeddings, there are more clusters than pairs, or the model cannot be loaded.
    """
    rows = np.arange(len(catalog)) if selected is None else np.flatnonzero(selected)
    if model is not None:
        vectors, facts = _image_vectors(catalog, selected, model, ray)
    elif COLUMN in catalog.columns:
        vectors, facts = _column_vectors(catalog, selected), catalog.facts(COLUMN) or {}
    else:
        raise ModeclipError(
            f"curate duplicates: {catalog.path!r} has no column {COLUMN}: embed its captions first (modeclip embed), "
            "or name a CLIP for its images with --model"
        )
    if model is None and num_clusters is None and FINE in catalog.columns:
        found = catalog.read([FINE, EXPERT], None if selected is None else rows)
        labels, experts = found[FINE].astype(np.int64), found[EXPERT].reshape(len(rows), -1)[:, 0]
        parents = np.zeros(int(labels.max()) + 1, np.int64)
        parents[labels] = experts
        decided = catalog.facts(FINE)
    else:
        count = num_clusters or min(max(1, round(len(rows) / PAIRS_PER_CLUSTER)), MOST_CLUSTERS)
        if count > len(rows):
            raise ModeclipError(f"curate duplicates: --clusters is {count:,}, but there are {len(rows):,} pairs")
        labels, parents = _fit(vectors, len(rows), count, seed)
        decided = {"clusters": count, "seed": seed}
    order = np.argsort(labels, kind="stable")
    return Clustered(
        rows=rows[order],
        ends=np.cumsum(np.bincount(labels, minlength=len(parents))),
        vectors=_sorted_vectors(vectors, order) if with_vectors else None,
        parents=parents,
        facts={"vectors": facts, "clusters": decided},
    )


def _column_vectors(catalog: Catalog, selected: Bool[np.ndarray, " N"] | None) -> Blocks:
    def read() -> Iterator[np.ndarray]:
        start = 0
        for block in catalog.batches([COLUMN], ROWS_AT_ONCE):
            x = block[COLUMN]
            yield check_finite(x if selected is None else x[selected[start : start + len(x)]])
            start += len(x)

    return read


def _image_vectors(
    catalog: Catalog, selected: Bool[np.ndarray, " N"] | None, model: str, ray: bool
) -> tuple[Blocks, dict[str, Any]]:
    name = model if model.partition(":")[0] in PREFIXES else f"clip-image:{model}"
    encoder = load_any_encoder(name)
    if not isinstance(encoder, PairEncoder):
        raise ModeclipError(f"curate duplicates: --model {model!r} encodes texts; name one that encodes images")
    work = EmbedWork.of(encoder, BATCH_SIZE)
    found = map_fragments(
        catalog, ImageVectors(facts=work.facts, inputs=work.inputs), "embed images", ray=ray, selected=selected
    )
    return lambda: (arrays[COLUMN] for arrays in found), work.facts


def _fit(vectors: Blocks, num_rows: int, count: int, seed: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " M"]]:
    """Return the cluster of each row by spherical k-means of a sample, and the group of each cluster."""
    sampled, start, parts = sample_rows(num_rows, ROWS_PER_CENTER * count, seed), 0, []
    for x in vectors():
        some = sampled[np.searchsorted(sampled, start) : np.searchsorted(sampled, start + len(x))] - start
        parts.append(to_unit(x[some]))
        start += len(x)
    sample = np.concatenate(parts)
    sample = sample[sample.any(1)]
    if len(sample) < count:
        raise ModeclipError(
            f"curate duplicates: {count:,} clusters need as many pairs of known vectors, there are {len(sample):,}:"
            " set --clusters lower"
        )
    centers = fit_centers(sample, count, seed)
    labels = [assign_nearest(to_unit(x), centers)[0] for x in vectors() if len(x)]
    num_groups = max(1, round(count**0.5))
    return np.concatenate(labels), group(centers, num_groups, max_expert_ratio=None, seed=seed).expert_of_fine


def fit_centers(sample: Float[np.ndarray, "n D"], count: int, seed: int) -> Float[np.ndarray, "M D"]:
    """Fit centres to search near copies in, by spherical k-means of a sample of unit vectors."""
    with progress("fit clusters", ITERATIONS, "iterations") as advance:
        return kmeans(
            sample,
            count,
            spherical=True,
            start="random",
            num_iterations=ITERATIONS,
            seed=seed,
            on_iteration=lambda: advance(1),
        ).centers


def _sorted_vectors(vectors: Blocks, order: Int[np.ndarray, " n"]) -> Float16[np.ndarray, "n D"]:
    """Write vectors to a temporary file in the given order, and return them memory-mapped."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    out, start = np.empty((0, 0), np.float16), 0
    for x in vectors():
        if not out.size:
            with tempfile.TemporaryFile(prefix="modeclip-") as file:
                out = np.memmap(file, np.float16, "w+", shape=(len(order), x.shape[1]))  # removed once it is let go
        for block in blocks(len(x), ROWS_AT_ONCE):
            some = slice(start + block.start, start + block.stop)
            out[place[some]] = x[block]
        start += len(x)
    return out

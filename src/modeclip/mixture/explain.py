"""Why a task is routed as it is: the fine clusters that lie nearest to each of its classes, and whose those are.

A router has an answer to everything, also to what no expert has ever seen. `Domain` tells: a text is out of the
bundle's domain if it lies farther from its nearest caption than `FAR_FROM_CAPTIONS` of the captions lie from another
one, by what the bundle keeps (`modeclip.clustering.novelty`). A bundle of an earlier version keeps no captions; there a
text is out that lies farther from its nearest fine centre than `FAR` of the captions of that cluster. So a few of a
hundred captions of the very same source are called so. A task is out of domain if a quarter of its names are, and more
than one of them if it has several.

Source: ours.
Price: the distances of the class names to all centres once more; the cards of the clusters are read from the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from modeclip.clustering.distances import nearest_centers
from modeclip.clustering.novelty import FineQuantiles
from modeclip.mixture.bundle import Bundle

NEAREST_SHOWN = 3
"""How many fine clusters a class is explained by."""
FAR = 0.95
"""Share of a cluster's captions beyond whose distance to the centre a text is out of domain."""
FAR_FROM_CAPTIONS = 0.9
"""Share of the captions beyond whose distance to another one a text is out of domain. It can be lower, since names that
are at home are said by some caption, most of them word for word (``benchmarks/domain.py``)."""
OUT_FRACTION = 0.25
"""Share of a task's names that are out of domain where the task is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Domain:
    """Whether names lie where the captions of a bundle lie."""

    distance: Float[np.ndarray, " L"]
    """Euclidean distance of each name to its nearest caption, or fine centre."""
    quantile: Float[np.ndarray, " L"]
    """Share of the captions that lie nearer to another one, or of that cluster's captions to its centre: 0 to 1."""
    out: Bool[np.ndarray, " L"]
    """Whether each name is out of domain."""
    nearest: Literal["caption", "centre"] = "caption"
    """What the distances lead to."""

    @classmethod
    def of(
        cls,
        vectors: Float[np.ndarray, "L D"],
        nearest_fine: Int[np.ndarray, " L"],
        distance: Float[np.ndarray, " L"],
        quantiles: FineQuantiles | None,
    ) -> Domain | None:
        """Compare names with the captions of a bundle; None where it has no quantiles that reach so far.

        Args:
            vectors: Vector of each name.
            nearest_fine: Its nearest fine cluster.
            distance: Its distance to that centre.
            quantiles: What is known of the captions.

        Examples:
            >>> known = FineQuantiles(levels=(0.5, 0.95), distances=np.array([[0.4, 0.8]], np.float32))
            >>> Domain.of(np.eye(3), np.zeros(3, int), np.array([0.2, 0.7, 0.9]), known).out.tolist()
            [False, False, True]
        """
        near, far = None if quantiles is None else quantiles.near, FAR
        if near is not None:
            far = FAR_FROM_CAPTIONS
            nearest_fine, distance, quantiles = np.zeros_like(nearest_fine), near.distance(vectors), near.quantiles
        if quantiles is None or not quantiles.levels[0] <= far <= quantiles.levels[-1]:
            return None
        share, _ = quantiles.novelty(nearest_fine, distance)
        out = distance > quantiles.threshold(far)[nearest_fine]
        return cls(distance=distance, quantile=share, out=out, nearest="centre" if near is None else "caption")

    @property
    def is_out(self) -> bool:
        """Whether the names together, as one task, are out of domain."""
        number, total = int(self.out.sum()), len(self.out)
        return number >= max(OUT_FRACTION * total, min(2, total))

    def part(self, place: int) -> Domain:
        """Return where one of the names lies, as a task of its own."""
        own = slice(place, place + 1)
        return replace(self, distance=self.distance[own], quantile=self.quantile[own], out=self.out[own])

    def to_json(self) -> dict[str, float | int | str]:
        """Return what the flag of the task rests on: mean distance, to what, mean quantile, names out of domain."""
        return {
            "distance": float(self.distance.mean()),
            "nearest": self.nearest,
            "quantile": float(self.quantile.mean()),
            "names_out": int(self.out.sum()),
            "names": len(self.out),
        }


def flag(domain: Domain | None) -> dict[str, object]:
    """Return the flag of a task as JSON, with what it rests on; null where a bundle has no quantiles."""
    return {
        "out_of_domain": None if domain is None else domain.is_out,
        "domain": None if domain is None else domain.to_json(),
    }


def warning(names: Sequence[str], domain: Domain | None) -> str:
    """Say which names are out of domain, in one line; nothing if none is, or it is not known.

    Args:
        names: Name of each class.
        domain: Where they lie.
    """
    if domain is None or not domain.out.any():
        return ""
    far = [name for name, out in zip(names, domain.out.tolist(), strict=True) if out]
    some = ", ".join(map(repr, far[:3])) + (", ..." if len(far) > 3 else "")
    start = "out of domain: " if domain.is_out else ""
    return (
        f"{start}{len(far):,} of {len(names):,} names lie farther from {far_from(domain.nearest)}, so the router can "
        f"only guess: {some}"
    )


def far_from(nearest: str | None) -> str:
    """Say what a name that is out of domain is far from, after "farther from".

    Args:
        nearest: ``Domain.nearest``; None for results of an earlier version, which do not tell.
    """
    if nearest is None:
        return "the captions than nearly all captions"
    if nearest == "centre":
        return f"their nearest cluster than {FAR:.0%} of its captions"
    return f"their nearest caption than {FAR_FROM_CAPTIONS:.0%} of the captions from theirs"


@dataclass(frozen=True, kw_only=True)
class NearCluster:
    """A fine cluster that a class name lies close to."""

    index: int
    """Index of the fine cluster."""
    distance: float
    """Euclidean distance of the class name to its centre: 0 to 2 for unit vectors."""
    expert: int
    """Index of the expert that the cluster belongs to."""
    captions: tuple[str, ...]
    """The captions nearest to its centre."""


@dataclass(frozen=True, kw_only=True)
class ClassReason:
    """Why one class has the weights that it has."""

    name: str
    """The class name, the query, or the file of the picture."""
    weights: tuple[float, ...]
    """Weight of each expert for this class. All classes have the same, unless each is weighed by itself."""
    clusters: tuple[NearCluster, ...]
    """The nearest fine clusters, nearest first; none where the router does not look at clusters."""
    out_of_domain: bool | None = None
    """Whether it is out of domain (`Domain`); None where the bundle has no quantiles."""
    distance: float | None = None
    """Its distance to the nearest caption; in a bundle without captions, to the nearest centre."""
    quantile: float | None = None
    """Share of the captions that lie nearer to another one; without captions, of that cluster's to the centre."""


def explain(
    names: Sequence[str],
    weights: Float[np.ndarray, "L K"],
    embeddings: Float[np.ndarray, "L D"],
    bundle: Bundle,
    domain: Domain | None = None,
) -> list[ClassReason]:
    """Name the fine clusters nearest to each class, with their captions and their experts.

    Args:
        names: Name of each class.
        weights: Weight of each expert for each class.
        embeddings: Vector of each class by the bundle's encoder; of an image, the image's half of a pair's vector.
        bundle: The bundle with the clusters and their cards.
        domain: Where the classes lie, if it is known.
    """
    centers = bundle.fine_centers[:, -embeddings.shape[1] :]
    nearest, distance = nearest_centers(embeddings, centers, NEAREST_SHOWN)
    experts, cards = bundle.expert_of_fine.tolist(), bundle.clusters
    facts = [(None, None, None)] * len(names)
    if domain is not None:
        facts = list(zip(domain.out.tolist(), domain.distance.tolist(), domain.quantile.tolist(), strict=True))
    return [
        ClassReason(
            name=name,
            weights=tuple(own),
            clusters=tuple(
                NearCluster(index=s, distance=gap, expert=experts[s], captions=tuple(cards[s]["nearest_captions"]))
                for s, gap in zip(near, gaps, strict=True)
            ),
            out_of_domain=out,
            distance=far,
            quantile=share,
        )
        for name, own, near, gaps, (out, far, share) in zip(
            names, weights.tolist(), nearest.tolist(), distance.tolist(), facts, strict=True
        )
    ]

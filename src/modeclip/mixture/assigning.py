"""Assigns new pairs to the experts of a bundle, marks the novel ones, and proposes what to train.

The catalog gets the columns ``fine_cluster``, ``fine_distance`` and ``expert`` as `modeclip cluster` writes them;
``novelty``, the share of the captions of the cluster that lay nearer to its centre when it was fitted, in [0, 1]; and
``novel``, whether a pair lies farther out than a share such as 0.99 of them. A caption from the source that the bundle
was made of is then novel with a chance of 1 %; of captions about something else most are.

Two things may be proposed, or one, or none. *Continue expert k* if so many new pairs lie inside its clusters that they
would change it. *Train a new expert* if there are enough novel pairs, and far more than the 1 % that chance gives.

Source: ours; MoDE (arXiv 2404.16030) names continual learning as future work.
Price: the encoder over the new captions, then one product with the centres; a fragment of the catalog in memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.embedding import COLUMN, EmbedConfig, embed
from modeclip.clustering.novelty import FineQuantiles, fitted_quantiles
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import Work, map_columns
from modeclip.data.selection import ALL, Selection
from modeclip.data.storage import missing_fragments
from modeclip.errors import ModeclipError, check_least
from modeclip.mixture.bundle import Bundle
from modeclip.models.encoders import check_trusted, load_any_encoder


@dataclass(frozen=True, kw_only=True)
class AssignConfig:
    """Which pairs count as novel, and what is worth training."""

    novel_beyond: float = 0.99
    """A pair is novel if it is farther from its centre than this share of the captions that the centre was fitted on,
    0.5 to 0.999."""
    min_pairs: int = 1024
    """Fewest pairs to train a model on, 1 or more. It needs a few batches, or it learns the pairs by heart."""
    continue_fraction: float = 0.05
    """Fewest new pairs to continue an expert with, as a share of the pairs it was trained on, in (0, 1]. Fewer would
    change it less than another order of its own pairs would."""
    novel_excess: float = 5.0
    """How many times as many pairs must be novel for a new expert as chance gives (1 - ``novel_beyond``), 1 or more.
    Other samples of the same source stayed below 4 times, even with clusters of only ten captions."""
    new_fraction: float = 0.1
    """Fewest novel pairs for a new expert, as a share of the mean number of pairs of an expert, in (0, 1]. In every
    use it costs as much as any other expert."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.5 <= self.novel_beyond <= 0.999:
            raise ModeclipError(f"assign.novel_beyond: expected 0.5 to 0.999, got {self.novel_beyond}")
        check_least("assign", self, min_pairs=1, novel_excess=1)
        for name in ("continue_fraction", "new_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ModeclipError(f"assign.{name}: expected a share in (0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ExpertShare:
    """How many of the new pairs belong to one expert."""

    index: int
    """Number of the expert."""
    size: int
    """Pairs that it was trained on."""
    num_pairs: int
    """New pairs in its clusters."""
    num_novel: int
    """How many of these are novel."""

    @property
    def novel_fraction(self) -> float:
        """Share of its new pairs that are novel; 0 if it has none."""
        return self.num_novel / max(self.num_pairs, 1)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Something that is worth training."""

    action: Literal["continue", "new"]
    """Continue an expert on the pairs that are not novel, or train a new one on those that are."""
    expert: int
    """Number of the expert; of a new one, the number that it will have."""
    num_pairs: int
    """Pairs to train it on."""
    reason: str
    """The numbers that speak for it, in one line."""


@dataclass(frozen=True, kw_only=True)
class AssignResult:
    """To which experts the new pairs belong, and what is worth training."""

    num_pairs: int
    """Number of new pairs."""
    num_novel: int
    """How many of them are novel."""
    chance: float
    """Share of captions of the bundle's own source that would be novel by chance."""
    experts: tuple[ExpertShare, ...]
    """The new pairs of each expert, in their order."""
    proposals: tuple[Proposal, ...]
    """What is worth training. If there is nothing, the bundle serves these pairs as it is, or they are too few."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON."""
        content = asdict(self)
        for share, found in zip(self.experts, content["experts"], strict=True):
            found["novel_fraction"] = share.novel_fraction
        return content

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of a table: expert, its pairs, its new pairs, how many of these are novel, their share."""
        rows = [
            (f"expert-{e.index}", f"{e.size:,}", f"{e.num_pairs:,}", f"{e.num_novel:,}", f"{e.novel_fraction:.3f}")
            for e in self.experts
        ]
        share = f"{self.num_novel / max(self.num_pairs, 1):.3f}"
        total = f"{sum(e.size for e in self.experts):,}"
        return [*rows, ("all", total, f"{self.num_pairs:,}", f"{self.num_novel:,}", share)]


@dataclass(kw_only=True, eq=False)
class NoveltyWork(Work):
    """Assigns blocks of embedded captions to the experts of a bundle, and measures how novel they are."""

    bundle: Bundle
    """Fine centres, and the expert of each."""
    quantiles: FineQuantiles
    """Quantiles of the distances of the captions that the centres were fitted on."""
    novel_beyond: float
    """Share of a cluster's captions beyond which a pair is novel."""
    facts: dict[str, Any]
    """Hashes of clustering and quantiles, the share, and the facts of the embeddings."""
    inputs = (COLUMN,)
    outputs = ("fine_cluster", "fine_distance", "expert", "novelty", "novel")
    unit = "captions"

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Assign the rows of a block."""
        fine, squared = assign_nearest(block[COLUMN].astype(np.float32), self.bundle.fine_centers)
        distance = np.sqrt(squared)
        share, _ = self.quantiles.novelty(fine, distance)
        return {
            "fine_cluster": fine.astype(np.int32),
            "fine_distance": distance,
            "expert": self.bundle.expert_of_fine[fine].astype(np.int32),
            "novelty": share,
            "novel": distance > self.quantiles.threshold(self.novel_beyond)[fine],
        }


def assign(
    catalog: Catalog,
    bundle: Bundle,
    config: AssignConfig,
    *,
    fitted_on: Catalog | None = None,
    selection: Selection = ALL,
    ray: bool = False,
) -> AssignResult:
    """Assign new pairs to the clusters of a bundle, mark the novel ones, and say what is worth training.

    Columns of another clustering are replaced. If the columns are of this bundle already, only the rows that were added
    since are computed.

    Args:
        catalog: The new pairs. The bundle's encoder embeds their captions, unless it has already done so.
        bundle: Centres, experts and encoder.
        config: Thresholds.
        fitted_on: The clustered catalog that the bundle was made from; only for a bundle that has no quantiles.
        selection: Pairs that are counted, and that what is proposed would be trained on; all are assigned.
        ray: Work on a Ray cluster, as `modeclip.data.mapping.map_columns` says.

    Raises:
        ModeclipError: The bundle has no quantiles and ``fitted_on`` is not given, the encoder cannot be loaded, or
            nothing can be selected; then nothing is written.
    """
    quantiles = quantiles_of(bundle, fitted_on)
    if not _is_assigned(catalog, _facts(catalog, bundle, quantiles, config)):
        named = " ".join((*selection.where, selection.mask or ""))
        if not any(column in named for column in NoveltyWork.outputs):  # else it asks about what is not there yet
            selection.mask_of(catalog)
        embed(catalog, _embed_config(catalog, bundle), ray=ray)
        facts = _facts(catalog, bundle, quantiles, config)
        work = NoveltyWork(bundle=bundle, quantiles=quantiles, novel_beyond=config.novel_beyond, facts=facts)
        map_columns(catalog, work, "assign captions", ray=ray)
    pairs, novel = np.zeros(bundle.num_experts, np.int64), np.zeros(bundle.num_experts, np.int64)
    for block in selection.part_of(catalog).batches(["expert", "novel"]):
        pairs += np.bincount(block["expert"], minlength=bundle.num_experts)
        novel += np.bincount(block["expert"][block["novel"]], minlength=bundle.num_experts)
    experts = tuple(
        ExpertShare(index=k, size=expert.size, num_pairs=int(pairs[k]), num_novel=int(novel[k]))
        for k, expert in enumerate(bundle.experts)
    )
    return AssignResult(
        num_pairs=int(pairs.sum()),
        num_novel=int(novel.sum()),
        chance=round(1 - config.novel_beyond, 9),
        experts=experts,
        proposals=propose(experts, config),
    )


def quantiles_of(bundle: Bundle, fitted_on: Catalog | None = None) -> FineQuantiles:
    """Return the quantiles of a bundle, or of the catalog that it was made from if that is given.

    Raises:
        ModeclipError: The bundle has no quantiles, and no catalog is given.
    """
    if fitted_on is not None:
        return fitted_quantiles(fitted_on, len(bundle.fine_centers))
    if bundle.fine_quantiles is None:
        raise ModeclipError(
            f"bundle {bundle.path}: has no quantiles of distances, because an earlier version made it; give --catalog"
            " with the catalog that it was made from, or make the bundle again"
        )
    return bundle.fine_quantiles


def propose(experts: tuple[ExpertShare, ...], config: AssignConfig) -> tuple[Proposal, ...]:
    """Say what is worth training, by the numbers of pairs alone.

    Examples:
        >>> shares = (ExpertShare(index=0, size=10_000, num_pairs=5_000, num_novel=4_000),)
        >>> [(p.action, p.expert, p.num_pairs) for p in propose(shares, AssignConfig(min_pairs=500))]
        [('continue', 0, 1000), ('new', 1, 4000)]
    """
    proposals = []
    for share in experts:
        inside = share.num_pairs - share.num_novel
        if inside >= max(config.min_pairs, config.continue_fraction * share.size):
            more = inside / max(share.size, 1)
            reason = (
                f"{inside:,} new pairs lie inside its clusters, {100 * more:.1f} % of the {share.size:,} it has seen"
            )
            proposals.append(Proposal(action="continue", expert=share.index, num_pairs=inside, reason=reason))
    pairs, novel = sum(share.num_pairs for share in experts), sum(share.num_novel for share in experts)
    chance, mean_size = 1 - config.novel_beyond, sum(share.size for share in experts) / len(experts)
    least = max(config.min_pairs, config.new_fraction * mean_size)
    if novel >= least and novel > config.novel_excess * chance * pairs:
        reason = (
            f"{novel:,} of {pairs:,} pairs are novel, {100 * novel / pairs:.1f} %; chance would give {100 * chance:g} %"
        )
        proposals.append(Proposal(action="new", expert=len(experts), num_pairs=novel, reason=reason))
    return tuple(proposals)


def _facts(catalog: Catalog, bundle: Bundle, quantiles: FineQuantiles, config: AssignConfig) -> dict[str, Any]:
    """Return the facts of the columns."""
    return {
        "clustering": bundle.clustering,
        "quantiles": quantiles.digest,
        "novel_beyond": config.novel_beyond,
        "embedding": catalog.facts(COLUMN) if COLUMN in catalog.columns else None,
    }


def _is_assigned(catalog: Catalog, facts: dict[str, Any]) -> bool:
    """Return whether all rows have the columns already, so that no encoder has to be loaded."""
    names = NoveltyWork.outputs
    known = all(name in catalog.columns and catalog.facts(name) == facts for name in names)
    return known and not missing_fragments(catalog.dataset, names)


def _embed_config(catalog: Catalog, bundle: Bundle) -> EmbedConfig:
    """Return settings to embed a catalog with a bundle's encoder: those of its embeddings if that made them."""
    name = bundle.encoder
    check_trusted(name, bundle.trust_encoder)
    facts = catalog.facts(COLUMN) if COLUMN in catalog.columns else None
    if facts is None or facts["encoder"] == name:
        return EmbedConfig(encoder=name, batch_size=facts["batch_size"]) if facts else EmbedConfig(encoder=name)
    encoder = load_any_encoder(name, trust_encoder=bundle.trust_encoder)
    same = facts["dimension"] == encoder.dimension and facts["fingerprint"] == str(getattr(encoder, "fingerprint", ""))
    if same and (facts["fingerprint"] or facts["encoder"] == encoder.name):
        check_trusted(facts["encoder"], trust_encoder=False)  # the bundle's is another name
        return EmbedConfig(encoder=facts["encoder"], batch_size=facts["batch_size"])
    return EmbedConfig(encoder=name)

"""A catalog of new pairs and a bundle in; the pairs' clusters, experts and novelty, and what to do with them, out.

Columns that the catalog gets: ``fine_cluster``, ``fine_distance`` and ``expert`` as `modeclip cluster` writes them;
``novelty``, the share of the captions of that cluster which lay nearer to its centre when it was fitted, in [0, 1]; and
``novel``, whether that is more than a share such as 0.99. A caption like those that the bundle was made from is novel
with probability 1 % then; of captions about something else most are.

The proposal: *continue expert k* where enough new pairs lie inside its clusters to change it; *train a new expert*
where far more pairs are novel than the 1 % that chance gives, and enough of them. Both, one or none may be worth it.

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
from modeclip.data.mapping import map_columns
from modeclip.data.storage import missing_fragments
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import Bundle
from modeclip.models.encoders import load_any_encoder

ROWS_AT_ONCE = 1 << 17


@dataclass(frozen=True, kw_only=True)
class AssignConfig:
    """What counts as novel, and what is worth training."""

    novel_beyond: float = 0.99
    """Share of a cluster's fitted captions; a pair is novel that lies farther out than that, 0.5 to 0.999."""
    min_pairs: int = 1024
    """Fewest pairs that a model is trained on, 1 or more: a few batches, or it learns them by heart."""
    continue_fraction: float = 0.05
    """Fewest new pairs for which an expert is continued, as a share of those it was trained on, in (0, 1]: fewer would
    change it less than another order of its own pairs does."""
    novel_excess: float = 5.0
    """How many times the share that chance gives, 1 - ``novel_beyond``, must be novel for a new expert, 1 or more:
    another sample of the same source stayed below 4 also where its clusters had ten captions."""
    new_fraction: float = 0.1
    """Fewest novel pairs for a new expert, as a share of the mean of the experts' pairs, in (0, 1]: it costs as much
    as each of the others wherever it is used."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0.5 <= self.novel_beyond <= 0.999:
            raise ModeclipError(f"assign.novel_beyond must lie in [0.5, 0.999], got {self.novel_beyond}")
        for name in ("min_pairs", "novel_excess"):
            if getattr(self, name) < 1:
                raise ModeclipError(f"assign.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("continue_fraction", "new_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ModeclipError(f"assign.{name} must lie in (0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ExpertShare:
    """What of the new pairs fell to one expert."""

    index: int
    """The expert."""
    size: int
    """Pairs that it was trained on."""
    num_pairs: int
    """New pairs in its clusters."""
    num_novel: int
    """Of these, novel ones."""

    @property
    def novel_fraction(self) -> float:
        """Share of the new pairs that are novel; 0 where there are none."""
        return self.num_novel / max(self.num_pairs, 1)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One thing that is worth doing."""

    action: Literal["continue", "new"]
    """Continue an expert on the pairs that are not novel, or train a new one on those that are."""
    expert: int
    """Which one; for a new one, the number that it will have."""
    num_pairs: int
    """Pairs to train it on."""
    reason: str
    """Why, in one line with the numbers."""


@dataclass(frozen=True, kw_only=True)
class AssignResult:
    """Where new pairs lie, and what is proposed."""

    num_pairs: int
    """New pairs."""
    num_novel: int
    """Of these, novel ones."""
    chance: float
    """Share of novel ones among captions of the fitted source."""
    experts: tuple[ExpertShare, ...]
    """For each expert."""
    proposals: tuple[Proposal, ...]
    """What is worth doing; none: the bundle serves these pairs as it is, or they are too few."""

    def to_json(self) -> dict[str, Any]:
        """Return all of it for machines."""
        content = asdict(self)
        for share, found in zip(self.experts, content["experts"], strict=True):
            found["novel_fraction"] = share.novel_fraction
        return content

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table: expert, its pairs, new pairs, of them novel, their share."""
        rows = [
            (f"expert-{e.index}", f"{e.size:,}", f"{e.num_pairs:,}", f"{e.num_novel:,}", f"{e.novel_fraction:.3f}")
            for e in self.experts
        ]
        share = f"{self.num_novel / max(self.num_pairs, 1):.3f}"
        total = f"{sum(e.size for e in self.experts):,}"
        return [*rows, ("all", total, f"{self.num_pairs:,}", f"{self.num_novel:,}", share)]


@dataclass(kw_only=True, eq=False)
class NoveltyWork:
    """Work on blocks of rows, for `map_columns`: embeddings in; cluster, distance, expert and novelty out."""

    bundle: Bundle
    """Centres and whose they are."""
    quantiles: FineQuantiles
    """Of the distances that they were fitted with."""
    novel_beyond: float
    """Share of a cluster's fitted captions beyond which a pair is novel."""
    facts: dict[str, Any]
    """What the columns are remembered by."""
    inputs: tuple[str, ...] = (COLUMN,)
    """Columns that it reads."""
    outputs: tuple[str, ...] = ("fine_cluster", "fine_distance", "expert", "novelty", "novel")
    """Columns that it makes."""
    unit: str = "captions"
    """What a row is to it."""

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
    catalog: Catalog, bundle: Bundle, config: AssignConfig, *, fitted_on: Catalog | None = None, ray: bool = False
) -> AssignResult:
    """Assign new pairs to the clusters of a bundle, mark the novel ones, and say what is worth training.

    The columns of another clustering are replaced; those of the same bundle are kept, and only rows that were added
    since are computed.

    Args:
        catalog: The new pairs; its captions are embedded by the bundle's encoder, unless they are already.
        bundle: Centres, experts and encoder.
        config: Thresholds.
        fitted_on: The clustered catalog that the bundle was made from, for a bundle that has no quantiles.
        ray: Work on a Ray cluster, as `modeclip.data.mapping.map_columns` says.

    Raises:
        ModeclipError: The bundle has no quantiles and ``fitted_on`` is not given, or the encoder cannot be loaded.
    """
    quantiles = quantiles_of(bundle, fitted_on)
    if not _is_assigned(catalog, _facts(catalog, bundle, quantiles, config)):
        embed(catalog, _embed_config(catalog, bundle.encoder), ray=ray)
        facts = _facts(catalog, bundle, quantiles, config)
        work = NoveltyWork(bundle=bundle, quantiles=quantiles, novel_beyond=config.novel_beyond, facts=facts)
        map_columns(catalog, work, "assign captions", ray=ray)
    pairs, novel = np.zeros(bundle.num_experts, np.int64), np.zeros(bundle.num_experts, np.int64)
    for block in catalog.batches(["expert", "novel"], ROWS_AT_ONCE):
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
    """Return a bundle's quantiles, or those of the catalog that it was made from.

    Raises:
        ModeclipError: It has none, and no catalog is given.
    """
    if fitted_on is not None:
        return fitted_quantiles(fitted_on, len(bundle.fine_centers))
    if bundle.fine_quantiles is None:
        raise ModeclipError(
            f"bundle {bundle.path}: made before bundles carried quantiles of distances; give --catalog with the catalog"
            " that it was made from, or make the bundle again with modeclip run"
        )
    return bundle.fine_quantiles


def propose(experts: tuple[ExpertShare, ...], config: AssignConfig) -> tuple[Proposal, ...]:
    """Say what is worth training, from counts alone.

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
            reason = f"{inside:,} new pairs lie inside its clusters, {100 * more:.1f} % of its {share.size:,}"
            proposals.append(Proposal(action="continue", expert=share.index, num_pairs=inside, reason=reason))
    pairs, novel = sum(share.num_pairs for share in experts), sum(share.num_novel for share in experts)
    chance, mean_size = 1 - config.novel_beyond, sum(share.size for share in experts) / len(experts)
    least = max(config.min_pairs, config.new_fraction * mean_size)
    if novel >= least and novel > config.novel_excess * chance * pairs:
        reason = (
            f"{novel:,} of {pairs:,} pairs are novel, {100 * novel / pairs:.1f} % where chance gives {100 * chance:g} %"
        )
        proposals.append(Proposal(action="new", expert=len(experts), num_pairs=novel, reason=reason))
    return tuple(proposals)


def _facts(catalog: Catalog, bundle: Bundle, quantiles: FineQuantiles, config: AssignConfig) -> dict[str, Any]:
    """Return what the columns are remembered by."""
    return {
        "clustering": bundle.clustering,
        "quantiles": quantiles.digest,
        "novel_beyond": config.novel_beyond,
        "embedding": catalog.facts(COLUMN) if COLUMN in catalog.columns else None,
    }


def _is_assigned(catalog: Catalog, facts: dict[str, Any]) -> bool:
    """Say whether all rows have the columns already, so that no encoder need be loaded."""
    names = NoveltyWork.outputs
    known = all(name in catalog.columns and catalog.facts(name) == facts for name in names)
    return known and not missing_fragments(catalog.dataset, names)


def _embed_config(catalog: Catalog, name: str) -> EmbedConfig:
    """Return what embeds a catalog by an encoder; the column's own settings if the same encoder made it."""
    facts = catalog.facts(COLUMN) if COLUMN in catalog.columns else None
    if facts is None or facts["encoder"] == name:
        return EmbedConfig(encoder=name, batch_size=facts["batch_size"]) if facts else EmbedConfig(encoder=name)
    encoder = load_any_encoder(name)
    same = facts["dimension"] == encoder.dimension and facts["fingerprint"] == str(getattr(encoder, "fingerprint", ""))
    if same and (facts["fingerprint"] or facts["encoder"] == encoder.name):
        return EmbedConfig(encoder=facts["encoder"], batch_size=facts["batch_size"])
    return EmbedConfig(encoder=name)

"""Explains a curation: what was kept and why not, with examples, and what that did to head, tail and clusters.

The pool is looked at before and after (`modeclip.curation.surveying`): the pairs that the method was given, each
counted once, and those that it keeps, each by its probability where training draws them afresh at every pass. After a
method that changes captions, the new ones are counted.

Price: a pass over causes and scores, and the survey's. Memory: as long as the columns are not written, these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from modeclip.curation.curating import Curated
from modeclip.curation.method import KEPT, OUTSIDE, Curve, Histogram, Table
from modeclip.curation.surveying import Block, Group, Part, Survey, read_blocks, survey
from modeclip.system.files import write_json, writing

JSON_FILE = "curate.json"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a curation did to a catalog, and why; ``dataclasses.asdict`` makes JSON of it."""

    catalog: str
    """Path of the catalog."""
    name: str
    """What the names of the columns begin with."""
    method: str
    """The method."""
    settings: dict[str, Any]
    """Its settings."""
    seed: int
    """What the examples and samples were drawn with."""
    columns: tuple[str, ...]
    """The columns that hold the decisions."""
    is_written: bool
    """Whether the catalog has these columns now; not so after a dry run."""
    num_pairs: int
    """Pairs of the catalog."""
    num_selected: int
    """Pairs that were decided about."""
    num_kept: int
    """Pairs that are kept."""
    num_expected: float | None
    """Pairs that a pass of training draws on average, where the method has probabilities."""
    kept: Group
    """The pairs that are kept."""
    causes: tuple[Group, ...]
    """The pairs that were dropped, by cause."""
    survey: Survey
    """What was there before and after."""
    tables: tuple[Table, ...]
    """What the method itself has found out."""
    charts: tuple[Histogram | Curve, ...]
    """The same in pictures."""

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        share = 100 * self.num_kept / max(self.num_selected, 1)
        text = f"{self.name} keeps {self.num_kept:,} of {self.num_selected:,} pairs ({share:.3g} %)"
        if self.num_expected is not None:
            text += f"; a pass of training draws {self.num_expected:,.0f} of them on average"
        return text + "."

    def save(self, folder: Path | str) -> None:
        """Write ``curate.json`` to a folder, which is made."""
        path = Path(folder) / JSON_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            write_json(path, asdict(self), ensure_ascii=False)


def explain(curated: Curated, *, seed: int = 0) -> Explanation:
    """Explain a curation.

    Args:
        curated: What `modeclip.curation.curating.curate` returned, after a dry run too.
        seed: Decides the examples and the samples.
    """
    catalog, name = curated.catalog, curated.name
    added: dict[str, str] = {
        what: f"{name}_{what}" for what in ("score", "probability", "caption", "of") if what in curated.added
    }
    counts, expected, ends = _count(curated, added)
    num_selected, num_kept = int(len(catalog) - counts[OUTSIDE]), int(counts[KEPT])

    def look(block: Block) -> Part:
        cause, probability = block[f"{name}_cause"], block.get(f"{name}_probability")
        chosen = (cause != OUTSIDE).astype(np.float64)
        weight = (cause == KEPT) * (chosen if probability is None else probability.astype(np.float64))
        return Part(
            groups=cause,
            weights=np.stack([chosen, weight], 1),
            score=block.get(f"{name}_score"),
            probability=probability,
            copy_of=block.get(f"{name}_of"),
        )

    found, pairs = survey(
        catalog,
        look,
        {"before": float(num_selected), "after": expected if "probability" in added else float(num_kept)},
        columns=(f"{name}_cause", *added.values()),
        values=curated.values,
        new_captions=added.get("caption"),
        outside=OUTSIDE,
        score_ends=ends,
        seed=seed,
    )
    groups = [
        Group(
            name=words,
            count=int(counts[code]),
            share=float(counts[code]) / max(num_selected, 1),
            pairs=pairs.get(code, ()),
        )
        for code, words in curated.causes.items()
        if code != OUTSIDE
    ]
    return Explanation(
        catalog=str(catalog.path),
        name=name,
        method=curated.method.method,
        settings=asdict(curated.method),  # type: ignore[call-overload]
        seed=seed,
        columns=tuple(f"{name}_{what}" for what in curated.added),
        is_written=curated.values is None,
        num_pairs=len(catalog),
        num_selected=num_selected,
        num_kept=num_kept,
        num_expected=expected if "probability" in added else None,
        kept=groups[0],
        causes=tuple(groups[1:]),
        survey=found,
        tables=curated.prepared.tables,
        charts=curated.prepared.charts,
    )


def _count(
    curated: Curated, added: Mapping[str, str]
) -> tuple[Int[np.ndarray, " 256"], float, tuple[float, float] | None]:
    """Return the pairs of each cause, the sum of the probabilities of those kept, and the ends of the scores."""
    counts, expected, low, high = np.zeros(256, np.int64), 0.0, math.inf, -math.inf
    columns = [f"{curated.name}_cause", *(added[what] for what in ("score", "probability") if what in added)]
    for block in read_blocks(curated.catalog, columns, curated.values):
        cause = block[f"{curated.name}_cause"]
        counts += np.bincount(cause, minlength=256)
        if "probability" in added:
            expected += float(block[added["probability"]][cause == KEPT].sum(dtype=np.float64))
        if "score" in added:
            score = block[added["score"]][cause != OUTSIDE]
            score = score[np.isfinite(score)]
            low, high = min(low, float(score.min(initial=math.inf))), max(high, float(score.max(initial=-math.inf)))
    return counts, expected, (low, high) if low <= high else None

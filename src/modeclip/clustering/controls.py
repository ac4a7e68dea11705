"""Columns that give the rows of a catalog to the experts of control mixtures, beside ``expert``.

A mixture of data experts differs from one model in several ways at once: several models are averaged, each saw a part
of the data, the parts are clusters, and the clusters were found in two steps. Each control takes one of these away:

- ``random`` (Random-n): a random split of all rows into exactly the sizes of the expert clusters, in the column
  ``random_expert``. Rows are dealt out one by one, so pairs with the same caption, which always share a cluster, need
  not stay together.
- ``full`` (Full-n): n models on all rows, which differ by their seed alone. It needs no column.
- ``one-step`` (OneStep-n): captions are clustered into n experts at once (M = K), in the column ``one_step_expert``.
  The centres are kept for routing, in ``one-step/`` beside the clustering. As each expert has one centre, the limit on
  the size of a fine cluster is the limit on the size of an expert in the fit.

CoarseCluster-n trains no models of its own; it is the routing rule ``coarse``.

Source: MoDE (arXiv 2404.16030) Sec. 5.1 and 5.2. With overlapping experts, which the paper does not have, the random
split keeps the number of experts of each row and the number of rows of each expert.

Price: ``random`` holds one number a row; ``one-step`` costs a fit and one pass over the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.embedding import COLUMN
from modeclip.clustering.fitting import AssignWork, ClusterConfig, count_pairs, fit
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import map_columns
from modeclip.data.selection import ALL, Selection
from modeclip.errors import ModeclipError

RANDOM_COLUMN, ONE_STEP_COLUMN = "random_expert", "one_step_expert"
CONTROL_COLUMNS = {"random": RANDOM_COLUMN, "one-step": ONE_STEP_COLUMN}
"""Column of the catalog that says which model of a control trains on which rows."""
ONE_STEP_FOLDER = "one-step"
"""Name of the folder of the one-step clustering, inside the folder of the clustering."""
SPLIT_STREAM = 1 << 42  # key of the split's random stream, far from the keys of the training's batches and crops


def add_controls(
    catalog: Catalog, controls: Sequence[str], config: ClusterConfig, folder: Path, selection: Selection = ALL
) -> dict[str, Int[np.ndarray, " K"]]:
    """Add the columns that some controls need, unless the catalog has them.

    Args:
        catalog: A clustered catalog.
        controls: Any of ``random``, ``full``, ``one-step``.
        config: Settings that the catalog was clustered with.
        folder: Folder of its clustering.
        selection: Rows that are trained on.

    Returns:
        The number of selected rows of each expert, by the name of the column.
    """
    if "random" in controls:
        split_at_random(catalog, config.seed, selection)
    if "one-step" in controls:
        cluster_in_one_step(catalog, config, folder / ONE_STEP_FOLDER, selection)
    columns = [column for control, column in CONTROL_COLUMNS.items() if control in controls]
    return {column: count_pairs(catalog, config.num_experts, column, selection) for column in columns}


def split_at_random(catalog: Catalog, seed: int, selection: Selection = ALL) -> None:
    """Add the column ``random_expert``: the values of ``expert``, dealt out to all rows at random.

    The sizes of the experts and the seed alone decide which row gets which expert. The values of selected rows are
    dealt out among these, and so are those of the others. If the catalog already has this split, nothing is done.

    Raises:
        ModeclipError: The catalog is not clustered.
    """
    if "expert" not in catalog.columns:
        raise ModeclipError(
            f"catalog {catalog.path!r} has no column expert, and a random split takes its sizes: cluster it first"
        )
    facts = {"seed": seed, "expert": catalog.facts("expert"), "catalog": catalog.fingerprint}
    facts |= _selected(catalog, selection)
    if RANDOM_COLUMN in catalog.columns and catalog.facts(RANDOM_COLUMN) == facts:
        return
    experts = catalog.read(["expert"])["expert"]
    draw = np.random.Generator(np.random.Philox(key=[seed, SPLIT_STREAM]))
    dealt, chosen = np.empty_like(experts), selection.mask_of(catalog)
    for rows in (chosen, ~chosen):
        own = experts[rows]
        dealt[rows] = draw.permutation(np.sort(own) if own.ndim == 1 else own[np.lexsort(own.T[::-1])])
    catalog.add_columns({RANDOM_COLUMN: dealt}, facts=facts)


@dataclass(kw_only=True, eq=False)
class OneStepWork(AssignWork):
    """Assigns blocks of embedded captions to the experts of a one-step clustering."""

    outputs: tuple[str, ...] = (ONE_STEP_COLUMN,)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Assign the rows of a block; the expert alone is kept."""
        return {ONE_STEP_COLUMN: super().__call__(block)["expert"]}


def cluster_in_one_step(
    catalog: Catalog, config: ClusterConfig, folder: Path, selection: Selection = ALL
) -> Clustering:
    """Cluster captions into experts directly, keep the centres in a folder, and add the column ``one_step_expert``.

    If folder and catalog already have what these settings give, nothing is fitted.

    Args:
        catalog: With the column ``caption_embedding``.
        config: Settings of the clustering in two steps; ``num_fine``, ``overlap``, ``max_expert_ratio`` do not count.
        folder: Folder of the one-step clustering.
        selection: Rows that it is fitted to; every row is assigned.

    Raises:
        ModeclipError: The column is missing or holds NaN, or there are fewer distinct captions than experts.
    """
    config = replace(config, num_fine=config.num_experts, overlap=1, max_expert_ratio=1.0)
    facts = {"fit": asdict(config), "embedding": _facts(catalog, COLUMN), "catalog": catalog.fingerprint}
    facts |= _selected(catalog, selection)
    known = _facts(catalog, ONE_STEP_COLUMN) or {}
    clustering = _saved(folder)
    if clustering is None or known != facts | {"clustering": clustering.digest}:
        clustering = fit(catalog, config, selection)
        clustering.save(folder)
    facts["clustering"] = clustering.digest
    map_columns(catalog, OneStepWork(clustering=clustering, facts=facts), "assign in one step")
    return clustering


def _selected(catalog: Catalog, selection: Selection) -> dict[str, Any]:
    """Return the entry about a selection in the facts of a column; none where all pairs are meant."""
    return {} if selection.is_all else {"selection": selection.facts(catalog)}


def _facts(catalog: Catalog, column: str) -> dict[str, Any] | None:
    return catalog.facts(column) if column in catalog.columns else None


def _saved(folder: Path) -> Clustering | None:
    try:
        return Clustering.load(folder)
    except ModeclipError:  # missing, damaged, or of an earlier version: it is fitted again
        return None

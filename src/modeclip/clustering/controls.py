"""A clustered catalog in; columns that give its rows to the experts of the controls out, beside ``expert``.

A mixture of data experts differs from one model in several ways at once: several models are averaged, each saw a part
of the data, the parts are clusters, and the clusters were found in two steps. Each control takes one of them away:

- ``random`` (Random-n): a random split of all rows in exactly the sizes of the expert clusters, column
  ``random_expert``. Rows are dealt out one by one, so pairs with the same caption, which always share a cluster, need
  not stay together.
- ``full`` (Full-n): n models on all rows that differ by their seed alone; it needs no column.
- ``one-step`` (OneStep-n): captions clustered into n experts at once (M = K), column ``one_step_expert``. Its centres
  are kept for routing, in ``one-step/`` beside the clustering. With one centre an expert, the bound on the size of a
  fine cluster is the bound on an expert's, at fitting.

CoarseCluster-n trains nothing of its own: it is the routing rule ``coarse``.

Source: MoDE (arXiv 2404.16030) Sec. 5.1 and 5.2. With overlapping experts, which the paper does not have, the random
split keeps each row's number of experts and each expert's number of rows.

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
from modeclip.clustering.fitting import Assignment, ClusterConfig, count_pairs, fit
from modeclip.data.catalog import Catalog
from modeclip.data.mapping import map_columns
from modeclip.errors import ModeclipError

RANDOM_COLUMN, ONE_STEP_COLUMN = "random_expert", "one_step_expert"
CONTROL_COLUMNS = {"random": RANDOM_COLUMN, "one-step": ONE_STEP_COLUMN}
"""Column of the catalog that says which model of a control trains on which rows."""
ONE_STEP_FOLDER = "one-step"
"""Folder of the one-step clustering, in that of the clustering."""
SPLIT_STREAM = 1 << 42  # key of the random stream of the split, far from those of the training's batches and crops


def add_controls(
    catalog: Catalog, controls: Sequence[str], config: ClusterConfig, folder: Path
) -> dict[str, Int[np.ndarray, " K"]]:
    """Write the columns that some controls need and the catalog does not have yet.

    Args:
        catalog: Clustered.
        controls: Any of ``random``, ``full``, ``one-step``.
        config: What the catalog was clustered with.
        folder: Of its clustering.

    Returns:
        Rows of each expert, by the name of the column.
    """
    if "random" in controls:
        split_at_random(catalog, config.seed)
    if "one-step" in controls:
        cluster_in_one_step(catalog, config, folder / ONE_STEP_FOLDER)
    columns = [column for control, column in CONTROL_COLUMNS.items() if control in controls]
    return {column: count_pairs(catalog, config.num_experts, column) for column in columns}


def split_at_random(catalog: Catalog, seed: int) -> None:
    """Add the column ``random_expert``: the values of ``expert``, dealt out anew to all rows.

    Only the clusters' sizes and the seed decide which row gets which expert. Nothing is done where the catalog has the
    split already.

    Raises:
        ModeclipError: The catalog is not clustered.
    """
    if "expert" not in catalog.columns:
        raise ModeclipError(
            f"catalog {catalog.path!r} has no column expert, whose sizes a random split takes: cluster it first"
        )
    facts = {"seed": seed, "expert": catalog.facts("expert"), "catalog": catalog.fingerprint}
    if RANDOM_COLUMN in catalog.columns and catalog.facts(RANDOM_COLUMN) == facts:
        return
    experts = catalog.read(["expert"])["expert"]
    experts = np.sort(experts) if experts.ndim == 1 else experts[np.lexsort(experts.T[::-1])]
    draw = np.random.Generator(np.random.Philox(key=[seed, SPLIT_STREAM]))
    catalog.add_columns({RANDOM_COLUMN: draw.permutation(experts)}, facts=facts)


@dataclass(kw_only=True, eq=False)
class _OneStepAssignment:
    """Work on blocks of rows, for `map_columns`: embeddings in, the expert with the nearest centre out."""

    clustering: Clustering
    facts: dict[str, Any]
    inputs: tuple[str, ...] = (COLUMN,)
    outputs: tuple[str, ...] = (ONE_STEP_COLUMN,)
    unit: str = "captions"

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assigned = Assignment(clustering=self.clustering, facts=self.facts)(block)
        return {ONE_STEP_COLUMN: assigned["expert"]}


def cluster_in_one_step(catalog: Catalog, config: ClusterConfig, folder: Path) -> Clustering:
    """Cluster captions into experts directly, keep the centres in a folder, and add the column ``one_step_expert``.

    Nothing is fitted where the folder and the catalog hold what these settings give.

    Args:
        catalog: With the column ``caption_embedding``.
        config: Of the clustering in two steps; all but ``num_fine``, ``overlap`` and ``max_expert_ratio`` is used.
        folder: Of the one-step clustering.

    Raises:
        ModeclipError: The column is missing or holds NaN, or there are fewer distinct captions than experts.
    """
    config = replace(config, num_fine=config.num_experts, overlap=1, max_expert_ratio=1.0)
    facts = {"fit": asdict(config), "embedding": _facts(catalog, COLUMN), "catalog": catalog.fingerprint}
    known = _facts(catalog, ONE_STEP_COLUMN) or {}
    clustering = _saved(folder)
    if clustering is None or known != facts | {"clustering": clustering.digest}:
        clustering = fit(catalog, config)
        clustering.save(folder)
    facts["clustering"] = clustering.digest
    map_columns(catalog, _OneStepAssignment(clustering=clustering, facts=facts), "assign in one step")
    return clustering


def _facts(catalog: Catalog, column: str) -> dict[str, Any] | None:
    return catalog.facts(column) if column in catalog.columns else None


def _saved(folder: Path) -> Clustering | None:
    try:
        return Clustering.load(folder)
    except ModeclipError:  # not there, damaged, or of an earlier version: fitted again
        return None

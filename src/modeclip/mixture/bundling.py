"""A run folder (catalog, clustering, models) -> its bundle, from the first finished model on.

Only what the jobs given have finished goes in: a model of other settings, or one that is still training, is stood in
for by the seed. So the same call after each finished expert gives a bundle that works, and a better one each time.

Price: the models are copied and hashed, about a second a gigabyte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.embedding import COLUMN
from modeclip.clustering.fitting import CARDS_FILE
from modeclip.clustering.novelty import fitted_quantiles
from modeclip.data.catalog import CATALOG, Catalog
from modeclip.errors import ModeclipError
from modeclip.evaluation.run_evaluation import EvaluateConfig
from modeclip.mixture.bundle import SEED, save_bundle
from modeclip.system.files import versions
from modeclip.training.jobs import TrainJob, TrainResult

CLUSTERS, BUNDLE = "clusters", "bundle"
"""Folders of a run."""


def assemble_bundle(
    run: Path,
    jobs: Sequence[TrainJob],
    config: EvaluateConfig | None = None,
    *,
    seed: Path | None = None,
    name: str | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Path:
    """Write the bundle of a run folder, replacing the one that is there, and return its path.

    Args:
        run: With ``catalog.lance`` and ``clusters/``.
        jobs: Of the seed and the experts; others among them are left out.
        config: Rule, temperature and templates that the bundle uses by default.
        seed: Model folder of the seed, where no job trains it.
        name: Of the run; the folder's by default.
        lineage: What else it was made from; the jobs and the versions are added.

    Raises:
        ModeclipError: The seed is not finished, or the catalog is not embedded and clustered.
    """
    config, catalog = config or EvaluateConfig(), Catalog.open(run / CATALOG)
    clustering = Clustering.load(run / CLUSTERS)
    finished = [job for job in jobs if is_bundled(job) and TrainResult.read(job) is not None]
    models = ({} if seed is None else {SEED: seed}) | {job.name: Path(job.folder) for job in finished}
    if SEED not in models:
        raise ModeclipError(f"{run}: no bundle without its seed, which is not trained yet; train it first")
    save_bundle(
        run / BUNDLE,
        models=models,
        fine_centers=clustering.fine_centers,
        expert_of_fine=clustering.expert_of_fine,
        cards=json.loads((run / CLUSTERS / CARDS_FILE).read_text(encoding="utf-8")),
        manifest={
            "name": name or run.name,
            "encoder": encoder_of(catalog),
            "rule": config.rule,
            "temperature": config.temperature_of(config.rule),
            "templates": list(config.templates),
            "lineage": {
                "catalog_fingerprint": jobs[0].catalog_fingerprint,
                "jobs": {job.name: job.digest for job in finished},
                "versions": versions(),
                "recipe": {"train": asdict(jobs[0].config)},
                **(lineage or {}),
            },
        },
        fine_quantiles=fitted_quantiles(catalog, clustering.num_fine),
    )
    return run / BUNDLE


def is_bundled(job: TrainJob) -> bool:
    """Tell whether a job's model is part of a bundle: the seed, or an expert of the clusters."""
    return job.role in {"seed", "expert"}


def encoder_of(catalog: Catalog) -> str:
    """Return the encoder that captions were embedded with, by the name that loads it anywhere on this machine.

    Raises:
        ModeclipError: They are not embedded.
    """
    facts = catalog.facts(COLUMN) if COLUMN in catalog.columns else None
    if facts is None:
        raise ModeclipError(f"catalog {catalog.path!r}: its captions are not embedded; give modeclip embed first")
    return str(facts["encoder"])

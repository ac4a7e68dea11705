"""Continues an expert of a bundle on new pairs, or adds a new expert for them.

*Continue an expert*: it goes on from its last checkpoint, with its optimizer state, if the folder of its job is there
(``models/expert-2`` beside the bundle, or the folder that is given), else from the weights in the bundle. It sees those
new pairs of its clusters that are not novel, each as often as it saw its own pairs. *Add a new expert*: it continues
from the seed in the same way on the novel pairs, with as many samples as every other expert had. Fine clusters are
fitted to the novel captions, with about as many pairs in each as in the bundle.

Schedule: with optimizer state, the learning rate starts where the experts' part of the schedule started (5.96 % of the
highest rate in the paper) and falls to 0. From weights alone, AdamW has no moments yet, so a warm-up leads to that rate
first. Experts that had a schedule of their own, as those of a published model have, are continued by a whole one.

Everything is resumable: the folder keeps what was decided, the job keeps its checkpoints, and the bundle's lineage
tells what is done.

Source: ours; MoDE (arXiv 2404.16030) Sec. 3.3 for the training of an expert.
Price: that of the training; once, the embeddings of at most two million novel captions are in memory for the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from modeclip.clustering.cards import Tally, make_cards, split_words
from modeclip.clustering.distances import assign_nearest
from modeclip.clustering.embedding import ROWS_AT_ONCE, read_embeddings
from modeclip.clustering.fitting import sample_rows
from modeclip.clustering.kmeans import kmeans
from modeclip.clustering.novelty import KEPT_CAPTIONS, NearCaptions, fit_quantiles
from modeclip.data.catalog import Catalog
from modeclip.data.selection import ALL, Selection
from modeclip.errors import ModeclipError, check_above_zero, check_between, check_least
from modeclip.mixture.assigning import AssignConfig, AssignResult, assign, quantiles_of
from modeclip.mixture.bundle import Bundle, check_files, load_bundle
from modeclip.mixture.bundle_edits import NewClusters, add_expert, replace_expert
from modeclip.mixture.manifest import SEED
from modeclip.models.checkpoints import find_checkpoint
from modeclip.system.console import log
from modeclip.system.files import only_process, read_json, write_json, writing
from modeclip.system.paths import RunPaths
from modeclip.training.batches import select_rows
from modeclip.training.jobs import (
    JOB_FILE,
    MOST_PROCESSES,
    Role,
    TrainConfig,
    TrainJob,
    TrainResult,
    brings_weights,
    job_name,
    learning_rate_at,
)
from modeclip.training.launching import run_jobs

PLAN_FILE = "extend.json"
FIT_SAMPLES = 2_000_000
"""Most novel captions that the new fine centres are fitted on; as many as `ClusterConfig` takes."""
MANY_PASSES, MANY_TIMES = 10, 4
"""Passes over the new pairs from which on a warning is given, if they are also that many times the usual ones."""
MAX_SIZE_RATIO = 1.5
"""Largest size of a new fine cluster in the fit, as a multiple of the mean; the same as that of `ClusterConfig`."""


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """How an expert is continued, or a new one trained."""

    samples: int | None = None
    """Samples to train on, 1 or more. None: an expert that is continued sees each new pair as often as its own pairs,
    and a new expert sees as many samples as each of the others."""
    batch_size: int | None = None
    """Pairs of a batch, 2 or more, and at most as many as there are to train on. None: as for the bundle's experts."""
    learning_rate: float | None = None
    """Highest learning rate of the whole schedule, of which this training is the last part. None: the bundle's."""
    start: str | None = None
    """Folder of the finished job to go on from: that of the expert, or that of the seed for a new expert. None: the
    folder in ``models`` beside the bundle if it is there, else the weights in the bundle."""
    threads: int = 1
    """Threads that compute, 1 or more."""
    seed: int = 0
    """Decides the new fine clusters."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_least("extend", self, samples=1, batch_size=2, seed=0)
        check_between("extend", self, threads=(1, MOST_PROCESSES))
        check_above_zero("extend", self, "learning_rate")


@dataclass(frozen=True, kw_only=True)
class ExtendResult:
    """What `extend` did."""

    action: Literal["continue", "new"]
    """Whether an expert was continued, or a new one added."""
    expert: int
    """Number of the expert."""
    num_pairs: int
    """Pairs that it was trained on."""
    samples: int
    """Samples that it saw."""
    folder: str
    """Folder of its job."""
    bundle: str
    """Folder of the bundle that it is in now."""

    @property
    def passes(self) -> float:
        """How often it saw each pair."""
        return self.samples / max(self.num_pairs, 1)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What ``extend.json`` keeps of what was decided."""

    action: Literal["continue", "new"]
    expert: int
    bundle: str
    clustering: str
    pairs: str


def continue_job(
    bundle: Bundle, expert: int, catalog: Catalog, folder: Path, config: ExtendConfig, selection: Selection = ALL
) -> TrainJob:
    """Return the job that continues an expert on the new pairs of its clusters that are not novel.

    Args:
        bundle: The bundle of the expert.
        expert: Number of the expert.
        catalog: New pairs, assigned to the bundle.
        folder: Folder for the model.
        config: Budget and start.
        selection: New pairs that may be used.

    Raises:
        ModeclipError: There is no such expert, the bundle does not say how it was trained, or ``config.start`` is not
            the job of this expert.
    """
    if not 0 <= expert < bundle.num_experts:
        raise ModeclipError(
            f"bundle {bundle.path}: has experts 0 to {bundle.num_experts - 1}, got {expert}; choose one of them"
        )
    where = {"expert": expert, "novel": False}
    new, size = len(selection.part_of(catalog).select(None, **where)), max(bundle.experts[expert].size, 1)
    job = _job_from(bundle, "expert", expert, bundle.experts[expert].folder, catalog, folder, config, selection)
    samples = config.samples or round(_expert_samples(bundle, job.config) * new / size)
    return replace(_with_samples(job, samples), where=where)


def new_expert_job(
    bundle: Bundle, catalog: Catalog, folder: Path, config: ExtendConfig, selection: Selection = ALL
) -> TrainJob:
    """Return the job that trains a new expert from the seed on the novel pairs; arguments as for `continue_job`."""
    job, index = _job_from(bundle, "seed", None, SEED, catalog, folder, config, selection), bundle.num_experts
    samples = config.samples or _expert_samples(bundle, job.config)
    job = replace(job, name=job_name("expert", index), role="expert", index=index, mask="novel")
    return _with_samples(job, samples)


def fit_new_clusters(
    bundle: Bundle,
    catalog: Catalog,
    config: ExtendConfig,
    fitted_on: Catalog | None = None,
    selection: Selection = ALL,
) -> NewClusters:
    """Fit fine clusters to the novel pairs of a catalog, with about as many pairs in each as in the bundle.

    Args:
        bundle: The bundle that they will be added to.
        catalog: New pairs, assigned to the bundle.
        config: Its seed is used.
        fitted_on: The catalog that the bundle was made from; only for a bundle that has no quantiles.
        selection: New pairs that may be used.

    Raises:
        ModeclipError: No pair is novel.
    """
    rows = selection.rows(catalog)[selection.part_of(catalog).select("novel")]
    if not len(rows):
        raise ModeclipError(f"catalog {catalog.path!r}: no pair is novel to {bundle.path}; continue an expert instead")
    x = read_embeddings(catalog, rows[sample_rows(len(rows), FIT_SAMPLES, config.seed)])
    pairs_per_fine = sum(expert.size for expert in bundle.experts) / len(bundle.fine_centers)
    wanted = max(1, round(len(rows) / max(pairs_per_fine, 1)))
    num_fine = min(wanted, len(np.unique(x, axis=0)))
    centers = kmeans(x, num_fine, max_size_ratio=MAX_SIZE_RATIO, seed=config.seed).centers
    tally = Tally(num_fine + 1, sample_rows(len(rows), FIT_SAMPLES, config.seed), config.seed)
    fines, distances = [], []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        fine, squared = assign_nearest(read_embeddings(catalog, part), centers)
        fines.append(fine)
        distances.append(np.sqrt(squared))
        tally.add(fine, distances[-1], catalog.read(["caption"], part)["caption"])
    for card in bundle.clusters:  # so that words which the bundle's captions have too are no key words
        tally.words[-1].update(word for caption in card["nearest_captions"] for word in split_words(caption))
    spread = float(np.linalg.norm(centers - centers.mean(0), axis=1).mean())
    whose = np.array([[0]] * num_fine + [[1]])
    cards, experts = make_cards(tally, whose, np.array([spread, 0.0]))
    found = fit_quantiles(
        np.concatenate(fines), np.concatenate(distances), num_fine, quantiles_of(bundle, fitted_on).levels
    )
    found = replace(found, near=NearCaptions.fit(x[:: -(-len(x) // KEPT_CAPTIONS)]))
    return NewClusters(
        fine_centers=centers,
        cards=tuple(_in_catalog(asdict(card), rows) for card in cards[:-1]),
        keywords=experts[0].keywords,
        fine_quantiles=quantiles_of(bundle, fitted_on).extended(found),
    )


def extend(
    bundle: Path,
    catalog: Catalog,
    out: Path,
    *,
    action: int | Literal["new"] | None = None,
    thresholds: AssignConfig | None = None,
    config: ExtendConfig | None = None,
    fitted_on: Catalog | None = None,
    selection: Selection = ALL,
    encoder: str | None = None,
    trust_encoder: bool = False,
) -> ExtendResult:
    """Assign new pairs, train the expert that is worth it, and put it into the bundle.

    Called again with the same arguments, it goes on where it was interrupted.

    Args:
        bundle: Folder of the bundle, which is changed once the expert is trained.
        catalog: The new pairs; it gets the columns of `assign`.
        out: Folder of the job.
        action: Number of the expert to continue, or ``new``. None: what `assign` proposes, if that is one thing.
        thresholds: Thresholds of `assign`.
        config: Budget and start.
        fitted_on: The catalog that the bundle was made from; only for a bundle that has no quantiles.
        selection: New pairs that are counted and trained on.
        encoder: Encoder of the new captions, as for `load_bundle`.
        trust_encoder: As for `load_bundle`.

    Raises:
        ModeclipError: Nothing or more than one thing is proposed, or ``out`` belongs to another extension.
    """
    config, thresholds = config or ExtendConfig(), thresholds or AssignConfig()
    out.mkdir(parents=True, exist_ok=True)
    with only_process(out), writing(out):
        opened = load_bundle(bundle, encoder=encoder, trust_encoder=trust_encoder)
        check_files(opened)  # now, not after the training
        plan = _read_plan(out)
        if plan is None:
            found = assign(catalog, opened, thresholds, fitted_on=fitted_on, selection=selection)
            job = _decide(opened, found, catalog, out, action, config, selection)
            plan = {"action": "new" if job.mask else "continue", "expert": job.index}
            plan |= {"bundle": str(bundle.resolve()), "clustering": opened.clustering, "pairs": catalog.fingerprint}
            job.save()
            write_json(out / PLAN_FILE, plan, indent=2)
        _check_plan(plan, bundle, catalog, out, action)
        job = TrainJob.load(out / job_name("expert", plan["expert"]) / "job.json")
        if job.selection != selection.absolute():
            raise ModeclipError(f"extend: {out} was begun with {job.selection}; give the same, or another --out")
        if not any(edit["job"] == job.digest for edit in opened.edits):
            for line in describe(opened, job, catalog):
                log(line)
            _train_and_put(opened, job, plan, catalog, thresholds, config, fitted_on)
    result = TrainResult.read(job)
    assert result is not None, "a job whose expert is in the bundle is finished"
    return ExtendResult(
        action=plan["action"],
        expert=plan["expert"],
        num_pairs=result.rows,
        samples=result.samples,
        folder=job.folder,
        bundle=str(bundle),
    )


def describe(bundle: Bundle, job: TrainJob, catalog: Catalog) -> list[str]:
    """Say what a job will do, and how often it will see each pair; a second line warns if that is very often.

    It is very often if it is more than `MANY_PASSES`, and more than `MANY_TIMES` as often as the experts of the bundle
    saw their own pairs.

    Args:
        bundle: The bundle that the model will be put into.
        job: Of `continue_job` or `new_expert_job`.
        catalog: The new pairs, assigned to the bundle.
    """
    pairs = len(select_rows(job, catalog))
    samples = (job.last_step - job.first_step) * job.config.batch_size
    passes = samples / max(pairs, 1)
    sizes = sum(expert.size for expert in bundle.experts)
    usual = _expert_samples(bundle, job.config) * bundle.num_experts / max(sizes, 1)
    lines = [
        f"plan: {job.name}, {'new' if job.mask else 'continued'}: {samples:,} samples of {pairs:,} pairs, "
        f"{passes:,.1f} passes over them (the bundle's experts: {usual:,.1f})"
    ]
    if passes > max(MANY_PASSES, MANY_TIMES * usual):
        fewer = max(job.config.batch_size, round(MANY_TIMES * usual * pairs))
        lines.append(
            f"warning: {passes:,.0f} passes over {pairs:,} pairs are more than {MANY_PASSES} and more than {MANY_TIMES}"
            f" times those of the bundle's experts: {job.name} will know its pairs by heart; give more pairs, or"
            f" --samples {fewer}"
        )
    return lines


def _decide(
    bundle: Bundle,
    found: AssignResult,
    catalog: Catalog,
    out: Path,
    action: int | Literal["new"] | None,
    config: ExtendConfig,
    selection: Selection,
) -> TrainJob:
    """Return the job of the action that was asked for, or of the one that is proposed."""
    if action is None:
        proposals = found.proposals
        if not proposals:
            raise ModeclipError(
                f"extend: no expert is worth training on {found.num_pairs:,} new pairs, {found.num_novel:,} of them"
                " novel (modeclip assign shows the counts); give --expert K or --new to train one nevertheless"
            )
        if len(proposals) > 1:
            choices = " or ".join("--new" if p.action == "new" else f"--expert {p.expert}" for p in proposals)
            raise ModeclipError(f"extend: {len(proposals)} experts are worth training; choose one: {choices}")
        action = "new" if proposals[0].action == "new" else proposals[0].expert
    if action == "new":
        return new_expert_job(bundle, catalog, out / job_name("expert", bundle.num_experts), config, selection)
    return continue_job(bundle, action, catalog, out / job_name("expert", action), config, selection)


def _train_and_put(
    bundle: Bundle,
    job: TrainJob,
    plan: Mapping[str, Any],
    catalog: Catalog,
    thresholds: AssignConfig,
    config: ExtendConfig,
    fitted_on: Catalog | None,
) -> None:
    if bundle.clustering != plan["clustering"]:
        raise ModeclipError(
            f"extend: the clustering of bundle {bundle.path} has changed since {Path(job.folder).parent} was begun;"
            " start again with another --out"
        )
    if _fingerprint(catalog) != job.catalog_fingerprint:  # another bundle may have written the columns since
        assign(catalog, bundle, thresholds, fitted_on=fitted_on)
    if _fingerprint(catalog) != job.catalog_fingerprint:
        raise ModeclipError(
            f"extend: {Path(job.folder).parent} was begun with other thresholds or pairs; give the same ones, or"
            " another --out"
        )
    result = run_jobs([job], 1)[job.name]
    note = {"catalog": catalog.name}
    if plan["action"] == "new":
        add_expert(
            bundle.path,
            Path(job.folder),
            fit_new_clusters(bundle, catalog, config, fitted_on, job.selection),
            note=note,
        )
    else:
        size = bundle.experts[plan["expert"]].size + result.rows
        replace_expert(bundle.path, plan["expert"], Path(job.folder), size=size, note=note)


def _read_plan(out: Path) -> dict[str, Any] | None:
    if not (out / PLAN_FILE).exists():
        return None
    plan = read_json(out / PLAN_FILE, _Plan, "give another --out, or remove the folder")
    return asdict(plan)


def _check_plan(
    plan: Mapping[str, Any], bundle: Path, catalog: Catalog, out: Path, action: int | Literal["new"] | None
) -> None:
    same = plan["bundle"] == str(bundle.resolve()) and plan["pairs"] == catalog.fingerprint
    if not same or action not in {None, "new" if plan["action"] == "new" else plan["expert"]}:
        kind = "add" if plan["action"] == "new" else "continue"
        raise ModeclipError(
            f"extend: {out} was begun to {kind} expert {plan['expert']} of {plan['bundle']}, with other pairs or"
            " another action than now; give the same ones, or another --out"
        )


def _job_from(
    bundle: Bundle,
    role: Role,
    index: int | None,
    place: str,
    catalog: Catalog,
    folder: Path,
    config: ExtendConfig,
    selection: Selection,
) -> TrainJob:
    """Return a job that goes on from a model of the bundle: from its checkpoint if there is one, else its weights."""
    name = job_name(role, index)
    start = _job_at_hand(bundle, name, config.start)
    settings = start.config if start is not None else _settings(bundle)
    if role == "seed":  # which trained whole, as the experts of the bundle may not have
        trained = bundle.lineage.get("recipe", {}).get("train") or {}
        settings = replace(settings, trainable=trained.get("trainable", settings.trainable))
    settings = replace(
        settings,
        batch_size=config.batch_size or settings.batch_size,
        learning_rate=config.learning_rate or settings.highest_rate,
        probability=settings.probability if settings.probability in catalog.columns else None,  # else of other pairs
        captions=settings.captions if settings.captions in catalog.columns else None,
    )
    share = start.first_share if start is not None and role == "expert" else _first_share(bundle, settings)
    job = TrainJob(
        name=name,
        role=role,
        index=index,
        folder=str(folder),
        catalog=catalog.path,
        catalog_fingerprint=_fingerprint(catalog),
        config=settings,
        first_step=0,
        last_step=1,
        first_share=0.0,
        last_share=1.0,
        selection=selection.absolute(),
        threads=config.threads,
    )
    if start is not None:
        return replace(
            job,
            config=replace(settings, model=start.folder),  # the model that it was built from may be gone
            start_from=start.folder,
            start_digest=start.digest,
            first_step=start.last_step,
            first_share=share,
        )
    if not (bundle.path / place).is_dir():
        raise ModeclipError(
            f"bundle {bundle.path}: has no {place} to start from; give --start with the folder of its job"
        )
    rate = learning_rate_at(max(share, settings.warmup_fraction), settings)  # at 0, the highest: there is a warm-up
    settings = replace(settings, model=str((bundle.path / place).resolve()), learning_rate=rate)
    return replace(job, config=settings, start_digest=bundle.weights_hash(place) or "")


def _first_share(bundle: Bundle, settings: TrainConfig) -> float:
    """Return the share of the learning-rate schedule that was done when the bundle's experts started.

    Their jobs tell, where they are beside the bundle. Else the lineage does, but for a start that is not there any
    more, which is taken for the end of the seed's part.
    """
    for name, digest in bundle.lineage.get("jobs", {}).items():
        with suppress(ModeclipError):  # missing or damaged
            job = TrainJob.load(RunPaths(folder=bundle.path.parent).models / name / JOB_FILE)
            if job.role == "expert" and job.digest == digest:
                return job.first_share
    given = (bundle.lineage.get("recipe", {}).get("experts") or {}).get("start")
    if given is not None and (Path(given) / JOB_FILE).is_file():
        last_share = TrainJob.load(Path(given) / JOB_FILE).last_share
        return last_share if last_share < 1 else 0.0
    if given is not None and not given.endswith(".pt") and brings_weights(given):
        return 0.0
    return settings.seed_parts / settings.total_parts


def _job_at_hand(bundle: Bundle, name: str, given: str | None) -> TrainJob | None:
    """Return the finished job that a model of the bundle comes from, if its checkpoint is there."""
    folder, digest = (
        Path(given) if given else RunPaths(folder=bundle.path.parent).models / name,
        bundle.job_digest(name),
    )
    job = TrainJob.load(folder / "job.json") if given or (digest and (folder / "job.json").is_file()) else None
    if job is not None and job.digest == digest:
        job = replace(job, folder=str(folder.resolve()))
        if TrainResult.read(job) is not None and find_checkpoint(folder, digest) is not None:
            return job
    if given:
        raise ModeclipError(
            f"start {given}: not the finished job that {name} of {bundle.path} comes from ({digest}); give its folder"
        )
    return None


def _settings(bundle: Bundle) -> TrainConfig:
    """Return the settings that the models of the bundle were trained with, from its lineage."""
    from pydantic import TypeAdapter, ValidationError

    recorded = bundle.lineage.get("recipe", {}).get("train")
    try:
        return TypeAdapter(TrainConfig).validate_python(recorded)
    except ValidationError as error:
        raise ModeclipError(
            f"bundle {bundle.path}: its lineage does not say how it was trained ({error.errors()[0]['msg']}); give"
            " --start with the job's folder"
        ) from None


def _expert_samples(bundle: Bundle, config: TrainConfig) -> int:
    """Return how many samples each expert saw after the seed that the bundle was made with."""
    steps = config.steps_per_part * (config.total_parts - config.seed_parts)
    if bundle.lineage.get("recipe", {}).get("experts", {}).get("budget") == "matched":
        num_added = sum(edit["action"] == "add" for edit in bundle.edits)
        steps = max(1, steps // (bundle.num_experts - num_added))
    return steps * config.batch_size


def _with_samples(job: TrainJob, samples: int) -> TrainJob:
    return replace(job, last_step=job.first_step + max(1, samples // job.config.batch_size))


def _fingerprint(catalog: Catalog) -> str:
    """Return a text that changes with the pairs and with their assignment."""
    facts = (catalog.facts("novel") if "novel" in catalog.columns else None) or {}
    return f"{catalog.fingerprint}-{facts.get('clustering')}-{facts.get('quantiles')}-{facts.get('novel_beyond')}"


def _in_catalog(card: dict[str, Any], rows: Int[np.ndarray, " n"]) -> dict[str, Any]:
    """Return a card whose rows are rows of the catalog, instead of positions among the novel pairs."""
    found = {name: rows[list(card[name])].tolist() if card[name] else [] for name in ("nearest_rows", "random_rows")}
    return card | found

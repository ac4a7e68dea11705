"""A bundle is the folder that is published: the trained experts, the cluster centres, and where they come from.

    bundle/
      mode.json               format version, encoder, rule, the experts, the SHA-256 of every file, lineage
      centres.safetensors     fine_centers (M, D) float32, expert_of_fine (M,) int64; quantile_levels (Q,) float64 and
                              fine_quantiles (M, Q) float32 of the captions' distances, which tell later what is novel;
                              near_captions (n, D) int8, their near_scale, and the quantiles of their distances to each
                              other, near_levels and near_distances, which tell what is out of domain
      clusters.json           size, key words and example captions of every fine cluster
      seed/  expert-0/ ...    plain open_clip model folders; expert-pets/ if one was trained for class names. An expert
                              that has tensors of the seed, byte for byte, is stored as its settings and the others in
                              delta.safetensors (`modeclip.models.deltas`); `export_expert` makes it a plain folder
      encoder/                only where the encoder was fitted to the captions

The seed model stands in for an expert that is not trained yet, so a bundle works from the first finished expert on, and
`assemble_bundle` can be called again after each expert. It leaves out models of other settings and models that are
still training.

`modeclip.mixture.bundle_edits` adds, replaces and fills in experts. An edited bundle has other names for what was
replaced; mode.json lists them.

Opening a bundle checks the hashes of everything but the models. A model is checked when it is loaded
(`modeclip.models.pool`), or by `check_files`, which reads the whole bundle.

Source: MoDE (arXiv 2404.16030) Sec. 3.2 to 3.4 for what a system consists of; the format is ours. Bundles of format 1,
which have no quantiles and no other names for centres and clusters, are still read. `modeclip.mixture.manifest` says
what mode.json may hold; an encoder that is Python code (``MODULE:ATTRIBUTE``) runs only if the user names it too.
Price: opening reads megabytes whatever the size of the models. Assembling copies and hashes the models, about a second
a gigabyte.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int
from tyro.conf import arg

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.embedding import COLUMN
from modeclip.clustering.fitting import CARDS_FILE
from modeclip.clustering.novelty import FineQuantiles, NearCaptions, fitted_quantiles
from modeclip.data.catalog import Catalog
from modeclip.data.prompts import check_templates
from modeclip.errors import ModeclipError, check_above_zero, unknown
from modeclip.mixture.manifest import (
    CENTRES_FILE,
    CLUSTERS_FILE,
    ENCODER_FOLDER,
    FITTED,
    FORMAT_VERSION,
    MANIFEST_FILE,
    SEED,
    SUFFIXES,
    Expert,
    Manifest,
    read_manifest,
)
from modeclip.mixture.rules import DEFAULT_RULE, DEFAULT_TEMPERATURE, RULES
from modeclip.models.clip import CONFIG_FILE, PARITY_FILE
from modeclip.models.deltas import DELTA_FILE, WEIGHTS_FILE, check_delta, is_delta, save_delta, save_whole
from modeclip.models.pool import ModelRef
from modeclip.system.console import log
from modeclip.system.files import hash_file, hash_files, read_json, replacing, versions, write_json
from modeclip.system.paths import RunPaths, home_path
from modeclip.training.jobs import TrainJob, TrainResult, job_name

EDITS = "edits"
"""Field of the lineage that lists what was added or replaced since the bundle was made, oldest first."""
CENTRES = {"expert_of_fine": "I64", "fine_centers": "F32"}
"""Arrays of the file with the centres, and their types."""
QUANTILES = {"fine_quantiles": "F32", "quantile_levels": "F64"}
"""Those that bundles of format 1 do not have."""
NEAR = {"near_captions": "I8", "near_distances": "F32", "near_levels": "F64", "near_scale": "F64"}
"""Those that only bundles of format 3 may have."""
_AGAIN = "get the bundle again"


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How a bundle weighs its experts, and with which prompts, unless it is told otherwise."""

    templates: Annotated[tuple[str, ...], arg(name="template")] = ("{}",)
    """Prompts for class names with ``{}`` where the name goes; ``{}`` alone where captions are bare names."""
    rule: str = DEFAULT_RULE
    """Routing rule: paper, eq6, release, uniform, coarse, top1, share or per_class."""
    temperature: float | None = None
    """Temperature of that rule, above 0; none: the rule's own default."""

    def __post_init__(self) -> None:
        """Check the rule and the templates."""
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)
        check_templates(self.templates, "templates")
        check_above_zero("evaluate", self, "temperature")

    def temperature_of(self, rule: str) -> float:
        """Return the temperature of a rule: the one given here if it is this rule, else the rule's own default.

        Raises:
            ModeclipError: The rule is unknown.
        """
        if rule not in RULES:
            raise unknown("rule", rule, RULES)
        own = self.temperature if rule == self.rule else None
        return DEFAULT_TEMPERATURE[rule] if own is None else own


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle: everything but the models' weights, which are loaded when they are needed."""

    path: Path
    """Folder of the bundle."""
    encoder: str
    """Encoder of captions, class names and centres, as ``encoders.load_encoder`` names it."""
    routing: RoutingConfig
    """Rule, temperature and prompts that it uses unless told otherwise."""
    fine_centers: Float[np.ndarray, "M D"]
    """Fine cluster centres."""
    expert_of_fine: Int[np.ndarray, " M"]
    """Expert of each fine cluster."""
    experts: tuple[Expert, ...]
    """The K experts, by index."""
    lineage: Mapping[str, Any]
    """What it was made from: recipe, digests of the jobs, versions, later edits."""
    fine_quantiles: FineQuantiles | None = None
    """How far from their centre the captions of each fine cluster lie; None in a bundle of format 1."""
    class_experts: tuple[Expert, ...] = ()
    """Experts that were trained for class names; no cluster is theirs, so they are chosen by name (`choose`)."""
    trust_encoder: bool = False
    """Whether an encoder that is Python code may run: the user named it, or said so."""
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Content of ``mode.json``."""

    @property
    def num_experts(self) -> int:
        """Number of experts, K, including those that the seed stands in for."""
        return len(self.experts)

    @cached_property
    def clusters(self) -> list[dict[str, Any]]:
        """Card of each fine cluster: ``size``, ``keywords``, ``nearest_captions``..."""
        cards: list[dict[str, Any]] = read_json(self.path / self.clusters_file, list, _AGAIN)
        for index, card in enumerate(cards):
            captions = card.get("nearest_captions") if isinstance(card, dict) else None
            if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                raise ModeclipError(
                    f"bundle {self.path}: {self.clusters_file} has no nearest_captions, a list of texts, for cluster "
                    f"{index}; {_AGAIN}"
                )
        if len(cards) != len(self.fine_centers):
            raise ModeclipError(
                f"bundle {self.path}: {self.clusters_file} has {len(cards):,} cards, expected one for each of "
                f"{len(self.fine_centers):,} fine clusters; {_AGAIN}"
            )
        return cards

    @property
    def centres_file(self) -> str:
        """Name of the file with the centres."""
        return str(self.manifest.get("files", {}).get("centres", CENTRES_FILE))

    @property
    def clusters_file(self) -> str:
        """Name of the file with the cards."""
        return str(self.manifest.get("files", {}).get("clusters", CLUSTERS_FILE))

    @property
    def edits(self) -> tuple[Mapping[str, Any], ...]:
        """What was added or replaced since the bundle was made, oldest first."""
        return tuple(self.lineage.get(EDITS, ()))

    @cached_property
    def clustering(self) -> str:
        """Hash of the fine centres and of whose they are, in hexadecimal digits."""
        return hash_clusters(self.fine_centers, self.expert_of_fine)

    @cached_property
    def models(self) -> tuple[ModelRef, ...]:
        """The model that runs for each expert, named by the expert; reads the headers of their weights."""
        return tuple(self.model_ref(expert.folder, expert.name) for expert in self.experts)

    def model_ref(self, folder: str, name: str | None = None) -> ModelRef:
        """Refer to the model in one of the bundle's folders, such as ``seed``, under the folder's or another name."""
        return ModelRef.of_bundle(name or folder, self.path, folder, self.manifest["sha256"])

    def choose(self, name: str) -> Bundle:
        """Return the bundle as one that has a single expert, which so has all weight for every task.

        Args:
            name: Of an expert of the clusters, or of one that was trained for class names.

        Raises:
            ModeclipError: There is no such expert.
        """
        experts = {expert.name: expert for expert in (*self.experts, *self.class_experts)}
        if name not in experts:
            raise unknown(f"expert of {self.path}", name, experts)
        return replace(self, experts=(experts[name],), expert_of_fine=np.zeros_like(self.expert_of_fine))

    def model_folder(self, expert: int) -> Path:
        """Return the folder of the model that runs for an expert, as ``clip.load_clip`` takes it."""
        return self.path / self.experts[expert].folder

    def job_digest(self, name: str) -> str | None:
        """Return the digest of the job that made the present ``seed`` or ``expert-3``; None if it is unknown."""
        edits = [edit["job"] for edit in self.edits if edit["expert"] == name]
        jobs: Mapping[str, str] = self.lineage.get("jobs", {})
        return edits[-1] if edits else jobs.get(name)

    def weights_hash(self, folder: str) -> str | None:
        """Return the SHA-256 that the weights in one of its folders must have, or what differs from the seed's."""
        hashes: Mapping[str, str] = self.manifest["sha256"]
        return hashes.get(f"{folder}/{WEIGHTS_FILE}") or hashes.get(f"{folder}/{DELTA_FILE}")


def hash_clusters(fine_centers: Float[np.ndarray, "M D"], expert_of_fine: Int[np.ndarray, " M"]) -> str:
    """Return a hash of fine centres and of whose they are, in hexadecimal digits."""
    digest = sha256(np.ascontiguousarray(fine_centers).tobytes())
    digest.update(np.ascontiguousarray(expert_of_fine).tobytes())
    return digest.hexdigest()[:16]


def load_bundle(source: str | Path, *, encoder: str | None = None, trust_encoder: bool = False) -> Bundle:
    """Open a bundle from a folder, or from the Hugging Face Hub by its id (``org/name``), without reading its models.

    Args:
        source: Folder or id.
        encoder: Name of the encoder, from whoever opens the bundle: it takes the place of the one that the bundle
            names, and may be Python code (``MODULE:ATTRIBUTE``). None: the one that the bundle names.
        trust_encoder: Import and call what the bundle names as its encoder, if that is Python code.

    Raises:
        ModeclipError: It is not there, is no bundle, is of a newer format, says what it may not say, a file is missing,
            or one other than a model's differs from its hash.
    """
    path = _find(source)
    manifest, content = read_manifest(path)
    folders = {SEED, *(expert.folder for expert in manifest.all_experts)}
    small = [name for name in manifest.sha256 if PurePosixPath(name).parts[0] not in folders]
    _check_hashes(path, manifest.sha256, small)
    named = manifest.encoder
    if encoder is not None and encoder != named:
        log(f"bundle {path}: was made with the encoder {named}; {encoder} is used in its place, as you say")
    centres = _read_centres(path, manifest)
    bundle = Bundle(
        path=path,
        encoder=encoder or (f"{FITTED}{path / ENCODER_FOLDER}" if named == FITTED + ENCODER_FOLDER else named),
        routing=RoutingConfig(rule=manifest.rule, temperature=manifest.temperature, templates=manifest.templates),
        fine_centers=centres["fine_centers"],
        expert_of_fine=centres["expert_of_fine"],
        experts=manifest.experts,
        class_experts=manifest.class_experts,
        lineage=content["lineage"],
        fine_quantiles=_quantiles(centres),
        trust_encoder=trust_encoder or encoder is not None,
        manifest=content,
    )
    _ = bundle.clusters  # an error now if they are not those of the centres
    return bundle


def check_files(bundle: Bundle, folder: str | None = None) -> None:
    """Compare every file of a bundle with its hash, the models' weights included: about a second for each 1.5 GB.

    Args:
        bundle: An opened bundle.
        folder: Compare only the files in this one of its folders, and those that its model is made of.

    Raises:
        ModeclipError: Files are missing or damaged; it names the first.
    """
    hashes = bundle.manifest["sha256"]
    folders = {folder, SEED} if f"{folder}/{DELTA_FILE}" in hashes else {folder}
    names = [name for name in hashes if folder is None or PurePosixPath(name).parts[0] in folders]
    _check_hashes(bundle.path, hashes, names)


def assemble_bundle(
    run: Path,
    jobs: Sequence[TrainJob],
    config: RoutingConfig | None = None,
    *,
    seed: Path | None = None,
    name: str | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> Path:
    """Write the bundle of a run folder with the models that are finished, in place of an older one.

    Args:
        run: Run folder with ``catalog.lance`` and ``clusters/``.
        jobs: Jobs of the seed and the experts; others among them are left out.
        config: Rule, temperature and templates that the bundle uses by default.
        seed: Model folder of the seed, where no job trains it.
        name: Name of the run; None: that of its folder.
        lineage: What else it was made from; the jobs and the versions are added.

    Returns:
        The bundle's folder.

    Raises:
        ModeclipError: The seed is not finished, or the catalog is not embedded and clustered.
    """
    config, paths = config or RoutingConfig(), RunPaths(folder=run)
    catalog, clustering = Catalog.open(paths.catalog_path), Clustering.load(paths.clusters)
    results = {job.name: TrainResult.read(job) for job in jobs if is_bundled(job)}
    finished = [job for job in jobs if results.get(job.name) is not None]
    models = ({} if seed is None else {SEED: seed}) | {job.name: Path(job.folder) for job in finished}
    if SEED not in models:
        raise ModeclipError(f"{run}: a bundle needs the seed, which is not trained yet; train it first")
    save_bundle(
        paths.bundle,
        models=models,
        fine_centers=clustering.fine_centers,
        expert_of_fine=clustering.expert_of_fine,
        cards=read_json(paths.clusters / CARDS_FILE, dict[str, Any], "cluster again (modeclip cluster)"),
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
        fine_quantiles=fitted_quantiles(catalog, clustering.num_fine, jobs[0].selection),
        class_experts=[
            Expert(name=job.name, folder=job.name, size=found.rows)
            for job in finished
            if job.role == "prior" and (found := results[job.name]) is not None
        ],
    )
    return paths.bundle


def is_bundled(job: TrainJob) -> bool:
    """Tell whether a job's model is part of a bundle: the seed, or an expert of the clusters or of class names."""
    return job.role in {"seed", "expert", "prior"}


def encoder_of(catalog: Catalog) -> str:
    """Return the encoder that captions were embedded with, by the name that loads it anywhere on this machine.

    Raises:
        ModeclipError: The captions are not embedded.
    """
    facts = catalog.facts(COLUMN) if COLUMN in catalog.columns else None
    if facts is None:
        raise ModeclipError(f"catalog {catalog.path!r}: its captions are not embedded; give modeclip embed first")
    return str(facts["encoder"])


def save_bundle(
    folder: Path,
    *,
    models: Mapping[str, Path],
    fine_centers: Float[np.ndarray, "M D"],
    expert_of_fine: Int[np.ndarray, " M"],
    cards: Mapping[str, Any],
    manifest: Mapping[str, Any],
    fine_quantiles: FineQuantiles | None = None,
    class_experts: Sequence[Expert] = (),
) -> None:
    """Write a bundle; what was in the folder is replaced only when the new one is complete.

    Args:
        folder: Where it goes.
        models: Model folder of ``seed`` and of each finished expert (``expert-0``...).
        fine_centers: Fine cluster centres.
        expert_of_fine: Expert of each fine cluster.
        cards: The clustering's cards: ``fine`` and ``experts`` lists.
        manifest: ``encoder``, ``rule``, ``temperature``, ``templates`` and ``lineage``.
        fine_quantiles: Quantiles of the captions' distances (``novelty.fitted_quantiles``); without them
            `modeclip assign` needs the catalog that the clusters were fitted on.
        class_experts: Experts for class names, whose models are among ``models``.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, source in sorted(models.items(), key=lambda item: item[0] != SEED):
        copy_model(source, part / name)
    encoder = str(manifest["encoder"])
    if encoder.startswith(FITTED):  # fitted to these captions, so nobody else has it
        shutil.copytree(encoder.removeprefix(FITTED), part / ENCODER_FOLDER)
        encoder = FITTED + ENCODER_FOLDER
    save_centres(part / CENTRES_FILE, fine_centers, expert_of_fine, fine_quantiles)
    write_json(part / CLUSTERS_FILE, cards["fine"], indent=None)
    experts = [
        Expert(
            name=(name := job_name("expert", card["index"])),
            folder=name if name in models else SEED,
            size=card["size"],
            keywords=tuple(card["keywords"]),
        )
        for card in cards["experts"]
    ]
    content = {
        "format_version": FORMAT_VERSION,
        **manifest,
        "encoder": encoder,
        "experts": [asdict(expert) for expert in experts],
        **({"class_experts": [asdict(expert) for expert in class_experts]} if class_experts else {}),
        "files": {"centres": CENTRES_FILE, "clusters": CLUSTERS_FILE},
        "sha256": hash_files(part, sorted(part.rglob("*"))),
    }
    write_json(part / MANIFEST_FILE, content, indent=2)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    part.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def copy_model(source: Path, target: Path, *, whole: bool = False) -> None:
    """Copy a model's folder into a new one; a hard link would change with a source that is written to in place.

    Args:
        source: Its folder.
        target: The new folder. Where a ``seed`` lies beside it that shares tensors, only the others are written.
        whole: Whether to write all weights all the same.

    Raises:
        ModeclipError: A file is damaged, or the disk is full.
    """
    target.mkdir()
    for file in (CONFIG_FILE, PARITY_FILE):
        if file == CONFIG_FILE or (source / file).is_file():
            shutil.copyfile(source / file, target / file)
    seed = target.parent / SEED
    if not whole and seed != target and (seed / WEIGHTS_FILE).is_file() and save_delta(source, seed, target):
        return
    if is_delta(source):
        check_delta(source)
        save_whole(source, target / WEIGHTS_FILE)
    else:
        shutil.copyfile(source / WEIGHTS_FILE, target / WEIGHTS_FILE)


def export_expert(bundle: Bundle, name: str, folder: Path) -> None:
    """Write one model of a bundle as a plain open_clip folder, whichever way the bundle stores it.

    Args:
        bundle: An opened bundle.
        name: Name of an expert, or ``seed``.
        folder: A new folder; it appears when all of it is there.

    Raises:
        ModeclipError: There is no such model, its files are damaged, the folder exists, or the disk is full.
    """
    folders = {SEED: SEED} | {expert.name: expert.folder for expert in (*bundle.experts, *bundle.class_experts)}
    if name not in folders:
        raise unknown(f"model of {bundle.path}", name, folders)
    if folder.exists():
        raise ModeclipError(f"export: {folder} exists already; give a new folder")
    check_files(bundle, folders[name])
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        copy_model(bundle.path / folders[name], part, whole=True)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_centres(
    path: Path,
    fine_centers: Float[np.ndarray, "M D"],
    expert_of_fine: Int[np.ndarray, " M"],
    fine_quantiles: FineQuantiles | None,
) -> None:
    """Write the file with the centres, whose they are, and the quantiles if there are any."""
    from safetensors.numpy import save_file

    tensors = {"fine_centers": np.ascontiguousarray(fine_centers), "expert_of_fine": expert_of_fine.astype(np.int64)}
    if fine_quantiles is not None:
        tensors["quantile_levels"] = np.array(fine_quantiles.levels)
        tensors["fine_quantiles"] = np.ascontiguousarray(fine_quantiles.distances)
        if (near := fine_quantiles.near) is not None:
            tensors |= {"near_captions": np.ascontiguousarray(near.vectors), "near_scale": np.array([near.scale])}
            tensors |= {"near_levels": np.array(near.quantiles.levels), "near_distances": near.quantiles.distances}
    with replacing(path) as part:
        save_file(tensors, part)


def _find(source: str | Path) -> Path:
    path = home_path(source)
    if path.is_dir():
        return path
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in {".", ".."}:
        raise ModeclipError(f"bundle {source}: no such folder; expected a folder with a {MANIFEST_FILE}, or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[f"*{end}" for end in SUFFIXES]))
    except Exception as error:  # the Hub client raises many kinds; each of them means that the bundle is out of reach
        reason = " ".join(str(error).split())[:200]
        raise ModeclipError(f"bundle {source}: no such folder, and the Hub has no answer ({reason})") from error


def _read_centres(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the arrays of a bundle's centres, which fit each other and the experts."""
    from safetensors import SafetensorError, safe_open

    file, num_experts = manifest.files.centres, len(manifest.experts)

    def error(problem: str) -> ModeclipError:
        return ModeclipError(f"bundle {path}: {file} {problem}; {_AGAIN}")

    try:
        with safe_open(path / file, "numpy") as opened:
            types = {name: opened.get_slice(name).get_dtype() for name in sorted(opened.keys())}
            if types not in ({**CENTRES, **QUANTILES, **NEAR}, {**CENTRES, **QUANTILES}, CENTRES):
                found = ", ".join(f"{name[:40]!r} {kind}" for name, kind in list(types.items())[:6])
                raise error(
                    f"holds {found or 'nothing'}, expected {', '.join(CENTRES)} and maybe {', '.join(QUANTILES)}"
                )
            arrays = {name: opened.get_tensor(name) for name in types}
    except (SafetensorError, OSError, MemoryError) as problem:
        raise error(f"cannot be read ({' '.join(str(problem).split())[:200]})") from None
    centers, owners = arrays["fine_centers"], arrays["expert_of_fine"]
    if centers.ndim != 2 or 0 in centers.shape or not np.isfinite(centers).all():
        raise error(f"has centres of shape {centers.shape}, expected a matrix of finite numbers")
    if owners.shape != centers.shape[:1] or not ((owners >= 0) & (owners < num_experts)).all():
        raise error(f"expected an expert of 0 to {num_experts - 1} for each of {len(centers):,} fine clusters")
    fault = ""
    if QUANTILES.keys() <= arrays.keys():
        fault = _fault_of(arrays["quantile_levels"], arrays["fine_quantiles"], len(centers))
    if NEAR.keys() <= arrays.keys():
        captions, scale = arrays["near_captions"], arrays["near_scale"]
        if captions.ndim != 2 or len(captions) < 1 or captions.shape[1] != centers.shape[1]:
            raise error(f"has captions of shape {captions.shape}, expected {centers.shape[1]:,} numbers for each")
        if scale.shape != (1,) or not 0 < scale[0] < np.inf:
            raise error("has a scale of the captions that is not one number above 0")
        fault = fault or _fault_of(arrays["near_levels"], arrays["near_distances"], 1)
    if fault:
        raise error(fault)
    return arrays


def _fault_of(levels: np.ndarray, distances: np.ndarray, num_clusters: int) -> str:
    """Say why levels and distances are no quantiles of some clusters; empty if they are."""
    if levels.ndim != 1 or distances.shape != (num_clusters, len(levels)) or not len(levels):
        return f"has quantiles of shape {distances.shape}, expected some for each of {num_clusters:,} clusters"
    inside = (levels > 0).all() and (levels < 1).all() and (np.diff(levels) > 0).all()
    ascends = np.isfinite(distances).all() and (np.diff(distances, prepend=0.0) >= 0).all()
    return "" if inside and ascends else "has quantiles that do not ascend"


def _quantiles(centres: Mapping[str, np.ndarray]) -> FineQuantiles | None:
    if "fine_quantiles" not in centres:
        return None
    near = None
    if "near_captions" in centres:
        levels = tuple(centres["near_levels"].tolist())
        near = NearCaptions(
            vectors=centres["near_captions"],
            scale=float(centres["near_scale"][0]),
            quantiles=FineQuantiles(levels=levels, distances=centres["near_distances"]),
        )
    levels = tuple(centres["quantile_levels"].tolist())
    return FineQuantiles(levels=levels, distances=centres["fine_quantiles"], near=near)


def _check_hashes(path: Path, hashes: Mapping[str, str], names: Collection[str]) -> None:
    """Raise unless all files are there, and those named have their hashes."""
    wrong = [
        name
        for name, digest in hashes.items()
        if not (path / name).is_file() or (name in names and hash_file(path / name) != digest)
    ]
    if wrong:
        raise ModeclipError(
            f"bundle {path}: {len(wrong)} of {len(hashes)} files are missing or differ from their hash in "
            f"{MANIFEST_FILE}, first {wrong[0]}; get the bundle again"
        )

"""A bundle is the folder that is published: the trained experts, the cluster centres, and where they come from.

    bundle/
      mode.json               format version, encoder, rule, the experts, the SHA-256 of every file, lineage
      centres.safetensors     fine_centers (M, D) float32, expert_of_fine (M,) int64; quantile_levels (Q,) float64 and
                              fine_quantiles (M, Q) float32 of the captions' distances, which tell later what is novel
      clusters.json           size, key words and example captions of every fine cluster
      seed/  expert-0/ ...    plain open_clip model folders
      encoder/                only where the encoder was fitted to the captions

The seed model stands in for an expert that is not trained yet, so a bundle works from the first finished expert on, and
`assemble_bundle` can be called again after each expert. It leaves out models of other settings and models that are
still training.

`modeclip.mixture.bundle_edits` adds, replaces and fills in experts. An edited bundle has other names for what was
replaced; mode.json lists them.

Opening a bundle checks the hashes of everything but the models. A model is checked when it is loaded
(`modeclip.models.pool`), or by `check_files`, which reads the whole bundle.

Source: MoDE (arXiv 2404.16030) Sec. 3.2 to 3.4 for what a system consists of; the format is ours. Bundles of format 1,
which have no quantiles and no other names for centres and clusters, are still read.
Price: opening reads megabytes whatever the size of the models. Assembling copies and hashes the models, about a second
a gigabyte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from modeclip.clustering.novelty import FineQuantiles, fitted_quantiles
from modeclip.data.catalog import Catalog
from modeclip.data.prompts import check_templates
from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.rules import DEFAULT_RULE, DEFAULT_TEMPERATURE, RULES
from modeclip.models.clip import CONFIG_FILE, PARITY_FILE, WEIGHTS_FILE
from modeclip.models.pool import ModelRef
from modeclip.system.files import hash_file, hash_files, replacing, versions, write_json
from modeclip.system.paths import RunPaths
from modeclip.training.jobs import TrainJob, TrainResult, job_name

FORMAT_VERSION = 2
MANIFEST_FILE = "mode.json"
MANIFEST_FIELDS = ("encoder", "rule", "temperature", "templates", "experts", "lineage")
CENTRES_FILE = "centres.safetensors"
CLUSTERS_FILE = "clusters.json"
SEED = job_name("seed")
"""Folder of the seed in a bundle; it stands in for every expert that is missing."""
EDITS = "edits"
"""Field of the lineage that lists what was added or replaced since the bundle was made, oldest first."""
FITTED, ENCODER_FOLDER = "tfidf:", "encoder"
"""Start of the name of an encoder that was fitted to the captions, and the folder of a bundle that carries it."""


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
class Expert:
    """One data expert as the manifest lists it."""

    name: str
    """Its name: ``expert-0``, ``expert-1``..."""
    folder: str
    """Folder of the model that runs for it in the bundle: its own, or ``seed`` while it is missing."""
    size: int
    """Number of pairs in its cluster."""
    keywords: tuple[str, ...] = ()
    """Words that its captions use more often than those of the other experts."""


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
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Content of ``mode.json``."""

    @property
    def num_experts(self) -> int:
        """Number of experts, K, including those that the seed stands in for."""
        return len(self.experts)

    @cached_property
    def clusters(self) -> list[dict[str, Any]]:
        """Card of each fine cluster: ``size``, ``keywords``, ``nearest_captions``..."""
        content: list[dict[str, Any]] = json.loads((self.path / self.clusters_file).read_text(encoding="utf-8"))
        return content

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

    def model_folder(self, expert: int) -> Path:
        """Return the open_clip folder that runs for an expert."""
        return self.path / self.experts[expert].folder

    def job_digest(self, name: str) -> str | None:
        """Return the digest of the job that made the present ``seed`` or ``expert-3``; None if it is unknown."""
        edits = [edit["job"] for edit in self.edits if edit["expert"] == name]
        jobs: Mapping[str, str] = self.lineage.get("jobs", {})
        return edits[-1] if edits else jobs.get(name)

    def weights_hash(self, folder: str) -> str | None:
        """Return the SHA-256 that the weights in one of its folders must have."""
        hashes: Mapping[str, str] = self.manifest["sha256"]
        return hashes.get(f"{folder}/{WEIGHTS_FILE}")


def hash_clusters(fine_centers: Float[np.ndarray, "M D"], expert_of_fine: Int[np.ndarray, " M"]) -> str:
    """Return a hash of fine centres and of whose they are, in hexadecimal digits."""
    digest = sha256(np.ascontiguousarray(fine_centers).tobytes())
    digest.update(np.ascontiguousarray(expert_of_fine).tobytes())
    return digest.hexdigest()[:16]


def load_bundle(source: str | Path) -> Bundle:
    """Open a bundle from a folder, or from the Hugging Face Hub by its id (``org/name``), without reading its models.

    Raises:
        ModeclipError: It is not there, is no bundle, is of a newer format, a file is missing, or one other than a
            model's differs from its hash.
    """
    from safetensors.numpy import load_file

    path = _find(source)
    manifest, experts = _read_manifest(path)
    folders = {SEED, *(expert.folder for expert in experts)}
    small = [name for name in manifest["sha256"] if PurePosixPath(name).parts[0] not in folders]
    _check_hashes(path, manifest["sha256"], small)
    centres, encoder = load_file(path / manifest.get("files", {}).get("centres", CENTRES_FILE)), manifest["encoder"]
    levels = tuple(centres.get("quantile_levels", np.empty(0)).tolist())
    try:
        routing = RoutingConfig(
            rule=manifest["rule"], temperature=manifest["temperature"], templates=tuple(manifest["templates"])
        )
    except ModeclipError as error:
        raise ModeclipError(f"bundle {path}: {error}; upgrade modeclip, or get the bundle again") from None
    return Bundle(
        path=path,
        encoder=f"{FITTED}{path / ENCODER_FOLDER}" if encoder == FITTED + ENCODER_FOLDER else encoder,
        routing=routing,
        fine_centers=centres["fine_centers"],
        expert_of_fine=centres["expert_of_fine"],
        experts=experts,
        lineage=manifest["lineage"],
        fine_quantiles=FineQuantiles(levels=levels, distances=centres["fine_quantiles"]) if levels else None,
        manifest=manifest,
    )


def check_files(bundle: Bundle) -> None:
    """Compare every file of a bundle with its hash, the models' weights included: about a second for each 1.5 GB.

    Raises:
        ModeclipError: Files are missing or damaged; it names the first.
    """
    _check_hashes(bundle.path, bundle.manifest["sha256"], bundle.manifest["sha256"])


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
    finished = [job for job in jobs if is_bundled(job) and TrainResult.read(job) is not None]
    models = ({} if seed is None else {SEED: seed}) | {job.name: Path(job.folder) for job in finished}
    if SEED not in models:
        raise ModeclipError(f"{run}: a bundle needs the seed, which is not trained yet; train it first")
    save_bundle(
        paths.bundle,
        models=models,
        fine_centers=clustering.fine_centers,
        expert_of_fine=clustering.expert_of_fine,
        cards=json.loads((paths.clusters / CARDS_FILE).read_text(encoding="utf-8")),
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
    return paths.bundle


def is_bundled(job: TrainJob) -> bool:
    """Tell whether a job's model is part of a bundle: the seed, or an expert of the clusters."""
    return job.role in {"seed", "expert"}


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
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, source in models.items():
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


def copy_model(source: Path, target: Path) -> None:
    """Copy an open_clip folder into a new one; a hard link would change with a source that is written to in place."""
    target.mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE, PARITY_FILE):
        if file != PARITY_FILE or (source / file).is_file():
            shutil.copyfile(source / file, target / file)


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
    with replacing(path) as part:
        save_file(tensors, part)


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in {".", ".."}:
        raise ModeclipError(f"bundle {source}: no such folder; expected a folder with a {MANIFEST_FILE}, or a Hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source)))
    except Exception as error:  # the Hub client raises many kinds; each of them means that the bundle is out of reach
        reason = " ".join(str(error).split())[:200]
        raise ModeclipError(f"bundle {source}: no such folder, and the Hub has no answer ({reason})") from error


def _read_manifest(path: Path) -> tuple[dict[str, Any], tuple[Expert, ...]]:
    """Return the content of a bundle's manifest, whose paths all lie in the bundle, and the experts that it lists."""
    again = "get the bundle again"
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        version, names = int(manifest["format_version"]), list(dict(manifest["sha256"]))
    except FileNotFoundError:
        raise ModeclipError(f"{path} is no bundle: {MANIFEST_FILE} is missing; `modeclip run` makes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModeclipError(f"bundle {path}: {MANIFEST_FILE} cannot be read ({error}); {again}") from None
    if version > FORMAT_VERSION:
        raise ModeclipError(
            f"bundle {path}: format {version} is newer than this modeclip reads ({FORMAT_VERSION}); upgrade modeclip"
        )
    if missing := [name for name in MANIFEST_FIELDS if name not in manifest]:
        raise ModeclipError(f"bundle {path}: {MANIFEST_FILE} lacks {', '.join(missing)}; {again}")
    try:
        experts = tuple(Expert(**entry | {"keywords": tuple(entry["keywords"])}) for entry in manifest["experts"])
        names += [*manifest.get("files", {}).values(), *(expert.folder for expert in experts)]
        places = [PurePosixPath(name) for name in names]
    except (KeyError, TypeError, AttributeError) as error:
        raise ModeclipError(f"bundle {path}: {MANIFEST_FILE} cannot be read ({error}); {again}") from None
    for name, place in zip(names, places, strict=True):
        if place.is_absolute() or ".." in place.parts or not place.parts:
            raise ModeclipError(f"bundle {path}: {MANIFEST_FILE} names {name!r}, which is not in the bundle; {again}")
    return manifest, experts


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

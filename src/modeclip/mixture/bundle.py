"""Trained experts and their clusters -> the folder that is published, and back, checked file by file.

    bundle/
      mode.json               format version, encoder, rule, the experts, the SHA-256 of every file, where it came from
      centres.safetensors     fine_centers (M, D) float32, expert_of_fine (M,) int64; quantile_levels (Q,) float64 and
                              fine_quantiles (M, Q) float32 of the captions' distances, for what is new later
      clusters.json           size, key words and example captions of every fine cluster
      seed/  expert-0/ ...    plain open_clip model folders
      encoder/                where the encoder was fitted to the captions

An expert that is not there yet is stood in for by the seed model, so a bundle works from the first finished expert on.

``modeclip.mixture.bundle_edits`` adds, replaces and fills in experts; an edited bundle has other names for what was replaced, and
mode.json has them.

Source: MoDE Sec. 3.2 to 3.4 for what a system consists of; the format is ours. Format 1 has no quantiles and its
centres and clusters always under the names above; it is still read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from modeclip.clustering.novelty import FineQuantiles
from modeclip.errors import ModeclipError
from modeclip.models.clip import CONFIG_FILE, WEIGHTS_FILE
from modeclip.models.pool import ModelRef
from modeclip.system.files import hash_file, hash_files
from modeclip.training.jobs import job_name

FORMAT_VERSION = 2
MANIFEST_FILE = "mode.json"
MANIFEST_FIELDS = ("encoder", "rule", "temperature", "templates", "experts", "lineage")
CENTRES_FILE = "centres.safetensors"
CLUSTERS_FILE = "clusters.json"
PARITY_FILE = "parity.json"
SEED = job_name("seed")
"""Folder of the seed in a bundle; it stands in for every expert that is missing."""
EDITS = "edits"
"""Field of the lineage: what was added or replaced since the bundle was made, in order."""
FITTED, ENCODER_FOLDER = "tfidf:", "encoder"
"""Begins the name of an encoder that was fitted to the captions, and the folder of a bundle that carries it."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One data expert as the manifest lists it."""

    name: str
    """Its folder in the bundle."""
    folder: str
    """Folder of the model that runs for it: its own, or ``seed`` while it is missing."""
    size: int
    """Pairs of its cluster."""
    keywords: tuple[str, ...] = ()
    """Words that its captions use more than the others'."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle: everything but the models' weights, which are loaded when they are needed."""

    path: Path
    """Its folder."""
    encoder: str
    """Encoder of captions, class names and centres, as ``encoders.load_encoder`` names it."""
    rule: str
    """Routing rule that it uses unless told otherwise."""
    temperature: float
    """Temperature of that rule."""
    templates: tuple[str, ...]
    """Prompts for class names, ``{}`` where the name goes, unless a task brings its own."""
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
        """K, the missing ones included."""
        return len(self.experts)

    @cached_property
    def clusters(self) -> list[dict[str, Any]]:
        """Card of each fine cluster: ``size``, ``keywords``, ``nearest_captions``..."""
        path = self.path / self.clusters_file
        content: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return content

    @property
    def centres_file(self) -> str:
        """Name of the file of the centres."""
        return str(self.manifest.get("files", {}).get("centres", CENTRES_FILE))

    @property
    def clusters_file(self) -> str:
        """Name of the file of the cards."""
        return str(self.manifest.get("files", {}).get("clusters", CLUSTERS_FILE))

    @property
    def edits(self) -> tuple[Mapping[str, Any], ...]:
        """What was added or replaced since it was made, oldest first."""
        return tuple(self.lineage.get(EDITS, ()))

    @cached_property
    def clustering(self) -> str:
        """Hash of the fine centres and of whose they are, as hexadecimal digits."""
        digest = sha256(np.ascontiguousarray(self.fine_centers).tobytes())
        digest.update(np.ascontiguousarray(self.expert_of_fine).tobytes())
        return digest.hexdigest()[:16]

    def job_digest(self, name: str) -> str | None:
        """Return the digest of the job that the present ``seed`` or ``expert-3`` comes from, as far as it is known."""
        edits = [edit["job"] for edit in self.edits if edit["expert"] == name]
        jobs: Mapping[str, str] = self.lineage.get("jobs", {})
        return edits[-1] if edits else jobs.get(name)

    def weights_hash(self, folder: str) -> str | None:
        """Return the SHA-256 of the weights in one of its folders."""
        hashes: Mapping[str, str] = self.manifest["sha256"]
        return hashes.get(f"{folder}/{WEIGHTS_FILE}")

    def model_ref(self, folder: str, name: str | None = None) -> ModelRef:
        """Return the reference to a model in one of its folders; its name is the folder's unless one is given."""
        return ModelRef.of_bundle(name or folder, self.path, folder, self.manifest["sha256"])

    def model_folder(self, expert: int) -> Path:
        """Return the open_clip folder that runs for an expert."""
        return self.path / self.experts[expert].folder


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
    """Write a bundle, replacing what was in the folder only when the new one is complete.

    Args:
        folder: Where it goes.
        models: Model folder of ``seed`` and of each finished expert (``expert-0``...).
        fine_centers: Fine cluster centres.
        expert_of_fine: Expert of each fine cluster.
        cards: The clustering's cards: ``fine`` and ``experts`` lists.
        manifest: ``encoder``, ``rule``, ``temperature``, ``templates`` and ``lineage``.
        fine_quantiles: Of the captions' distances (``novelty.fitted_quantiles``); without them `modeclip assign` needs
            the catalog that the clusters were fitted on.
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
    (part / CLUSTERS_FILE).write_text(json.dumps(cards["fine"]) + "\n", encoding="utf-8")
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
        "experts": [asdict(e) for e in experts],
        "files": {"centres": CENTRES_FILE, "clusters": CLUSTERS_FILE},
        "sha256": hash_files(part, sorted(part.rglob("*"))),
    }
    (part / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    part.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_bundle(source: str | Path) -> Bundle:
    """Open a bundle from a folder, or from the Hugging Face Hub by its id (``org/name``).

    Raises:
        ModeclipError: It is not there, is no bundle, is of a newer format, or a file differs from its hash.
    """
    from safetensors.numpy import load_file

    path = _find(source)
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        version, hashes = int(manifest["format_version"]), dict(manifest["sha256"])
    except FileNotFoundError:
        raise ModeclipError(f"{path} is no bundle: {MANIFEST_FILE} is missing; `modeclip run` makes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModeclipError(f"bundle {path}: {MANIFEST_FILE} cannot be read ({error}); get the bundle again") from None
    if version > FORMAT_VERSION:
        raise ModeclipError(
            f"bundle {path}: format {version} is newer than this modeclip reads ({FORMAT_VERSION}); upgrade modeclip"
        )
    if missing := [name for name in MANIFEST_FIELDS if name not in manifest]:
        raise ModeclipError(f"bundle {path}: {MANIFEST_FILE} lacks {', '.join(missing)}; get the bundle again")
    _check_hashes(path, hashes)
    centres, encoder = load_file(path / manifest.get("files", {}).get("centres", CENTRES_FILE)), manifest["encoder"]
    levels = tuple(centres.get("quantile_levels", np.empty(0)).tolist())
    return Bundle(
        path=path,
        encoder=f"{FITTED}{path / ENCODER_FOLDER}" if encoder == FITTED + ENCODER_FOLDER else encoder,
        rule=manifest["rule"],
        temperature=manifest["temperature"],
        templates=tuple(manifest["templates"]),
        fine_centers=centres["fine_centers"],
        expert_of_fine=centres["expert_of_fine"],
        experts=tuple(Expert(**{**expert, "keywords": tuple(expert["keywords"])}) for expert in manifest["experts"]),
        lineage=manifest["lineage"],
        fine_quantiles=FineQuantiles(levels=levels, distances=centres["fine_quantiles"]) if levels else None,
        manifest=manifest,
    )


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


def _check_hashes(path: Path, hashes: Mapping[str, str]) -> None:
    wrong: Sequence[str] = [
        name for name, digest in hashes.items() if not (path / name).is_file() or hash_file(path / name) != digest
    ]
    if wrong:
        raise ModeclipError(
            f"bundle {path}: {len(wrong)} of {len(hashes)} files are missing or differ from their hash in "
            f"{MANIFEST_FILE}, first {wrong[0]}; get the bundle again"
        )


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
    """Write the file of the centres."""
    from safetensors.numpy import save_file

    tensors = {"fine_centers": np.ascontiguousarray(fine_centers), "expert_of_fine": expert_of_fine.astype(np.int64)}
    if fine_quantiles is not None:
        tensors["quantile_levels"] = np.array(fine_quantiles.levels)
        tensors["fine_quantiles"] = np.ascontiguousarray(fine_quantiles.distances)
    save_file(tensors, path)

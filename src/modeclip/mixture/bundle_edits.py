"""Changes to a bundle that is in use: a trained expert is added, replaced, or put where the seed stood in.

New files get names that are not in use. Then mode.json, which names every file, is replaced as a whole: that is the
moment of the change. Then the files that it no longer names are removed. So a bundle whose edit was killed is the old
one or the new one, on every file system, and no file of another expert is copied, linked or moved. A process that
opened the bundle before the edit has to open it again to see the change.

An expert fits a bundle if its towers, tokenizer and preprocessing are those of the seed, and if its job says that it
continues from that seed, or from the expert whose place it takes, on a cluster of the bundle's own clustering.

Price: all files of the bundle are hashed once, and the new expert is copied once.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from modeclip.clustering.novelty import FineQuantiles
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import (
    EDITS,
    Bundle,
    check_files,
    copy_model,
    load_bundle,
    save_centres,
)
from modeclip.mixture.manifest import FORMAT_VERSION, MANIFEST_FILE, SEED, Expert
from modeclip.models.clip import CONFIG_FILE
from modeclip.models.deltas import open_weights, weights_file
from modeclip.system.files import hash_files, only_process, read_json, write_json, writing
from modeclip.training.jobs import TrainJob, TrainResult, job_name

_OURS = re.compile(r"(expert-\d+|centres|clusters)-edit\d+(\..+)?|expert-\d+\.part")
"""Names that only an edit writes. Where mode.json does not list such a file, a killed edit left it behind."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NewClusters:
    """The fine clusters that a new expert brings."""

    fine_centers: Float[np.ndarray, "m D"]
    """Centres of the new clusters."""
    cards: tuple[Mapping[str, Any], ...]
    """A card of each, as ``clusters.json`` has them: ``size``, ``keywords``, ``nearest_captions``..."""
    keywords: tuple[str, ...]
    """Words that the new expert's captions use more often than those of the others."""
    fine_quantiles: FineQuantiles | None = None
    """Quantiles of ALL fine clusters, those of the bundle first; None: the new bundle has none."""


def add_expert(
    folder: Path, model: Path, clusters: NewClusters, *, note: Mapping[str, Any] | None = None, force: bool = False
) -> Bundle:
    """Add one more expert with fine clusters of its own.

    Args:
        folder: Folder of the bundle.
        model: Folder of the expert's finished job, or with ``force`` any open_clip folder.
        clusters: The clusters that it was trained on.
        note: What else the lineage is to remember (``catalog``).
        force: Whether to take the expert wherever it comes from.

    Returns:
        The bundle as it is now.

    Raises:
        ModeclipError: The expert does not fit the bundle, or the bundle is damaged.
    """
    with only_process(_own(folder)), writing(folder):
        bundle = load_bundle(folder)
        check_files(bundle)
        index, number = bundle.num_experts, len(bundle.edits) + 1
        entry = _entry(bundle, index, model, "add", note, force)
        size, num_fine = (
            sum(int(card["size"]) for card in clusters.cards),
            len(bundle.fine_centers) + len(clusters.cards),
        )
        if clusters.fine_quantiles is not None and len(clusters.fine_quantiles.distances) != num_fine:
            raise ModeclipError(
                f"bundle {folder}: expected quantiles of all {num_fine} fine clusters, the new ones last, got those of "
                f"{len(clusters.fine_quantiles.distances)}"
            )
        place = _place_model(bundle, index, model)
        files = {"centres": f"centres-edit{number}.safetensors", "clusters": f"clusters-edit{number}.json"}
        save_centres(
            folder / files["centres"],
            np.concatenate([bundle.fine_centers, clusters.fine_centers.astype(np.float32)]),
            np.concatenate([bundle.expert_of_fine, np.full(len(clusters.cards), index)]),
            clusters.fine_quantiles,
        )
        first = len(bundle.fine_centers)
        cards = [
            dict(card) | {"index": first + i, "expert": index, "experts": [index]}
            for i, card in enumerate(clusters.cards)
        ]
        write_json(folder / files["clusters"], bundle.clusters + cards, indent=None)
        expert = Expert(name=job_name("expert", index), folder=place, size=size, keywords=clusters.keywords)
        return _commit(bundle, (*bundle.experts, expert), entry, {place, *files.values()}, files)


def replace_expert(
    folder: Path,
    expert: int,
    model: Path,
    *,
    size: int | None = None,
    note: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Bundle:
    """Put another model in the place of an expert, or the first one where the seed stood in.

    Args:
        folder: Folder of the bundle.
        expert: Index of the expert, 0 to K - 1.
        model: Folder of the expert's finished job, or with ``force`` any open_clip folder.
        size: Number of pairs in its cluster; None: as before.
        note: What else the lineage is to remember (``catalog``).
        force: Whether to take the model wherever it comes from.

    Returns:
        The bundle as it is now.

    Raises:
        ModeclipError: There is no such expert, the model does not fit the bundle, or the bundle is damaged.
    """
    with only_process(_own(folder)), writing(folder):
        bundle = load_bundle(folder)
        check_files(bundle)
        _check_number(bundle, expert)
        old = bundle.experts[expert]
        action = "replace" if old.folder != SEED else "fill in"
        entry = _entry(bundle, expert, model, action, note, force)
        place = _place_model(bundle, expert, model)
        new = replace(old, folder=place, size=old.size if size is None else size)
        experts = (*bundle.experts[:expert], new, *bundle.experts[expert + 1 :])
        return _commit(bundle, experts, entry, {place})


def replace_experts(folder: Path, models: Mapping[int, Path], *, force: bool = False) -> None:
    """Put other models in the places of several experts, as `replace_expert` does; of none, if one does not fit.

    Args:
        folder: Folder of the bundle.
        models: The model of each expert by its index.
        force: As for `replace_expert`.

    Raises:
        ModeclipError: As for `replace_expert`.
    """
    bundle = load_bundle(_own(folder))
    for expert, model in models.items():
        _check_number(bundle, expert)
        _check_model(bundle, expert, model, force)
    for expert, model in models.items():
        replace_expert(folder, expert, model, force=force)


def check_model_fits(bundle: Bundle, model: Path) -> None:
    """Raise unless a model has the towers, the tokenizer and the preprocessing of the bundle's models.

    Raises:
        ModeclipError: A file is missing or damaged, or something differs; it says what.
    """
    for file in (model / CONFIG_FILE, weights_file(model)):
        if not file.is_file():
            raise ModeclipError(f"expert {model}: {file.name} is missing; expected a folder as open_clip saves it")
    reference = next(folder for folder in _folders(bundle) if weights_file(folder).is_file())
    found, expected = (_flat(_read_config(folder)) for folder in (model, reference))
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ModeclipError(
                f"expert {model}: {name} is {found.get(name)!r}, expected {expected.get(name)!r} as in {reference}; "
                "experts of a bundle must have the same towers, tokenizer and preprocessing"
            )
    shapes, expected_shapes = _shapes(model), _shapes(reference)
    for name in sorted(shapes.keys() | expected_shapes.keys()):
        if shapes.get(name) != expected_shapes.get(name):
            raise ModeclipError(
                f"expert {model}: the shape of {name} is {shapes.get(name)}, expected {expected_shapes.get(name)} as "
                f"in {reference}; give an expert that continues from a model of this bundle"
            )


def check_origin(bundle: Bundle, expert: int, model: Path) -> None:
    """Raise unless a model's job says that it is an expert of this bundle's seed and clustering.

    Raises:
        ModeclipError: The job says otherwise or is not finished, or there is no job.json.
    """
    name, force = job_name("expert", expert), "give --force to put it there anyway"
    if not (model / "job.json").is_file():
        raise ModeclipError(f"expert {model}: no job.json says which seed and clustering it comes from; {force}")
    job = TrainJob.load(model / "job.json")
    if TrainResult.read(replace(job, folder=str(model))) is None:
        raise ModeclipError(
            f"expert {model}: its training is not finished; give modeclip train {model / 'job.json'} first"
        )
    lineage = bundle.lineage
    if job.digest == lineage.get("jobs", {}).get(name):
        return
    if job.where.get("expert", expert) != expert:
        raise ModeclipError(
            f"expert {model}: was trained on the rows of expert {job.where['expert']}, not {expert}; {force}"
        )
    places = [SEED, *(e.folder for e in bundle.experts if e.name == name)]
    starts = {bundle.job_digest(SEED), bundle.job_digest(name)} | {bundle.weights_hash(place) for place in places}
    if job.start_digest not in starts - {None}:
        raise ModeclipError(
            f"expert {model}: continues from another model ({job.start_digest or 'none'}) than the bundle's seed "
            f"({bundle.job_digest('seed') or 'unknown'}) or its {name}; {force}"
        )
    known = {bundle.clustering, *(edit["clustering"] for edit in bundle.edits)}
    known |= {lineage.get("catalog_fingerprint", ""), lineage.get("stages", {}).get("cluster", "")} - {""}
    if not {job.catalog_fingerprint, *job.catalog_fingerprint.split("-")} & known:
        raise ModeclipError(
            f"expert {model}: belongs to another clustering ({job.catalog_fingerprint}) than the bundle "
            f"({', '.join(sorted(known))}); {force}"
        )


def _own(folder: Path) -> Path:
    """Return the folder of a bundle that can be written to."""
    if not (folder / MANIFEST_FILE).is_file():
        raise ModeclipError(
            f"{folder} is no bundle on this machine: {MANIFEST_FILE} is missing; give a bundle's folder"
        )
    return folder


def _check_number(bundle: Bundle, expert: int) -> None:
    if not 0 <= expert < bundle.num_experts:
        raise ModeclipError(f"bundle {bundle.path}: expected an expert of 0 to {bundle.num_experts - 1}, got {expert}")


def _check_model(bundle: Bundle, expert: int, model: Path, force: bool) -> None:
    check_model_fits(bundle, model)
    if not force:
        check_origin(bundle, expert, model)


def _entry(
    bundle: Bundle, expert: int, model: Path, action: str, note: Mapping[str, Any] | None, force: bool
) -> dict[str, Any]:
    """Check a model and return what the lineage will say of the edit."""
    _check_model(bundle, expert, model, force)
    entry: dict[str, Any] = {
        "action": action,
        "expert": job_name("expert", expert),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modeclip": version("modeclip"),
        "clustering": bundle.clustering,
        "forced": force,
        "job": None,
    }
    with suppress(ModeclipError):
        job = TrainJob.load(model / "job.json")
        entry |= {"job": job.digest, "start": job.start_digest, "catalog_fingerprint": job.catalog_fingerprint}
        if (result := TrainResult.read(replace(job, folder=str(model)))) is not None:
            entry |= {"pairs": result.rows, "samples": result.samples}
    return entry | dict(note or {})


def _place_model(bundle: Bundle, expert: int, model: Path) -> str:
    """Copy a model into the bundle's folder under a name that the bundle does not use, and return the name."""
    name = job_name("expert", expert)
    if any(file.startswith(f"{name}/") for file in bundle.manifest["sha256"]):
        name += f"-edit{len(bundle.edits) + 1}"
    part, place = bundle.path / f"{name}.part", bundle.path / name
    shutil.rmtree(part, ignore_errors=True)
    copy_model(model, part)
    shutil.rmtree(place, ignore_errors=True)
    part.replace(place)
    return name


def _commit(
    bundle: Bundle,
    experts: tuple[Expert, ...],
    entry: Mapping[str, Any],
    new: set[str],
    files: Mapping[str, str] | None = None,
) -> Bundle:
    """Replace mode.json, which is the moment of the change, and remove what it no longer names."""
    path, manifest = bundle.path, dict(bundle.manifest)
    manifest |= {"format_version": FORMAT_VERSION, "experts": [asdict(expert) for expert in experts]}
    manifest |= {"lineage": {**bundle.lineage, EDITS: [*bundle.edits, entry]}}
    old_files = {"centres": bundle.centres_file, "clusters": bundle.clusters_file}
    manifest["files"] = dict(files or old_files)
    dropped = {expert.folder for expert in bundle.experts} - {expert.folder for expert in experts} - {SEED}
    dropped |= set(old_files.values()) - set(manifest["files"].values())
    kept = {file: digest for file, digest in manifest["sha256"].items() if file.partition("/")[0] not in dropped}
    added = [path / name for name in sorted(new)]
    manifest["sha256"] = kept | hash_files(
        path, [f for a in added for f in (sorted(a.iterdir()) if a.is_dir() else [a])]
    )
    write_json(path / MANIFEST_FILE, manifest, indent=2)
    named = {file.partition("/")[0] for file in manifest["sha256"]}
    for leftover in path.iterdir():
        if leftover.name in dropped or (_OURS.fullmatch(leftover.name) and leftover.name not in named):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return load_bundle(path)


def _folders(bundle: Bundle) -> list[Path]:
    """Return the folders of a bundle's models, the seed's first."""
    return [bundle.path / SEED, *(bundle.model_folder(k) for k in range(bundle.num_experts))]


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG_FILE, dict[str, Any], "save the model again")


def _flat(content: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in content.items():
        leaves |= _flat(value, f"{place}{name}.") if isinstance(value, dict) else {f"{place}{name}": value}
    return leaves


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model, from the headers alone."""
    with open_weights(folder) as weights:
        return {name: weights.shape(name) for name in weights.names}

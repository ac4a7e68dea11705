"""Trained experts and their clusters -> the folder that is published, and back, checked file by file.

    bundle/
      mode.json               format version, encoder, rule, the experts, the SHA-256 of every file, where it came from
      centres.safetensors     fine_centers (M, D) float32, expert_of_fine (M,) int64
      clusters.json           size, key words and example captions of every fine cluster
      seed/  expert-0/ ...    plain open_clip model folders
      encoder/                where the encoder was fitted to the captions

An expert that is not there yet is stood in for by the seed model, so a bundle works from the first finished expert on.
Source: MoDE Sec. 3.2 to 3.4 for what a system consists of; the format is ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from modeclip.clip import CONFIG_FILE, WEIGHTS_FILE
from modeclip.errors import ModeclipError
from modeclip.files import hash_file

FORMAT_VERSION = 1
MANIFEST_FILE = "mode.json"
CENTRES_FILE = "centres.safetensors"
CLUSTERS_FILE = "clusters.json"
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
    """What it was made from: recipe, digests of the jobs, versions."""

    @property
    def num_experts(self) -> int:
        """K, the missing ones included."""
        return len(self.experts)

    @cached_property
    def clusters(self) -> list[dict[str, Any]]:
        """Card of each fine cluster: ``size``, ``keywords``, ``nearest_captions``..."""
        content: list[dict[str, Any]] = json.loads((self.path / CLUSTERS_FILE).read_text(encoding="utf-8"))
        return content

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
) -> None:
    """Write a bundle, replacing what was in the folder only when the new one is complete.

    Args:
        folder: Where it goes.
        models: Model folder of ``seed`` and of each finished expert (``expert-0``...).
        fine_centers: Fine cluster centres.
        expert_of_fine: Expert of each fine cluster.
        cards: The clustering's cards: ``fine`` and ``experts`` lists.
        manifest: ``encoder``, ``rule``, ``temperature``, ``templates`` and ``lineage``.
    """
    from safetensors.numpy import save_file

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, source in models.items():
        (part / name).mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(source / file, part / name / file)
    encoder = str(manifest["encoder"])
    if encoder.startswith(FITTED):  # fitted to these captions, so nobody else has it
        shutil.copytree(encoder.removeprefix(FITTED), part / ENCODER_FOLDER)
        encoder = FITTED + ENCODER_FOLDER
    save_file({"fine_centers": fine_centers, "expert_of_fine": expert_of_fine}, part / CENTRES_FILE)
    (part / CLUSTERS_FILE).write_text(json.dumps(cards["fine"]) + "\n", encoding="utf-8")
    experts = [
        Expert(
            name=f"expert-{card['index']}",
            folder=f"expert-{card['index']}" if f"expert-{card['index']}" in models else "seed",
            size=card["size"],
            keywords=tuple(card["keywords"]),
        )
        for card in cards["experts"]
    ]
    files = {str(file.relative_to(part)): hash_file(file) for file in sorted(part.rglob("*")) if file.is_file()}
    content = {
        "format_version": FORMAT_VERSION,
        **manifest,
        "encoder": encoder,
        "experts": [asdict(e) for e in experts],
        "sha256": files,
    }
    (part / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def load_bundle(source: str | Path) -> Bundle:
    """Open a bundle from a folder, or from the Hugging Face Hub by its id (``org/name``).

    Raises:
        ModeclipError: It is not there, is no bundle, is of a newer format, or a file differs from its hash.
    """
    from safetensors.numpy import load_file

    path = _find(source)
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        version, hashes = manifest["format_version"], manifest["sha256"]
    except FileNotFoundError:
        raise ModeclipError(f"{path} is no bundle: {MANIFEST_FILE} is missing; `modeclip run` makes one") from None
    except (json.JSONDecodeError, KeyError) as error:
        raise ModeclipError(f"bundle {path}: {MANIFEST_FILE} cannot be read ({error}); get the bundle again") from None
    if version > FORMAT_VERSION:
        raise ModeclipError(
            f"bundle {path}: format {version} is newer than this modeclip reads ({FORMAT_VERSION}); upgrade modeclip"
        )
    _check_hashes(path, hashes)
    centres, encoder = load_file(path / CENTRES_FILE), manifest["encoder"]
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

"""One pool of loaded CLIPs: everything that runs a model asks the pool for it, so memory is limited in one place.

A `ModelRef` says which model is meant, without its weights. Its digest is the SHA-256 of weights and settings, so the
same checkpoint has one name wherever it lies, and a model that was trained further has another. A `ModelPool` loads a
model when it is first asked for and frees those that were used longest ago when the budget needs the room. Whoever
works with a model for long asks the pool again each time and keeps no reference of its own; a model that somebody
still holds stays in memory although the pool has let go of it.

Experts that share tensors with their seed (`modeclip.models.deltas`) share them in memory too, with each other and with
the seed, whichever of them are loaded; a budget counts what they share once. So nobody may change a pool's models.

Expected file hashes, as the manifest of a bundle states them, are checked when the model is loaded and not before:
opening a bundle of 10 GB to route a task reads none of its weights.

Price: `ModelRef.of` reads each weights file once to hash it; a reference into a bundle reads only headers. Checking
hashes adds about a second for each 1.5 GB to the first load of a model.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from modeclip.errors import ModeclipError
from modeclip.models.clip import CONFIG_FILE, Clip, chosen_weights, load_clip
from modeclip.models.deltas import (
    DELTA_FILE,
    WEIGHTS_FILE,
    bytes_once_loaded,
    is_delta,
    seed_hash_of,
    seed_of,
    weights_file,
)
from modeclip.models.settings import check_clip_folder
from modeclip.system.devices import choose_device, free_memory
from modeclip.system.files import hash_file, hash_files
from modeclip.system.paths import expand_homes

if TYPE_CHECKING:
    import torch

MODEL_SHARE = 0.5
"""Share of a device's free memory that models may take where no budget is given."""


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Which CLIP is meant: where it is, and a digest that is equal for equal models."""

    name: str
    """Name that people read."""
    spec: str | Path
    """What `clip.load_clip` loads it from."""
    digest: str
    """SHA-256 of its weights and settings (preprocessing among them) in hexadecimal digits."""
    preprocess: str
    """Hash of its preprocessing settings."""
    num_bytes: int = 0
    """Bytes that its weights take once they are loaded."""
    own_bytes: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    """Bytes of the tensors in which it differs from its base, by name; it shares the others with all of the base."""
    base: str = field(default="", compare=False, repr=False)
    """Hash of architecture and weights of the model that it shares tensors with: its seed, or itself where it is
    no delta; empty: none."""
    seed: int | None = None
    """Seed of its random weights; None: its specification must name weights."""
    file_hashes: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """SHA-256 that each file of its folder must have, by file name; checked when it is loaded. Empty: nothing is."""

    @classmethod
    def of(cls, name: str, spec: str | Path, *, seed: int | None = None) -> ModelRef:
        """Refer to a model folder, or to anything else that ``load_clip`` takes.

        The files of a folder are hashed as they are now. Any other model is loaded once to hash it, but not run.

        Args:
            name: Name that people read.
            spec: Which model.
            seed: Seed of random weights where the specification names none; None: that is an error.

        Raises:
            ModeclipError: The folder's settings are damaged or refused, or the model cannot be loaded.
        """
        spec = expand_homes(str(spec))
        folder = Path(spec.removeprefix("local-dir:"))
        if not (folder / CONFIG_FILE).is_file():
            return replace(cls.of_clip(name, spec, load_clip(spec, seed=seed)), seed=seed)
        return cls._of_files(name, spec, folder, hash_files(folder, _parts_of(folder)))

    @classmethod
    def of_clip(cls, name: str, spec: str | Path, clip: Clip) -> ModelRef:
        """Refer to a model that is in memory."""
        content, size = sha256(json.dumps(clip.config, sort_keys=True).encode()), 0
        for key, tensor in sorted(clip.model.state_dict().items()):
            values = tensor.detach().cpu().contiguous().float().numpy()
            content.update(f"{key} {tensor.dtype} {values.shape}".encode() + values.tobytes())
            size += tensor.numel() * tensor.element_size()
        preprocess = _digest_of(clip.config["preprocess_cfg"])[:16]
        return cls(name=name, spec=spec, digest=content.hexdigest(), preprocess=preprocess, num_bytes=size)

    @classmethod
    def of_bundle(cls, name: str, bundle: Path, folder: str, hashes: Mapping[str, str]) -> ModelRef:
        """Refer to a model inside a bundle without reading its weights.

        Args:
            name: Name that people read.
            bundle: The bundle's folder.
            folder: The model's folder in the bundle (``seed``, ``expert-0``, ...).
            hashes: SHA-256 of the bundle's files by their path in the bundle, as its manifest states them.

        Raises:
            ModeclipError: The model's settings are missing, damaged or refused, or its weights are no safetensors.
        """
        start = f"{folder}/"
        own = {path.removeprefix(start): digest for path, digest in hashes.items() if path.startswith(start)}
        own = {file: digest for file, digest in own.items() if _is_part(file)}
        check_clip_folder(bundle / folder)
        if not weights_file(bundle / folder).is_file():
            raise ModeclipError(f"model {name}: {bundle / folder / WEIGHTS_FILE} is missing; get the bundle again")
        ref, seed = cls._of_files(name, bundle / folder, bundle / folder, own), seed_of(bundle / folder)
        if not is_delta(bundle / folder):
            return replace(ref, file_hashes=own)
        stated = hashes.get(f"{seed.name}/{WEIGHTS_FILE}", "none")
        if stated != (expected := seed_hash_of(bundle / folder)):
            raise ModeclipError(
                f"model {name}: {bundle / folder / DELTA_FILE} belongs to a seed whose weights have the hash "
                f"{expected[:12]}, but those of the bundle's seed have {stated[:12]}; get the bundle again"
            )
        parts = {path.removeprefix(f"{seed.name}/"): path for path in hashes if path.startswith(f"{seed.name}/")}
        return replace(
            ref, file_hashes=own | {f"../{path}": hashes[path] for file, path in parts.items() if _is_part(file)}
        )

    @classmethod
    def _of_files(cls, name: str, spec: str | Path, folder: Path, hashes: Mapping[str, str]) -> ModelRef:
        config = check_clip_folder(folder)
        num_bytes, own_bytes = _bytes_of(folder)
        weights = seed_hash_of(folder) if is_delta(folder) else hashes.get(WEIGHTS_FILE, "")
        return cls(
            name=name,
            spec=spec,
            digest=_digest_of(hashes),
            preprocess=_digest_of(config.get("preprocess_cfg", {}))[:16],
            num_bytes=num_bytes,
            own_bytes=own_bytes,
            base=_digest_of({**config, "preprocess_cfg": None, "weights": weights}) if weights else "",
        )


class ModelPool:
    """Loaded models under a budget; those that were used longest ago are freed first. Threads may share a pool."""

    def __init__(
        self, max_models: int | None = None, max_bytes: int | None = None, *, device: str | torch.device = "cpu"
    ) -> None:
        """Start without a model.

        Args:
            max_models: How many models may be in memory at a time; None: any number.
            max_bytes: How many bytes their weights may take on a device, counted as they are once loaded; None:
                `MODEL_SHARE` of the memory that is free when a model is loaded.
            device: Where models go unless a call names another device: ``cpu``, ``cuda``, ``auto``...

        Raises:
            ModeclipError: A limit is below 1.
        """
        for name, limit, unit in (("max_models", max_models, "model"), ("max_bytes", max_bytes, "byte")):
            if limit is not None and limit < 1:
                raise ModeclipError(f"{name}: expected at least 1 {unit}, got {limit}")
        self.max_models, self.max_bytes, self.device = max_models, max_bytes, device
        self._clips: OrderedDict[tuple[str, str, str], tuple[Clip, dict[int, int]]] = OrderedDict()
        self._tensors: dict[tuple[str, str, str], WeakValueDictionary[str, torch.nn.Parameter]] = {}
        self._hash_of_file: dict[tuple[Path, int, int, int], str] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Return how many models are in memory."""
        return len(self._clips)

    def __contains__(self, ref: ModelRef) -> bool:
        """Tell whether a model is in memory, on any device."""
        return any(digest == ref.digest for digest, _, _ in list(self._clips))

    def get(self, ref: ModelRef, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Clip:
        """Return a model in evaluation mode, loaded if need be.

        Args:
            ref: Which model.
            device: Where it is wanted; None: the pool's device.
            dtype: Type of its weights; None: as they are loaded, float32.

        Raises:
            ModeclipError: A file differs from its hash, the model cannot be loaded, or it alone exceeds ``max_bytes``.
        """
        return self._load([ref], device, dtype)[ref.digest]

    def groups(
        self,
        refs: Sequence[ModelRef],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[dict[str, Clip]]:
        """Yield models by digest, as many together as fit, for one pass over images with many models.

        Each dictionary is emptied when the next one is asked for, so that its models can be freed.

        Args:
            refs: Which models; equal ones are loaded once.
            device: Where they are wanted; None: the pool's device.
            dtype: Type of their weights; None: as they are loaded, float32.
        """
        left = list({ref.digest: ref for ref in refs}.values())
        while left:
            budget, group = self._budget(device), left[:1]
            for ref in left[1:]:
                if total_bytes([*group, ref]) > budget or len(group) == self.max_models:
                    break
                group.append(ref)
            left = left[len(group) :]
            clips = self._load(group, device, dtype)
            yield clips
            clips.clear()

    def _load(
        self, refs: Sequence[ModelRef], device: str | torch.device | None, dtype: torch.dtype | None
    ) -> dict[str, Clip]:
        import torch

        where, dtype = self._place(device), dtype or torch.float32
        # Weights that are loaded under a caller's inference_mode could not be used outside of it.
        with self._lock, torch.inference_mode(False):
            keys = {ref.digest: (ref.digest, where, str(dtype)) for ref in refs}
            missing = [ref for ref in refs if keys[ref.digest] not in self._clips]
            if missing:
                self._make_room(missing, set(keys.values()), where, str(dtype))
            for ref in missing:
                self._check_files(ref)
                clip = load_clip(ref.spec, seed=ref.seed)
                self._place_weights(clip, ref, where, dtype)
                tensors = clip.model.state_dict(keep_vars=True).values()
                self._clips[keys[ref.digest]] = clip, {id(value): value.nbytes for value in tensors}
            for key in keys.values():
                self._clips.move_to_end(key)
            return {digest: self._clips[key][0] for digest, key in keys.items()}

    def _place_weights(self, clip: Clip, ref: ModelRef, where: str, dtype: torch.dtype) -> None:
        """Put a model on its device; what it shares with its seed becomes the very tensors that are there already."""
        shared: dict[str, torch.nn.Parameter] = {}
        if ref.base:
            here = self._tensors.setdefault((ref.base, where, str(dtype)), WeakValueDictionary())
            shared = {name: value for name, value in clip.model.named_parameters() if name not in ref.own_bytes}
            for name in shared:
                if (known := here.get(name)) is not None:
                    place, _, leaf = name.rpartition(".")
                    setattr(clip.model.get_submodule(place), leaf, known)
        clip.model.eval().to(device=where, dtype=dtype)
        for name in shared:
            here[name] = clip.model.get_parameter(name)

    def _make_room(
        self, missing: Sequence[ModelRef], wanted: set[tuple[str, str, str]], where: str, dtype: str
    ) -> None:
        """Free what was used longest ago and is not wanted now, until the missing models fit."""
        for ref in missing:
            if self.max_bytes is not None and ref.num_bytes > self.max_bytes:
                raise ModeclipError(
                    f"model {ref.name}: its weights take {ref.num_bytes:,} bytes, more than the {self.max_bytes:,} of "
                    "the memory budget; raise the budget"
                )
        budget = self._budget(where)

        def sizes_there(base: str) -> dict[str, int]:
            return {name: value.nbytes for name, value in self._tensors.get((base, where, dtype), {}).items()}

        for key in list(self._clips):
            too_many = self.max_models is not None and len(self._clips) + len(missing) > self.max_models
            too_large = key[1] == where and self._bytes_on(where) + total_bytes(missing, sizes_there) > budget
            if key not in wanted and (too_many or too_large):
                del self._clips[key]

    def _budget(self, device: str | torch.device | None) -> int:
        """Return the bytes that all models may take on a device, those that are there included."""
        if self.max_bytes is not None:
            return self.max_bytes
        where = self._place(device)
        return int(MODEL_SHARE * (free_memory(choose_device(where)) + self._bytes_on(where)))

    def _bytes_on(self, where: str) -> int:
        with self._lock:
            sizes: dict[int, int] = {}
            for (_, place, _), (_, own) in self._clips.items():
                sizes |= own if place == where else {}
            return sum(sizes.values())

    def _place(self, device: str | torch.device | None) -> str:
        """Return a device by its full name, the number of the GPU included."""
        import torch

        chosen = choose_device(str(self.device if device is None else device))
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
        return str(chosen)

    def _check_files(self, ref: ModelRef) -> None:
        """Compare a model's files with the hashes that they must have; a file that did not change is read once."""
        for file, digest in ref.file_hashes.items():
            path = Path(os.path.normpath(Path(ref.spec) / file))
            if not path.is_file():
                raise ModeclipError(f"model {ref.name}: {path} is missing; get the bundle again")
            state = path.stat()
            key = (path, state.st_mtime_ns, state.st_size, state.st_ino)
            if key not in self._hash_of_file:
                self._hash_of_file[key] = hash_file(path)
            if (found := self._hash_of_file[key]) != digest:
                raise ModeclipError(
                    f"model {ref.name}: {path} differs from its hash in the manifest (expected {digest[:12]}, got "
                    f"{found[:12]}); get the bundle again"
                )


def total_bytes(refs: Sequence[ModelRef], there: Callable[[str], Mapping[str, int]] = lambda _: {}) -> int:
    """Return what the weights of models take that are in memory together.

    Args:
        refs: Which models, each once.
        there: Returns the bytes of those tensors of a base that are there already, by name.
    """
    total, by_base = 0, dict[str, list[ModelRef]]()
    for ref in refs:
        by_base.setdefault(ref.base or ref.digest, []).append(ref)
    for base, alike in by_base.items():
        nobodys = set(alike[0].own_bytes).intersection(*(ref.own_bytes for ref in alike))  # tensors of the base
        known = sum(size for name, size in there(base).items() if name not in nobodys)
        total += alike[0].num_bytes - sum(alike[0].own_bytes[name] for name in nobodys) - known
        total += sum(sum(ref.own_bytes.values()) for ref in alike)
    return total


def most_together(refs: Sequence[ModelRef], budget: int) -> int:
    """Return how many of some models fit into a budget together, the largest first.

    Args:
        refs: Which models; equal ones count as often as they are named, and take no more than one.
        budget: Bytes that their weights may take.
    """
    distinct = {ref.digest: ref for ref in refs}.values()
    largest_first = sorted(distinct, key=lambda ref: -(sum(ref.own_bytes.values()) if ref.own_bytes else ref.num_bytes))
    fitting = [count for count in range(len(distinct) + 1) if total_bytes(largest_first[:count]) <= budget]
    return len(refs) if fitting[-1] == len(distinct) else fitting[-1]


def _bytes_of(folder: Path) -> tuple[int, dict[str, int]]:
    """Return what a folder's weights take once loaded, and what of it is its own; reads only headers."""
    try:
        return bytes_once_loaded(folder)
    except ModeclipError:  # another format, or damaged: loading will tell
        if is_delta(folder):
            raise
        return sum(path.stat().st_size for path in _parts_of(folder) if path.is_file()), {}


def _parts_of(folder: Path) -> list[Path]:
    """Return what decides what the model of a folder answers; weights may have any name that open_clip takes."""
    weights = None if is_delta(folder) else chosen_weights(folder)
    return sorted(path for path in folder.iterdir() if path == weights or _is_part(path.name))


def _is_part(file: str) -> bool:
    """Whether a file of a model folder, by its name, decides what the model answers: settings, weights, tokenizer."""
    return file == DELTA_FILE or file.startswith(
        ("open_clip", "token", "special_tokens", "vocab", "merges", "added_tokens", "spiece")
    )


def _digest_of(parts: Mapping[str, object]) -> str:
    return sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()

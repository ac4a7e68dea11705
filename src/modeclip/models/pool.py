"""Model specifications -> what each model is (its hash), and the models themselves, no more in memory than fit.

A model is known by the SHA-256 of its weights and settings, so the same checkpoint has one name wherever it lies, and
one that has been trained on has another.

Price: hashing reads each weights file once; a bundle's hashes are those that its opening has checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from modeclip.errors import ModeclipError, unknown
from modeclip.mixture.bundle import Bundle, hash_files
from modeclip.models.clip import CONFIG_FILE, Clip, fast_attention, load_clip
from modeclip.system.devices import choose_precision, free_memory

if TYPE_CHECKING:
    import torch

MODEL_SHARE = 0.5
"""Share of a device's free memory that models may take."""
PRECISIONS = {"32-true": None, "bf16-mixed": "bfloat16", "16-mixed": "float16"}
"""What a model computes in."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One CLIP: where it is, and what it is."""

    name: str
    """Name for people."""
    spec: str | Path
    """What `clip.load_clip` loads it from."""
    digest: str
    """SHA-256 of its weights and settings (preprocessing among them), hexadecimal: equal for equal models."""
    preprocess: str
    """Hash of its preprocessing settings."""
    num_bytes: int = 0
    """Size of its weights."""

    @classmethod
    def of(cls, name: str, spec: str | Path) -> Source:
        """Return the source of a model folder, or of anything else that ``load_clip`` takes.

        A folder is hashed as it lies there; any other model is loaded for it, but not run.
        """
        folder = Path(str(spec).removeprefix("local-dir:"))
        if not (folder / CONFIG_FILE).is_file():
            return cls.of_clip(name, spec, load_clip(spec))
        files = sorted(path for path in folder.iterdir() if path.is_file() and _is_part(path.name))
        return cls._of_files(name, spec, folder, hash_files(folder, files))

    @classmethod
    def of_clip(cls, name: str, spec: str | Path, clip: Clip) -> Source:
        """Return the source of a model in memory."""
        content, size = sha256(json.dumps(clip.config, sort_keys=True).encode()), 0
        for key, tensor in sorted(clip.model.state_dict().items()):
            values = tensor.detach().cpu().contiguous().float().numpy()
            content.update(f"{key} {tensor.dtype} {values.shape}".encode() + values.tobytes())
            size += tensor.numel() * tensor.element_size()
        preprocess = _digest_of(clip.config["preprocess_cfg"])[:16]
        return cls(name=name, spec=spec, digest=content.hexdigest(), preprocess=preprocess, num_bytes=size)

    @classmethod
    def of_bundle(cls, name: str, bundle: Bundle, folder: str) -> Source:
        """Return the source of a model in an opened bundle, by the hashes that its opening has checked."""
        hashes: Mapping[str, str] = bundle.manifest["sha256"]
        start = f"{folder}/"
        parts = {path.removeprefix(start): digest for path, digest in hashes.items() if path.startswith(start)}
        parts = {file: digest for file, digest in parts.items() if _is_part(file)}
        return cls._of_files(name, bundle.path / folder, bundle.path / folder, parts)

    @classmethod
    def _of_files(cls, name: str, spec: str | Path, folder: Path, parts: Mapping[str, str]) -> Source:
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModeclipError(f"model folder {folder}: {CONFIG_FILE} is no JSON ({error}); get it again") from None
        if not isinstance(config, dict):
            raise ModeclipError(f"model folder {folder}: {CONFIG_FILE} holds no JSON object; get it again")
        return cls(
            name=name,
            spec=spec,
            digest=_digest_of(parts),
            preprocess=_digest_of(config.get("preprocess_cfg", {}))[:16],
            num_bytes=sum((folder / file).stat().st_size for file in parts),
        )


class Models:
    """Models in memory; those that were not used for longest are freed first."""

    def __init__(self, max_loaded: int | None = None) -> None:
        """Start with none.

        Args:
            max_loaded: At a time, at most; None: as many as fit into `MODEL_SHARE` of the free memory.
        """
        if max_loaded is not None and max_loaded < 1:
            raise ModeclipError(f"max_loaded: expected at least 1 model, got {max_loaded}")
        self.max_loaded = max_loaded
        self._clips: dict[tuple[str, str], tuple[Clip, int]] = {}

    def __len__(self) -> int:
        """Return how many are in memory."""
        return len(self._clips)

    def groups(self, sources: Sequence[Source], device: torch.device) -> Iterator[dict[str, Clip]]:
        """Yield models by the digests of their sources, as many together as may be in memory at a time."""
        left = list(sources)
        while left:
            budget = MODEL_SHARE * (free_memory(device) + sum(size for _, size in self._clips.values()))
            group: list[Source] = []
            for source in left:
                size = sum(member.num_bytes for member in [*group, source])
                if group and (size > budget or len(group) == self.max_loaded):
                    break
                group.append(source)
            left = left[len(group) :]
            yield self._load(group, device, budget)

    def _load(self, group: Sequence[Source], device: torch.device, budget: float) -> dict[str, Clip]:
        wanted = {(source.digest, str(device)): source for source in group}
        limit = len(wanted) if self.max_loaded is None else self.max_loaded
        for key in list(self._clips):
            total = sum(size for name, (_, size) in self._clips.items() if name not in wanted)
            total += sum(source.num_bytes for source in group)
            others = sum(name not in wanted for name in self._clips)
            is_full = total > budget or (self.max_loaded is not None and others + len(wanted) > limit)
            if key not in wanted and is_full:
                del self._clips[key]
        for key, source in wanted.items():
            clip, size = self._clips.pop(key, (None, 0))
            if clip is None:
                clip = load_clip(source.spec)
                clip.model.eval().to(device)
                size = sum(value.numel() * value.element_size() for value in clip.model.state_dict().values())
            self._clips[key] = clip, size
        return {digest: self._clips[digest, name][0] for digest, name in wanted}


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device to compute on: ``auto`` is the GPU if there is one."""
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ModeclipError(f"device: expected auto, cpu, cuda or cuda:1, got {wanted!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModeclipError(f"device {wanted!r}: this machine has no GPU that PyTorch can use; give --device cpu")
    return device


def resolve_precision(wanted: str) -> str:
    """Return one of `PRECISIONS`; ``auto`` is the fastest that the machine has.

    Raises:
        ModeclipError: The name is unknown.
    """
    precision = choose_precision(wanted)
    if precision not in PRECISIONS:
        raise unknown("precision", wanted, ["auto", *PRECISIONS])
    return precision


@contextmanager
def computing(clip: Clip, precision: str) -> Iterator[torch.device]:
    """Run a model without gradients, in a precision; yields its device."""
    import torch

    device = next(clip.model.parameters()).device
    kind = PRECISIONS[precision]
    low = torch.autocast(device.type, dtype=getattr(torch, kind)) if kind else nullcontext()
    with torch.inference_mode(), fast_attention(device, precision), low:
        yield device


def _is_part(file: str) -> bool:
    """Whether a file of a model folder decides what the model answers: settings, weights, tokenizer."""
    return file.startswith(("open_clip", "token", "special_tokens", "vocab", "merges", "added_tokens", "spiece"))


def _digest_of(parts: Mapping[str, object]) -> str:
    return sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()

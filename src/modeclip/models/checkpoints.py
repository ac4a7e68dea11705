"""Checkpoints of training jobs: writing and reading ours, and reading those of open_clip's own trainer.

Our checkpoint is ``checkpoints/step-000000123.safetensors`` in the job's folder: the weights under ``model.``, the
optimizer's tensors under ``optimizer.``, and step, digest and facts as JSON in the header, so the header alone tells
which job wrote it. A file gets its name only when all of it is on the disk, and older files are removed only then:
whenever the machine stops, one whole checkpoint is there.

open_clip's trainer writes ``.pt`` files. They are read with ``weights_only``, which unpickles tensors and numbers and
nothing else.

Price: a checkpoint takes three times the bytes of the weights (weights and two moments of AdamW), written at the speed
of the disk.

Source: the layout of ``.pt`` files and the order of the parameters in their optimizer are those of open_clip_train 3.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeclip.errors import DamagedError, ModeclipError
from modeclip.system.console import log
from modeclip.system.files import hash_file, remove, replacing, to_json, writing

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "checkpoints"
"""Folder of the checkpoints in a job's folder."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, beside its ``step``."""
_WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before names
_NAMES_SHOWN = 3
_ABOUT = "modeclip"  # key of the JSON in a file's header


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State of a job after a step."""

    step: int
    """Optimizer steps done."""
    digest: str
    """Digest of the job that wrote it, or the SHA-256 of a file that open_clip_train wrote."""
    model: dict[str, Tensor]
    """Weights by their names in the plain open_clip model."""
    optimizer: dict[str, Tensor]
    """``exp_avg.NAME``, ``exp_avg_sq.NAME`` and ``step.NAME`` of each parameter; empty if there was no optimizer."""
    facts: dict[str, Any]
    """Whatever else the job needs to continue, as JSON values."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, then remove those that are no longer kept.

    Args:
        folder: The job's folder.
        checkpoint: What to write.
        keep: How many checkpoints stay, this one included, 1 or more; the newest do. A checkpoint of a later step comes
            from another job or from a run that this one replaces, and is removed.

    Returns:
        The path of the file.

    Raises:
        ModeclipError: The disk is full; earlier checkpoints are still there.
    """
    path = folder / FOLDER / f"step-{checkpoint.step:09d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in path.parent.glob("*.part"):
        part.unlink()
    tensors = {f"model.{name}": value for name, value in checkpoint.model.items()}
    tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    about = {"step": checkpoint.step, "digest": checkpoint.digest, "facts": checkpoint.facts}
    about["sha256"] = _hash(tensors)
    write_tensors(path, tensors, {_ABOUT: to_json(about)})
    kept = [file for file in checkpoint_files(folder) if _step_of(file) <= checkpoint.step][:keep]
    for file in checkpoint_files(folder):
        if file not in kept:
            file.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, digest: str | None = None) -> Checkpoint | None:
    """Read the newest checkpoint of a job's folder.

    Args:
        folder: The job's folder.
        digest: Digest that the checkpoint's job must have; None: any.

    Returns:
        The checkpoint, or None if there is none.

    Raises:
        ModeclipError: A file is damaged; the message says what to do.
    """
    from safetensors import SafetensorError, safe_open

    path = find_checkpoint(folder, digest)
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            about = json.loads(file.metadata()[_ABOUT])
    except SafetensorError as error:
        raise _damaged(path, error) from error
    if about.pop("sha256", None) not in (None, _hash(tensors)):  # an earlier version wrote none
        raise _damaged(path, ValueError("its tensors are not those that were written"))
    return Checkpoint(model=_under("model.", tensors), optimizer=_under("optimizer.", tensors), **about)


def drop_damaged(folder: Path) -> None:
    """Remove the newest checkpoints of a job's folder until one is whole, and say so.

    Price: it reads a checkpoint.
    """
    while paths := checkpoint_files(folder):
        try:
            load_checkpoint(folder)
        except DamagedError as error:
            log(f"removed: {error}")
            remove(paths[0])
        else:
            return


def find_checkpoint(folder: Path, digest: str | None = None) -> Path | None:
    """Return the newest checkpoint of a job's folder; arguments and errors as for ``load_checkpoint``."""
    from safetensors import SafetensorError, safe_open

    for path in checkpoint_files(folder):
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})[_ABOUT])
            if {*about} - {"sha256"} != {"step", "digest", "facts"}:
                raise KeyError(_ABOUT)
        except FileNotFoundError:
            continue  # another process has just replaced it by a newer one
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise _damaged(path, error) from error
        if digest is None or about["digest"] == digest:
            return path
    return None


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the names and bytes of tensors; 0.6 s for 1 GB."""
    import torch

    digest = sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the names and shapes of a checkpoint's weights, without reading the weights.

    Args:
        path: A checkpoint of ours, or a ``.pt`` file as ``load_open_clip_train`` reads it.
        shapes: Shape of each tensor in the state of the model that will load them.

    Raises:
        ModeclipError: A name is missing or unknown, a shape differs, or the file is damaged.
    """
    found = _shapes(path)
    _refuse_other_model(
        path,
        missing=[name for name in shapes if name not in found],
        unexpected=[name for name in found if name not in shapes],
        other_shape=[
            f"{name} {shape} instead of {shapes[name]}"
            for name, shape in found.items()
            if name in shapes and shape != shapes[name]
        ],
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return {name: tuple(value.shape) for name, value in _weights(path, read_pickled(path, mmap=True)).items()}
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return {name.removeprefix("model."): shape for name, shape in found.items() if name.startswith("model.")}


def load_open_clip_train(path: Path, parameters: Sequence[tuple[str, int]]) -> Checkpoint:
    """Read a checkpoint that open_clip_train wrote, or a plain dictionary of weights.

    Args:
        path: A ``.pt`` file.
        parameters: Name and number of dimensions of each parameter of the model, in the order of
            ``named_parameters``; the optimizer's state, which numbers parameters, is named by them.

    Returns:
        The checkpoint. Its step is what the optimizer counted (0 without one), and its facts are ``epoch``, ``name``
        and ``scaler`` of the file.

    Raises:
        ModeclipError: The file is missing, damaged, of another model, or of an optimizer of another kind.
    """
    content = read_pickled(path)
    model = {name: _full(value) for name, value in _weights(path, content).items()}
    _refuse_other_model(
        path,
        missing=[name for name, _ in parameters if name not in model],
        other_shape=[
            f"{name} has {model[name].ndim} dimensions instead of {ndim}"
            for name, ndim in parameters
            if name in model and model[name].ndim != ndim
        ],
    )
    optimizer = _optimizer_by_name(path, content["optimizer"], parameters, model) if "optimizer" in content else {}
    steps = [int(value) for name, value in optimizer.items() if name.startswith("step.")]
    return Checkpoint(
        step=max(steps, default=0),
        digest=hash_file(path),
        model=model,
        optimizer=optimizer,
        facts={key: content[key] for key in ("epoch", "name", "scaler") if key in content and "state_dict" in content},
    )


def read_pickled(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a ``.pt`` file that holds nothing but tensors, numbers, strings and containers of them, onto the CPU.

    Args:
        path: The file.
        mmap: Leave tensors in the file until they are used.

    Raises:
        ModeclipError: The file is missing or damaged, or holds anything else.
    """
    import torch

    if not path.is_file():
        raise ModeclipError(f"checkpoint {path} is missing; correct the path")
    try:
        with numbers_allowed():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ModeclipError(
            f"checkpoint {path} is damaged, or holds more than tensors and numbers, which is not loaded from a file: "
            f"{_one_line(error)}"
        ) from error
    except Exception as error:  # the unpickler raises nearly anything on damaged bytes
        raise ModeclipError(f"checkpoint {path} is damaged ({_one_line(error)}); get it again") from error
    if not isinstance(content, dict):
        raise ModeclipError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def numbers_allowed() -> AbstractContextManager[None]:
    """Let ``torch.load(weights_only=True)`` read NumPy's floats, which open_clip_train's schedule leaves in a file."""
    import numpy as np
    import torch

    scalar: Any = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # NumPy 1 and 2
    allowed: list[Any] = [*((scalar, name) for name in names), np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]
    context: AbstractContextManager[None] = torch.serialization.safe_globals(allowed)
    return context


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that exists as a whole or not at all, even after a power cut.

    Raises:
        ModeclipError: The disk is full.
    """
    from safetensors.torch import save_file

    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory (tied embeddings)
        value = tensor.detach().contiguous()
        storage = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if storage in seen else value
        seen.add(storage)
    with writing(path), replacing(path) as part:
        save_file(apart, part, metadata=dict(metadata or {}))


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints of a job's folder, newest step first."""
    return sorted((folder / FOLDER).glob("step-*.safetensors"), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    number = path.stem.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _weights(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights that a ``.pt`` file held, by their names in the plain model."""
    import torch

    state = content.get("state_dict", content)
    values = list(state.values()) if isinstance(state, Mapping) else []
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        raise ModeclipError(f"{path}: expected a checkpoint of open_clip_train or a dictionary of weights, got another")
    return {_unwrapped(name): value for name, value in state.items()}


def _optimizer_by_name(
    path: Path, optimizer: Mapping[str, Any], parameters: Sequence[tuple[str, int]], model: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state of open_clip_train's AdamW by name; it numbers parameters without decay first."""
    import torch

    plain = [name for name, ndim in parameters if _undecayed(name, ndim)]
    decayed = [name for name, ndim in parameters if not _undecayed(name, ndim)]
    groups, states = optimizer["param_groups"], optimizer["state"]
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(plain), len(decayed)]:
        raise ModeclipError(
            f"checkpoint {path}: its optimizer holds groups of {' and '.join(map(str, sizes))} parameters, expected "
            f"{len(plain)} and {len(decayed)} (open_clip_train's AdamW on the whole model, no tower locked); to start "
            f"from its weights alone, set train.model to NAME@{path}"
        )
    named: dict[str, Tensor] = {}
    for name, number in zip(plain + decayed, [number for group in groups for number in group["params"]], strict=True):
        shape = model[name].shape
        state = states.get(number) or dict.fromkeys(MOMENTS, torch.zeros(shape))  # it never had a gradient
        if any(key not in state or state[key].shape != shape for key in MOMENTS):
            raise ModeclipError(
                f"checkpoint {path}: its optimizer's state of {name} is not AdamW's of shape {tuple(shape)}; to start "
                f"from its weights alone, set train.model to NAME@{path}"
            )
        named |= {f"{key}.{name}": _full(state[key]) for key in MOMENTS}
        named[f"step.{name}"] = torch.as_tensor(state.get("step", 0), dtype=torch.float32)
    return named


def _undecayed(name: str, ndim: int) -> bool:
    """Return whether open_clip_train applies no weight decay to a parameter."""
    return ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))


def _unwrapped(name: str) -> str:
    while (wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None)) is not None:
        name = name[len(wrapper) :]
    return name


def _full(value: Tensor) -> Tensor:
    """Return a tensor in float32 if it holds floats, else as it is."""
    return value.float() if value.is_floating_point() else value


def _refuse_other_model(path: Path, **differences: Sequence[str]) -> None:
    words = [
        f"{kind.replace('_', ' ')}: {', '.join(names[:_NAMES_SHOWN])}"
        + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
        for kind, names in differences.items()
        if names
    ]
    if words:
        raise ModeclipError(
            f"{path} is of another model than train.model: {'; '.join(words)}; set train.model (and train.loss) to the"
            " model that it was trained as"
        )


def _damaged(path: Path, error: Exception) -> DamagedError:
    others = len(list(path.parent.glob("step-*.safetensors"))) - 1
    then = "the one before it is used then" if others else "the job then starts again from its beginning"
    return DamagedError(f"checkpoint {path} is damaged ({_one_line(error)}); train its job again: {then}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

"""Weights of a model that are stored as what differs from another: an expert's, beside the seed that it continued.

A model folder has either all its weights in ``open_clip_model.safetensors``, or those that differ from the seed's in
``delta.safetensors``; then the seed is the folder ``seed`` beside it, and nothing that a file says leads elsewhere. The
header of a delta carries the SHA-256 of the seed's weights, so a delta never meets another seed, and the hash of the
delta alone says which model it is.

A tensor differs if one of its bytes does. Folders of other settings, tensors or shapes than the seed's, and those that
share less than a tenth of its bytes, keep all their weights.

Price: writing reads both models once. Reading checks the seed's hash, once for each file in a process: about a second
for each 1.5 GB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeclip.errors import ModeclipError
from modeclip.models.checkpoints import write_tensors
from modeclip.models.settings import CLIP_CONFIG, read_settings
from modeclip.system.files import hash_file

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "open_clip_model.safetensors"
DELTA_FILE = "delta.safetensors"
SEED_FOLDER = "seed"
"""Folder beside a delta's that holds the model it differs from."""
LEAST_SHARED = 0.1
"""Share of a model's bytes that must be the seed's, in [0, 1]; below it, a delta saves too little to be worth it."""
_SEED_HASH = "seed_sha256"
_HASH = re.compile(r"[0-9a-f]{64}")


class Weights:
    """The tensors of a model folder, read one at a time, wherever they are stored."""

    def __init__(self, own: Any, seed: Any = None) -> None:
        self._own, self._seed = own, seed
        self.own_names = frozenset[str](own.keys())
        """Names of the tensors that are not the seed's."""
        self.names: Sequence[str] = sorted(own.keys() if seed is None else seed.keys())
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def kind(self, name: str) -> str:
        """Return the type of a tensor's numbers, as safetensors calls it, from the header."""
        return str(self._file(name).get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        value: torch.Tensor = self._file(name).get_tensor(name)
        return value

    def _file(self, name: str) -> Any:
        return self._own if self._seed is None or name in self.own_names else self._seed


def is_delta(folder: Path) -> bool:
    """Tell whether a model folder holds only what differs from the seed beside it."""
    return (folder / DELTA_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file()


def weights_file(folder: Path) -> Path:
    """Return the file whose hash tells a model's weights: all of them, or what differs from the seed."""
    return folder / (DELTA_FILE if is_delta(folder) else WEIGHTS_FILE)


def seed_of(folder: Path) -> Path:
    """Return the folder of the model that a delta's folder differs from."""
    return folder.parent / SEED_FOLDER


def seed_hash_of(folder: Path) -> str:
    """Return the SHA-256 that the seed's weights must have, from the header of a delta.

    Raises:
        ModeclipError: The delta is damaged.
    """
    with _opened(folder, DELTA_FILE) as file:
        return _stated_hash(folder, file)


def check_delta(folder: Path) -> None:
    """Raise unless a delta fits the seed beside it; the hash of the seed's weights is compared too.

    Raises:
        ModeclipError: The seed is missing, damaged or another one, or the delta holds tensors that the seed has not.
    """
    with open_weights(folder):
        pass
    own, seed = (read_settings(place / CLIP_CONFIG) for place in (folder, seed_of(folder)))
    if own != seed:
        raise ModeclipError(
            f"model folder {folder}: its {CLIP_CONFIG} differs from that of its seed; get the bundle again"
        )


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Open the weights of a model folder to read some of them.

    Raises:
        ModeclipError: A file is missing or damaged, or a delta does not fit the seed beside it.
    """
    with ExitStack() as stack:
        if not is_delta(folder):
            yield Weights(stack.enter_context(_opened(folder, WEIGHTS_FILE)))
            return
        own = stack.enter_context(_opened(folder, DELTA_FILE))
        stated, seed = _stated_hash(folder, own), seed_of(folder)
        if not (seed / WEIGHTS_FILE).is_file():
            raise ModeclipError(
                f"model folder {folder}: holds only what differs from its seed, and {seed / WEIGHTS_FILE} is missing; "
                "get the bundle again"
            )
        if (found := _hash_once(seed / WEIGHTS_FILE)) != stated:
            raise ModeclipError(
                f"model folder {folder}: {DELTA_FILE} belongs to a seed whose weights have the hash {stated[:12]}, but "
                f"those of {seed} have {found[:12]}; get the bundle again"
            )
        whole = stack.enter_context(_opened(seed, WEIGHTS_FILE))
        _check_fits(folder, Weights(own), Weights(whole))
        yield Weights(own, whole)


def save_delta(source: Path, seed: Path, folder: Path) -> bool:
    """Write what a model's weights are beyond those of the seed, if that is worth it.

    Args:
        source: Model folder, whose weights may themselves be stored as a delta.
        seed: Folder of the seed, with all its weights; the delta goes beside it, into another folder.
        folder: Where the delta goes; it exists. Its settings are the caller's to write.

    Returns:
        Whether it was written; if not, the model shares too little with the seed, or is of another kind.

    Raises:
        ModeclipError: A file is damaged, or the disk is full.
    """
    if read_settings(source / CLIP_CONFIG) != read_settings(seed / CLIP_CONFIG):
        return False
    with open_weights(source) as one, open_weights(seed) as other:
        kinds = [{name: (file.kind(name), file.shape(name)) for name in file.names} for file in (one, other)]
        if kinds[0] != kinds[1]:
            return False
        changed, size, shared = {}, 0, 0
        for name in one.names:
            value, before = one.tensor(name), other.tensor(name)
            num_bytes = value.numel() * value.element_size()
            size += num_bytes
            if _bytes_equal(value, before):
                shared += num_bytes
            else:
                changed[name] = value.clone()  # what is mapped stays in memory with all that was read beside it
        if shared < LEAST_SHARED * size:
            return False
    write_tensors(folder / DELTA_FILE, changed, {_SEED_HASH: _hash_once(seed / WEIGHTS_FILE)})
    return True


def save_whole(source: Path, path: Path) -> None:
    """Write all weights of a model folder into one file, tensor by tensor as they are.

    Raises:
        ModeclipError: A file is damaged, or the disk is full.
    """
    with open_weights(source) as weights:
        write_tensors(path, {name: weights.tensor(name) for name in weights.names}, {"format": "pt"})


def bytes_once_loaded(folder: Path) -> tuple[int, dict[str, int]]:
    """Return what a model's weights take as float32 whatever the files hold, and a delta's tensors by name.

    Only headers are read, and a delta's seed is not compared with its hash.

    Raises:
        ModeclipError: A file is missing or damaged, or a delta does not fit the seed beside it.
    """
    with ExitStack() as stack:
        own = Weights(stack.enter_context(_opened(folder, DELTA_FILE if is_delta(folder) else WEIGHTS_FILE)))
        sizes = {name: 4 * math.prod(own.shape(name)) for name in own.names}
        if not is_delta(folder):
            return sum(sizes.values()), {}
        seed = Weights(stack.enter_context(_opened(seed_of(folder), WEIGHTS_FILE)))
        _check_fits(folder, own, seed)
        return sum(4 * math.prod(seed.shape(name)) for name in seed.names), sizes


def _check_fits(folder: Path, own: Weights, seed: Weights) -> None:
    known = set(seed.names)
    for name in own.names:
        if name not in known:
            raise ModeclipError(
                f"model folder {folder}: {DELTA_FILE} holds {name[:80]!r}, which its seed has not; get the bundle again"
            )
        if own.shape(name) != seed.shape(name):
            raise ModeclipError(
                f"model folder {folder}: the shape of {name} in {DELTA_FILE} is {own.shape(name)}, expected "
                f"{seed.shape(name)} as in its seed; get the bundle again"
            )


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    def damaged(error: Exception) -> ModeclipError:
        reason = " ".join(str(error).split())[:200]
        return ModeclipError(f"model folder {folder}: {name} is damaged and cannot be read ({reason}); get it again")

    try:
        file = safe_open(folder / name, "pt")
    except (SafetensorError, OSError) as error:
        raise damaged(error) from None
    try:
        with file:
            yield file
    except SafetensorError as error:  # in a tensor
        raise damaged(error) from None


def _stated_hash(folder: Path, file: Any) -> str:
    stated = (file.metadata() or {}).get(_SEED_HASH, "")
    if not _HASH.fullmatch(stated):
        raise ModeclipError(
            f"model folder {folder}: {DELTA_FILE} does not say which seed it differs from; get the bundle again"
        )
    return str(stated)


def _hash_once(path: Path) -> str:
    """Return the SHA-256 of a file, which is read again only if it has changed."""
    state = path.stat()
    return _hash_of(path.resolve(), state.st_mtime_ns, state.st_size, state.st_ino)


@cache
def _hash_of(path: Path, *_: int) -> str:
    return hash_file(path)


def _bytes_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and type have the same bytes; a NaN equals itself."""
    import torch

    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)))

"""Keep on disk what a frozen trunk gives, so that it runs once for each pair and not in every pass.

With ``train.trainable: last:N`` nothing before the last N blocks changes, so without augmentation a pair always has the
same hidden states there. The first pass over the pairs computes and writes them; later passes read them, need no
picture, and cost what is trained.

The files lie in the job's folder while it trains. Their folder is named after the job, the trunk's weights and the
pairs, and after the boot of the machine: what was not yet on the disk when a machine stopped is not taken for whole.
The pairs of a piece of a batch count as kept at once, when the states of all are written, and these are never written
again. So a job that was killed goes on with the same bits.

Price: 4 T W bytes a pair and tower, for T tokens of width W, of texts up to their end: 13 kB a pair for modeclip-icon,
180 kB for ViT-B-32. Rejected: a pass over all pairs beforehand, which a plan of a few steps would have to pay, and
columns of the catalog, which would outlive the one training that they are for.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from modeclip.errors import ModeclipError
from modeclip.models.trunk import is_exact_without_padding
from modeclip.system.console import log
from modeclip.training.jobs import TRUNK_FOLDER, TrainJob

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from modeclip.data.catalog import Catalog
    from modeclip.models.clip import Clip
    from modeclip.training.objectives.objective import TrainingBatch

    Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Runs both trunks: (b, 3, H, W) uint8 and (b, context_length) token ids become (b, T, W) each."""

SOME_CAPTIONS = 4096
"""Captions whose lengths say how much disk the texts take."""
BLOCK = 4096
"""Bytes that a file system gives at least: what a text is too short for stays a hole in its file."""


@dataclass
class _Seen:
    """What a process has read of the list of the pairs that are kept, which all processes add to."""

    kept: Bool[np.ndarray, " N"]
    """Whether each pair is in it."""
    position: int = 0
    """Bytes that were read."""
    lock: Lock = field(default_factory=Lock)
    """Held while it is read."""


@dataclass(frozen=True, kw_only=True)
class TrunkOutputs:
    """Hidden states of the pairs of a job, by their place among its rows; it can be sent to other processes."""

    folder: Path
    """Folder of the files."""
    num_pairs: int
    """Pairs of the job."""
    image_shape: tuple[int, int]
    """Tokens and width of an image."""
    text_shape: tuple[int, int]
    """Most tokens of a text, and their width."""
    types: tuple[torch.dtype, torch.dtype]
    """Types of the numbers of images and of texts."""
    cuts_padding: bool
    """Whether a text has states up to its end only."""

    def num_bytes(self, lengths: Int[np.ndarray, " n"]) -> int:
        """Return what the files of all pairs will take on disk, by the lengths of some of the texts."""
        _, text_bytes = self._bytes
        own = lengths * (text_bytes // self.text_shape[0]) + BLOCK
        return round(self.num_pairs * (self._bytes[0] + 1 + float(np.minimum(own, text_bytes).mean())))

    def lengths(self, tokens: Int[np.ndarray, "b T"]) -> Int[np.ndarray, " b"]:
        """Return how many states each text has."""
        if not self.cuts_padding:
            return np.full(len(tokens), self.text_shape[0])
        found: np.ndarray = tokens.shape[1] - np.argmax(tokens[:, ::-1] != 0, axis=1)
        return found

    def open(self) -> None:
        """Make the files, unless they are there, and remove those of other trainings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for other in self.folder.parent.iterdir():
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
        (self.folder / "kept").touch()
        for name, size in zip(("images", "texts"), self._bytes, strict=True):
            with (self.folder / name).open("ab") as file:
                file.truncate(self.num_pairs * size)

    def has(self, places: Int[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
        """Return which pairs are kept."""
        seen = self._seen
        with seen.lock, (self.folder / "kept").open("rb") as file:
            file.seek(seen.position)
            new = np.frombuffer(file.read(), np.int64)
            seen.kept[new] = True
            seen.position += new.nbytes
            found: np.ndarray = seen.kept[places]
        return found

    def read(self, places: Int[np.ndarray, " b"], lengths: Int[np.ndarray, " b"]) -> tuple[Tensor, Tensor]:
        """Return the states of pairs, (b, T, W) of images and of texts, zeros behind the end of a text."""
        import torch

        longest = int(lengths.max())
        texts = self._maps["texts"][places, : longest * (self._bytes[1] // self.text_shape[0])]
        images = torch.from_numpy(self._maps["images"][places]).view(self.types[0])
        shape = len(places), longest, self.text_shape[1]
        return images.view(len(places), *self.image_shape), torch.from_numpy(texts).view(self.types[1]).view(shape)

    def write(
        self, places: Int[np.ndarray, " b"], images: Tensor, texts: Tensor, lengths: Int[np.ndarray, " b"]
    ) -> None:
        """Keep the states of pairs.

        Raises:
            OSError: The disk is full.
        """
        import torch

        for name, states, size in zip(("images", "texts"), (images, texts), self._bytes, strict=True):
            rows = states.contiguous().view(len(states), -1).view(torch.uint8).numpy()
            used = rows.shape[1] // states.shape[1] * lengths if name == "texts" else np.full(len(rows), size)
            with (self.folder / name).open("r+b", buffering=0) as file:
                for place, row, end in zip(places.tolist(), rows, used.tolist(), strict=True):
                    if os.pwrite(file.fileno(), row[:end], place * size) < end:
                        raise OSError(28, "No space left on device", str(self.folder / name))
        with (self.folder / "kept").open("ab", buffering=0) as file:  # at once, so that all of them are kept or none
            file.write(places.astype(np.int64).tobytes())

    @property
    def _bytes(self) -> tuple[int, int]:
        """Bytes of a pair in the files of images and of texts."""
        shapes = zip((self.image_shape, self.text_shape), self.types, strict=True)
        image, text = (shape[0] * shape[1] * kind.itemsize for shape, kind in shapes)
        return image, text

    @cached_property
    def _maps(self) -> dict[str, np.ndarray]:
        sizes = zip(("images", "texts"), self._bytes, strict=True)
        return {
            name: np.memmap(self.folder / name, np.uint8, "r", shape=(self.num_pairs, size)) for name, size in sizes
        }

    @cached_property
    def _seen(self) -> _Seen:
        return _Seen(np.zeros(self.num_pairs, bool))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the maps behind: another process makes its own."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        self.__dict__.update(state)


def complete(batch: TrainingBatch, kept: TrunkOutputs, run: Run) -> TrainingBatch:
    """Return a batch with the trunk's states in the place of pictures; those that are missing are made and kept."""
    import torch

    if batch.texts is not None:
        return batch
    assert batch.places is not None
    assert batch.fresh is not None
    places, lengths = batch.places.numpy(), kept.lengths(batch.tokens.numpy())
    missing = torch.from_numpy(~kept.has(places))
    if missing.any():
        states = run(batch.images[missing[batch.fresh]], batch.tokens[missing])
        kept.write(places[missing], *states, lengths[missing])
    images, texts = kept.read(places, lengths)
    return replace(batch, images=images, texts=texts)


def _folder_for(job: TrainJob, model: nn.Module, rows: Int[np.ndarray, " N"]) -> Path:
    """Return where a job keeps what the frozen part of its model gives for its rows."""
    import torch

    content = sha256(f"{job.digest} {_boot()}".encode() + rows.tobytes())
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    for name, value in model.state_dict().items():
        if name not in trained:
            content.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Path(job.folder) / TRUNK_FOLDER / content.hexdigest()[:16]


def measure_outputs(
    job: TrainJob, catalog: Catalog, rows: Int[np.ndarray, " N"], clip: Clip, run: Run
) -> tuple[TrunkOutputs, int]:
    """Return where a job keeps what its trunks give, and about how many bytes that is; nothing is written.

    Args:
        job: The job.
        catalog: Its catalog.
        rows: Its rows.
        clip: Its model.
        run: The trunks of the model, as they run in training.

    Raises:
        ModeclipError: Something in the trunks is random.
    """
    import torch

    some = catalog.captions(rows[:: math.ceil(len(rows) / SOME_CAPTIONS)], job.config.captions)
    tokens, (width, height) = clip.tokens(some), clip.image_size
    probe = torch.zeros(2, 3, height, width, dtype=torch.uint8), torch.ones_like(tokens[:1]).repeat(2, 1)
    with torch.no_grad():
        (images, texts), again = run(*probe), run(*probe)
    if not (torch.equal(images, again[0]) and torch.equal(texts, again[1])):
        raise ModeclipError(
            f"{job.name}: train.engine.keep_trunk: the frozen blocks do not give the same twice (they have dropout), "
            "so that nothing can be kept; leave it out"
        )
    shapes: Any = tuple(images.shape[1:]), tuple(texts.shape[1:])
    kept = TrunkOutputs(
        folder=_folder_for(job, clip.model, rows),
        num_pairs=len(rows),
        image_shape=shapes[0],
        text_shape=shapes[1],
        types=(images.dtype, texts.dtype),
        cuts_padding=is_exact_without_padding(clip.model),
    )
    return kept, kept.num_bytes(kept.lengths(tokens.numpy()))


def open_outputs(job: TrainJob, kept: TrunkOutputs, needed: int) -> None:
    """Make the files of a job and say what they will take on disk.

    Args:
        job: The job.
        kept: Its files, some of which may be there.
        needed: Bytes that all will take.

    Raises:
        ModeclipError: The disk has not so much room.
    """
    place = next(folder for folder in (kept.folder, *kept.folder.absolute().parents) if folder.exists())
    present = sum(file.stat().st_blocks * 512 for file in kept.folder.glob("*"))
    free, where = shutil.disk_usage(place).free, kept.folder.parent
    if needed - present > free:
        raise ModeclipError(
            f"{job.name}: train.engine.keep_trunk takes {needed / 1e9:,.2f} GB for {kept.num_pairs:,} pairs in "
            f"{where}, which has {free / 1e9:,.2f} GB; free some space, or leave it out"
        )
    log(
        f"{job.name}: what the frozen blocks give for {kept.num_pairs:,} pairs is kept in {where} while it trains, "
        f"about {needed / 1e9:,.2f} GB"
    )
    kept.open()


def forget(job_folder: Path) -> None:
    """Remove what a job has kept of its trunk."""
    shutil.rmtree(job_folder / TRUNK_FOLDER, ignore_errors=True)


def _boot() -> str:
    """Return what names the time since the machine was started; nothing where the system does not tell."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""

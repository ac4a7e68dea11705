"""Find out before a model is built whether a job can succeed, and say in one line why not.

It looks at the batch, the device, the weights that the job starts from (names and shapes, from the files' headers), the
columns that it needs, a sample of the pairs, and the disk.

Price: less than a second, most of it for importing open_clip, which training needs anyway.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modeclip.errors import ModeclipError, unknown
from modeclip.models.blocks import freeze
from modeclip.models.checkpoints import FOLDER, check_weights, find_checkpoint
from modeclip.models.clip import hollow_model
from modeclip.system.console import log
from modeclip.system.processes import PARENT_VARIABLE
from modeclip.training.batches import read_groups
from modeclip.training.journal import check_reports
from modeclip.training.objectives import make_objective

if TYPE_CHECKING:
    from jaxtyping import Int

    from modeclip.data.catalog import Catalog
    from modeclip.training.jobs import TrainJob

CAPTIONS_SEEN = 4096
"""Number of captions that are looked at, spread evenly over the rows."""
LONELY_SHARE = 0.01
"""Share of pairs without a negative from which on there is a warning."""
IMAGES_SEEN = 32
"""Number of images that are decoded, spread in the same way."""
_KEYS_SHOWN = 3


def preflight(job: TrainJob, catalog: Catalog, rows: Int[np.ndarray, " N"], world_size: int) -> None:
    """Raise if a job cannot succeed.

    Args:
        job: The job.
        catalog: Catalog of its pairs.
        rows: Rows that it trains on.
        world_size: Number of processes that train it together.

    Raises:
        ModeclipError: The message names the job, what is wrong and what to do.
    """
    _check_batch(job, world_size)
    _check_precision(job)
    check_reports(job.config.engine.report_to)
    objective = make_objective(job.config)
    model = hollow_model(job.config.model, logit_start=objective.logit_start)
    freeze(model, job.config.trainable)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    own = find_checkpoint(Path(job.folder), job.digest)
    if own is not None:
        check_weights(own, shapes)
    elif job.start_from is not None:
        _check_start(job, Path(job.start_from), shapes)
    _check_columns(job, catalog, (*objective.columns, *objective.vector_columns))
    _check_pairs(job, catalog, rows)
    if (warning := check_negatives(job, catalog, rows)) and PARENT_VARIABLE not in os.environ:  # else it was said there
        log(warning)
    weight_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    if job.config.engine.strategy == "ddp":
        _check_memory(job, weight_bytes)
    _check_disk(job, weight_bytes)


def _check_batch(job: TrainJob, world_size: int) -> None:
    batch = job.config.batch_size
    if batch % world_size:
        raise ModeclipError(
            f"{job.name}: train.batch_size {batch:,} cannot be divided equally among {world_size} processes; set it to "
            f"a multiple of {world_size}, such as {math.ceil(batch / world_size) * world_size:,}"
        )


def _check_precision(job: TrainJob) -> None:
    import torch

    precision = job.config.engine.precision
    if precision == "16-mixed" and not torch.cuda.is_available():
        raise ModeclipError(
            f"{job.name}: train.engine.precision is 16-mixed, which needs a GPU, and this machine has none; set it to "
            "auto, 32-true or bf16-mixed"
        )
    if (
        precision == "bf16-mixed"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ModeclipError(
            f"{job.name}: train.engine.precision is bf16-mixed, which {torch.cuda.get_device_name()} does not have; "
            "set it to auto, 16-mixed or 32-true"
        )


def _check_start(job: TrainJob, start: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check the weights that a job starts from, another job's checkpoint or a file of open_clip_train."""
    path = start if start.is_file() else find_checkpoint(start, job.start_digest or None)
    if path is None:
        what = "holds no checkpoint of the job that this one continues" if start.is_dir() else "does not exist"
        raise ModeclipError(f"{job.name}: start_from {start} {what}; train that model first, or correct the path")
    check_weights(path, shapes)


def _check_columns(job: TrainJob, catalog: Catalog, columns: Sequence[str]) -> None:
    selecting = [*job.where, *([job.mask] if job.mask else [])]
    for uses, names in (("selects its rows by", selecting), (f"needs for train.loss {job.config.loss}", columns)):
        for name in names:
            if name not in catalog.columns:
                raise unknown(f"column of {catalog.path!r}, which {job.name} {uses},", name, catalog.columns)


def _check_pairs(job: TrainJob, catalog: Catalog, rows: Int[np.ndarray, " N"]) -> None:
    """Look at a sample of the pairs for captions that say nothing and images that cannot be decoded."""
    seen = _spread(rows, CAPTIONS_SEEN)
    captions, keys = catalog.captions(seen, job.config.captions), catalog.read(["key"], seen)["key"]
    empty = [key for key, caption in zip(keys, captions, strict=True) if not (caption and caption.strip())]
    if empty:
        raise ModeclipError(
            f"{job.name}: {len(empty):,} of {len(seen):,} captions looked at are empty ({_some(empty)}); leave these "
            "pairs out with a column of booleans (mask), or index the source again"
        )
    seen, damaged = _spread(rows, IMAGES_SEEN), []
    try:
        catalog.images(seen)
    except ModeclipError as first:
        for position, key in enumerate(catalog.read(["key"], seen)["key"].tolist()):
            try:
                catalog.images(seen[position : position + 1])
            except ModeclipError:
                damaged.append(key)
        raise ModeclipError(
            f"{job.name}: {len(damaged):,} of {len(seen):,} images looked at cannot be read ({_some(damaged)}); the "
            f"first: {first}"
        ) from first


def check_negatives(job: TrainJob, catalog: Catalog, rows: Int[np.ndarray, " N"]) -> str:
    """Return a warning where many pairs meet no negative in their batch, or only false ones; empty if all is well.

    Captions are counted in at most ``CAPTIONS_SEEN`` rows, spread evenly, the pairs of each group in all rows.

    Raises:
        ModeclipError: No pair has a negative, so that nothing can be learned.
    """
    captions = catalog.captions(_spread(rows, CAPTIONS_SEEN), job.config.captions)
    counts, batch, masks = (
        list(Counter(captions).values()),
        job.config.batch_size,
        job.config.mask_same_captions,
    )
    if len(counts) == 1 and masks:
        raise ModeclipError(
            f"{job.name}: all {len(rows):,} pairs have the same caption ({captions[0]!r}), and with "
            "train.mask_same_captions none of them is a negative, so that nothing can be learned; add pairs with other "
            "captions, or use fewer experts"
        )
    alone = _share_alone(job, catalog, rows)
    if alone == 1:
        raise ModeclipError(
            f"{job.name}: each of the {len(rows):,} pairs has a number of its own in the column {job.config.groups!r} "
            "(train.groups), so that none has a negative and nothing can be learned; give a column with fewer numbers"
        )
    if alone >= LONELY_SHARE:
        return (
            f"{job.name}: {100 * alone:.1f} % of the pairs are alone in their group ({job.config.groups}), so that "
            "nothing is learned from them (train.groups); give a column with fewer groups"
        )
    if len(counts) == 1:
        return (
            f"{job.name}: all {len(rows):,} pairs have the same caption ({captions[0]!r}), so that every negative is a "
            "false one; add pairs with other captions, or use fewer experts"
        )
    lonely = share_without_negative(counts, min(batch, len(captions))) if masks else 0.0
    if lonely < LONELY_SHARE:
        return ""
    return (
        f"{job.name}: {100 * lonely:.1f} % of the pairs meet no pair with another caption in their batch of {batch:,}, "
        "so that nothing is learned from them (train.mask_same_captions); raise train.batch_size"
    )


def _share_alone(job: TrainJob, catalog: Catalog, rows: Int[np.ndarray, " N"]) -> float:
    """Return the share of pairs whose group has no other."""
    groups = read_groups(job.config, catalog, rows)
    if groups is None:
        return 0.0
    return float((np.unique(groups, return_counts=True)[1] == 1).sum() / len(groups))


def share_without_negative(counts: Sequence[int], batch_size: int) -> float:
    """Return the share of pairs whose whole batch, drawn without repeats, has their own caption.

    Args:
        counts: Pairs of each caption.
        batch_size: Pairs of a batch, at most all of them.

    Examples:
        Of three pairs ``a`` and one ``b``, two of three partners of an ``a`` are the same:

        >>> round(share_without_negative([3, 1], 2), 9)
        0.5
    """
    total = sum(counts)

    def same(count: int) -> float:
        """Return the chance that the other pairs of a batch are all among the ``count - 1`` with the same caption."""
        if count < batch_size:
            return 0.0
        ways = [math.lgamma(among) - math.lgamma(among - batch_size + 1) for among in (count, total)]
        return math.exp(ways[0] - ways[1])

    return sum(count / total * same(count) for count in counts)


def _check_memory(job: TrainJob, weight_bytes: int) -> None:
    """Check that the weights, their gradient and AdamW's two moments fit into memory."""
    import torch

    on_gpu, needed = torch.cuda.is_available(), 4 * weight_bytes
    has = torch.cuda.get_device_properties(0).total_memory if on_gpu else physical_memory()
    if needed > has:
        place = "the GPU" if on_gpu else "this machine"
        raise ModeclipError(
            f"{job.name}: weights, gradient and optimizer of {job.config.model} need {needed / 1e9:,.1f} GB, {place} "
            f"has {has / 1e9:,.1f} GB; choose a smaller train.model, or train.engine.strategy fsdp with more processes"
        )


def physical_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_disk(job: TrainJob, weight_bytes: int) -> None:
    """Check the room for the kept checkpoints, for another one while it is written, and for the finished model."""
    keep, folder = job.config.engine.keep_checkpoints, Path(job.folder)
    present = sum(file.stat().st_size for file in (folder / FOLDER).glob("*") if file.is_file())
    needed = (3 * (keep + 1) + 1) * weight_bytes - present
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ModeclipError(
            f"{job.name}: its checkpoints need {needed / 1e9:,.1f} GB in {folder}, which has {free / 1e9:,.1f} GB; "
            f"free some space, or set train.engine.keep_checkpoints (now {keep}) lower"
        )


def _spread(rows: Int[np.ndarray, " N"], count: int) -> Int[np.ndarray, " n"]:
    """Return at most ``count`` of the rows, spread evenly."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_KEYS_SHOWN]) + (", ..." if len(keys) > _KEYS_SHOWN else "")

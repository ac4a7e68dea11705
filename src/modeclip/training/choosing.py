"""Which model fits the pairs: how many pixels and words they have, and how many of them a model sees.

Where no model is named, the smallest of three is taken that sees enough: fewer than half of the images have twice its
pixels on their shorter side, and fewer than a tenth of the captions have more words than it reads. A recipe and the
commands that train say which one it is, and why.

Price: 512 rows are read, without their images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from modeclip.clustering.fitting import sample_rows
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.models.clip import model_shapes
from modeclip.system.console import log
from modeclip.training.jobs import AUTO, JOB_FILE, TrainConfig, TrainJob

LADDER = ("modeclip-icon", "modeclip-small", "ViT-B-32")
"""Models to choose from, the smallest first: of 32, 64 and 224 pixels, and of 24, 48 and 77 tokens."""
LOOK_ROWS = 512
"""Pairs that are looked at."""
MANY_PIXELS = 2.0
"""How many times as long as the model's the shorter side of half of the images must be for the model to see too few."""
LONG_CAPTIONS = 0.1
"""Share of captions longer than what a model reads from which on it reads too little."""
MARKERS = 2
"""Tokens that a model adds to a caption, at its start and at its end."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a model sees of some pairs."""

    model: str
    """The model."""
    pixels: int
    """Pixels on each side of what its image tower sees; 0 where that is not known."""
    tokens: int
    """Tokens that its text tower reads; 0 where that is not known."""
    shorter_side: float
    """Median of the shorter sides of the images, in pixels."""
    long_captions: float
    """Share of the captions that have more words than the model reads."""

    @classmethod
    def of(cls, model: str, pairs: Catalog, captions: str | None = None) -> Fit:
        """Look at some pairs and at the shapes of a model.

        Args:
            model: What is to be trained.
            pairs: What it is to be trained on.
            captions: Column of texts that replaces their captions.
        """
        shapes = model_shapes(model)
        patches, kernel = shapes.get("visual.positional_embedding", (0,)), shapes.get("visual.conv1.weight", (0,))
        tokens = shapes.get("positional_embedding", (0,))[0]
        rows = sample_rows(len(pairs), LOOK_ROWS, 0)
        sides = pairs.read(["width", "height"], rows)
        words = [len(str(caption).split()) for caption in pairs.captions(rows, captions)]
        return cls(
            model=model,
            pixels=round((patches[0] - 1) ** 0.5) * kernel[-1] if patches[0] > 1 else 0,
            tokens=tokens,
            shorter_side=float(np.median(np.minimum(sides["width"], sides["height"]))),
            long_captions=float(np.mean(np.array(words) + MARKERS > tokens)) if tokens else 0.0,
        )

    @property
    def sees_too_few_pixels(self) -> bool:
        """Whether half of the images are much larger than what the model sees."""
        return bool(self.pixels) and self.shorter_side >= MANY_PIXELS * self.pixels

    @property
    def reads_too_few_words(self) -> bool:
        """Whether many captions are cut off."""
        return self.long_captions >= LONG_CAPTIONS

    @property
    def misfits(self) -> list[str]:
        """A line for each way in which the model sees much less than the pairs hold."""
        lines = []
        if self.sees_too_few_pixels:
            lines.append(
                f"train.model {self.model} sees {self.pixels} x {self.pixels} pixels, half of the images have"
                f" {self.shorter_side:.0f} or more on their shorter side: a model for larger pictures, such as"
                " ViT-B-32, sees more of them"
            )
        if self.reads_too_few_words:
            lines.append(
                f"train.model {self.model} reads {self.tokens} tokens, {100 * self.long_captions:.0f} % of the captions"
                " have more words, cut off: give a model with a longer context"
            )
        return lines

    @property
    def reason(self) -> str:
        """Why the model was chosen, in a line."""
        return (
            f"train.model is not given: {self.model}, which sees {self.pixels} x {self.pixels} pixels and reads"
            f" {self.tokens} tokens (half of the images have {self.shorter_side:.0f} or more on their shorter side,"
            f" {100 * self.long_captions:.0f} % of the captions are longer)"
        )


def choose_model(pairs: Catalog, captions: str | None = None) -> Fit:
    """Return the smallest model that sees enough of some pairs, or the largest if none does; arguments as `Fit.of`."""
    fits = (Fit.of(model, pairs, captions) for model in LADDER)
    for fit in fits:
        if not fit.misfits or fit.model == LADDER[-1]:
            return fit
    raise AssertionError("the ladder has an end")


def with_model(train: TrainConfig, catalog: str | Path, *before: str | Path | None) -> TrainConfig:
    """Return settings that name a model: that of the job that is continued, or the one that fits the pairs.

    Args:
        train: Settings whose model may be ``auto``.
        catalog: Path of the pairs. Before they are indexed, the smallest model stands for what will be chosen.
        before: Folders of jobs whose model is taken, the first that exists: one that is continued, or of this run.
    """
    if train.model != AUTO:
        return train
    for folder in before:
        if folder is not None and (path := Path(folder) / JOB_FILE).is_file():
            return replace(train, model=TrainJob.load(path).config.model)
    try:
        pairs = Catalog.open(catalog)
    except ModeclipError:  # not there yet, or unfinished: whoever trains on it will say so
        return replace(train, model=LADDER[0])
    fit = choose_model(pairs, train.captions)
    log(fit.reason)
    return replace(train, model=fit.model)

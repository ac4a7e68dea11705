"""A CLIP in memory and zero-shot tasks in; whether each image of each task is classified correctly, out.

For models that are scored again and again while they change (fine-tuning, averaging): the pictures are decoded and
normalised once, as far as they fit into ``CACHE_BYTES``. ``evaluation.evaluate`` compares models that are finished.

Source: CLIP (arXiv 2103.00020, Sec. 3.1): the class whose text has the highest cosine with the image.
Price: one pass of the image tower over all images, one of the text tower over all class names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool

from modeclip.data.catalog import Catalog
from modeclip.data.tasks.task import Task, catalog_tasks
from modeclip.errors import ModeclipError
from modeclip.evaluation.metrics import correct
from modeclip.models.clip import Clip, encode_image

if TYPE_CHECKING:
    import torch

CACHE_BYTES = 1 << 30
"""Of normalised pictures that are kept in memory: 1,780 of 224 x 224 pixels, 87,000 icons of 32 x 32."""

Correct = Mapping[str, Bool[np.ndarray, " _"]]
"""Task name to whether each image is classified correctly."""


class Examiner:
    """Tasks to be put to one model after another, all with the same preprocessing."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        templates: Sequence[str] = ("{}",),
        batch_size: int = 256,
    ) -> None:
        """Keep what is asked; nothing is read before the first model comes.

        Args:
            tasks: What is asked: classification with one class an image.
            templates: Prompts with ``{}`` where the class name goes.
            batch_size: Images encoded at a time.
        """
        self.tasks = tuple(tasks)
        self._templates, self._batch_size = tuple(templates), batch_size
        self._cache: dict[tuple[int, int], torch.Tensor] = {}
        self._room = CACHE_BYTES

    def examine(self, clip: Clip) -> dict[str, Bool[np.ndarray, " _"]]:
        """Return for each task whether each of its images is classified correctly."""
        import torch

        from modeclip.mixture.mode import class_features

        found = {}
        device = next(clip.model.parameters()).device
        was_training = clip.model.training
        clip.model.eval()
        with torch.inference_mode():
            for index, task in enumerate(self.tasks):
                texts = class_features(clip.model, clip, task.classnames, self._templates)
                parts = [
                    (encode_image(clip.model, batch.to(device)) @ texts.T).float().cpu().numpy()
                    for batch in self._batches(index, clip)
                ]
                found[task.name] = correct(np.concatenate(parts), np.asarray(task.labels))
        clip.model.train(was_training)
        return found

    def _batches(self, index: int, clip: Clip) -> Iterator[torch.Tensor]:
        images = self.tasks[index].images
        for start in range(0, len(images), self._batch_size):
            batch = self._cache.get((index, start))
            if batch is None:
                rows = np.arange(start, min(start + self._batch_size, len(images)))
                batch = clip.images(images.read(rows))
                size = batch.numel() * batch.element_size()
                if size <= self._room:
                    self._room -= size
                    self._cache[index, start] = batch
            yield batch


def open_tasks(path: str, templates: Sequence[str], batch_size: int) -> Examiner:
    """Open the zero-shot tasks of a task catalog, such as ``tasks.lance`` of a run.

    Raises:
        ModeclipError: There is no catalog, or it holds no tasks.
    """
    catalog = Catalog.open(path)
    tasks = catalog_tasks(catalog) if "task" in catalog.columns else []
    if not tasks:
        raise ModeclipError(f"{path} holds no tasks; give the tasks.lance that `modeclip index --tasks` writes")
    return Examiner(tasks, templates=templates, batch_size=batch_size)


def average(is_correct: Correct) -> float:
    """Return the plain mean over the tasks of their accuracies.

    Examples:
        >>> average({"a": np.array([True, False]), "b": np.array([True])})
        0.75
    """
    return float(np.mean([task.mean() for task in is_correct.values()]))

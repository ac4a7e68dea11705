"""What models are asked: images, and class names, texts or candidates that they are told from.

Three kinds of tasks, as CLIP_benchmark has them: `classification` (which of the class names does an image show; a
label each, or several), `retrieval` (which images belong to a text, which texts to an image), and `selection` (small
groups of images and captions that are told apart, as in Winoground and SugarCrepe).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Int

from modeclip.catalog import Catalog

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["classification", "retrieval", "selection"]

METRICS = ("acc1", "acc5", "mean_per_class_recall", "mean_top1_top5", "roc_auc", "mean_average_precision")
"""What a classification task can be scored by. ``mean_top1_top5`` is Kinetics700's, ``roc_auc`` HatefulMemes'."""


class Images(Protocol):
    """Images of a task, wherever they lie; read by number, as often as wanted."""

    @property
    def digest(self) -> str:
        """Hash of the encoded bytes of all images in their order (hexadecimal): equal for equal images."""

    def __len__(self) -> int:
        """Return how many there are, N."""

    def read(self, rows: Int[np.ndarray, " b"]) -> list[Image]:
        """Return images by number, decoded, RGB."""

    def keys(self) -> list[str]:
        """Return a name for each image, in order, for predictions and error messages."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One task."""

    name: str
    """Name, unique among the tasks of an evaluation."""
    kind: Kind
    """What is asked."""
    images: Images
    """N images."""
    classnames: tuple[str, ...] = ()
    """Classification: the L class names."""
    labels: Int[np.ndarray, " N"] | Bool[np.ndarray, "N L"] | None = None
    """Classification: index of each image's class, or for several classes an image (multi-label) which it shows."""
    templates: tuple[str, ...] = ()
    """Prompts with ``{}`` where the class name goes; empty: those of the evaluation."""
    metric: str = "acc1"
    """Classification: the one of `METRICS` that counts in averages."""
    texts: tuple[str, ...] = ()
    """Retrieval and selection: the T texts."""
    image_of_text: Int[np.ndarray, " T"] | None = None
    """Retrieval: which image each text describes; an image has any number of texts."""
    instance_of_image: Int[np.ndarray, " N"] | None = None
    """Selection: the instance of each image; the i-th image of an instance belongs to its i-th text."""
    instance_of_text: Int[np.ndarray, " T"] | None = None
    """Selection: the instance of each text."""
    group: str = ""
    """Robustness: name of the group that it is averaged in, such as the shifted versions of one test set."""
    train: Task | None = None
    """Linear probe: the images and labels that it is fitted on; None: the task has none."""
    source: str = ""
    """Where it was read from."""

    @property
    def digest(self) -> str:
        """Hash of all that is asked: images, class names, labels, texts (not the templates)."""
        content = sha256(f"{self.kind} {self.images.digest} {self.metric}".encode())
        for words in (self.classnames, self.texts):
            content.update("\0".join(words).encode() + b"\1")
        for numbers in (self.labels, self.image_of_text, self.instance_of_image, self.instance_of_text):
            content.update(b"-" if numbers is None else np.ascontiguousarray(numbers, np.int64).tobytes())
        return content.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class CatalogImages:
    """Images of a catalog's rows."""

    catalog: Catalog
    """Where they are."""
    rows: Int[np.ndarray, " N"]
    """Which rows."""
    digest: str = field(init=False)
    """Hash of the images."""

    def __post_init__(self) -> None:
        digests = self.catalog.read(["digest"], self.rows)["digest"]
        content = sha256()
        for row, digest in zip(self.rows.tolist(), digests, strict=True):
            content.update(digest if digest is not None else f"{self.catalog.fingerprint} {row}".encode())
        object.__setattr__(self, "digest", content.hexdigest())

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Int[np.ndarray, " b"]) -> list[Image]:
        """Return images by number."""
        return self.catalog.images(self.rows[rows])

    def keys(self) -> list[str]:
        """Return their keys in the catalog."""
        return [str(key) for key in self.catalog.read(["key"], self.rows)["key"]]


def catalog_tasks(catalog: Catalog) -> list[Task]:
    """Return the tasks of a task catalog (columns ``task`` and ``caption`` = class name), sorted by name."""
    columns = catalog.read(["task", "caption"])
    tasks = []
    for name in sorted(set(columns["task"])):
        rows = np.flatnonzero(columns["task"] == name)
        classnames, labels = np.unique(columns["caption"][rows].astype(str), return_inverse=True)
        images = CatalogImages(catalog=catalog, rows=rows)
        tasks.append(
            Task(
                name=str(name),
                kind="classification",
                images=images,
                classnames=tuple(classnames.tolist()),
                labels=labels,
                source=catalog.path,
            )
        )
    return tasks

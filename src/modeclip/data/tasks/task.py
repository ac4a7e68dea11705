"""What models are asked: images, and class names, texts or candidates that they are told from.

Three kinds of tasks, as CLIP_benchmark has them: `classification` (which of the class names does an image show; a
label each, or several), `retrieval` (which images belong to a text, which texts to an image), and `selection` (small
groups of images and captions that are told apart, as in Winoground and SugarCrepe).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from modeclip.data.catalog import Catalog
from modeclip.data.prompts import fill
from modeclip.errors import ModeclipError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["classification", "retrieval", "selection"]

METRICS = ("acc1", "acc5", "mean_per_class_recall", "mean_top1_top5", "roc_auc", "mean_average_precision")
"""What a classification task can be scored by. ``mean_top1_top5`` is Kinetics700's, ``roc_auc`` HatefulMemes'."""


@runtime_checkable
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
    prompts: tuple[tuple[str, ...], ...] = ()
    """Prompts of each class, written out, where they differ from class to class; they stand for the templates."""
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

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ModeclipError(f"task {self.name!r}: {problem}")
        if self.metric not in METRICS:
            raise unknown(f"metric of task {self.name!r}", self.metric, METRICS)

    def _problems(self) -> Iterator[str]:
        """Say what does not fit together."""
        num_images, num_classes, num_texts = len(self.images), len(self.classnames), len(self.texts)
        if not num_images:
            yield "it has no image"
        if self.kind == "classification":
            labels = self.labels
            if not num_classes or labels is None:
                yield "classification needs class names and labels"
            elif self.prompts and (len(self.prompts) != num_classes or not all(self.prompts)):
                yield f"expected prompts for each of {num_classes:,} classes, got {len(self.prompts):,}"
            elif labels.shape not in ((num_images,), (num_images, num_classes)):
                yield f"{num_images:,} images of {num_classes:,} classes have labels of shape {labels.shape}"
            elif labels.ndim == 1 and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                number = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
                yield (
                    f"label {int(labels[number])} of image {self.images.keys()[number]!r} is out of range: expected 0"
                    f" to {num_classes - 1} for {num_classes:,} class names"
                )
        if self.kind == "retrieval":
            yield from _check_numbers("image_of_text", self.image_of_text, num_texts, num_images)
        if self.kind == "selection":
            yield from _check_numbers("instance_of_image", self.instance_of_image, num_images, None)
            yield from _check_numbers("instance_of_text", self.instance_of_text, num_texts, None)

    def prompts_of(self, templates: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Return the prompts of each class.

        Args:
            templates: Those of the evaluation, for a task without its own.
        """
        if self.prompts:
            return self.prompts
        chosen = self.templates or templates
        return tuple(tuple(fill(template, name) for template in chosen) for name in self.classnames)

    @property
    def digest(self) -> str:
        """Hash of all that is asked: images, class names, labels, texts (not the templates)."""
        content = sha256(f"{self.kind} {self.images.digest} {self.metric}".encode())
        for words in (self.classnames, self.texts):
            content.update("\0".join(words).encode() + b"\1")
        for numbers in (self.labels, self.image_of_text, self.instance_of_image, self.instance_of_text):
            content.update(b"-" if numbers is None else np.ascontiguousarray(numbers, np.int64).tobytes())
        return content.hexdigest()


def _check_numbers(
    field: str, numbers: Int[np.ndarray, " n"] | None, expected: int, limit: int | None
) -> Iterator[str]:
    """Say what is wrong with a number for each text or image."""
    if not expected:
        yield "it has no text"
    elif numbers is None or len(numbers) != expected:
        yield f"expected {expected:,} numbers in {field}, got {0 if numbers is None else len(numbers):,}"
    elif int(numbers.min()) < 0 or (limit is not None and int(numbers.max()) >= limit):
        yield f"{field} is out of range: {int(numbers.min())} to {int(numbers.max())}, expected 0 to {limit or 'n'}"


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
        content = sha256()
        for row, digest in zip(self.rows.tolist(), self.catalog.digests(self.rows), strict=True):
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
    held = catalog.read(["task"])["task"]
    return [
        catalog_classification(catalog, np.flatnonzero(held == name), str(name))
        for name in sorted(set(held) - {"", None})
    ]


def catalog_classification(catalog: Catalog, rows: Int[np.ndarray, " N"], name: str) -> Task:
    """Return the task of telling captions of a catalog's rows apart, each a class name."""
    captions = catalog.read(["caption"], rows)["caption"].astype(str)
    classnames, labels = np.unique(captions, return_inverse=True)
    return Task(
        name=name,
        kind="classification",
        images=CatalogImages(catalog=catalog, rows=rows),
        classnames=tuple(classnames.tolist()),
        labels=labels,
        source=catalog.path,
    )


def catalog_retrieval(catalog: Catalog, rows: Int[np.ndarray, " T"], name: str) -> Task:
    """Return the task of finding captions of a catalog's rows; those with equal images are one image's."""
    columns = catalog.read(["caption", "digest", "path", "offset", "key"], rows)
    keys = zip(columns["digest"], columns["path"], columns["offset"].tolist(), columns["key"], strict=True)
    identity = [digest or (f"{path} {offset}" if path else key) for digest, path, offset, key in keys]
    number_of = {each: number for number, each in enumerate(dict.fromkeys(identity))}
    owners = np.array([number_of[each] for each in identity], np.int64)
    firsts = np.unique(owners, return_index=True)[1]
    return Task(
        name=name,
        kind="retrieval",
        images=CatalogImages(catalog=catalog, rows=rows[firsts]),
        texts=tuple(columns["caption"].astype(str).tolist()),
        image_of_text=owners,
        source=catalog.path,
    )

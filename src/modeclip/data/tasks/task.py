"""What a model is asked: a `Task` has images, and class names, texts or candidates to match them with.

There are three kinds of tasks, those of CLIP_benchmark. In `classification`, which of the class names does an image
show? It has one label or several. In `retrieval`, which images belong to a text, and which texts to an image? In
`selection`, which image of a small group belongs to which caption, as in Winoground and SugarCrepe?
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from modeclip.data.catalog import SETTINGS, Catalog
from modeclip.data.images import IGNORED, Exif
from modeclip.data.prompts import fill
from modeclip.errors import ModeclipError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["classification", "retrieval", "selection"]

METRICS = ("acc1", "acc5", "mean_per_class_recall", "mean_top1_top5", "roc_auc", "mean_average_precision")
"""Metrics of classification tasks. Kinetics700 uses ``mean_top1_top5``, HatefulMemes ``roc_auc``."""


@runtime_checkable
class Images(Protocol):
    """The images of a task, wherever they are stored. They are read by number, in any order and as often as wanted."""

    @property
    def digest(self) -> str:
        """Hash of the encoded bytes of all images in their order (hexadecimal); equal images give equal hashes."""

    def digests(self) -> list[bytes]:
        """Return what each image is known by: equal for equal encoded bytes."""

    def __len__(self) -> int:
        """Return the number of images, N."""

    def read(self, rows: Int[np.ndarray, " b"]) -> list[Image]:
        """Return the images of these numbers, decoded, as RGB."""

    def keys(self) -> list[str]:
        """Return a name for each image in order, for predictions and messages."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Images, and what a model is asked about them."""

    name: str
    """Name, unique among the tasks of an evaluation."""
    kind: Kind
    """What is asked: classification, retrieval or selection."""
    images: Images
    """N images."""
    classnames: tuple[str, ...] = ()
    """Classification: the L class names."""
    labels: Int[np.ndarray, " N"] | Bool[np.ndarray, "N L"] | None = None
    """Classification: index of each image's class or, if images show several classes, which they show."""
    templates: tuple[str, ...] = ()
    """Prompts with ``{}`` for the class name; if empty, the evaluation's templates are used."""
    prompts: tuple[tuple[str, ...], ...] = ()
    """Prompts of each class in full, if they differ from class to class; they replace the templates."""
    metric: str = "acc1"
    """Classification: the metric that counts in averages, one of `METRICS`."""
    texts: tuple[str, ...] = ()
    """Retrieval and selection: the T texts."""
    image_of_text: Int[np.ndarray, " T"] | None = None
    """Retrieval: the image that each text describes; an image may have any number of texts."""
    instance_of_image: Int[np.ndarray, " N"] | None = None
    """Selection: the instance of each image; the i-th image of an instance belongs to its i-th text."""
    instance_of_text: Int[np.ndarray, " T"] | None = None
    """Selection: the instance of each text."""
    group: str = ""
    """Group of tasks that it is averaged in, such as the shifted versions of one test set."""
    train: Task | None = None
    """Images and labels to fit a linear probe on; None if the task has no training split."""
    source: str = ""
    """Path or address that it was read from."""

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ModeclipError(f"task {self.name!r}: {problem}")
        if self.metric not in METRICS:
            raise unknown(f"metric of task {self.name!r}", self.metric, METRICS)

    def _problems(self) -> Iterator[str]:
        """Yield what does not fit together."""
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

    @property
    def exif(self) -> str:
        """Whether its images are turned upright as their EXIF data say: "apply" or "ignore"."""
        return str(getattr(self.images, "exif", "apply"))

    def prompts_of(self, templates: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Return the prompts of each class.

        Args:
            templates: Templates of the evaluation, for a task that has none.
        """
        if self.prompts:
            return self.prompts
        chosen = self.templates or templates
        return tuple(tuple(fill(template, name) for template in chosen) for name in self.classnames)

    @property
    def chance(self) -> float | None:
        """Share of the images that guessing gets right; None where an image may have several labels or none."""
        return 1 / len(self.classnames) if self.labels is not None and self.labels.ndim == 1 else None

    @property
    def majority(self) -> float | None:
        """Share of the images that are of the most frequent class, which naming it always gets right; None as above."""
        if self.labels is None or self.labels.ndim != 1:
            return None
        return float(np.bincount(self.labels).max() / len(self.labels))

    @property
    def digest(self) -> str:
        """Hash of images, class names, labels and texts, but not of templates."""
        content = sha256(f"{self.kind} {self.images.digest} {self.metric}".encode())
        for words in (self.classnames, self.texts):
            content.update("\0".join(words).encode() + b"\1")
        for numbers in (self.labels, self.image_of_text, self.instance_of_image, self.instance_of_text):
            content.update(b"-" if numbers is None else np.ascontiguousarray(numbers, np.int64).tobytes())
        return content.hexdigest()


def _check_numbers(
    field: str, numbers: Int[np.ndarray, " n"] | None, expected: int, limit: int | None
) -> Iterator[str]:
    """Yield what is wrong with the numbers that belong to texts or images."""
    if not expected:
        yield "it has no text"
    elif numbers is None or len(numbers) != expected:
        yield f"expected {expected:,} numbers in {field}, got {0 if numbers is None else len(numbers):,}"
    elif int(numbers.min()) < 0 or (limit is not None and int(numbers.max()) >= limit):
        yield f"{field} is out of range: {int(numbers.min())} to {int(numbers.max())}, expected 0 to {limit or 'n'}"


@dataclass(frozen=True, kw_only=True, eq=False)
class CatalogImages:
    """The images of some rows of a catalog."""

    catalog: Catalog
    """The catalog."""
    rows: Int[np.ndarray, " N"]
    """Row of each image."""
    digest: str = field(init=False)
    """Hash of the encoded bytes of all images in their order."""

    def __post_init__(self) -> None:
        says = json.loads(self.catalog.metadata.get(SETTINGS, "{}")).get("exif")
        start = IGNORED if says == "ignore" else b""
        object.__setattr__(self, "digest", sha256(start + b"".join(self.digests())).hexdigest())

    def digests(self) -> list[bytes]:
        """Return the hash of each image's bytes or, where it is not known, a text that no other row has."""
        found = zip(self.rows.tolist(), self.catalog.digests(self.rows), strict=True)
        return [digest if digest is not None else f"{self.catalog.fingerprint} {row}".encode() for row, digest in found]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def exif(self) -> Exif:
        """Whether the catalog's images are turned upright as their EXIF data say."""
        return self.catalog.exif

    def read(self, rows: Int[np.ndarray, " b"]) -> list[Image]:
        """Return the images of these numbers, decoded, as RGB."""
        return self.catalog.images(self.rows[rows])

    def keys(self) -> list[str]:
        """Return the key of each image in the catalog."""
        return [str(key) for key in self.catalog.read(["key"], self.rows)["key"]]


def catalog_tasks(catalog: Catalog) -> list[Task]:
    """Return the tasks of a catalog, sorted by name. Its column ``task`` names them, ``caption`` holds class names."""
    held = catalog.read(["task"])["task"]
    return [
        catalog_classification(catalog, np.flatnonzero(held == name), str(name))
        for name in sorted(set(held) - {"", None})
    ]


def catalog_classification(catalog: Catalog, rows: Int[np.ndarray, " N"], name: str) -> Task:
    """Return a classification task of rows of a catalog, whose captions are the class names."""
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
    """Return a retrieval task of rows of a catalog. Rows with equal images are several captions of one image."""
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

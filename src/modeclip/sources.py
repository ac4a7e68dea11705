"""A folder of images, a table or tar shards go in; a stream of samples comes out.

Nothing is copied and no image is opened here: a sample says where its image lies. The order of the
stream depends only on names, never on the file system's. What cannot be a sample is yielded as
``Skipped`` with its cause; what makes the whole source useless (no such column, no image at all, a
damaged shard) is a ``ModeclipError``. Tables have open_clip's default columns, ``filepath`` and
``title``; shards are described in ``modeclip.shards``, the built-in icons in ``modeclip.icons``.

Price: the walk alone, without opening images; memory is one folder's listing or one shard's index.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modeclip.errors import ModeclipError
from modeclip.samples import NO_CAPTION, NO_IMAGE, Sample, Skipped, read_caption
from modeclip.shards import read_shards

EXPECTED = (
    "expected the word icons, a folder of images with same-named .txt files, a .csv or .tsv table,"
    " or tar shards (data/{000..009}.tar, a.tar::b.tar, a folder of .tar files)"
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where image-caption pairs come from, and which of them are kept for evaluation."""

    source: str
    """`icons` (built in), a folder of images with same-named .txt files, a .csv or .tsv table, or tar
    shards (`data/{000..009}.tar`, `a.tar::b.tar`, a folder of .tar files)."""
    image_column: str = "filepath"
    """Tables: column of image paths, absolute or relative to the table's folder."""
    caption_column: str = "title"
    """Tables: column of captions."""
    separator: str | None = None
    """Tables: the character between columns; by default tab for .tsv, found in the header for .csv."""
    image_keys: str = "jpg;jpeg;png;webp;gif;bmp"
    """Folders and shards: suffixes of images; the first that is there counts. In shards a suffix is all
    that follows the first dot of a member's name."""
    caption_keys: str = "txt;json"
    """Folders and shards: suffixes of captions; the first that is there counts. Of a json file it is
    the field `caption`."""
    copy_images: bool = False
    """Copy the images into the catalog instead of referring to the files in which they lie."""
    image_size: int = 32
    """Icons: side of the rendered image in pixels."""
    train_sets: tuple[str, ...] = ()
    """Icons: sets to train on; by default material, tabler, phosphor and simple."""
    tasks: tuple[str, ...] = ()
    """Held out as zero-shot tasks. Icons: names of sets. Own data: folders that hold a sub-folder of
    images for each class, written FOLDER or NAME=FOLDER."""
    holdout_fraction: float = 0.0
    """Own data without tasks: share of the pairs that is never trained on and becomes the one task
    `holdout` (class = caption), chosen by a hash of the key; in [0, 1)."""
    max_skipped_fraction: float = 0.05
    """Stop with an error when more than this share of the pairs cannot be used; in [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("image_keys", "caption_keys"):
            if not split_keys(value := getattr(self, name)):
                raise ModeclipError(f"data.{name}: expected suffixes such as 'a;b', got {value!r}")
        if not 0 <= self.holdout_fraction < 1:
            raise ModeclipError(f"data.holdout_fraction: expected a number in [0, 1), got {self.holdout_fraction}")
        if not 0 <= self.max_skipped_fraction <= 1:
            raise ModeclipError(
                f"data.max_skipped_fraction: expected a number in [0, 1], got {self.max_skipped_fraction}"
            )
        if self.image_size < 1:
            raise ModeclipError(f"data.image_size: expected 1 or more, got {self.image_size}")
        if self.separator is not None and len(self.separator) != 1:
            raise ModeclipError(f"data.separator: expected one character, got {self.separator!r}")
        if self.tasks and self.holdout_fraction:
            raise ModeclipError("data.tasks and data.holdout_fraction exclude each other: drop one")


def split_keys(text: str) -> tuple[str, ...]:
    """Return the suffixes of a list such as "jpg;png", in lower case and without dots.

    Examples:
        >>> split_keys("JPG; .png;")
        ('jpg', 'png')
    """
    keys = (key.strip().lstrip(".").lower() for key in text.split(";"))
    return tuple(key for key in keys if key)


def detect(config: DataConfig) -> str:
    """Say what kind of source the data are: "icons", "folder", "table" or "shards".

    Raises:
        ModeclipError: It is none of these.
    """
    source = config.source
    path = Path(source)
    if source == "icons":
        return "icons"
    if "://" in source:
        raise ModeclipError(f"data.source {source!r} is an address: copy the data to a local folder")
    if path.is_dir():
        return "shards" if any(path.glob("*.tar")) else "folder"
    if "::" in source or re.search(r"\.(tar|tgz)\b", source):
        return "shards"
    if not path.exists():
        raise ModeclipError(f"data.source {source!r} does not exist: {EXPECTED}")
    if path.suffix.lower() in (".csv", ".tsv"):
        return "table"
    raise ModeclipError(f"data.source {source!r} is a file of another kind: {EXPECTED}")


def read_source(config: DataConfig) -> Iterator[Sample | Skipped]:
    """Yield every pair of a folder, a table or shards.

    Raises:
        ModeclipError: The source as a whole cannot be used.
    """
    image_keys, caption_keys = split_keys(config.image_keys), split_keys(config.caption_keys)
    kind = detect(config)
    if kind == "folder":
        return _read_folder(Path(config.source).resolve(), image_keys, caption_keys)
    if kind == "table":
        return _read_table(Path(config.source).resolve(), config)
    if kind == "shards":
        return read_shards(config.source, image_keys, caption_keys)
    raise ModeclipError("data.source 'icons' is not a source of files: use icons.read_icons")


def _read_folder(root: Path, image_keys: Sequence[str], caption_keys: Sequence[str]) -> Iterator[Sample | Skipped]:
    """Yield the images of a folder and its sub-folders, with the caption files of the same names."""
    for folder, name, names in _walk_images(root, image_keys):
        group = folder.relative_to(root).as_posix()
        group = "" if group == "." else group
        key = f"{group}/{name}" if group else name
        stem = Path(name).stem
        suffix = next((k for k in caption_keys if f"{stem}.{k}" in names), None)
        if suffix is None:
            yield Skipped(key, NO_CAPTION, f"no {stem}.{'/'.join(caption_keys)} beside it")
            continue
        caption = read_caption((folder / f"{stem}.{suffix}").read_bytes(), suffix, key)
        if isinstance(caption, Skipped):
            yield caption
        else:
            yield Sample(key, caption, path=str(folder / name), group=group)


def _walk_images(root: Path, image_keys: Sequence[str]) -> Iterator[tuple[Path, str, frozenset[str]]]:
    """Yield (folder, image name, all names in that folder), sorted by folder and name.

    Names that begin with a dot are passed over, links to folders not followed (they may form a ring).
    """
    others: Counter[str] = Counter()
    found = False
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        all_names = frozenset(names)
        for name in sorted(name for name in names if not name.startswith(".")):
            suffix = Path(name).suffix.lower()
            if suffix[1:] in image_keys:
                found = True
                yield Path(folder), name, all_names
            else:
                others[suffix or "(none)"] += 1
    if not found:
        seen = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(8))
        raise ModeclipError(
            f"folder {str(root)!r} holds no image: expected files ending in"
            f" {' or '.join(image_keys)}, found {seen or 'no file at all'}; set data.image_keys"
        )


def read_task(config: DataConfig, task: str) -> Iterator[Sample | Skipped]:
    """Yield the images of an entry of `data.tasks`; the caption is the class, the sub-folder's name.

    Raises:
        ModeclipError: The folder does not exist or holds no image.
    """
    name, folder = split_task(task)
    root = Path(folder).resolve()
    if not root.is_dir():
        raise ModeclipError(
            f"task {name!r}: folder {folder!r} does not exist; data.tasks expects FOLDER or"
            " NAME=FOLDER, with a sub-folder of images for each class"
        )
    for place, file, _ in _walk_images(root, split_keys(config.image_keys)):
        relative = (place / file).relative_to(root)
        if place == root:
            yield Skipped(f"{name}/{file}", NO_CAPTION, "not in the sub-folder of a class")
        else:
            key = f"{name}/{relative.as_posix()}"
            yield Sample(key, relative.parts[0], path=str(place / file), group=name)


def split_task(task: str) -> tuple[str, str]:
    """Split an entry of `data.tasks` into the task's name and its folder.

    Examples:
        >>> split_task("birds=eval/cub"), split_task("eval/pets")
        (('birds', 'eval/cub'), ('pets', 'eval/pets'))
    """
    name, equals, folder = task.partition("=")
    return (name, folder) if equals else (Path(task).name, task)


def _read_table(table: Path, config: DataConfig) -> Iterator[Sample | Skipped]:
    """Yield the rows of a CSV or TSV table that begins with a header."""
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        separator = config.separator or _find_separator(table, file.readline(1 << 20), config)
        file.seek(0)
        reader = csv.reader(file, delimiter=separator)
        try:
            header = next(reader, [])
            image_column = _find_column(header, "image", config.image_column, table)
            caption_column = _find_column(header, "caption", config.caption_column, table)
            for row in filter(None, reader):  # a blank line is no row
                row += [""] * (len(header) - len(row))
                image, caption = row[image_column].strip(), row[caption_column].strip()
                line = f"{table.name} line {reader.line_num}"
                if not image:
                    yield Skipped(line, NO_IMAGE, f"column {config.image_column} is empty")
                elif not caption:
                    yield Skipped(image, NO_CAPTION, f"{line}: {config.caption_column} is empty")
                else:
                    yield Sample(image, caption, path=str(table.parent / image))
        except csv.Error as error:
            raise ModeclipError(
                f"table {str(table)!r}, line {reader.line_num}: {error}; correct the quotes or set data.separator"
            ) from error


def _find_separator(table: Path, header: str, config: DataConfig) -> str:
    """Return the separator that splits a header into the wanted columns, or else into most."""
    if table.suffix.lower() == ".tsv":
        return "\t"

    def fit(separator: str) -> tuple[int, int]:
        columns = next(csv.reader([header], delimiter=separator), [])
        wanted = {config.image_column, config.caption_column}
        return len(wanted & set(columns)), len(columns)

    return max("\t,;|", key=fit)


def _find_column(header: list[str], kind: str, name: str, table: Path) -> int:
    if not header:
        raise ModeclipError(f"table {str(table)!r} is empty: expected a header and rows")
    if name not in header:
        raise ModeclipError(
            f"table {str(table)!r} has no {kind} column {name!r}; its columns are"
            f" {', '.join(header)}; set data.{kind}_column (or data.separator)"
        )
    return header.index(name)

"""Retrieval and selection tasks that a JSON file of annotations describes.

It may hold COCO's captions, Karpathy's splits of COCO or Flickr30k (only the images of the split "test" are used), or
SugarCrepe's captions. The images lie beside the file or in a folder beside it.

Source: COCO; Karpathy and Fei-Fei (arXiv 1412.2306), dataset_*.json; SugarCrepe (arXiv 2306.14610).

Price: the file is read as a whole, and the folders of the images are listed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from modeclip.data.tasks.layouts import Found
from modeclip.data.tasks.tables import NEGATIVE, TaskTable, file_images, negatives, retrieval_task
from modeclip.errors import ModeclipError
from modeclip.system.paths import join, parent, read_bytes


def read_annotations(name: str, path: str) -> Found:
    """Read COCO's captions, Karpathy's splits of COCO or Flickr30k, or SugarCrepe's captions.

    Raises:
        ModeclipError: The file holds none of these, or an image is missing.
    """
    try:
        content = json.loads(read_bytes(path))
        if isinstance(content, dict) and "annotations" in content:
            file_of = {image["id"]: image["file_name"] for image in content["images"]}
            pairs = [(file_of[each["image_id"]], each["caption"]) for each in content["annotations"]]
            return _captioned(name, path, list(dict.fromkeys(file_of.values())), pairs)
        if isinstance(content, dict) and isinstance(content.get("images"), list):
            images = [image for image in content["images"] if image["split"] == "test"]
            files = [join(image.get("filepath", ""), image["filename"]) for image in images]
            pairs = [
                (file, sentence["raw"])
                for file, image in zip(files, images, strict=True)
                for sentence in image["sentences"]
            ]
            return _captioned(name, path, files, pairs)
        entries = list(content.values()) if isinstance(content, dict) else content
        columns = {"image": "filename", "caption": "caption", NEGATIVE: NEGATIVE}
        table = TaskTable(path=path, values={to: [entry[old] for entry in entries] for to, old in columns.items()})
    except FileNotFoundError as error:
        raise ModeclipError(f"task {name!r}: {path!r} does not exist") from error
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModeclipError(
            f"task {name!r}: {path!r} holds no known annotations ({error!r}): expected COCO's captions, Karpathy's"
            " splits, or SugarCrepe's captions"
        ) from error
    return negatives(name, table, np.arange(len(table)), "image", "caption")


def _captioned(name: str, path: str, files: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Found:
    if len(set(files)) < len(files):
        twice = next(file for number, file in enumerate(files) if file in files[:number])
        raise ModeclipError(f"task {name!r}: {path!r} has image {twice!r} twice: remove one")
    number_of = {file: number for number, file in enumerate(files)}
    kept = [(number_of[file], text.strip()) for file, text in pairs if text.strip()]
    if not kept:
        raise ModeclipError(f'task {name!r}: {path!r} holds no captions, or none of the split "test"')
    kept.sort(key=lambda pair: pair[0])
    images = file_images(name, parent(path), files, files)
    return retrieval_task(name, images, [text for _, text in kept], [owner for owner, _ in kept], path)

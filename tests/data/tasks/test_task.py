"""A task whose parts do not fit together is refused; its hash says whether two ask the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeclip.data.tasks.images import FileImages
from modeclip.data.tasks.task import Task
from modeclip.errors import ModeclipError
from support import encode_picture, noise_picture


def picture(seed: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    return noise_picture(seed, size[::-1])


def some_images(folder: Path, count: int = 3, kind: str = "png") -> FileImages:
    paths = [folder / f"{number}.{kind}" for number in range(count)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    return FileImages(task="toy", names=[path.name for path in paths], paths=[str(path) for path in paths])


def classification(images: FileImages, **changes: object) -> Task:
    fields = {"classnames": ("a", "b"), "labels": np.array([0, 1, 1])} | changes
    return Task(name="toy", kind="classification", images=images, **fields)


def test_images_are_read_by_number_as_rgb(tmp_path):
    images = some_images(tmp_path)
    found = images.read(np.array([2, 0, 2]))
    assert [image.mode for image in found] == ["RGB"] * 3
    assert [np.asarray(image).tolist() for image in found] == [np.asarray(picture(n)).tolist() for n in (2, 0, 2)]


def test_grey_transparent_and_palette_images_become_rgb(tmp_path):
    kinds = {"L": 100, "RGBA": (0, 0, 0, 0), "P": 3, "1": 1, "CMYK": (0, 0, 0, 0)}
    paths = [tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}" for mode in kinds]
    for path, (mode, color) in zip(paths, kinds.items(), strict=True):
        Image.new(mode, (4, 4), color).save(path)
    images = FileImages(task="toy", names=list(kinds), paths=list(map(str, paths)))
    found = images.read(np.arange(len(kinds)))
    assert {image.mode for image in found} == {"RGB"}
    assert found[1].getpixel((0, 0)) == (255, 255, 255)


def test_the_hash_tells_images_labels_and_words_apart(tmp_path):
    images = some_images(tmp_path)
    same = classification(some_images(tmp_path))
    assert same.digest == classification(images).digest
    other = [
        classification(images, labels=np.array([1, 0, 1])),
        classification(images, classnames=("a", "c")),
        classification(images, metric="mean_per_class_recall"),
        Task(name="toy", kind="retrieval", images=images, texts=("a",), image_of_text=np.array([1])),
    ]
    assert len({task.digest for task in [same, *other]}) == 5
    assert classification(images, templates=("my {}",)).digest == same.digest


def test_the_hash_of_images_follows_their_bytes_and_order(tmp_path):
    images = some_images(tmp_path)
    turned = FileImages(task="toy", names=images.names[::-1], paths=images.paths[::-1])
    assert images.digest != turned.digest
    before = images.digest
    picture(9).save(images.paths[1])
    assert FileImages(task="other", names=images.names, paths=images.paths).digest != before


def test_the_hash_of_many_images_is_that_of_one_thread(tmp_path, monkeypatch):
    images = some_images(tmp_path, 40)
    alone = images.digests()
    monkeypatch.setattr("modeclip.data.images.HASHES_PER_TASK", 3)
    monkeypatch.setattr("modeclip.data.images.MANY_IMAGES", 2)
    assert images.digests() == alone


def test_byte_ranges_are_read_and_an_early_end_is_an_error(tmp_path):
    data = encode_picture(picture(1))
    (tmp_path / "all").write_bytes(b"junk" + data + b"more")
    at, size = np.array([4, 4]), np.array([len(data), len(data) + 100])
    images = FileImages(task="toy", names=["x", "y"], paths=[str(tmp_path / "all")] * 2, offsets=at, sizes=size)
    assert np.array_equal(np.asarray(images.read(np.array([0]))[0]), np.asarray(picture(1)))
    with pytest.raises(ModeclipError, match="'toy': image 'y'"):
        images.read(np.array([1]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing; replace"),
        (b"", "is empty: replace"),
        (b"\x89PNG\r\n\x1a\n torn", "does not decode; replace"),
    ],
)
def test_a_damaged_image_is_named_with_its_cause(tmp_path, content, words):
    images = some_images(tmp_path)
    Path(images.paths[1]).unlink()
    if content is not None:
        Path(images.paths[1]).write_bytes(content)
    with pytest.raises(ModeclipError, match=rf"^task 'toy': image '1.png'.*{words}[^\n]*$"):
        images.read(np.array([0, 1]))


def test_a_missing_image_stops_the_hash(tmp_path):
    images = some_images(tmp_path)
    Path(images.paths[2]).unlink()
    with pytest.raises(ModeclipError, match=r"'2\.png': image file is missing"):
        _ = images.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.array([0, 1, 2])}, r"label 2 of image '2\.png'.*expected 0 to 1 for 2"),
        ({"labels": np.array([0, -1, 1])}, r"label -1 of image '1.png' is out of range"),
        ({"labels": np.array([0, 1])}, r"3 images of 2 classes have labels of shape \(2,\)"),
        ({"labels": np.zeros((3, 5), bool)}, r"labels of shape \(3, 5\)"),
        ({"labels": None}, "needs class names and labels"),
        ({"classnames": ()}, "needs class names and labels"),
        ({"prompts": (("x",),)}, "prompts for each of 2 classes, got 1"),
        ({"metric": "accuracy"}, "unknown metric of task 'toy' 'accuracy'; known: acc1"),
    ],
)
def test_a_classification_that_does_not_fit_is_refused(tmp_path, changes, words):
    with pytest.raises(ModeclipError, match=words):
        classification(some_images(tmp_path), **changes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "retrieval"}, "it has no text"),
        ({"kind": "retrieval", "texts": ("a", "b"), "image_of_text": np.array([0])}, "expected 2 numbers .* got 1"),
        (
            {"kind": "retrieval", "texts": ("a",), "image_of_text": np.array([3])},
            "image_of_text is out of range: 3 to 3",
        ),
        ({"kind": "selection", "texts": ("a",), "instance_of_text": np.array([0])}, "instance_of_image, got 0"),
    ],
)
def test_other_tasks_that_do_not_fit_are_refused(tmp_path, fields, words):
    with pytest.raises(ModeclipError, match=words):
        Task(name="toy", images=some_images(tmp_path), **fields)


def test_no_image_is_no_task():
    images = FileImages(task="toy", names=[], paths=[])
    with pytest.raises(ModeclipError, match="'toy': it has no image"):
        Task(name="toy", kind="classification", images=images, classnames=("a",), labels=np.array([], np.int64))


def test_prompts_are_the_classes_own_or_from_templates(tmp_path):
    images = some_images(tmp_path)
    assert classification(images).prompts_of(["a {}"]) == (("a a",), ("a b",))
    assert classification(images, templates=("my {}",)).prompts_of(["a {}"]) == (("my a",), ("my b",))
    own = (("one",), ("two", "three"))
    assert classification(images, prompts=own).prompts_of(["a {}"]) == own

"""Sets that CLIP_benchmark's own converter wrote are read as CLIP_benchmark reads them; damaged ones are refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modeclip.data.tasks.open import load_tasks
from modeclip.errors import ModeclipError
from support import encode_picture, tar_of

pytest.importorskip("clip_benchmark")

PEER = """
import json, sys, warnings
import numpy as np, torch
from PIL import Image
warnings.simplefilter("ignore")
from clip_benchmark.datasets.builder import build_wds_dataset
from clip_benchmark.webdataset_builder import PIL_to_bytes, convert_dataset, convert_retrieval_dataset

Loader = torch.utils.data.DataLoader  # eight processes for each set by default
torch.utils.data.DataLoader = lambda *given, **named: Loader(*given, **(named | {"num_workers": 0}))

class Pairs(list):
    pass

root = sys.argv[1]
draw = np.random.default_rng(0)
pictures = [Image.fromarray(draw.integers(0, 256, (8 + n % 3, 9, 3), dtype=np.uint8)) for n in range(23)]
classes, templates = ["tabby cat", "dog", "fire-truck"], ["a photo of a {c}.", "{c}"]

def pairs(labels, named=True):
    made = Pairs(zip(pictures, labels))
    if named:
        made.classes, made.templates = classes, templates
    return made

numbers = [n % 3 for n in range(23)]
hot = [torch.tensor([n % 2, 1, n % 3 == 0]).int() for n in range(23)]
captions = [[f"picture {n}, number {k}" for k in range(1 + n % 3)] for n in range(23)]
write = dict(transform=PIL_to_bytes("png"), image_format="png", max_count=10, verbose=False)
convert_dataset(pairs(numbers), "test", f"{root}/wds_plain", **write)
convert_dataset(pairs(numbers[:5]), "train", f"{root}/wds_plain", **write)
convert_dataset(pairs(hot), "test", f"{root}/wds_multi", multilabel=True, **write)
convert_retrieval_dataset(pairs(captions, False), "test", f"{root}/wds_captions", **write)
found = {}

def pixels(image):
    return np.asarray(image.convert("RGB")).tolist()

for name in ("plain", "multi", "captions"):
    data = build_wds_dataset(name, pixels, data_dir=f"{root}/wds_{name}")
    items = [(image, np.asarray(label).tolist()) for image, label in data]
    found[name] = {"classes": data.classes, "templates": data.templates, "items": items}
json.dump(found, open(f"{root}/found.json", "w"))
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets as the installed converter writes them, and what the package itself reads from them."""
    root = tmp_path_factory.mktemp("converted")
    done = subprocess.run(
        [sys.executable, "-c", PEER, str(root)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def sets(converted: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    shutil.copytree(converted, tmp_path / "sets")
    return tmp_path / "sets"


def theirs(root: Path, name: str) -> dict[str, object]:
    return json.loads((root / "found.json").read_text())[name]


def pixels(task) -> list[object]:
    return [np.asarray(image).tolist() for image in task.images.read(np.arange(len(task.images)))]


@pytest.mark.slow
def test_classification_is_read_as_the_package_reads_it(converted):
    (task,) = load_tasks([str(converted / "wds_plain")])
    peer = theirs(converted, "plain")
    assert task.name == "plain"
    assert list(task.classnames) == peer["classes"]
    assert list(task.templates) == peer["templates"]
    assert pixels(task) == [image for image, _ in peer["items"]]
    assert task.labels.tolist() == [label for _, label in peer["items"]]
    assert task.images.keys()[:2] == ["s0000000", "s0000001"]
    assert task.metric == "acc1"
    assert task.train is None


def test_several_labels_an_image_are_read_as_the_package_reads_them(converted):
    (task,) = load_tasks([str(converted / "wds_multi")])
    peer = theirs(converted, "multi")
    assert task.labels.dtype == bool
    assert task.labels.astype(int).tolist() == [label for _, label in peer["items"]]
    assert task.metric == "mean_average_precision"


def test_captions_are_read_as_the_package_reads_them(converted):
    (task,) = load_tasks([str(converted / "wds_captions")])
    peer = theirs(converted, "captions")
    assert task.kind == "retrieval"
    assert list(task.texts) == [text for _, texts in peer["items"] for text in texts]
    assert task.image_of_text.tolist() == [n for n, (_, texts) in enumerate(peer["items"]) for _ in texts]
    assert pixels(task) == [image for image, _ in peer["items"]]


def test_the_training_split_lies_beside_the_test_split(converted):
    (task,) = load_tasks([str(converted / "wds_plain")], train=True)
    assert task.train.labels.tolist() == [0, 1, 2, 0, 1]
    assert task.train.classnames == task.classnames
    assert pixels(task.train) == pixels(task)[:5]


def test_the_folder_of_the_shards_is_the_same_task(converted):
    (whole, part) = load_tasks([f"x={converted}/wds_plain", str(converted / "wds_plain" / "test")])
    assert (part.name, part.classnames, part.digest) == ("plain", whole.classnames, whole.digest)


def test_the_same_images_have_the_same_hash_in_shards_and_in_folders(converted, tmp_path):
    (task,) = load_tasks([str(converted / "wds_plain")])
    for shard in sorted((converted / "wds_plain" / "test").glob("*.tar")):
        with tarfile.open(shard) as tar:
            options: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
            tar.extractall(tmp_path / "a", **options)
    for label in (tmp_path / "a").glob("*.cls"):
        label.unlink()
    (folder,) = load_tasks([str(tmp_path)])
    assert folder.images.digest == task.images.digest


def damage(root: Path, kind: str) -> Path:
    """Do to a set what happens to sets; return its folder."""
    plain, test = root / "wds_plain", root / "wds_plain" / "test"
    if kind == "no number of shards":
        (test / "nshards.txt").unlink()
    elif kind == "odd number of shards":
        (test / "nshards.txt").write_text("three\n")
    elif kind == "missing shard":
        (test / "1.tar").unlink()
    elif kind == "torn shard":
        (test / "1.tar").write_bytes((test / "1.tar").read_bytes()[:5000])
    elif kind == "label":
        (plain / "classnames.txt").write_text("cat\ndog\n")
    elif kind == "blank line":
        (plain / "classnames.txt").write_text("cat\n\ndog\n")
    elif kind == "not UTF-8":
        (plain / "classnames.txt").write_bytes(b"caf\xe9\ndog\nc\n")
    elif kind == "empty file":
        (plain / "classnames.txt").write_text("\n")
    elif kind == "no names":
        (plain / "classnames.txt").unlink()
    elif kind == "prompt":
        (plain / "zeroshot_classification_templates.txt").write_text("a {c}\na photo\n")
    elif kind == "type":
        (plain / "dataset_type.txt").write_text("captioning\n")
    return plain


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no number of shards", r"nshards\.txt' is missing.*number of shards"),
        ("odd number of shards", r"nshards.txt' says 'three'"),
        ("missing shard", r"1.tar' is missing \(1 of 3 shards\)"),
        ("torn shard", r"1.tar' cannot be read: .*download it again"),
        ("label", "label 2 of image 's0000002'.*expected 0 to 1 for 2"),
        ("blank line", r"classnames.txt': line 2 is blank"),
        ("not UTF-8", r"classnames.txt' is not UTF-8"),
        ("empty file", r"classnames.txt' is empty"),
        ("no names", r"labels are numbers.*classnames.txt beside"),
        ("prompt", r"template 'a photo' has no \{\}"),
        ("type", "type in .*'captioning'.*known: classification, multilabel, retrieval"),
    ],
)
def test_a_damaged_set_is_one_line(sets, kind, words):
    with pytest.raises(ModeclipError, match=words) as caught:
        load_tasks([str(damage(sets, kind))])
    assert "\n" not in str(caught.value)


def write_shard(root: Path, members: list[tuple[str, bytes]], kind: str = "") -> Path:
    """Write a set of one shard by hand."""
    (root / "test").mkdir(parents=True, exist_ok=True)
    (root / "test" / "nshards.txt").write_text("1\n")
    (root / "classnames.txt").write_text("cat\ndog\n")
    if kind:
        (root / "dataset_type.txt").write_text(kind)
    (root / "test" / "0.tar").write_bytes(tar_of(members))
    return root


def encoded(color: int = 0, kind: str = "PNG") -> bytes:
    return encode_picture(Image.new("RGB", (5, 5), (color, color, color)), kind)


def npy(*values: float) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values))
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "members", "words"),
    [
        ("", [("a.png", encoded()), ("a.cls", b"cat")], r"label of 'a' is b'cat', expected a number"),
        ("", [("a.png", encoded())], r"sample 'a' of .*no \.cls.*add it or remove"),
        ("", [("a.cls", b"0")], r"sample 'a' of .*no \.webp or \.png.*add it or remove"),
        ("", [("a.png", encoded()), ("a.cls", b"0"), ("a.png", encoded())], r"has a.png twice"),
        ("", [("a.png", encoded()), ("a.cls", b"0"), ("a.cls", b"0")], r"has a.cls twice"),
        ("", [], r"hold no sample"),
        ("multilabel", [("a.png", encoded()), ("a.npy", b"x")], r"label of 'a' is not a .npy array"),
        ("multilabel", [("a.png", encoded()), ("a.npy", npy(0, 2))], r"label of 'a' has shape \(2,\).*all 0 or 1"),
        ("multilabel", [("a.png", encoded()), ("a.npy", npy(0, 1, 1))], r"labels have 3 numbers.*has 2 lines"),
        ("retrieval", [("a.png", encoded()), ("a.txt", b" \n")], r"image 'a' has no caption"),
        ("retrieval", [("a.png", encoded()), ("a.txt", b"\xff")], r"captions of 'a' are not UTF-8"),
    ],
)
def test_a_damaged_sample_is_one_line(tmp_path, kind, members, words):
    with pytest.raises(ModeclipError, match=words):
        load_tasks([str(write_shard(tmp_path / "x", members, kind))])


def test_members_need_not_be_neighbours_and_the_first_image_type_counts(tmp_path):
    members = [
        ("a.jpg", encoded(9, "JPEG")),
        ("b.png", encoded(7)),
        ("a.cls", b"1\n"),
        ("b.cls", b"0"),
        ("a.png", encoded(8)),
    ]
    (task,) = load_tasks([str(write_shard(tmp_path / "x", members))])
    assert task.labels.tolist() == [1, 0]
    assert [image.getpixel((0, 0))[0] for image in task.images.read(np.arange(2))] == [8, 7]


def test_names_that_return_in_another_shard_are_told_apart(tmp_path):
    root = write_shard(tmp_path / "x", [("a.png", encoded(1)), ("a.cls", b"0")])
    shutil.copy(root / "test" / "0.tar", root / "test" / "1.tar")
    (root / "test" / "nshards.txt").write_text("2")
    (task,) = load_tasks([str(root)])
    assert task.images.keys() == ["a", "1/a"]


def test_blank_captions_are_left_out(tmp_path):
    (task,) = load_tasks(
        [str(write_shard(tmp_path / "x", [("a.png", encoded()), ("a.txt", b"one\n\n two \n")], "retrieval"))]
    )
    assert task.texts == ("one", "two")


def test_prompts_of_each_class_come_from_json(tmp_path):
    root = write_shard(tmp_path / "x", [("a.png", encoded()), ("a.cls", b"0")])
    file = root / "zeroshot_classification_templates.json"
    file.write_text(json.dumps({"cat": ["it purrs", "a {c}"], "dog": "it barks"}))
    (task,) = load_tasks([str(root)])
    assert task.prompts == (("it purrs", "a cat"), ("it barks",))
    for content, words in [
        ('{"cat": ["x"]}', "has no prompts for class 'dog'"),
        ('{"cat": ["x"], "dog": [3]}', "prompts of class 'dog'.*not a list"),
        ("3", "expected a list of prompts"),
        ("{", "is not JSON"),
    ]:
        file.write_text(content)
        with pytest.raises(ModeclipError, match=words):
            load_tasks([str(root)])

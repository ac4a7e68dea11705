"""Tables and annotations become the tasks that they describe; what they lack is said in one line."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeclip.data.tasks.open import load_tasks
from modeclip.errors import ModeclipError
from support import plain_png


def encoded(color: int) -> bytes:
    return plain_png((color, 0, 0))


def colors(images) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in images.read(np.arange(len(images)))]


def save_images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(number + 1))


def load(path: Path, **options):
    (task,) = load_tasks([str(path)], **options)
    return task


def table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


# ---------------------------------------------------------------- CSV and its like


def test_a_csv_of_paths_and_classes(tmp_path):
    save_images(tmp_path / "pictures", "x.png", "y.png", "z.png")
    (tmp_path / "birds.csv").write_text("filepath,label\npictures/z.png,a wren\nx.png,crow\ny.png,a wren\n")
    task = load(tmp_path / "birds.csv")
    assert (task.name, task.kind, task.metric) == ("birds", "classification", "acc1")
    assert task.classnames == ("a wren", "crow")
    assert task.labels.tolist() == [0, 1, 0]
    assert colors(task.images) == [3, 1, 2]
    assert task.images.keys() == ["pictures/z.png", "x.png", "y.png"]


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "csv"])
def test_rows_that_share_an_image_are_one_image_with_several_captions(tmp_path, kind):
    save_images(tmp_path, "x.png", "y.png")
    rows = [("x.png", "one, with a comma"), ("y.png", "two"), ("x.png", "three")]
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"image": image, "caption": text}) for image, text in rows))
    elif kind == "tsv":
        path.write_text("image\tcaption\n" + "".join(f"{image}\t{text}\n" for image, text in rows))
    else:
        path.write_text("image,caption\n" + "".join(f'{image},"{text}"\n' for image, text in rows))
    task = load(path)
    assert task.kind == "retrieval"
    assert task.texts == ("one, with a comma", "two", "three")
    assert task.image_of_text.tolist() == [0, 1, 0]
    assert colors(task.images) == [1, 2]


def test_captions_beside_labels_are_asked_for_with_retrieval(tmp_path):
    save_images(tmp_path, "x.png", "y.png")
    (tmp_path / "t.csv").write_text("image,label,caption\nx.png,cat,one\ny.png,dog,two\n")
    assert load(tmp_path / "t.csv").kind == "classification"
    (task,) = load_tasks([f"retrieval:pets2={tmp_path}/t.csv"])
    assert (task.name, task.texts) == ("pets2", ("one", "two"))


def test_numbers_are_told_by_classnames(tmp_path):
    save_images(tmp_path, "x.png", "y.png")
    (tmp_path / "t.csv").write_text("image,label\nx.png,1\ny.png,0\n")
    with pytest.raises(ModeclipError, match=r"'t': labels are numbers.*classnames.txt"):
        load(tmp_path / "t.csv")
    (tmp_path / "classnames.txt").write_text("cat\ndog\nnewt\n")
    task = load(tmp_path / "t.csv")
    assert task.classnames == ("cat", "dog", "newt")
    assert task.labels.tolist() == [1, 0]
    (tmp_path / "t.csv").write_text("image,label\nx.png,1\ny.png,3\n")
    with pytest.raises(ModeclipError, match=r"label 3 of image 'y\.png'.*expected 0 to 2 for 3"):
        load(tmp_path / "t.csv")


def test_a_column_tells_training_from_testing(tmp_path):
    save_images(tmp_path, "x.png", "y.png", "z.png")
    (tmp_path / "t.csv").write_text("image,label,split\nx.png,cat,test\ny.png,dog,train\nz.png,cat,train\n")
    with pytest.raises(ModeclipError, match=r"training split.*'dog'.*test split lacks.*remove it"):
        load(tmp_path / "t.csv", train=True)
    (tmp_path / "t.csv").write_text("image,label,split\nx.png,cat,test\ny.png,dog,test\nz.png,dog,train\n")
    task = load(tmp_path / "t.csv", train=True)
    assert task.labels.tolist() == [0, 1]
    assert task.train.classnames == ("cat", "dog")
    assert task.train.labels.tolist() == [1]
    assert load(tmp_path / "t.csv").train is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("image,label\n", "has no rows"),
        ("picture,label\nx.png,cat\n", "no column filepath.*picture, label.*rename one"),
        ("image,kind\nx.png,cat\n", "no column label or caption.*image, kind.*rename one"),
        ("image,label\nx.png,\n", r"column 'label' of row 1 is empty"),
        ("image,label\nx.png,a\n,b\n", r"column 'image' of row 2 is empty"),
        ("image,label\nx.png,a,b\n", r"line 2: 3 cells where the header has 2"),
        ("image,label\nx.png\n", r"line 2: 1 cell where the header has 2"),
        ('image,label\n"x.png,a\n', r"line 2: a quote is not closed"),
        ("image,label\nq.png,a\n", r"image 'q\.png'.*1 of 1 images are missing.*put the images"),
        ("image,label\nhttps://host/x.png,a\n", r"holds addresses.*img2dataset"),
        ("image,caption\nx.png,a\nx.png,\n", r"column 'caption' of row 2 is empty"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path, text, words):
    save_images(tmp_path, "x.png")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ModeclipError, match=words) as caught:
        load(tmp_path / "t.csv")
    assert "\n" not in str(caught.value)


def test_columns_may_be_separated_as_in_sources(tmp_path):
    save_images(tmp_path, "x.png", "y.png")
    (tmp_path / "t.csv").write_text("image;label\nx.png;a, b\ny.png;c\n")
    assert load(tmp_path / "t.csv").classnames == ("a, b", "c")
    (tmp_path / "t.csv").write_bytes("image,label\nx.png,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ModeclipError, match=r"line 2 is not UTF-8; save the table"):
        load(tmp_path / "t.csv")


@pytest.mark.parametrize("content", [b"{", b"3\n", b"[1, 2]\n", b"\xff\xfe"])
def test_lines_that_are_no_json_are_one_line(tmp_path, content):
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(ModeclipError, match=r"t.jsonl' cannot be read"):
        load(tmp_path / "t.jsonl")


# ---------------------------------------------------------------- Parquet


def test_encoded_images_are_read_from_several_files_and_row_groups(tmp_path):
    for number in range(2):
        data = [{"bytes": encoded(5 * number + n), "path": None} for n in range(5)]
        table(tmp_path / f"test-{number}.parquet", image=data, label=[f"c{n % 2}" for n in range(5)])
    table(tmp_path / "train-0.parquet", image=[{"bytes": encoded(99), "path": None}], label=["c1"])
    task = load(tmp_path, train=True)
    assert colors(task.images) == list(range(10))
    assert task.labels.tolist() == [0, 1, 0, 1, 0] * 2
    assert colors(task.train.images) == [99]
    assert task.train.labels.tolist() == [1]


def test_many_threads_read_the_same_images(tmp_path):
    task = load(table(tmp_path / "t.parquet", image=[encoded(n) for n in range(24)], label=["a", "b"] * 12))
    orders = [np.random.default_rng(seed).permutation(24) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for order, images in zip(orders, pool.map(task.images.read, orders), strict=True):
            assert [image.getpixel((0, 0))[0] for image in images] == order.tolist()


def test_class_labels_of_hugging_face_have_names(tmp_path):
    made = pa.table({"image": [encoded(1), encoded(2)], "label": [1, 0]})
    info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog", "newt"]}}}}
    pq.write_table(made.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "t.parquet")
    task = load(tmp_path / "t.parquet")
    assert task.classnames == ("cat", "dog", "newt")
    assert task.labels.tolist() == [1, 0]


def test_lists_of_labels_are_several_classes_an_image(tmp_path):
    task = load(table(tmp_path / "t.parquet", image=[encoded(1), encoded(2)], label=[["dog", "cat"], ["dog"]]))
    assert task.classnames == ("cat", "dog")
    assert task.labels.tolist() == [[True, True], [False, True]]
    assert task.metric == "mean_average_precision"


def test_numbers_in_lists_of_labels_must_be_in_range(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    path = table(tmp_path / "t.parquet", image=[encoded(1)], label=[[0, 2]])
    with pytest.raises(ModeclipError, match=r"labels \[0, 2\] of image '0'.*expected 0 to 1$"):
        load(path)


def test_lists_of_captions_and_equal_images_are_told_apart(tmp_path):
    path = table(
        tmp_path / "t.parquet", image=[encoded(1), encoded(1), encoded(2)], caption=[["a", "b"], ["c"], ["d", " "]]
    )
    task = load(path)
    assert task.texts == ("a", "b", "c", "d")
    assert task.image_of_text.tolist() == [0, 0, 0, 1]
    assert colors(task.images) == [1, 2]


def test_an_image_without_caption_is_named(tmp_path):
    path = table(tmp_path / "t.parquet", image=[encoded(1), encoded(2)], caption=[["a"], [""]], key=["k1", "k2"])
    with pytest.raises(ModeclipError, match=r"'k2' has no caption \(1 such.*give it one or remove"):
        load(path)


def test_a_damaged_image_in_a_table_is_named(tmp_path):
    task = load(table(tmp_path / "t.parquet", image=[encoded(1), b"torn"], label=["a", "b"], key=["k1", "k2"]))
    with pytest.raises(ModeclipError, match=r"'t'.*'k2'.*does not decode.*replace it"):
        task.images.read(np.arange(2))


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(ModeclipError, match=r"t.parquet' cannot be read") as caught:
        load(tmp_path / "t.parquet")
    assert "\n" not in str(caught.value)


def test_tables_of_different_columns_do_not_follow_one_another(tmp_path):
    table(tmp_path / "test-0.parquet", image=[encoded(1)], label=["a"])
    table(tmp_path / "test-1.parquet", image=[encoded(1)], caption=["a"])
    with pytest.raises(ModeclipError, match="have different columns"):
        load(tmp_path)


def test_several_tables_must_be_told_apart(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("image,label\n")
    with pytest.raises(ModeclipError, match=r"holds several tables \(a.csv, b.csv\): name one"):
        load(tmp_path)


# ---------------------------------------------------------------- selection


def test_winoground_as_hugging_face_has_it(tmp_path):
    count = 5
    columns = {f"image_{k}": [{"bytes": encoded(10 * n + k), "path": ""} for n in range(count)] for k in (0, 1)}
    columns |= {f"caption_{k}": [f"text {n} {k}" for n in range(count)] for k in (0, 1)}
    (tmp_path / "winoground" / "data").mkdir(parents=True)
    table(tmp_path / "winoground" / "data" / "test-00000-of-00001.parquet", id=list(range(count)), **columns)
    (task,) = load_tasks(["winoground"], root=str(tmp_path))
    assert task.kind == "selection"
    assert colors(task.images) == [10 * n + k for n in range(count) for k in (0, 1)]
    assert task.texts == tuple(f"text {n} {k}" for n in range(count) for k in (0, 1))
    assert task.instance_of_image.tolist() == task.instance_of_text.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert task.images.keys()[:3] == ["0/image_0", "0/image_1", "1/image_0"]


def test_winoground_as_lines_beside_its_images(tmp_path):
    save_images(tmp_path / "winoground" / "images", "ex_0_img_0.png", "ex_0_img_1.png")
    line = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "a", "caption_1": "b"}
    (tmp_path / "winoground" / "examples.jsonl").write_text(json.dumps(line))
    (task,) = load_tasks(["winoground"], root=str(tmp_path))
    assert colors(task.images) == [1, 2]


def test_sugarcrepe(tmp_path):
    folder = tmp_path / "sugarcrepe"
    save_images(folder / "val2017", "1.jpg", "2.jpg")
    entries = {
        "0": {"filename": "1.jpg", "caption": "right", "negative_caption": "wrong"},
        "7": {"filename": "2.jpg", "caption": "yes", "negative_caption": "no"},
    }
    (folder / "swap_att.json").write_text(json.dumps(entries))
    (task,) = load_tasks(["sugarcrepe-swap_att"], root=str(tmp_path))
    assert (task.name, task.kind, task.group) == ("sugarcrepe-swap_att", "selection", "sugarcrepe")
    assert task.texts == ("right", "wrong", "yes", "no")
    assert task.instance_of_image.tolist() == [0, 1]
    assert task.instance_of_text.tolist() == [0, 0, 1, 1]
    with pytest.raises(ModeclipError, match=r"6 of 7 tasks.*'sugarcrepe'.*no data.*put .*val2017"):
        load_tasks(["sugarcrepe"], root=str(tmp_path))
    entries["7"]["negative_caption"] = " "
    (folder / "swap_att.json").write_text(json.dumps(entries))
    with pytest.raises(ModeclipError, match="of row 2 is empty"):
        load_tasks(["sugarcrepe-swap_att"], root=str(tmp_path))


# ---------------------------------------------------------------- retrieval by name


def test_coco_as_karpathy_split_it(tmp_path):
    save_images(tmp_path / "coco" / "val2014", "1.jpg", "2.jpg", "3.jpg")
    images = [
        {
            "filepath": "val2014",
            "filename": f"{n}.jpg",
            "split": split,
            "sentences": [{"raw": f"{n} a"}, {"raw": f"{n} b"}],
        }
        for n, split in ((1, "train"), (2, "test"), (3, "test"))
    ]
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    (task,) = load_tasks(["coco"], root=str(tmp_path))
    assert task.texts == ("2 a", "2 b", "3 a", "3 b")
    assert task.image_of_text.tolist() == [0, 0, 1, 1]
    assert colors(task.images) == [2, 3]


def test_coco_as_clip_benchmark_has_it(tmp_path):
    save_images(tmp_path / "mscoco_captions" / "val2014", "1.jpg", "2.jpg")
    content = {
        "images": [{"id": 7, "file_name": "1.jpg"}, {"id": 9, "file_name": "2.jpg"}],
        "annotations": [
            {"image_id": 9, "caption": "b"},
            {"image_id": 7, "caption": "a\n"},
            {"image_id": 9, "caption": "c"},
        ],
    }
    path = tmp_path / "mscoco_captions" / "coco_test_karpathy.json"
    path.write_text(json.dumps(content))
    (task,) = load_tasks(["coco"], root=str(tmp_path))
    assert task.texts == ("a", "b", "c")
    assert task.image_of_text.tolist() == [0, 1, 1]
    content["annotations"].pop(1)
    path.write_text(json.dumps(content))
    with pytest.raises(ModeclipError, match=r"image '1\.jpg' has no caption"):
        load_tasks(["coco"], root=str(tmp_path))


def test_flickr_as_clip_benchmark_has_it(tmp_path):
    save_images(tmp_path / "flickr30k", "1.jpg", "2.jpg")
    lines = "image,caption\n1.jpg,A man , walking\n1.jpg,He walks\n2.jpg,Two, three\n"
    (tmp_path / "flickr30k" / "flickr30k_test_karpathy.txt").write_text(lines)
    (task,) = load_tasks(["flickr30k"], root=str(tmp_path))
    assert task.texts == ("A man , walking", "He walks", "Two, three")
    assert task.image_of_text.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no known annotations"),
        ('{"a": {"b": 1}}', "no known annotations"),
        ('{"images": [{"split": "train"}]}', "holds no captions"),
        ('{"images": [{"id": 1, "file_name": "q.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}', "'q.jpg'"),
        ('{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]}', "KeyError"),
    ],
)
def test_annotations_that_cannot_be_used_are_one_line(tmp_path, content, words):
    save_images(tmp_path, "1.jpg")
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ModeclipError, match=words):
        load(tmp_path / "t.json")


def test_an_image_that_is_listed_twice_is_named(tmp_path):
    image = {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "a"}]}
    (tmp_path / "t.json").write_text(json.dumps({"images": [image, image]}))
    with pytest.raises(ModeclipError, match=r"has image '1\.jpg' twice"):
        load(tmp_path / "t.json")

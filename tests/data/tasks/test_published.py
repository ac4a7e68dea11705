"""Published tasks have the prompts, names and metrics that were published, and say where their data belong."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from modeclip.data.tasks.open import load_tasks
from modeclip.data.tasks.published import (
    _benchmark_names,
    class_names,
    clean_name,
    find_known,
    known_tasks,
    published_names,
    task_groups,
    templates_of,
    wordnet_ids,
)
from modeclip.data.tasks.task import METRICS
from modeclip.errors import ModeclipError
from modeclip.models.clip import imagenet_words
from support import plain_png

IMAGE = plain_png()


def save_classes(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_bytes(IMAGE)
    return folder


def peer_file(name: str) -> dict[str, list[str]]:
    pytest.importorskip("clip_benchmark")
    return json.loads((Path(find_spec("clip_benchmark").origin).parent / "datasets" / name).read_text("utf-8"))


def synsets(name: str) -> list[str]:
    return (Path(find_spec("timm").origin).parent / "data" / "_info" / name).read_text().split()


def test_there_are_the_26_tasks_and_five_shifted_versions_of_imagenet():
    groups = task_groups()
    assert len(groups["tasks26"]) == 26
    assert groups["robustness"] == ("imagenet-sketch", "imagenet-v2", "imagenet-a", "imagenet-o", "imagenet-r")
    assert len(groups["sugarcrepe"]) == 7


def test_metrics_are_those_of_the_protocol():
    metrics = {name: known_tasks()[name].metric for name in task_groups()["tasks26"]}
    others = {
        "aircraft": "mean_per_class_recall",
        "pets": "mean_per_class_recall",
        "caltech101": "mean_per_class_recall",
        "flowers": "mean_per_class_recall",
        "kinetics700": "mean_top1_top5",
        "hateful_memes": "roc_auc",
    }
    assert metrics == dict.fromkeys(metrics, "acc1") | others
    assert set(metrics.values()) <= set(METRICS)


NUM_PROMPTS = {
    "imagenet": 80, "cifar10": 18, "cifar100": 18, "sun397": 2, "cars": 8, "aircraft": 2, "dtd": 8, "caltech101": 34,
    "fer2013": 6, "stl10": 2, "eurosat": 3, "resisc45": 18, "gtsrb": 3, "country211": 5, "ucf101": 48,
    "kinetics700": 28, "imagenet-sketch": 80, "imagenet-v2": 80, "imagenet-a": 80, "imagenet-o": 80, "imagenet-r": 80,
}  # fmt: skip


@pytest.mark.parametrize("task", known_tasks().values(), ids=lambda task: task.name)
def test_every_task_has_its_number_of_prompts_and_names(task):
    templates = templates_of(task, imagenet_words)
    assert len(templates) == (NUM_PROMPTS.get(task.name, 1) if task.kind == "classification" else 0)
    assert len(set(templates)) == len(templates)
    assert all(template.count("{}") == 1 for template in templates)
    assert len(task.names) in (0, task.classes)
    assert len(published_names(task, imagenet_words)) in (0, task.classes, 1000)


DIFFERENT = {"clevr", "pcam", "resisc45"}
"""Tasks for which CLIP_benchmark has prompts of its own in place of CLIP's."""


def test_prompts_are_those_of_clip_benchmark_where_it_has_clips():
    seen = set()
    for name, templates in peer_file("en_zeroshot_classification_templates.json").items():
        task = find_known(name)
        if task is not None:
            equal = {template.replace("{c}", "{}") for template in templates} == set(templates_of(task, imagenet_words))
            assert equal == (task.name not in DIFFERENT), name
            seen.add(task.name)
    assert len(seen) == 22


@pytest.mark.parametrize("name", ["eurosat", "fer2013", "pcam", "mnist"])
def test_our_class_names_are_those_of_clip_benchmark(name):
    assert list(known_tasks()[name].names) == peer_file("en_classnames.json")[name]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("imagenet1k", "imagenet"),
        ("wds/imagenet1k", "imagenet"),
        ("wds_vtab-flowers", "flowers"),
        ("vtab/clevr_count_all", "clevr"),
        ("wds_imagenetv2", "imagenet-v2"),
        ("wds_imagenet_sketch", "imagenet-sketch"),
        ("renderedsst2", "sst2"),
        ("mscoco_captions", "coco"),
        ("sugar_crepe/swap_obj", "sugarcrepe-swap_obj"),
        ("Pets", "pets"),
    ],
)
def test_names_of_clip_benchmark_mean_the_same_tasks(name, known):
    assert find_known(name).name == known


def test_no_name_stands_for_two_tasks():
    names = [name for task in known_tasks().values() for name in {task.name, *task.also}]
    assert len(set(names)) == len(names)


def test_wordnet_ids_are_sorted_and_complete():
    assert len(wordnet_ids()) == 1000
    assert list(wordnet_ids()) == sorted(wordnet_ids())
    assert wordnet_ids()[0] == "n01440764"


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_subsets_of_imagenet_have_the_names_that_clip_benchmark_gives_them(tmp_path, name):
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    ids = synsets(f"{name.replace('-', '_')}_synsets.txt")
    folder = save_classes(tmp_path / name, ids)
    peer = builder.build_dataset(name, root=str(folder), download=False)
    (task,) = load_tasks([name], root=str(tmp_path), imagenet=imagenet_words)
    assert list(task.classnames) == peer.classes
    assert task.labels.tolist() == [label for _, label in peer.samples]
    assert (task.group, len(task.templates)) == ("imagenet", 80)


def test_imagenet_v2_is_numbered(tmp_path):
    save_classes(tmp_path / "imagenetv2", list(map(str, range(1000))))
    (task,) = load_tasks(["imagenet-v2"], root=str(tmp_path), imagenet=imagenet_words)
    assert task.classnames == imagenet_words()[0]
    assert task.images.keys()[2] == "2/1.png"
    assert task.labels.tolist() == list(range(1000))


def test_imagenet_in_any_order_of_folders(tmp_path):
    save_classes(tmp_path / "imagenet" / "val", list(wordnet_ids()))
    (task,) = load_tasks(["imagenet"], root=str(tmp_path), imagenet=imagenet_words)
    assert task.classnames[:2] == ("tench", "goldfish")


def test_imagenet_needs_the_words_of_open_clip(tmp_path):
    save_classes(tmp_path / "imagenet", list(wordnet_ids()))
    with pytest.raises(ModeclipError, match=r"'imagenet' needs .*class names.*pass imagenet="):
        load_tasks(["imagenet"], root=str(tmp_path))


def test_folders_that_are_no_wordnet_ids_are_named(tmp_path):
    ids = [*wordnet_ids()[:199], "dogs"]
    save_classes(tmp_path / "imagenet-o", ids)
    with pytest.raises(ModeclipError, match="'dogs' is no WordNet id"):
        load_tasks(["imagenet-o"], root=str(tmp_path), imagenet=imagenet_words)


def test_too_few_classes_are_not_the_published_task(tmp_path):
    save_classes(tmp_path / "imagenet-r", list(wordnet_ids()[:3]))
    words = "ImageNet-R has 200 .*found 3 .*n01440764.*another name.*NAME=PATH"
    with pytest.raises(ModeclipError, match=words):
        load_tasks(["imagenet-r"], root=str(tmp_path), imagenet=imagenet_words)
    (task,) = load_tasks([f"mine={tmp_path}/imagenet-r"])
    assert len(task.classnames) == 3


@pytest.mark.parametrize(
    ("name", "ids", "expected"),
    [
        ("clevr", ["3", "4", "5", "6", "7", "8", "9", "10"], {"3": "3", "10": "10"}),
        ("clevr", ["0", "1", "2", "3", "4", "5", "6", "7"], {"0": "3", "7": "10"}),
        ("sst2", ["negative", "positive"], {"negative": "negative", "positive": "positive"}),
        ("sst2", ["0", "1"], {"0": "negative", "1": "positive"}),
        ("pcam", ["0", "1"], {"1": "lymph node containing metastatic tumor tissue"}),
        ("fer2013", ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"], {"fear": "fearful"}),
        ("sst2", ["Negative", "Positive"], {"Positive": "positive"}),
        ("kitti", ["3", "2", "1", "0"], {"3": "a photo i took with no car."}),
    ],
)  # fmt: skip
def test_names_of_folders_and_numbers_become_published_names(name, ids, expected):
    found = dict(zip(ids, class_names(known_tasks()[name], ids), strict=True))
    assert {each: found[each] for each in expected} == expected


def test_the_last_numbers_need_not_occur_among_the_labels(tmp_path):
    (tmp_path / "1.png").write_bytes(IMAGE)
    (tmp_path / "mnist.csv").write_text("image,label\n1.png,3\n")
    (task,) = load_tasks(["mnist"], root=str(tmp_path))
    assert task.classnames == tuple("0123456789")
    assert task.labels.tolist() == [3]


@pytest.mark.parametrize("name", ["fer2013", "eurosat", "country211"])
def test_numbers_of_tasks_that_are_numbered_in_several_ways_are_refused(name):
    ids = list(map(str, range(known_tasks()[name].classes)))
    with pytest.raises(ModeclipError, match=r"classes are numbers .*classnames\.txt beside them"):
        class_names(known_tasks()[name], ids)


def test_eurosat_folders_are_in_the_order_of_the_published_names():
    ids = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
           "Residential", "River", "SeaLake"]  # fmt: skip
    assert class_names(known_tasks()["eurosat"], ids)[2:4] == ("brushland or shrubland", "highway or road")


def test_names_of_cub_and_ucf_are_read_from_their_folders():
    cub = [f"{n:03}.Black_footed_Bird_{n}" for n in range(1, 201)]
    assert class_names(known_tasks()["cub"], cub)[0] == "Black footed Bird 1"
    assert clean_name("YoYo") == "Yo Yo"
    assert clean_name("apple_pie") == "apple pie"
    assert clean_name("707-320") == "707-320"


def test_flowers_are_numbered_from_one_and_traffic_signs_from_zero():
    names = peer_file("en_classnames.json")["flowers"]
    signs = class_names(known_tasks()["gtsrb"], [f"{n:05}" for n in range(43)])
    assert signs[14] == "stop"
    assert list(class_names(known_tasks()["flowers"], [str(n) for n in range(1, 103)])) == names


def test_numbers_without_names_say_what_to_do(monkeypatch):
    _benchmark_names.cache_clear()
    monkeypatch.setattr("modeclip.data.tasks.published.find_spec", lambda _: None)
    with pytest.raises(ModeclipError, match=r"classnames.txt beside them.*or install clip-benchmark"):
        class_names(known_tasks()["flowers"], [str(n) for n in range(1, 103)])
    _benchmark_names.cache_clear()


@pytest.mark.parametrize("name", list(known_tasks()))
def test_missing_data_say_what_to_put_where(tmp_path, name):
    task = known_tasks()[name]
    with pytest.raises(ModeclipError, match=f"^task '{name}': no data of ") as caught:
        load_tasks([name], root=str(tmp_path))
    assert str(tmp_path / (task.folder or name)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_names_all_that_is_missing(tmp_path):
    save_classes(tmp_path / "stl10", ["airplane"])
    words = "25 of 26 tasks.*'tasks26'.*no data.*imagenet, food101.*put .*folder for each"
    with pytest.raises(ModeclipError, match=words):
        load_tasks(["tasks26"], root=str(tmp_path))


def test_a_group_loads_all_of_its_tasks(tmp_path):
    for name in ("imagenet-a", "imagenet-r", "imagenet-o"):
        save_classes(tmp_path / name, list(wordnet_ids()[:200]))
    for name in ("imagenet_sketch", "imagenetv2"):
        (tmp_path / name).mkdir()
        rows = [{"image": f"{number}.png", "label": synset} for number, synset in enumerate(wordnet_ids())]
        for number in range(1000):
            (tmp_path / name / f"{number}.png").write_bytes(IMAGE)
        (tmp_path / name / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = load_tasks(["robustness"], root=str(tmp_path), imagenet=imagenet_words)
    assert [task.name for task in tasks] == list(task_groups()["robustness"])
    assert {task.group for task in tasks} == {"imagenet"}
    assert tasks[0].classnames[:2] == ("tench", "goldfish")


def test_prompts_are_the_published_ones_by_name_and_the_datas_own_by_path(tmp_path):
    folder = save_classes(tmp_path / "wds_stl10", list(known_tasks()["stl10"].names))
    (tmp_path / "wds_stl10" / "zeroshot_classification_templates.txt").write_text("see {c}\n")
    published = templates_of(known_tasks()["stl10"])
    assert load_tasks(["stl10"], root=str(tmp_path))[0].templates == published
    assert load_tasks([f"stl10={folder}"])[0].templates == published
    assert load_tasks([str(folder)])[0].templates == ("see {c}",)
    (folder / "zeroshot_classification_templates.txt").unlink()
    assert load_tasks([str(folder)])[0].templates == published


def test_metrics_follow_the_name(tmp_path):
    save_classes(tmp_path / "vtab-pets", [f"breed_{number}" for number in range(37)])
    (task,) = load_tasks([str(tmp_path / "vtab-pets")])
    assert (task.metric, task.classnames[0]) == ("mean_per_class_recall", "breed 0")


def test_hateful_memes_as_they_are_published(tmp_path):
    (tmp_path / "hateful_memes" / "img").mkdir(parents=True)
    rows = [{"id": n, "img": f"img/{n}.png", "label": n % 2, "text": "words"} for n in range(4)]
    for row in rows:
        (tmp_path / "hateful_memes" / row["img"]).write_bytes(plain_png(row["id"]))
    (tmp_path / "hateful_memes" / "dev_seen.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (task,) = load_tasks(["hateful_memes"], root=str(tmp_path))
    assert (task.metric, task.classnames) == ("roc_auc", ("meme", "hatespeech meme"))
    assert task.labels.tolist() == [0, 1, 0, 1]
    assert [image.getpixel((0, 0))[0] for image in task.images.read(np.arange(4))] == [0, 1, 2, 3]


def test_data_of_another_kind_are_refused(tmp_path):
    save_classes(tmp_path / "flickr30k", ["cat", "dog"])
    with pytest.raises(ModeclipError, match=r"Flickr30k.* is retrieval, but .* holds classification.*put .*json"):
        load_tasks(["flickr30k"], root=str(tmp_path))


def test_the_documentation_lists_every_task_as_the_error_says() -> None:
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert [name for name in (*known_tasks(), *task_groups()) if f"`{name}`" not in page] == []

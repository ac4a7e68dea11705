"""What a user names becomes tasks: folders, catalogs, published tasks; every mistake is one line."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from modeclip.data.catalog import Catalog
from modeclip.data.images import decode_image
from modeclip.data.indexing import index
from modeclip.data.selection import Selection
from modeclip.data.sources.options import DataConfig
from modeclip.data.tasks.open import load_tasks
from modeclip.errors import ModeclipError
from support import plain_png, tar_of


def save(path: Path, color: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (color, 10, 10)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with test and training images."""
    for split, count in (("test", 2), ("train", 3)):
        for label, name in enumerate(("tabby_cat", "dog", "newt")):
            for number in range(count):
                save(
                    tmp_path / "animals" / split / name / f"{number}.png", 50 * label + number + 5 * (split == "train")
                )
    return tmp_path / "animals"


def colors(images) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in images.read(np.arange(len(images)))]


# ---------------------------------------------------------------- folders of classes


def test_a_folder_of_classes_is_read_as_torchvision_reads_it(folder):
    datasets = pytest.importorskip("torchvision.datasets")
    peer = datasets.ImageFolder(str(folder / "test"))
    (task,) = load_tasks([str(folder)])
    assert task.name == "animals"
    assert [name.replace(" ", "_") for name in task.classnames] == peer.classes
    assert task.images.keys() == [str(Path(path).relative_to(folder / "test")) for path, _ in peer.samples]
    assert task.labels.tolist() == peer.targets
    assert task.templates == ()


def test_what_zip_archives_of_macos_have_beside_the_classes_is_none(folder):
    for place in (folder, folder / "test"):
        (place / "__MACOSX" / "dog").mkdir(parents=True)
        (place / "__MACOSX" / "dog" / "._0.png").write_bytes(b"no image")
    (task,) = load_tasks([str(folder)])
    assert task.classnames == ("dog", "newt", "tabby cat")


def test_the_training_split_is_read_where_it_is_wanted(folder):
    (task,) = load_tasks([str(folder)], train=True)
    assert task.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert task.train.classnames == task.classnames
    assert colors(task.train.images)[:4] == [55, 56, 57, 105]
    assert load_tasks([str(folder)])[0].train is None


def test_a_training_split_may_lack_classes_and_lie_elsewhere(folder, tmp_path):
    save(tmp_path / "more" / "newt" / "1.png", 7)
    (task,) = load_tasks([str(folder)], train_specs=[f"animals={tmp_path}/more"])
    assert task.train.labels.tolist() == [1]
    assert task.classnames[1] == "newt"
    for spec, words in [
        (f"{tmp_path}/more", "expected NAME=PATH"),
        (f"plants={tmp_path}/more", "no task 'plants'; tasks: animals"),
        (f"animals={tmp_path}/none", "'animals'.*does not exist.*correct the path"),
    ]:
        with pytest.raises(ModeclipError, match=words):
            load_tasks([str(folder)], train_specs=[spec])
    save(tmp_path / "more" / "fish" / "1.png", 7)
    with pytest.raises(ModeclipError, match=r"training split.*'fish'.*test split lacks.*remove it"):
        load_tasks([str(folder)], train_specs=[f"animals={tmp_path}/more"])


def test_classnames_beside_the_folders_are_theirs_in_order(folder):
    (folder / "classnames.txt").write_text("a dog\na newt\na tabby_cat\n")
    (folder / "zeroshot_classification_templates.txt").write_text("I see {c}.\nhere is {c}\n")
    (task,) = load_tasks([str(folder)])
    assert task.classnames == ("a dog", "a newt", "a tabby_cat")
    assert task.templates == ("I see {c}.", "here is {c}")
    (folder / "classnames.txt").write_text("a dog\n")
    with pytest.raises(ModeclipError, match=r"classnames\.txt' has 1 lines.*3 folders"):
        load_tasks([str(folder)])


def test_the_folder_of_a_split_is_the_same_task(folder):
    (folder / "classnames.txt").write_text("a dog\na newt\na cat\n")
    (whole, part) = load_tasks([f"x={folder}", str(folder / "test")], train=True)
    assert (part.name, part.digest) == ("animals", whole.digest)
    assert part.train.digest == whole.train.digest


def test_classes_of_one_name_are_told_of(folder, capsys):
    (folder / "classnames.txt").write_text("cat\ndog\ncat\n")
    assert load_tasks([f"pets2={folder}"])[0].classnames == ("cat", "dog", "cat")
    assert "task 'pets2': several classes are called 'cat'" in " ".join(capsys.readouterr().err.split())


def test_an_empty_class_is_named(folder):
    (folder / "test" / "axolotl").mkdir()
    (folder / "test" / "axolotl" / "notes.txt").write_text("none yet")
    with pytest.raises(ModeclipError, match=r"axolotl' holds no image.*fill or remove"):
        load_tasks([str(folder)])


def test_an_empty_folder_says_what_is_expected(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ModeclipError, match=r"'nothing'.*no sub-folders.*folder for each class"):
        load_tasks([str(tmp_path / "nothing")])


def test_folders_that_are_one_class_are_named(tmp_path):
    save(tmp_path / "x" / "a_b" / "1.png", 1)
    save(tmp_path / "x" / "a b" / "1.png", 1)
    with pytest.raises(ModeclipError, match="two classes are called 'a b'"):
        load_tasks([str(tmp_path / "x")])


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ModeclipError, match=r"x\.zip' can hold no task.*\.parquet, \.csv"):
        load_tasks([str(tmp_path / "x.zip")])


# ---------------------------------------------------------------- splits, links and metadata


@pytest.mark.parametrize("layout", ["images/{split}/{name}", "{name}/{split}", "{split}/{name}"])
@pytest.mark.parametrize("test", ["test", "VAL", "dev"])
def test_splits_lie_above_or_below_the_classes(tmp_path, capsys, layout, test):
    for split, color in (("Train", 5), (test, 0)):
        for label, name in enumerate(("rose", "tulip")):
            save(tmp_path / "set" / layout.format(split=split, name=name) / "0.png", 50 * label + color)
    (task,) = load_tasks([str(tmp_path / "set")], train=True)
    assert (task.classnames, task.labels.tolist(), colors(task.images)) == (("rose", "tulip"), [0, 1], [0, 50])
    assert (task.train.classnames, colors(task.train.images)) == (("rose", "tulip"), [5, 55])
    assert f"reads {test}; leaves out Train (2 images)" in capsys.readouterr().err


def test_a_class_called_test_among_others_is_a_class(tmp_path):
    for name in ("bus", "car", "test"):
        save(tmp_path / "set" / name / "0.png", 9)
    assert load_tasks([str(tmp_path / "set")])[0].classnames == ("bus", "car", "test")


def test_of_two_splits_for_testing_one_is_read(tmp_path):
    for split, color in (("test", 1), ("eval", 2), ("val", 3)):
        save(tmp_path / "set" / split / "rose" / "0.png", color)
    assert colors(load_tasks([str(tmp_path / "set")])[0].images) == [1]


def test_classes_that_are_links_are_read(folder, tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("dog", "newt"):
        (tmp_path / "set" / name).symlink_to(folder / "test" / name)
    (tmp_path / "set/dog/up").symlink_to(tmp_path / "set")
    (task,) = load_tasks([str(tmp_path / "set")])
    assert (task.classnames, task.labels.tolist()) == (("dog", "newt"), [0, 0, 1, 1])
    (tmp_path / "set/cat").symlink_to("nowhere")
    with pytest.raises(ModeclipError, match=r"set/cat.*leads nowhere; mend or remove"):
        load_tasks([str(tmp_path / "set")])


@pytest.mark.parametrize("column", ["label", "caption"])
def test_metadata_tables_give_labels_or_captions_by_split(tmp_path, column, capsys):
    for split, color in (("train", 5), ("test", 0)):
        for number in range(2):
            save(tmp_path / "set" / split / "deep" / f"{number}.png", 50 * number + color)
        save(tmp_path / "set" / split / "unnamed.png", 99)
        rows = [{"file_name": f"deep/{number}.PNG", column: f"{'ab'[number]}"} for number in range(2)]
        (tmp_path / "set" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (task,) = load_tasks([str(tmp_path / "set")], train=True)
    assert colors(task.images) == [0, 50]
    if column == "label":
        assert (task.classnames, task.labels.tolist()) == (("a", "b"), [0, 1])
        assert colors(task.train.images) == [5, 55]
    else:
        assert (task.texts, task.image_of_text.tolist()) == (("a", "b"), [0, 1])
    assert "reads test; leaves out train (2 rows), 2 images that no row names" in capsys.readouterr().err
    (tmp_path / "set/test/deep/1.png").unlink()
    with pytest.raises(ModeclipError, match=r"test/deep/1\.PNG.*is not there \(1 such rows\)"):
        load_tasks([str(tmp_path / "set")])


def test_class_folders_in_another_unicode_form_are_one_class(tmp_path, capsys):
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    save(tmp_path / "set/test" / forms[0] / "0.png", 1)
    save(tmp_path / "set/train" / forms[1] / "0.png", 2)
    (task,) = load_tasks([str(tmp_path / "set")], train=True)
    assert task.classnames == task.train.classnames == (forms[0],)
    assert "Unicode form NFD" in capsys.readouterr().err


def test_images_and_shards_are_found_in_another_spelling(tmp_path, capsys):
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    save(tmp_path / "images" / f"{forms[1]}.PNG", 7)
    (tmp_path / "t.csv").write_text(f"image,label\n{forms[0]}.png,rose\n")
    (task,) = load_tasks([str(tmp_path / "t.csv")])
    assert colors(task.images) == [7]
    assert "(NFC), was found as" in capsys.readouterr().err
    members = [("0.png", plain_png(9)), ("0.cls", b"0")]
    (tmp_path / "wds/TEST").mkdir(parents=True)
    (tmp_path / "wds/TEST/0.TAR").write_bytes(tar_of(members))
    (tmp_path / "wds/TEST/NSHARDS.txt").write_text("1")
    (tmp_path / "wds/ClassNames.txt").write_text("rose")
    (task,) = load_tasks([str(tmp_path / "wds")])
    assert (task.classnames, colors(task.images)) == (("rose",), [9])


def test_a_published_name_with_other_classes_is_a_set_of_ones_own(folder, capsys):
    (task,) = load_tasks([str(folder.rename(folder.parent / "flowers"))])
    assert set(task.classnames) == {"tabby cat", "dog", "newt"}
    assert "not the 102 of Oxford Flowers 102" in capsys.readouterr().err


def test_images_are_turned_upright_unless_asked_not_to(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (tmp_path / "set/a").mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(tmp_path / "set/a/0.jpg", exif=exif)
    (upright,) = load_tasks([str(tmp_path / "set")])
    (stored,) = load_tasks([str(tmp_path / "set")], exif="ignore")
    sizes = [task.images.read(np.array([0]))[0].size for task in (upright, stored)]
    assert (sizes, upright.exif, stored.exif) == ([(4, 6), (6, 4)], "apply", "ignore")
    assert upright.images.digest != stored.images.digest
    for setting, size in (("apply", (4, 6)), ("ignore", (6, 4))):
        index(DataConfig.from_flat({"source": str(tmp_path / "set"), "exif": setting}), tmp_path / setting)
        catalog = Catalog.open(tmp_path / setting)
        (picture,) = catalog.images(np.array([0]))
        (encoded,) = catalog.encoded_images(np.array([0]))
        sides = catalog.read(["width", "height"])
        assert (catalog.exif, picture.size, (sides["width"][0], sides["height"][0])) == (setting, size, size)
        assert decode_image(encoded).size == size, "an encoder that knows nothing of the setting sees the same"
    with pytest.raises(ModeclipError, match=r"indexed with exif 'ignore', not 'apply'"):
        index(DataConfig(source=str(tmp_path / "set")), tmp_path / "ignore")


# ---------------------------------------------------------------- names


def test_names_are_given_or_those_of_the_folders(folder):
    (task, other) = load_tasks([f"first={folder}", str(folder)])
    assert (task.name, other.name) == ("first", "animals")


def test_two_tasks_of_one_name_are_refused(folder):
    with pytest.raises(ModeclipError, match=r"'animals'.*twice.*NAME=PATH"):
        load_tasks([str(folder), str(folder)])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("food102", r"task 'food102'.*nearest: food101, \S+, \S+;.*docs/evaluation\.md$"),
        ("no/such/folder", r"no such folder.*'no/such/folder'.*nearest: .*docs/evaluation\.md"),
        ("birds=no/such", "task 'birds'.*no/such' does not exist.*correct the path"),
        ("pets=no/such", "task 'pets'.*no/such' does not exist.*Oxford-IIIT Pets"),
    ],
)
def test_what_is_not_there_is_named(spec, words):
    with pytest.raises(ModeclipError, match=words):
        load_tasks([spec])


def test_folders_of_classes_have_no_captions(folder):
    with pytest.raises(ModeclipError, match=r"without captions.*leave out 'retrieval:'"):
        load_tasks([f"retrieval:{folder}"])


def test_tasks_in_an_object_store_are_read_in_place(folder):
    import fsspec

    store = fsspec.filesystem("memory")
    for path in folder.rglob("*.png"):
        store.pipe(f"/bucket/animals/{path.relative_to(folder)}", path.read_bytes())
        store.pipe(f"/bucket/table/{path.parent.name}-{path.name}", path.read_bytes())
    rows = "image,label\nnewt-0.png,newt\ndog-1.png,dog\n"
    store.pipe("/bucket/table/test.csv", rows.encode())
    (there, table) = load_tasks(["memory://bucket/animals", "memory://bucket/table/test.csv"], train=True)
    (here,) = load_tasks([str(folder)], train=True)
    assert there.digest == here.digest
    assert there.train.digest == here.train.digest
    assert (table.name, table.labels.tolist(), len(table.images.digests())) == ("table", [1, 0], 2)


def test_selections_are_of_catalogs_only(folder):
    with pytest.raises(ModeclipError, match=r"#group=x.*catalog.*animals' is none"):
        load_tasks([f"{folder}#group=x"])


# ---------------------------------------------------------------- prompts


def test_prompts_of_the_user_replace_all_others(folder):
    (folder / "zeroshot_classification_templates.txt").write_text("I see {c}.\n")
    (task,) = load_tasks([str(folder)], templates=["the {}", "my {c}"])
    assert task.templates == ("the {}", "my {c}")
    with pytest.raises(ModeclipError, match=r"templates: template 'plain' has no \{\}"):
        load_tasks([str(folder)], templates=["a {}", "plain"])


def test_prompts_come_from_a_file_by_task(folder, tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"animals": ["an animal: {c}"], "others": []}))
    assert load_tasks([str(folder)], template_file=file)[0].templates == ("an animal: {c}",)
    own = {"dog": ["it barks"], "newt": ["it swims"], "tabby cat": ["it purrs", "it sleeps"]}
    file.write_text(json.dumps({"animals": own}))
    (task,) = load_tasks([str(folder)], template_file=file)
    assert task.prompts == tuple(tuple(own[name]) for name in task.classnames)
    assert load_tasks([f"else={folder}"], template_file=file)[0].prompts == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "template file .* does not exist"),
        ("{", "is not JSON"),
        ("[]", "expected prompts by name of a task"),
        ('{"animals": {"dog": ["x"]}}', r"prompts\.json, animals'.*no prompts.*'newt' \(2 such"),
        ('{"animals": ["x"]}', "animals: template 'x' has no"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_one_line(folder, tmp_path, content, words):
    if content is not None:
        (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(ModeclipError, match=words):
        load_tasks([str(folder)], template_file=tmp_path / "prompts.json")


# ---------------------------------------------------------------- catalogs


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of captions (two of them for each image), and one of two tasks, as ``index`` writes them."""
    root = tmp_path_factory.mktemp("catalogs")
    for number in range(4):
        save(root / "pairs" / f"{number}.png", 20 * number)
        (root / "pairs" / f"{number}.txt").write_text(f"caption {number}\nanother {number}\n")
        for task in ("small", "large"):
            save(root / task / f"class_{number % 2}" / f"{number}.png", 10 * number + len(task))
    tasks = (str(root / "small"), str(root / "large"))
    index(DataConfig.from_flat({"source": str(root / "pairs"), "caption_lines": True, "tasks": tasks}), root / "out")
    return root / "out"


def test_a_catalog_of_tasks_is_all_of_them(catalogs):
    tasks = load_tasks([str(catalogs / "tasks.lance")])
    assert [task.name for task in tasks] == ["large", "small"]
    assert tasks[0].classnames == ("class_0", "class_1")


def test_the_folder_of_a_run_stands_for_its_tasks(catalogs):
    assert [task.name for task in load_tasks([str(catalogs)])] == ["large", "small"]


def test_a_table_beside_classes_is_not_mistaken_for_them(folder):
    (folder / "labels.csv").write_text("file,kind\n")
    assert load_tasks([str(folder)])[0].classnames[0] == "dog"


def test_a_selection_of_a_catalog_is_one_task(catalogs):
    path = catalogs / "tasks.lance"
    (task,) = load_tasks([f"mine={path}#task=small"])
    assert (task.name, len(task.images)) == ("mine", 4)
    (both,) = load_tasks([f"mine={path}#task=small&caption=class_1"])
    assert both.classnames == ("class_1",)
    (one,) = load_tasks([f"mine={path}#width=4&task=large"])
    assert len(one.images) == 4
    selections = load_tasks([f"{path}#task=small", f"{path}#task=large"])
    assert [task.name for task in selections] == ["tasks#task=small", "tasks#task=large"]
    wide = load_tasks([f"{catalogs}/tasks.lance"], selection=Selection(where=("task LIKE 's%'", "caption = 'class_1'")))
    assert [(task.name, task.classnames, len(task.images)) for task in wide] == [("small", ("class_1",), 2)]
    assert wide[0].images.digest == both.images.digest
    with pytest.raises(ModeclipError, match=r"--mask kept selects rows of catalogs, and .*small.* is none"):
        load_tasks([str(catalogs.parent / "small")], selection=Selection(mask="kept"))


def test_captions_of_a_catalog_that_share_an_image_find_it_together(catalogs):
    (task,) = load_tasks([f"retrieval:{catalogs}/catalog.lance"])
    assert task.kind == "retrieval"
    assert len(task.images) == 4
    assert sorted(task.texts) == sorted(f"{word} {n}" for n in range(4) for word in ("caption", "another"))
    found = dict(zip(task.texts, task.image_of_text.tolist(), strict=True))
    assert [colors(task.images)[found[f"another {n}"]] for n in range(4)] == [0, 20, 40, 60]
    (part,) = load_tasks([f"retrieval:few={catalogs}/catalog.lance#caption=caption 2"])
    assert colors(part.images) == [40]


def test_tasks_of_a_catalog_can_be_asked_for_captions(catalogs):
    tasks = load_tasks([f"retrieval:{catalogs}/tasks.lance"])
    assert [task.kind for task in tasks] == ["retrieval"] * 2


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{}/catalog.lance", "holds no tasks.*#column=value.*or write retrieval:"),
        ("mine={}/tasks.lance", "holds 2 tasks.*leave out the name.*mine=.*#task=large"),
        ("{}/tasks.lance#task=medium", r"no pair that --where 'task=medium' selects"),
        ("{}/tasks.lance#colour=red", r"unknown column of .* 'colour'"),
        ("{}/tasks.lance#width=wide", "'width' holds int32.*'wide'"),
    ],
)
def test_selections_that_find_nothing_are_one_line(catalogs, spec, words):
    with pytest.raises(ModeclipError, match=words):
        load_tasks([spec.format(catalogs)])


def test_the_hash_of_images_is_that_of_the_catalog(catalogs):
    (task,) = load_tasks([f"x={catalogs}/tasks.lance#task=small"])
    catalog = Catalog.open(catalogs / "tasks.lance")
    names = catalog.read(["path"], task.images.rows)["path"]
    (folder,) = load_tasks([str(Path(names[0]).parents[1])])
    assert folder.images.digest == task.images.digest

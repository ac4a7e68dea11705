"""Fine-tuning on a small own set: no held-out image is trained on, training stops early, numbers are the folders'."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from modeclip.adapting.finetuning import (
    AlphaPoint,
    FinetuneConfig,
    FinetuneResult,
    choose_alpha,
    finetune,
    warnings_after,
    warnings_of,
)
from modeclip.adapting.merging import interpolate, interpolate_into
from modeclip.adapting.validation import Split, draw_units, own_task, split_rows
from modeclip.commands.adapting import finetune as finetune_command
from modeclip.commands.adapting import merge as merge_command
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.selection import Selection
from modeclip.data.sources.options import DataConfig
from modeclip.data.tasks.task import CatalogImages, Task, catalog_tasks
from modeclip.errors import ModeclipError
from modeclip.evaluation.intervals import bootstrap_interval
from modeclip.models.blocks import ffn_parameters, last_parameters
from modeclip.models.clip import load_clip
from modeclip.system.options import call
from modeclip.training.batches import job_rows
from modeclip.training.jobs import EngineConfig, TrainJob
from support import Python, with_weights

CONFIG = FinetuneConfig(
    epochs=4,
    batch_size=16,
    learning_rate=2e-3,
    checks=4,
    patience=4,
    alphas=4,
    engine=EngineConfig(precision="32-true", save_every="4steps", log_every=1),
)
COLOURS = [(220, 60, 60), (60, 220, 60), (60, 60, 220), (220, 220, 60), (220, 220, 220)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own set: real icons in five colours, a sub-folder for each, and two copies; general tasks: real icons."""
    out = tmp_path_factory.mktemp("own")
    index(
        DataConfig.from_flat({"source": "icons", "train_sets": ("octicons",), "tasks": ("heroicons",)}), out / "icons"
    )
    draw = np.random.default_rng(0)
    for number, colour in enumerate(COLOURS):
        (out / "photos" / f"sort_{number}").mkdir(parents=True)
        pictures = Catalog.open(out / "icons").images(np.arange(20) * 10 + number)
        for copy, picture in enumerate(pictures):
            shade = np.clip(np.array(colour) + draw.integers(-40, 40, 3), 0, 255)
            pixels = np.asarray(picture).astype(int) * shade // 255
            Image.fromarray(pixels.astype(np.uint8)).save(out / "photos" / f"sort_{number}" / f"{copy}.png")
    (out / "photos" / "sort_0" / "again.png").write_bytes((out / "photos" / "sort_0" / "3.png").read_bytes())
    (out / "photos" / "sort_1" / "alien.png").write_bytes((out / "photos" / "sort_0" / "3.png").read_bytes())
    index(DataConfig(source=str(out / "photos")), out / "catalog")
    return out


@pytest.fixture(scope="module")
def catalog(folder: Path) -> Catalog:
    return Catalog.open(folder / "catalog")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The random start of everything here."""
    return with_weights("modeclip-icon", tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def tuned(model: str, folder: Path, catalog: Catalog) -> FinetuneResult:
    """One fine-tuning with general tasks, from a random start."""
    tasks = str(folder / "icons" / "tasks.lance")
    return finetune(model, catalog, CONFIG, out=folder / "tuned", tasks=tasks)


def answers(folder: Path, catalog: Catalog, rows: np.ndarray, classnames: tuple[str, ...]) -> np.ndarray:
    """Classify images with nothing but open_clip."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        texts = model.encode_text(tokenizer(list(classnames)), normalize=True)
        images = torch.stack([preprocess(picture) for picture in catalog.images(rows)])
        return (model.encode_image(images, normalize=True) @ texts.T).argmax(1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["image", "class", "group"])
@pytest.mark.parametrize("seed", range(4))
def test_no_image_is_on_both_sides(catalog: Catalog, unit: str, seed: int) -> None:
    split = split_rows(catalog, unit, 0.2, seed)  # type: ignore[arg-type]
    again = split_rows(catalog, unit, 0.2, seed)  # type: ignore[arg-type]
    assert np.array_equal(split.held_out, again.held_out)
    digests = catalog.read(["digest"])["digest"]
    assert not set(digests[split.train]) & set(digests[split.held_out])
    assert len(split.train) + len(split.held_out) + split.num_duplicates == len(catalog) == 20 * len(COLOURS) + 2
    captions = catalog.read(["caption"])["caption"]
    if unit == "image":
        assert split.num_duplicates == 0  # copies are drawn together
        assert len(split.held_out) in range(19, 25)
        assert all(3 <= (captions[split.held_out] == caption).sum() <= 7 for caption in set(captions))
    else:
        assert len(set(captions[split.held_out])) == 1
        assert not set(captions[split.train]) & set(captions[split.held_out])
        spoiled = captions[split.held_out][0] in {"a photo of a sort 0.", "a photo of a sort 1."}
        assert split.num_duplicates == {True: 1, False: 0}[spoiled] + (
            captions[split.held_out][0] == "a photo of a sort 1."
        )


def test_near_duplicates_and_columns_are_held_out_together(tmp_path: Path) -> None:
    """Twelve smooth pictures, each also at half its size, of three sites; the first site has copies of all."""
    draw = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    lines = ["filepath,title,site"]
    for number in range(12):
        picture = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
            (96, 96), Image.Resampling.BICUBIC
        )
        for kind, site in (("plain", f"site {number % 3}"), ("half", f"site {number % 3}"), ("again", "site 0")):
            name = f"{kind}-{number}.png"
            (picture.resize((48, 48)) if kind == "half" else picture).save(tmp_path / "data" / name)
            lines.append(f"{name},caption {number % 4},{site}")
    (tmp_path / "data" / "pairs.csv").write_text("\n".join(lines) + "\n")
    index(DataConfig(source=str(tmp_path / "data" / "pairs.csv")), tmp_path / "out")
    catalog = Catalog.open(tmp_path / "out")
    columns = catalog.read(["key", "site", "digest"])
    numbers = np.array([int(key.rpartition("-")[2].partition(".")[0]) for key in columns["key"]])
    apart = split_rows(catalog, "image", 0.3, 0)
    assert set(numbers[apart.train]) & set(numbers[apart.held_out]), "bytes do not know a picture at half its size"
    split = split_rows(catalog, "similar", 0.3, 0)
    assert not set(numbers[split.train]) & set(numbers[split.held_out])
    assert len(split.train) + len(split.held_out) == 36
    split = split_rows(catalog, "group=site", 0.3, 2)
    held = set(columns["site"][split.held_out])
    assert len(held) == 1
    assert held == set(columns["site"]) - set(columns["site"][split.train]) or split.num_duplicates
    assert not set(columns["digest"][split.train]) & set(columns["digest"][split.held_out])
    with pytest.raises(ModeclipError, match=r"unknown column.*'sight'"):
        split_rows(catalog, "group=sight", 0.3, 0)
    general = Task(
        name="general",
        kind="classification",
        images=CatalogImages(catalog=catalog, rows=np.flatnonzero(numbers == 0)),
        classnames=("a", "b"),
        labels=np.zeros(3, np.int64),
    )
    split = split_rows(catalog, "image", 0.3, 0, tasks=[general])
    assert 0 not in numbers[split.train], "what a general task shows is not trained on"


@given(st.lists(st.integers(0, 30), min_size=2, max_size=80), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_draw_of_units(numbers: list[int], fraction: float, seed: int) -> None:
    units = np.array(numbers)
    strata = units % 3
    drawn = draw_units(units, strata, fraction, seed)
    values = np.unique(units)
    if len(values) < 2:
        return
    taken = [bool(drawn[units == value].all()) for value in values]
    assert taken == [bool(drawn[units == value].any()) for value in values], "a unit stays together"
    assert 0 < sum(taken) < len(values)
    assert abs(sum(taken) - fraction * len(values)) <= 1
    for stratum in range(3):
        members = [t for t, value in zip(taken, values, strict=True) if value % 3 == stratum]
        assert abs(sum(members) - fraction * len(members)) <= 2


def test_held_out_images_are_spread_over_seeds(catalog: Catalog) -> None:
    """Every image is held out by some seed: the draw is no fixed pattern."""
    held_out = {int(row) for seed in range(60) for row in split_rows(catalog, "image", 0.2, seed).held_out}
    assert held_out == set(range(len(catalog)))


def test_a_selection_is_split_as_if_it_were_the_whole_set(
    model: str, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side has a pair from outside. Other captions are other classes, and drawn pairs make shorter passes."""
    own = Catalog.open(shutil.copytree(catalog.path, tmp_path / "catalog.lance"))
    count = len(own)
    few, told = np.arange(count) % 4 > 0, [f"kind {n % 3}" if n % 2 else None for n in range(count)]
    own.add_columns({"few": few, "p": np.full(count, 0.5)}, facts={"made": "here"})
    own.add_columns({"told": np.array(told, object)}, facts={"made": "here"})
    seen: dict[str, Any] = {}

    def watch(job: TrainJob, **_: object) -> None:
        seen.update(job=job, rows=job_rows(job, Catalog.open(own.path)))
        raise ModeclipError("enough")

    monkeypatch.setattr("modeclip.adapting.finetuning.train", watch)
    config = replace(CONFIG, captions="told", probability="p")
    with pytest.raises(ModeclipError, match="enough"):
        finetune(model, own, config, out=tmp_path / "out", selection=Selection(mask="few"))
    part = Selection(mask="few").part_of(own)
    split = split_rows(part, CONFIG.holdout, CONFIG.holdout_fraction, CONFIG.seed, captions="told")
    rows = np.flatnonzero(few)
    assert seen["rows"].tolist() == rows[split.train].tolist()
    assert set(own_task(part, split, "told").classnames) == set(own.captions(rows, "told")) > {"kind 0"}
    assert (seen["job"].config.captions, seen["job"].config.probability) == ("told", "p")
    assert seen["job"].last_step == CONFIG.epochs * (len(split.train) // 2 // CONFIG.batch_size)
    columns = [name for name in Catalog.open(own.path).columns if name.startswith("finetune_")]
    with pytest.raises(ModeclipError, match="enough"):
        finetune(model, own, CONFIG, out=tmp_path / "other")
    after = [name for name in Catalog.open(own.path).columns if name.startswith("finetune_")]
    assert len(after) == len(columns) + 1


@pytest.mark.slow
def test_training_sees_only_the_training_rows(tuned: FinetuneResult, catalog: Catalog) -> None:
    job = TrainJob.load(Path(tuned.folder) / "train" / "job.json")
    split = split_rows(catalog, CONFIG.holdout, CONFIG.holdout_fraction, CONFIG.seed)
    column = next(name for name in Catalog.open(catalog.path).columns if name.startswith("finetune_"))
    reopened = Catalog.open(catalog.path)
    assert np.array_equal(reopened.select(mask=column), split.train)
    assert np.array_equal(job_rows(job, reopened), split.train)
    assert job.config.mask_same_captions
    assert (tuned.num_train, tuned.num_held_out) == (len(split.train), len(split.held_out))


@pytest.mark.slow
def test_numbers_are_those_of_the_written_folders(tuned: FinetuneResult, catalog: Catalog, folder: Path) -> None:
    out, tasks = Path(tuned.folder), Catalog.open(folder / "icons" / "tasks.lance")
    task = own_task(catalog, split_rows(catalog, CONFIG.holdout, CONFIG.holdout_fraction, CONFIG.seed))
    [general] = catalog_tasks(tasks)
    own_row, general_row = tuned.table
    for place, column in ((out / "seed", "before"), (out / "best", "tuned"), (out, "after")):
        right = answers(place, catalog, task.images.rows, task.classnames) == task.labels
        assert getattr(own_row, column) == bootstrap_interval({"own set": right})
        right = answers(place, tasks, general.images.rows, general.classnames) == general.labels
        assert getattr(general_row, column).mean == pytest.approx(right.mean(), abs=0.004)
    assert own_row.after.mean > own_row.before.mean + 0.3, "five colours are learnt at once"
    assert own_row.change.mean == pytest.approx(own_row.after.mean - own_row.before.mean)
    assert [point.alpha for point in tuned.curve] == [0, 0.25, 0.5, 0.75, 1]
    chosen = choose_alpha(tuned.curve, tuned.tolerance)
    assert (tuned.alpha, own_row.after.mean) == (chosen.alpha, chosen.own)
    wanted = interpolate(out / "seed", out / "best", tuned.alpha).model.state_dict()
    got = load_file(out / "open_clip_model.safetensors")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert dict(tuned.checks)[tuned.best_step] == max(score for _, score in tuned.checks) == tuned.curve[-1].own


def test_result_file_holds_the_table(tuned: FinetuneResult) -> None:
    content = json.loads((Path(tuned.folder) / "finetune.json").read_text())
    assert content["table"][0]["after"]["mean"] == tuned.table[0].after.mean


def test_same_call_again_is_done(model: str, tuned: FinetuneResult, catalog: Catalog, folder: Path) -> None:
    weights = Path(tuned.folder) / "open_clip_model.safetensors"
    before = weights.stat().st_mtime_ns
    tasks = str(folder / "icons" / "tasks.lance")
    assert finetune(model, catalog, CONFIG, out=tuned.folder, tasks=tasks) == tuned
    assert weights.stat().st_mtime_ns == before


def test_settings_of_the_checks_and_damaged_notes_train_anew(model: str, catalog: Catalog, tmp_path: Path) -> None:
    config, out = replace(CONFIG, epochs=1, checks=1, patience=1, alphas=1), tmp_path / "out"
    first = finetune(model, catalog, config, out=out)
    for other in (replace(config, tolerance=0.5), replace(config, alphas=2), replace(config, checks=2, patience=3)):
        again = finetune(model, catalog, other, out=out)
        assert again.digest != first.digest
        assert again.steps == again.planned_steps == first.steps
        assert again.checks[-1] == first.checks[-1]
    weights = (out / "open_clip_model.safetensors").read_bytes()
    (out / "notes.json").write_text("{")
    (out / "finetune.json").unlink()
    assert finetune(model, catalog, other, out=out) == again
    assert (out / "open_clip_model.safetensors").read_bytes() == weights


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=11),
    st.sampled_from([0.0, 0.1, 0.25, 1.0]),
    st.booleans(),
)
def test_choice_follows_the_rule(numbers: list[tuple[int, int]], tolerance: float, has_general: bool) -> None:
    curve = [
        AlphaPoint(alpha=index / 10, own=own / 10, general=general / 10 if has_general else None)
        for index, (own, general) in enumerate(numbers)
    ]
    chosen = choose_alpha(curve, tolerance)
    allowed = [
        i for i, (_, general) in enumerate(numbers) if not has_general or numbers[0][1] - general <= 10 * tolerance
    ]
    best = max(numbers[i][0] for i in allowed)
    assert chosen == curve[min(i for i in allowed if numbers[i][0] == best)]


@pytest.mark.slow
@pytest.mark.parametrize(("patience", "num_checks"), [(2, 3), (9, 6)])
def test_early_stop_stops(model: str, catalog: Catalog, tmp_path: Path, patience: int, num_checks: int) -> None:
    """A rate that changes nothing: the first check stays the best, and training ends ``patience`` checks later."""
    config = replace(CONFIG, learning_rate=1e-12, epochs=2, checks=6, patience=patience, alphas=1)
    result = finetune(model, catalog, config, out=tmp_path / "tuned")
    every = result.planned_steps // 6
    assert len(result.checks) >= num_checks
    assert result.best_step == every
    assert result.steps == (every * 3 if patience == 2 else result.planned_steps)
    logged = (tmp_path / "tuned" / "train" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, result.steps + 1))
    assert result.alpha == 0.0
    assert result.curve[0].general is None
    assert len(result.table) == 1


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[5])
from modeclip.data.catalog import Catalog
from modeclip.adapting.finetuning import finetune
from test_finetuning import CONFIG
finetune(sys.argv[4], Catalog.open(sys.argv[1]), CONFIG, out=sys.argv[2], tasks=sys.argv[3])
"""


@pytest.mark.slow
def test_killed_twice_and_run_again_gives_the_same(
    model: str, tuned: FinetuneResult, catalog: Catalog, folder: Path, tmp_path: Path
) -> None:
    """Killed in training, and between two alphas."""
    tasks, out = folder / "icons" / "tasks.lance", tmp_path / "tuned"
    for word in ('"checks": [[', '"found": {"0.0"'):
        process = Python("-c", SCRIPT, catalog.path, out, tasks, model, Path(__file__).parent, PYTHONWARNINGS="default")
        deadline = time.monotonic() + 240
        while not ((out / "notes.json").is_file() and word in (out / "notes.json").read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert not (out / "finetune.json").exists()
    result = finetune(model, catalog, CONFIG, out=out, tasks=str(tasks))
    ours, theirs = (
        {name: value for name, value in asdict(each).items() if name not in {"folder", "digest"}}
        for each in (result, tuned)
    )
    assert ours == theirs
    name = "open_clip_model.safetensors"
    assert (out / name).read_bytes() == (Path(tuned.folder) / name).read_bytes()


@pytest.mark.slow
def test_commands_print_tables_and_json(
    tuned: FinetuneResult, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> str:
        commands = {"finetune": finetune_command, "merge": merge_command}
        call(commands[str(words[0])], [str(word) for word in words[1:]])
        return capsys.readouterr().out

    best, seed = f"{tuned.folder}/best", f"{tuned.folder}/seed"
    merged = json.loads(run("merge", best, seed, "--out", tmp_path / "merged", "--weights", 3, 1, "--json"))
    assert [candidate["weight"] for candidate in merged["candidates"]] == [0.75, 0.25]
    assert "weighted average" in run("merge", best, seed, "--out", tmp_path / "merged", "--weights", 3, 1)
    own = shutil.copytree(folder / "catalog", tmp_path / "own")
    words = ("finetune", tmp_path / "merged", own, "--out", tmp_path / "out", "--epochs", 1)
    words += ("--batch-size", 32, "--checks", 1, "--alphas", 1, "--threads", 1, "--precision", "32-true")
    table = run(*words)
    assert all(word in table for word in ("own set", "before", "tuned", "after", "change", "page: "))
    again = json.loads(run(*words, "--json"))
    assert again["model"] == str(tmp_path / "merged")
    with pytest.raises(ModeclipError, match="precision must be auto"):
        run(*words[:-1], "wrong")
    with pytest.raises(ModeclipError, match=r"epochs: .*1 or more, got 0"):
        run(*words, "--epochs", 0)


def test_requests_that_cannot_work(
    model: str, tuned: FinetuneResult, catalog: Catalog, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos" / "one").mkdir(parents=True)
    for number in range(2):
        picture = Image.new("RGB", (32, 32), (80 * number, 0, 0))
        picture.save(tmp_path / "photos" / "one" / f"{number}.png")
    index(DataConfig(source=str(tmp_path / "photos")), tmp_path / "small")
    small, out = Catalog.open(tmp_path / "small"), tmp_path / "out"
    with pytest.raises(ModeclipError, match=r"1 classes.*at least 2"):
        finetune(model, small, replace(CONFIG, holdout="class"), out=out)
    with pytest.raises(ModeclipError, match=r"1 pairs with 1 captions.*at least 2.*add data or hold out less"):
        finetune(model, small, CONFIG, out=out)
    with pytest.raises(ModeclipError, match="unknown model 'nothing'"):
        finetune("nothing", catalog, CONFIG, out=out)
    with pytest.raises(ModeclipError, match=r"modeclip-icon names no weights.*modeclip-icon@TAG"):
        finetune("modeclip-icon", catalog, CONFIG, out=out)
    with pytest.raises(ModeclipError, match="holds no tasks"):
        finetune(model, catalog, CONFIG, out=out, tasks=str(folder / "catalog"))
    with pytest.raises(ModeclipError, match="is also the folder to write to"):
        finetune(tuned.folder, catalog, CONFIG, out=tuned.folder)
    with pytest.raises(
        ModeclipError, match=r"train.trainable last:9: the (text|image) tower has 3 blocks; expected last:1 to"
    ):
        finetune(model, catalog, replace(CONFIG, trainable="last:9"), out=out)
    with pytest.raises(ModeclipError, match="trainable routers: the model has no experts"):
        finetune(model, catalog, replace(CONFIG, trainable="routers"), out=out)
    assert not out.exists()


@pytest.mark.parametrize("trainable", ["ffn", "last:1"])
def test_what_is_not_trained_keeps_its_bytes(model: str, catalog: Catalog, tmp_path: Path, trainable: str) -> None:
    config = replace(CONFIG, epochs=1, checks=1, alphas=3, trainable=trainable)
    finetune(model, catalog, config, out=tmp_path / "out")
    plain = load_clip(model).model
    changes = set(ffn_parameters(plain) if trainable == "ffn" else last_parameters(plain, 1))
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    tuned = load_file(tmp_path / "out" / "best" / "open_clip_model.safetensors")
    chosen = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    between = load_clip(model)
    interpolate_into(between, tmp_path / "out" / "seed", tmp_path / "out" / "best", 1 / 3)
    for name, value in start.items():
        for state in (tuned, chosen, between.model.state_dict()):
            assert name in changes or torch.equal(state[name], value), name
    assert {name for name, value in start.items() if not torch.equal(tuned[name], value)} == changes
    assert TrainJob.load(tmp_path / "out" / "train" / "job.json").config.trainable == trainable


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected 1 or more, got 0"),
        ({"patience": 0}, "patience: expected 1 or more, got 0"),
        ({"holdout_fraction": 1.0}, r"holdout_fraction must lie in \(0, 1\), got 1.0"),
        ({"tolerance": -0.1}, r"tolerance must lie in \[0, 1\], got -0.1"),
        ({"learning_rate": 0.0}, "learning_rate: .*above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: .*finite.*above 0, got nan"),
        ({"templates": ("x",)}, "template 'x' has no {}"),
        ({"trainable": "last:0"}, "unknown finetune.trainable 'last:0'.*last:N"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        FinetuneConfig(**settings)  # type: ignore[arg-type]


class Counted:
    """Images that are only counted."""

    digest = "images"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def keys(self) -> list[str]:
        return [str(number) for number in range(self.count)]

    def digests(self) -> list[bytes]:
        return [key.encode() for key in self.keys()]

    def read(self, rows: np.ndarray) -> list[Image.Image]:
        raise AssertionError(f"no image is needed, asked for {rows}")


@pytest.mark.parametrize(
    ("num_train", "num_held_out", "num_copies", "num_classes", "answers", "steps", "words"),
    [
        (800, 200, 0, 10, 10, 100, []),
        (628, 157, 0, 674, 100, 100, ["674 different captions for 785 pairs, 1.2 a class"]),
        (90, 10, 0, 10, 5, 100, ["only 10 of 100 pairs are held out.* 10 percentage points"]),
        (800, 200, 0, 2, 1, 100, ["held-out images are of one class, 'c0'"]),
        (500, 200, 300, 10, 10, 100, ["300 of 1,000 pairs are not trained on"]),
        (800, 200, 0, 10, 10, 6, ["6 steps are all.*--epochs"]),
    ],
)
def test_what_makes_a_result_worth_less_is_said(
    num_train: int, num_held_out: int, num_copies: int, num_classes: int, answers: int, steps: int, words: list[str]
) -> None:
    split = Split(train=np.arange(num_train), held_out=num_train + np.arange(num_held_out), num_duplicates=num_copies)
    task = Task(
        name="own set",
        kind="classification",
        images=Counted(num_held_out),
        classnames=tuple(f"c{number}" for number in range(num_classes)),
        labels=np.arange(num_held_out) % answers,
    )
    found = warnings_of(split, task, steps)
    assert len(found) == len(words)
    for warning, word in zip(found, words, strict=True):
        assert re.search(word, warning)


def test_a_start_that_comes_out_unchanged_is_a_warning(
    model: str, catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate at which nothing changes: the start is the best of the line."""
    settings = replace(CONFIG, epochs=1, learning_rate=1e-12, checks=1, alphas=1)
    out = tmp_path / "tuned"
    own = str(shutil.copytree(catalog.path, tmp_path / "own.lance"))  # a catalog that others have open gets no column
    finetune_command(model, own, settings, out=out)
    shown = capsys.readouterr()
    content = json.loads((out / "finetune.json").read_text())
    assert content["alpha"] == 0
    [warning] = [warning for warning in content["warnings"] if "alpha 0" in warning]
    assert re.search("is the start itself, unchanged: no model on the line is better .* held-out images", warning)
    assert f"finetune: warning: {warning}" in shown.err
    assert warning in " ".join((out / "finetune.html").read_text().split())
    assert any("pairs are held out" in text for text in content["warnings"])
    finetune_command(model, own, settings, out=out)
    assert f"finetune: warning: {warning}" in capsys.readouterr().err
    del content["warnings"]  # as an older version wrote it
    (out / "finetune.json").write_text(json.dumps(content))
    read = FinetuneResult.read(out, content["digest"])
    assert read is not None
    assert read.warnings == ()


def test_a_result_that_looking_at_nothing_would_reach_is_a_warning(tuned: FinetuneResult) -> None:
    own = tuned.table[0]
    assert not warnings_after(replace(tuned, table=(replace(own, majority=0.0), *tuned.table[1:]), alpha=0.5))
    [warning] = warnings_after(replace(tuned, table=(replace(own, majority=1.0), *tuned.table[1:]), alpha=0.5))
    assert re.search(
        f"{100 * own.after.mean:.1f} % of the held-out images.*100.0 % would be.*most frequent class", warning
    )
    curve = (replace(tuned.curve[0], own=0.5), replace(tuned.curve[-1], own=0.75))
    [warning] = warnings_after(replace(tuned, table=(replace(own, majority=0.0),), alpha=0.0, curve=curve))
    assert re.search(r"up to 75.0 % against 50.0 %\) loses more than 1 points on the general tasks", warning)

"""A bundle of a real run grows: a new expert for a new topic, an expert that goes on, and nothing else changes."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from modeclip import MoDE
from modeclip.commands.mixture import assign as assign_command
from modeclip.commands.mixture import bundle as bundle_command
from modeclip.commands.mixture import extend as extend_command
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.selection import Selection
from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError
from modeclip.mixture.assigning import AssignConfig, assign
from modeclip.mixture.bundle import Bundle, RoutingConfig, load_bundle
from modeclip.mixture.extending import (
    ExtendConfig,
    continue_job,
    describe,
    extend,
    fit_new_clusters,
    new_expert_job,
)
from modeclip.mixture.manifest import Expert
from modeclip.models.checkpoints import Checkpoint, save_checkpoint
from modeclip.system.options import call
from modeclip.training.batches import job_rows, select_rows
from modeclip.training.jobs import TrainConfig, TrainJob, learning_rate_at
from support import Python, encode_picture, make_job, mark_done, weights_of

DISHES = [
    f"{style} {dish} with {side}"
    for style, dish, side in itertools.product(
        ("grilled", "creamy", "spicy", "homemade"),
        ("salmon fillet", "chicken curry", "lentil soup", "mushroom risotto"),
        ("steamed rice", "garlic bread", "roasted potatoes", "fresh parsley"),
    )
]
THRESHOLDS = AssignConfig(min_pairs=32)
QUICK = ExtendConfig(samples=64)
OLD_TASK = ["arrow left", "git branch", "file code"]


def catalog_of(folder: Path, captions: Sequence[str], images: Sequence[bytes] = ()) -> Catalog:
    folder.mkdir()
    if not images:
        draw = np.random.default_rng(0)
        pixels = [draw.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in captions]
        images = [encode_picture(Image.fromarray(picture)) for picture in pixels]
    pq.write_table(pa.table({"image": list(images), "caption": list(captions)}), folder / "pairs.parquet")
    index(DataConfig(source=str(folder / "pairs.parquet")), folder / "catalog")
    return Catalog.open(folder / "catalog")


@pytest.fixture(scope="module")
def old(small_run: Path) -> Catalog:
    """The catalog that the bundle was made from."""
    return Catalog.open(small_run / "catalog.lance")


@pytest.fixture(scope="module")
def dishes(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Pairs of another topic."""
    return catalog_of(tmp_path_factory.mktemp("dishes") / "dishes", DISHES)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory, old: Catalog) -> Catalog:
    """More pairs of the old topic, of the first expert mostly."""
    rows = np.concatenate([old.select(expert=0)[:60], old.select(expert=1)[:5]])
    captions = old.read(["caption"], rows)["caption"].tolist()
    return catalog_of(tmp_path_factory.mktemp("more") / "more", captions, old.encoded_images(rows))


@pytest.fixture
def bundle(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, with the jobs of its run beside it."""
    shutil.copytree(small_run / "bundle", tmp_path / "run" / "bundle")
    (tmp_path / "run" / "models").symlink_to(small_run / "models")
    return tmp_path / "run" / "bundle"


def hashes(bundle: Path, *folders: str) -> dict[str, str]:
    content = json.loads((bundle / "mode.json").read_text())["sha256"]
    return {file: digest for file, digest in content.items() if file.startswith(tuple(f"{f}/" for f in folders))}


SCRIPT = """
import sys
from pathlib import Path
from modeclip.mixture.assigning import AssignConfig
from modeclip.data.catalog import Catalog
from modeclip.mixture.extending import ExtendConfig, extend
bundle, catalog, out, old = sys.argv[1:]
extend(Path(bundle), Catalog.open(catalog), Path(out), thresholds=AssignConfig(min_pairs=32, new_fraction=0.05),
       config=ExtendConfig(samples=64), fitted_on=Catalog.open(old))
"""


def test_a_new_topic_gets_an_expert_of_its_own(bundle: Path, dishes: Catalog, old: Catalog, tmp_path: Path) -> None:
    """Killed in training, then the same again: the expert is there, the others are as they were."""
    out, before = tmp_path / "out", hashes(bundle, "seed", "expert-0", "expert-1")
    wanted = AssignConfig(min_pairs=32, new_fraction=0.05)
    assert [p.action for p in assign(dishes, load_bundle(bundle), wanted, fitted_on=old).proposals] == ["new"]
    process = Python("-c", SCRIPT, bundle, dishes.path, out, old.path)
    while not (out / "expert-2" / "lock").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert load_bundle(bundle).num_experts == 2
    routed = MoDE.load(bundle).route(OLD_TASK)
    result = extend(bundle, dishes, out, thresholds=wanted, config=QUICK, fitted_on=old)

    opened, job = load_bundle(bundle), TrainJob.load(out / "expert-2" / "job.json")
    seed = TrainJob.load(bundle.parent / "models" / "seed" / "job.json")
    assert (job.start_digest, job.first_step, job.mask) == (seed.digest, seed.last_step, "novel")
    assert hashes(bundle, "seed", "expert-0", "expert-1") == before
    assert opened.num_experts == 3
    assert opened.experts[2].size == len(dishes.select(mask="novel")) > 0.8 * len(DISHES)
    assert {"with", "salmon", "soup", "rice", "spicy", "creamy"} & set(opened.experts[2].keywords)
    assert (opened.edits[0]["action"], opened.edits[0]["job"]) == ("add", job.digest)

    again = MoDE.load(bundle)
    now = again.route(OLD_TASK)
    assert now.class_weights[:, 2].max() < 0.02
    kept = now.class_weights[:, :2] / now.class_weights[:, :2].sum(1, keepdims=True)
    assert kept == pytest.approx(routed.class_weights, abs=1e-9)
    assert (again.route(["salmon soup with rice", "chicken curry"]).class_weights.argmax(1) == 2).all()
    assert len(again.task(["chicken curry", "arrow left"]).classify([Image.new("RGB", (32, 32))])) == 1

    manifest = (bundle / "mode.json").read_bytes()
    assert extend(bundle, dishes, out, thresholds=wanted, config=QUICK, fitted_on=old) == result
    assert (bundle / "mode.json").read_bytes() == manifest, "given again, nothing is left to do"
    known = assign(dishes, opened, THRESHOLDS)
    assert known.experts[2].num_pairs > 0.8 * len(DISHES)
    assert known.num_novel < 0.2 * len(DISHES)


def test_an_expert_goes_on_from_its_checkpoint(bundle: Path, more: Catalog, old: Catalog, tmp_path: Path) -> None:
    before, sizes = hashes(bundle, "seed", "expert-1"), [expert.size for expert in load_bundle(bundle).experts]
    result = extend(bundle, more, tmp_path / "out", thresholds=THRESHOLDS, config=QUICK, fitted_on=old)
    assert (result.action, result.expert, result.samples) == ("continue", 0, 64)
    job, opened = TrainJob.load(tmp_path / "out" / "expert-0" / "job.json"), load_bundle(bundle)
    first = TrainJob.load(bundle.parent / "models" / "expert-0" / "job.json")
    assert (job.start_digest, job.first_step, job.last_step) == (first.digest, first.last_step, first.last_step + 2)
    assert job.learning_rate(job.first_step) == pytest.approx(first.learning_rate(first.first_step))
    assert job.learning_rate(job.last_step) == pytest.approx(0)
    assert hashes(bundle, "seed", "expert-1") == before
    assert [expert.size for expert in opened.experts] == [sizes[0] + result.num_pairs, sizes[1]]
    folder = opened.model_folder(0)
    assert weights_of(folder) == weights_of(tmp_path / "out" / "expert-0")
    with pytest.raises(ModeclipError, match=r"to continue expert 0 of .* give .* another --out"):
        extend(bundle, more, tmp_path / "out", action="new", thresholds=THRESHOLDS, config=QUICK, fitted_on=old)


def test_only_selected_pairs_are_counted_and_trained_on(
    bundle: Path, more: Catalog, old: Catalog, tmp_path: Path
) -> None:
    more = Catalog.open(shutil.copytree(more.path, tmp_path / "more.lance"))
    few = np.arange(len(more)) % 3 > 0
    more.add_columns({"few": few}, facts={"made": "here"})
    selection = Selection(mask="few")
    opened = load_bundle(bundle)
    assert assign(more, opened, THRESHOLDS, fitted_on=old, selection=selection).num_pairs == few.sum()
    job = continue_job(opened, 0, more, tmp_path / "job", QUICK, selection)
    rows = select_rows(job, more)
    assert rows.tolist() == [row for row in more.select(expert=0, novel=False) if few[row]]
    assert job.selection == selection
    novel = np.zeros(len(more), bool)
    novel[:9] = True
    more.add_columns({"novel": novel}, facts=more.facts("novel"))
    new = new_expert_job(opened, more, tmp_path / "new", QUICK, selection)
    assert select_rows(new, more).tolist() == [1, 2, 4, 5, 7, 8]
    found = fit_new_clusters(opened, more, QUICK, old, selection)
    assert {row for card in found.cards for row in card["random_rows"]} <= {1, 2, 4, 5, 7, 8}
    assert sum(card["size"] for card in found.cards) == 6


def test_jobs_without_a_checkpoint_at_hand_start_from_the_weights(
    small_run: Path, more: Catalog, old: Catalog, tmp_path: Path
) -> None:
    alone = load_bundle(shutil.copytree(small_run / "bundle", tmp_path / "alone"))
    assign(more, alone, THRESHOLDS, fitted_on=old)
    job = continue_job(alone, 0, more, tmp_path / "job", ExtendConfig())
    config = alone.lineage["recipe"]["train"]
    assert job.start_from is None
    assert job.start_digest == alone.manifest["sha256"]["expert-0/open_clip_model.safetensors"]
    assert job.config.model == str(alone.path / "expert-0")
    assert job.first_step == 0
    assert job.config.learning_rate == pytest.approx(0.0596 * config["learning_rate"], rel=0.1)
    assert job.learning_rate(0) == 0
    rows = job_rows(job, more)
    assert more.read(["expert", "novel"], rows)["expert"].tolist() == [0] * len(rows)
    assert not more.read(["novel"], rows)["novel"].any()
    passes = 5 * 32 / alone.experts[0].size
    assert job.last_step == max(1, round(passes * len(rows)) // 32)
    other = tmp_path / "other"
    shutil.copytree(small_run / "models" / "seed", other)
    with pytest.raises(ModeclipError, match="not the finished job that expert-0 of"):
        continue_job(alone, 0, more, tmp_path / "job", ExtendConfig(start=str(other)))
    given = new_expert_job(alone, more, tmp_path / "job", ExtendConfig(start=str(other)))
    assert (given.start_from, given.name, given.mask) == (str(other.resolve()), "expert-2", "novel")
    with pytest.raises(ModeclipError, match="has experts 0 to 1, got 2"):
        continue_job(alone, 2, more, tmp_path / "job", ExtendConfig())


def test_a_new_expert_trains_what_the_others_did_and_as_long(tmp_path: Path) -> None:
    """From the seed's job, which trained whole; of a divided budget it gets what each of the first experts got."""
    train = TrainConfig(model="modeclip-icon-xxxs", samples=32 * 8 * 4, batch_size=8)
    pairs = catalog_of(tmp_path / "pairs", DISHES[:8])
    seed = make_job(pairs, tmp_path / "run" / "models" / "seed", train, name="seed", role="seed")
    mark_done(seed)
    save_checkpoint(Path(seed.folder), Checkpoint(step=1, digest=seed.digest, model={}, optimizer={}, facts={}), 1)
    recipe = {"train": asdict(replace(train, trainable="ffn")), "experts": {"budget": "matched"}}
    bundle = Bundle(
        path=tmp_path / "run" / "bundle",
        encoder="tfidf",
        routing=RoutingConfig(),
        fine_centers=np.eye(3, dtype=np.float32),
        expert_of_fine=np.arange(3),
        experts=tuple(Expert(name=f"expert-{k}", folder=f"expert-{k}", size=9) for k in range(2)),
        lineage={"recipe": recipe, "jobs": {"seed": seed.digest}},
    )
    job = new_expert_job(bundle, pairs, tmp_path / "job", ExtendConfig())
    assert (job.start_from, job.config.trainable) == (seed.folder, "ffn")
    assert job.last_step - job.first_step == 5 * 4 // 2
    added = Expert(name="expert-2", folder="expert-2", size=9)
    edits = [
        {"action": "replace", "expert": "expert-0", "job": "x"},
        {"action": "add", "expert": "expert-2", "job": "y"},
    ]
    grown = replace(bundle, experts=(*bundle.experts, added), lineage={**bundle.lineage, "edits": edits})
    again = new_expert_job(grown, pairs, tmp_path / "job", ExtendConfig())
    assert again.name == "expert-3"
    assert again.last_step - again.first_step == job.last_step - job.first_step


@pytest.mark.parametrize("has_checkpoint", [False, True])
@pytest.mark.parametrize(
    ("given", "share"), [(None, 27 / 32), ("job", 0.0), ("ViT-B-32@openai", 0.0), ("x.pt", 27 / 32)]
)
def test_an_expert_goes_on_at_the_rate_that_it_started_with(
    tmp_path: Path, given: str | None, share: float, has_checkpoint: bool
) -> None:
    """Experts of a published or of a finished model had a whole schedule: the highest rate, behind a warm-up."""
    train = TrainConfig(model="modeclip-icon-xxxs", samples=32 * 8 * 4, batch_size=8).decided()
    pairs = catalog_of(tmp_path / "pairs", DISHES[:8])
    pairs.add_columns({"expert": np.zeros(8, np.int32), "novel": np.zeros(8, bool)}, facts={"made": "here"})
    path = tmp_path / "run" / "bundle"
    (path / "expert-0").mkdir(parents=True)
    if given == "job":
        given = str(tmp_path / "given")
        mark_done(make_job(pairs, tmp_path / "given", train))
    jobs = {}
    if has_checkpoint:
        folder = tmp_path / "run" / "models" / "expert-0"
        expert = make_job(pairs, folder, train, role="expert", index=0, first_share=share)
        mark_done(expert)
        checkpoint = Checkpoint(step=1, digest=expert.digest, model={}, optimizer={}, facts={})
        save_checkpoint(folder, checkpoint, 1)
        jobs = {"expert-0": expert.digest}
    bundle = Bundle(
        path=path,
        encoder="tfidf",
        routing=RoutingConfig(),
        fine_centers=np.eye(2, dtype=np.float32),
        expert_of_fine=np.zeros(2, np.int64),
        experts=(Expert(name="expert-0", folder="expert-0", size=9),),
        lineage={"recipe": {"train": asdict(train), "experts": {"start": given}}, "jobs": jobs},
        manifest={"sha256": {}},
    )
    job = continue_job(bundle, 0, pairs, tmp_path / "job", ExtendConfig(samples=800))
    assert (job.start_from is not None) == has_checkpoint
    highest = max(map(job.learning_rate, range(job.first_step, job.last_step)))
    warmed = train.highest_rate if share == 0 else learning_rate_at(share, train)
    assert highest == pytest.approx(warmed, rel=1e-3)
    if not has_checkpoint:
        return
    shutil.rmtree(folder / "checkpoints")  # from the weights; their job still tells the rate
    alone = continue_job(bundle, 0, pairs, tmp_path / "job", ExtendConfig(samples=800))
    assert (alone.start_from, alone.config.learning_rate) == (None, pytest.approx(warmed))


def test_new_clusters_are_as_dense_as_the_old(bundle: Path, dishes: Catalog, old: Catalog) -> None:
    opened, dishes = load_bundle(bundle), Catalog.open(dishes.path)
    assign(dishes, opened, THRESHOLDS, fitted_on=old)
    clusters = fit_new_clusters(opened, dishes, ExtendConfig(), old)
    rows = dishes.select(mask="novel")
    density = sum(expert.size for expert in opened.experts) / len(opened.fine_centers)
    assert len(clusters.fine_centers) == max(1, round(len(rows) / density))
    assert sum(card["size"] for card in clusters.cards) == len(rows)
    captions = dishes.read(["caption"])["caption"]
    for card in clusters.cards:
        assert [captions[row] for row in card["nearest_rows"]] == list(card["nearest_captions"])
    assert clusters.fine_quantiles is not None
    assert len(clusters.fine_quantiles.distances) == len(opened.fine_centers) + len(clusters.fine_centers)


def test_many_passes_over_few_pairs_are_said(bundle: Path, dishes: Catalog, tmp_path: Path) -> None:
    """The plan has the passes that the samples make; a warning comes from 10 on that are 4 times the usual ones."""
    opened, dishes = load_bundle(bundle), Catalog.open(dishes.path)  # as it is now
    assign(dishes, opened, AssignConfig())
    pairs = len(dishes.select(mask="novel"))
    usual = (
        sum(
            TrainJob.load(bundle.parent / "models" / f"expert-{k}" / "job.json").last_step
            - TrainJob.load(bundle.parent / "models" / "seed" / "job.json").last_step
            for k in range(2)
        )
        * 32
        / sum(expert.size for expert in opened.experts)
    )
    for samples in (1000 * pairs, 2 * pairs):
        job = new_expert_job(opened, dishes, tmp_path / "job", ExtendConfig(samples=samples, batch_size=4))
        plan, *warnings = describe(opened, job, dishes)
        passes = 4 * (job.last_step - job.first_step) / pairs
        assert f"{pairs:,} pairs, {passes:,.1f} passes over them (the bundle's experts: {usual:,.1f})" in plan
        assert len(warnings) == (passes > max(10, 4 * usual))
        assert all(f"{passes:,.0f} passes over {pairs:,} pairs" in line for line in warnings)
    assert passes < 10


def test_what_cannot_be_extended(bundle: Path, more: Catalog, old: Catalog, tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"65 new pairs.*--expert K or --new"):
        extend(bundle, more, tmp_path / "out", fitted_on=old)
    with pytest.raises(ModeclipError, match=r"extend\.learning_rate: expected a finite number above 0, got -1"):
        ExtendConfig(learning_rate=-1.0)
    with pytest.raises(ModeclipError, match=r"extend\.samples: expected 1 or more, got 0"):
        ExtendConfig(samples=0)
    assert not (tmp_path / "out" / "extend.json").exists()


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (Selection(mask="lost"), "lost"),
        (Selection(where=("caption = 'nothing like it'",)), "has no pair"),
        (Selection(where=("key =",)), "--where"),
    ],
)
def test_a_selection_that_selects_nothing_assigns_nothing(
    bundle: Path, old: Catalog, tmp_path: Path, selection: Selection, words: str
) -> None:
    pairs = catalog_of(tmp_path / "pairs", DISHES[:8])
    before = pairs.columns
    with pytest.raises(ModeclipError, match=words):
        extend(bundle, pairs, tmp_path / "out", thresholds=THRESHOLDS, config=QUICK, fitted_on=old, selection=selection)
    assert Catalog.open(pairs.path).columns == before
    assert not (tmp_path / "out" / "extend.json").exists()


def test_a_selection_may_ask_about_what_assigning_finds(bundle: Path, old: Catalog, tmp_path: Path) -> None:
    pairs = catalog_of(tmp_path / "pairs", DISHES[:8])
    found = assign(pairs, load_bundle(bundle), THRESHOLDS, fitted_on=old, selection=Selection(where=("novel",)))
    assert found.num_pairs == found.num_novel > 0


def run(*words: object) -> None:
    """Give a command as the command line does."""
    commands = {"assign": assign_command, "extend": extend_command, "bundle": bundle_command}
    call(commands[str(words[0])], [str(word) for word in words[1:]])


def test_commands(
    bundle: Path, more: Catalog, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = ("--catalog", small_run)
    run("assign", more.path, "--bundle", bundle, "--min-pairs", "32", *known)
    shown = capsys.readouterr().out
    assert "worth doing: continue expert-0 on" in shown
    run("assign", more.path, "--bundle", bundle, *known, "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["num_pairs"], found["proposals"]) == (65, [])
    run("bundle", bundle, "--put", f"expert-1={small_run / 'models' / 'expert-1'}")
    shown = capsys.readouterr().out
    assert "expert-1-edit1" in shown
    assert "replace expert-1: job" in shown
    run("bundle", bundle, "--json")
    assert [expert["folder"] for expert in json.loads(capsys.readouterr().out)["experts"]] == [
        "expert-0",
        "expert-1-edit1",
    ]
    with pytest.raises(ModeclipError, match="expected an expert and a folder, such as expert-2="):
        run("bundle", bundle, "--put", "2")
    with pytest.raises(ModeclipError, match="--expert and --new exclude each other"):
        run("extend", bundle, more.path, "--out", tmp_path / "o", "--new", "--expert", "1")
    with pytest.raises(ModeclipError, match=r"--novel-beyond: expected 0\.5 to"):
        run("assign", more.path, "--bundle", bundle, "--novel-beyond", "2")

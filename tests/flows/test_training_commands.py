"""The commands that train, as a user gives them: a plan, experts one by one, a bundle from the first one on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from pydantic import TypeAdapter

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.embedding import EmbedConfig, embed
from modeclip.clustering.fitting import ClusterConfig, cluster
from modeclip.commands.mixture import classify, extend, route
from modeclip.commands.training import status, train, train_experts
from modeclip.data.catalog import Catalog
from modeclip.data.images import decode_image
from modeclip.data.selection import Selection
from modeclip.errors import ModeclipError
from modeclip.evaluation.systems import open_systems
from modeclip.mixture.bundle import load_bundle
from modeclip.mixture.manifest import Lineage
from modeclip.models.clip import load_clip
from modeclip.models.pool import ModelRef
from modeclip.pipeline.run_folder import RunFolder
from modeclip.system.options import call
from modeclip.training.batches import job_rows
from modeclip.training.costs import Measurement
from modeclip.training.experts import ExpertsConfig
from modeclip.training.jobs import EngineConfig, TrainConfig, TrainJob, TrainResult
from support import weights_of, with_weights

pytestmark = pytest.mark.usefixtures("trains_here")
MODEL = "modeclip-icon-xxxs"
SETTINGS = (
    *("--model", MODEL, "--samples", "512", "--batch-size", "16", "--precision", "32-true", "--log-every", "1"),
)


@pytest.fixture(scope="module")
def clustered(icons_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of real icons that is clustered and not trained."""
    out = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(icons_catalog, out / "catalog.lance")
    embed(Catalog.open(out), EmbedConfig(encoder="tfidf", dimension=16))
    cluster(Catalog.open(out), ClusterConfig(num_fine=8, num_experts=2, num_iterations=3)).save(out / "clusters")
    return out


@pytest.fixture(scope="module")
def trained(clustered: Path) -> Path:
    """The same with its seed and expert 1."""
    assert run(train_experts, clustered, *SETTINGS, "--only", "1", "--jobs", "1") is None
    return clustered


def run(command: Callable[..., None], *words: object) -> Any:
    return call(command, [str(word) for word in words])


def test_a_plan_stops_there(
    clustered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Measurement(seconds_per_step=2.0, memory_gb=1.0, checkpoint_bytes=3_000_000, model_bytes=1_000_000)
    monkeypatch.setattr("modeclip.training.costs.measure", lambda *_: found)
    copy = shutil.copytree(clustered, tmp_path / "copy", ignore=shutil.ignore_patterns("models", "bundle"))
    run(train_experts, copy, *SETTINGS, "--budget", "matched", "--controls", "random", "one-step", "--plan", "--json")
    content = json.loads(capsys.readouterr().out)
    names = ["seed", *(f"{kind}-{k}" for kind in ("expert", "random", "one-step") for k in range(2))]
    assert [job["name"] for job in content["jobs"]] == names
    sizes = [len(Catalog.open(copy).select(expert=k)) for k in range(2)]
    assert [job["rows"] for job in content["jobs"]][1:5] == sizes * 2
    assert not (copy / "models").exists()
    assert not (copy / "bundle").exists()


@pytest.mark.slow
def test_the_bundle_works_from_the_first_expert_on(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = load_bundle(trained / "bundle")
    assert [expert.folder for expert in bundle.experts] == ["seed", "expert-1"]
    assert weights_of(trained / "bundle" / "expert-1") == weights_of(trained / "models" / "expert-1")
    run(status, trained, "--json")
    assert [(row["name"], row["state"]) for row in json.loads(capsys.readouterr().out)] == [
        ("seed", "finished"),
        ("expert-1", "finished"),
    ]


def test_the_same_again_does_only_what_is_missing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained / "models").rglob("*.safetensors")}
    manifest = (trained / "bundle" / "mode.json").stat().st_mtime_ns
    run(train_experts, trained, *SETTINGS, "--only", "1", "--json")
    content = json.loads(capsys.readouterr().out)
    assert content["plan"] is None
    assert {path: path.stat().st_mtime_ns for path in (trained / "models").rglob("*.safetensors")} == before
    assert (trained / "bundle" / "mode.json").stat().st_mtime_ns == manifest
    run(train_experts, trained, *SETTINGS, "--commands", "--json")
    [line] = json.loads(capsys.readouterr().out)
    assert line.endswith("expert-0/job.json")  # nothing else is missing, and the seed is there
    run(status, trained)
    assert "waiting" in capsys.readouterr().out


def test_a_bundle_that_was_edited_is_left_alone(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    config = TrainConfig(model=MODEL, samples=512, batch_size=16, engine=EngineConfig(precision="32-true"))
    folder = RunFolder(folder=copy, training=config, experts=ExpertsConfig(dense=False, dense_total=False))
    assert [job.name for job in folder.jobs if TrainResult.read(job) is None] == ["expert-0"]
    path = copy / "bundle" / "mode.json"
    content = json.loads(path.read_text())
    edited = content | {"lineage": {"jobs": {}, "edits": [{"expert": "expert-9"}]}}
    path.write_text(json.dumps(edited))
    assert folder.refresh_bundle() == copy / "bundle"
    assert json.loads(path.read_text()) == edited
    path.write_text(json.dumps(content | {"lineage": {"jobs": {}}}))
    folder.refresh_bundle()
    assert json.loads(path.read_text())["lineage"]["jobs"] == content["lineage"]["jobs"]


@pytest.mark.slow
def test_an_expert_for_class_names_is_in_the_bundle_and_answers(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked alone, it gives the probabilities that open_clip gives with the folder that was trained."""
    copy, names = shutil.copytree(trained, tmp_path / "copy"), ["heart", "arrow left"]
    run(train_experts, copy, *SETTINGS, "--for-classes", ",".join(names))
    bundle = load_bundle(copy / "bundle")
    assert [expert.folder for expert in bundle.experts] == ["seed", "expert-1"]
    [own] = bundle.class_experts
    assert own.name == "expert-heart_arrow_left"
    model = copy / "models" / own.name
    assert weights_of(bundle.path / own.folder) == weights_of(model)
    capsys.readouterr()
    picture = Path(__file__).parents[2] / "docs" / "assets" / "heart.png"
    run(classify, bundle.path, picture, "--classes", ",".join(names), "--expert", own.name, "--json")
    [record] = json.loads(capsys.readouterr().out)
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{model}")
    words = open_clip.get_tokenizer(f"local-dir:{model}")(names)
    with torch.inference_mode():
        image, texts, scale = clip.eval()(preprocess(decode_image(picture.read_bytes()))[None], words)
        expected = dict(zip(names, (scale * image @ texts.T).softmax(dim=-1)[0].tolist(), strict=True))
    assert {found["name"]: found["probability"] for found in record["classes"]} == pytest.approx(expected, abs=1e-4)
    run(route, bundle.path, "--classes", ",".join(names), "--expert", own.name, "--json")
    assert json.loads(capsys.readouterr().out)["weights"] == [1.0]
    [system] = open_systems([f"{bundle.path}#{own.name}"])
    assert system.models[0].digest == ModelRef.of("", bundle.path / own.folder).digest
    with pytest.raises(ModeclipError, match=r"unknown expert .*'expert-pets'; known: .*expert-heart_arrow_left"):
        run(route, bundle.path, "--classes", "a,b", "--expert", "expert-pets")


@pytest.fixture
def with_seed(trained: Path, tmp_path: Path) -> Path:
    """A copy of the clustered folder with the trained seed alone."""
    copy = shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("bundle", "expert-*"))
    assert [path.name for path in (copy / "models").iterdir() if path.is_dir()] == ["seed"]
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "steps"), [("paper", 5), ("matched", 2)])
def test_an_extension_takes_as_many_samples_as_the_experts_did(
    with_seed: Path,
    icons_catalog: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    budget: str,
    steps: int,
) -> None:
    """The same pairs again are one more pass at the experts' own rate, and a new expert sees as much as they did."""
    run(train_experts, with_seed, *SETTINGS, "--budget", budget, "--only", "1", "--dense")
    expert = TrainJob.load(with_seed / "models" / "expert-1" / "job.json")
    assert expert.last_step - expert.first_step == steps
    assert load_bundle(with_seed / "bundle").lineage["recipe"]["experts"]["budget"] == budget
    assert load_bundle(with_seed / "bundle").lineage["recipe"]["train"]["learning_rate"] is not None
    pairs = shutil.copytree(icons_catalog, tmp_path / "more" / "catalog.lance").parent
    bundle, out = with_seed / "bundle", tmp_path / "out"
    capsys.readouterr()
    run(extend, bundle, pairs, "--out", out, "--expert", "1", "--json")
    done = json.loads(capsys.readouterr().out)
    new, own = done["num_pairs"], load_bundle(bundle).experts[1].size - done["num_pairs"]
    assert 0.9 * own < new <= own
    assert done["samples"] == round(steps * 16 * new / own) // 16 * 16


def test_controls_are_split_as_the_clustering_was_made(clustered: Path, tmp_path: Path) -> None:
    """The seed and the ratios are those of the clustering, whatever the models' seed; an old folder tells none."""
    copy = shutil.copytree(clustered, tmp_path / "copy", ignore=shutil.ignore_patterns("models", "bundle"))
    made_by = ClusterConfig(num_fine=8, num_experts=2, num_iterations=3, max_size_ratio=None, seed=4)
    cluster(Catalog.open(copy), made_by).save(copy / "clusters")
    experts, training = ExpertsConfig(controls=("random", "one-step")), TrainConfig(seed=7)
    folder = RunFolder(folder=copy, training=training, experts=experts)
    folder.add_controls()
    for_recipe = RunFolder(folder=copy, training=TrainConfig(seed=2), experts=experts, clustered_by=ClusterConfig())
    assert for_recipe.cluster_config == folder.cluster_config == made_by
    assert folder.catalog.facts("random_expert")["seed"] == 4
    fit = folder.catalog.facts("one_step_expert")["fit"]
    assert (fit["max_size_ratio"], fit["num_iterations"], fit["seed"]) == (None, 3, 4)
    (copy / "clusters" / "config.json").unlink()
    old = RunFolder(folder=copy, training=training, experts=experts).cluster_config
    assert old == ClusterConfig(num_fine=8, num_experts=2, seed=7)


def test_a_clustering_that_is_not_the_catalogs(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    clustering = Clustering.load(copy / "clusters")
    replace(clustering, fine_centers=clustering.fine_centers + 1).save(copy / "clusters")
    with pytest.raises(ModeclipError, match=r"not the clustering .*column expert.*run modeclip cluster"):
        run(train_experts, copy, *SETTINGS)


def test_other_settings_are_refused_by_name(trained: Path) -> None:
    with pytest.raises(ModeclipError, match=r"seed .*learning.rate was 0\.001, now 0\.01.*--resume never"):
        run(train_experts, trained, *SETTINGS, "--learning-rate", "0.01")
    with pytest.raises(ModeclipError, match=r"--resume.*latest, stale or never, got 'x'.*--start"):
        run(train_experts, trained, *SETTINGS, "--resume", "x")


def test_one_expert_for_a_tasks_classes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "arrows.txt").write_text("arrow left\narrow right\n")
    words = ("--for-classes", tmp_path / "arrows.txt", "--nearest", "2", "--commands", "--json")
    run(train_experts, trained, *SETTINGS, *words)
    [line] = json.loads(capsys.readouterr().out)  # the seed is there
    job, catalog = TrainJob.load(Path(line.split()[-1])), Catalog.open(trained)
    assert (job.name, job.start_from) == ("expert-arrows", str(trained / "models" / "seed"))
    rows = job_rows(job, catalog)
    assert rows.tolist() == catalog.select(mask="prior_arrows").tolist()
    assert 0 < len(rows) < len(catalog)


def test_train_of_a_part_continues_a_seed_as_its_expert_does(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rows, steps and start as train-experts gives expert 1: the same bits."""
    out = tmp_path / "own"
    words = (trained, *SETTINGS, "--out", out, "--where", "expert=1", "--resume", trained / "models" / "seed")
    run(train, *words, "--json")
    assert json.loads(capsys.readouterr().out)["samples"] == 5 * 16
    assert weights_of(out) == weights_of(trained / "models" / "expert-1")
    done = (out / "done.json").stat().st_mtime_ns
    run(train, *words)
    assert (out / "done.json").stat().st_mtime_ns == done  # it is finished
    with pytest.raises(ModeclipError, match=r"own .*where\.expert was 1, .*another folder"):
        run(train, *words[:-4], "--resume", trained / "models" / "seed")
    run(train, out / "job.json")
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{run}/models/seed/job.json", "--samples", "9000"), r"job\.json.*all settings.*without options"),
        (("{run}/models/seed/job.json", "--threads", "2"), r"job\.json.*all settings.*without options"),
        (("{run}", "--where", "expert"), "--where 'expert'.*COLUMN=VALUE.*expert=3"),
        (("{run}", "--where", "expert="), "--where 'expert='.*COLUMN=VALUE"),
        (("{run}", "--resume", "ViT-B-32"), "--resume ViT-B-32: .*latest, never, .*finished job"),
        (("{run}", "--batch-size", "1"), r"batch-size.*at least 2"),
        (("{run}", "--save-every", "often"), r"save-every.*number with s, min.*got 'often'"),
        (("{run}", "--min-crop-share", "0"), r"min-crop-share.*got 0"),
        (("{run}", "--where", "expert=7"), "expert"),
        (("nowhere",), "no catalog at 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(trained: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModeclipError, match=message) as caught:
        run(train, *[word.format(run=trained) for word in words], "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(train_experts, "--help")
    shown = capsys.readouterr().out
    for name in (
        "micro-batch",
        "keep-checkpoints",
        "patch-dropout",
        "report-to",
        "budget",
        "processes-per-job",
        "start",
    ):
        assert f"--{name}" in shown


@pytest.mark.slow
def test_a_model_as_the_start_stands_in_for_missing_experts(clustered: Path, tmp_path: Path) -> None:
    """Fine-tuning: the start is exported, the expert has a schedule of its own, the bundle has both."""
    copy = shutil.copytree(clustered, tmp_path / "copy", ignore=shutil.ignore_patterns("models", "bundle"))
    run(train_experts, copy, *SETTINGS, "--start", with_weights(MODEL, tmp_path), "--only", "0", "--jobs", "1")
    job = TrainJob.load(copy / "models" / "expert-0" / "job.json")
    assert (job.first_step, job.first_share, job.last_share, job.start_from) == (0, 0.0, 1.0, None)
    assert [expert.folder for expert in load_bundle(copy / "bundle").experts] == ["expert-0", "seed"]


def test_a_checkpoint_as_the_start_is_of_the_model_that_fits_the_pairs(clustered: Path, tmp_path: Path) -> None:
    """No model is named: the plan's is the one that the seed is exported as."""
    clip = load_clip("modeclip-icon", seed=0)
    torch.save({"epoch": 1, "name": "x", "state_dict": clip.model.state_dict()}, tmp_path / "epoch_1.pt")
    copy = shutil.copytree(clustered, tmp_path / "copy", ignore=shutil.ignore_patterns("models", "bundle"))
    folder = RunFolder(folder=copy, experts=ExpertsConfig(start=str(tmp_path / "epoch_1.pt"), only=(1,)))
    assert folder.training.model == "auto"
    assert {job.config.model for job in folder.jobs} == {"modeclip-icon"} == {folder.decided.model}
    assert {job.config.learning_rate for job in folder.members} == {folder.decided.learning_rate} != {None}
    seed = load_clip(folder.seed).model.state_dict()
    assert all(torch.equal(value, seed[name]) for name, value in clip.model.state_dict().items())


def test_a_bundle_tells_the_selection_in_words_that_can_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(folder=tmp_path, selection=Selection(where=("width > 0 AND site = 'x'",), mask="m_kept"))
    folder.__dict__["members"] = [SimpleNamespace(config=TrainConfig(), role="expert", start_digest="")]
    told: dict[str, Any] = {}
    monkeypatch.setattr(
        "modeclip.pipeline.run_folder.assemble_bundle", lambda *_, **more: told.update(more) or tmp_path
    )
    folder.write_bundle()
    lineage = TypeAdapter(Lineage).validate_json(json.dumps(told["lineage"]))
    assert lineage.recipe is not None
    assert Selection.of(lineage.recipe.selection or {}) == folder.selection

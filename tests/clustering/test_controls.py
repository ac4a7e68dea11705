"""The controls: whose rows are whose, and that adding them touches nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.controls import ONE_STEP_FOLDER, add_controls, cluster_in_one_step, split_at_random
from modeclip.clustering.embedding import COLUMN
from modeclip.clustering.fitting import ClusterConfig, cluster
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import assemble_bundle, load_bundle
from modeclip.training.experts import pin_jobs
from modeclip.training.jobs import TrainJob
from modeclip.training.trainer import train
from support import InThisProcess, weights_of

Command = Callable[..., subprocess.CompletedProcess[str]]
NUM_EXPERTS = 3
CONFIG = ClusterConfig(num_fine=12, num_experts=NUM_EXPERTS)


@pytest.fixture(scope="module")
def indexed(icons_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real icons with vectors of words in place of a sentence encoder's, clustered."""
    out = tmp_path_factory.mktemp("indexed")
    catalog = Catalog.open(shutil.copytree(icons_catalog, out / "catalog.lance"))
    words = [set(caption.split()) for caption in catalog.read(["caption"])["caption"]]
    vocabulary = {word: np.random.default_rng(n).normal(size=16) for n, word in enumerate(sorted(set().union(*words)))}
    x = np.array([sum(vocabulary[word] for word in sorted(caption)) for caption in words])
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    catalog.add_columns({COLUMN: x}, facts={"encoder": "words"})
    cluster(catalog, CONFIG).save(out / "clusters")
    return out


@pytest.fixture
def folder(indexed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(indexed, tmp_path / "run")


def read(folder: Path, column: str) -> np.ndarray:
    return Catalog.open(folder / "catalog.lance").read([column])[column]


def versions(folder: Path) -> int:
    return len(list((folder / "catalog.lance" / "_versions").glob("*.manifest")))


def test_random_split_has_the_clusters_sizes_and_nothing_of_their_content(folder: Path) -> None:
    split_at_random(Catalog.open(folder / "catalog.lance"), seed=0)
    expert, split = read(folder, "expert"), read(folder, "random_expert")
    assert np.bincount(split).tolist() == np.bincount(expert).tolist()
    sizes = np.bincount(expert) / len(expert)
    agreement, expected = (split == expert).mean(), float(sizes @ sizes)
    assert abs(agreement - expected) < 4 * (expected * (1 - expected) / len(expert)) ** 0.5


def test_random_split_depends_on_sizes_and_seed_alone(folder: Path) -> None:
    catalog = Catalog.open(folder / "catalog.lance")
    splits = {}
    for name, seed, turned in (("first", 0, False), ("other seed", 1, False), ("turned", 0, True)):
        expert = read(folder, "expert")
        catalog.add_columns({"expert": expert[::-1].copy() if turned else expert}, facts={"made": name})
        split_at_random(catalog, seed)
        splits[name] = read(folder, "random_expert")
    assert (splits["first"] == splits["turned"]).all()
    assert (splits["first"] != splits["other seed"]).any()


def test_random_split_of_overlapping_experts_keeps_every_rows_number_of_experts(folder: Path) -> None:
    catalog = Catalog.open(folder / "catalog.lance")
    cluster(catalog, replace(CONFIG, overlap=2))
    split_at_random(catalog, seed=0)
    expert, split = read(folder, "expert"), read(folder, "random_expert")
    assert split.shape == expert.shape == (len(catalog), 2)
    assert (split[:, 0] != split[:, 1]).all()
    assert np.bincount(split.reshape(-1)).tolist() == np.bincount(expert.reshape(-1)).tolist()


def test_one_step_is_the_nearest_of_its_own_centres(folder: Path) -> None:
    catalog = Catalog.open(folder / "catalog.lance")
    one_step = cluster_in_one_step(catalog, CONFIG, folder / "clusters" / ONE_STEP_FOLDER)
    assert one_step.fine_centers.shape == (NUM_EXPERTS, 16)
    assert sorted(one_step.expert_of_fine.tolist()) == list(range(NUM_EXPERTS))
    expected = []
    for x in read(folder, COLUMN).astype(np.float64):
        distances = [float(((x - center) ** 2).sum()) for center in one_step.fine_centers.astype(np.float64)]
        expected.append(one_step.expert_of_fine[distances.index(min(distances))])
    assert read(folder, "one_step_expert").tolist() == expected
    assert Clustering.load(folder / "clusters" / ONE_STEP_FOLDER).digest == one_step.digest


def test_what_is_there_is_not_made_again_and_what_is_stale_is(folder: Path) -> None:
    catalog, clusters = Catalog.open(folder / "catalog.lance"), folder / "clusters"
    saved = clusters / ONE_STEP_FOLDER / "clustering.safetensors"
    sizes = add_controls(catalog, ["one-step", "full", "random"], CONFIG, clusters)
    assert sizes.keys() == {"random_expert", "one_step_expert"}
    assert sizes["random_expert"].tolist() == np.bincount(read(folder, "expert")).tolist()
    before, written = versions(folder), saved.stat().st_mtime_ns
    add_controls(Catalog.open(folder / "catalog.lance"), ["one-step", "random"], CONFIG, clusters)
    assert (versions(folder), saved.stat().st_mtime_ns) == (before, written)
    saved.write_bytes(b"cut short")
    add_controls(catalog, ["one-step"], CONFIG, clusters)
    assert Clustering.load(saved.parent).num_fine == NUM_EXPERTS
    assert versions(folder) == before, "the same centres: the column stays"
    old = read(folder, "one_step_expert")
    add_controls(catalog, ["one-step", "random"], replace(CONFIG, seed=3, max_size_ratio=None), clusters)
    assert versions(folder) > before
    assert (read(folder, "one_step_expert") != old).any()
    assert catalog.facts("random_expert")["seed"] == 3  # type: ignore[index]


def test_jobs_of_a_control_are_stale_when_its_column_is_another(folder: Path) -> None:
    catalog, clusters = Catalog.open(folder / "catalog.lance"), folder / "clusters"
    add_controls(catalog, ["random"], CONFIG, clusters)
    expert = TrainJob(
        name="expert-0", folder="x", catalog="c", catalog_fingerprint="f", config=train_config(),
        first_step=0, last_step=1, first_share=0.0, last_share=1.0, where={"expert": 0},
    )  # fmt: skip
    random = replace(expert, name="random-0", where={"random_expert": 0})
    first = pin_jobs([expert, random], catalog)
    assert first == pin_jobs([expert, random], catalog)
    add_controls(catalog, ["random"], replace(CONFIG, seed=1), clusters)
    second = pin_jobs([expert, random], catalog)
    assert [a.digest == b.digest for a, b in zip(first, second, strict=True)] == [True, False]


def train_config() -> Any:
    from modeclip.training.jobs import TrainConfig

    return TrainConfig(samples=32 * 32, batch_size=32)


def test_catalog_that_is_not_clustered(icons_catalog: Path, tmp_path: Path) -> None:
    catalog = Catalog.open(icons_catalog)
    with pytest.raises(ModeclipError, match=r"has no column expert.*cluster it first"):
        split_at_random(catalog, 0)
    with pytest.raises(ModeclipError, match=r"no column caption_embedding.*embed its captions"):
        cluster_in_one_step(catalog, CONFIG, tmp_path / "one-step")


def test_bundle_works_from_the_seed_on(small_run: Path, tmp_path: Path) -> None:
    """With no expert, with one, and with a model that belongs to other settings, which is not taken."""
    run = shutil.copytree(small_run, tmp_path / "run")
    jobs = [TrainJob.load(run / "models" / name / "job.json") for name in ("seed", "expert-0", "expert-1")]
    jobs = [replace(job, folder=str(run / "models" / job.name)) for job in jobs]
    bundles = []
    for count in (1, 2):
        path = assemble_bundle(run, [jobs[0], *jobs[1:count]])
        bundles.append([expert.folder for expert in load_bundle(path).experts])
    stale = replace(jobs[2], threads=7)
    bundles.append([expert.folder for expert in load_bundle(assemble_bundle(run, [*jobs[:2], stale])).experts])
    assert bundles == [["seed", "seed"], ["expert-0", "seed"], ["expert-0", "seed"]]
    assert load_bundle(run / "bundle").fine_quantiles is not None
    with pytest.raises(ModeclipError, match=r"seed.*not trained yet.*train it first"):
        assemble_bundle(run, [replace(jobs[0], threads=2)])


class Interrupted(InThisProcess):
    """Ends at once when the second control would begin, as a kill does."""

    def start(self, job: TrainJob) -> None:
        if job.name == "random-1":
            raise KeyboardInterrupt
        super().start(job)


@pytest.mark.slow
@pytest.mark.usefixtures("trains_here")
def test_controls_are_added_to_a_finished_run(
    small_recipe: Path, small_run: Path, tmp_path: Path, modeclip_command: Command
) -> None:
    """Interrupted while it trains them, it goes on; only they are trained; a second run does nothing."""
    out = shutil.copytree(small_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.glob("models/*/open_clip_model.safetensors")}
    recipe = tmp_path / "controls.yaml"
    recipe.write_text(small_recipe.read_text() + "experts: {controls: [random, full, one-step]}\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeclip.training.launching._Here", Interrupted)
        assert modeclip_command("run", recipe, "--out", out).returncode == 130
    first = (out / "models" / "random-0" / "done.json").stat().st_mtime_ns
    done = modeclip_command("run", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    assert (out / "models" / "random-0" / "done.json").stat().st_mtime_ns == first
    assert {path: path.read_bytes() for path in before} == before
    names = {f"{kind}-{k}" for kind in ("random", "full", "one-step") for k in range(2)}
    assert {path.name for path in (out / "models").iterdir() if path.is_dir()} == names | {
        path.parent.name for path in before
    }

    whole = TrainJob.load(out / "models" / "random-1" / "job.json")
    train(replace(whole, folder=str(tmp_path / "whole")))
    assert weights_of(tmp_path / "whole") == weights_of(out / "models" / "random-1")

    rows = {(row["name"], row["rule"]): row for row in json.loads((out / "results.json").read_text())["models"]}
    for name, rule in (("Random-2", "uniform"), ("Full-2", "uniform"), ("OneStep-2", "uniform")):
        assert rows[name, rule]["samples"] == rows["mixture", "per_class"]["samples"]
    assert ("OneStep-2", "per_class") in rows
    assert "OneStep-2, per_class" in (out / "report.html").read_text()
    assert {expert["folder"] for expert in json.loads((out / "bundle" / "mode.json").read_text())["experts"]} == {
        "expert-0",
        "expert-1",
    }
    moments = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "recipe.yaml"
    }
    again = modeclip_command("run", recipe, "--out", out)
    assert again.returncode == 0, again.stderr
    assert "controls  done: random_expert of" in again.stderr
    changed = {path.name for path, moment in moments.items() if path.stat().st_mtime_ns != moment}
    assert changed <= {"lock"}

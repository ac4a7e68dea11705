"""The plan of the method: who sees how many samples, on which schedule, from which start, in which order."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from modeclip.clustering.clusters import Clustering
from modeclip.clustering.fitting import count_pairs
from modeclip.data.catalog import Catalog
from modeclip.data.selection import ALL, Selection
from modeclip.errors import ModeclipError
from modeclip.models.clip import load_clip, save_clip
from modeclip.training.batches import job_rows
from modeclip.training.experts import (
    ExpertsConfig,
    fingerprint_of,
    hash_pairs,
    part,
    pin_jobs,
    plan_jobs,
    reuse_models,
    seed_model,
)
from modeclip.training.jobs import TrainConfig, TrainJob, TrainResult
from modeclip.training.status import status
from support import mark_done, weights_of, with_weights

TRAIN = TrainConfig(model="modeclip-icon", samples=32 * 8 * 10, batch_size=8)


@pytest.fixture(scope="module")
def catalog(icons_copy: Catalog) -> Catalog:
    """Real icons with experts of known sizes, and the columns of two controls."""
    catalog = icons_copy
    experts = np.repeat([0, 1, 2], [100, 400, len(catalog) - 500]).astype(np.int32)
    catalog.add_columns({"expert": experts, "random_expert": np.roll(experts, 50), "one_step_expert": experts[::-1]})
    return catalog


def plan(folder: Path, experts: ExpertsConfig, num_experts: int = 4, **more: object) -> dict[str, TrainJob]:
    jobs = plan_jobs(folder / "catalog.lance", "f", folder / "models", num_experts, TRAIN, experts, **more)  # type: ignore[arg-type]
    return {job.name: job for job in jobs}


def parts(job: TrainJob) -> float:
    return (job.last_step - job.first_step) / TRAIN.steps_per_part


@pytest.mark.parametrize("num_experts", [5, 4])
@pytest.mark.parametrize("is_given", [False, True])
def test_a_dense_control_of_the_mixtures_cost_is_trained_once(tmp_path: Path, num_experts: int, is_given: bool) -> None:
    """5 parts of 10 steps are 10 for each of five experts, and 12 for each of four: the dense control costs enough."""
    start = None
    if is_given:
        given = replace(plan(tmp_path, ExpertsConfig())["seed"], folder=str(tmp_path / "given"))
        mark_done(given)
        start = given.folder
    matched = ExpertsConfig(budget="matched", start=start)
    names = ["dense", *(f"expert-{k}" for k in range(num_experts))]
    assert list(plan(tmp_path, matched, num_experts)) == [*([] if is_given else ["seed"]), *names]
    assert "dense-total" in plan(tmp_path, replace(matched, dense=False), num_experts)


def test_a_second_dense_model_that_an_earlier_version_has_trained_stays_in_the_plan(
    catalog: Catalog, tmp_path: Path
) -> None:
    """The run is finished as it is; with other settings it gets none."""
    matched = ExpertsConfig(budget="matched")
    jobs = plan(tmp_path, replace(matched, dense=False))
    (total,) = pin_jobs([jobs["dense-total"]], catalog)
    assert total.pairs
    total.save()
    assert "dense-total" not in plan(tmp_path, matched), "it is not trained"
    mark_done(total)
    assert list(plan(tmp_path, matched)) == ["seed", "dense-total", "dense", *(f"expert-{k}" for k in range(4))]
    assert plan(tmp_path, matched)["dense-total"] == jobs["dense-total"]
    assert "dense-total" not in plan(tmp_path, matched, 7)


@pytest.mark.parametrize(("budget", "expert", "total"), [("paper", 5, 47), ("matched", 1.2, None)])
def test_budgets_cost_what_they_say(tmp_path: Path, budget: str, expert: float, total: float | None) -> None:
    """The matched budget is 5/4 parts an expert, rounded down to a step of a tenth of a part."""
    jobs = plan(tmp_path, ExpertsConfig(budget=budget))  # type: ignore[arg-type]
    totals = [] if total is None else ["dense-total"]
    assert list(jobs) == ["seed", *totals, "dense", *(f"expert-{k}" for k in range(4))]
    assert parts(jobs["seed"]) == 27
    assert parts(jobs["dense"]) == 5
    assert [parts(jobs[f"expert-{k}"]) for k in range(4)] == pytest.approx([expert] * 4)
    assert [parts(jobs[name]) for name in totals] == pytest.approx([total] * len(totals))
    assert list(plan(tmp_path, ExpertsConfig(dense=False, dense_total=False), 2)) == ["seed", "expert-0", "expert-1"]


@pytest.mark.parametrize("budget", ["paper", "matched"])
def test_schedules_meet_where_the_seed_ends(tmp_path: Path, budget: str) -> None:
    jobs = plan(tmp_path, ExpertsConfig(budget=budget, controls=("random", "full", "one-step")))  # type: ignore[arg-type]
    seed = jobs["seed"]
    assert len(jobs) == (3 if budget == "paper" else 2) + 4 * 4
    for name in set(jobs) - {"seed", "dense-total"}:
        job = jobs[name]
        assert (job.start_from, job.start_digest) == (seed.folder, seed.digest)
        assert job.first_step == seed.last_step
        assert job.learning_rate(job.first_step) == pytest.approx(seed.learning_rate(seed.last_step))
        assert job.learning_rate(job.last_step) == pytest.approx(0)
    if (total := jobs.get("dense-total")) is not None:
        assert (total.start_from, total.first_step) == (None, 0)
        assert total.learning_rate(total.last_step) == pytest.approx(0)


def test_digest_follows_what_decides_the_result(tmp_path: Path) -> None:
    expert = plan(tmp_path, ExpertsConfig())["expert-0"]
    assert replace(expert, folder="/elsewhere", catalog="/elsewhere").digest == expert.digest
    for change in ({"where": {"expert": 1}}, {"threads": 2}, {"catalog_fingerprint": "g"}, {"start_digest": "other"}):
        assert replace(expert, **change).digest != expert.digest  # type: ignore[arg-type]
    # how and when an expert runs does not change what it is
    run = ExpertsConfig(order="range", only=(0,), jobs=7, processes_per_job=2, controls=("full",))
    assert plan(tmp_path, run)["expert-0"] == expert


def test_rows_of_an_expert(catalog: Catalog, tmp_path: Path) -> None:
    expert_of_row = catalog.read(["expert"])["expert"]
    job = plan(tmp_path, ExpertsConfig(), 3)["expert-1"]
    assert job_rows(job, catalog).tolist() == np.flatnonzero(expert_of_row == 1).tolist()
    mixed = job_rows(replace(job, out_of_cluster_fraction=0.1), catalog)
    outside = mixed[expert_of_row[mixed] != 1]
    assert set(np.flatnonzero(expert_of_row == 1)) <= set(mixed)
    assert len(outside) == round(0.1 * (expert_of_row != 1).sum()) == len(set(outside))
    assert (mixed == job_rows(replace(job, out_of_cluster_fraction=0.1), catalog)).all()


def test_controls_differ_from_the_experts_by_one_thing_each(catalog: Catalog, tmp_path: Path) -> None:
    config = ExpertsConfig(controls=("random", "full", "one-step"), budget="matched")
    jobs = plan(tmp_path, config, 3)
    columns = catalog.read(["random_expert", "one_step_expert"])
    for k in range(3):
        expert = jobs[f"expert-{k}"]
        same = {"name": expert.name, "role": expert.role, "folder": expert.folder}
        assert replace(jobs[f"random-{k}"], where={"expert": k}, **same) == expert
        assert replace(jobs[f"one-step-{k}"], where={"expert": k}, **same) == expert
        full = jobs[f"full-{k}"]
        assert full.config.seed == TRAIN.seed + 1 + k
        assert replace(full, where={"expert": k}, config=TRAIN.decided(), **same) == expert
        for name, column in (("random", "random_expert"), ("one-step", "one_step_expert")):
            rows = job_rows(jobs[f"{name}-{k}"], catalog)
            assert rows.tolist() == np.flatnonzero(columns[column] == k).tolist()
        assert len(job_rows(full, catalog)) == len(catalog)


def test_order_and_subset(catalog: Catalog, tmp_path: Path) -> None:
    def experts(config: ExpertsConfig, **more: object) -> list[str]:
        jobs = plan_jobs(Path(catalog.path), "f", tmp_path, 3, TRAIN, config, **more)  # type: ignore[arg-type]
        return [job.name for job in jobs]

    only = ExpertsConfig(dense=False, dense_total=False, order="size")
    assert count_pairs(catalog, 3).tolist() == [len(catalog.select(expert=k)) for k in range(3)]
    assert experts(only) == ["seed", "expert-1", "expert-2", "expert-0"]
    assert experts(replace(only, order="range"), ranges=[0.2, 0.9, 0.5]) == ["seed", "expert-1", "expert-2", "expert-0"]
    assert experts(replace(only, order="range")) == ["seed", "expert-0", "expert-1", "expert-2"]
    few = ExpertsConfig(only=(2, 0), controls=("random",))
    assert experts(few) == ["seed", "expert-0", "expert-2"]
    with pytest.raises(ModeclipError, match=r"experts\.only.*no expert 3.*0 to 2"):
        experts(ExpertsConfig(only=(1, 3)))


def test_a_finished_job_as_the_seed(tmp_path: Path) -> None:
    """The experts go on at its step and at its place of the schedule, which may differ from this config's."""
    given = replace(plan(tmp_path, ExpertsConfig())["seed"], name="given", folder=str(tmp_path / "given"), last_step=99)
    given.save()
    with pytest.raises(ModeclipError, match=r"experts\.start.*given is not finished.*modeclip train .*given/job\.json"):
        plan(tmp_path, ExpertsConfig(start=given.folder))
    mark_done(given)
    jobs = plan(tmp_path, ExpertsConfig(start=given.folder))
    assert list(jobs) == ["dense-total", "dense", *(f"expert-{k}" for k in range(4))]
    for job in jobs.values():
        assert (job.start_from, job.start_digest, job.first_step) == (given.folder, given.digest, 99)
        assert job.learning_rate(99) == pytest.approx(given.learning_rate(99))
    assert [parts(jobs[name]) for name in ("expert-3", "dense", "dense-total")] == [5, 5, 20]
    assert seed_model(tmp_path, TRAIN, ExpertsConfig(start=given.folder)) == Path(given.folder)
    moved = Path(given.folder).rename(tmp_path / "moved")  # its job file still names the old place
    after = plan(tmp_path, ExpertsConfig(start=str(moved)))
    assert {job.start_from for job in after.values()} == {str(moved)}
    assert [job.digest for job in after.values()] == [job.digest for job in jobs.values()]
    moved.rename(given.folder)
    other = replace(given, config=replace(TRAIN, model="ViT-B-32"))
    mark_done(other)
    with pytest.raises(ModeclipError, match=r"given is a ViT-B-32.*train\.model is modeclip-icon.*same model"):
        plan(tmp_path, ExpertsConfig(start=given.folder))


def test_a_checkpoint_and_a_pretrained_model_as_the_seed(tmp_path: Path) -> None:
    file = tmp_path / "epoch_27.pt"
    with pytest.raises(ModeclipError, match=r"epoch_27\.pt: no such file.*open_clip_train"):
        plan(tmp_path, ExpertsConfig(start=str(file)))
    file.write_bytes(b"weights")
    job = plan(tmp_path, ExpertsConfig(start=str(file)))["expert-0"]
    other = plan(tmp_path, ExpertsConfig())["expert-0"]
    assert job.start_from == str(file)
    assert replace(job, start_from=other.start_from, start_digest=other.start_digest) == other
    file.write_bytes(b"others")
    assert plan(tmp_path, ExpertsConfig(start=str(file)))["expert-0"].digest != job.digest

    pretrained = "ViT-B-32@laion2b_s34b_b79k"
    tuned = plan(tmp_path, ExpertsConfig(start=pretrained))["expert-0"]
    assert (tuned.config.model, tuned.start_from, tuned.first_step, parts(tuned)) == (pretrained, None, 0, 5)
    assert tuned.learning_rate(0) == 0  # a warm-up of its own
    assert tuned.config.learning_rate == 1e-5
    assert tuned.learning_rate(tuned.last_step) == pytest.approx(0)
    with pytest.raises(ModeclipError, match="unknown model 'nonsense'"):
        plan(tmp_path, ExpertsConfig(start="nonsense"))
    with pytest.raises(ModeclipError, match="model ViT-B-32 names no weights"):
        plan(tmp_path, ExpertsConfig(start="ViT-B-32"))


def test_a_pretrained_seed_is_exported_to_stand_in(tmp_path: Path) -> None:
    start = with_weights("modeclip-icon-xxxs", tmp_path)
    folder = seed_model(tmp_path, TRAIN, ExpertsConfig(start=start))
    assert folder.parent == tmp_path
    assert {path.name for path in folder.iterdir()} >= {"open_clip_config.json", "open_clip_model.safetensors"}
    before = (folder / "open_clip_model.safetensors").stat().st_mtime_ns
    assert seed_model(tmp_path, TRAIN, ExpertsConfig(start=start)) == folder
    assert (folder / "open_clip_model.safetensors").stat().st_mtime_ns == before


def test_an_exported_seed_is_that_of_its_start(tmp_path: Path) -> None:
    """Not that of an earlier start, nor a seed that was trained here, nor what the start's file held before."""
    folder = tmp_path / "models"
    save_clip(load_clip("modeclip-icon-xxxs", seed=9), folder / "seed")
    starts = [with_weights("modeclip-icon-xxxs", tmp_path, seed) for seed in (0, 1)]
    files = [Path(start.partition("@")[2]) for start in starts]

    def exported(start: str) -> bytes:
        return weights_of(seed_model(folder, TRAIN, ExpertsConfig(start=start)))

    assert [exported(start) for start in starts] == [file.read_bytes() for file in files]
    files[0].write_bytes(files[1].read_bytes())
    assert exported(starts[0]) == files[1].read_bytes()


def test_fingerprint_follows_pairs_clusters_and_weights(catalog: Catalog, tmp_path: Path) -> None:
    centers = np.eye(4, dtype=np.float32)
    first = Clustering(fine_centers=centers, experts_of_fine=np.array([[0], [0], [1], [1]]), coarse_centers=centers[:2])
    other = replace(first, experts_of_fine=np.array([[0], [1], [1], [1]]))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"weights")
    found = {fingerprint_of(catalog, clusters, "ViT-B-32") for clusters in (None, first, other)}
    found.add(fingerprint_of(catalog, first, str(tmp_path)))
    assert len(found) == 4
    assert fingerprint_of(Catalog.open(catalog.path), first, "ViT-B-32") in found


def split(catalog: Catalog, sizes: list[int]) -> None:
    """Give the rows to experts, in their order, by a clustering of its own."""
    experts = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    catalog.add_columns({"expert": experts}, facts={"clustering": f"{sizes}"})


def planned(
    catalog: Catalog,
    models: Path,
    num_experts: int,
    fingerprint: str = "0123456789abcdef",
    selection: Selection = ALL,
) -> list[TrainJob]:
    path, config = Path(catalog.path), ExpertsConfig(dense_total=False)
    jobs = plan_jobs(path, fingerprint, models, num_experts, TRAIN, config, selection=selection)
    return pin_jobs(jobs, catalog)


def finish(jobs: list[TrainJob]) -> None:
    for job in jobs:
        mark_done(job)
        (Path(job.folder) / "weights").write_text(job.name)


def of_index(jobs: list[TrainJob]) -> dict[str, bool]:
    return {job.name: TrainResult.read(job) is not None for job in jobs}


class TestOtherClusters:
    """A model is known by its pairs: what the clusters around them are does not matter."""

    @pytest.fixture
    def catalog(self, icons_catalog: Path, tmp_path: Path) -> Catalog:
        catalog = Catalog.open(shutil.copytree(icons_catalog, tmp_path / "catalog.lance"))
        self.rest = len(catalog) - 300
        split(catalog, [100, 80, 120, self.rest])
        return catalog

    def test_seed_dense_and_experts_of_the_same_pairs_are_kept(self, catalog: Catalog, tmp_path: Path) -> None:
        """Experts 1 and 2 are joined: 0 stays, 3 becomes 2, and the joined one is missing."""
        models = tmp_path / "models"
        before = planned(catalog, models, 4)
        finish(before)
        split(catalog, [100, 200, self.rest])
        after = planned(catalog, models, 3, "other clusters")
        assert of_index(after) == {
            "seed": True, "dense": True, "expert-0": True, "expert-1": False, "expert-2": False
        }  # fmt: skip
        assert reuse_models(after) == ["expert-2 was expert-3"]
        assert of_index(after) | {"expert-1": True} == dict.fromkeys(of_index(after), True)
        kept = {folder.name: (folder / "weights").read_text() for folder in models.iterdir()}
        assert kept == {
            "seed": "seed", "dense": "dense", "expert-0": "expert-0", "expert-1": "expert-1", "expert-2": "expert-3",
            "expert-3": "expert-2",
        }  # fmt: skip
        assert TrainJob.load(models / "expert-2" / "job.json") == after[-1]
        assert reuse_models(after) == []
        split(catalog, [100, 80, 120, self.rest])
        again = planned(catalog, models, 4)
        assert reuse_models(again) == ["expert-2 was expert-3", "expert-3 was expert-2"]
        assert all(of_index(again).values())

    def test_status_tells_which_no_longer_fit(self, catalog: Catalog, tmp_path: Path) -> None:
        models = tmp_path / "models"
        finish(planned(catalog, models, 4))
        assert {row.state for row in status(tmp_path)} == {"finished"}
        split(catalog, [100, 200, self.rest])
        rows = {row.name: (row.state, row.note) for row in status(tmp_path)}
        gone = ("stale", "its pairs have changed")
        assert rows == {
            "seed": ("finished", ""), "dense": ("finished", ""), "expert-0": ("finished", ""),
            "expert-1": gone, "expert-2": gone, "expert-3": gone,
        }  # fmt: skip
        seed = TrainJob.load(models / "seed" / "job.json")
        mark_done(replace(seed, threads=3))
        assert {row.note for row in status(models) if row.name in {"dense", "expert-0"}} == {
            "the seed that it continues has changed"
        }

    def test_models_of_an_earlier_version_are_finished_until_the_clusters_change(
        self, catalog: Catalog, tmp_path: Path
    ) -> None:
        clustering = f"{[100, 80, 120, self.rest]}"
        fingerprint = sha256(f"{catalog.fingerprint}-{clustering}".encode()).hexdigest()[:16]
        path, models = Path(catalog.path), tmp_path / "models"
        old = plan_jobs(path, fingerprint, models, 4, TRAIN, ExpertsConfig(dense_total=False))
        finish(old)
        for job in old:
            content = json.loads((Path(job.folder) / "job.json").read_text())
            del content["pairs"]
            (Path(job.folder) / "job.json").write_text(json.dumps(content))
        assert planned(catalog, models, 4, fingerprint) == old
        assert {row.state for row in status(tmp_path)} == {"finished"}
        mark_done(replace(old[0], threads=2))  # begun by another job: its key is the new one
        assert planned(catalog, models, 4, fingerprint)[0].pairs
        finish(old)
        split(catalog, [100, 200, self.rest])
        assert {row.state for row in status(tmp_path)} == {"stale"}

    def test_every_pair_counts_and_its_place(self, catalog: Catalog, tmp_path: Path) -> None:
        job = replace(planned(catalog, tmp_path, 4)[-1], where={"expert": 0})
        first = hash_pairs(job, catalog)
        assert first == hash_pairs(replace(job, name="x", folder="y"), catalog)
        marked = np.zeros(len(catalog), bool)
        marked[:100] = True
        catalog.add_columns({"same": marked, "less": np.roll(marked, 1)})
        assert hash_pairs(replace(job, where={}, mask="same"), catalog) == first
        others = [
            hash_pairs(replace(job, where={}, mask="less"), catalog),
            hash_pairs(replace(job, where={"expert": 1}), catalog),
            hash_pairs(replace(job, out_of_cluster_fraction=0.1), catalog),
            hash_pairs(replace(job, where={}), catalog),
        ]
        assert len({first, *others}) == 5

    def test_selected_pairs_their_probabilities_and_captions_are_known_too(
        self, catalog: Catalog, tmp_path: Path
    ) -> None:
        count = len(catalog)
        kept = np.arange(count) % 3 > 0
        catalog.add_columns({"good": kept, "both": kept & (np.arange(count) < 100), "p": np.linspace(0, 1, count)})
        catalog.add_columns({"told": np.array([None if n % 2 else f"text {n}" for n in range(count)], object)})
        seed, expert = planned(catalog, tmp_path, 4, selection=Selection(mask="good"))[:2]
        expert = replace(expert, where={"expert": 0}, out_of_cluster_fraction=0.0)
        assert np.array_equal(job_rows(seed, catalog), np.flatnonzero(kept))
        assert np.array_equal(job_rows(expert, catalog), np.flatnonzero(kept[:100]))
        some = replace(expert, out_of_cluster_fraction=0.5)
        assert set(job_rows(some, catalog)) < set(np.flatnonzero(kept))
        same = replace(expert, selection=ALL, where={}, mask="both")
        assert hash_pairs(same, catalog) == hash_pairs(expert, catalog) != hash_pairs(seed, catalog)
        hashes = {hash_pairs(seed, catalog)}
        for fields in ({"probability": "p"}, {"captions": "told"}, {"probability": "p", "captions": "told"}):
            job = replace(seed, config=replace(seed.config, **fields))
            hashes.add(before := hash_pairs(job, catalog))
            catalog.add_columns({"p": np.linspace(0, 0.9, count)})
            catalog.add_columns({"told": np.array([None if n % 2 else f"text {n + 1}" for n in range(count)], object)})
            assert hash_pairs(job, catalog) != before
            catalog.add_columns({"p": np.linspace(0, 1, count)})
            catalog.add_columns({"told": np.array([None if n % 2 else f"text {n}" for n in range(count)], object)})
        assert len(hashes) == 4


def test_a_branch_lies_beside_the_seed(tmp_path: Path) -> None:
    parting = part(tmp_path / "c.lance", "f", tmp_path / "models", TRAIN, ExpertsConfig(threads_per_job=3))
    job = parting.branch("prior", name="expert-own", steps=7)
    assert (job.folder, job.last_step - job.first_step, job.threads) == (str(tmp_path / "models" / "expert-own"), 7, 3)
    assert TrainJob.load(job.save()) == job


def test_settings_out_of_range() -> None:
    assert len(asdict(ExpertsConfig())) <= 13  # `nearest` belongs to `for_classes` and to nothing else
    with pytest.raises(ModeclipError, match=r"experts\.out_of_cluster_fraction.*\[0, 1\], got 2"):
        ExpertsConfig(out_of_cluster_fraction=2.0)
    for name in ("jobs", "threads_per_job", "processes_per_job"):
        with pytest.raises(ModeclipError, match=rf"experts\.{name}: expected 1 to 4,096, got 0"):
            ExpertsConfig(**{name: 0})  # type: ignore[arg-type]

"""The table of a run: what the rows of controls say, by hand from models that nobody trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeclip.clustering.clusters import Clustering
from modeclip.data.catalog import Catalog
from modeclip.data.tasks.images import FileImages
from modeclip.data.tasks.task import Task, catalog_tasks
from modeclip.evaluation.evaluate import EvaluateConfig, evaluate, run_table
from modeclip.evaluation.systems import TrainedModel, run_systems
from modeclip.mixture.bundle import RoutingConfig, load_bundle
from modeclip.models.clip import load_clip, save_clip
from modeclip.models.feature_cache import FeatureCache
from modeclip.models.features import class_features
from modeclip.training.jobs import role_of
from support import plain_png


@pytest.fixture(scope="module")
def scored(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real evaluation of untrained models under all names, and what it was made from."""
    root, bundle = tmp_path_factory.mktemp("models"), load_bundle(small_run / "bundle")
    names = ["seed", *(f"{kind}-{k}" for kind in ("expert", "random", "full", "one-step") for k in range(2))]
    models = []
    for seed, name in enumerate(names):
        save_clip(load_clip("modeclip-icon-xxxs", seed=seed), root / name)
        samples, start = (1000, None) if name == "seed" else (10 + seed, root / "seed")
        models.append(TrainedModel(name=name, role=role_of(name)[0], folder=root / name, samples=samples, start=start))
    centers = bundle.fine_centers[[0, 9]]
    one_step = Clustering(fine_centers=centers, experts_of_fine=np.array([[1], [0]]), coarse_centers=centers[::-1])
    clustering, catalog, cache = (
        Clustering.load(small_run / "clusters"),
        Catalog.open(small_run / "tasks.lance"),
        FeatureCache(),
    )
    tasks = catalog_tasks(catalog)

    def table(models: list[TrainedModel], one_step: Clustering | None = None) -> dict[str, Any]:
        systems = run_systems(models, clustering, bundle.encoder, RoutingConfig(), cache, one_step=one_step)
        return run_table(systems, tasks, evaluate(systems, tasks, EvaluateConfig(), cache))

    results, partial = table(models, one_step), table([model for model in models if model.name != "full-1"])
    return {"results": results, "partial": partial, "models": models, "catalog": catalog, "one_step": one_step}


def accuracy_by_hand(scored: dict[str, Any], kind: str, weigh: Callable[[str], np.ndarray]) -> dict[str, float]:
    """Average the similarity matrices of a control's two models, task by task."""
    import torch

    catalog, found = scored["catalog"], {}
    folders = {model.name: model.folder for model in scored["models"]}
    for task in catalog_tasks(catalog):
        total = np.zeros((len(task.images), len(task.classnames)))
        for k in range(2):
            clip = load_clip(folders[f"{kind}-{k}"])
            with torch.inference_mode():
                image = clip.model.eval().encode_image(clip.images(catalog.images(task.images.rows)), normalize=True)
                cosine = (image @ class_features(clip, task.classnames, ["{}"]).T).numpy()
            total += np.broadcast_to(weigh(task.name)[..., k], len(task.classnames)) * cosine
        found[task.name] = float((total.argmax(1) == task.labels).mean())
    return found


@pytest.mark.parametrize(("kind", "name"), [("random", "Random-2"), ("full", "Full-2"), ("one-step", "OneStep-2")])
def test_a_control_is_the_average_of_its_models(scored: dict[str, Any], kind: str, name: str) -> None:
    (row,) = (r for r in scored["results"]["models"] if (r["name"], r["rule"]) == (name, "uniform"))
    assert row["kind"] == "control"
    assert row["accuracy"] == pytest.approx(accuracy_by_hand(scored, kind, lambda _: np.array([0.5, 0.5])))
    members = [model.samples for model in scored["models"] if model.name.startswith(f"{kind}-")]
    assert row["samples"] == 1000 + sum(members), "the seed counts once"


def test_one_step_is_routed_by_its_own_centres(scored: dict[str, Any], small_run: Path) -> None:
    from modeclip.mixture.rules import route
    from modeclip.models.encoders import load_encoder

    (row,) = (r for r in scored["results"]["models"] if (r["name"], r["rule"]) == ("OneStep-2", "per_class"))
    one_step, encoder = scored["one_step"], load_encoder(load_bundle(small_run / "bundle").encoder)
    classes = {task.name: list(task.classnames) for task in catalog_tasks(scored["catalog"])}

    def weigh(task: str) -> np.ndarray:
        embeddings = encoder.encode(classes[task])
        centers = (one_step.fine_centers, one_step.expert_of_fine)
        return route(embeddings, *centers, num_experts=2, rule="per_class", temperature=0.1).weights

    assert row["accuracy"] == pytest.approx(accuracy_by_hand(scored, "one-step", weigh))
    assert row["entropy"].keys() == classes.keys()


def test_differences_to_the_mixture(scored: dict[str, Any]) -> None:
    rows = scored["results"]["models"]
    (mixture,) = (row for row in rows if row["default"])
    controls = [row for row in rows if row["kind"] == "control"]
    assert len(controls) == 4
    for row in controls:
        low, high = row["versus_mixture"]["interval"]
        assert row["versus_mixture"]["difference"] == pytest.approx(row["average"] - mixture["average"])
        assert low <= row["versus_mixture"]["difference"] <= high
    assert mixture["versus_mixture"] is None
    assert not any(row["name"].startswith(("random-", "full-", "one-step-")) for row in rows)


def test_control_without_one_of_its_models_is_left_out(scored: dict[str, Any]) -> None:
    names = [(row["name"], row["rule"]) for row in scored["partial"]["models"] if row["kind"] == "control"]
    assert names == [("Random-2", "uniform"), ("OneStep-2", "uniform")]


def test_the_majority_class_stands_beside_chance(tmp_path: Path) -> None:
    """57 of 344 images are of one class of 250: naming it always is right 41 times as often as guessing."""
    (tmp_path / "a.png").write_bytes(plain_png())
    labels = np.concatenate([np.zeros(57, np.int64), np.arange(344 - 57) % 249 + 1])
    task = Task(
        name="holdout",
        kind="classification",
        images=FileImages(task="holdout", names=["a"] * 344, paths=[str(tmp_path / "a.png")] * 344),
        classnames=tuple(f"class {number}" for number in range(250)),
        labels=labels,
    )
    assert (task.chance, task.majority) == (1 / 250, 57 / 344)
    assert replace(task, labels=np.ones((344, 250), bool)).majority is None

"""What a run compares and what it cost; a router of another kind is evaluated as ours is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL.Image import Image

from modeclip import evaluate, open_systems
from modeclip.data.catalog import Catalog
from modeclip.data.tasks.task import CatalogImages, Task, catalog_tasks
from modeclip.evaluation import systems as systems_module
from modeclip.evaluation.systems import System, TrainedModel, count_samples
from modeclip.mixture.router import Route, RouteRequest
from modeclip.models.clip import load_clip, save_clip
from modeclip.models.feature_cache import FeatureCache
from modeclip.training.jobs import Role


class ByParity:
    """Gives all weight to expert 0 for class names; the even pictures are expert 0's and the odd ones expert 1's."""

    def __init__(self, *, per_image: bool) -> None:
        self.per_image = per_image

    def route(self, names: Sequence[str], request: RouteRequest) -> Route:
        weights = None if self.per_image else np.array([1.0, 0.0])
        return Route(classnames=tuple(names), request=request, fixed_weights=weights, router=self)

    def route_images(self, pictures: Sequence[Image], request: RouteRequest, names: Sequence[str] = ()) -> Route:
        weights = np.eye(2)[np.arange(len(pictures)) % 2]
        named = tuple(names) or tuple(map(str, range(len(pictures))))
        return Route(classnames=named, request=request, fixed_weights=weights, router=self)


@pytest.fixture(scope="module")
def task(small_run: Path) -> Task:
    found = catalog_tasks(Catalog.open(small_run / "tasks.lance"))[0]
    assert isinstance(found.images, CatalogImages)
    assert found.labels is not None
    rows = np.arange(0, len(found.images), 8)
    return replace(found, images=replace(found.images, rows=found.images.rows[rows]), labels=found.labels[rows])


@pytest.mark.parametrize("per_image", [False, True])
def test_another_router_is_evaluated(
    small_run: Path, task: Task, per_image: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systems_module, "ROUTED_AT_ONCE", 4)
    cache, bundle = FeatureCache(), f"{small_run}/bundle"
    mixture, *experts = open_systems([bundle, f"{bundle}#expert-0", f"{bundle}#expert-1"], cache)
    results = evaluate([replace(mixture, router=ByParity(per_image=per_image)), *experts], [task], cache=cache)
    answers = [result.outcome.prediction for result in results]
    is_odd = np.arange(len(task.images)) % 2 == 1
    assert np.array_equal(answers[0], np.where(is_odd & per_image, answers[2], answers[1]))
    weights = results[0].provenance["weights"]
    assert weights["expert-1"] == pytest.approx(is_odd.mean() if per_image else 0)


@pytest.mark.parametrize("name", ["dense={}", "{}"])
def test_a_folder_with_a_number_sign_is_no_expert(tmp_path: Path, name: str) -> None:
    save_clip(load_clip("modeclip-icon-xxxs", seed=0), tmp_path / "h#1")
    [system] = open_systems([name.format(tmp_path / "h#1")])
    assert [ref.spec for ref in system.models] == [str(tmp_path / "h#1")]


def test_a_model_that_several_continue_counts_once(tmp_path: Path) -> None:
    def model(name: str, role: Role, samples: int, start: str | None) -> TrainedModel:
        place = None if start is None else tmp_path / start
        return TrainedModel(name=name, role=role, folder=tmp_path / name, samples=samples, start=place)

    models = [
        model("seed", "seed", 100, None),
        model("expert-0", "expert", 10, "seed"),
        model("expert-1", "expert", 20, "seed"),
        model("dense", "dense", 5, "expert-0"),
        model("alone", "single", 7, "elsewhere"),
    ]
    assert count_samples(models[1:3], models) == 130
    assert count_samples([models[3]], models) == 115
    assert count_samples([models[0], models[0]], models) == 100
    assert count_samples([models[4]], models) == 7


def test_models_without_a_router_have_equal_weights(small_run: Path, task: Task) -> None:
    cache, bundle = FeatureCache(), f"{small_run}/bundle"
    [routed] = open_systems([bundle], cache, rules=["uniform"])
    plain = System(name="plain", models=routed.models)
    one, other = evaluate([routed, plain], [task], cache=cache)
    assert np.array_equal(one.outcome.prediction, other.outcome.prediction)
    assert plain.rule is None
    assert "weights" not in other.provenance

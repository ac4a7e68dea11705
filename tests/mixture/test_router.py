"""A router of another kind plugs into a mixture and into its CLIP; a clustering routes as its bundle does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL.Image import Image

from modeclip import MoDE
from modeclip.clustering.clusters import Clustering
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import Bundle, load_bundle
from modeclip.mixture.explain import Domain, flag
from modeclip.mixture.routed_clip import RoutedClip
from modeclip.mixture.router import ClusterRouter, Route, Router, RouteRequest
from modeclip.models.clip import load_clip
from modeclip.models.pool import ModelPool

CLASSES = ["heart", "arrow left", "bell"]


class FirstExpert:
    """Gives all weight to expert 0, whatever it is asked."""

    per_image = False

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def route(self, names: Sequence[str], request: RouteRequest) -> Route:
        weights = np.eye(self.bundle.num_experts)[0]
        return Route(classnames=tuple(names), request=request, fixed_weights=weights, router=self, bundle=self.bundle)

    def route_images(self, pictures: Sequence[Image], request: RouteRequest, names: Sequence[str] = ()) -> Route:
        return self.route(names or [str(k) for k in range(len(pictures))], request)


class FirstForPictures(FirstExpert):
    """Says that weights come with each picture: the first half is expert 0's, the others are expert 1's."""

    per_image = True

    def route(self, names: Sequence[str], request: RouteRequest) -> Route:
        return Route(classnames=tuple(names), request=request, fixed_weights=None, router=self, bundle=self.bundle)

    def route_images(self, pictures: Sequence[Image], request: RouteRequest, names: Sequence[str] = ()) -> Route:
        weights = np.eye(self.bundle.num_experts)[np.arange(len(pictures)) * 2 // len(pictures)]
        names = tuple(names) or tuple(map(str, range(len(pictures))))
        return Route(classnames=names, request=request, fixed_weights=weights, router=self, bundle=self.bundle)


@pytest.fixture(scope="module")
def pictures(small_run: Path) -> list[Image]:
    catalog = Catalog.open(small_run / "tasks.lance")
    return catalog.images(np.arange(0, len(catalog), max(1, len(catalog) // 6)))


def best_of(folder: Path, pictures: list[Image]) -> list[str]:
    """Return the class that one model names for each picture."""
    clip = load_clip(folder)
    clip.model.eval()
    with torch.inference_mode():
        images = clip.model.encode_image(clip.images(pictures), normalize=True)
        texts = clip.model.encode_text(clip.tokens(CLASSES), normalize=True)
    return [CLASSES[index] for index in (images @ texts.T).argmax(dim=1).tolist()]


def test_another_router_plugs_into_the_mixture_and_into_its_clip(small_run: Path, pictures: list[Image]) -> None:
    bundle = load_bundle(small_run / "bundle")
    router, pool = FirstExpert(bundle), ModelPool()
    assert isinstance(router, Router)
    task = MoDE(bundle, router=router, pool=pool).task(CLASSES, templates=["{}"])
    assert task.weights.tolist() == [1.0, 0.0]
    assert [prediction.classnames[0] for prediction in task.classify(pictures)] == best_of(
        small_run / "bundle" / "expert-0", pictures
    )
    assert len(pool) == 1  # the other expert was not loaded
    route = router.route(CLASSES, RouteRequest.of(bundle.routing))
    again = RoutedClip(route, pool, ["{}"])
    assert again.classify(pictures) == task.classify(pictures)
    assert [(reason.weights, reason.clusters) for reason in route.explain()] == [((1.0, 0.0), ())] * len(CLASSES)


def test_another_router_weighs_each_picture(small_run: Path, pictures: list[Image]) -> None:
    bundle = load_bundle(small_run / "bundle")
    mode = MoDE(bundle, router=FirstForPictures(bundle))
    assert mode.per_image
    found = [prediction.classnames[0] for prediction in mode.task(CLASSES, templates=["{}"]).classify(pictures)]
    half = (len(pictures) + 1) // 2
    first, second = (best_of(small_run / "bundle" / f"expert-{k}", pictures) for k in range(2))
    assert found == first[:half] + second[half:]


class WithStrangers(FirstForPictures):
    """Says that every second picture lies out of its domain."""

    def route_images(self, pictures: Sequence[Image], request: RouteRequest, names: Sequence[str] = ()) -> Route:
        number = np.arange(len(pictures))
        domain = Domain(distance=number / 10, quantile=number / 100, out=number % 2 == 1)
        return replace(super().route_images(pictures, request, names), find_domain=lambda: domain)


def test_a_classified_picture_says_whether_it_is_out_of_domain(small_run: Path, pictures: list[Image]) -> None:
    bundle = load_bundle(small_run / "bundle")
    found = MoDE(bundle, router=WithStrangers(bundle)).task(CLASSES, templates=["{}"]).classify(pictures[:3])
    flags = [flag(prediction.domain) for prediction in found]
    assert [one["out_of_domain"] for one in flags] == [False, True, False]
    assert [one["domain"]["distance"] for one in flags] == [0.0, 0.1, 0.2]  # type: ignore[index]
    of_names = MoDE(bundle, router=FirstExpert(bundle)).task(CLASSES, templates=["{}"]).classify(pictures[:1])
    assert of_names[0].domain is None


@pytest.mark.parametrize("request_of", [{}, {"rule": "paper"}, {"each": True}, {"templates": ["an icon of {}"]}])
def test_a_clustering_routes_as_the_bundle_made_of_it(small_run: Path, request_of: dict[str, object]) -> None:
    bundle = load_bundle(small_run / "bundle")
    request = RouteRequest.of(bundle.routing, **request_of)  # type: ignore[arg-type]
    ours = ClusterRouter(bundle)
    other = ClusterRouter(Clustering.load(small_run / "clusters"), ours.encoder)
    route = other.route(CLASSES, request)
    assert (route.weights == ours.route(CLASSES, request).weights).all()
    with pytest.raises(ModeclipError, match="says nothing of models"):
        RoutedClip(route, ModelPool())
    with pytest.raises(ModeclipError, match="name its encoder"):
        ClusterRouter(Clustering.load(small_run / "clusters"))


def test_request_takes_what_the_bundle_keeps(small_run: Path) -> None:
    kept = load_bundle(small_run / "bundle").routing
    assert (RouteRequest.of(kept).rule, RouteRequest.of(kept).temperature) == (kept.rule, kept.temperature)
    assert RouteRequest.of(kept, rule="paper").temperature == 0.2
    assert RouteRequest.of(kept, temperature=0.3).temperature == 0.3
    with pytest.raises(ModeclipError, match="unknown rule 'best'"):
        RouteRequest.of(kept, rule="best")


def test_what_routes_imports_neither_torch_nor_open_clip() -> None:
    code = "import sys, modeclip.mixture.mode; print(sorted({'torch', 'open_clip', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

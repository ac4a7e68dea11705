"""Experts under a budget, weights of images and of queries: against the same sums in plain loops."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeclip import MoDE
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.mixture import routed_clip
from modeclip.mixture.bundle import load_bundle, save_bundle
from modeclip.mixture.rules import RULES, route
from modeclip.models.blocks import Tower
from modeclip.models.clip import load_clip
from modeclip.models.encoders import load_any_encoder
from modeclip.models.pool import ModelRef, most_together
from modeclip.models.trunk import Shared
from support import encode_picture

CLASSES = ["heart", "arrow left", "bell", "book", "an unheard-of thing"]


load_clip_once, load_any_once = cache(load_clip), cache(load_any_encoder)


@pytest.fixture(scope="module", autouse=True)
def encoders_loaded_once() -> Iterator[None]:
    """The real encoders, each loaded once: loading them is most of what these tests would cost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeclip.mixture.router.load_any_encoder", load_any_once)
        yield


@pytest.fixture(scope="module")
def pictures(small_run: Path) -> list[Image.Image]:
    catalog = Catalog.open(small_run / "tasks.lance")
    return catalog.images(np.arange(0, len(catalog), max(1, len(catalog) // 12)))


@pytest.fixture(scope="module")
def four(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of four experts: the run's two, its seed and its dense model, each with some of the fine clusters."""
    return make_bundle(small_run, tmp_path_factory.mktemp("four") / "bundle")


def make_bundle(small_run: Path, folder: Path, **manifest: Any) -> Path:
    whole = load_bundle(small_run / "bundle")
    names = ["expert-0", "expert-1", "seed", "dense"]
    models = {f"expert-{k}": small_run / "models" / name for k, name in enumerate(names)}
    content = {"encoder": "minilm", "rule": "per_class", "temperature": 0.1, "templates": ["{}"], "lineage": {}}
    centres = {"fine_centers": manifest.pop("fine_centers", whole.fine_centers)}
    save_bundle(
        folder,
        models=models | {"seed": small_run / "models" / "seed"},
        expert_of_fine=np.arange(len(centres["fine_centers"])) % 4,
        cards={"fine": whole.clusters, "experts": [{"index": k, "size": 1, "keywords": ["a"]} for k in range(4)]},
        manifest=content | manifest,
        **centres,
    )
    return folder


def cosines(folder: Path, pictures: list[Image.Image], texts: list[str]) -> np.ndarray:
    """Cosines of one model of a bundle."""
    clip = load_clip_once(folder)
    clip.model.eval()
    with torch.inference_mode():
        images = clip.model.encode_image(torch.stack([clip.preprocess(p) for p in pictures]), normalize=True)
        return (images @ clip.model.encode_text(clip.tokens(texts), normalize=True).T).numpy()


def similarity(task: Any, pictures: list[Image.Image], texts: list[str], normalize: bool = False) -> np.ndarray:
    with torch.inference_mode():
        images = task.encode_image(torch.stack([task.preprocess(p) for p in pictures]), normalize=normalize)
        return (images @ task.encode_text(texts, normalize=normalize).T).numpy()


# --- budget ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["per_class", "uniform", "eq6"])
def test_task_under_a_budget_is_the_weighted_sum_of_the_experts_it_keeps(
    four: Path, pictures: list[Image.Image], rule: str
) -> None:
    task = MoDE.load(four).task(CLASSES, rule=rule, max_experts=2)
    assert len(task.active) == 2
    whole = MoDE.load(four).route(CLASSES, rule=rule).class_weights
    kept = np.sort(np.argsort(-whole.mean(axis=0), kind="stable")[:2])
    assert task.active.tolist() == kept.tolist()
    weights = whole[:, kept] / whole[:, kept].sum(axis=1, keepdims=True)
    expected = sum(weights[:, i] * cosines(four / f"expert-{k}", pictures, CLASSES) for i, k in enumerate(kept))
    np.testing.assert_allclose(similarity(task, pictures, CLASSES), expected, atol=1e-5)


def test_text_that_is_no_class_stays_with_the_experts_of_the_task(four: Path) -> None:
    mode = MoDE.load(four)
    task = mode.task(CLASSES, rule="per_class", max_experts=2)
    own = mode.route_queries(["a red umbrella"], rule="per_class")[0, task.active]
    vector = task.encode_text(["a red umbrella"])[0].detach().reshape(2, -1).norm(dim=1)
    np.testing.assert_allclose(vector, own / own.sum(), atol=1e-5)
    # Whatever else is in its batch, also where the whole mixture has the budget.
    task = MoDE.load(four, max_experts=2).task(CLASSES, rule="per_class")
    for neighbour in word_list(four):
        beside = task.encode_text(["a red umbrella", neighbour])[0].detach().reshape(2, -1).norm(dim=1)
        np.testing.assert_allclose(beside, vector, atol=1e-5)


def test_no_more_experts_in_memory_than_the_budget_whatever_tasks_are_open(
    four: Path, pictures: list[Image.Image]
) -> None:
    free, mode = MoDE.load(four), MoDE.load(four, max_experts=1)
    names = {int(free.route([name], rule="top1").weights.argmax()): name for name in sorted(word_list(four))}
    assert len(names) > 2, "the words reach several experts"
    tasks = {expert: mode.task([name], rule="top1") for expert, name in names.items()}
    models = weakref.WeakSet()
    for _ in range(2):
        for expert, task in tasks.items():
            got = similarity(task, pictures[:2], [names[expert]])
            np.testing.assert_allclose(
                got, cosines(four / f"expert-{expert}", pictures[:2], [names[expert]]), atol=1e-5
            )
            models.add(mode.pool.get(mode.bundle.models[expert], dtype=torch.float32).model)
            gc.collect()
            assert len(models) == len(mode.pool) == 1, "models that left are still held somewhere"


def word_list(bundle: Path) -> list[str]:
    return [card["nearest_captions"][0] for card in load_bundle(bundle).clusters]


def test_memory_decides_how_many_experts(four: Path) -> None:
    weights = load_file(four / "expert-0" / "open_clip_model.safetensors")
    size = sum(value.numel() * value.element_size() for value in weights.values())
    assert MoDE.load(four, max_memory=3 * size + 5).max_experts == 3
    assert MoDE.load(four, max_memory=3 * size, max_experts=2).max_experts == 2
    assert len(MoDE.load(four, max_memory=2 * size).task(CLASSES, rule="uniform").active) == 2
    with pytest.raises(ModeclipError, match=rf"max_memory: an expert takes {size:,} .*{size - 1:,}"):
        MoDE.load(four, max_memory=size - 1)
    with pytest.raises(ModeclipError, match="max_experts: expected 1 or more, got 0"):
        MoDE.load(four, max_experts=0)
    for ask in (MoDE.load(four).route, MoDE.load(four).task):
        with pytest.raises(ModeclipError, match="max_experts: expected 1 or more, got 0"):
            ask(CLASSES, max_experts=0)


def test_what_experts_share_counts_once_in_a_budget() -> None:
    def delta(number: int, own: int) -> ModelRef:
        sizes = {"head": own, "norm": 5}
        return ModelRef(
            name=f"{number}",
            spec="",
            digest=f"{number}",
            preprocess="",
            num_bytes=95 + own,
            own_bytes=sizes,
            base="seed",
        )

    experts = [delta(0, 10), delta(1, 10), delta(2, 30), delta(3, 10)]  # 90 bytes are those of the seed
    assert [most_together(experts, budget) for budget in (124, 125, 139, 140, 154, 155, 170)] == [0, 1, 1, 2, 2, 3, 4]
    assert most_together([experts[0]] * 4, 105) == 4
    full = [ModelRef(name=name, spec="", digest=name, preprocess="", num_bytes=100) for name in "abc"]
    assert [most_together(full, budget) for budget in (99, 100, 299, 300)] == [0, 1, 2, 3]


# --- queries, prompts, the seed ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_each_query_is_its_own_task(four: Path, pictures: list[Image.Image], rule: str) -> None:
    mode = MoDE.load(four)
    weights = mode.route_queries(CLASSES, rule=rule)
    for name, row in zip(CLASSES, weights, strict=True):
        np.testing.assert_allclose(row, mode.route([name], rule=rule).class_weights[0], atol=1e-7)
    expected = sum(weights[:, k] * cosines(four / f"expert-{k}", pictures, CLASSES) for k in range(4))
    np.testing.assert_allclose(
        similarity(mode.task(CLASSES, rule=rule, each=True), pictures, CLASSES), expected, atol=1e-5
    )


def test_routing_by_prompts_is_by_their_mean(four: Path) -> None:
    mode, templates = MoDE.load(four), ["a photo of a {}", "{} icon"]
    encoder, bundle = load_any_once("minilm"), load_bundle(four)
    total = sum(encoder.encode([t.replace("{}", name) for name in CLASSES]) for t in templates)
    expected = route(
        total / np.linalg.norm(total, axis=1, keepdims=True),
        bundle.fine_centers,
        bundle.expert_of_fine,
        num_experts=4,
        rule="per_class",
        temperature=0.1,
    ).weights
    np.testing.assert_allclose(mode.route(CLASSES, templates=templates).weights, expected, atol=1e-6)
    by_prompts = mode.task(CLASSES, templates=templates, route_by_prompts=True)
    np.testing.assert_allclose(by_prompts.weights, expected, atol=1e-6)
    np.testing.assert_allclose(mode.task(CLASSES, templates=templates).weights, mode.route(CLASSES).weights, atol=1e-9)


# --- clusters of images ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["clip-image", "clip-both"])
def of_images(request: pytest.FixtureRequest, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose clusters are of images, or of pairs."""
    encoder = f"{request.param}:{small_run / 'models' / 'seed'}"
    catalog = Catalog.open(small_run / "catalog.lance")
    rows = np.arange(0, len(catalog), max(1, len(catalog) // 16))[:16]
    images = [png(picture) for picture in catalog.images(rows)]
    captions = [str(caption) for caption in catalog.read(["caption"], rows)["caption"]]
    centers = load_any_once(encoder).encode_pairs(captions, images)  # type: ignore[union-attr]
    folder = tmp_path_factory.mktemp("images") / "bundle"
    return make_bundle(small_run, folder, encoder=encoder, fine_centers=centers, temperature=0.02)


def png(picture: Image.Image) -> bytes:
    return encode_picture(picture.convert("RGB"))


def image_weights(bundle: Path, pictures: list[Image.Image], rule: str) -> np.ndarray:
    opened = load_bundle(bundle)
    encoder: Any = load_any_once(opened.encoder)
    vectors, centers = encoder.encode_pairs([""] * len(pictures), [png(p) for p in pictures]), opened.fine_centers
    if encoder.encodes == "both":
        vectors, centers = (part[:, part.shape[1] // 2 :] for part in (vectors, centers))
    given = {"num_experts": 4, "rule": rule, "temperature": 0.02}
    return np.stack([route(v[None], centers, opened.expert_of_fine, **given).weights.reshape(4) for v in vectors])


@pytest.mark.parametrize("rule", ["per_class", "top1"])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_image_has_its_own_weights(
    of_images: Path, pictures: list[Image.Image], rule: str, normalize: bool
) -> None:
    mode = MoDE.load(of_images)
    weights = image_weights(of_images, pictures, rule)
    np.testing.assert_allclose(mode.route_images(pictures, rule=rule, temperature=0.02), weights, atol=1e-5)
    expected = sum(weights[:, [k]] * cosines(of_images / f"expert-{k}", pictures, CLASSES) for k in range(4))
    task = mode.task(CLASSES, rule=rule, temperature=0.02)
    got = similarity(task, pictures, CLASSES, normalize)
    np.testing.assert_allclose(got * (2 if normalize else 1), expected, atol=1e-4)
    if normalize:
        batch = torch.stack([task.preprocess(p) for p in pictures])
        with torch.inference_mode():
            for vectors in (task.encode_image(batch, True), task.encode_text(CLASSES, True), task.classifier(True)):
                torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=1e-5, rtol=0)
    order = np.argsort(-expected, axis=1, kind="stable")[:, 0]
    assert [p.classnames[0] for p in task.classify(pictures)] == [CLASSES[index] for index in order]


def test_budget_of_an_image(of_images: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = routed_clip.share

    def counting(models: Sequence[Any], tower: Tower) -> list[Shared]:
        def count(head: Callable[..., torch.Tensor], state: tuple[torch.Tensor, ...]) -> torch.Tensor:
            seen.append(len(state[0]))
            return head(state)

        found = original(models, tower)
        if tower == "text":
            return found
        return [replace(one, heads=tuple(partial(count, head) for head in one.heads)) for one in found]

    monkeypatch.setattr(routed_clip, "share", counting)
    mode = MoDE.load(of_images, max_experts=1)
    weights = mode.route_images(pictures)
    assert (weights > 0).sum(axis=1).tolist() == [1] * len(pictures)
    mode.task(CLASSES).classify(pictures)
    assert sum(seen) == len(pictures)  # an expert sees only the images that it has weight for
    assert len(mode.pool) == 1


def test_what_weights_of_images_have_no_place_for(of_images: Path, four: Path, pictures: list[Image.Image]) -> None:
    mode = MoDE.load(of_images)
    for ask in (mode.route, lambda classes: mode.task(classes).explain()):
        with pytest.raises(ModeclipError, match=r"clusters are of images.*MoDE\.route_images.*modeclip route"):
            ask(CLASSES)
    with pytest.raises(ModeclipError, match=r"clusters are of texts \(encoder minilm\).*route class names"):
        MoDE.load(four).route_images(pictures)

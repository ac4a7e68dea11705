"""The mixture is one CLIP: its dot products are the weighted cosines that plain open_clip gives, expert by expert."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import modeclip.models.trunk
from modeclip import MoDE
from modeclip.clustering.distances import nearest_centers
from modeclip.data.catalog import Catalog
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import check_files, load_bundle, save_bundle
from modeclip.mixture.rules import RULES
from support import transparent_drawing

CLASSES = ["heart", "arrow left", "bell", "book", "an unheard-of thing"]


@pytest.fixture(scope="module")
def bundle(small_run: Path) -> Path:
    return small_run / "bundle"


@pytest.fixture(scope="module")
def mode(bundle: Path) -> MoDE:
    """The mixture, whose models and encoder are loaded once for all tests that look at its answers."""
    return MoDE.load(bundle)


@pytest.fixture(scope="module")
def pictures(small_run: Path) -> list[Image.Image]:
    catalog = Catalog.open(small_run / "tasks.lance")
    return catalog.images(np.arange(0, len(catalog), max(1, len(catalog) // 20)))


def expert_cosines(bundle: Path, expert: int, pictures: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """Cosines as open_clip alone computes them from the expert's folder."""
    model, preprocess, tokenizer = plain_model(f"local-dir:{bundle / f'expert-{expert}'}")
    with torch.inference_mode():
        images = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
        return images @ model.encode_text(tokenizer(texts), normalize=True).T


@cache
def plain_model(name: str) -> tuple[Any, Any, Any]:
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@contextmanager
def counted_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """Count the forward passes of each model's image tower."""
    counts: Counter[int] = Counter()
    original = modeclip.models.trunk.encode

    def counting(model: torch.nn.Module, tower: str, x: torch.Tensor) -> torch.Tensor:
        counts[id(model)] += tower == "image"
        return original(model, tower, x)

    with monkeypatch.context() as patch:
        patch.setattr("modeclip.models.trunk.encode", counting)
        yield counts


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("normalize", [False, True])
def test_dot_product_is_the_weighted_sum_of_cosines(
    bundle: Path, mode: MoDE, pictures: list[Image.Image], rule: str, normalize: bool
) -> None:
    task = mode.task(CLASSES, templates=["{}"], rule=rule)
    weights = np.broadcast_to(task.weights, (len(CLASSES), 2))
    expected = sum(
        torch.from_numpy(weights[:, k].astype(np.float32)) * expert_cosines(bundle, k, pictures, CLASSES)
        for k in range(2)
    )
    with torch.inference_mode():
        images = task.encode_image(torch.stack([task.preprocess(p) for p in pictures]), normalize=normalize)
        texts = task.encode_text(task.tokenizer(CLASSES), normalize=normalize)
        got = images @ texts.T
    if normalize:
        for vectors in (images, texts):
            torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)), atol=1e-5, rtol=0)
        got = got * len(task.active) ** 0.5
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(task.classifier(normalize), task.encode_text(CLASSES, normalize), atol=1e-5, rtol=0)


def test_expert_without_weight_is_not_run(
    mode: MoDE, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted_passes(monkeypatch) as counts:
        mode.task(CLASSES, rule="uniform").classify(pictures)
    assert sorted(counts.values()) == [1, 1]
    with counted_passes(monkeypatch) as counts:
        mode.task(CLASSES, rule="top1").classify(pictures)
    assert list(counts.values()) == [1]


def test_expert_without_weight_is_not_loaded(bundle: Path) -> None:
    mode = MoDE.load(bundle)
    mode.task(CLASSES, rule="top1").encode_text(CLASSES)
    assert len(mode.pool) == 1


def test_what_is_transparent_in_a_picture_is_white(mode: MoDE) -> None:
    found, expected = mode.task(CLASSES, templates=["{}"]).classify(transparent_drawing())
    assert found == expected


@pytest.mark.parametrize("rule", ["paper", "per_class"])
def test_works_in_open_clips_own_classifier(mode: MoDE, pictures: list[Image.Image], rule: str) -> None:
    """A tool of open_clip's, given the mixture where it expects a CLIP, orders the classes as the mixture does."""
    task = mode.task(CLASSES, templates=["{}"], rule=rule)
    classifier = open_clip.build_zero_shot_classifier(task, task.tokenizer, CLASSES, ["{}"], use_tqdm=False)
    with torch.inference_mode():
        scores = task.encode_image(torch.stack([task.preprocess(p) for p in pictures]), normalize=True) @ classifier
    best = [CLASSES[i] for i in scores.argmax(dim=1).tolist()]
    assert best == [prediction.classnames[0] for prediction in task.classify(pictures)]
    image, text, scale = task(torch.stack([task.preprocess(pictures[0])]), task.tokenizer(CLASSES))
    probabilities = (scale * image @ text.T).softmax(dim=-1).sort(descending=True).values[0]
    expected = torch.tensor(task.classify(pictures[:1])[0].probabilities)
    torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", ["top1", "paper", "per_class"])
def test_log_probabilities_make_a_weighted_product(
    bundle: Path, mode: MoDE, pictures: list[Image.Image], rule: str
) -> None:
    """The share of a class is the product of the experts' own probabilities, each to the power of its weight."""
    task = mode.task(CLASSES, templates=["{}"], rule=rule)
    weights = np.broadcast_to(task.weights, (len(CLASSES), 2))
    product = torch.ones(len(pictures), len(CLASSES), dtype=torch.float64)
    for k in range(2):
        scale = float(load_file(bundle / f"expert-{k}" / "open_clip_model.safetensors")["logit_scale"].exp())
        own = (scale * expert_cosines(bundle, k, pictures, CLASSES).double()).softmax(dim=1)
        product *= own ** torch.from_numpy(weights[:, k].copy())
    expected = (product / product.sum(dim=1, keepdim=True)).sort(dim=1, descending=True)
    found = task.classify(pictures, mix="log-probabilities")
    shares = torch.tensor([prediction.probabilities for prediction in found], dtype=torch.float64)
    torch.testing.assert_close(shares, expected.values, atol=1e-4, rtol=0)
    names = [[CLASSES[index] for index in row] for row in expected.indices.tolist()]
    assert [prediction.classnames[0] for prediction in found] == [row[0] for row in names]
    tensor = torch.stack([task.preprocess(picture) for picture in pictures])
    assert [p.classnames for p in task.classify(tensor, "log-probabilities")] == [p.classnames for p in found]
    with pytest.raises(ModeclipError, match="unknown mix 'logits'"):
        task.classify(pictures, mix="logits")
    assert task.classify([]) == []


def test_a_task_carries_the_gradient_of_its_experts(bundle: Path, mode: MoDE) -> None:
    """As for any CLIP: the gradient of a class's similarity is the weighted sum of those of open_clip's experts."""
    task = mode.task(CLASSES, templates=["{}"], rule="per_class")
    size = task.preprocess(Image.new("RGB", (9, 9))).shape
    with torch.inference_mode():
        task.classify(torch.zeros(1, *size))
    pixels = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    images = pixels.clone().requires_grad_()
    (task.encode_image(images) @ task.classifier().T)[:, 1].sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.zeros_like(pixels)
    for expert in range(2):
        model, _, tokenizer = plain_model(f"local-dir:{bundle / f'expert-{expert}'}")
        inputs = pixels.clone().requires_grad_()
        vectors = model.encode_image(inputs, normalize=True)
        text = model.encode_text(tokenizer([CLASSES[1]]), normalize=True).detach()
        (float(task.weights[1, expert]) * (vectors @ text.T)).sum().backward()
        assert inputs.grad is not None
        expected += inputs.grad
    assert images.grad is not None
    assert expected.norm() > 0
    assert (images.grad - expected).norm() < 1e-3 * expected.norm()
    with torch.no_grad():
        assert not task.encode_image(images).requires_grad


def test_unknown_text_is_routed_by_itself(mode: MoDE) -> None:
    task = mode.task(CLASSES, rule="per_class")
    alone = mode.task(["a red umbrella"], rule="per_class")
    torch.testing.assert_close(
        task.encode_text(["a red umbrella"]), alone.encode_text(["a red umbrella"]), atol=1e-4, rtol=0
    )


def test_templates_are_averaged_as_unit_vectors(mode: MoDE) -> None:
    task = mode.task(["heart"], templates=["{}", "a {} icon"], rule="top1")
    one, two = (task.encode_text([text])[0] for text in ("heart", "a heart icon"))
    expected = torch.nn.functional.normalize(one / one.norm() + two / two.norm(), dim=0)
    torch.testing.assert_close(task.classifier()[0], expected, atol=1e-5, rtol=0)


def test_evaluation_scores_what_the_task_answers(small_run: Path) -> None:
    """The table's accuracy is that of the object that the user gets."""
    from modeclip.data.tasks.task import catalog_tasks

    task = catalog_tasks(Catalog.open(small_run / "tasks.lance"))[0]
    images = task.images.read(np.arange(len(task.images)))
    results = json.loads((small_run / "results.json").read_text())
    for rule in ("eq6", "per_class"):
        row = next(model for model in results["models"] if model["rule"] == rule)
        predictions = MoDE.load(small_run / "bundle").task(task.classnames, rule=rule).classify(images)
        assert task.labels is not None
        truth = [task.classnames[label] for label in task.labels]
        hits = [p.classnames[0] == name for p, name in zip(predictions, truth, strict=True)]
        assert np.mean(hits) == pytest.approx(row["accuracy"][task.name], abs=1 / len(hits) + 1e-9)


def test_explanation_names_the_clusters_that_decide(mode: MoDE) -> None:
    task = mode.task(CLASSES, rule="per_class")
    nearest_fine = nearest_centers(task.route.embeddings, mode.bundle.fine_centers)[0][:, 0]
    for reason, weights, nearest in zip(task.explain(), task.weights, nearest_fine, strict=True):
        assert reason.weights == pytest.approx(tuple(weights))
        assert reason.clusters[0].index == nearest
        assert reason.clusters[0].expert == mode.bundle.expert_of_fine[nearest]
        assert reason.clusters[0].captions
        distances = [cluster.distance for cluster in reason.clusters]
        assert distances == sorted(distances)


def test_seed_stands_in_for_a_missing_expert(small_run: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    from modeclip.mixture.bundle import save_bundle

    whole = load_bundle(small_run / "bundle")
    cards = json.loads((small_run / "clusters" / "cards.json").read_text())
    names = {name: small_run / "models" / name for name in ("seed", "expert-1")}
    manifest = {"encoder": "minilm", "rule": "uniform", "temperature": 0.2, "templates": ["{}"], "lineage": {}}
    centres = {"fine_centers": whole.fine_centers, "expert_of_fine": whole.expert_of_fine}
    save_bundle(tmp_path / "part", models=names, cards=cards, manifest=manifest, **centres)
    partial = MoDE.load(tmp_path / "part")
    assert [expert.folder for expert in partial.bundle.experts] == ["seed", "expert-1"]
    assert len(partial.task(CLASSES).classify(pictures)) == len(pictures)


@pytest.mark.parametrize("file", ["expert-1/open_clip_model.safetensors", "centres.safetensors"])
def test_bundle_whose_files_do_not_match_their_hashes(bundle: Path, tmp_path: Path, file: str) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    content = bytearray((copy / file).read_bytes())
    content[-1] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(ModeclipError, match=rf"1 of \d+ files .* hash .* first {file}.*get the bundle again"):
        check_files(load_bundle(copy)) if "expert" in file else MoDE.load(copy)
    (copy / file).unlink()
    with pytest.raises(ModeclipError, match=rf"missing .* first {file}"):
        MoDE.load(copy)


def test_weights_are_checked_when_they_are_loaded_and_routing_reads_none(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    for weights in copy.glob("*/open_clip_model.safetensors"):
        weights.write_bytes(b"no weights")
    mode = MoDE.load(copy)
    assert (mode.route(CLASSES).weights == MoDE.load(bundle).route(CLASSES).weights).all()
    with pytest.raises(ModeclipError, match=r"expert-\d.*open_clip_model\.safetensors"):
        mode.task(CLASSES)
    (flipped := bytearray((bundle / "expert-1" / weights.name).read_bytes()))[-1] ^= 1
    for expert in range(2):
        (copy / f"expert-{expert}" / weights.name).write_bytes(flipped)
    with pytest.raises(ModeclipError, match=r"expert-\d.* differs from its hash .*get the bundle again"):
        MoDE.load(copy).task(CLASSES).encode_text(CLASSES)


def test_bundle_carries_an_encoder_that_was_fitted_to_its_captions(bundle: Path, tmp_path: Path) -> None:
    from modeclip.models.encoders import load_encoder
    from modeclip.models.encoders.text import fit_tfidf

    names = ["arrow left", "arrow right", "heart", "bell", "bell off", "house", "home", "star"]
    fit_tfidf(names, tmp_path / "fitted", dimension=4)
    vectors = load_encoder(f"tfidf:{tmp_path / 'fitted'}").encode(names)
    opened = load_bundle(bundle)
    save_bundle(
        tmp_path / "made",
        models={"seed": bundle / "seed"},
        fine_centers=vectors,
        expert_of_fine=np.arange(len(names)) % 2,
        cards={
            "fine": opened.clusters[: len(names)],
            "experts": [{"index": k, "size": 4, "keywords": []} for k in range(2)],
        },
        manifest={
            "name": "made",
            "encoder": f"tfidf:{tmp_path / 'fitted'}",
            "rule": "paper",
            "temperature": 0.2,
            "templates": ["{}"],
            "lineage": {},
        },
    )
    shutil.rmtree(tmp_path / "fitted")
    shutil.move(tmp_path / "made", tmp_path / "moved")
    mode = MoDE.load(tmp_path / "moved")
    assert (mode.router.encoder.encode(names) == vectors).all()
    assert mode.route(["heart"], rule="top1").explain()[0].clusters[0].index == 2


def test_bundle_that_is_none(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(ModeclipError, match=r"no such folder; .*mode\.json, or a Hub id"):
        MoDE.load(tmp_path / "nowhere")
    with pytest.raises(ModeclipError, match=r"is no bundle: mode\.json is missing"):
        MoDE.load(tmp_path)
    with pytest.raises(ModeclipError, match="no such folder, and the Hub has no answer"):
        MoDE.load("nobody/nothing")
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = json.loads((copy / "mode.json").read_text())
    (copy / "mode.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ModeclipError, match=r"format 99 is newer .*upgrade modeclip"):
        MoDE.load(copy)
    for change in ({"rule": "best"}, {"experts": [{"folder": "expert-0"}]}, {"files": {"centres": "../x"}}):
        (copy / "mode.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ModeclipError, match=r"(best|name: is missing|not in the bundle).*get the bundle again"):
            MoDE.load(copy)


def test_task_that_cannot_be(mode: MoDE) -> None:
    with pytest.raises(ModeclipError, match="needs at least one class name"):
        mode.task([])
    with pytest.raises(ModeclipError, match=r"list of class names, got the text 'cat'; write \['cat'\]"):
        mode.task("cat")
    with pytest.raises(ModeclipError, match="unknown rule 'best'; known: paper, eq6"):
        mode.task(CLASSES, rule="best")
    with pytest.raises(ModeclipError, match=r"template 'a photo' has no \{\}"):
        mode.task(CLASSES, templates=["a photo"])

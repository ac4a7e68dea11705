"""Averages against a slow oracle, the greedy soup against all subsets' scores, and what must not be averaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modeclip.adapting.merging import (
    Ancestry,
    MergeConfig,
    average_into,
    check_seeds,
    find_model,
    greedy_soup,
    interpolate,
    merge,
)
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources.options import DataConfig
from modeclip.data.tasks.task import catalog_tasks
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import Bundle, RoutingConfig, save_bundle
from modeclip.mixture.manifest import Expert
from modeclip.models.clip import load_clip, save_clip
from modeclip.training.jobs import TrainConfig
from support import make_job, weights_of, with_weights

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A seed and three models that left it in different directions, as model folders."""
    out = tmp_path_factory.mktemp("models")
    clip = load_clip("modeclip-icon", seed=0)
    save_clip(clip, out / "seed")
    start = {name: value.clone() for name, value in clip.model.state_dict().items()}
    for k in range(3):
        generator = torch.Generator().manual_seed(k)
        for name, value in clip.model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(start[name] + 0.01 * noise if value.is_floating_point() else start[name])
        save_clip(clip, out / f"expert-{k}")
    return [out / "seed", *(out / f"expert-{k}" for k in range(3))]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task catalog of two real icon sets."""
    out = tmp_path_factory.mktemp("tasks")
    index(DataConfig.from_flat({"source": "icons", "train_sets": ("octicons",), "tasks": ("heroicons", "lucide")}), out)
    return str(out / "tasks.lance")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def change(folder: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Write a copy of a model folder with other weights."""
    shutil.copytree(folder, out)
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, out / WEIGHTS)
    return out


def accuracy(folder: Path, tasks: str) -> dict[str, float]:
    """Score a model folder with nothing but open_clip, image by image and class by class."""
    catalog = Catalog.open(tasks)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    scores = {}
    with torch.no_grad():
        for task in catalog_tasks(catalog):
            texts = model.encode_text(tokenizer(list(task.classnames)), normalize=True)
            images = torch.stack([preprocess(picture) for picture in catalog.images(task.images.rows)])
            best = (model.encode_image(images, normalize=True) @ texts.T).argmax(1).numpy()
            scores[task.name] = float((best == task.labels).mean())
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(), (0.2, 0.5, 0.3), (2.0, 0.0, 6.0)])
def test_average_equals_the_slow_sum(models: list[Path], tmp_path: Path, shares: tuple[float, ...]) -> None:
    result = merge(models[1:], MergeConfig(weights=shares), out=tmp_path / "merged")
    share = np.array(shares or (1.0, 1.0, 1.0))
    share /= share.sum()
    assert [candidate.weight for candidate in result.candidates] == pytest.approx(share.tolist())
    assert result.how == ("weighted" if shares else "uniform")
    parts, got = [weights(folder) for folder in models[1:]], weights(tmp_path / "merged")
    assert got.keys() == parts[0].keys()
    for name, tensor in got.items():
        wanted = sum(part[name].numpy().astype(np.longdouble) * s for part, s in zip(parts, share, strict=True))
        np.testing.assert_allclose(tensor.numpy(), np.asarray(wanted, np.float64), rtol=1e-6, atol=1e-9)
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["how"] == result.how


def test_average_of_equal_models_is_that_model(models: list[Path], tmp_path: Path) -> None:
    for k in range(3):
        shutil.copytree(models[1], tmp_path / str(k))
    merge([tmp_path / str(k) for k in range(3)], MergeConfig(), out=tmp_path / "merged")
    one, three = weights(models[1]), weights(tmp_path / "merged")
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_order_of_the_models_does_not_matter(models: list[Path], tmp_path: Path) -> None:
    merge(models, MergeConfig(), out=tmp_path / "one")
    merge(models[::-1], MergeConfig(), out=tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-7, atol=0)


def test_ends_of_the_line_are_the_models_themselves(models: list[Path]) -> None:
    seed, tuned = weights(models[0]), weights(models[1])
    seed_again, tuned_again = (interpolate(*models[:2], alpha).model.state_dict() for alpha in (0.0, 1.0))
    half = interpolate(*models[:2], 0.5).model.state_dict()
    clip = load_clip(models[2])
    average_into(clip, models[:2], [3.0, 3.0])  # weights need no sum of 1
    assert all(torch.equal(value, half[name]) for name, value in clip.model.state_dict().items())
    for name in seed:
        assert torch.equal(seed_again[name], seed[name])
        assert torch.equal(tuned_again[name], tuned[name])
        torch.testing.assert_close(half[name], (seed[name] + tuned[name]) / 2, rtol=1e-6, atol=1e-9)
    assert half["logit_scale"] == pytest.approx((float(seed["logit_scale"]) + float(tuned["logit_scale"])) / 2)
    with pytest.raises(ModeclipError, match=r"alpha must lie in \[0, 1\].*got 1.5"):
        interpolate(*models[:2], 1.5)


@pytest.mark.slow
def test_average_is_what_open_clip_loads(models: list[Path], tmp_path: Path, tasks: str) -> None:
    result = merge(models[1:3], MergeConfig(), out=tmp_path / "merged", tasks=tasks)
    assert result.accuracy == pytest.approx(accuracy(tmp_path / "merged", tasks), abs=0.003)
    assert result.score == pytest.approx(np.mean(list(result.accuracy.values())))
    for candidate, folder in zip(result.candidates, models[1:3], strict=True):
        assert candidate.accuracy == pytest.approx(accuracy(folder, tasks), abs=0.003)


def test_specification_that_is_no_folder(models: list[Path], tmp_path: Path) -> None:
    """A name is built first: here the seed's own random start, so the average lies half way to the expert."""
    merge([with_weights("modeclip-icon", tmp_path), models[1]], MergeConfig(), out=tmp_path / "merged")
    with pytest.raises(ModeclipError, match="modeclip-icon names no weights"):
        merge(["modeclip-icon", models[1]], MergeConfig(), out=tmp_path / "refused")
    half = interpolate(*models[:2], 0.5).model.state_dict()
    got = weights(tmp_path / "merged")
    assert all(torch.equal(got[name], half[name]) for name in got)


@given(st.lists(st.integers(0, 6), min_size=63, max_size=63), st.integers(1, 6))
def test_greedy_soup_follows_the_recipe(numbers: list[int], num_models: int) -> None:
    """Against the recipe as the paper prints it, on made-up scores (many ties) of all subsets of six models."""
    subsets = [kept for size in range(1, 7) for kept in combinations(range(6), size)]
    table = dict(zip(subsets, (float(number) for number in numbers), strict=True))
    singles = [table[(index,)] for index in range(num_models)]
    ingredients: list[int] = []
    for model in sorted(range(num_models), key=lambda model: -singles[model]):
        with_it = tuple(sorted([*ingredients, model]))
        if not ingredients or table[with_it] >= table[tuple(sorted(ingredients))]:
            ingredients.append(model)
    steps = greedy_soup(singles, table.__getitem__)
    kept = [step.index for step in steps if step.kept]
    assert kept == ingredients
    assert sorted(step.index for step in steps) == list(range(num_models))
    assert max(step.score for step in steps if step.kept) == table[tuple(sorted(kept))]


def test_greedy_keeps_what_helps_and_says_why(models: list[Path], tmp_path: Path, tasks: str) -> None:
    """One of four models is noise: it is scored, tried and dropped, and the soup is no worse than the best."""

    def ruin(tensors: dict[str, torch.Tensor]) -> None:
        tensors["visual.proj"] = 5 * torch.randn(tensors["visual.proj"].shape)

    noise = change(models[0], tmp_path / "noise", ruin)
    result = merge([noise, *models[:3]], MergeConfig(how="greedy"), out=tmp_path / "soup", tasks=tasks)
    scores = [candidate.score for candidate in result.candidates]
    assert scores == sorted(scores, key=lambda score: -(score or 0.0))
    assert all(candidate.soup_score is not None for candidate in result.candidates)
    kept = [candidate for candidate in result.candidates if candidate.weight]
    assert [candidate.weight for candidate in kept] == [1 / len(kept)] * len(kept)
    assert result.score == max(candidate.soup_score or 0.0 for candidate in kept) >= (scores[0] or 0.0)
    clip = load_clip(models[0])
    average_into(clip, [Path(candidate.name) for candidate in kept], [1.0] * len(kept))
    got = weights(tmp_path / "soup")
    for name, value in clip.model.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9)


def test_bundle_stands_for_its_finished_experts(models: list[Path], tmp_path: Path) -> None:
    cards = {
        "fine": [{"nearest_captions": []}] * 3,
        "experts": [{"index": k, "size": 5, "keywords": []} for k in range(3)],
    }
    save_bundle(
        tmp_path / "bundle",
        models={"seed": models[0], "expert-0": models[1], "expert-2": models[3]},
        fine_centers=np.eye(3, dtype=np.float32),
        expert_of_fine=np.arange(3),
        cards=cards,
        manifest={"encoder": "minilm", "rule": "paper", "temperature": 0.2, "templates": ["{}"], "lineage": {}},
    )
    result = merge([tmp_path / "bundle"], MergeConfig(), out=tmp_path / "merged")
    assert result.left_out == (f"{tmp_path}/bundle/expert-1",)
    assert [Path(candidate.name).name for candidate in result.candidates] == ["expert-0", "expert-2"]
    bundle = tmp_path / "bundle"
    with pytest.raises(ModeclipError, match=r"is a bundle.*give .*#NAME: seed, expert-0, expert-1, expert-2"):
        find_model(str(bundle), "finetune")
    for end in ("/expert-9", "#expert-9"):
        with pytest.raises(ModeclipError, match=r"has no model 'expert-9'; give .*/bundle#NAME: seed, expert-0, "):
            find_model(f"{bundle}{end}", "finetune")
    assert find_model(f"{bundle}#expert-2", "finetune") == find_model(f"{bundle}/expert-2", "finetune")
    assert find_model(f"{bundle}#seed", "finetune") == f"{bundle}/seed"
    result = merge([f"{bundle}#expert-0", f"{bundle}/expert-2"], MergeConfig(), out=tmp_path / "members")
    assert weights_of(tmp_path / "members") == weights_of(tmp_path / "merged")
    assert result.same_seed is True
    weights_file = bundle / "expert-2" / WEIGHTS
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"x")
    for end in ("/expert-2", "#expert-2"):
        with pytest.raises(ModeclipError, match=r"differ from their hash in mode\.json, first expert-2/"):
            find_model(f"{bundle}{end}", "finetune")
    find_model(f"{bundle}#expert-0", "finetune")  # only its own files are read
    merge([models[1], models[3]], MergeConfig(), out=tmp_path / "plain")
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


def test_different_architectures_are_refused(models: list[Path], tmp_path: Path) -> None:
    narrow = change(
        models[0], tmp_path / "narrow", lambda t: t.update({"visual.proj": t["visual.proj"][:, :7].clone()})
    )
    fewer = change(models[0], tmp_path / "fewer", lambda t: t.pop("visual.proj"))
    other = shutil.copytree(models[0], tmp_path / "other")
    config = json.loads((other / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (other / "open_clip_config.json").write_text(json.dumps(config))
    for folder, reason in (
        (narrow, r"visual\.proj is \[\d+, \d+\] and \[\d+, 7\]"),
        (fewer, r"visual\.proj is \[.*\] and missing"),
        (other, "quick_gelu is missing and true"),
    ):
        with pytest.raises(ModeclipError, match=f"different architectures.*{reason}") as error:
            merge([models[0], folder], MergeConfig(), out=tmp_path / "merged")
        assert "\n" not in str(error.value)
        with pytest.raises(ModeclipError, match=reason):
            interpolate(models[0], folder, 0.5)
    assert not (tmp_path / "merged").exists()


def test_buffers_that_are_no_floats_must_be_equal(models: list[Path], tmp_path: Path) -> None:
    """Counters of batch norms differ between experts and are the first one's; anything else may not differ."""
    from modeclip.adapting.merging import check_alike

    def folder(name: str, **buffers: torch.Tensor) -> Path:
        return change(models[0], tmp_path / name, lambda tensors: tensors.update(buffers))

    ids, bn = torch.arange(4), "visual.bn1.num_batches_tracked"
    one, two, three = (
        folder("one", position_ids=ids, **{bn: torch.tensor(3)}),
        folder("two", position_ids=ids.clone(), **{bn: torch.tensor(4)}),
        folder("three", position_ids=ids + 1, **{bn: torch.tensor(3)}),
    )
    check_alike({"one": one, "two": two})
    with pytest.raises(ModeclipError, match=r"one and three.*position_ids.*other"):
        check_alike({"one": one, "three": three})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (1.0, -0.5)}, r"weights.*at least 0.*got 1\.0 -0\.5"),
        ({"weights": (0.0, 0.0)}, r"weights.*one of them above.*got 0\.0 0\.0"),
        ({"weights": (float("nan"),)}, "weights must be at least 0"),
        ({"how": "greedy", "weights": (1.0,)}, "drop --weights, or --how greedy"),
        ({"templates": ("a photo",)}, "template 'a photo' has no {}"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModeclipError, match=message):
        MergeConfig(**settings)  # type: ignore[arg-type]


def test_requests_that_cannot_work(models: list[Path], tmp_path: Path, tasks: str) -> None:
    out = tmp_path / "merged"
    for given_models, config, where, message in (
        (models[:1], MergeConfig(), out, "expected at least two models, got 1"),
        ([models[0]] * 2, MergeConfig(), out, "is given twice"),
        (models[:2], MergeConfig(weights=(1.0,)), out, "2 weights.*seed, .*expert-0.*got 1"),
        (models[:2], MergeConfig(how="greedy"), out, "greedy.*held-out.*give --tasks"),
        (models[:2], MergeConfig(), models[1], "is also the folder to write to"),
        ([models[0], tmp_path], MergeConfig(), out, "open_clip_config.json is missing"),
        ([models[0], "no-such-model"], MergeConfig(), out, "unknown model 'no-such-model'"),
    ):
        with pytest.raises(ModeclipError, match=message):
            merge(given_models, config, out=where)
    with pytest.raises(ModeclipError, match="holds no tasks"):
        merge(models[:2], MergeConfig(), out=out, tasks=str(Path(tasks).parent / "catalog.lance"))
    damaged = shutil.copytree(models[1], tmp_path / "damaged")
    (damaged / WEIGHTS).write_bytes((models[1] / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ModeclipError, match=r"damaged.*open_clip_model\.safetensors.*get it again"):
        merge([models[0], damaged], MergeConfig(), out=out)
    assert not out.exists()


def trained(source: Path, folder: Path, **changes: object) -> Path:
    """Write a model folder with the job that trained it; return it."""
    shutil.copytree(source, folder)
    make_job("catalog.lance", folder, TrainConfig(model="modeclip-icon"), **changes).save()
    return folder


def continued(source: Path, folder: Path, start: Path) -> Path:
    """Write the model of a job that continues another."""
    from modeclip.training.jobs import TrainJob

    digest = TrainJob.load(start / "job.json").digest
    return trained(source, folder, start_from=str(start), start_digest=digest, where={"expert": len(folder.name)})


def test_models_of_different_seeds_are_refused(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = trained(models[0], tmp_path / "seed")
    other = trained(models[1], tmp_path / "other", catalog_fingerprint="another")
    experts = [continued(models[2], tmp_path / "a", seed), continued(models[3], tmp_path / "bb", seed)]
    stranger = continued(models[1], tmp_path / "ccc", other)
    assert merge(experts, MergeConfig(), out=tmp_path / "one").same_seed is True
    assert merge([seed, experts[0]], MergeConfig(), out=tmp_path / "two").same_seed is True
    with pytest.raises(ModeclipError, match=r"a and .*ccc come from different seeds.*--different-seeds"):
        merge([experts[0], stranger], MergeConfig(), out=tmp_path / "three")
    assert not (tmp_path / "three").exists()
    forced = merge([experts[0], stranger], MergeConfig(different_seeds=True), out=tmp_path / "three")
    assert forced.same_seed is False
    assert "warning" in capsys.readouterr().err
    # What was made of them comes from the same seeds.
    assert check_seeds([("merged", str(tmp_path / "one")), ("b", str(experts[1]))]) is True
    with pytest.raises(ModeclipError, match="different seeds"):
        check_seeds([("merged", str(tmp_path / "one")), ("c", str(stranger))])
    tuned = tmp_path / "tuned"
    shutil.copytree(models[2], tuned)
    (tuned / "finetune.json").write_text(json.dumps({"model": str(experts[0])}))
    assert check_seeds([("tuned", str(tuned)), ("b", str(experts[1]))]) is True
    with pytest.raises(ModeclipError, match="different seeds"):
        check_seeds([("tuned", str(tuned)), ("c", str(stranger))])


@pytest.mark.parametrize(
    ("edits", "is_known"),
    [
        ([("stranger", True)], False),
        ([("stranger", True), ("it", False)], False),
        ([("stranger", True), ("seed", False)], True),
        ([("seed", False)], True),
    ],
)
def test_an_expert_that_was_forced_into_a_bundle_is_no_relative(
    tmp_path: Path, edits: list[tuple[str, bool]], is_known: bool
) -> None:
    """Its folder has another name than the expert that it replaces; what continues it is none either."""
    starts = {"stranger": "other", "seed": "of the seed", "it": "of edit 0"}
    done = [
        {"expert": "expert-1", "forced": forced, "start": starts[start], "job": f"of edit {number}"}
        for number, (start, forced) in enumerate(edits)
    ]
    place = f"expert-1-edit{len(edits)}"
    bundle = Bundle(
        path=tmp_path,
        encoder="tfidf",
        routing=RoutingConfig(),
        fine_centers=np.eye(2, dtype=np.float32),
        expert_of_fine=np.arange(2),
        experts=(Expert(name="expert-0", folder="seed", size=9), Expert(name="expert-1", folder=place, size=9)),
        lineage={"jobs": {"seed": "of the seed"}, "edits": done},
        manifest={"sha256": {f"{folder}/{WEIGHTS}": folder for folder in ("seed", place)}},
    )
    replaced, seed = (Ancestry._in_bundle(bundle, folder) for folder in (place, "seed"))
    assert (replaced.is_whole, bool(replaced.known & seed.known)) == (is_known, is_known)
    assert f"of edit {len(edits) - 1}" in replaced.known
    assert (seed.is_whole, seed.known) == (True, {"seed", "of the seed"})


def test_where_nothing_tells_of_the_seed_a_line_says_so(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = merge(models[1:3], MergeConfig(), out=tmp_path / "out")
    assert result.same_seed is None
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["same_seed"] is None
    [line] = [line for line in capsys.readouterr().err.splitlines() if "not known" in line]
    assert "expert-0" in line
    assert "expert-1" in line
    for name, content in (("finetune.json", "[]"), ("merge.json", '{"candidates": 3}'), ("finetune.json", "{")):
        folder = tmp_path / f"{len(content)}-{name}"
        shutil.copytree(models[1], folder)
        (folder / name).write_text(content)
        assert not Ancestry.of(str(folder)).is_whole
    circle = tmp_path / "circle"
    shutil.copytree(models[1], circle)
    (circle / "finetune.json").write_text(json.dumps({"model": str(circle)}))
    damaged = trained(models[1], tmp_path / "damaged")
    (damaged / "job.json").write_text("{")
    for folder in (circle, damaged):
        assert not Ancestry.of(str(folder)).is_whole


def test_published_weights_are_seeds_of_their_own() -> None:
    one, two = "ViT-B-32@openai", "ViT-B-32@laion2b_s34b_b79k"
    with pytest.raises(ModeclipError, match="different seeds"):
        check_seeds([(one, one), (two, two)])
    assert check_seeds([(one, one), ("again", one)]) is True

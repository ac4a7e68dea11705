"""Systems on tasks: every number by hand from open_clip alone, every pass once, no expert without weight."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modeclip.commands.evaluation import evaluate as evaluate_command
from modeclip.data.catalog import Catalog
from modeclip.data.tasks.task import CatalogImages, Task, catalog_tasks
from modeclip.errors import ModeclipError
from modeclip.evaluation.evaluate import EvaluateConfig, RecipeEvaluateConfig, averages, evaluate
from modeclip.evaluation.intervals import bootstrap_interval, paired_interval
from modeclip.evaluation.results import Result, compare, write_results
from modeclip.evaluation.systems import System, open_systems
from modeclip.mixture.bundle import load_bundle
from modeclip.mixture.mode import MoDE
from modeclip.mixture.rules import MIXES, Mix, route
from modeclip.models.encoders import load_encoder
from modeclip.models.feature_cache import FeatureCache
from support import Python

Command = Callable[..., subprocess.CompletedProcess[str]]
WEIGHTS = "open_clip_model.safetensors"
NUM_CLASSES = 150
"""Of the classes of each set, so many are told apart: a model encodes the names of all of them."""


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """Note what goes into any tower or encoder, by the layer that every pass begins with, and how many at once."""
    ran: list[tuple[str, int]] = []

    def note(module: nn.Module, inputs: tuple[object, ...], _: object) -> None:
        if type(module).__name__ in {"Conv2d", "Embedding", "SentenceBert"}:  # patches, tokens
            ran.append((type(module).__name__, len(inputs[0]) if inputs else 0))  # type: ignore[arg-type]

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield ran
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def tasks(small_run: Path) -> list[Task]:
    """Classification of two sets, retrieval by their names, and pairs to be told apart, a few images each."""
    found = []
    for task in catalog_tasks(Catalog.open(small_run / "tasks.lance")):
        assert isinstance(task.images, CatalogImages)
        assert task.labels is not None
        rows = np.flatnonzero(task.labels < NUM_CLASSES)[::2]
        images = CatalogImages(catalog=task.images.catalog, rows=task.images.rows[rows])
        found.append(replace(task, images=images, labels=task.labels[rows], classnames=task.classnames[:NUM_CLASSES]))
    first = found[0]
    assert first.labels is not None
    names = [first.classnames[label] for label in first.labels]
    texts = (*names, *(f"an icon of {name}" for name in names))
    count = len(first.images)
    retrieval = Task(
        name="search", kind="retrieval", images=first.images, texts=texts, image_of_text=np.tile(np.arange(count), 2)
    )
    even = 2 * (count // 2)
    assert isinstance(first.images, CatalogImages)
    pairs = Task(
        name="pairs",
        kind="selection",
        images=CatalogImages(catalog=first.images.catalog, rows=first.images.rows[:even]),
        texts=tuple(names[:even]),
        instance_of_image=np.arange(even) // 2,
        instance_of_text=np.arange(even) // 2,
    )
    return [*found, retrieval, pairs]


@pytest.fixture(scope="module")
def specs(small_run: Path) -> list[str]:
    return [str(small_run / "bundle"), f"{small_run}/bundle#expert-1", f"dense={small_run}/models/dense"]


@pytest.fixture(scope="module")
def evaluated(
    specs: list[str], tasks: list[Task], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Result], Path]:
    folder = tmp_path_factory.mktemp("cache")
    cache = FeatureCache(folder)
    return evaluate(open_systems(specs, cache), tasks, EvaluateConfig(), cache), folder


def by_hand(folder: Path, task: Task) -> np.ndarray:
    """Return all similarities of a task by one model, with nothing but open_clip."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        pictures = task.images.read(np.arange(len(task.images)))
        images = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
        texts = model.encode_text(tokenizer(list(task.classnames or task.texts)), normalize=True)
    return (images @ texts.T).numpy()


def of(results: list[Result], task: str, system: str) -> Result:
    [found] = [result for result in results if (result.task.name, result.system) == (task, system)]
    return found


def test_every_task_and_system_has_a_result(evaluated: tuple[list[Result], Path], tasks: list[Task]) -> None:
    results, _ = evaluated
    names = ["small/bundle", "small/bundle#expert-1", "dense"]
    assert [(r.task.name, r.system) for r in results] == [(task.name, name) for task in tasks for name in names]
    assert [result.kind for result in results[::3]] == ["classification"] * 2 + ["retrieval", "selection"]


def test_single_models_by_hand(evaluated: tuple[list[Result], Path], small_run: Path, tasks: list[Task]) -> None:
    results, _ = evaluated
    for name, folder in (("dense", "models/dense"), ("small/bundle#expert-1", "bundle/expert-1")):
        for task in tasks[:2]:
            cosine = by_hand(small_run / folder, task)
            outcome = of(results, task.name, name).outcome
            assert np.array_equal(outcome.prediction, cosine.argmax(1))
            assert outcome.metrics["acc1"] == pytest.approx((cosine.argmax(1) == task.labels).mean())
        cosine, search = by_hand(small_run / folder, tasks[2]), of(results, "search", name).outcome.metrics
        image_of_text = tasks[2].image_of_text
        place = (cosine > cosine[image_of_text, np.arange(cosine.shape[1])]).sum(0)
        assert search["image_retrieval_recall@5"] == pytest.approx((place < 5).mean())
        found = [image_of_text[row.argmax()] == number for number, row in enumerate(cosine)]  # type: ignore[index]
        assert search["text_retrieval_recall@1"] == pytest.approx(np.mean(found))


def test_mixture_by_hand(evaluated: tuple[list[Result], Path], small_run: Path, tasks: list[Task]) -> None:
    """The weighted sum of the experts' cosines, with weights of the class names, or of each query."""
    results, _ = evaluated
    bundle = load_bundle(small_run / "bundle")
    encode = load_encoder(bundle.encoder).encode
    folders = [bundle.model_folder(expert) for expert in range(2)]
    for task in tasks[:3]:
        weights = route(
            encode(list(task.classnames or task.texts)),
            bundle.fine_centers,
            bundle.expert_of_fine,
            num_experts=2,
            rule=bundle.routing.rule,
            temperature=bundle.routing.temperature,
        ).weights
        mixed = sum(by_hand(folder, task) * weights[:, k] for k, folder in enumerate(folders))
        outcome = of(results, task.name, "small/bundle").outcome
        if task.kind == "classification":
            assert (outcome.prediction == np.argmax(mixed, 1)).mean() > 0.995, "but for ties to rounding"
        else:
            assert (outcome.prediction[: len(task.texts)] == np.argmax(mixed, 0)).mean() > 0.99
    facts = of(results, tasks[0].name, "small/bundle").provenance
    assert facts["rule"] == bundle.routing.rule
    assert sum(facts["weights"].values()) == pytest.approx(1)
    assert facts["clustering"] == bundle.clustering


@pytest.mark.parametrize("mix", MIXES)
def test_answers_are_those_of_the_routed_model(specs: list[str], small_run: Path, tasks: list[Task], mix: Mix) -> None:
    cache = FeatureCache()
    task, retrieval = tasks[0], tasks[2]
    results = evaluate(open_systems(specs, cache), [task, retrieval], EvaluateConfig(mix=mix), cache)
    routed = MoDE.load(small_run / "bundle").task(list(task.classnames))
    predictions = routed.classify(task.images.read(np.arange(len(task.images))), mix)
    found = of(results, task.name, "small/bundle")
    best = [task.classnames[number] for number in found.outcome.prediction]
    assert [prediction.classnames[0] for prediction in predictions] == best
    assert found.provenance["mix"] == mix
    assert of(results, retrieval.name, "small/bundle").provenance["mix"] == "cosines"
    dense = of(results, task.name, "dense")
    assert np.array_equal(dense.outcome.prediction, by_hand(small_run / "models/dense", task).argmax(1))


def test_text_and_image_retrieval_are_routed_differently(small_run: Path, tasks: list[Task]) -> None:
    """Under eq6 the corpus has one weight vector, and each query its own."""
    cache = FeatureCache()
    [system] = open_systems([str(small_run / "bundle")], cache, rules=["eq6"])
    [result] = evaluate([system], [tasks[2]], EvaluateConfig(), cache)
    weights = system.weigh(tasks[2], cache)
    corpus, queries = weights.values, weights.queries
    assert queries is not None
    assert (corpus.shape, queries.shape) == ((2,), (len(tasks[2].texts), 2))
    cosines = [by_hand(small_run / "bundle" / f"expert-{k}", tasks[2]) for k in range(2)]
    to_images = sum(cosine * queries[:, k] for k, cosine in enumerate(cosines))
    to_texts = sum(cosine * corpus[k] for k, cosine in enumerate(cosines))
    outcome, count = result.outcome, len(tasks[2].texts)
    assert (outcome.prediction[:count] == np.argmax(to_images, 0)).mean() > 0.99
    assert (outcome.prediction[count:] == np.argmax(to_texts, 1)).mean() > 0.99


def test_second_evaluation_runs_no_model(
    evaluated: tuple[list[Result], Path], specs: list[str], tasks: list[Task], small_run: Path
) -> None:
    results, folder = evaluated
    with counting() as ran:
        cache = FeatureCache(folder)
        again = evaluate(open_systems(specs, cache), tasks, EvaluateConfig(), cache)
    assert not ran
    assert len(cache.pool) == 0
    for one, other in zip(results, again, strict=True):
        assert one.outcome.metrics == other.outcome.metrics
        assert json.dumps(one.provenance) == json.dumps(other.provenance)
    with counting() as ran:  # another rule is arithmetic, too
        cache = FeatureCache(folder)
        evaluate(open_systems([str(small_run / "bundle")], cache, rules=["eq6"]), tasks, EvaluateConfig(), cache)
    assert not ran


def test_changed_checkpoint_is_evaluated_anew(
    evaluated: tuple[list[Result], Path], small_run: Path, tasks: list[Task], tmp_path: Path
) -> None:
    """A model is trained on in place: the same path, name and size, and a cache that knows the old one."""
    _, folder = evaluated
    model = shutil.copytree(small_run / "models" / "dense", tmp_path / "model")
    cache = FeatureCache(folder)
    [old] = evaluate(open_systems([str(model)], cache), tasks[:1], EvaluateConfig(), cache)
    tensors = load_file(model / WEIGHTS)
    tensors["visual.proj"] = tensors["visual.proj"].flip(1).contiguous()
    save_file(tensors, model / WEIGHTS)
    with counting() as ran:
        cache = FeatureCache(folder)
        [new] = evaluate(open_systems([str(model)], cache), tasks[:1], EvaluateConfig(), cache)
    assert sum(count for kind, count in ran if kind == "Conv2d") == len(tasks[0].images)
    assert new.provenance["models"] != old.provenance["models"]
    assert np.array_equal(new.outcome.prediction, by_hand(model, tasks[0]).argmax(1))


def test_expert_without_weight_is_not_run(small_run: Path, tasks: list[Task]) -> None:
    cache = FeatureCache()
    [system] = open_systems([str(small_run / "bundle")], cache, max_experts=1)
    weights = system.weigh(tasks[0], cache).values.reshape(-1, 2).mean(0)
    assert sorted(weights) == [0, 1]
    with counting() as ran:
        [result] = evaluate([system], tasks[:1], EvaluateConfig(), cache)
    assert len(cache.pool) == 1
    assert sum(count for kind, count in ran if kind == "Conv2d") == len(tasks[0].images)
    expert = small_run / "bundle" / f"expert-{weights.argmax()}"
    assert np.array_equal(result.outcome.prediction, by_hand(expert, tasks[0]).argmax(1))
    assert result.provenance["max_experts"] == 1


def test_experts_that_are_the_seed_are_run_once(small_run: Path, tasks: list[Task], tmp_path: Path) -> None:
    """A bundle whose experts are not finished: the seed stands for both, and answers as itself."""
    from modeclip.mixture.bundle import assemble_bundle
    from modeclip.training.jobs import TrainJob

    run = shutil.copytree(small_run, tmp_path / "run")
    job = TrainJob.load(run / "models" / "seed" / "job.json")
    assemble_bundle(run, [replace(job, folder=str(run / "models" / "seed"))])
    cache = FeatureCache()
    mixture, seed = open_systems([f"{run}/bundle", f"{run}/bundle#seed"], cache)
    one, other = evaluate([mixture, seed], tasks[:1], EvaluateConfig(), cache)
    assert len(cache.pool) == 1
    assert np.array_equal(one.outcome.prediction, other.outcome.prediction)


def test_templates(small_run: Path, tasks: list[Task]) -> None:
    """A task's own come before those of the evaluation, these before the bundle's; all models have the same."""
    cache = FeatureCache()
    systems = open_systems([f"{small_run}/models/dense", str(small_run / "bundle")], cache)
    own = replace(tasks[0], name="own", templates=("a {} icon",))
    results = evaluate(systems, [own, tasks[0]], EvaluateConfig(templates=("my {}", "{}")), cache)
    prompts = [result.provenance["prompts"] for result in results]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert [result.provenance["num_templates"] for result in results] == [1, 1, 2, 2]
    renamed = replace(tasks[0], classnames=tuple(f"a {name} icon" for name in tasks[0].classnames))
    [expected] = evaluate(systems[:1], [renamed], EvaluateConfig(), cache)
    assert np.array_equal(results[0].outcome.prediction, expected.outcome.prediction)
    with pytest.raises(ModeclipError, match=r"templates: template 'icon' has no \{\} .*class name"):
        EvaluateConfig(templates=("icon",))


def test_definitions_stand_behind_the_prompts(small_run: Path, tasks: list[Task], tmp_path: Path) -> None:
    """As if every prompt had been written out by hand; the results say where the definitions come from."""
    names = tasks[0].classnames
    dump = tmp_path / "dump.jsonl"
    entries = [{"word": name, "senses": [{"glosses": [f"what {name} is"]}]} for name in names[1:]]
    dump.write_text("\n".join(map(json.dumps, entries)))
    cache, config = FeatureCache(), EvaluateConfig(templates=("my {}", "{}"), knowledge=(str(dump),))
    systems = open_systems([str(small_run / "bundle")], cache)
    by_hand = [
        tuple(f"{prompt} ; {name} , what {name} is" if place else prompt for prompt in (f"my {name}", name))
        for place, name in enumerate(names)
    ]
    [found] = evaluate(systems, [tasks[0]], config, cache)
    [expected] = evaluate(systems, [replace(tasks[0], prompts=tuple(by_hand))], EvaluateConfig(), cache)
    [plain] = evaluate(systems, [tasks[0]], EvaluateConfig(templates=config.templates), cache)
    assert found.provenance["prompts"] == expected.provenance["prompts"] != plain.provenance["prompts"]
    assert np.array_equal(found.outcome.prediction, expected.outcome.prediction)
    known = found.provenance["knowledge"]
    assert known["num_explained"] == len(names) - 1
    assert [one["name"] for one in known["dictionaries"]] == [str(dump)]
    assert "knowledge" not in plain.provenance
    with pytest.raises(ModeclipError, match="'nowhere': no such file"):
        evaluate(systems, [tasks[0]], EvaluateConfig(knowledge=("nowhere",)), cache)
    with pytest.raises(ModeclipError, match="'nowhere': no such file"):
        RecipeEvaluateConfig(knowledge=("nowhere",))


def test_averages_groups_and_differences(evaluated: tuple[list[Result], Path], tasks: list[Task]) -> None:
    results, _ = evaluated
    found = averages(results)
    assert [(a.kind, a.system) for a in found[:3]] == [("classification", r.system) for r in results[:3]]
    first, dense = found[0], found[2]
    outcomes = [{r.task.name: r.outcome for r in results[:6] if r.system == a.system} for a in (first, dense)]
    assert first.score == bootstrap_interval(outcomes[0])
    assert first.score.mean == pytest.approx(np.mean([r.outcome.metrics["acc1"] for r in results[:6:3]]))
    assert (first.versus_first, first.test) == (None, None)
    assert dense.versus_first == paired_interval(outcomes[1], outcomes[0])
    assert dense.test is not None
    assert first.tasks == tuple(task.name for task in tasks[:2])
    grouped = [
        replace(r, task=replace(r.task, group="shifted")) if r.task.name == tasks[1].name else r for r in results
    ]
    by_group = {(a.kind, a.group, a.system): a.score.mean for a in averages(grouped)}
    assert by_group["classification", "shifted", "dense"] == of(results, tasks[1].name, "dense").outcome.score
    assert by_group["classification", "", "dense"] == of(results, tasks[0].name, "dense").outcome.score


def test_results_are_written_and_compared(evaluated: tuple[list[Result], Path], tmp_path: Path) -> None:
    results, _ = evaluated
    write_results(tmp_path, results)
    comparison = compare(tmp_path, tmp_path, first_system="dense", second_system="small/bundle")
    chosen = [[r.outcome for r in results if r.system == name] for name in ("dense", "small/bundle")]
    means = [np.mean([outcome.score for outcome in side]) for side in chosen]
    assert comparison.difference.mean == pytest.approx(means[0] - means[1])


def test_linear_probe_has_all_experts(small_run: Path, tasks: list[Task]) -> None:
    """The concatenated features of both experts, fitted on other images, whatever the weights are."""
    task = tasks[0]
    assert isinstance(task.images, CatalogImages)
    whole = next(t for t in catalog_tasks(task.images.catalog) if t.name == task.name)
    assert whole.labels is not None
    assert isinstance(whole.images, CatalogImages)
    sizes = np.bincount(whole.labels)
    classes = np.flatnonzero(sizes >= 4)[:6]
    rows = [np.flatnonzero(whole.labels == label) for label in classes]
    parts = []
    for chosen in (np.concatenate([r[1::2] for r in rows]), np.concatenate([r[::2] for r in rows])):
        images = CatalogImages(catalog=task.images.catalog, rows=whole.images.rows[chosen])
        labels = np.searchsorted(classes, whole.labels[chosen])
        names = tuple(whole.classnames[label] for label in classes)
        parts.append(Task(name="few", kind="classification", images=images, classnames=names, labels=labels))
    few, cache = replace(parts[0], train=parts[1]), FeatureCache()
    systems = open_systems([str(small_run / "bundle"), f"{small_run}/bundle#expert-0"], cache, max_experts=1)
    results = evaluate(systems, [few], EvaluateConfig(probe=True, probe_c=1.0), cache)
    assert [(r.kind, r.system) for r in results] == [
        (kind, name)
        for name in ("small/bundle", "small/bundle#expert-0")
        for kind in ("classification", "linear_probe")
    ]
    mixture, single = results[1], results[3]
    assert mixture.provenance["probe"]["C"] == 1.0
    assert len(mixture.provenance["models"]) == 2
    assert "rule" not in mixture.provenance
    assert not np.array_equal(mixture.outcome.hits, single.outcome.hits) or mixture.outcome.score > 0
    assert {a.kind for a in averages(results)} == {"classification", "linear_probe"}


def test_probe_of_a_class_without_training_images(small_run: Path, tasks: list[Task]) -> None:
    """It is said before anything is encoded, by the class's name."""
    task = tasks[0]
    assert task.labels is not None
    assert isinstance(task.images, CatalogImages)
    known = task.labels != task.labels[0]
    images = replace(task.images, rows=task.images.rows[known])
    probed = replace(task, train=replace(task, images=images, labels=task.labels[known]))
    cache = FeatureCache()
    systems = open_systems([f"{small_run}/models/dense"], cache)
    name = task.classnames[task.labels[0]]
    with (
        counting() as ran,
        pytest.raises(ModeclipError, match=f"1 of its classes.*no training image.*'{name}'.*add images"),
    ):
        evaluate(systems, [probed], EvaluateConfig(probe=True), cache)
    assert not ran


def test_several_rules_and_tasks_as_they_are_done(small_run: Path, tasks: list[Task]) -> None:
    """A mixture under several rules is several systems, of the same passes; what is done is handed out at once."""
    cache = FeatureCache()
    systems = open_systems([f"m={small_run}/bundle"], cache, rules=["uniform", "top1", "uniform"])
    assert [system.name for system in systems] == ["m@uniform", "m@top1"]
    done: list[list[Result]] = []
    results = evaluate(systems, tasks[:2], EvaluateConfig(), cache, done=done.append)
    assert [[result.task.name for result in found] for found in done] == [[task.name] * 2 for task in tasks[:2]]
    assert [result for found in done for result in found] == results
    assert [result.provenance["rule"] for result in results] == ["uniform", "top1"] * 2
    again = evaluate(
        open_systems([str(small_run / "bundle")], cache, rules=["top1"]), tasks[:1], EvaluateConfig(), cache
    )
    assert again[0].outcome.metrics == results[1].outcome.metrics


def test_systems_and_their_names(small_run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(small_run / "bundle", tmp_path / name / "bundle")
    cache = FeatureCache()
    specs = [f"{tmp_path}/a/bundle", f"{tmp_path}/b/bundle", f"{tmp_path}/a/bundle#seed", "x=modeclip-icon"]
    systems = open_systems(specs, cache, random_weights=True)
    assert [system.name for system in systems] == ["a/bundle", "b/bundle", "a/bundle#seed", "x"]
    assert [len(system.models) for system in systems] == [2, 2, 1, 1]
    assert systems[0].models[0].digest == systems[1].models[0].digest


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "evaluate: no model given"),
        (["BUNDLE#expert-9"], "expert of .*bundle 'expert-9'.*known: seed, expert-0, expert-1"),
        (["ViT-B-33"], "unknown model 'ViT-B-33'"),
        (["x=BUNDLE", "x=modeclip-icon"], "two models.*'x'.*NAME=MODEL"),
    ],
)
def test_models_that_are_not_there(small_run: Path, specs: list[str], message: str) -> None:
    given = [spec.replace("BUNDLE", str(small_run / "bundle")) for spec in specs]
    with pytest.raises(ModeclipError, match=message):
        open_systems(given, FeatureCache())


def test_bounds_are_chosen_among_the_experts_by_the_labels(small_run: Path, tasks: list[Task], tmp_path: Path) -> None:
    cache, bundle = FeatureCache(tmp_path), f"{small_run}/bundle"
    systems = open_systems([bundle, f"{bundle}#expert-1"], cache, rules=["uniform", "paper"], bounds=True)
    experts = ["small/bundle#expert-0", "small/bundle#expert-1"]
    names = ["small/bundle@uniform", "small/bundle@paper", *reversed(experts)]
    bounds = ["small/bundle best single", "small/bundle oracle"]
    assert [system.name for system in systems] == [*names, *bounds]
    assert [system.is_given for system in systems] == [True, True, True, False, True, True]
    results = evaluate(systems, tasks, EvaluateConfig(), cache)
    chosen = [result for result in results if result.system in bounds]
    assert len(chosen) == 2 * len(tasks)
    for result in chosen:
        assert result.outcome is of(results, result.task.name, result.provenance["expert"]).outcome
        own = [of(results, result.task.name, name).outcome.score for name in experts]
        if result.system.endswith("oracle"):
            assert result.outcome.score == max(own)
    means = [np.mean([of(results, task.name, name).outcome.score for task in tasks[:2]]) for name in experts]
    best = {r.provenance["expert"] for r in chosen if r.system == bounds[0] and r.kind == "classification"}
    assert best == {experts[int(np.argmax(means))]}


def test_bounds_need_a_mixture(small_run: Path) -> None:
    with pytest.raises(ModeclipError, match=r"bounds.*mixture.*give a bundle"):
        open_systems([f"{small_run}/models/dense"], FeatureCache(), bounds=True)


def test_same_task_twice(small_run: Path, tasks: list[Task]) -> None:
    cache = FeatureCache()
    systems: list[System] = open_systems([f"{small_run}/models/dense"], cache)
    with pytest.raises(ModeclipError, match="two tasks have the name 'search'"):
        evaluate(systems, [tasks[2], tasks[2]], EvaluateConfig(), cache)


def test_killed_evaluation_loses_one_task(
    small_run: Path, tmp_path: Path, modeclip_command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed as soon as a task's features are there; the next call makes only what is missing."""
    out = tmp_path / "out"
    words = ["evaluate", str(small_run / "bundle"), "--tasks", str(small_run / "tasks.lance"), "--out", str(out)]
    process = Python("-m", "modeclip", *words)
    while not list((out / "features").glob("images-*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (out / "features").glob("*.npy")}
    assert not (out / "results.jsonl").exists()
    done = modeclip_command(*words)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len((out / "results.jsonl").read_text().splitlines()) == 2
    assert "heroicons" in done.stdout
    assert "average of 2" in done.stdout
    both = (str(small_run / "bundle"), f"dense={small_run}/models/dense")
    tasks = (str(small_run / "tasks.lance"),)
    capsys.readouterr()
    evaluate_command(both, EvaluateConfig(), tasks=tasks, out=out, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [mean["system"] for mean in found["averages"]] == ["small/bundle", "dense"]
    assert found["averages"][1]["versus_first"]["low"] <= found["averages"][1]["versus_first"]["high"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len((out / "results.jsonl").read_text().splitlines()) == 4
    evaluate_command(both, EvaluateConfig(), tasks=tasks, bounds=True, out=out)
    shown = capsys.readouterr().out
    assert "small/bundle oracle" in shown
    assert "expert-0" not in shown
    assert len((out / "results.jsonl").read_text().splitlines()) == 12

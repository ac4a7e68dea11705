"""The page of results is what its records say, and the statistics and candidates behind it are those of plain loops."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t

from modeclip.data.wordnet import load_wordnet
from modeclip.evaluation.frontier import SAMPLES_PER_FLOP
from support import write_wordnet

RUNS = Path(__file__).parents[2] / "runs"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts of the experiments, which import each other as they lie in their folder."""
    sys.path.insert(0, str(RUNS))
    import candidates
    import curation_report
    import experiments
    import frontier
    import names_report
    import results
    import routers
    import subjects
    import subjects_report
    import ways_report

    import curation

    modules = (candidates, curation, curation_report, experiments, frontier, results, subjects, subjects_report)
    modules += (names_report, routers, ways_report)
    yield {module.__name__: module for module in modules}
    sys.path.remove(str(RUNS))


@pytest.mark.parametrize("page", ["results.md", "curation.md", "one-model.md"])
def test_tables_are_those_of_the_records(scripts: dict[str, ModuleType], page: str) -> None:
    results = scripts["results"]
    text = (RUNS.parent / "docs" / page).read_text(encoding="utf-8")
    made = results.written(text, results.Records(RUNS / "experiments.jsonl"))
    differing = [pair for pair in zip(made.splitlines(), text.splitlines(), strict=False) if pair[0] != pair[1]]
    assert not differing[:3]  # pytest's own comparison of two whole pages takes minutes
    assert len(made) == len(text)


def test_every_record_has_a_number_for_each_task(scripts: dict[str, ModuleType]) -> None:
    results = scripts["results"]
    records = results.Records(RUNS / "experiments.jsonl")
    count, known = len(records.data["tasks"]), {*records.studies, *records.other_rates}
    keys = [(line["study"], line["seed"], line["row"]) for line in records.lines]
    assert len(set(keys)) == len(keys)
    assert {study for study, _, _ in keys} <= known | {"data"}
    for line in records.lines:
        if "tasks" in line["values"] and line["study"] != "data":
            values = np.array(line["values"]["tasks"])
            assert values.shape == (count,), line["row"]
            assert ((values >= 0) & (values <= 100)).all(), line["row"]


def test_interval_is_students(scripts: dict[str, ModuleType]) -> None:
    interval, against = scripts["results"].interval, scripts["results"].against
    # three values: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == "2.0\u00a0±\u00a02.5"
    assert interval([4.0]) == "4.0"
    assert interval([]) == ""
    one = {0: np.array([2.0, 4.0]), 1: np.array([3.0, 5.0]), 2: np.array([9.0, 9.0])}
    other = {0: np.array([1.0, 1.0]), 1: np.array([2.0, 2.0])}
    assert against(one, other) == "+2.0\u00a0±\u00a00.0"  # only seeds that both have
    assert against(other, one) == "-2.0\u00a0±\u00a00.0"
    assert against(one, other, np.array([True, False])) == "+1.0\u00a0±\u00a00.0"


def squares(seed: int, num_classes: int = 5, num_fine: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    classes, centers = draw.normal(size=(num_classes, 3)), draw.normal(size=(num_fine, 3))
    return ((classes[:, None] - centers) ** 2).sum(2), draw.integers(0, 4, num_fine), draw.uniform(0.5, 2, 4)


@pytest.mark.parametrize("spread", ["nearest", "mean", "gap"])
def test_adaptive_has_a_temperature_for_each_class(scripts: dict[str, ModuleType], spread: str) -> None:
    squared, expert_of_fine, _ = squares(1)
    found = scripts["candidates"].adaptive(squared, expert_of_fine, 4, spread, 0.3)
    for row, weights in zip(squared.tolist(), found, strict=True):
        near = sorted(row)[:16]
        size = {"nearest": near[0], "mean": math.fsum(near) / 16, "gap": math.fsum(near) / 16 - near[0]}[spread]
        affinity = [math.exp(-square / (0.3 * size)) for square in row]
        sums = [sum(a for a, c in zip(affinity, expert_of_fine, strict=True) if c == k) for k in range(4)]
        np.testing.assert_allclose(weights, np.array(sums) / sum(sums), rtol=1e-9)


def test_the_seed_is_one_more_center(scripts: dict[str, ModuleType]) -> None:
    squared, expert_of_fine, factors = squares(2)
    found = scripts["candidates"].with_seed(squared, expert_of_fine, 4, 0.8, 0.2)
    for row, weights in zip(squared.tolist(), found, strict=True):
        affinity = [math.exp(-square / 0.2) for square in [*row, 0.64]]
        owners = [*expert_of_fine, 4]
        sums = [sum(a for a, c in zip(affinity, owners, strict=True) if c == k) for k in range(5)]
        np.testing.assert_allclose(weights, np.array(sums) / sum(sums), rtol=1e-9)
    product = found[:, :4] * factors
    reweighed = scripts["candidates"].reweighed(found[:, :4], factors.tolist())
    np.testing.assert_allclose(reweighed, product / product.sum(1, keepdims=True))


# ---------------------------------------------------------------- which curation pays


def studied(scores: dict[str, list[float]], **of: str) -> list[dict[str, Any]]:
    """Return records of selections with these averages, by seed; two tasks lie as far above as below each."""
    return [
        {
            "selection": name,
            "seed": seed,
            "pairs": 100,
            "samples": 400,
            "tasks": {"one": value - 1, "other": value + 1},
            "kept": {"clean": 1.0, "shuffled": 0.25},
            "date": "2026-11-28",
            "machine": {"machine": "a processor"},
        }
        | ({"of": of[name.partition(" ")[0]]} if name.partition(" ")[0] in of else {})
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]


SCORES = {"raw": [4.0, 5.0, 6.0], "better": [8.0, 9.1, 9.9], "alike": [4.1, 4.9, 6.1], "worse": [2.0, 3.1, 4.0]}


def test_gains_have_the_error_of_an_analysis_of_variance(scripts: dict[str, ModuleType]) -> None:
    gains = {gain.selection: gain for gain in scripts["curation_report"].gains(studied(SCORES))}
    values = list(SCORES.values())
    total = sum(sum(own) for own in values) / 12
    seeds = [sum(own[seed] for own in values) / 4 for seed in range(3)]
    left = sum((own[s] - sum(own) / 3 - seeds[s] + total) ** 2 for own in values for s in range(3))
    error = math.sqrt(2 * left / 6 / 3)  # (4 - 1)(3 - 1) degrees of freedom
    assert gains["better"].mean == pytest.approx(4.0)
    assert gains["better"].half == pytest.approx(2.4469 * error, rel=1e-4)  # t(0.975, 6)
    chances = sorted((gains[name].chance, name) for name in ("better", "alike", "worse"))
    assert [gains[name].corrected for _, name in chances] == pytest.approx(
        np.maximum.accumulate([chance * (3 - place) for place, (chance, _) in enumerate(chances)]).clip(max=1).tolist()
    )
    assert {name: gain.verdict for name, gain in gains.items()} == {"better": "pays", "alike": "open", "worse": "loses"}


def test_correction_for_many_comparisons_is_holms(scripts: dict[str, ModuleType]) -> None:
    holm, draw = scripts["curation_report"].holm, np.random.default_rng(0)
    for size in (1, 2, 7, 30):
        chances = draw.uniform(0, 0.2, size).round(2).tolist()
        for corrected, chance in zip(holm(chances), chances, strict=True):
            ranked = sorted(chances)
            below = [min(1.0, (size - place) * one) for place, one in enumerate(ranked) if one <= chance]
            assert corrected == pytest.approx(max(below))


def test_the_sentence_says_what_pays_and_what_loses(scripts: dict[str, ModuleType]) -> None:
    report = scripts["curation_report"]
    sentence = report.verdict(studied(SCORES | {"oracle": [7.0, 8.1, 9.0]}))
    assert sentence.startswith("Of 3 selections against the raw pool at equal samples (5.0\u00a0±\u00a02.5 %, 3 seeds;")
    assert "1 pays (better +4.0), 1 loses (worse −2.0), and the difference of 1 is within chance" in sentence
    assert sentence.endswith("an oracle that trains on the clean pairs alone is at +3.0.")
    for twice, words in (
        (
            [7.0, 8.0, 9.0],
            "worth +3.0; better against that: 1.0\u00a0±\u00a00.2 over the seeds. "
            "So for a single model a filter of one's own pays;",
        ),
        ([10.0, 11.0, 12.0], "So for a single model a filter of one's own does not pay;"),
        ([8.1, 8.9, 10.1], "So for a single model whether a filter of one's own pays is open;"),
    ):
        lines = studied(SCORES | {"MoDE-4 of better": [20.0, 21.0, 22.0]}, **{"MoDE-4": "better"})
        lines += [line | {"samples": 800} for line in studied({report.TWICE: twice})]
        sentence = report.verdict(lines)
        assert words in sentence
        assert sentence.startswith("Of 3 selections")  # neither more samples nor a mixture is a selection
    fourth = studied({"raw": [0.0] * 3 + [9.0]})[3:]
    assert (
        report.verdict(studied(SCORES) + fourth).partition("; ")[2]
        == report.verdict(studied(SCORES)).partition("; ")[2]
    )
    assert "no verdict" in report.verdict(studied({name: values[:1] for name, values in SCORES.items()}))
    assert "no verdict" in report.verdict([])
    assert report.brief(studied(SCORES)).startswith(
        "On a pool of icons with known noise, of 3 selections 1 pay at equal"
    )
    assert report.brief([]) == "Not measured with several seeds yet."


@pytest.mark.parametrize("scores", [SCORES, {name: values[:1] for name, values in SCORES.items()}, {}])
def test_the_page_of_the_study_shows_every_selection(
    scripts: dict[str, ModuleType], scores: dict[str, list[float]], tmp_path: Path
) -> None:
    lines = studied(scores | ({"MoDE-4 of better": [8.0]} if scores else {}), **{"MoDE-4": "better"})
    plan = {"better": [{"method": "dfn", "clean": "trusted"}], "alike": [{"method": "align"}], "worse": [], "raw": []}
    costs = [{"selection": "better", "processor_seconds": 12.5, "machine": "a processor", "date": "2026-11-28"}]
    page = scripts["curation_report"].write_study(tmp_path / "study.html", lines, costs, plan).read_text()
    for name in scores:
        assert page.count(f">{name}<") + page.count(f"</i>{name}<") >= 3
    if scores:
        assert "12.5" in page
        assert 'class="m-mixture' in page
    assert scripts["curation_report"].verdict(lines).replace("\u00a0", " ")[:40] in page.replace("\u00a0", " ")


def test_what_follows_waits_for_all_selections_and_takes_the_best(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    curation, report = scripts["curation"], scripts["curation_report"]
    experiment = curation.Experiment(RUNS / "curate.yaml", tmp_path)
    names = list(experiment.selections)
    assert names[:3] == ["raw", "oracle", "metaclip t=2"]  # columns are called after the place: new ones at the end
    assert names[20] == "chain"
    scores = {name: [place % 7, place % 7 + 1, place % 7 + 2] for place, name in enumerate(names)}
    lines = studied({name: list(map(float, values)) for name, values in scores.items()} | {"oracle": [90.0] * 3})
    assert list(experiment.then_cells(lines[:-1], None, [0])) == []
    assert curation.best_of(lines, [name for name in names if name != "oracle"]) == names[6]
    assert report.averages(lines)["oracle"] == {0: 90.0, 1: 90.0, 2: 90.0}


def test_subjects_are_what_the_first_sense_is_a_kind_of(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects, wordnet = scripts["subjects"], load_wordnet(write_wordnet(tmp_path / "dict"))
    above = {synset.name: synset.hypernyms for synset in wordnet.synsets}
    assert subjects.subject_of("dogs", wordnet, above) == "animals"  # a dog is an animal
    assert subjects.subject_of("animal", wordnet, above) == "animals"
    assert subjects.subject_of("hot dog", wordnet, above) is None  # nothing stands above it here
    assert subjects.subject_of("unicorn", wordnet, above) is None
    # a name belongs to the first subject that holds it
    monkeypatch.setattr(subjects, "KINDS", {"pets": ("dog.n.01",), "animals": ("animal.n.01",)})
    assert subjects.subject_of("dog", wordnet, above) == "pets"


def test_gains_by_subject_leave_out_near_copies_and_have_two_intervals(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    report, packed = scripts["subjects_report"], scripts["subjects"].packed
    near = np.array([1, 0, 0, 0, 0, 1], bool)
    facts = {"tasks": ["food", "sky"], "images": [4, 2], "classes": [2, 2], "near": packed(near)}
    dense = {0: [1, 0, 0, 0, 0, 1], 1: [1, 1, 0, 0, 0, 1]}
    mine = {0: [1, 1, 1, 0, 1, 0], 1: [0, 1, 1, 1, 1, 0]}
    lines = [{"tasks": "wordnet", "seed": 0, "row": "tasks", "values": facts}]
    for row, hits in ((report.DENSE, dense), (f"{report.CAPTIONS} per_class", mine)):
        for seed, right in hits.items():
            accuracies = [100 * float(np.mean(right[:4])), 100 * float(np.mean(right[4:]))]
            values = {"tasks": accuracies, "hits": packed(np.array(right, bool))}
            lines.append({"tasks": "wordnet", "seed": seed, "row": row, "values": values})
    path = tmp_path / "subjects.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, row = report.read(path), f"{report.CAPTIONS} per_class"
    np.testing.assert_allclose(report.gains(found, "wordnet", row), [[50, 0], [25, 0]])
    # without the first and the last image
    np.testing.assert_allclose(report.gains(found, "wordnet", row, far=True), [[200 / 3, 100], [200 / 3, 100]])
    # seeds: 25 and 12.5, t(0.975, 1) = 12.706, half width 12.706 * 6.25; tasks: 37.5 and 0, 12.706 * 18.75
    assert report.both(report.gains(found, "wordnet", row)) == "+18.8\u00a0±\u00a079.4, 238.2"
    assert not report.is_certain(report.gains(found, "wordnet", row))
    assert report.is_certain(np.array([[9.9, 10.0], [10.1, 10.2]]))


def test_law_of_the_gain_is_that_of_a_line_through_the_studies(scripts: dict[str, ModuleType]) -> None:
    frontier, results = scripts["frontier"], scripts["results"]
    records = results.Records(RUNS / "experiments.jsonl")
    gains = frontier.gains_of(records, "images")
    points = {name: (frontier.features_of(records, "fullness", name)[0], np.mean(gains[name])) for name in gains}
    x, y = np.array(list(points.values())).T
    slope, start = np.polyfit(x, y, 1)
    law = frontier.fit("fullness", frontier.inputs(records, "fullness", gains))
    np.testing.assert_allclose(law.weights, [start, slope], atol=1e-9)
    wrong = []
    for left_out in range(len(x)):
        others = np.arange(len(x)) != left_out
        wrong.append(y[left_out] - np.polyval(np.polyfit(x[others], y[others], 1), x[left_out]))
    assert math.isclose(frontier.error_of(records, "fullness", gains), float(np.sqrt(np.mean(np.square(wrong)))))
    # the interval of a line at its own points, by the textbook: s * sqrt(1 + 1 / n + (x - mean)^2 / Sxx)
    spread = math.sqrt(float(np.sum((y - start - slope * x) ** 2)) / (len(x) - 2))
    leverage = 1 / len(x) + (x[0] - x.mean()) ** 2 / float(np.sum((x - x.mean()) ** 2))
    half = t.ppf(0.975, len(x) - 2) * spread * math.sqrt(1 + leverage)
    np.testing.assert_allclose(law.foresee([x[0]]), (start + slope * x[0], half))


def test_pilot_says_what_the_law_of_the_records_says(scripts: dict[str, ModuleType]) -> None:
    frontier = scripts["frontier"]
    law, _ = frontier.choose(frontier.Records(RUNS / "experiments.jsonl"), "images")
    assert law.name == "fullness"
    assert round(2**law.pays_from, 3) == SAMPLES_PER_FLOP


def test_what_was_foreseen_was_written_down_before_it_was_measured(scripts: dict[str, ModuleType]) -> None:
    frontier = scripts["frontier"]
    lines = json.loads((RUNS / "frontier.json").read_text(encoding="utf-8"))
    assert lines
    records = frontier.Records(RUNS / "experiments.jsonl")
    for line in lines:
        assert line["study"] not in line["known"]
        law, errors = frontier.choose(records, line["kind"], set(line["known"]))
        gain, half = law.foresee(frontier.features_of(records, law.name, line["study"]))
        assert (law.name, round(gain, 2), round(half, 2)) == (line["law"], line["gain"], line["half_width"])
        assert {name: round(value, 2) for name, value in errors.items()} == line["errors"]


def test_ways_are_in_the_order_of_their_gains_and_certain_ones_alone_are_bold(scripts: dict[str, ModuleType]) -> None:
    results = scripts["results"]
    lines = results.all_tables(results.Records(RUNS / "experiments.jsonl"))["ways"]().splitlines()[2:]
    gains = [re.search(r"[+-][\d.]+(?=\u00a0)", line) for line in lines]
    numbers = [float(found[0]) for found in gains if found]
    assert len(numbers) == len(lines) > 10
    assert numbers == sorted(numbers, reverse=True)
    assert all(("**" in line) != ("not certain" in line) for line in lines)


def test_batches_of_one_cluster_are_of_the_same_samples_as_random_ones(scripts: dict[str, ModuleType]) -> None:
    experiments = scripts["experiments"]
    study = next(study for study in experiments.read_studies()[1] if study.name == experiments.QUARTER)
    arms = [arm for arm in study.arms if arm.kind in {"pure", "batch"}]
    names = [arm.name for arm in study.arms]
    assert len(set(names)) == len(names)
    assert all(arm.cost == experiments.PARTS for arm in arms)
    whole = study.train.steps_per_part * experiments.PARTS * study.train.batch_size
    workshop = experiments.Workshop.__new__(experiments.Workshop)
    workshop.clustering = lambda arm, *_: (None, f"expert_{arm.encoder}")
    job = experiments.TrainJob(
        name="x",
        folder="x",
        catalog="x",
        catalog_fingerprint="",
        config=study.train,
        first_step=16 * study.train.steps_per_part,
        last_step=32 * study.train.steps_per_part,
        first_share=0.5,
        last_share=1.0,
    )
    for arm in arms:
        made = workshop.in_batches(job, arm, study, 0)
        assert made.last_step * made.config.batch_size == whole
        assert made.first_step * made.config.batch_size * 2 == whole
        assert made.config.groups == (f"expert_{arm.encoder}" if arm.kind == "pure" else None)


def test_a_random_split_of_a_study_has_the_sizes_of_the_clusters_among_its_pairs(
    scripts: dict[str, ModuleType],
) -> None:
    """Also where the pairs of the study and the split are drawn with the same seed."""
    experiments = scripts["experiments"]

    def fixed(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values.setflags(write=False)  # as a catalog gives them
        return values

    study = next(study for study in experiments.read_studies()[1] if study.name == experiments.QUARTER)
    columns = {"expert_a": np.sort(np.random.default_rng(1).integers(0, 4, 400)).astype(np.int32)}
    catalog = SimpleNamespace(columns=columns, read=lambda names: {name: fixed(columns[name]) for name in names})
    catalog.add_columns = columns.update
    workshop = experiments.Workshop.__new__(experiments.Workshop)
    workshop.clustering = lambda *_: (None, "expert_a")
    columns["sample"] = np.random.default_rng(0).permutation(400) < 100
    workshop.sample_column = lambda study: "sample" if study.pairs else None
    workshop.__class__ = type("Made", (experiments.Workshop,), {"catalog": catalog})
    for pairs in (0, 100):
        name = workshop.random_column(experiments.base_arm(kind="random"), replace(study, pairs=pairs), 0)
        chosen = columns["sample"] if pairs else np.ones(400, bool)
        assert np.bincount(columns[name][chosen]).tolist() == np.bincount(columns["expert_a"][chosen]).tolist()
        assert (columns[name] != columns["expert_a"]).any()


def test_centres_of_icon_sets_are_the_directions_of_their_mean_images(scripts: dict[str, ModuleType]) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    sets = np.arange(50) % 3
    found = scripts["experiments"].mean_of_sets(vectors, sets)
    for number in range(3):
        mean = np.mean([vector for vector, own in zip(vectors, sets, strict=True) if own == number], axis=0)
        np.testing.assert_allclose(found[number], mean / math.sqrt(sum(value * value for value in mean)), rtol=1e-5)


def test_experts_for_known_names_count_on_their_own_set(scripts: dict[str, ModuleType]) -> None:
    report, arm = scripts["names_report"], scripts["experiments"].Arm
    dense = {0: np.array([10.0, 20.0, 30.0]), 1: np.array([12.0, 20.0, 30.0])}
    rows = {
        "prior-a": {0: [14.0, 19.0, 28.0], 1: [14.0, 20.0, 29.0]},
        "prior-b": {0: [9.0, 23.0, 30.0], 1: [11.0, 22.0, 30.0]},
        "named-a": {0: [15.0, 10.0, 20.0]},
    }
    arms = tuple(arm(kind=name[:5], task=name[6:]) for name in rows)
    records = SimpleNamespace(
        studies={"names": SimpleNamespace(arms=arms)},
        data={"tasks": ["a", "b", "c"], "classes": [6, 7, 8]},
        asked={"tasks": ["a", "b", "c"], "classes": [3, 4, 5]},
        equal=lambda *_: dense,
        values=lambda _, name: {seed: {"tasks": tasks, "pairs": [500]} for seed, tasks in rows[name].items()},
    )
    a, b = report.read(records, "prior")
    assert (a.own, a.others) == ([4.0, 2.0], [-1.5, -0.5])
    assert (b.own, b.others) == ([3.0, 2.0], [-0.5, -0.5])
    said = report.found(records)
    assert all(words in said for words in ("stands at +2.8", "better on 2 of them", "stands at -0.8"))
    lines = report.names_table(records).splitlines()[2:]
    assert [line.split(" | ")[:3] for line in lines] == [["| a", "3", "11.0"], ["| b", "4", "20.0"]]
    assert ["+3.0" in lines[0], "+5.0" in lines[0], "+2.5" in lines[1]] == [True] * 3


# ---------------------------------------------------------------- the demo


def test_what_the_demo_says_beside_its_pilot_is_what_is_recorded(scripts: dict[str, ModuleType]) -> None:
    """Over all seeds the expert for the names gains in the pilot and after short trainings, not after long ones."""
    from modeclip.commands.pilot import DEMO, LONGER, NAMES

    pilot = json.loads((RUNS / "pilot.json").read_text(encoding="utf-8"))
    long, short = (json.loads((RUNS / name).read_text().splitlines()[-1]) for name in scripts["results"].DEMO[:2])
    gains = {row["name"]: row["gain"] for row in pilot["rows"]}
    assert pilot["verdict"]["choice"] == "names"
    assert pilot["verdict"]["certainty"] == "sure"
    assert all(gain["class names"]["low"] <= 0 for name, gain in gains.items() if name not in {"names", "dense"})
    at = {row["name"]: row for row in long["decision"]["rows"]}["names"]
    brief = {row["name"]: row for row in short["decision"]["rows"]}["names"]
    assert at["gain"]["class names"]["mean"] < 0
    assert brief["gain"]["class names"]["low"] > 0
    assert f"after {at['samples'] / brief['samples']:g} times the samples" in LONGER
    assert brief["samples"] == pilot["plan"]["samples"] == DEMO.samples
    settings = f"--model {DEMO.model} --samples {DEMO.samples} --pairs {DEMO.pairs} --classes '{DEMO.classes}'"
    assert pilot["command"] == f"modeclip pilot icons --seeds 3 {settings}"
    assert [line["decision"]["classnames"] for line in (long, short)] == [NAMES.split(",")] * 2


# ---------------------------------------------------------------- a router without a tower


def test_a_taught_router_gives_the_weights_that_it_was_taught(scripts: dict[str, ModuleType]) -> None:
    """Weights that follow from two numbers are learned from a thousand examples; others are not invented."""
    routers, draw = scripts["routers"], np.random.default_rng(0)
    features = draw.normal(size=(2000, 6)) * [1, 5, 0.1, 1, 1, 1] + 3
    logits = np.stack([(features[:, 0] - 3) * 2, (features[:, 1] - 3) / 2, np.zeros(2000)], 1)
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    weigh = routers.teach(features[:1000], weights[:1000])
    found = weigh(features[1000:])
    np.testing.assert_allclose(found.sum(1), 1)
    assert np.abs(found - weights[1000:]).mean() < 0.02
    assert (found.argmax(1) == weights[1000:].argmax(1)).mean() > 0.95
    noise = routers.teach(draw.normal(size=(1000, 2)), np.full((1000, 4), 0.25))(draw.normal(size=(50, 2)))
    np.testing.assert_allclose(noise, 0.25, atol=0.02)


def test_patch_features_are_those_of_each_patch(scripts: dict[str, ModuleType]) -> None:
    from modeclip.models.clip import load_clip

    routers, clip, draw = scripts["routers"], load_clip("modeclip-icon-xxxs", seed=0), np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    read = {"__len__": lambda _: len(pictures), "read": lambda _, rows: [pictures[row] for row in rows]}
    found = routers.patch_features(clip, type("Pictures", (), read)())
    conv, width = clip.model.visual.conv1, clip.model.visual.conv1.out_channels
    kernel, size = conv.weight.detach().numpy().reshape(width, -1), conv.kernel_size[0]
    for picture, row in zip(pictures, found, strict=True):
        pixels = clip.preprocess(picture).numpy()
        patches = [
            kernel @ pixels[:, y : y + size, x : x + size].reshape(-1)
            for y in range(0, 32, size)
            for x in range(0, 32, size)
        ]
        values = np.stack(patches)
        wanted = [values.mean(0), values.std(0, ddof=1), values.max(0), values.min(0)]
        np.testing.assert_allclose(row, np.concatenate(wanted), rtol=1e-4, atol=1e-5)

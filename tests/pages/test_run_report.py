"""The report shows what the run folder holds, shows it as text, and needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modeclip.clustering.clusters import Clustering
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources import DataConfig
from modeclip.data.sources.icons import read_icons
from modeclip.errors import ModeclipError
from modeclip.pages.run_report import find_headline, write_report
from support import Element, parse_page

EVIL = "</script><script>alert('1')</script><img src=x onerror=alert(2)> \" onload='x' {{ 7*7 }}"
TASKS = ("lucide", "heroicons")
NUM_EXPERTS = 3
NUM_FINE = 24
SEED_SAMPLES, EXPERT_SAMPLES = 27_000, 5_000
MIXTURE_SAMPLES = SEED_SAMPLES + NUM_EXPERTS * EXPERT_SAMPLES


def edit(run: Path, **changes: Any) -> dict[str, Any]:
    """Change entries of a run's results.json."""
    path = run / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(results), encoding="utf-8")
    return results


def make_model(name: str, samples: int, average: float, **more: Any) -> dict[str, Any]:
    kind = {"seed": "seed", "mixture": "mixture", "oracle": "bound", "best single": "bound"}.get(name, "dense")
    return {
        "name": name,
        "kind": "expert" if name.startswith("expert-") else kind,
        "rule": None,
        "default": False,
        "samples": samples,
        "accuracy": {TASKS[0]: average + 0.03, TASKS[1]: average - 0.03},
        "average": average,
        "interval": [average - 0.0123, average + 0.0119],
        "entropy": None,
        "versus_dense_total": None,
    } | more


def make_results() -> dict[str, Any]:
    """Return a results.json with every part that a run can have."""
    rules = {"paper": (0.41, 1.01), "uniform": (0.4, math.log(3)), "per_class": (0.45, 0.5)}
    mixtures = [
        make_model(
            "mixture",
            MIXTURE_SAMPLES,
            average,
            rule=rule,
            default=rule == "per_class",
            entropy=dict.fromkeys(TASKS, entropy),
            versus_dense_total={"difference": average - 0.42, "interval": [average - 0.43, average - 0.408]},
        )
        for rule, (average, entropy) in rules.items()
    ]
    expert_samples = SEED_SAMPLES + EXPERT_SAMPLES
    weights = np.random.default_rng(1).dirichlet(np.full(NUM_EXPERTS, 0.4), size=30)
    routing = {
        "rule": "per_class",
        "weights": weights.mean(axis=0).tolist(),
        "entropy": 0.5,
        "classes": [
            {"name": f"class {i}", "nearest_fine": i % 7, "distance": 0.3 + i / 50, "weights": weights[i].tolist()}
            for i in range(30)
        ],
    }
    return {
        "name": "icons",
        "date": "2026-11-22",
        "seed": 5,
        "machine": {"processor": "Some CPU", "cores": 2, "memory_gb": 15.6, "python": "3.11.2", "torch": "2.15.0"}
        | {"open_clip": "3.3.0", "modeclip": "0.1.0"},
        "chance": {TASKS[0]: 0.001, TASKS[1]: 0.004},
        "tasks": [{"name": name, "num_classes": 900, "num_images": 950} for name in TASKS],
        "models": [
            make_model("seed", SEED_SAMPLES, 0.38),
            make_model("dense", expert_samples, 0.4),
            make_model("dense-total", MIXTURE_SAMPLES, 0.42),
            *(make_model(f"expert-{k}", expert_samples, 0.34 + 0.01 * k) for k in range(NUM_EXPERTS)),
            make_model("best single", expert_samples, 0.36),
            make_model("oracle", MIXTURE_SAMPLES, 0.48),
            *mixtures,
        ],
        "routing": dict.fromkeys(TASKS, routing),
        "stages": [
            {"name": "index", "seconds": 12.3, "peak_memory_gb": 0.5, "detail": "1,000 pairs"},
            {"name": "train", "seconds": 3661.0, "peak_memory_gb": 1.75, "detail": "6 models"},
        ],
    }


def write_clusters(folder: Path) -> None:
    """Write clusters/ of a run: three experts of eight fine clusters each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    expert_of_fine = np.arange(NUM_FINE) % NUM_EXPERTS
    centers = rng.normal(size=(NUM_EXPERTS, 16))[expert_of_fine] + 0.4 * rng.normal(size=(NUM_FINE, 16))
    Clustering(
        fine_centers=centers.astype(np.float32),
        experts_of_fine=expert_of_fine.astype(np.int64)[:, None],
        coarse_centers=np.zeros((NUM_EXPERTS, 16), np.float32),
    ).save(folder)
    fine = [
        {"index": i, "expert": i % NUM_EXPERTS, "size": 10 * i, "radius": 0.5}
        | {"nearest_captions": [f"caption {i} {j}" for j in range(5)], "keywords": [f"word{i}", "icon"]}
        for i in range(NUM_FINE)
    ]
    experts = [
        {"index": k, "size": sum(card["size"] for card in fine[k::NUM_EXPERTS]), "range": 0.6}
        | {"num_fine": NUM_FINE // NUM_EXPERTS, "keywords": [f"topic{k}", "arrow"]}
        for k in range(NUM_EXPERTS)
    ]
    cards = {"fine": fine, "experts": experts, "imbalance": 1.25, "objective": 0.375}
    (folder / "cards.json").write_text(json.dumps(cards), encoding="utf-8")


def write_logs(models: Path) -> None:
    """Write the training logs of a run, the experts' going on from the seed's end."""
    spans = {"seed": (0, SEED_SAMPLES), "dense": (SEED_SAMPLES, SEED_SAMPLES + EXPERT_SAMPLES)}
    spans |= {f"expert-{k}": spans["dense"] for k in range(NUM_EXPERTS)} | {"dense-total": (0, MIXTURE_SAMPLES)}
    for name, (start, end) in spans.items():
        (models / name).mkdir(parents=True)
        lines = [
            {"step": step, "samples": int(samples), "loss": 0.5 + 5 / (1 + samples / 4000), "lr": 1e-3 / (1 + samples)}
            | {"logit_scale": 14.0, "samples_per_second": 800.0 + step % 3, "data_wait": 0.02}
            for step, samples in enumerate(np.linspace(start, end, 400))
        ]
        (models / name / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def write_catalog(run: Path, folder: Path) -> None:
    """Index some real icons, one with a caption that attacks, spread over the experts."""
    folder.mkdir()
    for number, sample in enumerate(islice(read_icons(("octicons",), 32), 90)):
        (folder / f"{number:03}.png").write_bytes(sample.image)  # type: ignore[union-attr, arg-type]
        caption = EVIL if number == 0 else sample.caption  # type: ignore[union-attr]
        (folder / f"{number:03}.txt").write_text(caption, encoding="utf-8")
    index(DataConfig(source=str(folder), copy_images=True), run)
    catalog = Catalog.open(run / "catalog.lance")
    catalog.add_columns({"expert": (np.arange(len(catalog)) % NUM_EXPERTS).astype(np.int32)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("report")
    run = folder / "run"
    write_clusters(run / "clusters")
    write_logs(run / "models")
    write_catalog(run, folder / "icons")
    (run / "results.json").write_text(json.dumps(make_results()), encoding="utf-8")
    write_report(run)
    return run


@pytest.fixture(scope="module")
def page(whole: Path) -> Element:
    return parse_page(whole / "report.html")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    return copy


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def test_header_says_what_the_run_is(page: Element) -> None:
    header = page.one("header").text
    for words in ("icons", "2026-11-22", "seed 5", "Some CPU, 2 cores, 16 GB", "3 experts, 24 clusters", "2 held-out"):
        assert words in header
    assert "modeclip 0.1.0 on Python 3.11.2, torch 2.15.0, open_clip 3.3.0" in page.one("footer").text


def test_every_number_of_the_table_is_in_the_results(page: Element) -> None:
    for model in make_results()["models"]:
        row = page.one("tr", data_model=model["name"], data_rule=model["rule"] or "")
        low, high = model["interval"]
        assert (
            row.one("td", data_column="average").text == f"{percent(model['average'])}{percent(low)} to {percent(high)}"
        )
        for task, accuracy in model["accuracy"].items():
            assert row.one("td", data_column=task).text == percent(accuracy)
        if model["entropy"]:
            assert row.all("td")[-1].text == f"{sum(model['entropy'].values()) / 2:.2f}"
    assert len(page.all("tr", data_rule="")) + len(page.all("tr", data_model="mixture")) == 11


def test_table_is_grouped_sorted_and_marked(page: Element) -> None:
    bodies = page.one("table", class_="results").all("tbody")
    assert [body.attributes["data-group"] for body in bodies] == ["models", "experts", "mixtures", "bounds"]
    experts = [row.attributes["data-model"] for row in bodies[1].all("tr") if "data-model" in row.attributes]
    assert experts == ["expert-2", "expert-1", "expert-0"]
    best = page.one("td", data_column="average", class_="best")
    assert best.text.startswith("45.0")  # the oracle has 48.0, but it knows the labels
    assert page.one("tr", class_="default").attributes["data-rule"] == "per_class"
    assert "chance 0.1" in page.one("table", class_="results").text


@pytest.mark.parametrize(
    ("interval", "verdict", "words"),
    [
        ([0.01, 0.05], "win", "The mixture is better"),
        ([-0.01, 0.05], "tie", "does not show that the mixture wins"),
        ([-0.05, -0.01], "loss", "train the dense model"),
    ],
)
def test_headline_is_honest(run: Path, interval: list[float], verdict: str, words: str) -> None:
    models = make_results()["models"]
    models[-1]["versus_dense_total"] = {"difference": sum(interval) / 2, "interval": interval}
    edit(run, models=models)
    tile = parse_page(write_report(run)).one(id="verdict")
    assert f"verdict-{verdict}" in tile.attributes["class"]
    assert words in tile.text
    assert f"{50 * sum(interval):+.1f} points".replace("-", "−") in tile.text


def test_headline_without_a_dense_model_of_equal_cost(run: Path) -> None:
    models = [
        model | {"versus_dense_total": None} for model in make_results()["models"] if model["name"] != "dense-total"
    ]
    edit(run, models=models)
    page = parse_page(write_report(run))
    assert "not compared" in page.one(id="verdict").text
    assert "Against dense" not in page.one("table", class_="results").text


def test_a_dense_model_that_has_cost_a_remainder_more_is_the_one_of_equal_cost() -> None:
    """A run with the budget `matched` trains no other; an earlier version did, and that one is the fairer."""
    models = [make_model("dense", 960, 0.4), make_model("mixture", 958, 0.41, rule="per_class", default=True)]
    assert find_headline(models)["dense"] == models[0]
    models.append(make_model("dense-total", 958, 0.39))
    assert find_headline(models)["dense"] == models[2]


def test_controls_are_in_the_table_and_said_in_a_sentence_each(run: Path) -> None:
    """The difference is told from the mixture's side, so its sign is turned."""
    made = {
        ("Random-3", "uniform"): (-0.05, -0.08, -0.02),
        ("Full-3", "uniform"): (0.03, 0.01, 0.05),
        ("OneStep-3", "per_class"): (-0.01, -0.03, 0.01),
        ("OneStep-3", "uniform"): (-0.02, -0.03, -0.01),
    }
    controls = [
        make_model(name, MIXTURE_SAMPLES, 0.45 + difference, kind="control", rule=rule)
        | {"versus_mixture": {"difference": difference, "interval": [low, high]}}
        for (name, rule), (difference, low, high) in made.items()
    ]
    edit(run, models=make_results()["models"] + controls)
    for name in ("random-0", "random-1", "one-step-0"):
        shutil.copytree(run / "models" / "expert-0", run / "models" / name)
    page = parse_page(write_report(run))
    (body,) = (
        body for body in page.one("table", class_="results").all("tbody") if "controls" in body.attributes.values()
    )
    order = [(row.attributes["data-model"], row.attributes["data-rule"]) for row in body.all("tr")[1:]]
    assert order == sorted(made, key=lambda key: -made[key][0])
    assert all(row.all("td")[0].text == "42 k" for row in body.all("tr")[1:])
    words = {tuple(item.attributes[key] for key in ("data-control", "data-rule")): item.text for item in page.all("li")
             if "data-control" in item.attributes}  # fmt: skip
    assert "The mixture (rule per_class) is 5.0 points better (2.0 to 8.0)." in words["Random-3", "uniform"]
    assert "is 3.0 points worse (1.0 to 5.0)" in words["Full-3", "uniform"]
    assert "does not clearly differ from it: +1.0 points (−1.0 to +3.0)" in words["OneStep-3", "per_class"]
    assert "in one step" in words["OneStep-3", "per_class"]
    assert "+5.0 points" in page.one(id="clusters-add").text
    toggles = [button.attributes["data-toggle"] for button in page.all("button") if "data-toggle" in button.attributes]
    assert toggles.count("random") == 1
    assert "Random-n" in page.one("section", id="training").text
    assert len(page.all("path", data_family="random", data_line="random-1")) == 2
    assert not page.all("text", data_family="random"), "curves of controls have no label at their end"


def test_experts_curves_start_where_the_seed_ends(page: Element) -> None:
    (data,) = (script for script in page.all("script") if script.attributes.get("id") == "curves")
    loss, rate = json.loads(data.children[0])  # type: ignore[arg-type]
    assert (loss["field"], rate["field"]) == ("loss", "lr")
    curves = {line["name"]: line for line in loss["lines"]}
    assert set(curves) == {"seed", "dense", "dense-total", "expert-0", "expert-1", "expert-2"}
    end_of_seed = curves["seed"]["points"][-1]
    assert curves["expert-1"]["points"][0][0] == end_of_seed[0] == pytest.approx(loss["branch"], abs=0.1)
    assert curves["expert-1"]["samples"][0] == SEED_SAMPLES
    assert curves["dense-total"]["samples"][-1] == MIXTURE_SAMPLES
    assert max(len(line["points"]) for line in loss["lines"]) <= 160
    assert len(page.all("path", data_line="expert-0")) == 2
    assert "801" in page.one("tr", data_speed="dense").text


def test_of_a_step_logged_twice_the_later_line_counts(run: Path) -> None:
    log = run / "models" / "seed" / "log.jsonl"
    again = json.loads(log.read_text(encoding="utf-8").splitlines()[-1]) | {"loss": 9.0}
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(again) + "\n")
    (data,) = parse_page(write_report(run)).all("script", id="curves")
    (seed,) = (line for line in json.loads(data.text)[0]["lines"] if line["name"] == "seed")
    assert (seed["values"][-1], seed["samples"][-1]) == (9.0, SEED_SAMPLES)


def test_atlas_has_a_dot_for_each_cluster(page: Element) -> None:
    dots = page.one("g", id="dots").all("circle")
    assert len(dots) == NUM_FINE
    largest = dots[0]
    assert largest.attributes["class"] == f"e{23 % NUM_EXPERTS}"
    assert "word23, icon expert 2 · 230 samples · cluster 23 caption 23 0 caption 23 1" in largest.one("title").text
    radii = [float(dot.attributes["r"]) for dot in dots]
    assert radii == sorted(radii, reverse=True)
    met = [dot for dot in dots if json.loads(dot.attributes["data-tasks"]) == list(TASKS)]
    assert len(met) == 7  # the classes of the fixture meet clusters 0 to 6
    legend = page.one("button", data_only="1").text
    assert "topic1, arrow" in legend
    assert "8 clusters" in legend


def test_routing_shows_weights_classes_and_entropy(page: Element) -> None:
    routing = make_results()["routing"]["lucide"]
    task = page.one("article", data_task="lucide")
    bars = [bar.attributes["aria-label"] for bar in task.all("span", class_="stack")]
    assert bars[0] == "weights: " + ", ".join(f"expert {k} {percent(w)} %" for k, w in enumerate(routing["weights"]))
    assert bars[1] == "classes: expert 0 43.3 %, expert 1 30.0 %, expert 2 26.7 %"  # 13, 9 and 8 of the 30 classes
    assert "Entropy 0.50 nats, as if 1.6 of 3 experts" in task.text
    shown = task.one("tbody").all("tr")
    assert [shown[0].one("th").text, shown[-1].one("th").text] == ["class 0", "class 29"]
    assert "caption 0 0 · caption 0 1" in shown[0].text
    assert len(task.one("svg").all("circle")) == 7


@pytest.mark.parametrize(
    ("nearest", "words"),
    [
        ({"nearest": "caption"}, "farther from their nearest caption than 90% of the captions from theirs"),
        ({"nearest": "centre"}, "farther from their nearest cluster than 95% of its captions"),
        ({}, "farther from the captions than nearly all captions"),
    ],
)
def test_a_task_out_of_domain_is_told_by_the_rule_that_flagged_it(
    run: Path, nearest: dict[str, str], words: str
) -> None:
    domain = {"distance": 0.9, "quantile": 0.97, "names_out": 12, "names": 30} | nearest
    routing = make_results()["routing"][TASKS[0]] | {"out_of_domain": True, "domain": domain}
    edit(run, routing={TASKS[0]: routing})
    said = parse_page(write_report(run)).one("article", data_task=TASKS[0]).text
    assert f"Out of domain: 12 of 30 class names lie {words}, so the router can only guess." in said


def test_the_expert_for_class_names_has_a_colour(run: Path) -> None:
    name = "expert-pets_food"
    edit(run, models=[*make_results()["models"], make_model(name, SEED_SAMPLES + EXPERT_SAMPLES, 0.4)])
    (run / "models" / name).mkdir()
    shutil.copy(run / "models" / "expert-0" / "log.jsonl", run / "models" / name / "log.jsonl")
    written = write_report(run)
    page = parse_page(written)
    tones = {node.attributes["class"].split()[-1] for node in page.all("path", data_line=name)}
    assert tones == {"m-prior"}
    assert ".m-prior { --tone: " in written.read_text(encoding="utf-8")


def test_sheets_show_each_experts_own_pictures(whole: Path, page: Element) -> None:
    catalog = Catalog.open(whole / "catalog.lance")
    for expert in range(NUM_EXPERTS):
        own = {str(caption) for caption in catalog.read(["caption"], catalog.select(expert=expert))["caption"]}
        figures = page.one("article", data_sheet=str(expert)).all("figure")
        captions = [figure.one("figcaption").attributes["title"] for figure in figures]
        assert set(captions) == own
        assert len(captions) == len(own) <= 40
        kind, data = figures[0].one("img").attributes["src"].split(",")
        assert kind == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)


def test_cost_adds_up(page: Element) -> None:
    table = page.one("table", class_="cost")
    assert table.one("tr", data_stage="train").text == "train1 h 01 min 1.75 GB6 models"
    assert table.one("tfoot").text == "all1 h 01 min1.75 GB"


def test_stages_come_from_their_records_if_the_results_have_none(run: Path) -> None:
    results = make_results()
    stages = results.pop("stages")
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (run / "stages").mkdir()
    for stage in stages:
        (run / "stages" / f"{stage['name']}.json").write_text(json.dumps(stage), encoding="utf-8")
    assert parse_page(write_report(run)).one("tr", data_stage="index").text.startswith("index12.3 s")


def test_page_needs_nothing_but_itself(whole: Path, page: Element) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert not re.search(r"://|url\(|@import|fetch\(|XMLHttpRequest|WebSocket", text)
    assert not page.all("link") + page.all("iframe") + page.all("base")
    for element in page.walk():
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            assert element.attributes.get(name, "#").startswith(("#", "data:image/webp;base64,"))


def test_policy_lets_only_the_pages_own_script_run(page: Element) -> None:
    (policy,) = (meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes)
    script = page.all("script")[-1].children[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # type: ignore[union-attr]
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_text_of_the_data_stays_text(run: Path) -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return EVIL if isinstance(value, str) else value

    cards = run / "clusters" / "cards.json"
    cards.write_text(json.dumps(poison(json.loads(cards.read_text(encoding="utf-8")))), encoding="utf-8")
    results = make_results()
    for key in ("name", "date", "machine", "stages"):
        results[key] = poison(results[key])
    results["tasks"][0]["name"] = EVIL
    for part in (results["chance"], results["routing"], *(model["accuracy"] for model in results["models"])):
        part[EVIL] = part.pop(TASKS[0])
    results["routing"][EVIL]["classes"][0]["name"] = EVIL
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    page = parse_page(write_report(run))
    assert len(page.all("script")) == 2
    assert all(image.attributes["src"].startswith("data:") for image in page.all("img"))
    for element in page.walk():
        assert not any(name.startswith("on") for name in element.attributes)
    assert page.one("h1").text == page.all("tr", data_stage=EVIL)[0].one("th").text == EVIL
    assert EVIL in page.one("g", id="dots").text
    assert EVIL in page.one(id="experts").text


@pytest.mark.parametrize(
    ("gone", "section", "words"),
    [
        ("models", "training", "no training log"),
        ("clusters", "atlas", "no clusters"),
        ("catalog.lance", "experts", "no catalog"),
    ],
)
def test_missing_parts_are_left_out_and_said(run: Path, gone: str, section: str, words: str) -> None:
    shutil.rmtree(run / gone)
    page = parse_page(write_report(run))
    assert words in page.one("section", id=section).one("p", class_="absent").text
    assert len(page.all("p", class_="absent")) == 1
    assert page.one("tr", class_="default")


def test_run_without_tasks_shows_how_it_was_made(run: Path) -> None:
    edit(run, tasks=[], models=[], routing={}, chance={})
    page = parse_page(write_report(run))
    absent = [section.attributes["id"] for section in page.all("section") if section.all("p", class_="absent")]
    assert absent == ["results", "routing"]
    assert len(page.all("article")) == NUM_EXPERTS
    assert "not evaluated" in page.one("header").text


def test_smallest_run(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"tasks": [], "models": []}', encoding="utf-8")
    page = parse_page(write_report(tmp_path, tmp_path / "new" / "page.html"))
    assert len(page.all("p", class_="absent")) == 6
    assert page.one("h1").text == tmp_path.name


def test_many_experts_and_one_cluster(run: Path) -> None:
    cards = json.loads((run / "clusters" / "cards.json").read_text(encoding="utf-8"))
    cards["experts"] = [cards["experts"][0] | {"index": k} for k in range(32)]
    cards["fine"] = [cards["fine"][0] | {"keywords": []}]
    (run / "clusters" / "cards.json").write_text(json.dumps(cards), encoding="utf-8")
    page = parse_page(write_report(run))
    assert ".e31 {" in page.one("style").text
    assert page.one("g", id="dots").one("circle").attributes["cx"] == "470.0"


def test_same_run_gives_the_same_page(whole: Path, tmp_path: Path) -> None:
    again = write_report(whole, tmp_path / "again.html")
    assert again.read_bytes() == (whole / "report.html").read_bytes()


def test_failure_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (run / "report.html").read_bytes()

    def full(_self: Path, _target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    edit(run, name="new")
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_bytes() == old


def test_mistakes_are_said_in_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"no results\.json in .*finished run.*`modeclip run`"):
        write_report(tmp_path / "nowhere")
    with (run / "models" / "seed" / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 1, "samp')
    with pytest.raises(ModeclipError, match=r"log\.jsonl line 401 is not a training record"):
        write_report(run)
    for content in ("[1", "{}", "[]", "3", "null", '{"tasks": []}', '{"tasks": 1, "models": []}', "[" * 100_000):
        (run / "results.json").write_text(content, encoding="utf-8")
        with pytest.raises(ModeclipError, match=r"results\.json.*modeclip run`? again"):
            write_report(run)

"""The whole method through the real commands: done once, continued after a kill, redone only where it is stale."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file
from tests.data.test_knowledge import gloss, word, write_dump

from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources import DataConfig
from modeclip.errors import ModeclipError
from modeclip.mixture.mode import MoDE
from modeclip.models.clip import load_clip, save_clip
from modeclip.pipeline import run_folder
from modeclip.pipeline import stages as pipeline_stages
from modeclip.pipeline.planning import plan_run
from modeclip.pipeline.recipe import Recipe, load_recipe, parse_recipe
from modeclip.pipeline.run_folder import single_job
from modeclip.pipeline.stages import Stages, open_run, run
from modeclip.system.files import hash_file
from modeclip.training.batches import job_rows
from modeclip.training.costs import Measurement
from modeclip.training.jobs import TrainConfig, TrainJob, prepare
from modeclip.training.trainer import train
from support import WEIGHTS, Python, can_mount, encode_picture, noise_picture, python, weights_of, write_pairs

Command = Callable[..., subprocess.CompletedProcess[str]]
STAGES = ("index", "embed", "cluster", "train", "bundle", "evaluate", "report")  # without controls
MODELS = ("seed", "dense", "dense-total", "expert-0", "expert-1")


def numbers(run: Path) -> dict[str, object]:
    """Everything of the results that must not depend on the course of a run, or on a dense model beside it."""
    results = json.loads((run / "results.json").read_text())
    rows = [row | {"versus_dense_total": None} for row in results["models"] if row["kind"] != "dense"]
    return {key: results[key] for key in ("tasks", "routing")} | {"models": rows}


def weights(run: Path, names: Sequence[str] = MODELS) -> dict[str, bytes]:
    return {name: weights_of(run / "models" / name) for name in names}


def stage_times(run: Path) -> dict[str, int]:
    return {name: (run / "stages" / f"{name}.json").stat().st_mtime_ns for name in STAGES}


def test_run_leaves_everything_that_it_promises(small_run: Path) -> None:
    for name in ("catalog.lance", "tasks.lance", "clusters", "bundle/mode.json", "results.json", "report.html"):
        assert (small_run / name).exists(), name
    results = json.loads((small_run / "results.json").read_text())
    rows = {(row["name"], row["rule"]): row for row in results["models"]}
    part = 1024 // 32
    costs = {name: rows[name, None]["samples"] / part for name in (*MODELS, "best single", "oracle")}
    assert costs == {
        "seed": 27, "dense": 32, "expert-0": 32, "expert-1": 32,
        "dense-total": 37, "best single": 37, "oracle": 37,
    }  # fmt: skip
    assert sum(row["default"] for row in results["models"]) == 1
    assert all(row["samples"] == 37 * part for row in results["models"] if row["kind"] == "mixture")
    assert all(0 <= low <= row["average"] <= high <= 1 for row in results["models"] for low, high in [row["interval"]])
    best = max(rows[f"expert-{k}", None]["average"] for k in range(2))
    assert rows["best single", None]["average"] == best <= rows["oracle", None]["average"]


def test_settings_are_known_by_what_they_were() -> None:
    """Stages of existing folders are done as long as these hashes, which enter their digests, stay the same."""
    content = {"name": "old", "data": {"source": "icons", "tasks": ["lucide"]}, "cluster": {"num_fine": 8}}
    recipe = parse_recipe(content | {"experts": {"controls": ["random"]}})
    train = replace(recipe.train, model="modeclip-icon")  # which was the default, and which a folder that has it keeps
    sections = recipe.plain() | {"train": train.decided().plain()}  # what a stage's digest has, as it had before
    sections["train"]["engine"]["save_every"] = "20s"
    assert not sections["train"]["engine"].pop("keep_trunk")
    assert not sections["evaluate"].pop("knowledge")
    assert (sections["experts"].pop("for_classes"), sections["experts"].pop("nearest")) == ([], 1)
    assert {name: sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()[:16] for name, section in
            sections.items()} == {
        "name": "d6d13014ef18d450",
        "data": "9d7b270261056cc6",
        "embed": "3480096dde6c5aa1",
        "cluster": "1243e3b4b582644c",
        "train": "730f5138476af067",
        "experts": "62c62957e91da6cf",
        "evaluate": "63faa4ee91018bef",
    }  # fmt: skip


def test_a_run_opens_its_source_and_its_clustering_and_plans_its_jobs_once(
    small_recipe: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = shutil.copytree(small_run, tmp_path / "run"), Counter[str]()

    def count(home: object, name: str) -> None:
        original = getattr(home, name)

        def counting(*args: object, **options: object) -> object:
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(home, name, counting)

    count(pipeline_stages, "open_source")
    for home in (pipeline_stages, run_folder):
        count(home, "plan_jobs")
    count(run_folder.Clustering, "load")
    (out / "results.json").unlink()
    run(load_recipe(small_recipe), out)
    assert calls == {"open_source": 1, "plan_jobs": 2, "load": 1}  # planned once, and announced before


def test_second_run_does_nothing_and_is_quick(small_recipe: Path, small_run: Path, modeclip_process: Command) -> None:
    before, used = stage_times(small_run), os.times()
    done = modeclip_process("run", small_recipe, "--out", small_run, "--json")
    now = os.times()
    assert now.children_user + now.children_system - used.children_user - used.children_system < 10
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "small"
    assert stage_times(small_run) == before


@pytest.mark.slow
def test_killed_run_continues_to_the_same_numbers(small_recipe: Path, small_run: Path, tmp_path: Path) -> None:
    """Kill -9 a random moment after each of three beginnings; the end is that of the run that was left alone.

    Each model is trained in a process of its own here, and in that of the tests there.
    """
    draw = random.Random(0)
    out, recipe = tmp_path / "killed", tmp_path / "small.yaml"
    settings = small_recipe.read_text().replace("batch_size: 32", "batch_size: 32, engine: {save_every: 3steps}")
    recipe.write_text(settings + "experts: {dense: false, dense_total: false}\n")
    for begun in ("recipe.yaml", "stages/index.json", "models/seed/checkpoints/step-*"):
        process = Python("-m", "modeclip", "run", recipe, "--out", out)
        while not list(out.glob(begun)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.wait()
    assert not (out / "results.json").exists()
    done = python("-m", "modeclip", "run", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    trained = ("seed", "expert-0", "expert-1")
    assert weights(out, trained) == weights(small_run, trained)
    assert numbers(out) == numbers(small_run)


def test_only_what_is_stale_is_done_again(small_recipe: Path, small_run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(small_run, tmp_path / "run")
    before, trained = stage_times(out), weights(out)
    changed = tmp_path / "changed.yaml"
    changed.write_text(small_recipe.read_text().replace("rule: per_class", "rule: eq6"))
    run(load_recipe(changed), out)
    redone = {name for name, moment in stage_times(out).items() if moment != before[name]}
    assert redone == {"bundle", "evaluate", "report"}
    assert weights(out) == trained
    assert json.loads((out / "bundle" / "mode.json").read_text())["rule"] == "eq6"


def test_a_recipe_explains_class_names_and_notices_another_dictionary(
    small_recipe: Path, small_run: Path, tmp_path: Path
) -> None:
    out, dump = shutil.copytree(small_run, tmp_path / "run"), tmp_path / "words.jsonl"
    changed, before, trained = tmp_path / "changed.yaml", stage_times(out), weights(out)
    changed.write_text(small_recipe.read_text().replace("per_class}", f"per_class, knowledge: [{dump}]}}"))
    for known in ({"heart": "a muscle"}, {"heart": "a muscle", "home": "a dwelling"}):
        write_dump(dump, [word(name, gloss(text)) for name, text in known.items()])
        run(load_recipe(changed), out)
        redone = {name for name, moment in stage_times(out).items() if moment != before[name]}
        assert redone == {"evaluate", "report"}
        assert json.loads((out / "results.json").read_text())["knowledge"] == [str(dump)]
        explained = re.findall(r'"num_explained": (\d+)', "".join(p.read_text() for p in out.glob("results/**/*.json")))
        assert max(map(int, explained)) == len(known)
        before = stage_times(out)
    run(load_recipe(changed), out)
    assert stage_times(out) == before
    assert weights(out) == trained
    changed.write_text(small_recipe.read_text().replace("per_class}", "per_class, knowledge: [lost.jsonl]}"))
    with pytest.raises(ModeclipError, match=r"lost\.jsonl"):
        load_recipe(changed)


def test_two_runs_in_one_folder(small_recipe: Path, tmp_path: Path, modeclip_process: Command) -> None:
    from modeclip.system.files import only_process

    with only_process(tmp_path):
        done = modeclip_process("run", small_recipe, "--out", tmp_path)
    assert done.returncode == 2
    assert re.search(r"process [0-9]+ .*is at work.*wait for it.*choose another$", done.stderr.strip())


@pytest.fixture(scope="module")
def own_pairs(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real icons as a user has them: a folder of images with texts beside, the same as a table, and as tar shards."""
    import tarfile

    from modeclip.data.catalog import Catalog

    root = tmp_path_factory.mktemp("own")
    catalog = Catalog.open(small_run / "catalog.lance")
    data = catalog.read(["caption", "image"])
    (root / "folder").mkdir()
    lines = ["filepath\ttitle"]
    for i, (caption, image) in enumerate(zip(data["caption"], data["image"], strict=True)):
        (root / "folder" / f"{i:05}.png").write_bytes(image)
        (root / "folder" / f"{i:05}.txt").write_text(caption)
        lines.append(f"folder/{i:05}.png\t{caption}")
    (root / "pairs.tsv").write_text("\n".join(lines) + "\n")
    files = sorted((root / "folder").iterdir())
    for shard in range(2):
        with tarfile.open(root / f"{shard:05}.tar", "w") as tar:
            for file in files[shard * len(files) // 2 : (shard + 1) * len(files) // 2]:
                tar.add(file, file.name)
    return root


@pytest.mark.slow
@pytest.mark.usefixtures("trains_here")
def test_own_pairs_from_recipe_to_bundle(own_pairs: Path, modeclip_command: Command) -> None:
    recipe = own_pairs / "folder.yaml"
    recipe.write_text(
        "data: {source: folder, holdout_fraction: 0.1}\n"
        "cluster: {num_fine: 8, num_experts: 2}\n"
        "train: {samples: 512, batch_size: 16}\nexperts: {dense: false, dense_total: false}\n"
    )
    out = own_pairs / "runs" / "folder"  # beside the data, as most users have it
    for _ in range(2):
        done = modeclip_command("run", recipe, "--out", out)
        assert done.returncode == 0, done.stderr
    assert all(f"{stage:<9} done: " in done.stderr for stage in STAGES)
    results = json.loads((out / "results.json").read_text())
    assert [task["name"] for task in results["tasks"]] == ["holdout"]
    picture = own_pairs / "folder" / "00000.png"
    done = modeclip_command("classify", out / "bundle", picture, "--classes", "alert,heart", "--json")
    assert done.returncode == 0, done.stderr
    assert {entry["name"] for entry in json.loads(done.stdout)[0]["classes"]} == {"alert", "heart"}


@pytest.mark.slow
@pytest.mark.usefixtures("trains_here")
@pytest.mark.parametrize("source", ["pairs.tsv", "{00000..00001}.tar"])
def test_own_pairs_with_a_given_seed_and_one_expert(own_pairs: Path, small_run: Path, source: str) -> None:
    """From other sources, with an encoder that is fitted to the captions; the seed stands in for the other expert."""
    recipe, seed = own_pairs / f"{source[0]}.yaml", small_run / "models" / "seed"
    recipe.write_text(
        f"data: {{source: '{source}', holdout_fraction: 0.1}}\nembed: {{encoder: tfidf, dimension: 32}}\n"
        "cluster: {num_fine: 8, num_experts: 2}\n"
        f"train: {{samples: 512, batch_size: 16}}\nexperts: {{start: {seed}, only: [1], controls: [one-step]}}\n"
    )
    out = own_pairs / "runs" / recipe.stem
    result = run(load_recipe(recipe), out)
    assert [task["name"] for task in result.results["tasks"]] == ["holdout"]
    costs = {(row["name"], row["rule"]): row["samples"] for row in result.results["models"]}
    seed_cost = json.loads((seed / "done.json").read_text())["samples"]
    assert costs["seed", None] == seed_cost
    assert costs["mixture", "uniform"] == costs["expert-1", None] == seed_cost + 5 * 16
    assert {path.name for path in (out / "models").iterdir() if path.is_dir()} == {"expert-1"}
    before = stage_times(out)
    run(load_recipe(recipe), out)
    assert stage_times(out) == before
    mode = MoDE.load(result.bundle)
    assert [expert.folder for expert in mode.bundle.experts] == ["seed", "expert-1"]
    (prediction,) = mode.task(["alert", "heart"]).classify([Image.open(own_pairs / "folder" / "00000.png")])
    assert set(prediction.classnames) == {"alert", "heart"}


@pytest.mark.slow
def test_a_recipe_trains_on_what_its_curation_keeps(
    own_pairs: Path, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = own_pairs / "curated.yaml", own_pairs / "runs" / "curated"
    text = (
        "data: {source: pairs.tsv, holdout_fraction: 0.1}\nembed: {encoder: tfidf, dimension: 32}\n"
        "curate: [{method: align, preset: small, max_words: 2}, {method: duplicates, column: once, by: semantic}]\n"
        "cluster: {num_fine: 8, num_experts: 2}\n"
        f"train: {{samples: 512, batch_size: 16}}\nexperts: {{start: {small_run / 'models' / 'seed'}, only: [1]}}\n"
    )
    recipe.write_text(text)
    run(load_recipe(recipe), out)
    catalog = Catalog.open(out / "catalog.lance")
    columns = catalog.read(["caption", "align_kept", "once_kept", "once_cause", "expert"])
    short = np.array([len(caption.split()) <= 2 for caption in columns["caption"]])
    assert (columns["align_kept"] == short).all()
    assert ((columns["once_cause"] == 255) == ~short).all()
    kept = columns["once_kept"]
    assert 0 < kept.sum() < short.sum()
    rows = job_rows(TrainJob.load(out / "models" / "expert-1" / "job.json"), catalog)
    assert rows.tolist() == np.flatnonzero(kept & (columns["expert"] == 1)).tolist()
    cards = json.loads((out / "clusters" / "cards.json").read_text())
    assert sum(card["size"] for card in cards["experts"]) == kept.sum()
    assert (out / "curation" / "once" / "curate.html").is_file()
    before = stage_times(out) | {"curate": (out / "stages" / "curate.json").stat().st_mtime_ns}
    found = Measurement(seconds_per_step=2.0, memory_gb=1.0, checkpoint_bytes=3_000_000, model_bytes=1_000_000)
    monkeypatch.setattr("modeclip.training.costs.measure", lambda *_: found)
    assert all(stage.is_done for stage in plan_run(load_recipe(recipe), out).stages)
    new = {stage.name: stage for stage in plan_run(load_recipe(recipe), own_pairs / "runs" / "none").stages}
    assert (new["curate"].detail, new["curate"].is_done, new["curate"].seconds) == ("align, once", False, None)
    run(load_recipe(recipe), out)
    assert stage_times(out) | {"curate": (out / "stages" / "curate.json").stat().st_mtime_ns} == before
    recipe.write_text(text.replace("max_words: 2", "max_words: 1"))
    run(load_recipe(recipe), out)
    assert {name for name, moment in stage_times(out).items() if moment == before[name]} == {"index", "embed"}
    assert Catalog.open(out / "catalog.lance").read(["align_kept"])["align_kept"].sum() < short.sum()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("{method: align}", "expected a list of methods"),
        ("[{preset: small}]", "expected a list of methods"),
        ("[{method: magic}]", "unknown method 'magic'; known: align"),
        ("[{method: align, presets: small}]", "unknown setting of align 'presets'; known: preset"),
        ("[{method: align, max_words: many}]", "align.max_words: .*got 'many'"),
        ("[{method: align}, {method: align}]", "two steps are called 'align'"),
        ("[{method: align, column: A b}]", "letter first"),
        ("[{method: align, min_words: -1}]", "align.min_words"),
    ],
)
def test_a_curation_that_cannot_be_meant_is_one_line(tmp_path: Path, steps: str, words: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{source: folder}}\ncurate: {steps}\n")
    with pytest.raises(ModeclipError, match=words):
        load_recipe(recipe)


def test_bundle_holds_what_was_trained_and_clustered(small_run: Path) -> None:
    centres = load_file(small_run / "bundle" / "centres.safetensors")
    assert centres["fine_centers"].shape == (16, 384)
    assert set(centres["expert_of_fine"].tolist()) == {0, 1}
    for name in ("seed", "expert-0", "expert-1"):
        file = f"{name}/open_clip_model.safetensors"
        assert (small_run / "bundle" / file).read_bytes() == (small_run / "models" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="this machine allows no private mounts")
@pytest.mark.parametrize(("megabytes", "words"), [(1, "disk full"), (60, "seed: its checkpoints need")])
def test_full_disk(small_recipe: Path, tmp_path: Path, megabytes: int, words: str) -> None:
    """On a real file system of that size: full while the catalog is written, and too small for a model."""
    recipe = tmp_path.parent / f"disk-{megabytes}.yaml"
    settings = small_recipe.read_text().replace("modeclip-icon-xxxs", "modeclip-icon").replace(", lucide", "")
    recipe.write_text(settings + "embed: {encoder: tfidf, dimension: 32}\nexperts: {jobs: 1}\n")
    script = (
        f"mount -t tmpfs -o size={megabytes}m tmpfs {tmp_path} && "
        f"exec {sys.executable} -m modeclip run {recipe} --out {tmp_path}/run"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        capture_output=True, text=True, check=False, timeout=300, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_paths_count_from_the_recipe(small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run / "bundle" / "seed", tmp_path / "models" / "seed")
    (tmp_path / "my.yaml").write_text(
        "data: {source: 'a.tar::/b.tar', tasks: [birds=tests/birds, flowers]}\ntrain: {model: models/seed}\n"
    )
    recipe = load_recipe(tmp_path / "my.yaml")
    assert recipe.name == "my"
    assert recipe.data.source == f"{tmp_path}/a.tar::/b.tar"
    assert recipe.data.tasks == (f"birds={tmp_path}/tests/birds", f"flowers={tmp_path}/flowers")
    assert recipe.train.model == f"{tmp_path}/models/seed"


def test_paths_in_every_section_count_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those in lists and behind a word; what the settings say in words is none, whatever lies there."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    place = tmp_path / "mine"
    for folder in ("seeds/s", "filter", "align", "exact", "wordnet", "openai", "tfidf", "cat"):
        (place / folder).mkdir(parents=True)
    (place / "wiki.jsonl").write_text(json.dumps({"word": "cat", "pos": "noun", "senses": []}) + "\n")
    (place / "weights.pt").write_bytes(b"")
    (place / "words.txt").write_text("cat\ndog\n")
    recipe = place / "r.yaml"
    recipe.write_text(
        "data: {source: pairs}\nembed: {encoder: tfidf}\ntrain: {model: modeclip-icon@weights.pt}\n"
        f"experts: {{start: seeds/s, for_classes: [words.txt, 'cat', '{','.join('abcdef' * 50)}']}}\n"
        "evaluate: {knowledge: [wiki.jsonl]}\n"
        "curate:\n- {method: align, tasks: [filter], model: filter}\n- {method: duplicates, by: exact}\n"
        "- {method: klite, knowledge: [wordnet, wiki.jsonl, 'wordnet:wordnet']}\n"
        "- {method: metaclip, entries: 'corpus:words.txt', wordnet: wordnet}\n"
        "- {method: dfn, filter: filter, learner: ViT-B-32@openai, score: learnability, train: {model: seeds/s}}\n"
    )
    found = load_recipe(recipe)
    assert (found.embed.encoder, found.train.model) == ("tfidf", f"modeclip-icon@{place}/weights.pt")
    assert found.experts.start == f"{place}/seeds/s"
    assert found.experts.for_classes[:2] == (f"{place}/words.txt", "cat")
    assert found.evaluate.knowledge == (f"{place}/wiki.jsonl",)
    assert [step.flat() for step in found.curate] == [
        {"method": "align", "tasks": [f"{place}/filter"], "model": f"{place}/filter"},
        {"method": "duplicates", "by": "exact"},
        {"method": "klite", "knowledge": ["wordnet", f"{place}/wiki.jsonl", f"wordnet:{place}/wordnet"]},
        {"method": "metaclip", "entries": f"corpus:{place}/words.txt", "wordnet": f"{place}/wordnet"},
        {
            "method": "dfn",
            "filter": f"{place}/filter",
            "learner": "ViT-B-32@openai",
            "score": "learnability",
            "train": {"model": f"{place}/seeds/s"},
        },
    ]


def test_a_curation_notices_what_its_methods_read(
    pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "entries").mkdir()
    words = [tmp_path / name for name in ("plain.txt", "corpus.txt", "entries/en.txt", "wiki.jsonl")]
    for file in words:
        file.write_text('{"word": "cat"}\n')
    filters = [tmp_path / "filter", tmp_path / "weights"]
    for seed, filter_folder in enumerate(filters):
        save_clip(load_clip("modeclip-icon-xxxs", seed=seed), filter_folder)
    file = tmp_path / "file.safetensors"
    shutil.copy(filters[0] / WEIGHTS, file)
    index(DataConfig(source=str(pair_folder)), tmp_path / "clean")
    steps = [
        {"method": "metaclip", "entries": str(words[0])},
        {"method": "metaclip", "column": "corpus", "entries": f"corpus:{words[1]}"},
        {"method": "metaclip", "column": "folder", "entries": str(words[2].parent), "language_column": "language"},
        {"method": "klite", "knowledge": ["wordnet", str(words[3])]},
        {"method": "dfn", "filter": str(filters[0])},
        {"method": "dfn", "column": "file", "filter": f"modeclip-icon-xxxs@{file}"},
        {"method": "dfn", "column": "clean", "clean": str(tmp_path / "clean"), "train": {"model": str(filters[1])}},
    ]
    recipe = parse_recipe({"name": "a", "data": {"source": "x"}, "curate": steps})

    def stage(_stages: Stages, _name: str, _work: object, inputs: list[object], _made: object) -> None:
        raise ModeclipError(json.dumps(inputs))

    def inputs(recipe: Recipe) -> list[object]:
        stages = Stages(recipe, open_run(recipe, tmp_path / "run"))
        stages.digests["embed"] = "embedded"
        with pytest.raises(ModeclipError) as found:
            stages.curate_stage()
        return list(json.loads(str(found.value)))

    def noticed(change: Callable[[], object]) -> bool:
        before = inputs(recipe)
        change()
        return inputs(recipe) != before

    monkeypatch.setattr(Stages, "stage", stage)

    assert not noticed(lambda: None)
    for text in words:
        assert noticed(lambda text=text: text.write_text('{"word": "dog"}\n')), text
    for weights in (filters[0] / WEIGHTS, file):
        assert noticed(lambda weights=weights: shutil.copy(filters[1] / WEIGHTS, weights)), weights
    assert noticed(lambda: save_clip(load_clip("modeclip-icon-xxxs", seed=2), filters[1]))
    data = DataConfig(source=str(write_pairs(tmp_path / "one", [encode_picture(noise_picture(99))], ["cat"])))
    assert noticed(lambda: index(data, tmp_path / "clean", replace=True))
    for step, files in ((steps[0], {str(words[0]): hash_file(words[0])}), ({"method": "duplicates", "eps": 0.1}, {})):
        before = [[step], files, "embedded"]  # in earlier versions
        assert inputs(parse_recipe({"name": "a", "data": {"source": "x"}, "curate": [step]})) == before


def test_everybody_may_read_a_run_who_may_read_new_files(small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    permissions = (tmp_path / "new").stat().st_mode & 0o777
    private = [path for path in small_run.rglob("*") if path.is_file() and path.stat().st_mode & 0o777 != permissions]
    assert not private


# ---------------------------------------------------------------- to another recipe and back

RECIPE_A = {
    "name": "a",
    "embed": {"encoder": "tfidf", "dimension": 16},
    "cluster": {"num_fine": 6, "num_experts": 2},
    "train": {"model": "modeclip-icon-xxxs", "samples": 64, "batch_size": 16, "total_parts": 4, "seed_parts": 2},
    "experts": {"dense": False, "dense_total": False, "controls": ["random"]},
}
OTHERS = {
    "index": {"data": {"holdout_fraction": 0.4}},
    "embed": {"embed": {"encoder": "tfidf", "dimension": 8}},
    "cluster": {"cluster": {"num_fine": 5, "num_experts": 2}},
    "controls": {"cluster": {"num_fine": 6, "num_experts": 2, "seed": 1}},
    "train": {"train": RECIPE_A["train"] | {"seed": 1}},
    "bundle": {"evaluate": {"rule": "uniform"}},
    "evaluate": {"evaluate": {"rule": "share"}},
}
"""A recipe that differs from the first one in a setting of each stage."""


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [" ".join(pair) for pair in product(("big", "small", "long", "round"), ("cat", "tree", "boat", "star"))]
    pictures = [encode_picture(noise_picture(seed)) for seed in range(64)]
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", pictures, words * 4)


def recipe_of(folder: Path, changes: dict[str, dict[str, object]]) -> Recipe:
    data = {"source": str(folder), "holdout_fraction": 0.2} | changes.get("data", {})
    return parse_recipe(RECIPE_A | changes | {"data": data})


def everything(run: Path) -> dict[str, object]:
    """What a run is known by: pairs, held-out pairs, columns, clusters, weights, the bundle's models, results."""
    catalog, tasks = Catalog.open(run), Catalog.open(run / "tasks.lance")
    columns = ("key", "caption_embedding", "fine_cluster", "expert", "random_expert")
    bundle = json.loads((run / "bundle" / "mode.json").read_text())
    results = json.loads((run / "results.json").read_text())
    return {
        "pairs": {name: values.tolist() for name, values in catalog.read(columns).items()},
        "held out": tasks.read(["key", "caption"])["key"].tolist(),
        "clusters": (run / "clusters" / "clustering.safetensors").read_bytes(),
        "models": {path.parent.name: path.read_bytes() for path in sorted((run / "models").glob(f"*/{WEIGHTS}"))},
        "bundle": [bundle["rule"], bundle["lineage"]["jobs"], bundle["lineage"]["stages"]],
        "results": [results["tasks"], results["models"], results["routing"]],
    }


@pytest.fixture(scope="module")
def clean(pair_folder: Path, tmp_path_factory: pytest.TempPathFactory, trains_here: None) -> Path:  # noqa: ARG001
    out = tmp_path_factory.mktemp("clean") / "run"
    run(recipe_of(pair_folder, {}), out)
    return out


def interrupt(patch: pytest.MonkeyPatch, stage: str, moment: str) -> None:
    """Let a run be interrupted as it begins a stage, when it shows what it made, or before it is noted."""
    work = getattr(pipeline_stages.Stages, stage)

    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    def work_and_stop(*words: object) -> None:
        work(*words)
        raise KeyboardInterrupt

    if moment == "between":
        patch.setattr("modeclip.data.catalog.show_columns", stop)
        patch.setattr("modeclip.data.indexing.create", stop)
        patch.setattr(run_folder, "run_jobs", stop)
        patch.setattr(run_folder, "assemble_bundle", stop)
    else:
        patch.setattr(pipeline_stages.Stages, stage, stop if moment == "begin" else work_and_stop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "moment"),
    [*product(("index", "embed", "cluster"), ("begin", "between", "end")), *product(list(OTHERS)[3:], ["between"])],
)
def test_back_to_an_earlier_recipe_after_another_one_was_interrupted(
    pair_folder: Path, clean: Path, tmp_path: Path, stage: str, moment: str
) -> None:
    out = shutil.copytree(clean, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, stage, moment)
        if (stage, moment) == ("evaluate", "between"):
            patch.setattr(run_folder, "write_json", partial(stop_at_results, write=run_folder.write_json))
        with pytest.raises(KeyboardInterrupt):
            run(recipe_of(pair_folder, OTHERS[stage]), out)
    run(recipe_of(pair_folder, {}), out)
    assert everything(out) == everything(clean)


def stop_at_results(path: Path, *words: object, write: Callable[..., None], **options: object) -> None:
    if path.name == "results.json":
        raise KeyboardInterrupt
    write(path, *words, **options)


def test_a_run_of_another_process_that_took_columns_away_is_noticed(
    pair_folder: Path, clean: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Columns go and come by single commands too; records without a state, of an earlier version, count as before."""
    out = shutil.copytree(clean, tmp_path / "run")
    for path in (out / "stages").glob("*.json"):
        record = json.loads(path.read_text())
        for later in ("made", "files", "check"):
            assert record.pop(later) is not None
        path.write_text(json.dumps(record))
    capfd.readouterr()
    run(recipe_of(pair_folder, {}), out)
    assert capfd.readouterr().err.count(" done: ") == 8, "an old folder is finished"
    index(recipe_of(pair_folder, {}).data, out, replace=True)
    run(recipe_of(pair_folder, {}), out)
    said = capfd.readouterr().err
    assert "index     done: " in said
    assert "embed     done: " not in said
    assert "cluster   done: " not in said
    assert everything(out) == everything(clean)


def test_a_plan_says_all_that_a_run_trains_and_a_run_says_it_first(
    pair_folder: Path, clean: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed sees 32 samples, each expert and each control the 32 after it: 160, not the 64 of train.samples."""
    found = Measurement(seconds_per_step=2.0, memory_gb=1.0, checkpoint_bytes=3_000_000, model_bytes=1_000_000)
    monkeypatch.setattr("modeclip.training.costs.measure", lambda *_: found)
    recipe = recipe_of(pair_folder, {})
    plan = plan_run(recipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert {model.name: model.samples for model in plan.models} == {
        "seed": 32, "expert-0": 32, "expert-1": 32, "random-0": 32, "random-1": 32,
    }  # fmt: skip
    trained = [json.loads(path.read_text())["samples"] for path in (clean / "models").glob("*/done.json")]
    assert plan.samples == sum(trained) == 160
    assert "5 models, 160 samples in all: seed 32, 2 x expert 32, 2 x random 32" in plan.announcement
    stages = {stage.name: stage for stage in plan.stages}
    assert list(stages) == [name for name in pipeline_stages.STAGES if name not in {"curate", "names"}]
    assert not any(stage.is_done for stage in plan.stages)
    assert (plan.num_pairs, plan.is_counted, plan.num_fine) == (64, True, 6)
    steps = 2 + 2 * 2  # seed, then two experts and two controls, two at a time
    assert stages["train"].seconds == pytest.approx(2.0 * steps, abs=1.0)
    assert stages["train"].disk_bytes == 5 * 7_000_000
    whole = plan_run(recipe, clean)
    assert all(stage.is_done for stage in (*whole.stages, *whole.models))
    assert (whole.seconds, whole.disk_bytes, whole.samples) == (0, 0, 160)
    other = plan_run(recipe_of(pair_folder, OTHERS["cluster"]), clean)
    assert [stage.name for stage in other.stages if stage.is_done] == ["index", "embed"]
    unnamed = {name: value for name, value in RECIPE_A["train"].items() if name != "model"}
    reason, rate = plan_run(recipe_of(pair_folder, {"train": unnamed}), tmp_path / "new").notes
    assert "train.model is not given: modeclip-icon, which sees 32 x 32 pixels" in reason
    assert rate == "train.learning_rate is not given: 0.001, since modeclip-icon has no trained weights"
    assert yaml.safe_load((clean / "recipe.yaml").read_text())["train"]["learning_rate"] == 0.001
    chosen = plan_run(recipe_of(pair_folder, {"cluster": {"num_experts": 2}}), clean)
    assert chosen.num_fine == 8
    assert "cluster.num_fine is not given: 8, one for 100 pairs" in chosen.notes
    capfd.readouterr()
    run(recipe, shutil.copytree(clean, tmp_path / "copy"))
    assert plan.announcement in " ".join(capfd.readouterr().err.splitlines()[0].split())


def test_a_report_that_is_written_again_is_whole(small_recipe: Path, small_run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(small_run, tmp_path / "run")
    (out / "report.html").write_text("cut short", encoding="utf-8")
    pipeline_stages.rewrite_report(out)
    before = (out / "stages" / "report.json").stat().st_mtime_ns
    run(load_recipe(small_recipe), out)
    assert (out / "stages" / "report.json").stat().st_mtime_ns == before, "nothing is done again"


def test_a_plan_knows_the_models_that_other_clusters_keep(
    small_recipe: Path, small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Measurement(seconds_per_step=2.0, memory_gb=1.0, checkpoint_bytes=3_000_000, model_bytes=1_000_000)
    monkeypatch.setattr("modeclip.training.costs.measure", lambda *_: found)
    out, recipe = shutil.copytree(small_run, tmp_path / "run"), load_recipe(small_recipe)
    other = replace(recipe, cluster=replace(recipe.cluster, num_experts=recipe.cluster.num_experts + 1))
    done = {model.name for model in plan_run(other, out).models if model.is_done}
    assert "seed" in done
    assert not {name for name in done if name.startswith("expert")}


def test_a_run_prints_what_is_compared_and_says_what_it_left_out(
    small_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from modeclip.commands.runs import _print_results

    monkeypatch.setenv("COLUMNS", "200")
    results = json.loads((small_run / "results.json").read_text())
    _print_results(results)
    printed = capsys.readouterr().out
    names = re.findall(r"^│ (\S.*?) +│", printed, re.MULTILINE)
    left_out = [
        model
        for model in results["models"]
        if model["kind"] == "expert" or model["rule"] not in (None, "uniform", "per_class")
    ]
    assert len(names) == len(results["models"]) - len(left_out) + 2  # with the majority class and chance
    assert {"seed", "best single", "mixture, uniform", "mixture, per_class *", "chance"} <= set(names)
    assert f"{len(left_out)} more rows" in printed


@pytest.mark.usefixtures("trains_here")
@pytest.mark.parametrize("is_edited", [False, True])
def test_a_given_seed_that_was_trained_anew_is_in_the_bundle_and_the_results(
    pair_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], is_edited: bool
) -> None:
    start, out = tmp_path / "given", tmp_path / "run"
    config = TrainConfig(model="modeclip-icon-xxxs", samples=64, batch_size=8, total_parts=4, seed_parts=2)
    index(recipe_of(pair_folder, {}).data, tmp_path)
    recipe = recipe_of(
        pair_folder, {"experts": {"start": str(start), "dense": False, "dense_total": False, "controls": []}}
    )
    bundles = []
    for seed in (0, 5):
        job = single_job(Catalog.open(tmp_path), start, replace(config, seed=seed))
        prepare(job, "never")
        job.save()
        train(job)
        capfd.readouterr()
        run(recipe, out)
        said = capfd.readouterr().err
        manifest = json.loads((out / "bundle" / "mode.json").read_text())
        bundles.append(manifest["sha256"])
        if is_edited:
            manifest["lineage"]["edits"] = [{"action": "replace", "expert": "expert-0", "job": None}]
            (out / "bundle" / "mode.json").write_text(json.dumps(manifest))
    assert "train     done: " not in said
    assert "evaluate  done: " not in said
    assert "report    done: " not in said
    assert ("bundle    done: " in said) == is_edited
    changed = {name for name in bundles[0] if bundles[0][name] != bundles[1][name] and name.endswith("safetensors")}
    assert changed == (set() if is_edited else {f"{name}/{WEIGHTS}" for name in ("seed", "expert-0", "expert-1")})
    capfd.readouterr()
    run(recipe, out)
    assert capfd.readouterr().err.count(" done: ") == 7

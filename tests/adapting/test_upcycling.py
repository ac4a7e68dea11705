"""Upcycling: stages, bundles and copies become one CLIP-MoE; kills, the same command again, and what cannot work."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modeclip.adapting.gating import BlockInputs, centre_row, look_at_inputs
from modeclip.adapting.upcycling import UpcycleConfig, Upcycled, dense_of, plan_upcycling, upcycle
from modeclip.data.catalog import Catalog
from modeclip.data.selection import Selection
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import save_bundle
from modeclip.models.blocks import blocks_of
from modeclip.models.clip import assemble_clip, encode_image, encode_text, load_clip, save_clip
from modeclip.training.costs import Measurement
from modeclip.training.jobs import AugmentConfig, EngineConfig, TrainJob
from modeclip.training.preflight import preflight
from support import Python, weights_of

CONFIG = UpcycleConfig(
    stages=2,
    batch_size=64,
    min_pairs=32,
    learning_rate=3e-3,
    router_learning_rate=1e-3,
    warmup_steps=2,
    gate_pairs=64,
    threads=1,
    augment=AugmentConfig(min_crop_share=1.0),
    engine=EngineConfig(precision="32-true", save_every="2steps"),
)
SETTINGS = shlex.split(
    "--stages 2 --batch-size 64 --min-pairs 32 --learning-rate 3e-3 --router-learning-rate 1e-3 "
    "--warmup-steps 2 --gate-pairs 64 --threads 1 --min-crop-share 1 --precision 32-true --save-every 2steps"
)


@pytest.fixture(scope="module")
def catalog(icons_copy: Catalog) -> Catalog:
    return icons_copy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "plain"
    save_clip(load_clip("modeclip-icon-xxxs", seed=0), folder)
    return folder


@pytest.fixture(scope="module")
def done(catalog: Catalog, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Upcycled:
    return upcycle(model, catalog, CONFIG, out=tmp_path_factory.mktemp("done") / "up")


def test_stages_change_feed_forward_layers_alone(done: Upcycled, model: Path) -> None:
    base = load_file(model / "open_clip_model.safetensors")
    for stage in ("stage-1", "stage-2"):
        tuned = load_file(Path(done.folder).parent / stage / "open_clip_model.safetensors")
        changed = {name for name, value in base.items() if not torch.equal(value, tuned[name])}
        assert changed == {name for name in base if ".mlp." in name}


def test_the_result_is_base_and_stages_behind_trained_routers(done: Upcycled, model: Path) -> None:
    assert done.experts == ("base", "stage-1", "stage-2")
    clip, out = load_clip(done.folder), Path(done.folder).parent
    for number, folder in enumerate((model, out / "stage-1", out / "stage-2")):
        expected = load_file(folder / "open_clip_model.safetensors")
        found = dense_of(clip, number).model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    start, end = (load_file(out / one / "open_clip_model.safetensors") for one in ("start", "model"))
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        name for name in start if ".router." in name
    }


def test_clusters_are_columns_and_facts(done: Upcycled, catalog: Catalog) -> None:
    catalog = Catalog.open(catalog.path)
    before = np.zeros(len(catalog), np.int64)
    for stage in done.stages:
        cluster = catalog.read([stage.column])[stage.column]
        sizes = np.bincount(cluster)
        assert (stage.num_clusters, stage.smallest, stage.largest) == (len(sizes), sizes.min(), sizes.max())
        assert sizes.min() >= 32
        assert len(set(zip(before.tolist(), cluster.tolist(), strict=True))) == len(sizes)
        before = cluster
    assert [training.name for training in done.trainings] == ["stage-1", "stage-2", "model"]
    assert done.trainings[0].samples >= len(catalog) > done.trainings[0].samples - 64, "every pair once"
    content = json.loads((Path(done.folder).parent / "upcycling.json").read_text())
    assert content == json.loads(json.dumps(asdict(done)))


def test_the_same_again_does_nothing_and_another_setting_is_refused(
    done: Upcycled, catalog: Catalog, model: Path
) -> None:
    out = Path(done.folder).parent
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    assert upcycle(model, catalog, CONFIG, out=out) == done
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = replace(CONFIG, top_k=1, stages=3)
    with pytest.raises(ModeclipError, match=r"other settings: stages was 2, now 3, top_k was 2, now 1; give the same"):
        upcycle(model, catalog, other, out=out)
    with pytest.raises(ModeclipError, match=r"model was '\w+', now '\w+'; give the same settings, or another --out"):
        upcycle(out / "stage-1", catalog, CONFIG, out=out)


def test_from_previous_continues_the_stage_before(
    done: Upcycled, catalog: Catalog, model: Path, tmp_path: Path
) -> None:
    found = upcycle(model, catalog, replace(CONFIG, each_from="previous"), out=tmp_path / "up")
    first, second = tmp_path / "up" / "stage-1", tmp_path / "up" / "stage-2"
    out = Path(done.folder).parent
    assert weights_of(first) == weights_of(out / "stage-1")
    assert weights_of(second) != weights_of(out / "stage-2")
    assert found.stages[0].column == done.stages[0].column
    assert json.loads((second / "job.json").read_text())["config"]["model"] == str(first)


def test_selected_pairs_alone(catalog: Catalog, model: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, stages=1, start="centroids", top_k=1)
    found = upcycle(model, catalog, config, out=tmp_path / "up", selection=Selection(where=("caption < 'm'",)))
    rows = Catalog.open(catalog.path).select_where("caption < 'm'")
    cluster = Catalog.open(catalog.path).read([found.stages[0].column])[found.stages[0].column]
    assert found.num_pairs == len(rows) < len(catalog)
    assert sorted(np.flatnonzero(cluster >= 0)) == sorted(rows)
    rows_of_routers = [
        value
        for name, value in load_file(tmp_path / "up/start/open_clip_model.safetensors").items()
        if name.endswith("router.weight")
    ]
    assert all(torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-5) for rows in rows_of_routers)


def test_copies_are_trained_as_a_whole(catalog: Catalog, model: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, experts="copies", copies=2)
    found = upcycle(model, catalog, config, out=tmp_path / "up")
    assert (found.experts, found.stages) == (("base", "copy-1", "copy-2"), ())
    job = json.loads((tmp_path / "up/model/job.json").read_text())["config"]
    assert (job["trainable"], job["balance_loss"], job["router_z_loss"]) == ("all", 0.01, 0.001)


class TestKilled:
    """A killed command goes on with the same numbers, wherever it was killed."""

    @pytest.mark.slow
    @pytest.mark.parametrize("where", ["stage-1/checkpoints", "stage-2/job.json", "model/checkpoints"])
    def test_killed_and_run_again(
        self,
        where: str,
        done: Upcycled,
        catalog: Catalog,
        model: Path,
        tmp_path: Path,
        modeclip_command: Callable[..., CompletedProcess[str]],
    ) -> None:
        copied = Path(shutil.copytree(catalog.path, tmp_path / "catalog.lance"))
        for column in [name for name in Catalog.open(copied).columns if name.startswith("upcycle")]:
            Catalog.open(copied).remove_columns([column])
        words = ("upcycle", model, copied, "--out", tmp_path / "up", *SETTINGS)
        process = Python("-m", "modeclip", *words)
        deadline = time.monotonic() + 900
        while not _has_something(tmp_path / "up" / where):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.wait()
        again = modeclip_command(*words)
        assert again.returncode == 0, again.stderr
        assert weights_of(tmp_path / "up" / "model") == weights_of(done.folder)
        page = (tmp_path / "up" / "router.html").read_text(encoding="utf-8")
        assert f"a value of <code>{done.stages[-1].column}</code>" in page


def _has_something(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


# ---------------------------------------------------------------- rows without training


def test_rows_of_centres_are_sums_by_hand(catalog: Catalog, model: Path) -> None:
    """Hooks against the towers taken apart: the first block of each sees the embeddings, attention added and normed."""
    clip = load_clip(model)
    clip.model.eval()
    rows = np.arange(7)
    found = look_at_inputs(clip, catalog, rows, most_pairs=100, keep=True)
    with torch.no_grad():
        seen = {}
        for tower, blocks in blocks_of(clip.model).items():
            block = blocks[-1].module
            handle = block.ln_2.register_forward_hook(lambda _, __, output, tower=tower: seen.update({tower: output}))
            for row in rows:  # one by one, so that no padding is seen
                if tower == "image":
                    encode_image(clip.model, clip.images(catalog.images(rows[row : row + 1])))
                else:
                    encode_text(clip.model, clip.tokens(catalog.captions(rows[row : row + 1])))
                seen.setdefault(f"{tower} all", []).append(seen[tower].flatten(0, 1))
            handle.remove()
            expected = torch.cat(seen[f"{tower} all"]).double().numpy()
            mine = found[blocks[-1].name]
            assert mine.count == len(expected)
            np.testing.assert_allclose(mine.mean, expected.mean(0), atol=1e-5)
            assert mine.variance == pytest.approx(expected.var(0).mean(), rel=1e-4)


def test_a_row_is_for_its_domain_and_against_no_one() -> None:
    draw = np.random.default_rng(0)
    mean, shift = draw.normal(size=8), draw.normal(size=8)
    of_all, of_domain = BlockInputs(), BlockInputs()
    domain = mean + shift + 0.5 * draw.normal(size=(500, 8))
    others = mean - shift + 0.5 * draw.normal(size=(500, 8))
    of_all.add(np.concatenate([domain, others]), 0)
    of_domain.add(domain, 0)
    row = centre_row(of_all, of_domain)
    assert abs(row @ of_all.mean) < 1e-6, "a typical token is not drawn to it"
    assert (domain @ row).mean() > 0.5 > -0.5 > (others @ row).mean()


@pytest.fixture(scope="module")
def experts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that differ from the plain one in their feed-forward layers alone."""
    folders = []
    for seed in (1, 2):
        clip, other = load_clip(model), load_clip("modeclip-icon-xxxs", seed=seed).model.state_dict()
        clip.model.load_state_dict({name: value for name, value in other.items() if ".mlp." in name}, strict=False)
        folders.append(tmp_path_factory.mktemp("expert") / f"expert-{seed}")
        save_clip(clip, folders[-1])
    return folders


def test_experts_are_added_one_by_one(experts: list[Path], model: Path, catalog: Catalog, tmp_path: Path) -> None:
    """Both at once, or one after the other: the same CLIP-MoE; and a CLIP-MoE brings its own rows."""
    clip = load_clip(model)
    routers = {block.name: torch.zeros(2, 1) for blocks in blocks_of(clip.model).values() for block in blocks}
    state = load_clip(experts[0]).model.state_dict()
    width = {name: value.shape[1] for name, value in state.items() if name.endswith("mlp.c_fc.weight")}
    routers = {name: torch.randn(2, width[f"{name}.mlp.c_fc.weight"]) for name in routers}
    first = assemble_clip(clip, [state], top_k=2, routers=routers)
    save_clip(first, tmp_path / "first")
    some = Selection(where=("caption < 'd'",))
    one = upcycle(tmp_path / "first", catalog, CONFIG, out=tmp_path / "one", add=[str(experts[1])], selection=some)
    assert (one.gate, one.experts[:2]) == ("rows", ("base", "expert 1"))
    assert one.experts[2] == str(experts[1])
    added = load_file(tmp_path / "one/model/open_clip_model.safetensors")
    for name, rows in routers.items():
        assert torch.equal(added[f"{name}.mlp.router.weight"][:2], rows), "rows that were there stay"
    assert torch.equal(dense_of(load_clip(one.folder), 2).model.state_dict()["logit_scale"], state["logit_scale"])
    again = upcycle(tmp_path / "first", catalog, CONFIG, out=tmp_path / "two", add=[one.folder])
    assert len(again.experts) == 4
    both = load_file(Path(again.folder) / "open_clip_model.safetensors")
    for name in routers:
        mine = both[f"{name}.mlp.router.weight"]
        torch.testing.assert_close(mine[2] - mine[0], mine[1] - mine[0])
        torch.testing.assert_close(mine[3], added[f"{name}.mlp.router.weight"][2])


# ---------------------------------------------------------------- bundles


def make_bundle(folder: Path, models: dict[str, Path]) -> Path:
    """A bundle of two experts, of which those that are given are there."""
    card = {"size": 50, "keywords": ["a"], "nearest_captions": ["a"]}
    save_bundle(
        folder,
        models=models,
        fine_centers=np.eye(4, 8, dtype=np.float32),
        expert_of_fine=np.repeat(np.arange(2), 2),
        cards={"fine": [{"index": s} | card for s in range(4)], "experts": [{"index": k} | card for k in range(2)]},
        manifest={
            "name": "test",
            "encoder": "minilm",
            "rule": "per_class",
            "temperature": 0.1,
            "templates": ["{}"],
            "lineage": {},
        },
    )
    return folder


@pytest.fixture(scope="module")
def bundle(experts: list[Path], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = {"seed": model, "expert-0": experts[0], "expert-1": experts[1]}
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", models)


@pytest.fixture(scope="module")
def clustered(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """The pairs with an expert each: the first half of the alphabet, and the rest."""
    path = tmp_path_factory.mktemp("clustered") / "catalog.lance"
    found = Catalog.open(shutil.copytree(catalog.path, path))
    captions = np.array(found.captions(np.arange(len(found))))
    found.add_columns({"expert": (captions > "m").astype(np.int64)}, facts={"made by": "the test"})
    return found


def test_experts_of_a_bundle_without_training(
    bundle: Path, experts: list[Path], model: Path, clustered: Catalog, tmp_path: Path
) -> None:
    """Both experts from the bundle, or the second one added later by itself: the same CLIP-MoE, to the bit."""
    config = replace(CONFIG, gate="rows")
    both = upcycle(bundle, clustered, config, out=tmp_path / "both")
    assert (both.experts, both.gate, both.trainings) == (("base", "expert-0", "expert-1"), "rows", ())
    clip = load_clip(both.folder)
    for number, folder in enumerate((model, *experts)):
        expected = load_clip(folder).model.state_dict()
        found = dense_of(clip, number).model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    only_first = make_bundle(tmp_path / "first", {"seed": model, "expert-0": experts[0]})
    first = upcycle(only_first, clustered, config, out=tmp_path / "one")
    assert first.experts == ("base", "expert-0")
    second = Selection(where=("expert=1",))
    later = upcycle(
        first.folder, clustered, CONFIG, out=tmp_path / "later", add=[f"{bundle}#expert-1"], selection=second
    )
    assert later.experts == ("base", "expert-0", f"{bundle}#expert-1")
    one, other = (load_file(Path(found.folder) / "open_clip_model.safetensors") for found in (both, later))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-7)


def test_experts_of_a_bundle_with_trained_routers(bundle: Path, clustered: Catalog, tmp_path: Path) -> None:
    found = upcycle(bundle, clustered, replace(CONFIG, start="centres"), out=tmp_path / "up")
    assert (found.gate, [training.name for training in found.trainings]) == ("trained", ["model"])
    start, end = (load_file(tmp_path / f"up/{one}/open_clip_model.safetensors") for one in ("start", "model"))
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if ".router." in name}
    assert all(float(value[0].abs().max()) == 0 for name, value in start.items() if ".router." in name)


def test_an_expert_trained_beside_the_frozen_layer(
    bundle: Path, model: Path, clustered: Catalog, tmp_path: Path
) -> None:
    """FlexOlmo: a copy and its router train on the pairs of a domain, and join a CLIP-MoE with the row that it has."""
    config = replace(CONFIG, experts="copies", copies=1, trains="added", start="centres", balance_loss=0.0)
    own = Selection(where=("expert=1",))
    alone = upcycle(model, clustered, config, out=tmp_path / "alone", selection=own)
    tuned = load_clip(alone.folder)
    assert all(
        torch.equal(value, dense_of(tuned, 0).model.state_dict()[name])
        for name, value in load_clip(model).model.state_dict().items()
    ), "the plain model's own layers are frozen"
    joined = upcycle(
        upcycle(bundle, clustered, replace(CONFIG, gate="rows"), out=tmp_path / "first").folder,
        clustered,
        CONFIG,
        out=tmp_path / "joined",
        add=[alone.folder],
    )
    assert joined.experts == ("base", "expert-0", "expert-1", "copy-1")
    theirs, ours = tuned.model.state_dict(), load_clip(joined.folder).model.state_dict()
    for name in (name for name in ours if name.endswith(".router.weight")):
        torch.testing.assert_close(ours[name][3] - ours[name][0], theirs[name][1] - theirs[name][0])


def test_bundles_that_cannot_be_upcycled(
    bundle: Path, catalog: Catalog, clustered: Catalog, model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "expert-0"
    save_clip(load_clip("modeclip-icon-xxxs", seed=5), other)
    changed = make_bundle(tmp_path / "changed", {"seed": model, "expert-0": other})
    empty = make_bundle(tmp_path / "empty", {"seed": model})
    for source, pairs, config, message in (
        (changed, clustered, CONFIG, r"changed: expert-0: .* differs from the base.*train\.trainable: ffn"),
        (empty, clustered, replace(CONFIG, top_k=1), r"no expert of .* is trained yet"),
        (bundle, catalog, replace(CONFIG, gate="rows"), r"no column expert.*modeclip assign"),
        (bundle, clustered, replace(CONFIG, experts="copies"), r"is a bundle, which brings its experts.*#seed"),
    ):
        with pytest.raises(ModeclipError, match=message) as raised:
            upcycle(source, pairs, config, out=tmp_path / "up")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "up" / "settings.json").exists(), "the folder is still free"


# ---------------------------------------------------------------- what cannot work


def test_settings_out_of_range() -> None:
    for settings, message in (
        ({"stages": 0}, "upcycle.stages"),
        ({"top_k": 0}, "upcycle.top_k"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie"),
        ({"gate": "rows", "start": "random"}, "needs upcycle.start centres, got random"),
        ({"gate": "rows", "trains": "all"}, "leave one out"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"router_z_loss": -1.0}, "router_z_loss must be 0 or more"),
    ):
        with pytest.raises(ModeclipError, match=message):
            UpcycleConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 4}, r"upcycle\.top_k: expected 1 to 3"),
        ({"start": "centres"}, r"which only the experts of a bundle have"),
        ({"gate": "rows"}, r"which only the experts of a bundle have"),
        ({"batch_size": 5}, r"too few for 3 x 3 clusters|at least"),
    ],
)
def test_requests_that_cannot_work(
    changes: dict[str, object], message: str, catalog: Catalog, model: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    with pytest.raises(ModeclipError, match=message) as raised:
        upcycle(model, catalog, config, out=tmp_path / "up")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "up" / "stage-1").exists()


def test_models_that_cannot_be_upcycled(done: Upcycled, catalog: Catalog, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match="is a CLIP-MoE already; add experts to it"):
        upcycle(done.folder, catalog, CONFIG, out=tmp_path / "up")
    with pytest.raises(ModeclipError, match="is no CLIP-MoE, to which experts can be added"):
        upcycle(model, catalog, CONFIG, out=tmp_path / "add", add=[str(model)])
    changed = load_clip(model)
    with torch.no_grad():
        changed.model.positional_embedding += 1
    save_clip(changed, tmp_path / "changed")
    with pytest.raises(ModeclipError, match=r"positional_embedding differs.*train\.trainable: ffn"):
        upcycle(done.folder, catalog, CONFIG, out=tmp_path / "bad", add=[str(tmp_path / "changed")])
    assert not (tmp_path / "bad" / "inputs.safetensors").exists(), "told before a pair is looked at"


def test_plan_says_what_it_costs(
    catalog: Catalog, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs are those of the upcycling, with a model that is there; `measure` is tested with costs."""
    seen: list[TrainJob] = []

    def measure(job: TrainJob, _: int) -> Measurement:
        preflight(job, catalog, np.arange(len(catalog)), 1)
        seen.append(job)
        return Measurement(seconds_per_step=0.5, memory_gb=1.0, checkpoint_bytes=10, model_bytes=5)

    monkeypatch.setattr("modeclip.training.costs.measure", measure)
    found = plan_upcycling(model, catalog, CONFIG, out=tmp_path / "up")
    assert found.trainings is not None
    assert [job.name for job in found.trainings.jobs] == ["stage-1", "stage-2", "model"]
    assert [job.config.trainable for job in seen] == ["ffn", "routers"], "the stages cost the same"
    assert found.embedding_seconds == pytest.approx(2 * len(catalog) * 0.5 / 64 / 3)
    assert not (tmp_path / "up").exists()

"""Editing a bundle: what is not edited keeps its bytes, a kill leaves the old or the new one, strangers are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeclip.clustering.novelty import FineQuantiles, NearCaptions
from modeclip.commands import load_command
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import Bundle, load_bundle, save_bundle
from modeclip.mixture.bundle_edits import NewClusters, add_expert, replace_expert
from modeclip.system.options import call
from modeclip.training.jobs import TrainConfig, TrainJob, TrainResult
from support import weights_of

LEVELS = (0.5, 0.99)
NEAR = NearCaptions(
    vectors=np.arange(-20, 20, dtype=np.int8).reshape(5, 8),
    scale=0.01,
    quantiles=FineQuantiles(levels=LEVELS, distances=np.array([[0.2, 0.4]], np.float32)),
)
TOWERS = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}
SEED_JOB = TrainJob(
    name="seed",
    folder="",
    catalog="c",
    catalog_fingerprint="clusters-start",
    config=TrainConfig(),
    first_step=0,
    last_step=4,
    first_share=0.0,
    last_share=0.8,
)


def save_model(folder: Path, job: TrainJob | None, *, layers: int = 1, mean: float = 0.5) -> Path:
    """A real open_clip folder with other weights for each name, and what a finished job leaves beside it."""
    torch.manual_seed(sum(folder.name.encode()))
    towers = TOWERS | {"text_cfg": TOWERS["text_cfg"] | {"layers": layers}}  # type: ignore[operator]
    model = open_clip.CLIP(**towers)  # type: ignore[arg-type]
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": towers, "preprocess_cfg": PREPROCESS | {"mean": [mean] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if job is not None:
        replace(job, folder=str(folder)).save()
        done = TrainResult(digest=job.digest, samples=256, rows=90, seconds=1.0)
        (folder / "done.json").write_text(json.dumps(asdict(done)))
    return folder


def expert_job(k: int, **changes: object) -> TrainJob:
    job = replace(SEED_JOB, name=f"expert-{k}", where={"expert": k}, start_digest=SEED_JOB.digest, last_step=6)
    return replace(job, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a seed and of experts."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "seed", SEED_JOB)
    for k in range(4):
        save_model(folder / f"expert-{k}", expert_job(k))
    return folder


def make_bundle(folder: Path, models: Path, *names: str, quantiles: bool = True) -> Path:
    """A bundle of three experts, of which those named are there."""
    cards = {
        "fine": [{"index": s, "size": 50, "keywords": ["a"], "nearest_captions": ["a"]} for s in range(6)],
        "experts": [{"index": k, "size": 100, "keywords": ["a"]} for k in range(3)],
    }
    lineage = {"jobs": {"seed": SEED_JOB.digest} | {f"expert-{k}": expert_job(k).digest for k in range(3)}}
    save_bundle(
        folder,
        models={name: models / name for name in ("seed", *names)},
        fine_centers=np.eye(6, 8, dtype=np.float32),
        expert_of_fine=np.repeat(np.arange(3), 2),
        cards=cards,
        manifest={
            "name": "test",
            "encoder": "minilm",
            "rule": "per_class",
            "temperature": 0.1,
            "templates": ["{}"],
            "lineage": lineage | {"stages": {"cluster": "clusters"}},
        },
        fine_quantiles=FineQuantiles(levels=LEVELS, distances=np.ones((6, 2), np.float32), near=NEAR)
        if quantiles
        else None,
    )
    return folder


@pytest.fixture
def bundle(tmp_path: Path, models: Path) -> Path:
    return make_bundle(tmp_path / "bundle", models, "expert-0", "expert-2")


@pytest.fixture
def clusters() -> NewClusters:
    return NewClusters(
        fine_centers=np.full((2, 8), 0.35, np.float32),
        cards=tuple({"size": 40 + i, "keywords": ["fish"], "nearest_captions": ["grilled fish"]} for i in range(2)),
        keywords=("fish",),
        fine_quantiles=FineQuantiles(levels=LEVELS, distances=np.full((8, 2), 0.5, np.float32)),
    )


def files_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and content of each file of the models."""
    return {
        str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.glob("*/*"))
    }


def test_quantiles_come_back_and_old_bundles_still_load(tmp_path: Path, models: Path) -> None:
    opened = load_bundle(make_bundle(tmp_path / "new", models))
    assert opened.fine_quantiles is not None
    assert (opened.fine_quantiles.levels, opened.fine_quantiles.distances.tolist()) == (LEVELS, [[1, 1]] * 6)
    near = opened.fine_quantiles.near
    assert near is not None
    assert (near.vectors.tolist(), near.scale) == (NEAR.vectors.tolist(), NEAR.scale)
    assert (near.quantiles.levels, near.quantiles.distances.tolist()) == (LEVELS, NEAR.quantiles.distances.tolist())
    old = make_bundle(tmp_path / "old", models, quantiles=False)
    manifest = json.loads((old / "mode.json").read_text())
    del manifest["files"]
    (old / "mode.json").write_text(json.dumps(manifest | {"format_version": 1}))
    assert load_bundle(old).fine_quantiles is None
    assert len(load_bundle(old).clusters) == 6


def test_a_missing_expert_arrives(bundle: Path, models: Path) -> None:
    before, hashes = files_of(bundle), dict(load_bundle(bundle).manifest["sha256"])
    opened = replace_expert(bundle, 1, models / "expert-1", size=120, note={"catalog": "icons"})
    assert [(expert.folder, expert.size) for expert in opened.experts] == [
        ("expert-0", 100),
        ("expert-1", 120),
        ("expert-2", 100),
    ]
    assert before.items() <= files_of(bundle).items()
    assert hashes.items() <= opened.manifest["sha256"].items()
    (edit,) = opened.edits
    wanted = {"action": "fill in", "expert": "expert-1", "job": expert_job(1).digest, "pairs": 90, "catalog": "icons"}
    assert wanted.items() <= edit.items()
    assert edit["forced"] is False


def test_several_experts_are_put_there_or_none(bundle: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits = f"expert-1={models / 'expert-1'}"
    for other, message in (
        ("bad=B", "--put bad=B: expected an expert and a folder"),
        ("expert-0=nowhere", "expert nowhere: open_clip_config.json is missing"),
        ("expert-9=nowhere", "expected an expert of 0 to 2, got 9"),
        ("expert-1=nowhere", "--put expert-1=nowhere: expert-1 is given twice"),
    ):
        with pytest.raises(ModeclipError, match=message):
            call(load_command("bundle"), [str(bundle), "--put", fits, other])
        assert not load_bundle(bundle).edits
    call(load_command("bundle"), [str(bundle), "--put", fits, f"expert-0={models / 'expert-0'}"])
    assert [edit["expert"] for edit in load_bundle(bundle).edits] == ["expert-1", "expert-0"]
    assert "expert-1" in capsys.readouterr().out


def test_an_expert_is_replaced_again_and_again(bundle: Path, tmp_path: Path) -> None:
    others = {name: value for name, value in files_of(bundle).items() if not name.startswith("expert-0")}
    start = expert_job(0).digest
    for number in range(3):
        job = expert_job(0, start_digest=start, catalog_fingerprint=f"pairs-{load_bundle(bundle).clustering}")
        model = save_model(tmp_path / f"again-{number}", job)
        opened = replace_expert(bundle, 0, model)
        assert load_file(opened.model_folder(0) / "open_clip_model.safetensors").keys()
        assert weights_of(opened.model_folder(0)) == weights_of(model)
        start = job.digest
    assert len(opened.edits) == 3
    assert {name: value for name, value in files_of(bundle).items() if name in others} == others
    names = {path.name for path in bundle.iterdir()} - {"lock"}
    assert names == {"mode.json", "centres.safetensors", "clusters.json", "seed", "expert-2", opened.experts[0].folder}


def test_an_expert_is_added(bundle: Path, clusters: NewClusters, tmp_path: Path) -> None:
    before, old = files_of(bundle), load_bundle(bundle)
    job = expert_job(3, where={}, mask="novel", catalog_fingerprint=f"pairs-{old.clustering}-q")
    opened = add_expert(bundle, save_model(tmp_path / "new", job), clusters)
    assert opened.num_experts == 4
    assert (opened.experts[3].name, opened.experts[3].size, opened.experts[3].keywords) == ("expert-3", 81, ("fish",))
    assert (opened.fine_centers[:6] == old.fine_centers).all()
    assert opened.expert_of_fine.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [(card["index"], card["expert"]) for card in opened.clusters[6:]] == [(6, 3), (7, 3)]
    assert opened.fine_quantiles is not None
    assert len(opened.fine_quantiles.distances) == 8
    assert before.items() <= files_of(bundle).items()
    assert not (bundle / "centres.safetensors").exists()
    again = add_expert(bundle, save_model(tmp_path / "next", None), clusters_without_quantiles(clusters), force=True)
    assert again.fine_quantiles is None
    assert [edit["forced"] for edit in again.edits] == [False, True]
    shutil.move(bundle, tmp_path / "moved")
    assert load_bundle(tmp_path / "moved").num_experts == 5


def clusters_without_quantiles(clusters: NewClusters) -> NewClusters:
    return replace(clusters, fine_quantiles=None)


KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from modeclip.mixture.bundle import load_bundle
from modeclip.mixture.bundle_edits import NewClusters, add_expert, replace_expert
from modeclip.clustering.novelty import FineQuantiles, NearCaptions
folder, model = Path(sys.argv[1]), Path(sys.argv[2])
def edit(folder):
    if sys.argv[3] == "add":
        all_fine = len(load_bundle(folder).fine_centers) + 2
        quantiles = FineQuantiles(levels=(0.5, 0.99), distances=np.ones((all_fine, 2), np.float32))
        cards = ({"size": 1, "nearest_captions": []},) * 2
        new = NewClusters(fine_centers=np.full((2, 8), 0.35, np.float32), cards=cards, keywords=(),
                          fine_quantiles=quantiles)
        add_expert(folder, model, new, force=True)
    else:
        replace_expert(folder, 0, model, force=True)
def state(folder):
    bundle = load_bundle(folder)
    return bundle.num_experts, bundle.experts[0].folder, len(bundle.edits), len(bundle.clusters)
kept = {path: path.read_bytes() for path in folder.glob("expert-2/*")}
before = state(folder)
seen = []
WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
for last in range(1, 400):
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    child = os.fork()
    if child == 0:
        count = 0
        def watch(event, arguments):
            global count
            if event in WATCHED:
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        edit(copy)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = state(copy)
    assert all((copy / path.relative_to(folder)).read_bytes() == content for path, content in kept.items())
    seen.append(found != before)
    edit(copy)
    assert state(copy)[2] == found[2] + 1
    left = [path.name for path in copy.iterdir() if path.name.endswith(".part")]
    assert not left, left
    if status == 0:
        break
assert status == 0
assert seen == sorted(seen) and not seen[0] and seen[-1], seen
print(len(seen), seen.count(False))
"""


@pytest.mark.parametrize("action", ["add", "replace"])
def test_an_edit_killed_at_any_moment_leaves_the_old_bundle_or_the_new_one(
    bundle: Path, models: Path, tmp_path: Path, action: str
) -> None:
    """Killed at its first file operation, its second, and so on, until it comes through; then the edit works again."""
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    words = [sys.executable, str(script), str(bundle), str(models / "expert-3"), action]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    kills, before = map(int, done.stdout.split())
    assert kills > before > 5


def test_another_architecture_or_preprocessing_is_refused(bundle: Path, tmp_path: Path) -> None:
    names = {path.name for path in bundle.iterdir()}
    for folder, changes, message in (
        ("deep", {"layers": 2}, r"model_cfg\.text_cfg\.layers is 2, expected 1 .*same towers"),
        ("dark", {"mean": 0.1}, r"preprocess_cfg\.mean is \[0\.1, .*expected \[0\.5, .*preprocessing"),
    ):
        model = save_model(tmp_path / folder, expert_job(1), **changes)  # type: ignore[arg-type]
        with pytest.raises(ModeclipError, match=message):
            replace_expert(bundle, 1, model, force=True)
    model = save_model(tmp_path / "short", expert_job(1))
    weights = load_file(model / "open_clip_model.safetensors")
    save_file(
        {name: value[:4] if name == "positional_embedding" else value for name, value in weights.items()},
        model / "open_clip_model.safetensors",
    )
    with pytest.raises(ModeclipError, match=r"positional_embedding is \(4, 16\), expected \(16, 16\)"):
        replace_expert(bundle, 1, model, force=True)
    (model / "open_clip_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModeclipError, match=r"open_clip_model\.safetensors is damaged"):
        replace_expert(bundle, 1, model, force=True)
    (model / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModeclipError, match=r"open_clip_model\.safetensors is missing"):
        replace_expert(bundle, 1, model, force=True)
    assert {path.name for path in bundle.iterdir()} - {"lock"} == names


def test_an_expert_of_elsewhere_is_refused_unless_forced(bundle: Path, tmp_path: Path) -> None:
    for folder, job, message in (
        ("seed", expert_job(1, start_digest="f00d"), r"another model \(f00d\).*bundle's seed.*give --force"),
        (
            "clustering",
            expert_job(1, last_step=7, catalog_fingerprint="others"),
            r"another clustering \(others\).*give --force",
        ),
        ("rows", expert_job(2, last_step=7), "rows of expert 2, not 1.*give --force"),
        ("nobody", None, r"no job\.json.*seed and clustering.*give --force"),
    ):
        model = save_model(tmp_path / folder, job)
        with pytest.raises(ModeclipError, match=message):
            replace_expert(bundle, 1, model)
    unfinished = save_model(tmp_path / "unfinished", expert_job(1))
    (unfinished / "done.json").unlink()
    with pytest.raises(ModeclipError, match="training is not finished"):
        replace_expert(bundle, 1, unfinished)
    assert load_bundle(bundle).edits == ()
    opened = replace_expert(bundle, 1, tmp_path / "nobody", force=True)
    assert (opened.edits[0]["job"], opened.edits[0]["forced"]) == (None, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"mode\.json cannot be read.*expected an object, got list.*get the bundle again"),
        ("{", r"mode\.json cannot be read.*Expecting property name.*get the bundle again"),
        (
            '{"format_version": "new", "sha256": {}}',
            r"mode\.json format_version: expected a whole number.*got 'new'.*get the bundle again",
        ),
        (
            '{"format_version": 1, "encoder": "x", "rule": "top1", "temperature": 1, "templates": ["{}"], '
            '"experts": [], "lineage": {}, "sha256": [1]}',
            r"mode\.json sha256: .*an object, got list.*get the bundle again",
        ),
        (
            '{"format_version": 1, "sha256": {}, "encoder": "x"}',
            r"mode\.json rule: is missing; get the bundle again",
        ),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mode.json").write_text(content)
    with pytest.raises(ModeclipError, match=message):
        load_bundle(tmp_path)


def test_bundle_or_expert_that_is_not_there(bundle: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match="0 to 2, got 3"):
        replace_expert(bundle, 3, models / "expert-3")
    with pytest.raises(ModeclipError, match=r"no bundle.*mode\.json is missing.*give a bundle's folder"):
        replace_expert(tmp_path / "nowhere", 0, models / "expert-0")


def test_the_clustering_has_a_hash_of_its_own(bundle: Path) -> None:
    opened = load_bundle(bundle)
    other = Bundle(**{**vars_of(opened), "fine_centers": opened.fine_centers + 1})
    assert opened.clustering == load_bundle(bundle).clustering != other.clustering


def vars_of(bundle: Bundle) -> dict[str, object]:
    return {name: getattr(bundle, name) for name in Bundle.__dataclass_fields__}

"""Distilling: the teacher's vectors and weights, students that share them, kills, and what cannot work."""

from __future__ import annotations

import copy
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeclip.adapting import distilling
from modeclip.adapting.distilling import DistillConfig, Distilled, distill, encode_pairs
from modeclip.data.catalog import Catalog
from modeclip.data.selection import Selection
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import save_bundle
from modeclip.mixture.mode import MoDE
from modeclip.models.clip import assemble_clip, encode_image, encode_text, load_clip, save_clip
from modeclip.models.encoders import load_encoder
from modeclip.models.encoders.text import fit_tfidf
from modeclip.system.files import only_process
from modeclip.training.jobs import AugmentConfig, EngineConfig
from support import Python, weights_of

MODEL = "modeclip-icon-xxxs"
CONFIG = DistillConfig(
    samples=64,
    batch_size=16,
    learning_rate=1e-3,
    threads=1,
    augment=AugmentConfig(min_crop_share=1.0),
    engine=EngineConfig(precision="32-true", log_every=1, save_every="1steps"),
)
SETTINGS = shlex.split(
    "--samples 64 --batch-size 16 --learning-rate 1e-3 --threads 1 --min-crop-share 1 --precision 32-true "
    "--log-every 1 --save-every 1steps"
)


@pytest.fixture(scope="module")
def catalog(icons_copy: Catalog) -> Catalog:
    return icons_copy


@pytest.fixture(scope="module")
def bundle(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts, the last of which the seed stands in for, and clusters of captions."""
    folder = tmp_path_factory.mktemp("bundle")
    fit_tfidf(catalog.captions(), folder / "tfidf", dimension=8, seed=0)
    encoder = load_encoder(f"tfidf:{folder / 'tfidf'}")
    for seed, name in enumerate(("seed", "expert-0", "expert-1")):
        clip = load_clip(MODEL, seed=seed)
        with torch.no_grad():
            clip.model.logit_scale += 0.2 * seed
        save_clip(clip, folder / name)
    cards = {
        "fine": [{"index": s, "size": 50, "keywords": ["a"], "nearest_captions": ["a"]} for s in range(6)],
        "experts": [{"index": k, "size": 100, "keywords": ["a"]} for k in range(3)],
    }
    save_bundle(
        folder / "bundle",
        models={name: folder / name for name in ("seed", "expert-0", "expert-1")},
        fine_centers=encoder.encode(catalog.captions(np.arange(0, 60, 10))),
        expert_of_fine=np.repeat(np.arange(3), 2),
        cards=cards,
        manifest={
            "encoder": f"tfidf:{folder / 'tfidf'}",
            "rule": "per_class",
            "temperature": 0.3,
            "templates": ["{}"],
            "lineage": {},
        },
    )
    return folder / "bundle"


@pytest.fixture(scope="module")
def done(bundle: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    catalog = Catalog.open(catalog.path)  # as it is now: other tests add columns too
    return distill(bundle, catalog, CONFIG, student=MODEL, out=tmp_path_factory.mktemp("done") / "student")


def vectors_of(catalog: Catalog, stem: str) -> list[np.ndarray]:
    names = [f"{stem}_{part}" for part in ("images", "texts", "weights")]
    found = Catalog.open(catalog.path).read(names)
    return [found[name] for name in names]


def test_vectors_are_those_of_each_expert_and_weights_those_of_a_task(
    done: Distilled, bundle: Path, catalog: Catalog
) -> None:
    images, texts, weights = vectors_of(catalog, done.vectors.columns)
    assert images.dtype == texts.dtype == np.float16
    assert (done.vectors.models, done.vectors.computed) == (3, len(catalog))
    assert done.vectors.bytes_per_pair == images[0].nbytes + texts[0].nbytes + weights[0].nbytes
    rows = np.array([3, 11, len(catalog) - 1])
    for k, folder in enumerate(("expert-0", "expert-1", "seed")):
        clip = load_clip(bundle / folder)
        clip.model.eval()
        own = slice(k * done.vectors.dimension, (k + 1) * done.vectors.dimension)
        for row in rows:
            picture, caption = catalog.images(np.array([row])), catalog.captions(np.array([row]))
            with torch.no_grad():
                image = encode_image(clip.model, clip.images(picture))[0].numpy()
                text = encode_text(clip.model, clip.tokens(caption))[0].numpy()
            np.testing.assert_allclose(images[row, own], image, atol=5e-4)
            np.testing.assert_allclose(texts[row, own], text, atol=5e-4)
    mode = MoDE.load(bundle)
    for row in rows:
        task = mode.task(catalog.captions(np.array([row])), each=True)
        np.testing.assert_allclose(weights[row], task.weights[0], atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)


def test_another_student_runs_no_teacher_and_the_same_again_nothing(
    done: Distilled, bundle: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distilling, "encode_pairs", lambda *_: pytest.fail("the teacher runs again"))
    assert distill(bundle, Catalog.open(catalog.path), CONFIG, student=MODEL, out=done.folder) == done
    config = replace(CONFIG, loss="clip-kd", samples=32)
    chosen = Selection(where=("caption < 'm'",))
    catalog = Catalog.open(catalog.path)
    other = distill(bundle, catalog, config, student=f"{bundle}#seed", out=tmp_path / "other", selection=chosen)
    assert (other.vectors.columns, other.vectors.computed) == (done.vectors.columns, 0)
    assert other.num_pairs == len(chosen.rows(catalog)) < done.num_pairs
    with pytest.raises(ModeclipError, match=r"trained with other settings: loss was 'reinforced', now 'mse'"):
        distill(bundle, catalog, replace(CONFIG, loss="mse"), student=MODEL, out=done.folder)
    with only_process(Path(done.folder)), pytest.raises(ModeclipError, match=r"is training with other settings .*loss"):
        distill(bundle, catalog, replace(CONFIG, loss="mse"), student=MODEL, out=done.folder)


def test_what_experts_share_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "BATCH", 3)
    first = load_clip("modeclip-icon-xs", seed=0)
    first.model.eval()
    own = [first.model.get_submodule(f"{tower}transformer.resblocks.1") for tower in ("visual.", "")]
    apart = {id(value) for block in own for value in block.parameters()}
    memo = {id(value): value for value in first.model.parameters() if id(value) not in apart}
    clips, runs = [first, replace(first, model=copy.deepcopy(first.model, memo))], list[int]()
    with torch.no_grad():
        for name in ("visual.transformer.resblocks.1", "transformer.resblocks.1"):
            for value in clips[1].model.get_submodule(name).parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    pictures = [Image.new("RGB", (32, 32), (40 * number, 0, 90)) for number in range(5)]
    captions = ["a red heart", "x", "two dogs", "x", "an arrow to the left"]
    alone = [encode_pairs([clip], pictures, captions, "32-true")[0] for clip in clips]
    for index, clip in enumerate(clips):
        for name in ("visual.transformer.resblocks.0", "transformer.resblocks.0"):
            clip.model.get_submodule(name).register_forward_hook(lambda *_, index=index: runs.append(index))
    together = encode_pairs(clips, pictures, captions, "32-true")
    assert np.abs(alone[0][0] - alone[1][0]).max() > 0.01
    for found, expected in zip(together, alone, strict=True):
        for side in (0, 1):
            np.testing.assert_allclose(found[side], expected[side], atol=1e-6)
    assert runs == [0] * 4  # five pictures and four captions, in batches of three, through the first model alone


def test_a_batch_in_parts_gives_the_same_student(
    done: Distilled, bundle: Path, catalog: Catalog, tmp_path: Path
) -> None:
    parts = replace(CONFIG, engine=replace(CONFIG.engine, micro_batch=6))
    distill(bundle, Catalog.open(catalog.path), parts, student=MODEL, out=tmp_path / "parts")
    whole = load_file(Path(done.folder) / "open_clip_model.safetensors")
    for name, value in load_file(tmp_path / "parts" / "open_clip_model.safetensors").items():
        torch.testing.assert_close(value, whole[name], atol=2e-4, rtol=1e-3)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(bundle: Path, catalog: Catalog, tmp_path: Path) -> None:
    config = replace(CONFIG, loss="kl+mse", samples=32, learning_rate=1e-9)
    catalog = Catalog.open(catalog.path)
    found = distill(bundle / "expert-0", catalog, config, student=bundle / "expert-0", out=tmp_path / "same")
    assert found.vectors.models == 1
    assert 0 <= found.first_loss < 1e-4
    assert (vectors_of(catalog, found.vectors.columns)[2] == 1).all()
    strange = distill(bundle / "expert-0", catalog, config, student=bundle / "expert-1", out=tmp_path / "strange")
    assert strange.first_loss > 10 * max(found.first_loss, 1e-5)
    assert strange.vectors.computed == 0


def test_pairs_that_are_not_selected_are_not_run(bundle: Path, catalog: Catalog, tmp_path: Path) -> None:
    config, chosen = replace(CONFIG, rule="uniform", samples=32), Selection(where=("caption < 'm'",))
    catalog = Catalog.open(catalog.path)
    found = distill(bundle, catalog, config, student=MODEL, out=tmp_path / "some", selection=chosen)
    images, _, weights = vectors_of(catalog, found.vectors.columns)
    is_selected = chosen.mask_of(catalog)
    assert ((images != 0).any(axis=1) == is_selected).all()
    assert found.vectors.computed == is_selected.sum() == found.num_pairs
    np.testing.assert_allclose(weights[is_selected], 1 / 3, atol=1e-6)
    assert (weights[~is_selected] == 0).all()


def test_a_selection_keeps_its_vectors_when_all_pairs_have_some(bundle: Path, catalog: Catalog, tmp_path: Path) -> None:
    config, chosen = replace(CONFIG, rule="paper", samples=32), Selection(where=("caption < 'f'",))

    def student(name: str, selection: Selection) -> Distilled:
        own = Catalog.open(catalog.path)
        return distill(bundle, own, config, student=MODEL, out=tmp_path / name, selection=selection)

    first, every = student("some", chosen), student("all", Selection())
    assert every.vectors.columns != first.vectors.columns
    assert student("some", chosen) == first


def test_a_clip_moe_teaches_and_learns(catalog: Catalog, tmp_path: Path) -> None:
    base = load_clip(MODEL, seed=0)
    other = {name: value * 1.1 if ".mlp." in name else value for name, value in base.model.state_dict().items()}
    save_clip(assemble_clip(base, [other], top_k=1), tmp_path / "moe")
    catalog, config = Catalog.open(catalog.path), replace(CONFIG, loss="affinity+0.5*clip", samples=32)
    found = distill(tmp_path / "moe", catalog, config, student=tmp_path / "moe", out=tmp_path / "student")
    assert found.vectors.computed == len(catalog)
    assert load_clip(tmp_path / "student").config["moe"] == {"num_experts": 2, "top_k": 1}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["job.json", "checkpoints"])
def test_killed_and_run_again(
    where: str,
    done: Distilled,
    bundle: Path,
    catalog: Catalog,
    tmp_path: Path,
    modeclip_command: Callable[..., CompletedProcess[str]],
) -> None:
    copied = Path(shutil.copytree(catalog.path, tmp_path / "catalog.lance"))
    for column in [name for name in Catalog.open(copied).columns if name.startswith("teacher_")]:
        Catalog.open(copied).remove_columns([column])
    words = ("distill", bundle, copied, "--student", MODEL, "--out", tmp_path / "student", *SETTINGS)
    process, place = Python("-m", "modeclip", *words), tmp_path / "student" / where
    deadline = time.monotonic() + 300
    while not (place.is_file() or (place.is_dir() and any(place.iterdir()))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    again = modeclip_command(*words)
    assert again.returncode == 0, again.stderr
    assert weights_of(tmp_path / "student") == weights_of(done.folder)


@pytest.mark.parametrize(
    ("changes", "student", "words"),
    [
        ({"loss": "clip"}, MODEL, r"distill\.loss clip has no teacher; expected at least one of reinforced"),
        ({"loss": "hints"}, MODEL, r"unknown train\.loss 'hints'; known: clip, siglip, reinforced"),
        (
            {"loss": "clip-kd"},
            "modeclip-icon-xxs",
            r"compare vectors, and the student's have 48 numbers, the teacher's 32",
        ),
        ({"rule": "best"}, MODEL, r"unknown rule 'best'"),
        ({"temperature": 0.0}, MODEL, r"distill\.temperature"),
        ({"captions": "none"}, MODEL, r"unknown column of .*'none'"),
        ({}, "no-such-model", r"unknown model 'no-such-model'"),
        ({}, "BUNDLE", r"is a bundle; give a model in it"),
        ({"samples": 16}, MODEL, r"distill\.samples: expected 32 or more, got 16"),
    ],
)
def test_what_cannot_work_is_one_line_and_writes_nothing(
    changes: dict[str, object], student: str, words: str, bundle: Path, catalog: Catalog, tmp_path: Path
) -> None:
    before = Catalog.open(catalog.path).columns
    student = str(bundle) if student == "BUNDLE" else student
    with pytest.raises(ModeclipError, match=words) as error:
        distill(bundle, catalog, replace(CONFIG, **changes), student=student, out=tmp_path / "out")  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert Catalog.open(catalog.path).columns == before


def test_routing_is_for_bundles(bundle: Path, catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(ModeclipError, match=r"--rule, --temperature and --encoder are for a bundle, .* is one model"):
        distill(bundle / "expert-0", catalog, replace(CONFIG, rule="top1"), student=MODEL, out=tmp_path / "out")
    with pytest.raises(ModeclipError, match=r"names no weights, so they would be random"):
        distill(MODEL, catalog, CONFIG, student=MODEL, out=tmp_path / "out")
    for names in ({"student": MODEL, "out": bundle / "expert-0"}, {"student": bundle / "seed", "out": bundle / "seed"}):
        with pytest.raises(ModeclipError, match=r"is also the folder to write to; choose another --out"):
            distill(bundle / "expert-0", catalog, CONFIG, **names)  # type: ignore[arg-type]

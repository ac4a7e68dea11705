"""Experts that share tensors with their seed: stored once, in memory once, run once, and equal to the full folders."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file

from modeclip import MoDE
from modeclip.adapting.merging import average_into, check_alike, find_model
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import Bundle, check_files, copy_model, export_expert, load_bundle, save_bundle
from modeclip.mixture.bundle_edits import NewClusters, add_expert, replace_expert
from modeclip.mixture.router import ClusterRouter
from modeclip.models.clip import load_clip, logit_scale_of, model_shapes
from modeclip.models.feature_cache import FeatureCache
from modeclip.models.features import image_features, prompt_features, text_features
from modeclip.models.pool import ModelPool, ModelRef, total_bytes
from support import unit_rows

WEIGHTS, DELTA = "open_clip_model.safetensors", "delta.safetensors"
CLASSES = ["a heart", "an arrow that points to the left", "bell"]
LAST = r"visual\.(transformer\.resblocks\.2|ln_post|proj)|(text\.)?(transformer\.resblocks\.1|ln_final|text_projection)"
FFN = r".*\.mlp\..*"
ALL = ".*"


def towers(custom: bool) -> dict[str, Any]:
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 3}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    return {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, **({"custom_text": True} if custom else {})}


def save_model(folder: Path, custom: bool, seed: Path | None = None, changed: str = ALL) -> Path:
    """A model folder: random, or that of a seed with other numbers in the tensors that are named."""
    random = torch.Generator().manual_seed(sum(folder.name.encode()))
    config = towers(custom)
    if seed is None:
        kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        plain = {name: value for name, value in config.items() if name != "custom_text"}
        state = {name: value.clone() for name, value in kind(**plain).state_dict().items()}
        state = {name: torch.randn(value.shape, generator=random) * 0.2 for name, value in state.items()}
        state["logit_scale"] = torch.tensor(2.0)
    else:
        state = load_file(seed / WEIGHTS)
        for name, value in state.items():
            if re.match(changed, name):
                value += torch.randn(value.shape, generator=random) * 0.1
    folder.mkdir(parents=True)
    save_file(state, folder / WEIGHTS)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def make_bundle(folder: Path, models: dict[str, Path]) -> Bundle:
    """A bundle of four experts, two fine clusters each."""
    cards = {
        "fine": [{"index": s, "size": 50, "keywords": ["a"], "nearest_captions": ["a"]} for s in range(8)],
        "experts": [{"index": k, "size": 100, "keywords": ["a"]} for k in range(4)],
    }
    save_bundle(
        folder,
        models=models,
        fine_centers=unit_rows(8, 8),
        expert_of_fine=np.repeat(np.arange(4), 2),
        cards=cards,
        manifest={
            "name": "test",
            "encoder": "minilm",
            "rule": "uniform",
            "temperature": 0.1,
            "templates": ["{}", "a picture of {}."],
            "lineage": {},
        },
    )
    return load_bundle(folder)


@pytest.fixture(scope="module", params=["plain", "custom text"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A seed, two experts of its last blocks, one of its feed-forward layers, and one without anything of it."""
    root, custom = tmp_path_factory.mktemp("models"), request.param == "custom text"
    seed = save_model(root / "seed", custom)
    kinds = {"expert-1": LAST, "expert-0": LAST, "expert-2": FFN, "expert-3": ALL}
    return {"seed": seed} | {name: save_model(root / name, custom, seed, kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def bundle(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", models)


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(bundle.path, tmp_path / "bundle")


class Pictures:
    """Random pictures as `image_features` reads them."""

    digest = "random"

    def __init__(self, count: int = 9) -> None:
        draw = np.random.default_rng(0)
        self.pictures = [Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, rows: np.ndarray) -> list[Image.Image]:
        return [self.pictures[row] for row in rows]

    def keys(self) -> list[str]:
        return [str(row) for row in range(len(self))]

    def digests(self) -> list[bytes]:
        return [picture.tobytes() for picture in self.pictures]


@contextmanager
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Which parameters ran over how many rows: of the patch embeddings, and of the blocks of images."""
    ran: list[tuple[int, int]] = []
    forward = torch.nn.Conv2d.forward

    def counted(module: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        ran.append((id(module.weight), len(x)))
        return forward(module, x)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "forward", counted)
        yield ran


def test_what_a_bundle_stores(bundle: Bundle, models: dict[str, Path]) -> None:
    manifest = json.loads((bundle.path / "mode.json").read_text())
    assert manifest["format_version"] == 4
    for name, kind in (("expert-0", LAST), ("expert-1", LAST), ("expert-2", FFN)):
        assert sorted(path.name for path in (bundle.path / name).iterdir()) == [DELTA, "open_clip_config.json"]
        delta, whole = load_file(bundle.path / name / DELTA), load_file(models[name] / WEIGHTS)
        assert delta.keys() == {tensor for tensor in whole if re.match(kind, tensor)}
        assert all(torch.equal(value, whole[tensor]) for tensor, value in delta.items())
        assert bundle.weights_hash(name) == manifest["sha256"][f"{name}/{DELTA}"]
    for name in ("seed", "expert-3"):
        assert (bundle.path / name / WEIGHTS).read_bytes() == (models[name] / WEIGHTS).read_bytes()
        assert not (bundle.path / name / DELTA).exists()
    check_files(bundle)


@pytest.mark.parametrize("name", ["seed", "expert-0", "expert-2", "expert-3"])
def test_exported_expert_is_the_full_folder(bundle: Bundle, models: dict[str, Path], name: str, tmp_path: Path) -> None:
    export_expert(bundle, name, tmp_path / "out" / "own")
    exported, original = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out" / "own", models[name]))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[tensor], original[tensor]) for tensor in original)
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'out' / 'own'}")  # without a line of ours
    for model in (plain, load_clip(bundle.path / name).model):
        assert all(torch.equal(value, original[tensor]) for tensor, value in model.state_dict().items())
    assert logit_scale_of(bundle.path / name) == pytest.approx(float(original["logit_scale"].exp()))
    assert model_shapes(str(bundle.path / name)) == {tensor: tuple(value.shape) for tensor, value in original.items()}
    with pytest.raises(ModeclipError, match="exists already; give a new folder"):
        export_expert(bundle, name, tmp_path / "out" / "own")
    with pytest.raises(ModeclipError, match=r"unknown model of .*'expert-9'; known: .*seed"):
        export_expert(bundle, "expert-9", tmp_path / "other")


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("bf16-mixed", 2e-2)])
def test_features_are_those_of_the_full_folders(
    bundle: Bundle, models: dict[str, Path], precision: str, tolerance: float
) -> None:
    full = [ModelRef.of(name, models[name]) for name in ("expert-0", "expert-1", "expert-2", "expert-3", "seed")]
    stored = [*bundle.models, bundle.model_ref("seed")]
    prompts = [[name, f"a picture of {name}."] for name in CLASSES]
    found = []
    for refs in (full, stored):
        cache = FeatureCache()
        device = {"device": "cpu", "precision": precision}
        found.append(
            [
                image_features(refs, Pictures(), cache, batch_size=4, **device),
                text_features(refs, CLASSES, cache, **device),
                prompt_features(refs, prompts, cache, **device),
            ]
        )
    for kind in range(3):
        np.testing.assert_allclose(np.stack(found[0][kind]), np.stack(found[1][kind]), atol=tolerance, rtol=0)
        assert len(np.unique(np.stack(found[1][kind])[:, 0, 0])) == 5, "each expert has its own"


def test_the_trunk_runs_once_for_all_that_share_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = [bundle.models[0], bundle.models[1], bundle.model_ref("seed")]
    with passes(monkeypatch) as ran:
        image_features(refs, Pictures(), FeatureCache(), device="cpu")
    assert [rows for _, rows in ran] == [9]
    with passes(monkeypatch) as ran:  # the feed-forward layers of every block are expert 2's own
        image_features([*refs, *bundle.models[2:]], Pictures(), FeatureCache(), device="cpu")
    assert [rows for _, rows in ran] == [9, 9, 9]


def test_memory_holds_what_is_shared_once(bundle: Bundle) -> None:
    own = [4 * sum(v.numel() for v in load_file(bundle.path / f"expert-{k}" / DELTA).values()) for k in range(3)]
    whole = 4 * sum(value.numel() for value in load_file(bundle.path / "seed" / WEIGHTS).values())
    refs = list(bundle.models[:3])
    assert [ref.num_bytes for ref in refs] == [whole] * 3
    assert [sum(ref.own_bytes.values()) for ref in refs] == own
    everyones = load_file(bundle.path / "expert-0" / DELTA).keys() & load_file(bundle.path / "expert-2" / DELTA).keys()
    weights = load_file(bundle.path / "seed" / WEIGHTS)
    needed = whole + sum(own) - 4 * sum(weights[name].numel() for name in everyones)
    assert total_bytes(refs) == needed
    assert total_bytes([*refs, bundle.model_ref("seed")]) == whole + sum(own)
    pool = ModelPool(max_bytes=needed)
    models = [pool.get(ref).model for ref in refs]
    assert len(pool) == 3
    for name in ("visual.conv1.weight", "visual.transformer.resblocks.0.attn.in_proj_weight"):
        assert models[0].get_parameter(name) is models[1].get_parameter(name) is models[2].get_parameter(name)
    last = "visual.transformer.resblocks.2.mlp.c_fc.weight"
    assert len({models[k].get_parameter(last).data_ptr() for k in range(3)}) == 3
    held = {v.data_ptr(): v.nbytes for model in models for v in model.parameters()}
    assert sum(held.values()) == needed
    assert [len(group) for group in ModelPool(max_bytes=needed).groups(refs)] == [3]
    assert [len(group) for group in ModelPool(max_bytes=needed - 1).groups(refs)] == [2, 1]
    assert [len(group) for group in ModelPool(max_bytes=whole + own[1]).groups(refs)] == [2, 1]
    assert [len(group) for group in ModelPool(1).groups(refs)] == [1, 1, 1]


def test_what_is_shared_stays_while_one_expert_needs_it(bundle: Bundle) -> None:
    pool, name = ModelPool(1), "visual.conv1.weight"
    first = pool.get(bundle.models[0]).model.get_parameter(name)
    assert pool.get(bundle.models[1]).model.get_parameter(name) is first
    assert pool.get(bundle.models[0], dtype=torch.float16).model.get_parameter(name).dtype == torch.float16
    assert pool.get(bundle.models[3]).model.get_parameter(name) is not first


class Letters:
    """An encoder of texts by their letters."""

    name, dimension = "letters", 8

    def encode(self, texts: Any) -> np.ndarray:
        return np.stack([unit_rows(1, 8, seed)[0] for seed in (sum(text.encode()) for text in texts)])


def routed(bundle: Bundle, rule: str, **budget: Any) -> Any:
    return MoDE(bundle, router=ClusterRouter(bundle, Letters()), **budget).task(CLASSES, rule=rule)


@pytest.mark.parametrize("rule", ["uniform", "per_class", "top1"])
def test_routed_clip_is_that_of_the_full_folders(
    bundle: Bundle, models: dict[str, Path], rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeclip.models.deltas.LEAST_SHARED", 2.0)  # so that nothing is stored as a delta
    plain = make_bundle(tmp_path / "plain", models)
    assert not list(plain.path.glob(f"*/{DELTA}"))
    one, two, few = routed(plain, rule), routed(bundle, rule), routed(bundle, rule, pool=ModelPool(1))
    images = torch.stack([two.preprocess(picture) for picture in Pictures().pictures])
    for other in (two, few):
        for encode in (
            lambda task: task.encode_image(images, normalize=True),
            lambda task: task.encode_text([*CLASSES, "something else"]),
            lambda task: task.classifier(),
        ):
            torch.testing.assert_close(encode(other), encode(one), atol=1e-6, rtol=0)
        for mix in ("cosines", "log-probabilities"):
            for found, expected in zip(
                other.classify(Pictures().pictures, mix), one.classify(Pictures().pictures, mix), strict=True
            ):
                assert found.classnames == expected.classnames
                assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-5)


def test_gradients_of_pixels_pass_through_trunk_and_heads(
    bundle: Bundle, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = routed(bundle, "uniform")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weigh = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    with passes(monkeypatch) as ran:
        (task.encode_image(one) * weigh).sum().backward()
    assert len(ran) == 3, "two of four experts share a trunk"
    own = [load_clip(models[f"expert-{k}"]).model.encode_image(two, normalize=True) for k in range(4)]
    (torch.cat(own, dim=-1) * weigh).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4)


def test_images_with_weights_of_their_own_run_the_trunk_where_anyone_asks(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = routed(bundle, "uniform")
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = torch.stack(task._encode("image", x))
    rows = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]], bool)
    with passes(monkeypatch) as ran:
        found = torch.stack(task._encode("image", x, rows))
    assert [number for _, number in ran] == [3, 2]
    mask = torch.from_numpy(rows.T)
    torch.testing.assert_close(found, whole * mask[:, :, None], atol=1e-6, rtol=0)


def test_edits_store_what_differs(copy: Path, models: dict[str, Path], tmp_path: Path) -> None:
    custom = "custom_text" in (models["seed"] / "open_clip_config.json").read_text()
    new = save_model(tmp_path / "new", custom, models["seed"], LAST)
    other = save_model(tmp_path / "other", custom, models["seed"], ALL)
    edited = replace_expert(copy, 3, new, force=True)
    place = edited.experts[3].folder
    assert (copy / place / DELTA).is_file()
    assert not (copy / place / WEIGHTS).exists()
    assert all(
        torch.equal(v, load_file(new / WEIGHTS)[n]) for n, v in load_clip(copy / place).model.state_dict().items()
    )
    edited = replace_expert(copy, 0, other, force=True)
    assert (copy / edited.experts[0].folder / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    clusters = NewClusters(
        fine_centers=unit_rows(1, 8, 5), cards=({"size": 4, "keywords": [], "nearest_captions": ["a"]},), keywords=()
    )
    edited = add_expert(copy, copy / "expert-1", clusters, force=True)  # a model that is stored as a delta itself
    assert (copy / "expert-4" / DELTA).read_bytes() == (copy / "expert-1" / DELTA).read_bytes()
    check_files(edited)
    assert edited.num_experts == 5


def test_an_expert_of_a_bundle_is_a_model_like_any(bundle: Bundle, models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(find_model(f"{bundle.path}#expert-1", "merge"))
    assert folder == bundle.path / "expert-1"
    stored, full = ModelRef.of("one", folder), bundle.models[1]
    assert stored.digest == full.digest != bundle.models[0].digest
    assert stored.num_bytes == full.num_bytes
    check_alike({"one": folder, "two": models["expert-3"]})
    clips = [load_clip(models["seed"]) for _ in range(2)]
    average_into(clips[0], [folder, bundle.path / "expert-2"], [1.0, 3.0])
    average_into(clips[1], [models["expert-1"], models["expert-2"]], [1.0, 3.0])
    for name, value in clips[0].model.state_dict().items():
        assert torch.equal(value, clips[1].model.state_dict()[name])
    copy_model(folder, tmp_path / "alone")  # no seed beside it
    assert load_file(tmp_path / "alone" / WEIGHTS).keys() == load_file(models["expert-1"] / WEIGHTS).keys()


def rehash(bundle: Path, **fields: Any) -> None:
    """Write the manifest that the files of a bundle ask for."""
    manifest = json.loads((bundle / "mode.json").read_text())
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name not in {"mode.json", "lock"}]
    manifest["sha256"] = {str(p.relative_to(bundle)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (bundle / "mode.json").write_text(json.dumps(manifest | fields))


def change_delta(bundle: Path, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> None:
    path = bundle / "expert-1" / DELTA
    with safe_open(path, "pt") as file:
        about = file.metadata() | metadata
    save_file({**load_file(path), **(tensors or {})}, path, {name: value for name, value in about.items() if value})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap_seed(bundle: Path) -> None:
    weights = load_file(bundle / "seed" / WEIGHTS)
    save_file({name: value + 1 for name, value in weights.items()}, bundle / "seed" / WEIGHTS)


def change_config(bundle: Path) -> None:
    path = bundle / "expert-1" / "open_clip_config.json"
    path.write_text(path.read_text().replace("0.5", "0.4"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            swap_seed,
            r"delta\.safetensors belongs to a seed whose weights have the hash \w{12}, but those of .* have \w{12}",
        ),
        (lambda b: change_delta(b, {"visual.extra": torch.ones(2)}), r"holds 'visual\.extra', which its seed has not"),
        (
            lambda b: change_delta(b, {"logit_scale": torch.ones(2)}),
            r"shape of logit_scale in .* is \(2,\), expected \(\)",
        ),
        (lambda b: change_delta(b, seed_sha256=""), "does not say which seed it differs from"),
        (lambda b: change_delta(b, seed_sha256="../../etc"), "does not say which seed it differs from"),
        (
            lambda b: (b / "expert-1" / DELTA).write_bytes(b"x" * 40),
            r"delta\.safetensors is damaged and cannot be read",
        ),
        (lambda b: (b / "seed" / WEIGHTS).write_bytes(b"x" * 40), "belongs to a seed|seed: .* is damaged"),
        (change_config, "its open_clip_config.json differs from that of its seed"),
    ],
)
def test_deltas_that_do_not_fit_are_one_line(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    """Also where whoever made the bundle hashed the files as they are."""
    damage(copy)
    rehash(copy)
    for use in (
        lambda: ModelPool().get(load_bundle(copy).models[1]),
        lambda: load_clip(copy / "expert-1"),
        lambda: export_expert(load_bundle(copy), "expert-1", copy / "out"),
    ):
        with pytest.raises(ModeclipError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("again")
    assert not list(copy.glob("out*"))


def test_damage_is_found_by_the_hashes(copy: Path) -> None:
    opened = load_bundle(copy)
    flip(copy / "seed" / WEIGHTS)
    with pytest.raises(ModeclipError, match=rf"seed/{WEIGHTS} differs from its hash in the manifest"):
        ModelPool().get(opened.models[0])
    with pytest.raises(ModeclipError, match=rf"first seed/{WEIGHTS}; get the bundle again"):
        check_files(opened, "expert-0")
    check_files(opened, "expert-3")
    flip(copy / "seed" / WEIGHTS)
    flip(copy / "expert-0" / DELTA)
    with pytest.raises(ModeclipError, match=rf"expert-0/{DELTA} differs from its hash in the manifest"):
        ModelPool().get(opened.models[0])
    (copy / "seed" / WEIGHTS).unlink()
    with pytest.raises(ModeclipError, match=rf"missing or differ .*first seed/{WEIGHTS}"):
        load_bundle(copy)
    with pytest.raises(ModeclipError, match=rf"holds only what differs from its seed, and .*{WEIGHTS} is missing"):
        load_clip(copy / "expert-1")


def test_manifests_that_are_hostile(copy: Path) -> None:
    manifest = json.loads((copy / "mode.json").read_text())

    def refused(message: str, **fields: Any) -> None:
        (copy / "mode.json").write_text(json.dumps(manifest | fields))
        with pytest.raises(ModeclipError, match=message) as caught:
            load_bundle(copy)
        assert "\n" not in str(caught.value)

    digest = "0" * 64
    refused("expert-0/delta.safetensors is no file of format 3", format_version=3)
    both = manifest["sha256"] | {f"expert-0/{WEIGHTS}": digest}
    refused(f"names expert-0/{DELTA}, but expert-0 has all its weights", sha256=both)
    refused(
        f"names seed/{DELTA}, but seed has all its weights",
        sha256=manifest["sha256"] | {f"seed/{DELTA}": digest},
        experts=[manifest["experts"][0] | {"folder": "seed"}, *manifest["experts"][1:]],
    )
    without = {name: value for name, value in manifest["sha256"].items() if name != f"seed/{WEIGHTS}"}
    refused(f"has no hash of seed/{WEIGHTS}", sha256=without)
    nested = {name.replace("expert-0/", "expert-0/../expert-0/"): v for name, v in manifest["sha256"].items()}
    refused("which is not in the bundle", sha256=nested)


def test_formats_before_load_as_they_did(models: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("modeclip.models.deltas.LEAST_SHARED", 2.0)
    old = make_bundle(tmp_path / "old", models).path
    manifest = json.loads((old / "mode.json").read_text())
    for version in (1, 2, 3):
        (old / "mode.json").write_text(json.dumps(manifest | {"format_version": version}))
        opened = load_bundle(old)
        check_files(opened)
        assert torch.equal(
            ModelPool().get(opened.models[0]).model.visual.proj, load_file(models["expert-0"] / WEIGHTS)["visual.proj"]
        )

"""`modeclip export`: whole folders or none, what each format takes, and the model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml

from modeclip.adapting import exporting
from modeclip.adapting.exporting import ExportConfig, export
from modeclip.adapting.model_card import Score, write_card
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import copy_model, save_bundle
from modeclip.models.clip import load_clip, save_clip
from modeclip.models.deltas import is_delta
from modeclip.models.export import onnx as graphs
from support import make_clip_moe, weights_of


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a seed and two experts with random weights."""
    folder = tmp_path_factory.mktemp("exporting")
    for seed, name in enumerate(("seed", "expert-0", "expert-1")):
        save_clip(load_clip("modeclip-icon-xxxs", seed=seed), folder / name)
    save_bundle(
        folder / "bundle",
        models={name: folder / name for name in ("seed", "expert-0", "expert-1")},
        fine_centers=np.eye(2, 384, dtype=np.float32),
        expert_of_fine=np.arange(2),
        cards={
            "fine": [{"index": s, "size": 5, "keywords": ["a"], "nearest_captions": ["a"]} for s in range(2)],
            "experts": [{"index": k, "size": 5, "keywords": ["a"]} for k in range(2)],
        },
        manifest={
            "name": "two",
            "encoder": "minilm",
            "rule": "per_class",
            "temperature": 0.1,
            "templates": ["{}"],
            "lineage": {"jobs": {}, "recipe": {"data": {"source": "/home/me/secret/icons", "samples": 77}}},
        },
    )
    return folder / "bundle"


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_expert_becomes_a_folder_with_a_card(
    bundle: Path, tmp_path: Path, modeclip_command: Callable[..., object]
) -> None:
    out = tmp_path / "deep" / "expert"
    done = modeclip_command("export", f"{bundle}#expert-1", "--to", "open_clip", "--out", out, "--license", "cc-by-4.0")
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    assert weights_of(out) == weights_of(bundle / "expert-1")
    facts = json.loads((out / "export.json").read_text())
    assert set(facts["files"]) == files_in(out)
    assert facts["parity"]["image"]["max_abs"] < 1e-5
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (card["license"], card["library_name"]) == ("cc-by-4.0", "open_clip")
    assert "lineage.recipe.data.samples: 77" in text
    assert "secret" not in text
    again = export(f"{bundle}#expert-0", ExportConfig(to="open_clip"), out=out)  # in the place of the one before
    assert weights_of(again.folder) == weights_of(bundle / "expert-0")
    assert [path.name for path in out.parent.iterdir()] == ["expert"]


def test_an_expert_that_is_stored_as_a_difference_becomes_a_whole_folder(tmp_path: Path) -> None:
    clip = load_clip("modeclip-icon-xs", seed=0)
    save_clip(clip, tmp_path / "seed")
    with torch.no_grad():
        clip.model.visual.proj.add_(0.1)
    save_clip(clip, tmp_path / "full")
    (tmp_path / "bundle").mkdir()
    copy_model(tmp_path / "seed", tmp_path / "bundle" / "seed")
    copy_model(tmp_path / "full", tmp_path / "bundle" / "expert-0")
    assert is_delta(tmp_path / "bundle" / "expert-0")
    export(tmp_path / "bundle" / "expert-0", ExportConfig(to="open_clip"), out=tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "full")
    alone = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(alone.visual.proj, clip.model.visual.proj)


def test_other_folders_stay_as_they_are(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = ExportConfig(to="open_clip"), f"{bundle}#seed"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    with pytest.raises(ModeclipError, match=r"mine holds thesis\.txt, which no export has written; choose a new"):
        export(model, config, out=tmp_path / "mine")
    with pytest.raises(ModeclipError, match=r"is a file; choose a folder"):
        export(model, config, out=tmp_path / "mine/thesis.txt")
    with pytest.raises(ModeclipError, match=r"is the model itself"):
        export(bundle / "seed", config, out=bundle / "seed")
    first = export(model, config, out=tmp_path / "first")
    before = weights_of(first.folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError("the power is gone")

    monkeypatch.setattr(exporting, "write_card", fail)
    for out in ("first", "new"):
        with pytest.raises(OSError, match="power"):
            export(f"{bundle}#expert-0", config, out=tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "mine"]
    assert weights_of(first.folder) == before
    monkeypatch.undo()
    (tmp_path / "first/notes.txt").write_text("mine")
    with pytest.raises(ModeclipError, match=r"holds notes\.txt"):
        export(model, config, out=tmp_path / "first")


def test_what_no_format_takes_is_one_line(bundle: Path, tmp_path: Path) -> None:
    moe = make_clip_moe(tmp_path / "moe", num_experts=2, model="modeclip-icon-xxxs")
    for model, to, what in (
        (bundle, "hf", r"bundle of 2 models, which no hf folder holds; give one of them, .*#expert-0, or --to onnx"),
        (moe, "open_clip", r"CLIP-MoE, which open_clip has no layers for"),
        (moe, "hf", r"CLIP-MoE.*cannot express; export it to onnx"),
        ("ViT-B-32", "hf", r"names no weights"),
    ):
        with pytest.raises(ModeclipError, match=what):
            export(model, ExportConfig(to=to), out=tmp_path / "out")  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))
    for words, what in (
        ({"to": "hf", "int8": True}, r"int8: is for ONNX"),
        ({"to": "hf", "license": "a b"}, r"license: expected a name"),
    ):
        with pytest.raises(ModeclipError, match=what):
            ExportConfig(**words)  # type: ignore[arg-type]


def test_low_graphs_stay_only_where_they_are_faster(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def graph(*paths: Path) -> None:
        paths[-1].write_bytes(b"graph")

    def save(_: object, folder: Path, **__: object) -> list[graphs.Parity]:
        graph(folder / "image.onnx")
        graph(folder / "text.onnx")
        return [graphs.Parity(file=f"{tower}.onnx", max_abs=1e-7, min_cosine=1.0) for tower in ("image", "text")]

    def cannot(*_: object, **__: object) -> None:
        raise ModeclipError("ONNX Runtime cannot run it")

    monkeypatch.setattr(graphs, "save_onnx", save)
    monkeypatch.setattr(graphs, "quantize", graph)
    monkeypatch.setattr(graphs, "to_bfloat16", cannot)
    monkeypatch.setattr(graphs, "compare", lambda *_, **__: graphs.Parity(file="x", max_abs=0.01, min_cosine=0.99))
    monkeypatch.setattr(graphs, "speed_ratio", lambda _, path, *__, **___: 2.0 if "image" in path.name else 0.5)
    found = export(bundle, ExportConfig(to="onnx", int8=True, bf16=True), out=tmp_path / "onnx")
    assert [(low.tower, low.kind, low.kept) for low in found.graphs] == [
        ("image", "int8", True),
        ("text", "int8", False),
        ("image", "bf16", False),
        ("text", "bf16", False),
    ]
    assert found.graphs[1].reason == "0.50 times as fast as float32"
    assert {name for name in files_in(tmp_path / "onnx") if name.endswith(".onnx")} == {
        "image.onnx",
        "text.onnx",
        "image.int8.onnx",
    }
    assert found.experts == ("expert-0", "expert-1")
    assert len(found.logit_scale) == 2
    assert "`routing_weights` is (B, 2), for expert-0, expert-1" in (tmp_path / "onnx/README.md").read_text()


def test_card_has_results_as_the_hub_reads_them(tmp_path: Path) -> None:
    scores = [Score(task="lucide: a", metric="acc1", value=0.5, num_images=1000)]
    write_card(tmp_path, name="x", source=None, kind="onnx", usage="pass", license="other", scores=scores)
    _, head, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    (model,) = yaml.safe_load(head)["model-index"]
    assert model["results"][0]["metrics"] == [{"type": "acc1", "value": 0.5}]
    assert "| lucide: a | acc1 | 50.0 % | 1,000 |" in text
    assert "Not recorded" in text

"""A bundle is input: whatever its files say, nothing runs, nothing outside is read, and errors are one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

from modeclip.clustering.novelty import FineQuantiles
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources.options import DataConfig
from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import check_files, load_bundle, save_bundle
from modeclip.mixture.bundle_edits import replace_expert
from modeclip.mixture.extending import extend
from modeclip.mixture.mode import MoDE
from support import plain_png, write_pairs

TOWERS = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
OWN = """
from pathlib import Path
import numpy as np
Path(__file__).with_name("imported").touch()

class Lengths:
    dimension = 8

    def encode(self, texts):
        return np.array([[len(text)] + [1] * 7 for text in texts], np.float32)
"""


class Lengths:
    """An encoder that knows how long a text is."""

    name, dimension = "lengths", 8

    def encode(self, texts: list[str]) -> np.ndarray:
        rows = np.array([[len(text)] + [1.0] * 7 for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small whole bundle of two experts, one of which is there."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    for name in ("seed", "expert-0"):
        (folder / name).mkdir()
        save_tensors(open_clip.CLIP(**TOWERS).state_dict(), folder / name / "open_clip_model.safetensors")
        config = {"model_cfg": TOWERS, "preprocess_cfg": PREPROCESS}
        (folder / name / "open_clip_config.json").write_text(json.dumps(config))
    save_bundle(
        folder / "bundle",
        models={name: folder / name for name in ("seed", "expert-0")},
        fine_centers=np.eye(4, 8, dtype=np.float32),
        expert_of_fine=np.array([0, 0, 1, 1]),
        cards={
            "fine": [{"index": s, "size": 50, "keywords": ["a"], "nearest_captions": ["a"]} for s in range(4)],
            "experts": [{"index": k, "size": 100, "keywords": ["a"]} for k in range(2)],
        },
        manifest={
            "name": "test",
            "encoder": "minilm",
            "rule": "per_class",
            "temperature": 0.1,
            "templates": ["{}"],
            "lineage": {
                "catalog_fingerprint": "f",
                "jobs": {"seed": "s"},
                "versions": {"torch": "2"},
                "recipe": {"name": "test", "train": {"batch_size": 2}, "experts": {"budget": "matched"}},
                "stages": {"cluster": "c"},
                "edits": [
                    {"action": "replace", "expert": "expert-0", "date": "2026-01-01", "clustering": "c"}
                    | {"forced": False, "job": None, "modeclip": "1", "pairs": 3, "catalog": "icons"}
                ],
            },
        },
        fine_quantiles=FineQuantiles(levels=(0.5, 0.95, 0.99), distances=np.array([[0.1, 0.2, 0.3]] * 4, np.float32)),
    )
    return folder / "bundle"


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def manifest_of(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "mode.json").read_text())
    return content


def write(bundle: Path, manifest: Any) -> None:
    (bundle / "mode.json").write_text(json.dumps(manifest))


def change(bundle: Path, **fields: Any) -> None:
    write(bundle, manifest_of(bundle) | fields)


def put_file(bundle: Path, name: str, data: bytes) -> None:
    """Change a file of a bundle as whoever makes bundles can: with its hash."""
    (bundle / name).write_bytes(data)
    manifest = manifest_of(bundle)
    manifest["sha256"][name] = sha256(data).hexdigest()
    write(bundle, manifest)


def put_centres(bundle: Path, **changes: np.ndarray | None) -> None:
    arrays = load_file(bundle / "centres.safetensors") | changes
    save_file({k: v for k, v in arrays.items() if v is not None}, bundle / "centres.safetensors")
    put_file(bundle, "centres.safetensors", (bundle / "centres.safetensors").read_bytes())


# ---------------------------------------------------------------- code


def test_an_encoder_that_a_bundle_names_never_runs_by_itself(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_lengths.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    change(bundle, encoder="evil_lengths:Lengths")
    assert load_bundle(bundle).encoder == "evil_lengths:Lengths"  # it can be looked at
    for ask in (
        lambda: MoDE.load(bundle).route(["a"]),
        lambda: MoDE.load(bundle).task(["a"]),
        lambda: MoDE.load(bundle).per_image,
        lambda: MoDE.load(bundle).route_queries(["a"]),
    ):
        with pytest.raises(ModeclipError, match=r"Python code.*--encoder evil_lengths:Lengths.*trust_encoder=True"):
            ask()
    assert not (tmp_path / "imported").exists()
    expected = MoDE.load(bundle, encoder=Lengths()).route(["a", "bb"]).weights
    assert not (tmp_path / "imported").exists()
    for mode in (MoDE.load(bundle, encoder="evil_lengths:Lengths"), MoDE.load(bundle, trust_encoder=True)):
        np.testing.assert_array_equal(mode.route(["a", "bb"]).weights, expected)
    assert (tmp_path / "imported").exists()


def test_commands_take_the_encoder_from_the_command_line_alone(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modeclip_command: Callable[..., Any]
) -> None:
    (tmp_path / "evil_words.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    change(bundle, encoder="evil_words:Lengths")
    refused = modeclip_command("route", bundle, "--classes", "a,bb")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--encoder evil_words:Lengths" in refused.stderr
    assert not (tmp_path / "imported").exists()
    done = modeclip_command("route", bundle, "--classes", "a,bb", "--encoder", "evil_words:Lengths", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["classes"]) == 2


def test_evaluate_assign_extend_and_run_need_the_name_too(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modeclip_command: Callable[..., Any]
) -> None:
    """What a bundle or a recipe names as encoder leaves its mark only where --encoder names it as well."""
    (tmp_path / "evil_code.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    change(bundle, encoder="evil_code:Lengths")
    for name in ("cat", "dog"):
        (tmp_path / "task" / name).mkdir(parents=True)
        (tmp_path / "task" / name / "1.png").write_bytes(plain_png(9))
    write_pairs(tmp_path / "pairs", [plain_png(shade) for shade in range(4)], ["a cat", "a dog", "a bird", "fish"])
    catalog = tmp_path / "catalog"
    assert modeclip_command("index", tmp_path / "pairs", "--out", catalog).returncode == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{source: {tmp_path / 'pairs'}}}\nembed: {{encoder: 'evil_code:Lengths'}}\n")
    commands: list[tuple[object, ...]] = [
        ("evaluate", bundle, "--tasks", tmp_path / "task", "--out", tmp_path / "results"),
        ("assign", catalog, "--bundle", bundle),
        ("extend", bundle, catalog, "--out", tmp_path / "extended", "--new"),
        ("run", recipe, "--out", tmp_path / "run"),
    ]
    for words in commands:
        refused = modeclip_command(*words)
        assert refused.returncode == 2, refused.stderr
        assert "--encoder evil_code:Lengths" in refused.stderr.splitlines()[-1], words[0]
        assert not (tmp_path / "imported").exists(), words[0]
    assert not (tmp_path / "run").exists()
    for words in commands[:2]:
        done = modeclip_command(*words, "--encoder", "evil_code:Lengths", "--json")
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
    assert (tmp_path / "imported").exists()
    result = json.loads((tmp_path / "results" / "results.jsonl").read_text().splitlines()[0])
    assert "out_of_domain" in json.dumps(result)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("place", ["../outside", "/absolute", "expert-0/../../outside", "expert-0\\..", "a/b", "", "."])
def test_no_folder_outside_of_the_bundle_is_loaded(bundle: Path, place: str) -> None:
    shutil.copytree(bundle / "expert-0", bundle.parent / "outside")
    manifest = manifest_of(bundle)
    manifest["experts"][0]["folder"] = place
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        manifest["sha256"][f"{place}/{file}"] = manifest["sha256"][f"expert-0/{file}"]
    write(bundle, manifest)
    with pytest.raises(ModeclipError, match=r"not in the bundle|a folder of the bundle"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["expert-0/open_clip_model.safetensors", "expert-0", "centres.safetensors", "mode.json"]
)
def test_no_link_leaves_the_bundle(bundle: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    shutil.move(bundle / name, outside)
    (bundle / name).symlink_to(outside)
    with pytest.raises(ModeclipError, match="link that leaves the bundle"):
        load_bundle(bundle)


def test_links_inside_a_bundle_and_those_of_the_hubs_cache_are_followed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "centres.safetensors").rename(bundle / "kept.safetensors")
    (bundle / "centres.safetensors").symlink_to("kept.safetensors")
    assert load_bundle(bundle).num_experts == 2
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(bundle, snapshot)
    for number, file in enumerate([path for path in sorted(snapshot.rglob("*")) if path.is_file()]):
        shutil.copyfile(file, blobs / str(number))
        file.unlink()
        file.symlink_to(blobs / str(number))
    check_files(load_bundle(snapshot))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "evil.py", "weights.pt", "tokenizer.pkl", "x.npy"])
@pytest.mark.parametrize("is_listed", [True, False])
def test_a_models_folder_has_settings_and_safetensors_alone(bundle: Path, name: str, is_listed: bool) -> None:
    place = f"expert-0/{name}"
    (bundle / place).write_bytes(b"import os")
    if is_listed:
        put_file(bundle, place, b"import os")
    with pytest.raises(ModeclipError, match=rf"{name}.*(safetensors alone|remove it)"):
        load_bundle(bundle)


def test_a_file_without_a_hash_is_refused(bundle: Path) -> None:
    for name in ("centres.safetensors", "clusters.json", "expert-0/open_clip_model.safetensors"):
        manifest = manifest_of(bundle)
        del manifest["sha256"][name]
        changed = bundle.with_name("changed")
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(bundle, changed)
        write(changed, manifest)
        with pytest.raises(ModeclipError, match=f"no hash of {name}"):
            load_bundle(changed)
    change(bundle, sha256={})
    with pytest.raises(ModeclipError, match="no hash of"):
        load_bundle(bundle)


# ---------------------------------------------------------------- mode.json


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 5}, r"format 5 is newer than this modeclip reads \(4\); upgrade"),
        ({"format_version": 10**30}, r"newer than this modeclip reads \(4\); upgrade"),
        ({"format_version": "2"}, "format_version: expected a whole number of 1 to 4, got '2'"),
        ({"format_version": 2.0}, "format_version: expected a whole number of 1 to 4, got 2.0"),
        ({"format_version": True}, "format_version: expected a whole number"),
        ({"format_version": 0}, "format_version: expected a whole number of 1 to 4, got 0"),
        ({"encoder": 3}, "encoder: .*string, got 3"),
        ({"encoder": ""}, "encoder: expected a name"),
        ({"encoder": "tfidf:../encoder"}, "encoder: expected tfidf:encoder"),
        ({"rule": "best"}, "unknown rule 'best'; known: paper"),
        ({"temperature": 0}, "temperature: expected a finite number above 0, got 0"),
        ({"temperature": "0.1"}, "temperature: .*number, got '0.1'"),
        ({"temperature": None}, "temperature: .*number"),
        ({"temperature": True}, "temperature: .*number"),
        ({"templates": []}, "templates: expected one or more"),
        ({"templates": ["a photo"]}, "templates: template 'a photo' has no {}"),
        ({"templates": "{}"}, "templates: "),
        ({"templates": ["{}\x1b[2J"]}, "control character"),
        ({"templates": ["{}\ud800"]}, "control character"),
        ({"name": "a\nb"}, "control character"),
        ({"experts": []}, "experts: expected one or more"),
        ({"experts": {}}, "experts: "),
        ({"surprise": 1}, "surprise: is no field of this format"),
        ({"lineage": []}, "lineage: "),
        ({"lineage": {"from": "mars"}}, "lineage.from: is no field"),
        ({"lineage": {"jobs": ["a"]}}, "lineage.jobs: "),
        ({"lineage": {"recipe": {"experts": "none"}}}, "lineage.recipe.experts: "),
        ({"lineage": {"edits": [{"action": "add"}]}}, "lineage.edits.0.expert: is missing"),
        ({"files": {"centres": "../centres.safetensors"}}, "not in the bundle"),
        ({"files": {"centres": "centres.pt"}}, "expected a file .safetensors"),
        ({"sha256": {"a.json": "0"}}, "64 hexadecimal digits for a.json"),
        ({"sha256": {"../a.json": "0" * 64}}, r"'\.\./a\.json', which is not in the bundle"),
    ],
)
def test_what_a_manifest_may_not_say(bundle: Path, fields: dict[str, Any], message: str) -> None:
    change(bundle, **fields)
    with pytest.raises(ModeclipError, match=message) as caught:
        load_bundle(bundle)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": -1}, "size: expected 0 to"),
        ({"size": 1.5}, "experts.0.size: "),
        ({"size": 10**40}, "size: expected 0 to .*a huge number"),
        ({"color": "red"}, "experts.0.color: is no field"),
        ({"name": "expert-1"}, "expert-1 is there twice"),
        ({"name": "seed"}, "expected an expert's name"),
        ({"keywords": "word"}, "experts.0.keywords: "),
        ({"keywords": [1]}, "experts.0.keywords.0: "),
        ({"keywords": ["\x07"]}, "control character"),
    ],
)
def test_what_an_expert_may_not_be(bundle: Path, changes: dict[str, Any], message: str) -> None:
    manifest = manifest_of(bundle)
    manifest["experts"][0] |= changes
    write(bundle, manifest)
    with pytest.raises(ModeclipError, match=message):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe{", "cannot be read"),
        (b"[" * 100_000, "cannot be read|deeper"),
        (b'{"format_version": 2, "lineage": ' + b'{"a":' * 200 + b"1" + b"}" * 201, "deeper than 32"),
        (b'{"format_version": NaN}', "NaN is no number"),
        (b'{"format_version": 2, "format_version": 2}', "'format_version' is there twice"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"3", "expected an object, got int"),
    ],
)
def test_what_is_no_manifest(bundle: Path, text: bytes, message: str) -> None:
    (bundle / "mode.json").write_bytes(text)
    with pytest.raises(ModeclipError, match=message):
        load_bundle(bundle)


# ---------------------------------------------------------------- centres and cards


NEAR: dict[str, Any] = {
    "near_captions": np.ones((5, 8), np.int8),
    "near_scale": np.array([0.01]),
    "near_levels": np.array([0.5, 0.95]),
    "near_distances": np.array([[0.1, 0.2]], np.float32),
}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"fine_centers": np.eye(3, 8, dtype=np.float32)}, "expected an expert of 0 to 1 for each of 3"),
        ({"fine_centers": np.full((4, 8), np.nan, np.float32)}, "finite numbers"),
        ({"fine_centers": np.zeros((4, 8), np.float64)}, "expected expert_of_fine, fine_centers"),
        ({"fine_centers": np.zeros(4, np.float32)}, "a matrix of finite numbers"),
        ({"fine_centers": None}, "expected expert_of_fine, fine_centers"),
        ({"expert_of_fine": np.array([0, 0, 1, 2])}, "expected an expert of 0 to 1"),
        ({"expert_of_fine": np.array([0, 0, 1, -1])}, "expected an expert of 0 to 1"),
        ({"more": np.zeros(1)}, "holds .*'more'"),
        ({"quantile_levels": np.array([0.95, 0.5, 0.99])}, "quantiles that do not ascend"),
        ({"quantile_levels": np.array([0.5, 0.9, 1.5])}, "quantiles that do not ascend"),
        ({"fine_quantiles": np.ones((3, 3), np.float32)}, "quantiles of shape"),
        ({"fine_quantiles": np.array([[0.2, 0.1, 0.3]] * 4, np.float32)}, "quantiles that do not ascend"),
        ({"near_captions": np.ones((5, 8), np.int8)}, "holds .*'near_captions'"),
        (NEAR | {"near_captions": np.ones((5, 7), np.int8)}, "captions of shape"),
        (NEAR | {"near_captions": np.ones((0, 8), np.int8)}, "captions of shape"),
        (NEAR | {"near_captions": np.ones((5, 8), np.uint8)}, "holds .*'near_captions'"),
        (NEAR | {"near_scale": np.array([np.nan])}, "a scale of the captions"),
        (NEAR | {"near_scale": np.ones(2)}, "a scale of the captions"),
        (NEAR | {"near_distances": np.array([[0.2, 0.1]], np.float32)}, "quantiles that do not ascend"),
        (NEAR | {"near_distances": np.ones((2, 2), np.float32)}, "quantiles of shape"),
    ],
)
def test_centres_fit_the_experts_and_each_other(bundle: Path, arrays: dict[str, Any], message: str) -> None:
    put_centres(bundle, **arrays)
    with pytest.raises(ModeclipError, match=message):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "has 0 cards, expected one for each of 4"),
        (b"{}", r"clusters\.json: damaged"),
        (b"[1, 2, 3, 4]", "no nearest_captions, a list of texts, for cluster 0"),
        (b'[{"nearest_captions": [1]}]', "no nearest_captions"),
        (b"\xff", r"clusters\.json: damaged"),
        (b"[" * 100_000, r"clusters\.json: damaged"),
    ],
)
def test_cards_are_those_of_the_centres(bundle: Path, text: bytes, message: str) -> None:
    put_file(bundle, "clusters.json", text)
    with pytest.raises(ModeclipError, match=message):
        load_bundle(bundle)


def test_centres_of_another_size_than_the_encoders_are_refused(bundle: Path) -> None:
    put_centres(bundle, fine_centers=np.eye(4, 7, dtype=np.float32))
    with pytest.raises(ModeclipError, match=r"centres have 7 dimensions, the encoder lengths has 8"):
        MoDE.load(bundle, encoder=Lengths()).route(["a"])


def test_bytes_that_are_no_safetensors_are_refused(bundle: Path) -> None:
    for data in (b"", b"\xff" * 100, (10**15).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"{}"):
        put_file(bundle, "centres.safetensors", data)
        with pytest.raises(ModeclipError, match=r"centres\.safetensors (cannot be read|holds nothing)"):
            load_bundle(bundle)


# ---------------------------------------------------------------- anything

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "seed", "expert-0", "[/bold]", "\x1b[2J", "tfidf:encoder", "os:system"])
    | st.sampled_from([10**400, -1, 1e308, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places_of(content: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every value of nested JSON."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place, *(found for key, value in parts for found in places_of(value, (*place, key)))]


def problem_of(folder: Path) -> str:
    """Do with a bundle what the commands do; return what it is refused for."""
    try:
        opened = load_bundle(folder)
        mode = MoDE.load(folder, encoder=Lengths())
        mode.route(["a", "bb"]).explain()
        mode.task(["a", "bb"])
        for edit in opened.edits:
            assert f"{edit['date']} {edit['action']} {edit['expert']} {edit['job']} {edit['forced']}"
        assert isinstance(opened.job_digest("expert-0"), str | None)
    except ModeclipError as error:
        return str(error)
    return ""


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_manifest_gives_a_traceback(original: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(original, folder)
    whole = manifest_of(original)
    changed = copy.deepcopy(whole)
    place = data.draw(st.sampled_from(places_of(whole)))
    value = data.draw(JSON)
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if not place:
        changed = value
    else:
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        if action == "remove":
            del parent[place[-1]]
        elif action == "replace" or not isinstance(parent, dict):
            parent[place[-1]] = value
        else:
            parent[data.draw(st.text(max_size=8))] = value
    write(folder, changed)
    problem = problem_of(folder)
    assert "\n" not in problem
    assert len(problem) < 1500


@given(start=st.integers(0, 3000), junk=st.binary(max_size=12), cut=st.booleans())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@pytest.mark.parametrize("name", ["mode.json", "clusters.json", "centres.safetensors"])
def test_no_bytes_give_a_traceback(
    original: Path, tmp_path: Path, name: str, start: int, junk: bytes, cut: bool
) -> None:
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(original, folder)
    for file in ("mode.json", "clusters.json", "centres.safetensors"):
        shutil.copyfile(original / file, folder / file)
    data = (folder / name).read_bytes()
    start %= len(data)
    changed = data[:start] + junk + (b"" if cut else data[start + len(junk) :])
    if name == "mode.json":
        (folder / name).write_bytes(changed)
    else:
        put_file(folder, name, changed)
    assert "\n" not in problem_of(folder)


def test_weights_whose_scale_is_no_number_are_refused(bundle: Path) -> None:
    weights = load_file(bundle / "expert-0" / "open_clip_model.safetensors")
    save_file(weights | {"logit_scale": np.zeros(2, np.float32)}, bundle / "expert-0" / "open_clip_model.safetensors")
    put_file(
        bundle,
        "expert-0/open_clip_model.safetensors",
        (bundle / "expert-0" / "open_clip_model.safetensors").read_bytes(),
    )
    with pytest.raises(ModeclipError, match=r"open_clip_model\.safetensors cannot be read.*get the model again"):
        MoDE.load(bundle, encoder=Lengths()).task(["a"])


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b'{"action": "new"}', b'{"action": "delete", "expert": 0}'])
def test_a_damaged_plan_of_an_extension_is_one_line(bundle: Path, tmp_path: Path, text: bytes) -> None:
    write_pairs(tmp_path / "pairs", [plain_png(1), plain_png(2)], ["a", "b"])
    index(DataConfig(source=str(tmp_path / "pairs")), tmp_path / "catalog")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "extend.json").write_bytes(text)
    with pytest.raises(ModeclipError, match=r"extend\.json: damaged.*another --out"):
        extend(bundle, Catalog.open(tmp_path / "catalog"), tmp_path / "out")


def test_an_edit_of_a_bundle_that_lies_is_refused(bundle: Path) -> None:
    change(bundle, lineage={"edits": [3]})
    with pytest.raises(ModeclipError, match=r"lineage\.edits\.0"):
        replace_expert(bundle, 1, bundle / "expert-0", force=True)

"""Features: what open_clip alone computes, decoded once, kept by content, never another model's."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Int
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from modeclip.errors import ModeclipError
from modeclip.mixture.bundle import load_bundle
from modeclip.models.clip import load_clip, save_clip
from modeclip.models.feature_cache import FeatureCache, hash_texts
from modeclip.models.features import (
    CachedEncoder,
    class_features,
    encoder_identity,
    image_features,
    missing_images,
    prompt_features,
    text_features,
)
from modeclip.models.pool import ModelPool, ModelRef
from support import python

WEIGHTS = "open_clip_model.safetensors"
NAMES = ["arrow", "a red heart with a very long name", "star"]
PROMPTS = [[name, f"a {name}."] for name in NAMES]


@dataclass(eq=False)
class Pictures:
    """Random pictures that count how often each is read."""

    seed: int = 0
    size: tuple[int, int] = (32, 32)
    count: int = 11
    reads: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        shape = (self.count, *self.size, 3)
        self.pixels = draw.integers(0, 256, shape, dtype=np.uint8)
        self.reads = np.zeros(self.count, int)

    @property
    def digest(self) -> str:
        return sha256(self.pixels.tobytes()).hexdigest()

    def digests(self) -> list[bytes]:
        return [sha256(pixels.tobytes()).digest() for pixels in self.pixels]

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Int[np.ndarray, " b"]) -> list[Image.Image]:
        self.reads[rows] += 1
        return [Image.fromarray(self.pixels[row]) for row in rows]

    def keys(self) -> list[str]:
        return [str(row) for row in range(self.count)]


@contextmanager
def counting() -> Iterator[list[nn.Module]]:
    """Collect every transformer that runs, of whatever model."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, *_: object) -> None:
        if type(module).__name__ in {"Transformer", "SentenceBert"}:
            ran.append(module)

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        yield ran
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models: two that differ in weights, and one that prepares its pictures in another way."""
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        clip = load_clip("modeclip-icon", seed=seed)
        if seed == 2:
            clip.config["preprocess_cfg"] = {**clip.config["preprocess_cfg"], "mean": [0.1] * 3, "std": [0.9] * 3}
            (root / "2").mkdir()
            save_file(clip.model.state_dict(), root / "2" / WEIGHTS)
            (root / "2" / "open_clip_config.json").write_text(json.dumps(clip.config))
        else:
            save_clip(clip, root / str(seed))
    return [root / str(seed) for seed in range(3)]


@pytest.fixture
def sources(folders: list[Path]) -> list[ModelRef]:
    return [ModelRef.of(folder.name, folder) for folder in folders]


def alone(folder: Path, pictures: Pictures) -> np.ndarray:
    """Encode pictures one by one with nothing but open_clip."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        rows = [
            model.encode_image(preprocess(picture)[None], normalize=True)
            for picture in pictures.read(np.arange(len(pictures)))
        ]
    return torch.cat(rows).numpy()


def test_a_folder_is_made_with_its_first_file(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features")
    assert not cache.has("some", 2)
    assert not cache.folder.exists()
    with cache.writer("some", 2) as write:
        write(slice(0, 2), np.eye(2, dtype=np.float32))
    assert cache.read("some", 2).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("size", [(32, 32), (50, 40)])
@pytest.mark.parametrize("batch_size", [4, 100])
def test_images_are_what_open_clip_alone_makes_of_them(
    folders: list[Path], sources: list[ModelRef], size: tuple[int, int], batch_size: int
) -> None:
    pictures = Pictures(size=size)
    found = image_features([*sources, sources[0]], pictures, FeatureCache(), batch_size=batch_size)
    assert (pictures.reads == 1).all(), "one pass for three models and two preprocessings"
    assert len({source.preprocess for source in sources}) == 2
    for folder, vectors in zip([*folders, folders[0]], found, strict=True):
        np.testing.assert_allclose(vectors, alone(folder, pictures), atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert vectors.dtype == np.float32


def test_second_call_runs_nothing_and_a_new_model_only_itself(sources: list[ModelRef], tmp_path: Path) -> None:
    pictures = Pictures()
    with counting() as ran:
        first = image_features(sources[:2], pictures, FeatureCache(tmp_path))
        texts = text_features(sources[:2], NAMES, FeatureCache(tmp_path))
        classes = prompt_features(sources[:2], PROMPTS, FeatureCache(tmp_path))
    assert len(ran) == 2 * (1 + 1 + 1), "a batch of images, of texts and of prompts for each model"
    with counting() as ran:
        cache = FeatureCache(tmp_path)
        again = image_features(sources[:2], pictures, cache)
        assert not missing_images(sources[:2], pictures, cache)
        for one, other in zip(
            [*first, *texts, *classes],
            [
                *again,
                *text_features(sources[:2], NAMES, cache),
                *prompt_features(sources[:2], PROMPTS, cache),
            ],
            strict=True,
        ):
            assert np.array_equal(one, other)
    assert not ran
    assert (pictures.reads == 1).all()
    assert [source.name for source in missing_images(sources, pictures, cache)] == ["2"]
    with counting() as ran:
        image_features(sources, pictures, cache)
    assert len(ran) == 1


@pytest.mark.parametrize("change", ["weight", "settings", "pictures", "precision", "order of texts"])
def test_other_content_never_meets_old_vectors(folders: list[Path], tmp_path: Path, change: str) -> None:
    """A single number of a model folder is changed in place; its name, size and time stay."""
    folder, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(folders[0], folder)
    pictures, precision, names = Pictures(), "32-true", list(NAMES)
    before = ModelRef.of("model", folder)
    old = (
        image_features([before], pictures, FeatureCache(cache))[0],
        text_features([before], names, FeatureCache(cache))[0],
    )
    if change == "weight":
        tensors = load_file(folder / WEIGHTS)
        for name in ("visual.proj", "text_projection"):
            tensors[name].view(-1)[0] += 0.5
        save_file(tensors, folder / WEIGHTS)
    elif change == "settings":
        config = folder / "open_clip_config.json"
        content = json.loads(config.read_text())
        content["preprocess_cfg"]["mean"] = [0.3, 0.4, 0.5]
        config.write_text(json.dumps(content))
    elif change == "pictures":
        pictures = Pictures(seed=1)
    elif change == "precision":
        precision = "bf16-mixed"
    else:
        names = names[::-1]
    source = ModelRef.of("model", folder)
    assert (source.digest != before.digest) == (change in {"weight", "settings"})
    again = FeatureCache(cache)
    new = image_features([source], pictures, again, precision=precision)[0]
    fresh = image_features([source], pictures, FeatureCache(), precision=precision)[0]
    assert np.array_equal(new, fresh)
    assert np.array_equal(new, old[0]) == (change == "order of texts")
    words = text_features([source], names, again, precision=precision)[0]
    assert np.array_equal(words, text_features([source], names, FeatureCache(), precision=precision)[0])
    assert np.array_equal(words, old[1]) == (change in {"pictures"}) or change == "settings"


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "other rows", "text"])
def test_damaged_file_is_made_again(sources: list[ModelRef], tmp_path: Path, harm: str) -> None:
    pictures = Pictures()
    whole = image_features(sources[:1], pictures, FeatureCache(tmp_path))[0].copy()
    [path] = tmp_path.glob("images-*.npy")
    content = bytearray(path.read_bytes())
    if harm == "flipped":
        content[200] ^= 1
    harmed = {
        "cut": content[:-40],
        "flipped": content,
        "empty": b"",
        "other rows": content[:-64] + content[-32:],
        "text": b"not numpy",
    }
    path.write_bytes(bytes(harmed[harm]))
    cache = FeatureCache(tmp_path)
    assert [source.name for source in missing_images(sources[:1], pictures, cache)] == ["0"]
    assert np.array_equal(image_features(sources[:1], pictures, cache)[0], whole)
    assert (pictures.reads == 2).all()


def test_failed_pass_leaves_nothing(sources: list[ModelRef], tmp_path: Path) -> None:
    class Broken(Pictures):
        def read(self, rows: Int[np.ndarray, " b"]) -> list[Image.Image]:
            if rows[0] >= 8:
                raise ModeclipError("image 8 is damaged")
            return super().read(rows)

    with pytest.raises(ModeclipError, match="image 8 is damaged"):
        image_features(sources, Broken(), FeatureCache(tmp_path), batch_size=4)
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, os, signal
import numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_features import Pictures
from modeclip.models.feature_cache import FeatureCache
from modeclip.models.features import image_features
from modeclip.models.pool import ModelRef
class Deadly(Pictures):
    def read(self, rows):
        if rows[0] >= 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(rows)
source, cache = ModelRef.of("m", sys.argv[1]), FeatureCache(Path(sys.argv[2]))
image_features([source], Pictures(seed=5), cache)
image_features([source], Deadly(), cache, batch_size=4)
"""


@pytest.mark.slow
def test_killed_pass_is_not_taken_for_whole(folders: list[Path], sources: list[ModelRef], tmp_path: Path) -> None:
    assert python("-c", KILLED, folders[0], tmp_path, Path(__file__).parent).returncode == -9
    assert len(list(tmp_path.glob("*.part"))) == 1
    cache, pictures = FeatureCache(tmp_path), Pictures()
    assert not missing_images(sources[:1], Pictures(seed=5), cache), "the pass before is kept"
    found = image_features(sources[:1], pictures, cache)[0]
    np.testing.assert_allclose(found, alone(folders[0], Pictures()), atol=2e-6)


def test_as_many_models_as_allowed_are_in_memory(sources: list[ModelRef]) -> None:
    pictures, cache = Pictures(), FeatureCache(pool=ModelPool(2))
    few = image_features(sources, pictures, cache)
    assert (pictures.reads == 2).all(), "two passes, of two models and of one"
    assert len(cache.pool) <= 2
    text_features(sources, NAMES, cache)
    assert len(cache.pool) <= 2
    for one, other in zip(few, image_features(sources, pictures, FeatureCache()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(ModeclipError, match="max_models: expected at least 1 model, got 0"):
        ModelPool(0)


def test_texts_in_any_order_and_length(folders: list[Path], sources: list[ModelRef]) -> None:
    texts = [f"{'long ' * (n % 40)}icon {n}" for n in range(600)]
    [found] = text_features(sources[:1], texts, FeatureCache())
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folders[0]}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folders[0]}")
    chosen = [0, 1, 39, 40, 333, 599]
    with torch.no_grad():
        expected = model.eval().encode_text(tokenizer([texts[n] for n in chosen]), normalize=True).numpy()
    np.testing.assert_allclose(found[chosen], expected, atol=2e-6)


def test_classes_are_the_mean_of_their_prompts(sources: list[ModelRef]) -> None:
    cache, templates = FeatureCache(), ["{}", "a photo of a {}.", "my {} and a {}"]
    [found] = prompt_features(sources[:1], [[t.replace("{}", n) for t in templates] for n in NAMES], cache)
    clip = load_clip(sources[0].spec)
    clip.model.eval()
    np.testing.assert_allclose(found, class_features(clip, NAMES, templates).numpy(), atol=2e-6)
    single = text_features(sources[:1], [t.replace("{}", NAMES[1]) for t in templates], cache)[0]
    mean = single.sum(0) / np.linalg.norm(single.sum(0))
    np.testing.assert_allclose(found[1], mean, atol=2e-6)
    own = prompt_features(sources[:1], [["arrow"], ["a heart", "my heart"]], cache)[0]
    np.testing.assert_allclose(own[0], text_features(sources[:1], ["arrow"], cache)[0][0], atol=2e-6)
    pair = text_features(sources[:1], ["a heart", "my heart"], cache)[0].sum(0)
    np.testing.assert_allclose(own[1], pair / np.linalg.norm(pair), atol=2e-6)


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_hash_of_texts_tells_lists_apart(one: list[str], other: list[str]) -> None:
    one, other = ([text.encode(errors="replace").decode() for text in texts] for texts in (one, other))
    assert (hash_texts(one) == hash_texts(other)) == (one == other)


def test_source_is_the_same_wherever_its_files_lie(small_run: Path) -> None:
    bundle = load_bundle(small_run / "bundle")
    inside = bundle.model_ref("expert-0", "expert")
    outside = ModelRef.of("expert", small_run / "models" / "expert-0")
    assert inside.digest == outside.digest == ModelRef.of("x", f"local-dir:{small_run / 'bundle' / 'expert-0'}").digest
    assert inside.preprocess == outside.preprocess
    assert inside.digest != bundle.model_ref("seed").digest
    named = ModelRef.of("random", "modeclip-icon", seed=0)
    assert named.digest == ModelRef.of("again", "modeclip-icon", seed=0).digest != inside.digest


def test_many_names_are_embedded_part_by_part(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(small_run / "bundle")
    encoder = CachedEncoder(bundle.encoder, bundle.fine_centers.shape[1], FeatureCache(tmp_path))
    whole = encoder._encoder.encode(NAMES)
    asked: list[int] = []
    encode = encoder._encoder.encode
    monkeypatch.setattr(encoder._encoder, "encode", lambda texts: asked.append(len(texts)) or encode(texts))
    monkeypatch.setattr("modeclip.models.features.ENCODED_AT_ONCE", 2)
    assert np.array_equal(encoder.encode(NAMES), whole)
    assert asked == [2, 1]


def test_full_disk_is_met_before_vectors_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a file are taken at its first vectors, since a mapped file cannot say that a disk is full."""
    cache = FeatureCache(tmp_path)
    rows = np.zeros((1000, 256), np.float32)
    with cache.writer("k", len(rows)) as write:
        write(slice(0, 1), rows[:1])
        [part] = tmp_path.glob("*.part")
        assert part.stat().st_blocks * 512 >= rows.nbytes

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ModeclipError, match="disk full while writing"), cache.writer("l", len(rows)) as write:
        write(slice(0, 1), rows[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["k.npy"]


def test_names_are_embedded_once(small_run: Path, tmp_path: Path) -> None:
    bundle = load_bundle(small_run / "bundle")
    dimension = bundle.fine_centers.shape[1]
    with counting() as ran:
        first = CachedEncoder(bundle.encoder, dimension, FeatureCache(tmp_path)).encode(NAMES)
    assert first.shape == (3, dimension)
    assert ran
    again = CachedEncoder(bundle.encoder, dimension, FeatureCache(tmp_path))
    with counting() as ran:
        assert np.array_equal(again.encode(NAMES), first)
    assert not ran
    assert "_encoder" not in vars(again), "nothing was loaded"
    assert encoder_identity("tests.some:Encoder") is None
    seed = f"clip:{small_run / 'bundle' / 'seed'}"
    assert encoder_identity(seed) == encoder_identity(seed) != encoder_identity("minilm")


def test_cache_that_is_cleaned_and_one_that_is_temporary(sources: list[ModelRef], tmp_path: Path) -> None:
    image_features(sources, Pictures(), FeatureCache(tmp_path))
    cache = FeatureCache(tmp_path)
    image_features(sources[:1], Pictures(), cache)
    cache.remove_unused()
    assert len(list(tmp_path.iterdir())) == 1
    temporary = FeatureCache()
    folder = temporary.folder
    image_features(sources[:1], Pictures(), temporary)
    assert list(folder.iterdir())
    del temporary
    assert not folder.exists()


def test_what_cannot_be_encoded(sources: list[ModelRef]) -> None:
    with pytest.raises(ModeclipError, match="expected at least 1 image, got none"):
        image_features(sources, Pictures(count=0), FeatureCache())
    with pytest.raises(ModeclipError, match="unknown precision '64-true'; known: auto, 32-true"):
        image_features(sources, Pictures(), FeatureCache(), precision="64-true")
    with pytest.raises(ModeclipError, match="device: expected auto, cpu, cuda or cuda:1, got 'tpux'"):
        image_features(sources, Pictures(), FeatureCache(), device="tpux")


def test_low_precision_is_near_and_of_unit_norm(sources: list[ModelRef]) -> None:
    cache, pictures = FeatureCache(), Pictures()
    exact, low = (image_features(sources[:1], pictures, cache, precision=p)[0] for p in ("32-true", "bf16-mixed"))
    assert not np.array_equal(exact, low)
    assert np.vecdot(exact, low).min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(low, axis=1), 1, atol=1e-6)

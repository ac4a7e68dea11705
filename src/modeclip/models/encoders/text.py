"""Encoders of texts: sentence-transformers models, SimCSE, TF-IDF and model2vec turn captions into unit vectors.

Transformers tokenize texts by thousands and run them in batches of one length, so that nothing is padded, and of a
fixed number of rows: a vector depends on its own text alone, bit for bit. The transformer runs in bfloat16 where the
processor has it; pooling and what follows stay in float32.

TF-IDF counts words and the character n-grams inside them, weighs each by how few captions have it, and a truncated SVD
of a sample's counts makes vectors of a stated dimension. What was fitted is a folder of two files, without pickles;
``tfidf:FOLDER`` makes the same encoder again, for class names at routing time.

Source: Sentence-BERT (arXiv 1908.10084) for pooling as the model's folder says; SimCSE (Gao et al., arXiv 2104.08821),
whose own tool cuts texts after 128 tokens, as we do; latent semantic analysis (Deerwester et al. 1990), here as the
contrast of MoDE (arXiv 2404.16030) Fig. 6; model2vec: static embeddings distilled from a sentence encoder, averaged
over a text's tokens.
Price: one pass of the encoder over the texts; memory for the model, one batch a thread, and the tokens of
`TOKENIZED_AT_ONCE` texts. Fitting TF-IDF holds the counts of the sample; its folder takes up to 4 D bytes a term, 67 MB
at 256 dimensions. ``benchmarks/embed.py`` compares with `SentenceTransformer.encode`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from modeclip.errors import ModeclipError
from modeclip.models.encoders.hub import (
    check_vectors,
    first_line,
    hub_folder,
    in_batches,
    in_bfloat16,
    loading,
    local_folder,
    need,
    unit_rows,
)
from modeclip.models.settings import check_links, check_sentence_folder, check_static_folder, check_transformer_folder
from modeclip.system.devices import choose_device
from modeclip.system.files import hash_folder, replacing, write_json

if TYPE_CHECKING:
    from torch import Tensor

SIMCSE_MAX_TOKENS = 128
"""Tokens after which SimCSE's own tool cuts a text."""

TOKENIZED_AT_ONCE = 8192
"""Texts in one call of the tokenizer; batches of one length are formed among them."""

PROBES = (
    "a cat",
    "arrow up left",
    "x",
    "",
    "crème brûlée",
    "user-plus-filled 24",
    "two dogs run after a red ball on a wide green meadow",
    "The quick brown fox jumps over the lazy dog. " * 4,
)
"""Texts that show whether a model tolerates bfloat16."""

DIMENSION = 256
"""Dimensions of TF-IDF vectors, where the sample has as many."""
SAMPLE = 100_000
"""Captions that TF-IDF is fitted on."""
MAX_TERMS = 2**15
"""Most words, and as many character n-grams, that are counted: the most frequent ones."""
TERMS_FILE, WEIGHTS_FILE = "tfidf.json", "tfidf.safetensors"
FORMAT_VERSION = 1
TEXTS_AT_ONCE = 16_384

COUNTERS: dict[str, dict[str, Any]] = {
    "words": {"analyzer": "word", "token_pattern": r"(?u)\b\w+\b", "ngram_range": (1, 2)},
    "characters": {"analyzer": "char_wb", "ngram_range": (3, 5)},
}
"""Arguments of scikit-learn's TfidfVectorizer, by the name of what is counted."""


class SentenceEncoder:
    """A model of sentence-transformers with the pooling that its folder states."""

    encodes = "text"

    def __init__(self, name: str, folder: Path, batch_size: int) -> None:
        if not (folder / "modules.json").is_file():
            raise ModeclipError(
                f"encoder {name!r}: expected a sentence-transformers model, got a folder without "
                f"modules.json: {folder}; a copy of SimCSE is named simcse:FOLDER"
            )
        check_sentence_folder(folder)
        with loading(name, folder, with_transformers=False):
            from modeclip.models.encoders.bert import load_sentence_bert

            bert = load_sentence_bert(folder)
        if bert is not None:
            self._tokens: Callable[[list[str]], dict[str, Any]]
            self._tokens, self.model, *self._rest = bert
            self.model.to(choose_device())
        else:
            with loading(name, folder):
                from sentence_transformers import SentenceTransformer

                # What the folder lacks is an error, and not looked for on the hub.
                whole: Any = (
                    SentenceTransformer(
                        str(folder), device=str(choose_device()), local_files_only=True, trust_remote_code=False
                    )
                    .float()
                    .eval()
                )
            self.model, *self._rest = whole
            prompt = whole.prompts.get(whole.default_prompt_name) if whole.default_prompt_name else None
            self._tokens = lambda texts: dict(whole.preprocess(texts, prompt=prompt))  # not a dict by itself
            self._whole = whole
        self.name, self.batch_size, self._folder = name, batch_size, folder
        tokens = self._tokens(["a"]) if bert is not None or hasattr(self.model, "preprocess") else {}
        shapes = [getattr(tokens.get(key), "ndim", 0) for key in ("input_ids", "attention_mask")]
        self._by_length = shapes == [2, 2]
        if self._by_length:
            self.model = in_bfloat16(self.model, lambda model: self._encode(PROBES, model, 1))
        probed = self._encode(["a"], self.model, 1) if self._by_length else self.encode(["a"])
        self.dimension = probed.shape[1]

    @property
    def fingerprint(self) -> str:
        """Hash of the model's files."""
        return hash_folder(self._folder)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, or of zeros where it knows no word of it."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        if self._by_length:
            return check_vectors(self.name, self._encode(texts, self.model, self.batch_size), texts)
        found = self._whole.encode(list(texts), batch_size=self.batch_size, show_progress_bar=False)
        return check_vectors(self.name, unit_rows(found), texts)

    def _encode(self, texts: Sequence[str], model: Any, rows: int) -> Float[np.ndarray, "N D"]:
        def forward(features: dict[str, Any]) -> Tensor:
            features = model(features)
            for key, value in features.items():
                if hasattr(value, "is_floating_point") and value.is_floating_point():
                    features[key] = value.float()
            for step in self._rest:
                features = step(features)
            vectors: Tensor = features["sentence_embedding"]
            return vectors

        return encode_by_length(texts, self._tokens, forward, rows)


class PoolerEncoder:
    """A BERT-like model of transformers whose pooler output is the embedding: SimCSE."""

    encodes = "text"

    def __init__(self, name: str, folder: Path, batch_size: int) -> None:
        check_transformer_folder(folder)
        with loading(name, folder):
            from transformers import AutoModel, AutoTokenizer

            only: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **only)
            model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **only)
        # transformers gives weights that the file lacks random values, and an encoder no meaning.
        if getattr(model, "pooler", None) is None or report["missing_keys"]:
            raise ModeclipError(
                f"encoder {name!r}: expected a BERT-like model with the weights of its pooler, got "
                f"{type(model).__name__} without: {folder}"
            )
        self.name, self.batch_size, self._folder = name, batch_size, folder
        self.dimension = int(model.config.hidden_size)
        self.model: Any = in_bfloat16(
            model.float().eval().to(choose_device()), lambda model: self._encode(PROBES, model, 1)
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the model's files."""
        return hash_folder(self._folder)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, or of zeros where it knows no word of it."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        return check_vectors(self.name, self._encode(texts, self.model, self.batch_size), texts)

    def _encode(self, texts: Sequence[str], model: Any, rows: int) -> Float[np.ndarray, "N D"]:
        def forward(features: dict[str, Any]) -> Tensor:
            pooled: Tensor = model(**features).pooler_output
            return pooled

        return encode_by_length(texts, self._tokens, forward, rows)

    def _tokens(self, texts: list[str]) -> dict[str, Any]:
        return dict(
            self.tokenizer(texts, padding=True, truncation=True, max_length=SIMCSE_MAX_TOKENS, return_tensors="pt")
        )


def encode_by_length(
    texts: Sequence[str],
    tokenize: Callable[[list[str]], dict[str, Any]],
    forward: Callable[[dict[str, Any]], Tensor],
    rows: int,
) -> Float[np.ndarray, "N D"]:
    """Encode texts in batches of one token length and ``rows`` rows.

    Args:
        texts: One text or more.
        tokenize: Returns padded ``input_ids``, ``attention_mask`` and whatever else the model takes.
        forward: Takes the same for a batch without padding and returns (rows, D) vectors.
        rows: Texts in every forward pass.

    Returns:
        A float32 vector of norm 1 for each text.
    """
    import torch

    vectors: Float[np.ndarray, "N D"] | None = None
    order = np.argsort([-len(text) for text in texts], kind="stable")  # so that a part is padded at little cost
    for part in np.split(order, range(TOKENIZED_AT_ONCE, len(order), TOKENIZED_AT_ONCE)):
        features = tokenize([texts[i] for i in part])
        mask = features["attention_mask"].bool()
        per_token = {
            key for key, value in features.items() if isinstance(value, torch.Tensor) and value.shape == mask.shape
        }

        def run(batch: np.ndarray, features: dict[str, Any] = features, per_token: set[str] = per_token) -> Tensor:
            chosen = torch.from_numpy(batch)
            seen = features["attention_mask"].bool()[chosen]
            unpadded = {  # whichever side was padded
                key: value[chosen][seen].view(len(batch), -1).to(choose_device()) if key in per_token else value
                for key, value in features.items()
            }
            return forward(unpadded)

        for batch, found in in_batches(mask.sum(dim=1).numpy(), rows, run):
            if vectors is None:
                vectors = np.empty((len(texts), found.shape[1]), np.float32)
            vectors[part[batch]] = unit_rows(found)
    assert vectors is not None
    return vectors


class TfidfEncoder:
    """TF-IDF of words and character n-grams, reduced by an SVD, as `fit_tfidf` saved it."""

    encodes = "text"

    def __init__(self, name: str, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        check_links(folder)
        try:
            terms = json.loads((folder / TERMS_FILE).read_text(encoding="utf-8"))
            weights = load_file(folder / WEIGHTS_FILE)
            version = terms["format_version"]
            self._counters = [_counter(kind, terms[kind], weights[kind]) for kind in COUNTERS]
            self._axes = weights["axes"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModeclipError(
                f"encoder {name!r}: expected a folder with {TERMS_FILE} and {WEIGHTS_FILE} as modeclip embed --encoder "
                f"tfidf saves them, got {folder} ({first_line(error)})"
            ) from error
        if version != FORMAT_VERSION or self._axes.shape[0] != sum(len(terms[kind]) for kind in COUNTERS):
            raise ModeclipError(
                f"encoder {name!r}: {folder} has format {version} or parts of different fits; embed the catalog again"
            )
        self.name, self.dimension, self._folder = name, int(self._axes.shape[1]), folder

    @property
    def fingerprint(self) -> str:
        """Hash of what was fitted."""
        return hash_folder(self._folder)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, or of zeros where it knows no word of it."""
        vectors = np.empty((len(texts), self.dimension), np.float32)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            counts = _count(self._counters, texts[start : start + TEXTS_AT_ONCE])
            vectors[start : start + TEXTS_AT_ONCE] = unit_rows(counts @ self._axes)
        return check_vectors(self.name, vectors, texts)


def fit_tfidf(captions: Iterable[str], folder: Path, *, dimension: int = DIMENSION, seed: int = 0) -> None:
    """Fit TF-IDF and its SVD on captions and save them.

    Args:
        captions: All captions, as a stream; a uniform sample of at most `SAMPLE` of them is kept.
        folder: Where ``tfidf.json`` and ``tfidf.safetensors`` go; it is made.
        dimension: Of the vectors, 1 or more; fewer where the sample has fewer captions or terms.
        seed: Decides the sample and the start of the SVD.

    Raises:
        ModeclipError: The captions have no two different terms.
    """
    from safetensors.numpy import save_file
    from sklearn.decomposition import TruncatedSVD

    sample = _draw(captions, seed)
    try:
        counters = [_counter(kind).fit(sample) for kind in COUNTERS]
    except ValueError as error:
        raise ModeclipError(f"encoder 'tfidf': the captions have no words ({first_line(error)})") from error
    counts = _count(counters, sample)
    if min(counts.shape) < 2:
        raise ModeclipError(f"encoder 'tfidf': expected captions with 2 terms or more, got {counts.shape[1]}")
    dimension = min(dimension, min(counts.shape) - 1)
    svd = TruncatedSVD(dimension, random_state=seed).fit(counts)
    terms = {
        kind: sorted(counter.vocabulary_, key=counter.vocabulary_.__getitem__)
        for kind, counter in zip(COUNTERS, counters, strict=True)
    }
    weights = {kind: counter.idf_.astype(np.float32) for kind, counter in zip(COUNTERS, counters, strict=True)}
    weights["axes"] = np.ascontiguousarray(svd.components_.T, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_FILE) as part:
        save_file(weights, part)
    write_json(folder / TERMS_FILE, {"format_version": FORMAT_VERSION, **terms}, indent=None)


class Model2VecEncoder:
    """A static model of model2vec: the mean of a text's token vectors."""

    encodes = "text"

    def __init__(self, name: str, source: str) -> None:
        need("model2vec", name, '"modeclip[model2vec]"')
        is_id = source.count("/") == 1 and not source.startswith((".", "~", "/")) and not Path(source).is_dir()
        self._folder = hub_folder(name, source, "model2vec:FOLDER") if is_id else local_folder(source)
        check_static_folder(self._folder)
        with loading(name, self._folder):
            from model2vec import StaticModel

            self.model: Any = StaticModel.from_pretrained(self._folder, force_download=False)
        self.name, self.dimension = name, int(self.model.dim)

    @property
    def fingerprint(self) -> str:
        """Hash of the model's files."""
        return hash_folder(self._folder)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, or of zeros where it knows no word of it."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        return check_vectors(self.name, unit_rows(self.model.encode(list(texts), use_multiprocessing=False)), texts)


def _counter(kind: str, terms: list[str] | None = None, idf: Float[np.ndarray, " V"] | None = None) -> Any:
    """Return scikit-learn's vectorizer of one kind of terms, fitted if the terms are given."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    most = {} if terms is not None else {"max_features": MAX_TERMS}
    counter = TfidfVectorizer(vocabulary=terms, sublinear_tf=True, dtype=np.float32, **COUNTERS[kind], **most)
    if idf is not None:
        counter.idf_ = idf
    return counter


def _count(counters: Sequence[Any], texts: Sequence[str]) -> Any:
    """Return the weighted counts of all kinds of terms, a sparse (N, V) matrix."""
    from scipy.sparse import hstack

    return hstack([counter.transform(list(texts)) for counter in counters], format="csr")


def _draw(captions: Iterable[str], seed: int) -> list[str]:
    """Return a uniform sample of a stream in its order: the captions with the smallest random keys."""
    draw, kept, keys = np.random.default_rng(seed), [], np.empty(0)
    for caption in captions:
        kept.append(caption)
        if len(kept) == 2 * SAMPLE:
            kept, keys = _smallest(kept, keys, draw)
    return _smallest(kept, keys, draw)[0]


def _smallest(
    kept: list[str], keys: Float[np.ndarray, " n"], draw: np.random.Generator
) -> tuple[list[str], Float[np.ndarray, " m"]]:
    keys = np.concatenate([keys, draw.random(len(kept) - len(keys))])
    few = np.sort(np.argsort(keys, kind="stable")[:SAMPLE])
    return [kept[i] for i in few], keys[few]

"""Texts in, unit vectors from their words alone out: TF-IDF with a truncated SVD, and model2vec.

TF-IDF counts words and the character n-grams inside them, weighs each by how few captions have it, and a truncated SVD
of a sample's counts makes vectors of a stated dimension. What was fitted is a folder of two files, without pickles;
`tfidf:FOLDER` makes the same encoder again, for class names at routing time.

Source: latent semantic analysis (Deerwester et al. 1990), here as the contrast of MoDE (arXiv 2404.16030) Fig. 6;
model2vec: static embeddings distilled from a sentence encoder, averaged over a text's tokens.
Price: fitting holds the counts of the sample; encoding needs no model. The folder takes up to 4 D bytes a term: 67 MB
at 256 dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from modeclip.errors import ModeclipError
from modeclip.models.encoders.hub import first_line, hub_folder, loading, local_folder, need, unit_rows
from modeclip.system.files import hash_folder, write_atomically

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


class TfidfEncoder:
    """TF-IDF of words and character n-grams, reduced by an SVD, as `fit_tfidf` saved it."""

    encodes = "text"

    def __init__(self, name: str, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

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
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        vectors = np.empty((len(texts), self.dimension), np.float32)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            counts = _count(self._counters, texts[start : start + TEXTS_AT_ONCE])
            vectors[start : start + TEXTS_AT_ONCE] = unit_rows(counts @ self._axes)
        return vectors


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
    part = folder / f"{WEIGHTS_FILE}.part"
    save_file(weights, part)
    part.replace(folder / WEIGHTS_FILE)
    write_atomically(folder / TERMS_FILE, json.dumps({"format_version": FORMAT_VERSION, **terms}) + "\n")


class Model2VecEncoder:
    """A static model of model2vec: the mean of a text's token vectors."""

    encodes = "text"

    def __init__(self, name: str, source: str) -> None:
        need("model2vec", name, '"modeclip[model2vec]"')
        is_id = source.count("/") == 1 and not source.startswith((".", "~", "/")) and not Path(source).is_dir()
        self._folder = hub_folder(name, source, "model2vec:FOLDER") if is_id else local_folder(source)
        with loading(name, self._folder):
            from model2vec import StaticModel

            self.model: Any = StaticModel.from_pretrained(self._folder, force_download=False)
        self.name, self.dimension = name, int(self.model.dim)

    @property
    def fingerprint(self) -> str:
        """Hash of the model's files."""
        return hash_folder(self._folder)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        return unit_rows(self.model.encode(list(texts), use_multiprocessing=False))


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
    """Return a uniform sample of a stream, in its order, by the smallest of random keys."""
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

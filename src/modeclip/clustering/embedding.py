"""Embeds the captions of a catalog, or its pairs of image and caption, in the column `caption_embedding`.

A process encodes a caption once however often it occurs, as far as its cache reaches. The vector of a caption does not
depend on the other captions, so the column has the same bytes in whatever parts it is computed. The column remembers
the encoder's name, dimension and fingerprint (``catalog.facts``), so that no stage mixes encoders.

Source: MoDE (arXiv 2404.16030), Sec. 3.2.
Price: one pass of the encoder over the distinct captions; 2 D bytes of disk a pair; memory for the model, the rows of a
fragment and the cache (0.5 GB at 384 dimensions), whatever the size of the catalog.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Int, Shaped

from modeclip.data.catalog import Catalog
from modeclip.data.mapping import Work, map_columns
from modeclip.errors import ModeclipError, check_between, check_least
from modeclip.models.encoders import BATCH_SIZE, Encoder, PairEncoder, check_encoder, load_any_encoder, resolve_auto
from modeclip.models.encoders.text import fit_tfidf

COLUMN = "caption_embedding"
"""The catalog's column of embeddings, (N, D) float16."""

CACHED_CAPTIONS = 2**19
"""Captions whose vectors a process keeps, so that they are not encoded again in the next part."""

ROWS_AT_ONCE = 1 << 17
"""Embeddings that are read at once: 200 MB of float32 at 384 dimensions."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How captions become vectors."""

    encoder: str = "auto"
    """Encoder of the captions: auto (simcse if this machine has it, else minilm), minilm, simcse (the paper's),
    simcse:FOLDER, tfidf, model2vec:FOLDER, clip:MODEL, a folder of sentence-transformers, ORG/NAME on the Hub, or
    MODULE:ATTRIBUTE (your own). Encoders that look at the images: clip-image:MODEL, clip-both:MODEL,
    timm:NAME_OR_FOLDER."""

    batch_size: int = BATCH_SIZE
    """Captions, or pairs, in a forward pass, 1 or more; 512 suits a GPU. The size changes vectors by rounding only."""

    dimension: int = 256
    """Dimensions of tfidf, 1 or more; every other encoder has its own number."""

    seed: int = 0
    """Decides which captions tfidf is fitted on."""

    def __post_init__(self) -> None:
        """Check the name and the ranges."""
        check_encoder(self.encoder)
        check_least("embed", self, batch_size=1, seed=0)
        check_between("embed", self, dimension=(1, 1 << 16))


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What `embed` did."""

    num_captions: int
    """Rows of the catalog, which all have an embedding now."""

    num_computed: int
    """Rows whose embedding was computed now; the others already had one by this encoder."""

    num_distinct: int | None
    """Captions, or pairs, that went through the encoder for this: each caption once, as far as the cache reaches.
    None on Ray, where they are not counted."""

    num_zero: int | None
    """Rows computed now of whose captions the encoder knows nothing: their embedding is zero, near to nothing. None on
    Ray."""

    dimension: int
    """D, the length of an embedding."""

    encoder: str
    """Name that loads the same encoder anywhere: what ``auto`` stood for, and ``tfidf`` with its folder."""


@dataclass(kw_only=True)
class EmbedWork(Work):
    """Embeds blocks of captions or pairs; every process loads the encoder itself."""

    facts: dict[str, Any]
    """What decides the vectors: ``encoder`` (its name), ``dimension``, ``fingerprint``, ``batch_size``."""
    inputs: tuple[str, ...]
    """``caption``, and ``image`` if the encoder looks at images."""
    outputs = (COLUMN,)
    unit = "captions"

    @classmethod
    def of(cls, encoder: Encoder | PairEncoder, batch_size: int) -> EmbedWork:
        """Return the work of embedding with an encoder."""
        encodes = getattr(encoder, "encodes", "text")
        facts = {
            "encoder": encoder.name,
            "dimension": encoder.dimension,
            "fingerprint": str(getattr(encoder, "fingerprint", "")),
            "batch_size": batch_size,
        }
        inputs = ("caption",) if encodes == "text" else ("caption", "image")
        return cls(facts=facts, inputs=inputs)

    @property
    def cache(self) -> CaptionCache:
        """This process's cache of the encoder's vectors."""
        return _cache(json.dumps(self.facts))

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Float16[np.ndarray, "n D"]]:
        """Embed the captions, or pairs of captions and encoded images, of a block."""
        encoder, cache = _encoder(self.facts["encoder"], self.facts["batch_size"]), self.cache
        if isinstance(encoder, Encoder):
            vectors = cache.encode(encoder, block["caption"])
        else:
            images = block["image"].tolist()
            cache.num_encoded += len(images)
            vectors = encoder.encode_pairs(block["caption"].tolist(), images).astype(np.float16)
        cache.num_zero += int((~vectors.any(axis=1)).sum())
        return {COLUMN: vectors}


@dataclass
class CaptionCache:
    """Keeps the vectors of the captions that a process has met, and forgets the oldest first."""

    most: int
    """Captions whose vectors are kept."""
    num_encoded: int = 0
    """Captions, or pairs, that have gone through the encoder so far."""
    num_zero: int = 0
    """Rows whose vector is zero."""
    _rows: dict[str, bytes] = field(default_factory=dict)

    def encode(self, encoder: Encoder, captions: Shaped[np.ndarray, " n"]) -> Float16[np.ndarray, "n D"]:
        """Return the vectors of captions; those that are not known yet are encoded, each once."""
        distinct, row = np.unique(captions, return_inverse=True)
        vectors = np.empty((len(distinct), encoder.dimension), np.float16)
        unknown = []
        for index, caption in enumerate(distinct):
            known = self._rows.get(caption)
            if known is None:
                unknown.append(index)
            else:
                vectors[index] = np.frombuffer(known, np.float16)
        vectors[unknown] = encoder.encode([distinct[index] for index in unknown])
        self.num_encoded += len(unknown)
        for index in unknown:
            self._rows[distinct[index]] = vectors[index].tobytes()
        for old in list(self._rows)[: max(0, len(self._rows) - self.most)]:
            del self._rows[old]
        return vectors[row]


def embed(catalog: Catalog, config: EmbedConfig, *, ray: bool = False) -> EmbedResult:
    """Add the column `caption_embedding` to a catalog, or replace it if another encoder made it.

    The same captions on the same machine give the same bytes, in this process or on Ray. With the same encoder, only
    the rows that were added since the last time are computed.

    Args:
        catalog: Any catalog; its captions are read, and its images if the encoder looks at them.
        config: Encoder and batch size.
        ray: Run on a Ray cluster, as `modeclip.data.mapping.map_columns` says.

    Returns:
        Counts of what was done; the embeddings are in the catalog.

    Raises:
        ModeclipError: The encoder is unknown or cannot be loaded.
    """
    _forget()  # a folder of the same name may hold another model now
    try:
        encoder = _encoder(_fitted(catalog, config), config.batch_size)
        work = EmbedWork.of(encoder, config.batch_size)
        num_computed = map_columns(catalog, work, "embed captions", ray=ray)
        return EmbedResult(
            num_captions=len(catalog),
            num_computed=num_computed,
            num_distinct=None if ray else work.cache.num_encoded,
            num_zero=None if ray else work.cache.num_zero,
            dimension=encoder.dimension,
            encoder=encoder.name,
        )
    finally:
        _forget()  # the stages that follow need the memory


def require_embeddings(catalog: Catalog) -> None:
    """Raise an error that says what to do if a catalog has no embeddings."""
    if COLUMN not in catalog.columns:
        raise ModeclipError(
            f"catalog {str(catalog.path)!r} has no column {COLUMN}: embed its captions first (stage embed)"
        )


def read_embeddings(catalog: Catalog, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
    """Read the embeddings of some rows as float32.

    Raises:
        ModeclipError: The catalog has no embeddings, or one of these rows has NaN or infinity.
    """
    require_embeddings(catalog)
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    read = [check_finite(catalog.read([COLUMN], part)[COLUMN], part) for part in parts]
    return np.concatenate(read) if read else np.empty((0, 1), np.float32)


def check_finite(
    vectors: Shaped[np.ndarray, "n D"], rows: Int[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, "n D"]:
    """Return embeddings as float32.

    Args:
        vectors: Embeddings.
        rows: Which rows of the catalog they belong to, for the message.

    Raises:
        ModeclipError: One of them has NaN or infinity.
    """
    vectors = np.asarray(vectors, np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if bad.size:
        where = f"row {bad[0]} of a block of {len(vectors):,}" if rows is None else f"row {rows[bad[0]]}"
        raise ModeclipError(
            f"column {COLUMN} has NaN or infinite values, first in {where}: embed the captions again (stage embed)"
        )
    return vectors


def _fitted(catalog: Catalog, config: EmbedConfig) -> str:
    """Return the name of an encoder that loads anywhere: ``auto`` is decided, and ``tfidf`` is fitted and saved."""
    if config.encoder == "auto":
        return resolve_auto()
    if config.encoder != "tfidf":
        return config.encoder
    if "://" in str(catalog.path):
        raise ModeclipError(
            "encoder 'tfidf': its folder goes beside the catalog, which must therefore be on this machine, got "
            f"{str(catalog.path)!r}; fit it on a local part of the data and give tfidf:FOLDER"
        )
    folder = Path(catalog.path).resolve().with_suffix(".tfidf")
    captions = (str(caption) for block in catalog.batches(["caption"]) for caption in block["caption"])
    fit_tfidf(captions, folder, dimension=config.dimension, seed=config.seed)
    return f"tfidf:{folder}"


@lru_cache(maxsize=1)
def _encoder(name: str, batch_size: int) -> Encoder | PairEncoder:
    """Return this process's encoder, which is loaded at its first use."""
    return load_any_encoder(name, batch_size=batch_size, trust_encoder=True)  # the user's settings name it


@lru_cache(maxsize=1)
def _cache(identity: str) -> CaptionCache:
    """Return this process's cache for one encoder."""
    del identity
    return CaptionCache(most=CACHED_CAPTIONS)


def _forget() -> None:
    """Drop this process's encoder and cache."""
    _encoder.cache_clear()
    _cache.cache_clear()

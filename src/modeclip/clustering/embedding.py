"""A catalog's captions, or its images too, in; its column `caption_embedding` out.

A caption is encoded once however often it occurs, as far as the cache of a process reaches, and its vector does not
depend on the others: so the column has the same bytes whatever the parts that it was computed in. The column remembers
the encoder's name, dimension and fingerprint (``catalog.facts``), so that no stage mixes encoders.

Source: MoDE (arXiv 2404.16030), Sec. 3.2.
Price: one pass of the encoder over the distinct captions; 2 D bytes of disk a pair; memory for the model, a fragment's
rows and the cache (0.5 GB at 384 dimensions), whatever the size of the catalog.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Shaped

from modeclip.data.catalog import Catalog
from modeclip.data.mapping import map_columns
from modeclip.errors import ModeclipError
from modeclip.models.encoders import BATCH_SIZE, Encoder, PairEncoder, check_encoder, load_any_encoder, resolve_auto
from modeclip.models.encoders.lexical import fit_tfidf

COLUMN = "caption_embedding"
"""The catalog's column of embeddings, (N, D) float16."""

CACHED_CAPTIONS = 2**19
"""Captions whose vectors a process keeps, so that they are not encoded again in the next part."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How the captions become vectors."""

    encoder: str = "auto"
    """auto (simcse where it is on this machine, else minilm), minilm, simcse (the paper's), simcse:FOLDER, tfidf,
    model2vec:FOLDER, clip:MODEL, clip-image:MODEL, clip-both:MODEL, timm:NAME_OR_FOLDER, MODULE:ATTRIBUTE (your
    own), a sentence-transformers folder, a hub ORG/NAME."""

    batch_size: int = BATCH_SIZE
    """Rows of every forward pass, 1 or more; 512 on a GPU. Vectors of two sizes differ by rounding only."""

    dimension: int = 256
    """Dimensions of tfidf, 1 or more; the other encoders have their own."""

    seed: int = 0
    """Decides the sample that tfidf is fitted on."""

    def __post_init__(self) -> None:
        """Check the name and the ranges."""
        check_encoder(self.encoder)
        for name, least in (("batch_size", 1), ("dimension", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ModeclipError(f"embed.{name}: expected {least} or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What `embed` did."""

    num_captions: int
    """Rows that have an embedding now: all."""

    num_computed: int
    """Rows whose embedding was computed now; the others had it from this encoder already."""

    num_distinct: int | None
    """Captions, or pairs, that went through the encoder for them: each caption once, as far as the cache reaches.
    None on Ray, where it is not counted."""

    dimension: int
    """D, the length of an embedding."""

    encoder: str
    """Name from which `load_encoder` makes the encoder again; never ``auto`` or ``tfidf`` without its folder."""


@dataclass(kw_only=True)
class EmbedWork:
    """The work on a block of a catalog's rows, for `map_columns`; another process loads the encoder itself."""

    facts: dict[str, Any]
    """All that decides the vectors: ``encoder`` (its name), ``dimension``, ``fingerprint``, ``batch_size``."""
    inputs: tuple[str, ...]
    """Columns that are read; ``image`` stands for the encoded images wherever they lie."""
    outputs: tuple[str, ...] = (COLUMN,)
    """Columns that it makes."""
    unit: str = "captions"
    """What a row is to it."""

    @classmethod
    def of(cls, encoder: Encoder | PairEncoder, batch_size: int) -> EmbedWork:
        """Describe the work of an encoder."""
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
        """Return the column's values for a block of the rows.

        Args:
            block: By the names of ``inputs``, captions and encoded images, (n,) objects each.
        """
        encoder, cache = _encoder(self.facts["encoder"], self.facts["batch_size"]), self.cache
        if isinstance(encoder, Encoder):
            return {COLUMN: cache.encode(encoder, block["caption"])}
        images = block["image"].tolist()
        cache.num_encoded += len(images)
        return {COLUMN: encoder.encode_pairs(block["caption"].tolist(), images).astype(np.float16)}


@dataclass
class CaptionCache:
    """The vectors of captions that this process has met, the oldest forgotten first."""

    most: int
    """Captions that are kept."""
    num_encoded: int = 0
    """Captions or pairs that went through the encoder."""
    _rows: dict[str, bytes] = field(default_factory=dict)

    def encode(self, encoder: Encoder, captions: Shaped[np.ndarray, " n"]) -> Float16[np.ndarray, "n D"]:
        """Return the vector of each caption; those that are not known are encoded, each once."""
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
    """Add the column `caption_embedding` to a catalog, or replace it if it is of another encoder.

    The same captions and the same machine give the same bytes, in this process or on Ray. Rows that were added since
    are the only ones that are computed when the same encoder is given again.

    Args:
        catalog: Any catalog; `caption` is read, and the images where the encoder looks at them.
        config: Encoder and batch size.
        ray: Run on a Ray cluster, as `modeclip.data.mapping.map_columns` says.

    Returns:
        Counts for the record; the embeddings are in the catalog.

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
            dimension=encoder.dimension,
            encoder=encoder.name,
        )
    finally:
        _forget()  # the stages that follow need the memory


def _fitted(catalog: Catalog, config: EmbedConfig) -> str:
    """Return the name of an encoder that can be loaded anywhere: ``auto`` decided, ``tfidf`` fitted and saved."""
    if config.encoder == "auto":
        return resolve_auto()
    if config.encoder != "tfidf":
        return config.encoder
    if "://" in str(catalog.path):
        raise ModeclipError(
            "encoder 'tfidf': its folder lies beside the catalog, which must be local; fit it on a local part "
            "and give tfidf:FOLDER"
        )
    folder = Path(catalog.path).resolve().with_suffix(".tfidf")
    captions = (str(caption) for block in catalog.batches(["caption"]) for caption in block["caption"])
    fit_tfidf(captions, folder, dimension=config.dimension, seed=config.seed)
    return f"tfidf:{folder}"


@lru_cache(maxsize=1)
def _encoder(name: str, batch_size: int) -> Encoder | PairEncoder:
    """Return this process's encoder, loaded at its first use."""
    return load_any_encoder(name, batch_size=batch_size)


@lru_cache(maxsize=1)
def _cache(identity: str) -> CaptionCache:
    """Return this process's cache for one encoder."""
    del identity
    return CaptionCache(most=CACHED_CAPTIONS)


def _forget() -> None:
    """Drop this process's encoder and cache."""
    _encoder.cache_clear()
    _cache.cache_clear()

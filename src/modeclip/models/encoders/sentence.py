"""Texts in, unit vectors of a sentence encoder out: sentence-transformers models and SimCSE.

Texts are tokenized by thousands and run in batches of one length, so that nothing is padded, and of a fixed number of
rows: a vector depends on its own text alone, bit for bit. The transformer runs in bfloat16 where the processor has it;
pooling and what follows stay in float32.

Source: Sentence-BERT (arXiv 1908.10084) for pooling as the model's folder says; SimCSE (Gao et al., arXiv 2104.08821),
whose own tool cuts texts after 128 tokens, as we do.
Price: one pass of the encoder over the texts; memory for the model, one batch a thread, and the tokens of
`TOKENIZED_AT_ONCE` texts. `benchmarks/embed.py` compares it with `SentenceTransformer.encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from modeclip.errors import ModeclipError
from modeclip.models.encoders.hub import device, in_batches, in_bfloat16, loading, unit_rows
from modeclip.system.files import hash_folder

if TYPE_CHECKING:
    from torch import Tensor

SIMCSE_MAX_TOKENS = 128
"""Where SimCSE's own tool cuts a text."""

TOKENIZED_AT_ONCE = 8192
"""Texts in one call of the tokenizer, and so the most that wait for company of their length."""

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
"""Texts that show whether a model bears bfloat16."""


class SentenceEncoder:
    """A model of sentence-transformers, with the pooling that its folder says."""

    encodes = "text"

    def __init__(self, name: str, folder: Path, batch_size: int) -> None:
        if not (folder / "modules.json").is_file():
            raise ModeclipError(
                f"encoder {name!r}: expected a sentence-transformers model, got a folder without "
                f"modules.json: {folder}; a copy of SimCSE is named simcse:FOLDER"
            )
        with loading(name, folder):
            from sentence_transformers import SentenceTransformer

            # What the folder lacks is an error, and not looked for on the hub.
            model = SentenceTransformer(str(folder), device=device(), local_files_only=True)
        self.model: Any = model.float().eval()
        self.name, self.batch_size, self._folder = name, batch_size, folder
        self._prompt: str | None = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
        self.transformer: Any = self.model[0]
        tokens = self._tokens(["a"]) if hasattr(self.transformer, "preprocess") else {}
        shapes = [getattr(tokens.get(key), "ndim", 0) for key in ("input_ids", "attention_mask")]
        self._by_length = shapes == [2, 2]
        if self._by_length:
            self.transformer = in_bfloat16(self.model[0], lambda module: self._encode(PROBES, module, 1))
        self.dimension = int(
            (self._encode(["a"], self.transformer, 1) if self._by_length else self.encode(["a"])).shape[1]
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the model's files."""
        return hash_folder(self._folder)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        if self._by_length:
            return self._encode(texts, self.transformer, self.batch_size)
        return unit_rows(self.model.encode(list(texts), batch_size=self.batch_size, show_progress_bar=False))

    def _encode(self, texts: Sequence[str], transformer: Any, rows: int) -> Float[np.ndarray, "N D"]:
        def forward(features: dict[str, Any]) -> Tensor:
            features = transformer(features)
            for key, value in features.items():
                if hasattr(value, "is_floating_point") and value.is_floating_point():
                    features[key] = value.float()
            for module in list(self.model)[1:]:
                features = module(features)
            vectors: Tensor = features["sentence_embedding"]
            return vectors

        return encode_by_length(texts, self._tokens, forward, rows)

    def _tokens(self, texts: list[str]) -> dict[str, Any]:
        return dict(self.model.preprocess(texts, prompt=self._prompt))  # not a dict by itself


class PoolerEncoder:
    """A BERT-like model of transformers whose pooler output is the embedding: SimCSE."""

    encodes = "text"

    def __init__(self, name: str, folder: Path, batch_size: int) -> None:
        with loading(name, folder):
            from transformers import AutoModel, AutoTokenizer

            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        # transformers gives weights that the file lacks random values, and an encoder no meaning.
        if getattr(model, "pooler", None) is None or report["missing_keys"]:
            raise ModeclipError(
                f"encoder {name!r}: expected a BERT-like model with the weights of its pooler, got "
                f"{type(model).__name__} without: {folder}"
            )
        self.name, self.batch_size, self._folder = name, batch_size, folder
        self.dimension = int(model.config.hidden_size)
        self.model: Any = in_bfloat16(model.float().eval().to(device()), lambda model: self._encode(PROBES, model, 1))

    @property
    def fingerprint(self) -> str:
        """Hash of the model's files."""
        return hash_folder(self._folder)

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Return a float32 vector of norm 1 for each text, in the order of the texts."""
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        return self._encode(texts, self.model, self.batch_size)

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
        tokenize: Texts -> padded ``input_ids``, ``attention_mask`` and what else the model takes.
        forward: The same for a batch without padding -> (rows, D) vectors.
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
                key: value[chosen][seen].view(len(batch), -1).to(device()) if key in per_token else value
                for key, value in features.items()
            }
            return forward(unpadded)

        for batch, found in in_batches(mask.sum(dim=1).numpy(), rows, run):
            if vectors is None:
                vectors = np.empty((len(texts), found.shape[1]), np.float32)
            vectors[part[batch]] = unit_rows(found)
    assert vectors is not None
    return vectors

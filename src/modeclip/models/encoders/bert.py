"""BERT sentence encoders in plain PyTorch, so that routing starts without importing sentence-transformers.

Importing sentence-transformers takes several seconds of processor time (``benchmarks/start.py`` prints how many), more
than everything else that it takes to route a task. The models that most people use, all-MiniLM among them, are a BERT
whose token vectors are averaged. This file runs those with the same operations in the same order, so their vectors are
equal bit for bit; `load_sentence_bert` returns None for every other kind of model, which sentence-transformers then
loads.

Source: BERT (arXiv 1810.04805); Sentence-BERT (arXiv 1908.10084) for the mean over tokens. Names of the modules are
those of the weights in the files that Hugging Face's transformers saves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the name that PyTorch's own documents use)
from torch import Tensor, nn

from modeclip.models.clip import without_gradients

WEIGHTS_FILE = "model.safetensors"
_TYPES = ("Transformer", "Pooling", "Normalize")
_PREFIX = "bert."
"""Begins the names of weights that were saved as part of a larger model."""
_TABLES = tuple(f"embeddings.{kind}_embeddings.weight" for kind in ("word", "token_type", "position"))
_HEADS = ("query", "key", "value")
_PRODUCTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "seen": "attention.output.dense",
    "inner": "intermediate.dense",
    "outer": "output.dense",
}
_NORMS = {"seen": "attention.output.LayerNorm", "outer": "output.LayerNorm"}


class _Tables(list[Tensor]):
    """Tables of embeddings, which a copy of their model shares."""

    def __deepcopy__(self, memo: Any) -> _Tables:
        return self


class SentenceBert(nn.Module):
    """The transformer of a BERT, which takes and returns dictionaries as sentence-transformers' modules do."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Make the model from the weights of a file.

        Args:
            config: Content of the model's ``config.json``.
            weights: Weights by the names that transformers gives them. Tables of embeddings are left in the mapped
                file, so that only rows that are looked up are read and converted.

        Raises:
            KeyError: A weight is missing.
        """
        super().__init__()
        self.eps, self.num_heads = float(config["layer_norm_eps"]), int(config["num_attention_heads"])
        self.tables = _Tables(weights[name] for name in _TABLES)
        self.norm = _parts("embeddings.LayerNorm", weights)
        self.layers = nn.ModuleList()
        for layer in range(config["num_hidden_layers"]):
            products = {name: _parts(f"encoder.layer.{layer}.{path}", weights) for name, path in _PRODUCTS.items()}
            norms = {name: _parts(f"encoder.layer.{layer}.{path}", weights) for name, path in _NORMS.items()}
            self.layers.append(nn.ModuleDict({"products": nn.ModuleDict(products), "norms": nn.ModuleDict(norms)}))

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return ``token_embeddings`` (B, L, D) of texts that have one length, so that there is no padding to skip."""
        tokens = features["input_ids"]
        words, types, positions = self.tables
        x = self._rows(words, tokens) + self._rows(types, features["token_type_ids"])
        x = self._normalize(self.norm, x + self._rows(positions, torch.arange(tokens.shape[1])))
        for layer in self.layers:
            x = self._layer(layer, x)
        return {"token_embeddings": x, "attention_mask": features["attention_mask"]}

    def _layer(self, layer: Any, x: Tensor) -> Tensor:
        products, norms = layer["products"], layer["norms"]
        shape = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
        query, key, value = (_product(products[name], x).view(shape).transpose(1, 2) for name in _HEADS)
        seen = F.scaled_dot_product_attention(query, key, value, scale=shape[-1] ** -0.5)
        x = self._normalize(norms["seen"], _product(products["seen"], seen.transpose(1, 2).reshape(x.shape)) + x)
        inner = F.gelu(_product(products["inner"], x))
        return self._normalize(norms["outer"], _product(products["outer"], inner) + x)

    def _normalize(self, norm: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, norm["weight"].shape, norm["weight"], norm["bias"], self.eps)

    def _rows(self, table: Tensor, rows: Tensor) -> Tensor:
        return table[rows.cpu()].to(self.norm["weight"])


def _parts(name: str, weights: dict[str, Tensor]) -> nn.ParameterDict:
    """Return weight and bias in float32, copied because a mapped file need not be aligned for vector instructions."""
    parts = {part: weights[f"{name}.{part}"].to(torch.float32, copy=True) for part in ("weight", "bias")}
    return nn.ParameterDict({part: nn.Parameter(value, requires_grad=False) for part, value in parts.items()})


def _product(parts: Any, x: Tensor) -> Tensor:
    return F.linear(x, parts["weight"], parts["bias"])


def mean_of_tokens(features: dict[str, Any]) -> dict[str, Any]:
    """Add ``sentence_embedding``: the mean of the token vectors, as sentence-transformers' Pooling computes it."""
    mask = features["attention_mask"].unsqueeze(-1).to(features["token_embeddings"].dtype)
    total = (features["token_embeddings"] * mask).sum(dim=1)
    return features | {"sentence_embedding": total / mask.sum(dim=1).clamp(min=1e-9)}


def normalize(features: dict[str, Any]) -> dict[str, Any]:
    """Scale ``sentence_embedding`` to unit norm, as sentence-transformers' Normalize does."""
    return features | {"sentence_embedding": F.normalize(features["sentence_embedding"], p=2, dim=1)}


def load_sentence_bert(folder: Path) -> tuple[Any, ...] | None:
    """Load a sentence encoder if it is a BERT with a mean over its token vectors.

    Args:
        folder: Saved by sentence-transformers.

    Returns:
        The tokenizer, a `SentenceBert` in float32, and the functions that its result goes through. None where it is
        another kind of model, or its folder has settings or files that are not known here.

    Raises:
        OSError, ValueError, KeyError, RuntimeError: The files of such a model are damaged or do not fit together.
    """
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    read = [_read(folder / name) for name in ("modules.json", "config.json", "sentence_bert_config.json")]
    modules, config, limits = read
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules or []]
    if not config or not limits or kinds not in (list(_TYPES), list(_TYPES[:2])) or modules[0]["path"] != "":
        return None
    pooling, words = _read(folder / modules[1]["path"] / "config.json"), _read(folder / "tokenizer.json")
    naming = _read(folder / "tokenizer_config.json")
    prompts = _read(folder / "config_sentence_transformers.json") or {}
    is_known = (
        set(limits) <= {"max_seq_length", "do_lower_case"}
        and not limits.get("do_lower_case")
        and isinstance(limits.get("max_seq_length"), int)
        and not prompts.get("default_prompt_name")
        and (folder / WEIGHTS_FILE).is_file()
        and _is_plain_bert(config)
        and _is_mean(pooling or {})
        and words is not None
        and naming is not None
        and _is_plain_tokenizer(words, naming)
    )
    if not is_known:
        return None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(min(limits["max_seq_length"], config["max_position_embeddings"]))
    tokenizer.enable_padding(pad_id=config.get("pad_token_id", 0), pad_token=naming.get("pad_token", "[PAD]"))

    def tokenize(texts: list[str]) -> dict[str, Any]:
        found = tokenizer.encode_batch(texts)
        return {
            "input_ids": torch.tensor([one.ids for one in found]),
            "token_type_ids": torch.tensor([one.type_ids for one in found]),
            "attention_mask": torch.tensor([one.attention_mask for one in found]),
        }

    weights = {name.removeprefix(_PREFIX): value for name, value in load_file(folder / WEIGHTS_FILE).items()}
    model = SentenceBert(config, weights).eval()
    with without_gradients():
        model(tokenize(["a"]))  # weights that do not fit the settings are an error of the folder, not of a text
    return tokenize, model, *(mean_of_tokens, normalize)[: len(kinds) - 1]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _is_plain_bert(config: dict[str, Any]) -> bool:
    return (
        config.get("model_type") == "bert"
        and config.get("hidden_act") == "gelu"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder")
        and not config.get("auto_map")
        and "layer_norm_eps" in config
    )


def _is_mean(pooling: dict[str, Any]) -> bool:
    chosen = {name for name, value in pooling.items() if name.startswith("pooling_mode_") and value}
    return chosen == {"pooling_mode_mean_tokens"} or pooling.get("pooling_mode") == "mean"


def _is_plain_tokenizer(words: dict[str, Any], naming: dict[str, Any]) -> bool:
    """Whether tokenizer.json does what transformers makes of the settings beside it for a tokenizer of BERT."""
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": naming.get("tokenize_chinese_chars", True),
        "strip_accents": naming.get("strip_accents"),
        "lowercase": naming.get("do_lower_case", True),
    }
    return (
        naming.get("tokenizer_class") in ("BertTokenizer", "BertTokenizerFast")
        and words["normalizer"] == normalizer
        and words["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and words["model"]["type"] == "WordPiece"
        and words["model"]["max_input_chars_per_word"] == 100
        and words["model"]["continuing_subword_prefix"] == "##"
        and all(token["special"] for token in words["added_tokens"])
    )

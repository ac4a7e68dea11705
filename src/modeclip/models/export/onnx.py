"""CLIPs as ONNX graphs: one that encodes images and one that encodes texts, for any batch.

``image.onnx`` takes ``pixel_values`` (B, 3, H, W) float32, as the model's preprocessing makes them, and ``text.onnx``
takes ``input_ids`` (B, T) int64. Both return unit vectors, so a cosine is a product. A causal text tower that is read
at the end of the text takes any T up to its context length, which saves the work on padding.

The experts of a bundle become one pair of graphs with a second input, ``routing_weights`` (B, K): for the texts where
texts are routed, for the images where images are. The graphs return the experts' vectors one after the other, those
that are routed times their weights, so that the product of both is the weighted sum of the experts' cosines. Equal
tensors are stored once, and equal products of equal inputs are computed once: experts that share a trunk run it once.

Weights may be int8, or everything bfloat16, where that is faster on this machine (`quantize`, `to_bfloat16`).

Source: PyTorch's exporter (torch.export, then ONNX), and ONNX Runtime's dynamic quantisation: weights int8 with a scale
for each column, activations uint8 with a scale for each call. The layers with experts of a CLIP-MoE run every expert on
every token, since ONNX has no product of groups; a graph is as exact, and no faster for its routing.
Price: ten seconds a graph, and weights twice in memory. The extra ``export`` has the packages.
"""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeclip.errors import ModeclipError
from modeclip.models.blocks import Tower
from modeclip.models.clip import Clip, without_gradients
from modeclip.models.trunk import encode, is_exact_without_padding

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""What the extra ``export`` installs."""
INPUTS: dict[Tower, str] = {"image": "pixel_values", "text": "input_ids"}
OUTPUTS: dict[Tower, str] = {"image": "image_features", "text": "text_features"}
WEIGHTS_INPUT = "routing_weights"
TOLERANCE = 1e-4
"""Largest difference between the features of a float32 graph and PyTorch's that counts as rounding."""
PARITY_BATCHES = (1, 7)
PARITY_TEXTS = ("A red Heart", "!", "it's 12 o'clock", "an arrow that points to the left, " * 20, "", "x", "a dog")
FASTER = 1.05
"""How many times as fast as float32 a graph has to be to count as faster."""
_MOST_BYTES = 1_800_000_000  # of an ONNX file; weights of more lie beside it
_SPEED_BATCH, _SPEED_ROUNDS, _SPEED_SECONDS = 16, 15, 0.02


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a graph is from the model that it was made of, over fixed inputs in batches of 1 and 7."""

    file: str
    """Name of the graph's file."""
    max_abs: float
    """Largest difference between two numbers of the features."""
    min_cosine: float
    """Least cosine between two features."""


def check_packages() -> None:
    """Raise unless the packages that write and run ONNX are installed.

    Raises:
        ModeclipError: One is missing.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ModeclipError(f'export: {missing[0]} is not installed; pip install "modeclip[export]"')


def save_onnx(clips: Sequence[Clip], folder: Path, *, weighed: Tower | None = None) -> list[Parity]:
    """Write the two graphs of a CLIP, or of the experts of a bundle, and compare them with PyTorch.

    Args:
        clips: The model, or the experts of a bundle in their order; they share tokenizer and preprocessing.
        folder: Where ``image.onnx`` and ``text.onnx`` go; it must exist.
        weighed: Which of the two takes the routing weights; None: neither does.

    Raises:
        ModeclipError: The exporter lacks a layer of a tower, or the graph computes something else.
    """
    parity = []
    for tower in INPUTS:
        path = folder / f"{tower}.onnx"
        _write_graph(clips, tower, path, weighed=weighed == tower)
        found = compare(clips, tower, path, weighed=weighed == tower)
        if not found.max_abs <= TOLERANCE:
            raise ModeclipError(
                f"export: the {tower} graph differs from the model by {found.max_abs:.2g} (tolerance {TOLERANCE:g}), "
                "so the exporter does not express a layer of it; please report the architecture"
            )
        parity.append(found)
    return parity


def compare(clips: Sequence[Clip], tower: Tower, path: Path, *, weighed: bool = False) -> Parity:
    """Compare a graph in a real session with PyTorch, over fixed inputs."""
    session, differences, cosines = open_session(path), [], []
    for size in PARITY_BATCHES:
        for values in _inputs(clips[0], tower, size):
            feed = {INPUTS[tower]: values.numpy()}
            weights = np.random.default_rng(size).dirichlet(np.ones(len(clips)), size).astype(np.float32)
            with without_gradients():
                parts = [encode(clip.model.eval(), tower, values).float().numpy() for clip in clips]
            if weighed:
                feed[WEIGHTS_INPUT] = weights
                parts = [part * weights[:, [index]] for index, part in enumerate(parts)]
            expected = np.concatenate(parts, axis=1)
            found = session.run(None, feed)[0]
            if found.shape != expected.shape:
                raise ModeclipError(f"export: {path.name} gives {found.shape} for a batch of {size}; please report it")
            differences.append(float(np.abs(found - expected).max()))
            norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
            cosines.append(float(((found * expected).sum(axis=1) / norms).min()))
    return Parity(file=path.name, max_abs=max(differences), min_cosine=min(cosines))


def quantize(source: Path, target: Path) -> None:
    """Write a graph whose matrices are int8, with a scale for each column, and activations uint8 as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=source.with_name(f"{source.name}.data").exists(),
        )


def to_bfloat16(clips: Sequence[Clip], tower: Tower, target: Path, *, weighed: bool = False) -> None:
    """Write a graph that computes in bfloat16; its inputs and outputs stay float32."""
    _write_graph(clips, tower, target, weighed=weighed, dtype=torch.bfloat16)


def open_session(path: Path) -> Any:
    """Open a graph with ONNX Runtime on the CPU, with as many threads as PyTorch has.

    Raises:
        ModeclipError: This ONNX Runtime cannot run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds, which it does not export
        reason = " ".join(str(error).split()).partition("Type Error: ")
        raise ModeclipError(f"{path.name}: ONNX Runtime cannot run it: {(reason[2] or reason[0])[:160]}") from None


def speed_ratio(slow: Path, fast: Path, clip: Clip, tower: Tower, num_weights: int = 0) -> float:
    """Return how many times as fast one graph is as another, by the least time of rounds in which both take turns.

    Args:
        slow: The graph that counts as 1.
        fast: The other one.
        clip: A model whose inputs they take.
        tower: Which tower they are of.
        num_weights: Number of experts whose weights they take; 0: they take none.
    """
    feed = {INPUTS[tower]: next(iter(_inputs(clip, tower, _SPEED_BATCH))).numpy()}
    if num_weights:
        feed[WEIGHTS_INPUT] = np.full((_SPEED_BATCH, num_weights), 1 / num_weights, np.float32)
    sessions = [open_session(path) for path in (slow, fast)]
    start = time.perf_counter()
    for session in sessions:
        session.run(None, feed)
    runs = max(1, int(_SPEED_SECONDS / max(1e-6, (time.perf_counter() - start) / 2)))
    least = [math.inf, math.inf]  # what else the machine does only adds to a time
    for _ in range(_SPEED_ROUNDS):
        for index, session in enumerate(sessions):
            start = time.perf_counter()
            for _ in range(runs):
                session.run(None, feed)
            least[index] = min(least[index], time.perf_counter() - start)
    return least[0] / least[1]


class OnnxModel(nn.Module):
    """The graphs of one CLIP behind the methods of a CLIP, so that whatever evaluates a CLIP evaluates them."""

    def __init__(self, clip: Clip, graphs: Mapping[Tower, Path]) -> None:
        """Open the graphs.

        Args:
            clip: The model that they were made of, for its preprocessing and its scale.
            graphs: File of each tower.
        """
        super().__init__()
        self._sessions = {tower: open_session(path) for tower, path in graphs.items()}
        visual = clip.model.visual
        self.visual = SimpleNamespace(
            image_size=visual.image_size, image_mean=visual.image_mean, image_std=visual.image_std
        )
        self.logit_scale = nn.Parameter(clip.model.logit_scale.detach().clone(), requires_grad=False)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:  # noqa: ARG002  (a CLIP's method)
        """Return (B, D) unit vectors of (B, 3, H, W) images."""
        return self._run("image", images)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:  # noqa: ARG002
        """Return (B, D) unit vectors of (B, T) token ids."""
        return self._run("text", tokens)

    def _run(self, tower: Tower, values: Tensor) -> Tensor:
        found = self._sessions[tower].run(None, {INPUTS[tower]: values.numpy()})[0]
        return torch.from_numpy(found)


def with_graphs(clip: Clip, graphs: Mapping[Tower, Path]) -> Clip:
    """Return a CLIP that encodes with ONNX Runtime, with the tokenizer and the preprocessing of the one given."""
    return replace(clip, model=OnnxModel(clip, graphs))


class _Graph(nn.Module):
    """What becomes one graph: a tower of each model, one after the other, maybe times the weights."""

    def __init__(self, models: Sequence[nn.Module], tower: Tower, dtype: torch.dtype) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self._tower: Tower = tower
        self._dtype = dtype

    def forward(self, values: Tensor, routing_weights: Tensor | None = None) -> Tensor:
        values = values.to(self._dtype) if values.is_floating_point() else values
        parts = [encode(model, self._tower, values).float() for model in self.models]
        if routing_weights is not None:
            parts = [routing_weights[:, index : index + 1] * part for index, part in enumerate(parts)]
        return torch.cat(parts, dim=-1)


def _write_graph(
    clips: Sequence[Clip], tower: Tower, path: Path, *, weighed: bool, dtype: torch.dtype = torch.float32
) -> None:
    models: list[Any] = [clip.model for clip in clips]
    if dtype != torch.float32:  # a cast happens in place
        models = [copy.deepcopy(model).to(dtype) for model in models]
    graph = _Graph(_sharing(models), tower, dtype).eval()
    values = next(iter(_inputs(clips[0], tower, 3)))
    batch = torch.export.Dim("batch", max=1 << 20)
    axes: dict[int, Any] = {0: batch}
    if tower == "text" and is_exact_without_padding(models[0]):
        # The exporter holds the full length for a case of its own, but what it writes has none: `compare` runs it.
        axes[1] = torch.export.Dim("length", min=1, max=values.shape[1] - 1)
        values = values[:, : values.shape[1] // 2 + 1]
    arguments, shapes = [values], [axes]
    if weighed:
        arguments.append(torch.full((3, len(models)), 1 / len(models)))
        shapes.append({0: batch})
    names = [INPUTS[tower], *([WEIGHTS_INPUT] if weighed else [])]
    try:
        with _quiet(), without_gradients():
            program = torch.export.export(graph, tuple(arguments), dynamic_shapes=tuple(shapes))
            made: Any = torch.onnx.export(
                program, dynamo=True, input_names=names, output_names=[OUTPUTS[tower]], verbose=False
            )
            _merge_equal(made.model)
            _name_axes(made, names)
            stored = {id(value): value.numel() * value.element_size() for value in graph.parameters()}
            made.save(path, external_data=sum(stored.values()) > _MOST_BYTES)
    except Exception as error:  # whatever a layer that it lacks makes of it
        if isinstance(error, OSError):
            raise
        raise ModeclipError(
            f"export: PyTorch {torch.__version__.partition('+')[0]} cannot write the {tower} tower "
            f"({_kind(clips[0].model, tower)}) as ONNX: {_reason(error)}"
        ) from error


def _merge_equal(graph: Any) -> None:
    """Store equal constants once, and compute equal products of equal inputs once.

    What the exporter has folded into constants, such as small transposed matrices, is a new tensor for each expert.
    """
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass

    DeduplicateInitializersPass(size_limit=1 << 20)(graph)  # no larger one is folded
    CommonSubexpressionEliminationPass()(graph)


def _name_axes(made: Any, names: Sequence[str]) -> None:
    """Call the free axes of inputs and outputs what they are; the exporter numbers them."""
    inputs = {value.name: value for value in made.model.graph.inputs}
    first = inputs[names[0]].shape
    words = {
        str(size): word for size, word in zip(first, ("batch", "length"), strict=False) if not isinstance(size, int)
    }
    for value in (*made.model.graph.inputs, *made.model.graph.outputs):
        for axis, size in enumerate(value.shape):
            if str(size) in words:
                value.shape[axis] = words[str(size)]


def _sharing(models: Sequence[Any]) -> list[Any]:
    """Copy models so that those of their tensors that are equal are one; the tensors themselves are not copied."""
    memo: dict[int, Any] = {}
    first: dict[tuple[object, ...], Tensor] = {}
    for model in models:
        for value in model.parameters():
            content = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
            key = (tuple(value.shape), value.dtype, sha256(content).digest())
            memo[id(value)] = first.setdefault(key, value)
    return copy.deepcopy(list(models), memo)


def _inputs(clip: Clip, tower: Tower, size: int) -> Iterator[Tensor]:
    """Yield a batch of fixed inputs, and for texts without the padding that none of them uses, where that is exact."""
    if tower == "image":
        width, height = clip.image_size
        draw = np.random.default_rng(size).normal(size=(size, 3, height, width))
        yield torch.from_numpy(draw.astype(np.float32))
        return
    texts = [PARITY_TEXTS[index % len(PARITY_TEXTS)] for index in range(size)]
    tokens = clip.tokens(texts)
    yield tokens
    if is_exact_without_padding(clip.model):
        short = clip.tokens(["a dog", *["x"] * (size - 1)])
        yield short[:, : int((short != 0).any(dim=0).nonzero().max()) + 1]


def _kind(model: Any, tower: Tower) -> str:
    part = model.visual if tower == "image" else getattr(model, "text", model)
    inner = getattr(part, "trunk", None) if tower == "image" else getattr(part, "transformer", None)
    is_inside = "open_clip" not in type(inner).__module__ and inner is not None
    return f"{type(part).__name__}{f' with {type(inner).__name__}' if is_inside else ''}"


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost cause, which names the layer or the operation."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notes of the exporter and of ONNX Runtime; what fails is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)

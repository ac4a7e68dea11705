"""What a service answers, without HTTP: one model, and what is remembered between requests.

Pictures and texts of all requests in flight go through the model in common batches (`modeclip.serving.batching`), each
only by the experts that have weight for it. Vectors of texts are kept, without weights, and so are whole lists of
classes under their rule. A list that is asked again costs no pass of a text tower or of the router's encoder.

A mixture's vectors, as embeddings, are of unit norm: image (concat(v_c) / sqrt(K), 0) and text (concat(p_c u_c),
sqrt(1 - sum p_c^2)), as `modeclip.mixture.routed_clip` has them. Their product is the mixture's score over sqrt(K).
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float

from modeclip.data.prompts import check_templates, check_texts, fill
from modeclip.mixture.mode import MoDE
from modeclip.mixture.router import ClusterRouter, Route, RouteRequest
from modeclip.mixture.rules import embed_classes
from modeclip.models.clip import logit_scale_of
from modeclip.models.trunk import record
from modeclip.search.asking import SearchModel, join_parts, texts_of
from modeclip.search.query import Asked, Query
from modeclip.serving.batching import Batcher
from modeclip.serving.limits import Limits, RefusedError

if TYPE_CHECKING:
    from PIL.Image import Image

Result = TypeVar("Result")

BATCH = 64
"""Pictures in a batch."""
TEXT_BATCH = 512
"""Texts in a batch."""
ROUTER = -1
"""In place of the number of an expert: the encoder that the router compares texts with the centres by."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Classes:
    """Classes that pictures are asked for, as the mixture was routed to them."""

    names: tuple[str, ...]
    weights: Float[np.ndarray, "L K"]
    """Weight of each expert for each class."""
    words: Float[np.ndarray, "L D"]
    """Vector of each class, times weights and the factor of the scores."""
    members: tuple[int, ...]
    """Experts that have weight."""


@dataclass(frozen=True, kw_only=True)
class Classified:
    """The classes of a picture, most probable first."""

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    weights: tuple[float, ...]
    """Weight of each expert for the first class."""


class Cache:
    """Arrays under a limit of bytes; what was used longest ago is forgotten first. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self.hits = self.misses = self.num_bytes = 0
        self._max_bytes, self._lock = max_bytes, Lock()
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, keys: Sequence[Hashable]) -> dict[Hashable, Any]:
        """Return what is known of some keys, each once."""
        with self._lock:
            found = {key: self._kept[key][0] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            self.hits += len(found)
            self.misses += len(keys) - len(found)
            return found

    def keep(self, key: Hashable, value: Any, num_bytes: int) -> None:
        """Keep something, and forget what is too much then."""
        with self._lock:
            self.num_bytes += num_bytes - (self._kept.pop(key)[1] if key in self._kept else 0)
            self._kept[key] = value, num_bytes
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= self._kept.popitem(last=False)[1][1]


class Answers:
    """Answers questions about pictures and texts with one model; coroutines of one event loop share it."""

    def __init__(self, model: SearchModel, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.texts = Cache(limits.cache_megabytes * 1_000_000 // 2)
        """Vectors of texts, by expert (or `ROUTER`) and text."""
        self.lists = Cache(limits.cache_megabytes * 1_000_000 // 2)
        """Lists of classes."""
        self._executor = ThreadPoolExecutor(1, "model")
        self._begun: dict[Hashable, asyncio.Task[Classes]] = {}
        waiting = limits.max_waiting
        self.image_batches = Batcher[Any, np.ndarray](
            self._encode_images, self._executor, most=BATCH, waiting=max(waiting, limits.max_images)
        )
        self.text_batches = Batcher[Any, np.ndarray](
            self._encode_texts, self._executor, most=TEXT_BATCH, waiting=max(waiting, limits.max_classes)
        )
        self.router_batches = Batcher[str, np.ndarray](
            self._encode_names, self._executor, most=TEXT_BATCH, waiting=max(waiting, limits.max_classes)
        )
        if model.mode is not None:
            self._scales = np.array([logit_scale_of(Path(member.spec)) for member in model.refs])
        else:
            self._scales = np.array([float(model.pool.get(model.refs[0]).model.logit_scale.detach().exp())])
        _ = model.front, model.sizes

    # ---------------------------------------------------------------- vectors

    async def image_vectors(
        self,
        prepared: Sequence[Image],
        members: Sequence[int] | None = None,
        weights: Float[np.ndarray, "n K"] | None = None,
    ) -> Float[np.ndarray, "n D"]:
        """Return concat(v_c) of pictures; concat(p_c v_c) where every image has weights of its own.

        Args:
            prepared: Pictures as `prepare` returns them.
            members: Experts that are asked; the parts of others are 0. None: all.
            weights: Weights of the pictures where every image has its own; None: as the bundle's rule has them.
        """
        asked = tuple(range(len(self.model.refs)) if members is None else members)
        own = [None] * len(prepared) if weights is None else list(weights)
        return np.stack(await self.image_batches.ask([(one, asked, w) for one, w in zip(prepared, own, strict=True)]))

    async def text_vectors(
        self, texts: Sequence[str], members: Sequence[int] | None = None
    ) -> Float[np.ndarray, "n D"]:
        """Return concat(u_c) of texts, without weights; arguments as for `image_vectors`."""
        asked = range(len(self.model.refs)) if members is None else members
        ends = np.cumsum([0, *self.model.sizes])
        found = np.zeros((len(texts), ends[-1]), np.float32)
        distinct = list(dict.fromkeys(texts))
        known = self.texts.find([(member, text) for text in distinct for member in asked])
        missing = {text: lacking for text in distinct if (lacking := tuple(m for m in asked if (m, text) not in known))}
        if missing:
            items = list(missing.items())
            parts = [items[start : start + TEXT_BATCH] for start in range(0, len(items), TEXT_BATCH)]
            for part, vectors in zip(parts, await _all(self.text_batches.ask(part) for part in parts), strict=True):
                for (text, lacking), vector in zip(part, vectors, strict=True):
                    for member in lacking:
                        own = vector[ends[member] : ends[member + 1]].copy()
                        known[member, text] = own
                        self.texts.keep((member, text), own, own.nbytes + 2 * len(text) + 200)
        for member in asked:
            found[:, ends[member] : ends[member + 1]] = [known[member, text] for text in texts]
        return found

    async def name_vectors(self, texts: Sequence[str]) -> dict[str, Float[np.ndarray, " R"]]:
        """Return what the router's encoder makes of texts."""
        distinct = list(dict.fromkeys(texts))
        there = self.texts.find([(ROUTER, text) for text in distinct])
        known = {text: there[ROUTER, text] for text in distinct if (ROUTER, text) in there}
        missing = [text for text in distinct if text not in known]
        parts = [missing[start : start + TEXT_BATCH] for start in range(0, len(missing), TEXT_BATCH)]
        for part, vectors in zip(parts, await _all(self.router_batches.ask(part) for part in parts), strict=True):
            for text, vector in zip(part, vectors, strict=True):
                known[text] = vector.copy()
                self.texts.keep((ROUTER, text), known[text], vector.nbytes + 2 * len(text) + 200)
        return known

    def prepare(self, picture: Image) -> Image:
        """Return a picture in RGB and in the size that the image towers take."""
        return self.model.front.cut(picture)

    # ---------------------------------------------------------------- routing

    async def route(
        self,
        names: Sequence[str],
        *,
        templates: Sequence[str] = (),
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
        each: bool = False,
    ) -> Route:
        """Weigh the experts for class names, or for each text by itself; arguments as for `MoDE.route`.

        Raises:
            RefusedError: The model is no mixture.
            ModeclipError: As for `MoDE.route`.
        """
        if self.model.mode is None:
            raise RefusedError(f"{self.model.names[0]} is one model, with nothing to route to; serve a bundle", 409)
        mode = self.model.mode
        request = mode.request(
            rule=rule, temperature=temperature, max_experts=max_experts, each=each, templates=templates
        )
        check_texts(names, "class names")
        check_templates(request.templates, "route")
        if mode.per_image or not isinstance(mode.router, ClusterRouter):
            return await self.compute(self._route_here, mode, names, request)
        prompts = [fill(template, name) for template in request.templates for name in names] or list(names)
        vectors = await self.name_vectors(prompts)
        own = embed_classes(lambda some: np.stack([vectors[text] for text in some]), names, request.templates)
        return await self.compute(mode.router.route_vectors, names, own, request)

    async def weigh(self, texts: Sequence[str], expert: str | None = None) -> Float[np.ndarray, "T K"]:
        """Return the weights of the experts for each text by itself, as `SearchModel.weigh` does."""
        if expert is not None or self.model.mode is None or self.model.per_image:
            return self.model.weigh(texts, expert)
        return (await self.route(texts, each=True)).class_weights

    # ---------------------------------------------------------------- classes

    async def classes(
        self,
        names: Sequence[str],
        *,
        templates: Sequence[str] = (),
        rule: str | None = None,
        temperature: float | None = None,
        max_experts: int | None = None,
        each: bool = False,
        route_by_prompts: bool = False,
    ) -> Classes:
        """Return classes as `MoDE.task` routes and encodes them; a list that was asked before costs nothing."""
        prompts = tuple(templates) or self.templates
        routing: dict[str, Any] = {"rule": rule, "temperature": temperature, "max_experts": max_experts, "each": each}
        routing["templates"] = prompts if route_by_prompts else ()
        key = (tuple(names), prompts, *routing.values())
        if known := self.lists.find([key]):
            found: Classes = known[key]
            return found
        if key not in self._begun:  # whoever comes while the list is encoded waits for the same
            self._begun[key] = asyncio.create_task(self._encode_classes(names, prompts, routing))
            self._begun[key].add_done_callback(lambda done: self._keep_classes(key, done))
        return await asyncio.shield(self._begun[key])

    async def classify(
        self,
        prepared: Sequence[Image],
        classes: Classes,
        *,
        top: int = 5,
        weights: Float[np.ndarray, "n K"] | None = None,
    ) -> list[Classified]:
        """Name the classes of pictures, as `RoutedClip.classify` does; weights as for `image_vectors`."""
        images = await self.image_vectors(prepared, None if self.model.per_image else classes.members, weights)
        logits = images @ classes.words.T
        found = []
        for row, vector in zip(logits, images, strict=True):
            order = np.argsort(-row, kind="stable")[:top]
            shares = np.exp(row - row[order[0]], dtype=np.float64)
            own = classes.weights[order[0]]
            if self.model.per_image:
                own = np.array([np.linalg.norm(part) for part in self._parts(vector[None])])
            found.append(
                Classified(
                    classes=tuple(classes.names[index] for index in order),
                    probabilities=tuple((shares[order] / shares.sum()).tolist()),
                    weights=tuple(own.tolist()),
                )
            )
        return found

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompts that the model was made for."""
        return ("{}",) if self.model.mode is None else self.model.mode.bundle.routing.templates

    def scale(self, weights: Float[np.ndarray, "L K"] | None = None) -> float:
        """Return the factor on the scores of a task before the softmax; None: of one for all experts alike."""
        return float((self.model.shares() if weights is None else weights).mean(axis=0) @ self._scales)

    # ---------------------------------------------------------------- embeddings and queries

    @property
    def dimension(self) -> int:
        """Numbers of an embedding: the experts' vectors side by side, and one more for a mixture."""
        return sum(self.model.sizes) + (self.model.mode is not None)

    async def embed_images(self, prepared: Sequence[Image]) -> Float[np.ndarray, "n E"]:
        """Return pictures as embeddings of unit norm."""
        vectors = await self.image_vectors(prepared)
        if self.model.mode is None:
            return vectors
        return _completed(vectors) if self.model.per_image else self._alike(vectors)

    async def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Return texts as embeddings of unit norm, each routed by itself."""
        weights = await self.weigh(texts)
        vectors = await self.text_vectors(texts, None if self.model.per_image else _active(weights))
        if self.model.mode is None:
            return vectors
        if self.model.per_image:
            return self._alike(vectors)
        return _completed(vectors * np.repeat(weights, self.model.sizes, axis=1).astype(np.float32))

    async def ask(self, query: Query, prepared: Image | None = None) -> Asked:
        """Encode a query, as `encode_query` does.

        Args:
            query: What is looked for.
            prepared: Its picture, as `prepare` returns it.
        """
        texts = texts_of(query)
        weights = await self.weigh(texts, query.expert) if texts else np.empty((0, len(self.model.refs)))
        vectors = np.empty((0, sum(self.model.sizes)), np.float32)
        if texts:
            vectors = await self.text_vectors(texts, None if self.model.per_image else _active(weights))
            own = (weights > 0).astype(np.float32) if self.model.per_image else weights
            vectors = (vectors * np.repeat(own, self.model.sizes, axis=1)).astype(np.float32)
        picture = None if prepared is None else (await self.image_vectors([prepared]))[0]
        return join_parts(self.model, query, weights, vectors, picture)

    # ---------------------------------------------------------------- the thread that computes

    async def compute(self, work: Callable[..., Result], *given: object) -> Result:
        """Do some work in the thread of the model."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *given)

    def try_out(self, *, stay: bool) -> None:
        """Have every expert see a picture and a text, so that what is damaged is found before anybody asks.

        Args:
            stay: Whether the experts stay in memory, so that recording their image towers pays.
        """
        from PIL import Image

        if stay and self.model.device == "cpu":
            for ref in self.model.refs:
                record(self.model.pool.get(ref).model)
        self.model.encode_images([Image.new("RGB", self.model.front.image_size)])
        self.model.encode_texts(["a"], np.ones((1, len(self.model.refs))))
        if self.model.mode is not None and not self.model.per_image:
            self.model.weigh(["a"])

    def retire(self) -> None:
        """Compute no more once what waits is done."""
        self._executor.shutdown(wait=False)

    def _encode_images(self, items: list[tuple[Image, tuple[int, ...], Any]]) -> Float[np.ndarray, "n D"]:
        batch = self.model.front.images([picture for picture, _, _ in items])
        if not self.model.per_image:
            mask = None if self.model.mode is None else self._mask([members for _, members, _ in items])
            return self.model.encode_batch(batch, mask)
        found = np.zeros((len(items), sum(self.model.sizes)), np.float32)
        given = np.array([weights is not None for *_, weights in items])
        if given.any():
            own = np.stack([weights for *_, weights in items if weights is not None])
            found[given] = self.model.encode_batch(batch[given], weights=own)
        if not given.all():
            found[~given] = self.model.encode_batch(batch[~given])
        return found

    def _encode_texts(self, items: list[tuple[str, tuple[int, ...]]]) -> Float[np.ndarray, "n D"]:
        mask = self._mask([members for _, members in items])
        return self.model.encode_texts([text for text, _ in items], mask.astype(float))

    def _encode_names(self, names: list[str]) -> Float[np.ndarray, "n R"]:
        assert self.model.mode is not None
        assert isinstance(self.model.mode.router, ClusterRouter)
        return np.asarray(self.model.mode.router.encoder.encode(names))  # type: ignore[union-attr]

    def _mask(self, members: Sequence[tuple[int, ...]]) -> Bool[np.ndarray, "n K"]:
        mask = np.zeros((len(members), len(self.model.refs)), bool)
        for row, own in enumerate(members):
            mask[row, list(own)] = True
        return mask

    @staticmethod
    def _route_here(mode: MoDE, names: Sequence[str], request: RouteRequest) -> Route:
        found = mode.router.route(names, request)
        _ = found.weights  # an error where every image has its own
        return found

    async def _encode_classes(
        self, names: Sequence[str], templates: tuple[str, ...], routing: Mapping[str, Any]
    ) -> Classes:
        check_templates(templates, "templates")
        check_texts(names, "classes")
        weights = np.full((len(names), len(self.model.refs)), 1 / len(self.model.refs))
        if self.model.mode is not None and not self.model.per_image:
            weights = np.array((await self.route(names, **routing)).class_weights)
        members = _active(weights)
        prompts = [fill(template, name) for template in templates for name in names]
        vectors = (await self.text_vectors(prompts, members)).reshape(len(templates), len(names), -1)
        words = np.concatenate(
            [
                part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
                for part in self._parts(vectors.mean(0))
            ],
            axis=1,
        )
        if not self.model.per_image:
            words = words * np.repeat(weights, self.model.sizes, axis=1)
        scale = self.scale(weights)
        words = (scale * words).astype(np.float32)
        return Classes(names=tuple(names), weights=weights, words=words, members=members)

    def _keep_classes(self, key: Hashable, done: asyncio.Task[Classes]) -> None:
        del self._begun[key]
        if not done.cancelled() and done.exception() is None:
            classes = done.result()
            own = sum(2 * len(name) + 100 for name in classes.names)
            self.lists.keep(key, classes, classes.words.nbytes + classes.weights.nbytes + own)

    def _parts(self, vectors: Float[np.ndarray, "n D"]) -> list[Float[np.ndarray, "n d"]]:
        return np.split(vectors, np.cumsum(self.model.sizes)[:-1], axis=1)

    def _alike(self, vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n E"]:
        """Return vectors of all experts scaled to unit norm, with a 0."""
        return np.pad(vectors / np.float32(math.sqrt(len(self.model.refs))), ((0, 0), (0, 1)))


async def _all(works: Iterable[Awaitable[Result]]) -> list[Result]:
    """Wait for some works; where one fails, the others are given up."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def _active(weights: Float[np.ndarray, "n K"]) -> tuple[int, ...]:
    """Return the experts that have weight for any row."""
    return tuple(np.flatnonzero((weights > 0).any(axis=0)).tolist())


def _completed(vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n E"]:
    """Append what is missing to unit norm."""
    rest = np.sqrt(np.clip(1 - np.square(vectors).sum(axis=1, keepdims=True), 0, None))
    return np.concatenate([vectors, rest], axis=1)

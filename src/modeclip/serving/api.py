"""The routes of the service itself: classify, route, embed, search, and what watches it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from modeclip.errors import unknown
from modeclip.mixture.explain import ClassReason
from modeclip.search.query import Query
from modeclip.serving.limits import RefusedError
from modeclip.serving.metrics import Metrics
from modeclip.serving.service import WEB, Service, Snapshot
from modeclip.serving.shapes import (
    ClassifyRequest,
    ClassifyResponse,
    EmbeddingsRequest,
    EmbeddingsResponse,
    ErrorResponse,
    Health,
    ModelsResponse,
    RouteImagesRequest,
    RouteRequest,
    RouteResponse,
    SearchRequest,
    SearchResponse,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from modeclip.mixture.router import Route

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": about}
    for status, about in {
        400: "The request is no JSON.",
        401: "The API key is missing or wrong.",
        403: "The page or host may not ask.",
        404: "There is no such thing.",
        405: "The route takes another method.",
        408: "The request did not arrive in time.",
        409: "The model that is served cannot do it.",
        413: "The request holds too much.",
        422: "The request says something that cannot be.",
        429: "Too many requests wait; Retry-After says when to come again.",
        503: "The model cannot answer now.",
    }.items()
}
MOST_SIDE = 2048
"""Pixels of the longer side of a picture that was asked for with a size."""


async def route_pictures(now: Snapshot, pictures: Sequence[Image], routing: dict[str, Any]) -> Route:
    """Weigh the experts for each picture by itself; arguments and errors as for `MoDE.route_images`."""
    mode = now.answers.model.mode
    assert mode is not None
    names = [f"images[{number}]" for number in range(len(pictures))]
    return await now.answers.compute(mode.router.route_images, pictures, mode.request(**routing), names)


def api_router(service: Service, metrics: Metrics) -> APIRouter:
    """Return the routes."""
    router = APIRouter(responses=ERRORS)

    @router.post("/classify", tags=["mixture"], response_model=ClassifyResponse)
    async def classify(body: ClassifyRequest) -> Response:
        """Name the classes of pictures, as the mixture is routed to these classes."""
        now = service.now
        service.limits.check_classes(body.classes, body.templates, now.answers.templates)
        service.limits.check_distinct(body.classes)
        weights = None
        if now.answers.model.per_image and any(value is not None for value in body.routing().values()):
            opened = await service.open_pictures("images", body.images)
            pictures = [await service.prepare(one, now) for one in opened]
            weights = (await route_pictures(now, opened, body.routing())).class_weights
        else:
            pictures = await service.read_pictures("images", body.images, now)
        classes = await now.answers.classes(
            body.classes,
            templates=body.templates,
            **body.routing(),
            each=body.each,
            route_by_prompts=body.route_by_prompts,
        )
        found = await now.answers.classify(pictures, classes, top=body.top, weights=weights)
        experts = now.answers.model.names
        return JSONResponse(
            {
                "model": service.name,
                "pictures": [
                    {
                        "classes": [
                            {"name": name, "probability": share}
                            for name, share in zip(one.classes, one.probabilities, strict=True)
                        ],
                        "weights": dict(zip(experts, one.weights, strict=True)),
                    }
                    for one in found
                ],
            }
        )

    @router.post("/route", tags=["mixture"])
    async def route(body: RouteRequest) -> RouteResponse:
        """Weigh the experts for classes, or for each text by itself, and say why."""
        now = service.now
        service.limits.check_classes(body.classes, body.templates)
        found = await now.answers.route(
            body.classes,
            templates=body.templates,
            **body.routing(),
            each=body.each,
        )
        reasons = await now.answers.compute(found.explain)
        return RouteResponse.model_validate(
            {
                "model": service.name,
                "rule": found.request.rule,
                "temperature": found.request.temperature,
                "entropy": found.entropy,
                "classes": [_reason(one, now.answers.model.names) for one in reasons],
            }
        )

    @router.post("/route-images", tags=["mixture"])
    async def route_images(body: RouteImagesRequest) -> RouteResponse:
        """Weigh the experts for each picture by itself, where the clusters of a bundle are of images."""
        now = service.now
        mode = now.answers.model.mode
        if mode is None or not mode.per_image:
            raise RefusedError("the clusters are not of images, so pictures have no weights; use /route", 409)
        pictures = await service.open_pictures("images", body.images)
        found = await route_pictures(now, pictures, body.routing())
        reasons = await now.answers.compute(found.explain)
        return RouteResponse.model_validate(
            {
                "model": service.name,
                "rule": found.request.rule,
                "temperature": found.request.temperature,
                "entropy": found.entropy,
                "classes": [_reason(one, now.answers.model.names) for one in reasons],
            }
        )

    @router.post("/v1/embeddings", tags=["mixture"], response_model=EmbeddingsResponse)
    async def embeddings(body: EmbeddingsRequest) -> Response:
        """Return vectors of texts and pictures, as OpenAI's route does; a product of two is a cosine."""
        now = service.now
        _check_model(body.model, service)
        inputs = [body.input] if isinstance(body.input, str) else body.input
        if not inputs:
            raise RefusedError("input: expected a text or a picture as a data URL, got none", 422)
        places = [place for place, one in enumerate(inputs) if one[:11].lower() == "data:image/"]
        texts = [place for place in range(len(inputs)) if place not in set(places)]
        service.limits.check_texts("input", [inputs[place] for place in texts])
        pictures = await service.read_pictures("input", [inputs[place] for place in places], now)
        dimension = padded(body.dimensions, service, now)
        found = np.zeros((len(inputs), dimension), np.float32)
        if pictures:
            found[places, : now.answers.dimension] = await now.answers.embed_images(pictures)
        if texts:
            words = [inputs[place] for place in texts]
            found[texts, : now.answers.dimension] = await now.answers.embed_texts(words)
        vectors: Sequence[Any] = found.tolist()
        if body.encoding_format == "base64":
            vectors = [base64.b64encode(one.astype("<f4").tobytes()).decode() for one in found]
        content = {
            "object": "list",
            "data": [{"object": "embedding", "index": n, "embedding": one} for n, one in enumerate(vectors)],
            "model": service.name,
            "usage": {"prompt_tokens": len(inputs), "total_tokens": len(inputs)},
        }
        return JSONResponse(content)

    @router.post("/search", tags=["search"], response_model=SearchResponse)
    async def search(body: SearchRequest) -> Response:
        """Find images of an index by words, by a picture or both."""
        now = service.now
        name, index = now.index(body.index)
        limits = service.limits
        if body.count > limits.max_hits:
            raise RefusedError(f"count: expected at most {limits.max_hits:,}, got {body.count:,}", 413)
        limits.check_texts("text", [] if body.text is None else [body.text])
        limits.check_texts("negatives", body.negatives)
        limits.check_texts("where", body.where)
        opened = await service.open_pictures("image", [] if body.image is None else [body.image])
        prepared = await service.prepare(opened[0], now) if opened else None
        query = Query(
            text=body.text,
            image=opened[0] if opened else None,
            image_weight=body.image_weight,
            negatives=tuple(body.negatives),
            negative_weight=body.negative_weight,
            expert=body.expert,
        )
        asked = await now.answers.ask(query, prepared)
        found = await service.search(
            index, asked, count=body.count, where=body.where, least_strength=body.least_strength, hybrid=body.hybrid
        )
        hits = [
            {
                **{key: value for key, value in asdict(hit).items() if key not in {"catalog", "row"}},
                "parts": dict(zip(found.experts, hit.parts, strict=True)),
                "picture": f"/pictures/{quote(name, safe='')}/{hit.number}",
            }
            for hit in found.hits
        ]
        return JSONResponse(
            {
                "index": name,
                "weights": dict(zip(found.experts, found.weights, strict=True)),
                "num_searched": found.num_searched,
                "exact": found.exact,
                "hits": hits,
            }
        )

    @router.get(
        "/pictures/{index}/{number}",
        tags=["search"],
        response_class=Response,
        responses={200: {"description": "The picture.", "content": {kind: {} for kind in WEB.values()}}},
    )
    async def picture(index: str, number: int, request: Request, size: int | None = None) -> Response:
        """Return a picture of an index, as it is or with ``size`` pixels along its longer side."""
        if size is not None and not 1 <= size <= MOST_SIDE:
            raise RefusedError(f"size: expected 1 to {MOST_SIDE:,} pixels, got {size}", 422)
        _, opened = service.now.index(index)
        if not 0 <= number < len(opened):
            raise RefusedError(f"index {index}: expected a number from 0 to {len(opened) - 1:,}, got {number}", 404)
        (pair,) = await service.read_rows(opened, [number], ["digest"])
        tag = f'"{pair["digest"].hex()}-{size or 0}"'
        headers = {"etag": tag, "cache-control": "private, max-age=60", "x-content-type-options": "nosniff"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        data, kind = await service.picture(opened, number, size)
        return Response(data, media_type=kind, headers=headers)

    @router.get("/models", tags=["service"])
    @router.get("/v1/models", tags=["service"])
    async def models() -> ModelsResponse:
        """Return the model, its experts and its indexes."""
        now = service.now
        model = now.answers.model
        routing = None
        if model.mode is not None:
            own = model.mode.bundle.routing
            routing = {
                "rule": own.rule,
                "temperature": own.temperature_of(own.rule),
                "templates": list(own.templates),
                "max_experts": model.mode.max_experts,
            }
        facts = {
            "id": service.name,
            "created": int(now.opened),
            "experts": list(model.names),
            "digests": list(model.digests),
            "dimension": now.answers.dimension,
            "per_image": model.per_image,
            "logit_scale": now.answers.scale(),
            "routing": routing,
            "indexes": {
                name: {"images": len(index), "columns": index.columns, "exact": index.approximate is None}
                for name, index in now.indexes.items()
            },
        }
        return ModelsResponse.model_validate({"data": [facts]})

    @router.get("/health", tags=["service"])
    async def health() -> Health:
        """Say that the service lives, and whether something is wrong on disk."""
        return service.health("ok")

    @router.get("/ready", tags=["service"])
    async def ready(response: Response) -> Health:
        """Say whether requests are welcome: 503 while the service ends."""
        if service.is_ending:
            response.status_code = 503
            return service.health("ending")
        return service.health("ready")

    @router.get("/metrics", tags=["service"], response_class=Response)
    async def read_metrics() -> Response:
        """Return counters in Prometheus's format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and name != service.name:
        raise RefusedError(str(unknown("model", name[:100], [service.name])), 404)


def padded(wanted: int | None, service: Service, now: Snapshot) -> int:
    """Return how many numbers an embedding has: its own, those of the service, or those that were asked for.

    Args:
        wanted: What was asked for.
        service: Whose embeddings all have a length, if it was started so.
        now: What answers.

    Raises:
        RefusedError: The model's vectors are longer.
    """
    own = now.answers.dimension
    if wanted is not None and wanted < own:
        raise RefusedError(f"dimensions: the model's vectors have {own:,} numbers, expected at least that", 422)
    return wanted or max(own, service.dimension or 0)


def _reason(reason: ClassReason, experts: Sequence[str]) -> dict[str, Any]:
    return {
        "name": reason.name,
        "weights": dict(zip(experts, reason.weights, strict=True)),
        "nearest": [
            {
                "cluster": near.index,
                "distance": near.distance,
                "expert": experts[near.expert] if near.expert < len(experts) else str(near.expert),
                "captions": list(near.captions),
            }
            for near in reason.clusters
        ],
        "out_of_domain": reason.out_of_domain,
        "distance": reason.distance,
        "quantile": reason.quantile,
    }

"""Routes in the shapes of other services, for front ends that exist: clip-retrieval and immich's machine learning.

clip-retrieval numbers what it finds; here that is the position in the index. Its options for duplicates, safety and
aesthetics need models of their own: they are accepted and have no effect.

immich asks for one vector at a time, of a picture or a text, and compares them by cosine. Its name of a model says
nothing here; the model that is served answers. immich knows how many numbers the vectors of that model have, so
``modeclip serve --dimension`` appends zeros, which change no cosine, up to what it expects.
"""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, File, Form, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ValidationError

from modeclip.search.index import Index
from modeclip.search.query import Asked, Query
from modeclip.serving.api import ERRORS, padded
from modeclip.serving.limits import RefusedError
from modeclip.serving.service import Service, Snapshot
from modeclip.serving.shapes import KnnHit, KnnRequest, Metadata, MetadataRequest, Predicted

ENTRIES = '{"clip": {"visual": {"modelName": "ViT-B-32__openai", "options": {}}}}'


class _Entry(BaseModel):
    """What immich says about one thing that it asks for; the name of a model and options say nothing here."""

    modelName: str = ""  # noqa: N815 (immich's name)
    options: dict[str, Any] = {}


class _Entries(BaseModel):
    """What immich asks for."""

    model_config = {"extra": "forbid"}
    clip: dict[Literal["visual", "textual"], _Entry]


def other_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(responses=ERRORS)

    @router.post("/knn-service", tags=["clip-retrieval"], response_model_exclude_none=True)
    async def knn_service(body: KnnRequest) -> list[KnnHit]:
        """Find images, in clip-retrieval's shape."""
        now = service.now
        _, index = now.index(body.indice_name)
        count = body.num_result_ids or body.num_images
        if max(count, body.num_images) > service.limits.max_hits:
            raise RefusedError(f"num_images, num_result_ids: expected at most {service.limits.max_hits:,}", 413)
        if body.image_url is not None:
            raise RefusedError("image_url: addresses are never fetched; send the picture as base64 in image", 422)
        if body.modality != "image":
            raise RefusedError("modality: the index is of images; send image", 422)
        found = await service.search(index, await _asked(service, now, index, body), count=count)
        hits = []
        for place, hit in enumerate(found.hits):
            one = KnnHit(id=hit.number, similarity=hit.score)
            if place < body.num_images:
                data, _ = await service.picture(index, hit.number)
                one.image, one.caption = base64.b64encode(data).decode(), hit.caption
            hits.append(one)
        return hits

    @router.post("/metadata", tags=["clip-retrieval"])
    async def metadata(body: MetadataRequest) -> list[Metadata]:
        """Return what an index knows of images, in clip-retrieval's shape."""
        _, index = service.now.index(body.indice_name)
        if len(body.ids) > service.limits.max_hits:
            raise RefusedError(f"ids: expected at most {service.limits.max_hits:,}, got {len(body.ids):,}", 413)
        for number in body.ids:
            if not 0 <= number < len(index):
                raise RefusedError(f"ids: expected numbers from 0 to {len(index) - 1:,}, got {number}", 404)
        columns = [name for name in index.columns if name != "digest"]
        rows = await service.read_rows(index, body.ids, columns)
        return [Metadata(id=number, metadata=row) for number, row in zip(body.ids, rows, strict=True)]

    @router.get("/indices-list", tags=["clip-retrieval"])
    async def indices_list() -> list[str]:
        """Return the names of the indexes."""
        return list(service.now.indexes)

    @router.get("/ping", tags=["immich"], response_class=PlainTextResponse)
    async def ping() -> str:
        """Say that the service lives, as immich asks it."""
        return "pong"

    @router.post("/predict", tags=["immich"], response_model=Predicted, response_model_exclude_none=True)
    async def predict(
        entries: Annotated[str, Form(max_length=10_000, examples=[ENTRIES])],
        image: Annotated[UploadFile | None, File()] = None,
        text: Annotated[str | None, Form(examples=["a red umbrella"])] = None,
    ) -> JSONResponse:
        """Return the vector of a picture or of a text, in immich's shape."""
        try:
            wanted = set(_Entries.model_validate_json(entries).clip)
        except ValidationError as error:
            raise RefusedError(
                f"entries: expected JSON such as {ENTRIES}, got something else ({error.errors()[0]['msg'].lower()});"
                " faces and letters are not read here",
                422,
            ) from None
        if wanted not in ({"visual"}, {"textual"}):
            raise RefusedError("entries: expected clip with visual, or with textual", 422)
        now, shape = service.now, {}
        if wanted == {"visual"}:
            if image is None:
                raise RefusedError("image is missing; send the picture as a file of that name", 422)
            picture = await service.decode_picture("image", await image.read())
            shape = {"imageHeight": picture.height, "imageWidth": picture.width}
            vectors = await now.answers.embed_images([await service.prepare(picture, now)])
        else:
            service.limits.check_texts("text", [text or ""])
            vectors = await now.answers.embed_texts([text or ""])
        vector = np.zeros(padded(None, service, now), np.float32)
        vector[: vectors.shape[1]] = vectors[0]
        return JSONResponse({"clip": json.dumps(vector.tolist()), **shape})

    return router


async def _asked(service: Service, now: Snapshot, index: Index, body: KnnRequest) -> Asked:
    """Encode what clip-retrieval asks for."""
    given = [body.text, body.image, body.embedding_input]
    if sum(one is not None for one in given) != 1:
        raise RefusedError("expected one of text, image and embedding_input", 422)
    if body.text is not None:
        service.limits.check_texts("text", [body.text])
        return await now.answers.ask(Query(text=body.text))
    if body.image is not None:
        (picture,) = await service.open_pictures("image", [body.image])
        return await now.answers.ask(Query(image=picture), await service.prepare(picture, now))
    own = sum(index.model.sizes)
    with np.errstate(over="ignore"):
        vector = np.array(body.embedding_input, np.float32)
    if len(vector) < own or not np.isfinite(vector).all():
        raise RefusedError(
            f"embedding_input: expected {now.answers.dimension:,} finite numbers, as /v1/embeddings gives them, got"
            f" {len(vector):,}",
            422,
        )
    return Asked(weights=index.model.shares()[0], parts=((1.0, vector[:own]),))

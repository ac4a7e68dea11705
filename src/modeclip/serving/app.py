"""The app: routes, errors in one shape, and the guard before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from modeclip import __version__
from modeclip.errors import DamagedError, ModeclipError
from modeclip.serving.api import api_router
from modeclip.serving.guard import RETRY_SECONDS, Guard, error_body
from modeclip.serving.limits import RefusedError
from modeclip.serving.metrics import Metrics
from modeclip.serving.other_shapes import other_router
from modeclip.serving.page import page_router
from modeclip.serving.service import Service

LOOK_SECONDS = 1.0
"""How often the files on disk are looked at."""
MOST_WORDS = 300
"""Letters of an error that quotes what a client has sent."""


def create_app(
    service: Service, *, key: str = "", origins: Sequence[str] = (), is_local: bool = False, look: bool = True
) -> FastAPI:
    """Return the app of a service.

    Args:
        service: What answers.
        key: The key that clients must send; empty: none.
        origins: Origins of pages that may ask, besides the service's own; "*": all.
        is_local: Whether the service is for this machine alone.
        look: Whether it reloads what changes on disk.
    """
    metrics = Metrics()
    metrics.watch(service)

    @asynccontextmanager
    async def living(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_look(service)) if look else None
        yield
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    app = FastAPI(
        title="modeclip",
        version=__version__,
        summary="Classification, vectors, routing and search with a mixture of CLIP data experts.",
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
        lifespan=living,
    )
    app.include_router(api_router(service, metrics))
    app.include_router(other_router(service))
    app.include_router(page_router(service))
    app.add_exception_handler(RequestValidationError, _unfitting)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ModeclipError, _refused)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(
        Guard, limits=service.limits, metrics=metrics, key=key, origins=tuple(origins), is_local=is_local
    )
    if origins:  # around the guard, so that pages can read what it refuses
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


async def _look(service: Service) -> None:
    """Reload what changes on disk."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        await asyncio.to_thread(service.reload, always=False)


def _response(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    state = request.scope.setdefault("state", {})
    message = message if len(message) <= MOST_WORDS else f"{message[:MOST_WORDS]}..."
    state["detail"] = message
    return Response(
        error_body(status, message, state.get("request_id", "")), status, headers, media_type="application/json"
    )


async def _unfitting(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    place = ".".join(str(part) for part in first["loc"] if part not in {"body", "query", "path"})
    if first["type"] == "json_invalid":
        return _response(request, 400, f"the request is no JSON ({first.get('ctx', {}).get('error', 'it is cut')})")
    more = len(error.errors()) - 1
    end = f" (and {more} more)" if more else ""
    return _response(request, 422, f"{place or 'request'}: {first['msg'].lower()}{end}; /openapi.json has the shape")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 400:
        message = f"the request cannot be read ({message.lower()}); send JSON in UTF-8 that is not nested deeply"
    if error.status_code == 404:
        message = f"no {request.url.path[:100]} here; /openapi.json has the routes"
    if error.status_code == 405:
        message = f"{request.url.path[:100]} does not take {request.method}; /openapi.json has the routes"
    return _response(request, error.status_code, message, dict(error.headers or {}))


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RefusedError) else 503 if isinstance(error, DamagedError) else 422
    seconds = error.retry_after if isinstance(error, RefusedError) else None
    if seconds is None and status == 503:
        seconds = RETRY_SECONDS
    headers = {} if seconds is None else {"retry-after": str(max(1, round(seconds)))}
    return _response(request, status, str(error), headers)


async def _failed(request: Request, _: Exception) -> Response:
    return _response(request, 500, "the service has failed; its log has more under this request id")

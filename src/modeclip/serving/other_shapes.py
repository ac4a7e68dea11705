"""Routes in the shapes of other services, for front ends that exist: clip-retrieval and immich's machine learning."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from modeclip.serving.api import ERRORS
from modeclip.serving.service import Service


def other_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(responses=ERRORS)

    @router.get("/ping", tags=["immich"], response_class=PlainTextResponse)
    async def ping() -> str:
        """Say that the service lives, as immich asks it."""
        return "pong"

    @router.get("/indices-list", tags=["clip-retrieval"])
    async def indices_list() -> list[str]:
        """Return the names of the indexes."""
        return list(service.now.indexes)

    return router

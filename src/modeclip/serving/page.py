"""The page: what a browser shows of a service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter

if TYPE_CHECKING:
    from modeclip.serving.service import Service


def page_router(service: Service) -> APIRouter:
    """Return the routes of the page."""
    del service  # nothing is shown yet
    return APIRouter(include_in_schema=False)

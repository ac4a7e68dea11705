"""The service: classification, vectors, routing and search over HTTP, computed in batches of all requests in flight.

`Client` asks a running service; it needs no more than modeclip itself. Everything else needs the extra ``serve``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeclip.serving.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from modeclip.serving.client import Client

        return Client
    raise AttributeError(f"module 'modeclip.serving' has no attribute {name!r}")

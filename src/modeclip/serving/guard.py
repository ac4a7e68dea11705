"""What stands before the routes: keys, limits, queues, deadlines, request ids, and errors that say what to do.

It is plain ASGI, so a request that is refused costs neither a route nor a model. The whole request is read here, under
a limit of bytes and a deadline, before anything looks at it: a sender who is slow or gone holds a buffer, and no place
in the queue of the model. Every error is JSON, ``{"error": {"message", "type", "request_id"}}``.

A service that listens on this machine alone answers only to the names of this machine, and only to pages that come
from where it is itself, unless ``--allow-origin`` names others: else any page in a browser could ask it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from modeclip.errors import ModeclipError
from modeclip.serving.limits import Limits, RefusedError
from modeclip.serving.metrics import Metrics
from modeclip.system.console import printable

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOG = logging.getLogger("modeclip.serving")
"""A line for each request, but for those that only watch the service."""
OPEN = re.compile(r"/(?:health|ready|ping|site/.*)?")
"""Paths that take no key: what watches a service, and the page, which asks for the key itself."""
CALM = re.compile(r"/(?:health|ready|ping|metrics|site/.*)?")
"""Paths that are answered however many requests wait."""
BYTES_AT_ONCE = 16
"""All requests under way may hold so many times the bytes of the largest one."""
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "too_large_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
RETRY_SECONDS = 5.0
"""When to come again where nothing better is known."""
GONE = 499
"""Status in logs and metrics for a client that did not wait for its answer."""


def is_local(host: str) -> bool:
    """Say whether an address, or the name of a host, is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Wraps an app."""

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        metrics: Metrics,
        key: str = "",
        origins: Sequence[str] = (),
        is_local: bool = False,
    ) -> None:
        """Keep what requests are checked by.

        Args:
            app: What answers.
            limits: Bytes, seconds and requests.
            metrics: Where requests are counted.
            key: The key that clients must send; empty: none.
            origins: Origins of pages that may ask, besides the service's own.
            is_local: Whether the service listens on this machine alone.
        """
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key, self._origins, self._is_local = key.encode(), frozenset(origins), is_local
        self._bytes = self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or say why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,64}", given, re.ASCII) else new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id)
        begun, detail = time.perf_counter(), ""
        self._metrics.in_flight.inc()
        try:
            await self._answer(scope, receive, answer, headers)
        except RefusedError as error:
            detail = str(error)
            await answer.refuse(error.status, detail, error.retry_after)
        except _GoneError:
            answer.status = GONE
        except ModeclipError as error:
            detail = str(error)
            await answer.refuse(503, detail)
        except Exception:  # a defect of ours must not end the service
            LOG.exception(f"{request_id} failed")
            await answer.refuse(500, "the service has failed; its log has more under this request id")
        finally:
            self._metrics.in_flight.dec()
            seconds = time.perf_counter() - begun
            self._metrics.observe(scope, answer.status, seconds)
            path = scope["path"][:200].encode("ascii", "backslashreplace").decode()
            quiet = answer.status < 400 and CALM.fullmatch(scope["path"])
            if not quiet:
                detail = detail or scope["state"].get("detail", "")
                end = f": {printable(detail)}" if detail else ""
                LOG.info(f"{request_id} {scope['method']} {path!r} {answer.status} {1000 * seconds:.0f} ms{end}")

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer, headers: dict[str, str]) -> None:
        self._check_origin(scope, headers)
        self._check_key(scope, headers)
        if CALM.fullmatch(scope["path"]):
            async with _deadline(self._limits.timeout_seconds, 503):
                await self._app(scope, receive, answer.send)
            return
        body = bytearray()
        try:
            async with _deadline(self._limits.timeout_seconds, 408):
                await self._read(receive, headers, body)
            if self._requests >= self._limits.max_waiting:
                raise RefusedError("too many requests are under way; try again in 1 s", 429, retry_after=1)
            self._requests += 1
            try:
                async with _deadline(self._limits.timeout_seconds, 503):
                    await _while_there(self._app, scope, bytes(body), receive, answer)
            finally:
                self._requests -= 1
        finally:
            self._bytes -= len(body)

    async def _read(self, receive: Receive, headers: dict[str, str], body: bytearray) -> None:
        """Read the whole request."""
        most = self._limits.max_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise RefusedError(f"the request has {int(length):,} bytes, expected at most {most:,}; send less", 413)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            part = message.get("body", b"")
            body += part
            self._bytes += len(part)
            if len(body) > most:
                raise RefusedError(f"the request has more than {most:,} bytes; send less", 413)
            if self._bytes > BYTES_AT_ONCE * most:
                raise RefusedError("requests under way fill the memory; try again in 2 s", 429, retry_after=2)
            if not message.get("more_body", False):
                return

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self._is_local and not is_local(name):
            raise RefusedError(
                f"the service answers to localhost and 127.0.0.1, not to {host[:100]!r}; start it with --host to serve"
                " other machines",
                403,
            )
        origin = headers.get("origin", "")
        if scope["method"] in {"GET", "HEAD", "OPTIONS"} or not origin or origin in self._origins:
            return
        if "*" not in self._origins and origin.partition("://")[2] != host:
            raise RefusedError(
                f"pages of {origin[:100]!r} may not ask this service; start it with --allow-origin {origin[:100]}", 403
            )

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        if not self._key or OPEN.fullmatch(scope["path"]) or scope["method"] == "OPTIONS":
            return
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        cookies = dict(re.findall(r"([\w-]+)=([^;\s]*)", headers.get("cookie", "")))
        given = [bearer.strip() if kind.lower() == "bearer" else "", headers.get("x-api-key", "")]
        if not any(hmac.compare_digest(one.encode(), self._key) for one in [*given, cookies.get("modeclip-key", "")]):
            raise RefusedError("the API key is missing or wrong; send it as Authorization: Bearer KEY", 401)


class _GoneError(Exception):
    """The client has closed the connection."""


class _Answer:
    """Sends an answer, and knows what was sent of it."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status, self._send, self._id = 0, send, request_id.encode()
        self.is_complete = False
        """Whether all of it was sent."""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._id)]
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, status: int, message: str, retry_after: float | None = None) -> None:
        """Send an error, unless an answer has begun."""
        if self.status:
            return
        body = error_body(status, message, self._id.decode())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if retry_after is None and status == 503:
            retry_after = RETRY_SECONDS
        if retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(retry_after))).encode()))
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if status in {408, 413}:
            headers.append((b"connection", b"close"))  # what is still to come of the request is not read
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def new_request_id() -> str:
    """Return a name for a request; it is no secret, so it costs no call of the system."""
    return f"{random.getrandbits(128):032x}"


def error_body(status: int, message: str, request_id: str) -> bytes:
    """Return the JSON of an error."""
    kind = KINDS.get(status, "server_error" if status >= 500 else KINDS[400])
    error = {"message": message, "type": kind, "request_id": request_id}
    return json.dumps({"error": error}).encode()


class _deadline:  # noqa: N801 (it is used as a function)
    """Turns a timeout into what the client is told."""

    def __init__(self, seconds: float, status: int) -> None:
        self._seconds, self._status, self._timeout = seconds, status, asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *about: Any) -> None:
        try:
            await self._timeout.__aexit__(*about)
        except TimeoutError:
            slow = "did not arrive" if self._status == 408 else "was not answered"
            raise RefusedError(
                f"the request {slow} within {self._seconds:g} s; send less at a time", self._status
            ) from None


async def _while_there(app: App, scope: Scope, body: bytes, receive: Receive, answer: _Answer) -> None:
    """Have an app answer a request that was read, and stop it when the client closes the connection.

    Raises:
        _GoneError: The client has gone.
    """
    answering, is_given, has_gone = asyncio.current_task(), False, False
    assert answering is not None

    async def watch() -> MutableMapping[str, Any]:
        nonlocal has_gone
        message = await _until_gone(receive)
        if not answer.is_complete:
            has_gone = True
            answering.cancel()
        return message

    async def again() -> MutableMapping[str, Any]:
        nonlocal is_given
        if is_given:
            return await asyncio.shield(watching)
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    watching = asyncio.create_task(watch())
    try:
        await app(scope, again, answer.send)
    except asyncio.CancelledError:
        if has_gone and not answering.uncancel():  # else it was cancelled for another reason too
            raise _GoneError from None
        raise
    finally:
        watching.cancel()


async def _until_gone(receive: Receive) -> MutableMapping[str, Any]:
    """Wait until a client closes its connection, and return the message that says so."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message

"""The process that serves: its port, its signals, and clients that send slowly.

SIGTERM and SIGINT end it gracefully: no new connection is taken, what is under way is answered, and the exit code is 0.
A second signal ends it at once. SIGHUP reloads the model.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
import uvloop
from uvicorn.protocols.http.h11_impl import H11Protocol

from modeclip.errors import ModeclipError
from modeclip.serving.app import create_app
from modeclip.serving.guard import error_body, is_local, new_request_id
from modeclip.serving.service import Service
from modeclip.system.console import log

HEAD_SECONDS = 15.0
"""How long a connection may take to send the head of a request."""
DRAIN_SECONDS = 30
"""How long what is under way may take once the service ends."""
CONNECTIONS = 2048
"""Connections that wait to be accepted."""


def bind(host: str, port: int) -> socket.socket:
    """Take a port, before anything that costs time; 0: any that is free.

    Raises:
        ModeclipError: Another process has it, or the machine has no such address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ModeclipError(f"--host {host}: no address of this machine; give 127.0.0.1, or 0.0.0.0 for all") from None
    family, kind, protocol, _, address = found
    place = socket.socket(family, kind, protocol)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind(address)
    except OSError as error:
        place.close()
        if error.errno == errno.EADDRINUSE:
            raise ModeclipError(f"--port {port}: another process listens there; give another port") from None
        reason = (error.strerror or "refused").lower()
        raise ModeclipError(f"--host {host} --port {port}: {reason}; give another host or port") from None
    return place


def address_of(place: socket.socket) -> str:
    """Return the address that people open."""
    host, port = place.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(service: Service, place: socket.socket, *, key: str = "", origins: Sequence[str] = ()) -> None:
    """Answer until a signal comes.

    Args:
        service: What answers.
        place: What `bind` has returned.
        key: The key that clients must send; empty: none.
        origins: As for `create_app`.
    """
    handler = logging.StreamHandler()
    for name, level in (("modeclip.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        lines = logging.getLogger(name)
        lines.setLevel(level)
        lines.propagate = False
        lines.addHandler(handler)
    app = create_app(service, key=key, origins=origins, is_local=is_local(place.getsockname()[0]))
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=CONNECTIONS,
        timeout_keep_alive=int(HEAD_SECONDS),
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    gc.collect()
    gc.freeze()  # the libraries' 800,000 objects stay: a collection that walks them holds up all answers
    uvloop.run(_Server(config, service).serve(sockets=[place]))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and say where."""
        await super().startup(sockets)
        for place in sockets or ():
            log(f"{self._service.name}: {address_of(place)} (Ctrl-C ends it)")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, also when told twice, without the complaint of a task that was cut off."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, self._service.reload))
        try:
            yield
        finally:
            self._service.close()

    def _end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = self._service.is_ending = True
        if not self.force_exit:
            log("ending: what is under way is answered")


class PatientProtocol(H11Protocol):
    """HTTP whose clients have a while to send the head of a request, and no longer."""

    _watch: asyncio.TimerHandle | None = None
    _was_idle = False

    def connection_made(self, transport: Any) -> None:
        """Begin to watch."""
        super().connection_made(transport)
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """End to watch."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in JSON as all errors are."""
        body = error_body(400, f"{msg.rstrip('.').lower()}; send HTTP/1.1", new_request_id())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _look_later(self) -> None:
        self._watch = self.loop.call_later(HEAD_SECONDS, self._look)

    def _look(self) -> None:
        """Close a connection that has sent no whole head since the last look."""
        seen = None if self.cycle is None else id(self.cycle)
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and (seen is None or self._was_idle == seen):
            self.transport.close()
            return
        self._was_idle = seen if is_idle else False  # type: ignore[assignment]
        self._look_later()

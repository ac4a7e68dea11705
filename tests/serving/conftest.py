"""Servers: `modeclip serve` in processes of their own, on the bundle of the small run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from support import Python

PATIENCE = 1200.0


class Server:
    """A running service."""

    def __init__(self, *words: object) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = Python("-m", "modeclip", "serve", *words, "--port", self.port, NO_PROXY="*")
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if httpx.get(f"{self.url}/ready", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise AssertionError("\n".join(self.process.communicate()))
            time.sleep(0.05)

    def ask(self, path: str, **body: object) -> httpx.Response:
        """POST JSON."""
        return httpx.post(self.url + path, json=body, timeout=PATIENCE, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE, trust_env=False)

    def counter(self, name: str) -> float:
        """A value of /metrics, its labels included in the name."""
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))

    def end(self) -> tuple[int, str]:
        """Send SIGTERM; return the exit code and what was logged."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
        _, errors = self.process.communicate()
        return self.process.wait(), errors


@pytest.fixture(scope="session")
def served_run(small_run: Path, made_once: Callable[..., Path]) -> Path:
    """A copy of the small run that was served once, so that it has its index; for reading."""

    def fill(out: Path) -> None:
        shutil.copytree(small_run, out)
        code, errors = Server(out).end()
        assert code == 0, errors
        assert "first start: encode the images" in errors
        assert (out / "index" / "index.json").is_file()

    return made_once("served", fill)


@pytest.fixture(scope="session")
def server(served_run: Path) -> Iterator[Server]:
    """A service of that run that all tests ask."""
    running = Server(served_run)
    yield running
    code, errors = running.end()
    assert code == 0, errors
    assert "Traceback" not in errors, errors


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Start a service with these words; it is ended with the test."""
    running: list[Server] = []

    def begin(*words: object) -> Server:
        running.append(Server(*words))
        return running[-1]

    yield begin
    for one in running:
        one.end()

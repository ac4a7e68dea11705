"""Traffic of which a third is hostile or unlucky, for a service that must answer the rest as if nothing were.

``python tests/serving/hostile.py RUN|BUNDLE [--requests 10000] [--clients 32] [--seed 0]`` starts a service of its own
and says how it went: statuses, the slowest answers, and its memory from a tenth of the way on. The exit code is 1 if an
answer had a status of 500 or more, a good request was not answered as it is when it comes alone, or the memory grew by
more than 5 %. `test_hostile.py` sends a few of the same.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support import encode_picture, noise_picture, png_bomb

PATIENCE = 300.0
LISTS = [["heart", "arrow", "home"], ["red", "blue"], [f"thing {number}" for number in range(200)]]


@dataclass
class Outcome:
    """What came of the traffic."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How often each kind of request had each status; 0 where the client left."""
    lost: list[str] = field(default_factory=list)
    """Good requests that had no answer, or another one than alone."""
    memory: list[float] = field(default_factory=list)
    """Bytes of the service, ten times on the way."""
    seconds: list[float] = field(default_factory=list)
    """Of good requests."""

    @property
    def errors(self) -> dict[str, int]:
        """How often there was a status of 500 or more."""
        return {f"{kind} {status}": count for (kind, status), count in self.statuses.items() if status >= 500}


def post(path: str, body: bytes, *, length: int | None = None, extra: str = "") -> bytes:
    """Return a request as bytes."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n"
    return f"{head}{extra}\r\n".encode() + body


def classify(image: bytes, classes: list[str]) -> bytes:
    text = base64.b64encode(image).decode()
    return post("/classify", json.dumps({"images": [text], "classes": classes, "top": 3}).encode())


def good_requests() -> list[bytes]:
    """Requests that are answered with 200."""
    pictures = [
        encode_picture(noise_picture(seed, (24 + seed, 32)), kind) for seed in range(6) for kind in ("PNG", "JPEG")
    ]
    asked = [classify(picture, LISTS[number % len(LISTS)]) for number, picture in enumerate(pictures)]
    asked += [post("/route", json.dumps({"classes": classes}).encode()) for classes in LISTS]
    asked.append(post("/v1/embeddings", json.dumps({"input": ["a heart", "an arrow"]}).encode()))
    return asked


def hostile_requests() -> dict[str, tuple[bytes, str]]:
    """Requests by kind, and how the client behaves: waits, leaves at once, or sends half of it and stalls."""
    picture = encode_picture(noise_picture(1, (64, 64)))
    whole = classify(picture, LISTS[0])
    frames = [noise_picture(seed, (2, 2)) for seed in range(1200)]
    many = encode_picture(frames[0], "GIF", save_all=True, append_images=frames[1:])
    wrong: dict[str, Any] = {"images": {"a": [1]}, "classes": 7, "top": "many"}
    return {
        "bomb": (classify(png_bomb(), LISTS[0]), "wait"),
        "truncated picture": (classify(picture[:200], LISTS[0]), "wait"),
        "noise": (classify(random.Random(0).randbytes(2000), LISTS[0]), "wait"),
        "no picture": (classify(b"", LISTS[0]), "wait"),
        "too many frames": (classify(many, LISTS[0]), "wait"),
        "address": (post("/classify", b'{"images": ["http://127.0.0.1/a.png"], "classes": ["a"]}'), "wait"),
        "wrong types": (post("/classify", json.dumps(wrong).encode()), "wait"),
        "no JSON": (post("/classify", b"{'a': "), "wait"),
        "deep JSON": (post("/route", b"[" * 100_000), "wait"),
        "half a letter": (post("/route", b'{"classes": ["a\\ud800"]}'), "wait"),
        "NUL": (post("/route", b'{"classes": ["a\\u0000"]}'), "wait"),
        "no UTF-8": (post("/route", b'{"classes": ["\xff\xfe"]}'), "wait"),
        "infinite": (post("/route", b'{"classes": ["a"], "temperature": Infinity}'), "wait"),
        "long text": (post("/v1/embeddings", json.dumps({"input": "a" * 5000}).encode()), "wait"),
        "too many": (post("/v1/embeddings", json.dumps({"input": ["a"] * 2000}).encode()), "wait"),
        "too large": (post("/classify", b"{", length=10**9), "wait"),
        "no length": (b"POST /route HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: many\r\n\r\n", "wait"),
        "bad chunk": (b"POST /route HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "wait"),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n", "wait"),
        "long head": (b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"a" * 200_000 + b"\r\n\r\n", "wait"),
        "other path": (post("/../../etc/passwd", b"{}"), "wait"),
        "other method": (b"DELETE /models HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", "wait"),
        "other host": (b"GET /models HTTP/1.1\r\nhost: evil.example\r\n\r\n", "wait"),
        "cut request": (whole, "cut"),
        "slow sender": (whole, "slow"),
        "gone before the answer": (whole, "leave"),
    }


async def send(port: int, request: bytes, how: str = "wait") -> tuple[int, bytes]:
    """Send a request over a connection of its own, and return status and body; status 0: the client left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if how == "slow":
            for place in range(0, min(len(request), 60), 20):
                writer.write(request[place : place + 20])
                await writer.drain()
                await asyncio.sleep(0.05)
            return 0, b""
        writer.write(request[: len(request) // 2] if how == "cut" else request)
        with suppress(ConnectionError):  # refused before all of it was sent; the answer may be there
            await writer.drain()
        if how != "wait":
            return 0, b""
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: (\d+)", head)
        body = await reader.readexactly(int(found[1])) if found else await reader.read()
        return int(head.split()[1]), body
    finally:
        writer.close()


def equal(found: bytes, expected: bytes) -> bool:
    """Whether two answers are the same to 1e-5; the largest of equal numbers may be another."""
    numbers = [[float(one) for one in re.findall(rb"-?\d+\.\d+(?:e-?\d+)?", text)] for text in (found, expected)]
    words = [re.sub(rb"-?\d+\.\d+(?:e-?\d+)?", b"", text) for text in (found, expected)]
    return words[0] == words[1] and all(abs(one - other) < 1e-5 for one, other in zip(*numbers, strict=True))


async def traffic(port: int, *, requests: int, clients: int = 32, seed: int = 0) -> Outcome:
    """Send requests, a third of them hostile, and compare what comes back with what comes alone."""
    outcome, rng = Outcome(), random.Random(seed)
    good, hostile = good_requests(), hostile_requests()
    expected = [(await send(port, request))[1] for request in good]
    names = list(hostile)
    plan = [("good", rng.randrange(len(good))) for _ in range(requests - requests // 3)]
    plan += [(names[number % len(names)], 0) for number in range(requests // 3)]
    rng.shuffle(plan)
    looks = {requests * part // 10 for part in range(1, 10)}
    queue = list(reversed(plan))

    async def client() -> None:
        while queue:
            kind, number = queue.pop()
            if len(queue) in looks:
                outcome.memory.append(await memory(port))
            if kind != "good":
                await trouble(kind)
                continue
            for _ in range(100):
                begun = time.perf_counter()
                try:
                    status, body = await asyncio.wait_for(send(port, good[number]), PATIENCE)
                except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as error:
                    outcome.lost.append(f"{number}: {type(error).__name__} {error}")
                    break
                outcome.statuses["good", status] += 1
                if status == 429:  # the queue was full: come again
                    await asyncio.sleep(1)
                    continue
                outcome.seconds.append(time.perf_counter() - begun)
                if status != 200 or not equal(body, expected[number]):
                    outcome.lost.append(f"{number}: {status} {body[:200]!r}")
                break

    async def trouble(kind: str) -> None:
        request, how = hostile[kind]
        try:
            status, _ = await asyncio.wait_for(send(port, request, how), PATIENCE)
        except (ConnectionError, asyncio.IncompleteReadError):
            status = 0  # the service has closed the connection, as it may
        outcome.statuses[kind, status] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    outcome.memory.append(await memory(port))
    return outcome


async def memory(port: int) -> float:
    """Return the bytes of the service."""
    _, body = await send(port, b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    found = re.search(rb"(?m)^process_resident_memory_bytes (\S+)", body)
    assert found, body[:200]
    return float(found[1])


async def _until_ready(port: int) -> None:
    while True:
        try:
            status, _ = await send(port, b"GET /ready HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        except OSError:
            status = 0
        if status == 200:
            return
        await asyncio.sleep(0.1)


def main() -> int:
    """Start a service, send the traffic, and say how it went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modeclip", "serve", given.what, "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        asyncio.run(_until_ready(port))
        begun = time.perf_counter()
        outcome = asyncio.run(traffic(port, requests=given.requests, clients=given.clients, seed=given.seed))
        seconds = time.perf_counter() - begun
        os.kill(process.pid, signal.SIGTERM)
        code = process.wait()
    for (kind, status), count in sorted(outcome.statuses.items()):
        print(f"{kind:24} {status:4} {count:6,}")
    growth = max(outcome.memory) / outcome.memory[0] - 1
    times = sorted(outcome.seconds)
    print(
        f"{given.requests:,} requests in {seconds:.0f} s; lost {len(outcome.lost)}; 5xx {sum(outcome.errors.values())}"
    )
    print(f"good: p50 {1000 * times[len(times) // 2]:.0f} ms, p99 {1000 * times[int(0.99 * len(times))]:.0f} ms")
    print(f"memory {outcome.memory[0] / 1e6:,.0f} MB, then at most {100 * growth:+.1f} %; exit code {code}")
    print(f"MB, ten times on the way: {', '.join(f'{one / 1e6:,.0f}' for one in outcome.memory)}")
    for line in outcome.lost[:10]:
        print(line)
    return int(bool(outcome.lost or outcome.errors or growth > 0.05 or code))


if __name__ == "__main__":
    raise SystemExit(main())

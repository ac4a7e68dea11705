"""How many requests a second a service answers to 32 clients, beside the same model served one request at a time.

Usage: python benchmarks/serving.py RUN|BUNDLE [--clients 32] [--seconds 10] [--rounds 5]

All are real processes that answer ``POST /classify`` with a picture of 64 pixels and ten classes. The first peer is the
same service with batches of one picture, so everything but the batches is equal. The second is what anybody writes in
twenty lines: FastAPI, a lock, and ``task.classify``, with the task of each list of classes kept, so no text is encoded
again. The clients are one process of their own that holds an open connection each and sends the next request, whose
bytes are ready, when the last is answered. The services are asked in turns; a round is a ratio, and the median of them
is printed with p50 and p99, and with the processor time of a request, which a busy machine disturbs less. Then a list
of 1,000 classes is asked twice, with what the text towers and the router's encoder had to do for each.

``python benchmarks/serving.py RUN --searches`` compares searches of a run's index, which are joined while they are in
flight, with the same service where each search reads the index by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ["modeclip serve", "the same with batches of one", "FastAPI and a lock"]
CLASSES = ["heart", "arrow", "home", "star", "circle", "mail", "user", "cloud", "file", "lock"]


def serve_alone(bundle: str, port: int) -> None:
    """Serve a bundle with modeclip, one picture in a batch."""
    from modeclip.__main__ import main as modeclip
    from modeclip.serving import answers

    answers.BATCH = 1
    sys.argv = ["modeclip", "serve", bundle, "--port", str(port)]
    modeclip()


def serve_searches_alone(run: str, port: int) -> None:
    """Serve a run with modeclip, each search by itself in one of two threads."""
    from modeclip.__main__ import main as modeclip
    from modeclip.serving import service

    async def search(own: service.Service, index: Any, asked: Any, **options: Any) -> Any:
        return await own._in(own._searchers, service._reading(index), lambda: index.search(asked, **options))

    service.Service.search = search  # type: ignore[method-assign]
    sys.argv = ["modeclip", "serve", run, "--port", str(port)]
    modeclip()


def serve_one_at_a_time(bundle: str, port: int) -> None:
    """Serve a bundle as one would without modeclip.serving."""
    import threading
    from functools import lru_cache

    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    from modeclip import MoDE
    from modeclip.data.images import decode_image

    class Asked(BaseModel):
        images: list[str]
        classes: list[str]

    app, mode, lock = FastAPI(), MoDE.load(bundle), threading.Lock()
    task_of = lru_cache(64)(lambda classes: mode.task(list(classes)))

    def classify(body: Asked) -> dict[str, object]:
        pictures = [decode_image(base64.b64decode(one)) for one in body.images]
        with lock:
            found = task_of(tuple(body.classes)).classify(pictures)
        return {"pictures": [list(zip(one.classnames, one.probabilities, strict=True)) for one in found]}

    classify.__annotations__["body"] = Asked
    app.post("/classify")(classify)
    app.get("/ready")(lambda: {})
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


def request_of(body: dict[str, object], path: str = "/classify") -> bytes:
    """Return a request as bytes."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


def picture_of(seed: int) -> str:
    """Return a random picture in base64."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    """Send a request and read its answer."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    assert length, head
    return int(head.split()[1]), await reader.readexactly(int(length[1]))


async def ask(port: int, request: bytes) -> tuple[int, bytes]:
    """Ask once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await exchange(reader, writer, request)
    finally:
        writer.close()


async def load(port: int, requests: list[bytes], clients: int, seconds: float) -> list[float]:
    """Have clients ask for a while, and return how long each answer took."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (begun := time.perf_counter()) < end:
            status, body = await exchange(reader, writer, requests[number % len(requests)])
            assert status == 200, body
            times.append(time.perf_counter() - begun)
            number += clients
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return times


def counters(port: int) -> dict[str, float]:
    """Return what went through the towers."""
    _, body = asyncio.run(ask(port, b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"))
    found = re.findall(rb'modeclip_batch(es|_items)_total\{kind="(\w+)"\} (\S+)', body)
    return {f"{kind.decode()} {what.decode()}": float(value) for what, kind, value in found}


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """Return the processor time of a process, which a busy machine disturbs less than the time of day."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(words: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a service and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, *words, "--port", str(port)], stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            asyncio.run(ask(port, b"GET /ready HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"))
            return process, port
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{' '.join(words)} has ended with {process.returncode}")


def measure(
    ports: Sequence[int], processes: Sequence[subprocess.Popen[bytes]], requests: list[bytes], given: argparse.Namespace
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """Ask services in turns; return rates by round, seconds of all answers, and processor milliseconds a request."""
    rates: list[list[float]] = []
    times: list[list[float]] = [[] for _ in ports]
    for place in ports:
        asyncio.run(load(place, requests, given.clients, 2))  # all are warm then
    used = [-processor_seconds(process) for process in processes]
    for _ in range(given.rounds):
        found = [asyncio.run(load(place, requests, given.clients, given.seconds)) for place in ports]
        rates.append([len(own) / given.seconds for own in found])
        for all_times, own in zip(times, found, strict=True):
            all_times += own
    used = [before + processor_seconds(process) for before, process in zip(used, processes, strict=True)]
    return rates, times, [1000 * seconds / len(own) for seconds, own in zip(used, times, strict=True)]


def show(
    names: Sequence[str], rates: list[list[float]], times: list[list[float]], cost: list[float], clients: int
) -> None:
    """Print what was measured as Markdown."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {datetime.now(UTC).date()},"
        f" seed 0, {clients} clients\n"
    )
    print("| | requests/s | p50, ms | p99, ms | p99 / p50 | processor, ms a request |")
    print("|---|---|---|---|---|---|")
    for number, (name, own) in enumerate(zip(names, times, strict=True)):
        low, high = (1000 * value for value in np.quantile(own, [0.5, 0.99]))
        rate = statistics.median(one[number] for one in rates)
        print(f"| {name} | {rate:,.0f} | {low:.1f} | {high:.1f} | {high / low:.2f} | {cost[number]:.1f} |")
    for number, name in enumerate(names[1:], 1):
        ratios = [one[0] / one[number] for one in rates]
        print(
            f"\nratio to {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in"
            f" {len(rates)} rounds), of processor time: {cost[number] / cost[0]:.2f}"
        )


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End services."""
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
        process.wait()


def measure_searches(given: argparse.Namespace) -> None:
    """Compare searches of several clients that are joined with searches of their own."""
    words = [f"{kind} {name}" for kind in ("", "small", "open", "new", "round", "two") for name in CLASSES]
    requests = [request_of({"text": one.strip(), "count": 10}, "/search") for one in words]
    started = [start(["-m", "modeclip", "serve", given.what]), start([__file__, given.what, "--as-peer", "alone"])]
    processes, ports = zip(*started, strict=True)
    try:
        found = measure(ports, processes, requests, given)
        done = counters(ports[0])
    finally:
        end(processes)
    show(["modeclip serve, searches joined", "each search by itself"], *found, given.clients)
    print(f"searches in a batch: {done['searches _items'] / done['searches es']:.1f}")


def main() -> None:
    """Measure, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--searches", action="store_true", help="measure searches of a run's index")
    parser.add_argument("--as-peer", choices=["batches of one", "plain", "alone"], help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_peer == "alone":
        serve_searches_alone(given.what, given.port)
        return
    if given.searches:
        measure_searches(given)
        return
    bundle = next(
        str(path) for path in (Path(given.what) / "bundle", Path(given.what)) if (path / "mode.json").is_file()
    )
    if given.as_peer:
        (serve_alone if given.as_peer == "batches of one" else serve_one_at_a_time)(bundle, given.port)
        return
    requests = [request_of({"images": [picture_of(seed)], "classes": CLASSES}) for seed in range(64)]
    started = [start(["-m", "modeclip", "serve", bundle])]
    started += [start([__file__, bundle, "--as-peer", peer]) for peer in ("batches of one", "plain")]
    processes, ports = zip(*started, strict=True)
    port = ports[0]
    try:
        found = measure(ports, processes, requests, given)
        done = counters(port)
        many = request_of({"images": [picture_of(0)], "classes": [f"thing number {one}" for one in range(1000)]})
        texts = [counters(port)]
        for _ in range(2):
            assert asyncio.run(ask(port, many))[0] == 200
            texts.append(counters(port))
    finally:
        end(processes)
    show(NAMES, *found, given.clients)
    print(f"pictures in a batch: {done['images _items'] / done['images es']:.1f}")
    for number, name in enumerate(("first", "again")):
        passed = {
            kind: int(texts[number + 1][f"{kind} _items"] - texts[number][f"{kind} _items"])
            for kind in ("texts", "router")
        }
        print(f"1,000 classes, {name}: {passed['texts']:,} texts encoded, {passed['router']:,} routed")


if __name__ == "__main__":
    main()

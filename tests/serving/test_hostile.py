"""Hostile and unlucky clients: the others are answered as if they were alone; `hostile.py` sends 10,000 requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from serving.hostile import hostile_requests, send, traffic

if TYPE_CHECKING:
    from conftest import Server

pytestmark = pytest.mark.slow
LEFT = {"cut request", "slow sender", "gone before the answer"}


def test_good_requests_among_hostile_ones(server: Server) -> None:
    outcome = asyncio.run(traffic(server.port, requests=120, clients=8))
    assert not outcome.lost
    assert not outcome.errors
    assert outcome.statuses["good", 200] == 80
    refused = {kind for kind, status in outcome.statuses if 400 <= status < 500}
    assert set(hostile_requests()) - LEFT - refused <= {"too large", "long head"}, outcome.statuses
    assert max(outcome.memory) < 1.1 * min(outcome.memory)


def test_a_bomb_is_refused_by_its_header(server: Server) -> None:
    status, body = asyncio.run(send(server.port, hostile_requests()["bomb"][0]))
    assert status == 413
    assert b"pixels" in body or b"bomb" in body

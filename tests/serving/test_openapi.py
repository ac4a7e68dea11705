"""The OpenAPI of a service: its examples work, and whatever fits or does not fit its shapes is answered as it says."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

if TYPE_CHECKING:
    from conftest import Server

pytestmark = pytest.mark.slow
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
HEALTH = list(hypothesis.HealthCheck)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_answers_are_as_the_openapi_says(server: Server, mode: GenerationMode) -> None:
    for found in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():
        operation = found.ok()

        @hypothesis.settings(max_examples=3, phases=[hypothesis.Phase.generate], suppress_health_check=HEALTH)
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=1200)

        with suppress(hypothesis.errors.Unsatisfiable):  # nothing of a route can be wrong
            ask()


def test_every_example_is_answered(server: Server) -> None:
    content = server.get("/openapi.json").json()
    shapes, tried = content["components"]["schemas"], 0
    for path, methods in content["paths"].items():
        kinds = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" not in kinds:
            continue
        name = kinds["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for example in shapes[name]["examples"]:
            answer = server.ask(path, **example)
            assert answer.status_code == (409 if path == "/route-images" else 200), (path, answer.text)
            tried += 1
    assert tried >= 7

"""The OpenAPI of a service: its examples work, and whatever fits or does not fit its shapes is answered as it says."""

from __future__ import annotations

import json
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

from modeclip.serving import shapes

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
    schemas, tried = content["components"]["schemas"], 0
    for path, methods in content["paths"].items():
        kinds = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" not in kinds:
            continue
        name = kinds["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for example in schemas[name]["examples"]:
            answer = server.ask(path, **example)
            assert answer.status_code == (409 if path == "/route-images" else 200), (path, answer.text)
            tried += 1
    assert tried >= 7


def test_every_shape_of_an_answer_has_an_example_that_fits_it(server: Server) -> None:
    content = server.get("/openapi.json").json()
    shown = set()
    for methods in content["paths"].values():
        for answers in (method["responses"] for method in methods.values()):
            for answer in answers.values():
                shape = answer.get("content", {}).get("application/json", {}).get("schema", {})
                if place := (shape.get("items", shape)).get("$ref"):
                    shown.add(place.rpartition("/")[2])
    assert len(shown) >= 10
    for name in shown:
        (example,) = content["components"]["schemas"][name]["examples"]
        given = getattr(shapes, name).model_validate(example).model_dump(by_alias=True, exclude_none=True)
        assert json.loads(json.dumps(given)).keys() <= example.keys()

"""The server against its own OpenAPI document: schemathesis makes requests, valid and invalid.

The examples are few, and the same in every run. `make fuzz-http` runs many, and every corner of
each schema, against a server on a port.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from http_contract import CHECKS, REPLACED
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from steer.engines.fake.engine import FakeEngine
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.openapi import openapi_document
from steer_server.settings import ServerSettings

pytestmark = pytest.mark.slow

FEW = settings(
    derandomize=True,
    max_examples=8,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
OPERATIONS = [
    (method.upper(), path)
    for path, methods in openapi_document()["paths"].items()
    for method in methods
]


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    settings = ServerSettings(
        measured_share=0, job_workers=0, job_queue=1_000_000, allowed_hosts=("*",)
    )
    with Registry.open(tmp_path_factory.mktemp("contract")) as registry:
        app = create_app(FakeEngine(), registry, settings)
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_an_operation_answers_as_it_is_documented(
    contract: Any, method: str, path: str, mode: GenerationMode
) -> None:
    operation = contract[path][method]
    if mode is GenerationMode.NEGATIVE and not _takes_anything(operation):
        return  # nothing about it can be wrong

    @FEW
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers(case: Any) -> None:
        case.call_and_validate(additional_checks=CHECKS, excluded_checks=REPLACED)

    with suppress(Unsatisfiable):  # any text is right
        answers()


def _takes_anything(operation: Any) -> bool:
    definition = operation.definition.raw
    return bool(definition.get("parameters") or "requestBody" in definition)

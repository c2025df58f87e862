"""Images in chats of `steer serve --engine vllm`, asked over HTTP with OpenAI's client."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import vllm_engine
from liveness import LIVENESS_SECONDS
from tiny_vision import IMAGE, PARTS, picture, write_seeing_model
from vllm_server import running_server

from steer_vectors import LIBRARY

MODEL = "seeing"
TEXT = {"except": {"tokens": [IMAGE]}}
FRENCH: dict[str, Any] = {"kind": "add", "vector": "french", "strength": 1.0}
ALL = {"phases": ["prompt", "generation"]}
EVERYWHERE = {"interventions": [{**FRENCH, "where": ALL}]}
ON_TEXT = {"interventions": [{**FRENCH, "where": {**ALL, **TEXT}}]}
ON_IMAGES = {"interventions": [{**FRENCH, "where": {"tokens": [IMAGE]}}]}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("seeing")
    write_seeing_model(folder, vllm_engine.DEMO_MODEL)
    with Registry.open(folder / "registry") as registry:
        demo_specs.register(registry)
    arguments = ("--model", str(folder), "--model-name", MODEL)
    with (
        running_server(folder / "registry", *arguments) as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIVENESS_SECONDS
        ) as connected,
    ):
        yield connected

"""The documents follow the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from steer_server.openapi import DOCUMENT, openapi_document, openapi_text

ROOT = Path(__file__).parents[2]
HTTP = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")


def test_the_openapi_document_is_up_to_date() -> None:
    assert (ROOT / DOCUMENT).read_text(encoding="utf-8") == openapi_text(), (
        "run: python -c 'from pathlib import Path; "
        'from steer_server.openapi import write; write(Path("."))\''
    )


def test_every_route_is_described() -> None:
    for path, methods in openapi_document()["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in HTTP, (method, path)


REQUESTS = re.findall(r"```json request (\S+)\n(.*?)```", HTTP, flags=re.DOTALL)


@pytest.mark.parametrize(("route", "text"), REQUESTS)
async def test_the_examples_work(http: httpx.AsyncClient, route: str, text: str) -> None:
    response = await http.post(route, json=json.loads(text))
    assert response.status_code == 200, response.text


def test_there_are_examples() -> None:
    assert len(REQUESTS) >= 4


async def test_every_error_code_is_listed(http: httpx.AsyncClient) -> None:
    sources: list[Any] = [*(ROOT / "server").rglob("*.py"), ROOT / "steer" / "errors.py"]
    sources += [*(ROOT / "steer" / "jobs").rglob("*.py"), ROOT / "steer/registry/jobs/job_store.py"]
    for room in (
        "spec",
        "prompts",
        "readouts",
        "inspection",
        "formats",
        "artefacts",
        "fit",
        "plan",
    ):
        sources += (ROOT / "steer" / room).rglob("*.py")
    used = set()
    for source in sources:
        used |= set(re.findall(r'code="(\w+)"|code = "(\w+)"', source.read_text(encoding="utf-8")))
    # These stop the start; below are what has no code of its own.
    stops = {"unknown_engine", "vllm_not_installed", "no_key", "adapter_name"}
    # These are met by commands and callers, on files and plans of their own.
    stops |= {"no_such_file", "not_written", "invalid_plan", "plan_version"}
    stops |= {"invalid_edit", "invalid_gate"}
    codes = {a or b for a, b in used} - stops - {"steer_error", "http_error"}
    missing = {code for code in codes if f"`{code}`" not in HTTP}
    assert not missing

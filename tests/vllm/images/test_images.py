"""Prompts with images: their parts are prompt tokens, steered where a spec selects them.

The model is the demo model behind a random image tower; what it should say comes from hooks by hand
on transformers' own. In every form; all but the first have a worker in a process of its own, where
the kernel of the form for CUDA graphs is interpreted.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from seeing_oracle import SeeingOracle
from tiny_vision import PARTS
from vllm_images import *  # noqa: F403
from vllm_images import (
    CACHED,
    IN_EVERY_FORM,
    PROMPTS,
    SPECS,
    ask,
    assert_said,
    assert_told_apart,
    running_llm,
    said,
    use_registry,
)

from steer.engines.vllm.front.offline import Steered

ENGINES: dict[str, dict[str, Any]] = {
    "in Python": {},
    "static": {
        "distributed_executor_backend": "mp",
        "additional_config": {"steer": {"form": "static"}},
    },
    "compiled": {"distributed_executor_backend": "mp", "enforce_eager": False},
}


@pytest.fixture(scope="module", params=ENGINES)
def llm(oracle: SeeingOracle, folder: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    use_registry(folder / "registry")
    with running_llm(folder, **ENGINES[request.param]) as running:
        yield running


@pytest.mark.parametrize("llm", ["in Python"], indirect=True)
@pytest.mark.parametrize("name", SPECS)
def test_tokens_are_steered_as_by_hooks(steered: Steered, oracle: SeeingOracle, name: str) -> None:
    spec = SPECS[name]
    answers = ask(steered, oracle.family, PROMPTS, [spec] * 4)
    for asked, answer in zip(PROMPTS, answers, strict=True):
        wanted = said(oracle, asked, spec)
        assert wanted.prompt.count(oracle.image) == PARTS * len(asked.images)
        assert_said(answer, wanted)


@pytest.mark.parametrize(
    ("llm", "name"),
    [
        (form, name)
        for form in ENGINES
        for name in (CACHED if form == "in Python" else IN_EVERY_FORM)
    ],
    indirect=["llm"],
)
def test_the_cache_tells_images_and_specs_apart(
    steered: Steered, oracle: SeeingOracle, name: str
) -> None:
    assert_told_apart(steered, oracle, name)

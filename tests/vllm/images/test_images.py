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
from typing import Any, NamedTuple

import demo_specs
import pytest
import vllm_engine
from seeing_oracle import SeeingOracle
from tiny_vision import IMAGE, PARTS
from vllm_images import *  # noqa: F403
from vllm_images import ADD, BLOCK, CHUNK, PROMPTS, SPECS, Asked, ask, assert_said, said

from steer.engines.vllm.front.offline import Steered
from steer.registry.registry import Registry

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
    registry = folder / "registry"
    with Registry.open(registry) as opened:
        demo_specs.register(opened)
    os.environ["STEER_REGISTRY"] = str(registry)
    from vllm import LLM

    options = {"model": str(folder), "max_num_batched_tokens": CHUNK, "block_size": BLOCK}
    options = vllm_engine.OPTIONS | options | ENGINES[request.param]
    running = LLM(**options, limit_mm_per_prompt={"image": 2})
    yield running
    running.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("llm", ["in Python"], indirect=True)
@pytest.mark.parametrize("name", SPECS)
def test_tokens_are_steered_as_by_hooks(steered: Steered, oracle: SeeingOracle, name: str) -> None:
    spec = SPECS[name]
    for asked, answer in zip(PROMPTS, ask(steered, PROMPTS, [spec] * 4), strict=True):
        wanted = said(oracle, asked, spec)
        assert wanted.prompt.count(oracle.image) == PARTS * len(asked.images)
        assert_said(answer, wanted)


ONE = Asked(f"{IMAGE} What is in the park? The cat sat on the house and the dog is in it", (1,))
OTHER = ONE._replace(images=(4,))


class Cached(NamedTuple):
    """What `second` finds in the cache after `first`, in tokens."""

    first: tuple[Asked, Any]
    second: tuple[Asked, Any]
    tokens: int


EVERYWHERE, TEXT, IMAGES = (SPECS[name] for name in ("everywhere", "text", "images"))
GENERATED, LATE = SPECS["what is generated"], {"positions": [[BLOCK, None]]}
CACHED = {
    "the same": Cached((ONE, EVERYWHERE), (ONE, EVERYWHERE), BLOCK),
    "another image, unsteered": Cached((ONE, None), (OTHER, None), 0),
    "another image, steered alike": Cached((ONE, EVERYWHERE), (OTHER, EVERYWHERE), 0),
    "another image, steered behind it": Cached((ONE, GENERATED), (OTHER, GENERATED), 0),
    "unsteered and steered": Cached((ONE, None), (ONE, EVERYWHERE), 0),
    "steered and unsteered": Cached((ONE, EVERYWHERE), (ONE, None), 0),
    "unsteered, and steered behind the image": Cached(
        (ONE, None), (ONE, {"interventions": [ADD], "where": LATE}), BLOCK
    ),
    "text and all": Cached((ONE, TEXT), (ONE, EVERYWHERE), 0),
    "text and images": Cached((ONE, TEXT), (ONE, IMAGES), 0),
    "only what is generated": Cached((ONE, None), (ONE, GENERATED), BLOCK),
}


IN_EVERY_FORM = ("the same", "another image, steered alike", "text and images")
"""The engine core makes the keys, and is the same in each form."""


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
    case = CACHED[name]
    for (asked, spec), cached in ((case.first, 0), (case.second, case.tokens)):
        (answer,) = ask(steered, [asked], [spec])
        wanted = said(oracle, asked, spec)
        assert_said(answer, wanted)
        assert answer.output.num_cached_tokens == cached
        if answer.receipt is not None:
            assert answer.receipt.tokens_cached == sum(wanted.steered[:cached])

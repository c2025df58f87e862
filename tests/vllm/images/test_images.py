"""Prompts with images: their parts are prompt tokens, steered where a spec selects them.

The model is the demo model behind a random image tower; what it should say comes from hooks by hand
on transformers' own. In every form; all but the first have a worker in a process of its own, where
the kernel of the form for CUDA graphs is interpreted.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import demo_specs
import pytest
import vllm_engine
from seeing_oracle import Said, SeeingOracle
from tiny_vision import IMAGE, PARTS, picture

from steer.engines.vllm.front.offline import Steered, SteeredOutput
from steer.registry.registry import Registry

NEW = 6
BLOCK, CHUNK = 32, 48


class Asked(NamedTuple):
    text: str
    images: tuple[int, ...] = ()


PROMPTS = (
    Asked(f"{IMAGE} What is in the park?", (1,)),
    Asked(f"The dog is in the house. {IMAGE} and then {IMAGE} the cat sat", (2, 3)),
    Asked("What is in the park?"),
    Asked(f"The cat sat on {IMAGE}", (2,)),
)
ADD = demo_specs.add("v0")
PLACES: dict[str, Any] = {
    "everywhere": None,
    "the prompt": {"phases": ["prompt"]},
    "what is generated": {"phases": ["generation"]},
    "the last token on": {"positions": [[-1, None]]},
    "a window that cuts an image": {"positions": [[5, 12]]},
    "images": {"tokens": [IMAGE]},
    "text": {"except": {"tokens": [IMAGE]}},
    "text of the prompt": {"phases": ["prompt"], "except": {"tokens": [IMAGE]}},
}
SPECS: dict[str, Any] = {
    "unsteered": None,
    **{name: {"interventions": [ADD], "where": where} for name, where in PLACES.items()},
    "a clamp on text": {**demo_specs.SPECS["a clamp"], "where": PLACES["text"]},  # type: ignore[dict-item]
    "a clamp that competes": demo_specs.SPECS["a clamp that competes"],
    "norm preserved": demo_specs.SPECS["norm preserved"],
}


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


@pytest.fixture(scope="module")
def steered(llm: Any) -> Steered:
    return Steered(llm, library=demo_specs.LIBRARY)


@pytest.fixture(autouse=True)
def _empty_cache(llm: Any) -> None:
    assert llm.reset_prefix_cache()


def ask(steered: Steered, asked: Sequence[Asked], specs: Sequence[Any]) -> list[SteeredOutput]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=NEW, temperature=0, logprobs=0, ignore_eos=True)
    prompts = [
        {"prompt": one.text, "multi_modal_data": {"image": [picture(n) for n in one.images]}}
        if one.images
        else {"prompt": one.text}
        for one in asked
    ]
    return steered.generate(prompts, params, specs, full_receipt=True, use_tqdm=False)


def said(oracle: SeeingOracle, asked: Asked, spec: Any) -> Said:
    return oracle.say(asked.text, [picture(n) for n in asked.images], spec, new=NEW)


def assert_said(answer: SteeredOutput, wanted: Said) -> None:
    (choice,) = answer.output.outputs
    assert answer.output.prompt_token_ids == wanted.prompt
    assert list(choice.token_ids) == wanted.tokens
    pairs = zip(choice.token_ids, choice.logprobs, strict=True)
    scores = [each[token].logprob for token, each in pairs]
    assert scores == pytest.approx(wanted.logprobs, abs=1e-4)
    steered = sum(wanted.steered)
    if answer.receipt is None:
        assert steered == 0
    else:
        assert answer.receipt.tokens_steered == steered
        assert answer.receipt.tokens_skipped == len(wanted.steered) - steered


@contextmanager
def pieces(llm: Any) -> Iterator[list[list[int]]]:
    """The last token before each piece of a prompt but the first, and the piece's first token."""
    begun: list[list[int]] = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def schedule_watched(*args: Any, **named: Any) -> Any:
        output = schedule(*args, **named)
        cached = output.scheduled_cached_reqs
        for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            request = scheduler.requests[req_id]
            if computed < request.num_prompt_tokens:
                begun.append(list(request.prompt_token_ids[computed - 1 : computed + 1]))
        return output

    scheduler.schedule = schedule_watched
    try:
        yield begun
    finally:
        del scheduler.schedule


@pytest.mark.parametrize("llm", ["in Python"], indirect=True)
@pytest.mark.parametrize("name", SPECS)
def test_tokens_are_steered_as_by_hooks(steered: Steered, oracle: SeeingOracle, name: str) -> None:
    spec = SPECS[name]
    for asked, answer in zip(PROMPTS, ask(steered, PROMPTS, [spec] * 4), strict=True):
        wanted = said(oracle, asked, spec)
        assert wanted.prompt.count(oracle.image) == PARTS * len(asked.images)
        assert_said(answer, wanted)


def test_specs_and_images_share_a_batch(llm: Any, steered: Steered, oracle: SeeingOracle) -> None:
    """In pieces, of which some begin within an image."""
    asked = [one for one in PROMPTS for _ in SPECS]
    specs = [*SPECS.values()] * len(PROMPTS)
    with pieces(llm) as begun:
        answers = ask(steered, asked, specs)
    wanted = [said(oracle, *both) for both in zip(asked, specs, strict=True)]
    for answer, one in zip(answers, wanted, strict=True):
        assert_said(answer, one)
    assert any(tokens[0] == tokens[1] == oracle.image for tokens in begun)


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

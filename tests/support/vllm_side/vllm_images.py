"""Prompts with images on vLLM: what is asked, and what it should say by hooks by hand on
transformers' own model.

Files of `tests/vllm/images` give their own `llm` and take the tests in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import demo_specs
import pytest
import vllm_engine
from PIL.Image import Image
from seeing_oracle import Said, SeeingOracle
from tiny_vision import IMAGE, Family

from steer.engines.vllm.front.offline import Steered, SteeredOutput
from steer.registry.registry import Registry

NEW = 6
BLOCK, CHUNK = 32, 48
STILL = {"image": 2, "video": 0}
"""What a prompt of a model that also takes videos may have."""


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

ONE = Asked(f"{IMAGE} What is in the park? The cat sat on the house and the dog is in it", (1,))
OTHER = ONE._replace(images=(5,))


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


def use_registry(location: Path) -> None:
    """Makes the demo's vectors, in a registry there, those of engines that are started."""
    with Registry.open(location) as opened:
        demo_specs.register(opened)
    os.environ["STEER_REGISTRY"] = str(location)


@contextmanager
def running_llm(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM over the model in `folder`, which takes two images in a prompt."""
    from vllm import LLM

    usual = {
        "model": str(folder),
        "max_num_batched_tokens": CHUNK,
        "block_size": BLOCK,
        "limit_mm_per_prompt": {"image": 2},
    }
    running = LLM(**vllm_engine.OPTIONS | usual | options)
    yield running
    running.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def steered(llm: Any) -> Steered:
    return Steered(llm, library=demo_specs.LIBRARY)


@pytest.fixture(autouse=True)
def empty_cache(llm: Any) -> None:
    assert llm.reset_prefix_cache()


def ask(
    steered: Steered, family: Family, asked: Sequence[Asked], specs: Sequence[Any]
) -> list[SteeredOutput]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=NEW, temperature=0, logprobs=0, ignore_eos=True)
    prompts = [
        {
            "prompt": family.worded(one.text),
            **({"multi_modal_data": {"image": pictures(family, one)}} if one.images else {}),
        }
        for one in asked
    ]
    specs = [family.spec(one) for one in specs]
    return steered.generate(prompts, params, specs, full_receipt=True, use_tqdm=False)


def said(oracle: SeeingOracle, asked: Asked, spec: Any) -> Said:
    return oracle.say(asked.text, pictures(oracle.family, asked), spec, new=NEW)


def pictures(family: Family, asked: Asked) -> list[Image]:
    return [family.picture(n) for n in asked.images]


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


def assert_told_apart(steered: Steered, oracle: SeeingOracle, name: str) -> None:
    """That the second prompt of `CACHED` finds what it may of the first one's, and no more."""
    case = CACHED[name]
    for (asked, spec), cached in ((case.first, 0), (case.second, case.tokens)):
        (answer,) = ask(steered, oracle.family, [asked], [spec])
        wanted = said(oracle, asked, spec)
        assert_said(answer, wanted)
        assert answer.output.num_cached_tokens == cached
        if answer.receipt is not None:
            assert answer.receipt.tokens_cached == sum(wanted.steered[:cached])


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


def test_specs_and_images_share_a_batch(llm: Any, steered: Steered, oracle: SeeingOracle) -> None:
    """In pieces, of which some begin within an image."""
    asked = [one for one in PROMPTS for _ in SPECS]
    specs = [*SPECS.values()] * len(PROMPTS)
    with pieces(llm) as begun:
        answers = ask(steered, oracle.family, asked, specs)
    wanted = [said(oracle, *both) for both in zip(asked, specs, strict=True)]
    for answer, one in zip(answers, wanted, strict=True):
        assert_said(answer, one)
    assert any(tokens[0] == tokens[1] == oracle.image for tokens in begun)

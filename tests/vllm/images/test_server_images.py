"""Images in chats of `steer serve --engine vllm`, asked over HTTP with OpenAI's client."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import demo_specs
import openai
import pytest
from liveness import LIVENESS_SECONDS
from seeing_oracle import SeeingOracle
from tiny_vision import FAMILIES, IMAGE
from vllm_server import running_server

from steer.registry.registry import Registry

NEW = 6
QUESTION = "What is in the park?"
ADD = demo_specs.add("v0")
SPECS: dict[str, Any] = {
    "unsteered": None,
    "everywhere": {"interventions": [ADD]},
    "text": {"interventions": [ADD], "where": {"except": {"tokens": [IMAGE]}}},
    "images": {"interventions": [ADD], "where": {"tokens": [IMAGE]}},
}


@pytest.fixture(scope="module")
def ask(oracle: SeeingOracle, folder: Path) -> Iterator[Callable[..., Any]]:
    """A greedy chat about picture number `image`; `steering` goes beside OpenAI's fields."""
    with Registry.open(folder / "registry") as registry:
        demo_specs.register(registry)
    arguments = ("--model", str(folder), "--served-name", "seeing")
    with (
        running_server(folder / "registry", *arguments) as url,
        openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=LIVENESS_SECONDS
        ) as client,
    ):

        def chat(image: int, steering: Any = None, *, stream: bool = False, **extra: Any) -> Any:
            content = [
                {"type": "image_url", "image_url": {"url": data_url(image)}},
                {"type": "text", "text": QUESTION},
            ]
            extra |= {"add_special_tokens": True, "return_token_ids": True, "ignore_eos": True}
            return client.chat.completions.create(
                model="seeing",
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item]
                temperature=0,
                max_tokens=NEW,
                logprobs=True,
                stream=stream,
                extra_body=extra if steering is None else {**extra, "steering": steering},
            )

        yield chat


def data_url(image: int) -> str:
    file = io.BytesIO()
    FAMILIES["idefics3"].picture(image).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.parametrize("name", SPECS)
def test_a_chat_with_an_image_is_steered_as_by_hooks(
    ask: Callable[..., Any], oracle: SeeingOracle, name: str
) -> None:
    """The same question about two images, of which the second finds the first one's blocks."""
    for image in (1, 2):
        answer = ask(image, SPECS[name])
        wanted = oracle.say(
            f"user:{IMAGE} {QUESTION}\nassistant:",
            [oracle.family.picture(image)],
            SPECS[name],
            new=NEW,
        )
        assert answer.model_extra["prompt_token_ids"] == wanted.prompt
        logprobs = [one.logprob for one in answer.choices[0].logprobs.content]
        assert logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        receipt = answer.model_extra.get("steering")
        if SPECS[name] is None:
            assert receipt is None
            continue
        assert receipt["tokens_steered"] == sum(wanted.steered)
        assert receipt["tokens_skipped"] == len(wanted.steered) - sum(wanted.steered)


def test_a_stream_says_the_same_and_ends_with_the_receipt(ask: Callable[..., Any]) -> None:
    whole = ask(1, SPECS["text"])
    chunks = list(ask(1, SPECS["text"], stream=True))
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content
    found = chunks[-1].model_extra["steering"]
    counts = ("tokens_steered", "tokens_skipped")
    assert [found[one] for one in counts] == [whole.model_extra["steering"][one] for one in counts]


def test_an_image_is_seen_unsteered_as_well(ask: Callable[..., Any]) -> None:
    compared = ask(1, SPECS["everywhere"], compare=True)
    default = compared.model_extra["default"][0]["message"]["content"]
    assert default == ask(1).choices[0].message.content


def test_what_would_read_a_prompt_without_its_image_is_refused(ask: Callable[..., Any]) -> None:
    for steering in (None, SPECS["everywhere"]):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(1, steering, inspect={"layers": [1]})
        error = json.loads(refused.value.response.text)["error"]
        assert error["code"] == "unsupported_parameter"
        assert error["param"] == "/inspect"
        assert "images" in error["message"]

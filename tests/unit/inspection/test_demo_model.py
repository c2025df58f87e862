"""What inspection finds in the embedded demo model, whose facts are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.inspection.logit_lens import LogitLensRequest, logit_lens
from steer.inspection.patchscopes.method import PatchscopeRequest, patchscope

DEMO = Path(__file__).parents[3] / "vectors" / "demo"
COPYING = {
    "text": "river -> river; Italy -> Italy; Rome -> Rome; Spain ->",
    "placeholder": "Spain",
}
COUNT = 20


@pytest.fixture(scope="module")
def demo() -> Iterator[TransformersEngine]:
    with TransformersEngine.load(DEMO / "model", name="steer-demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def capitals() -> list[dict[str, Any]]:
    lines = (DEMO / "data" / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [json.loads(line) for line in lines]
    asked = [
        fact
        for fact in facts
        if (fact["relation"], fact["language"]) == ("capital", "en")
        and fact["messages"][0]["content"].startswith("What is")
        and fact["subject"] != "Egypt"
    ]
    assert len(asked) >= COUNT
    return asked[:COUNT]


@pytest.mark.slow
def test_a_country_read_out_of_its_state_has_its_own_capital(
    demo: TransformersEngine, capitals: list[dict[str, Any]]
) -> None:
    """A question about Egypt, asked with another country's state in Egypt's place."""
    target = {"messages": [{"role": "user", "content": "What is the capital of Egypt?"}]}
    right: dict[int, int] = {}
    for fact in capitals:
        body = {
            "source": {"messages": fact["messages"]},
            "positions": [fact["subject"]],
            "layers": [0, 2, 4],
            "preset": "custom",
            "target": {**target, "placeholder": "Egypt"},
            "target_layers": [0],
            "top": 1,
        }
        result = patchscope(demo, PatchscopeRequest.model_validate(body))
        assert "Cairo" in str(result.baseline.text)
        for cell in result.cells:
            right[cell.layer] = right.get(cell.layer, 0) + (fact["answer"] in str(cell.text))
    assert len(right) == 3
    assert all(count >= 0.8 * COUNT for count in right.values()), right


def test_a_token_is_said_again_from_its_first_layers_state(
    demo: TransformersEngine, capitals: list[dict[str, Any]]
) -> None:
    hits = 0
    for fact in capitals:
        body = {
            "source": {"messages": fact["messages"]},
            "positions": [fact["subject"]],
            "layers": [0],
            "preset": "custom",
            "target": COPYING,
            "expect": "token",
            "max_tokens": 0,
        }
        result = patchscope(demo, PatchscopeRequest.model_validate(body))
        hits += bool(result.cells[0].hit)
    assert hits >= 0.8 * COUNT


def test_the_last_layers_know_the_capital(
    demo: TransformersEngine, capitals: list[dict[str, Any]]
) -> None:
    last = demo.info.n_layers - 1
    hits = 0
    for fact in capitals:
        text = f"The capital of {fact['subject']} is"
        turns = [*fact["messages"], {"role": "assistant", "content": text}]
        # The template closes the answer with an end token; the lens reads at the token before it.
        request = LogitLensRequest.model_validate(
            {"messages": turns, "add_generation_prompt": False, "positions": [-2], "top": 1}
        )
        result = logit_lens(demo, request)
        assert result.tokens[-2] == " is"
        wanted = demo.tokenizer.encode(f" {fact['answer']}", add_special_tokens=False)[0]
        hits += result.row(last)[0].top[0].id == wanted
    assert hits >= 0.8 * COUNT


def test_the_last_layer_equals_the_logits(demo: TransformersEngine) -> None:
    ids = tuple(demo.tokenizer.encode("The capital of France is"))
    captured = demo.capture(CaptureRequest([ids], logits="all"))[0]
    assert captured.logits is not None
    request = LogitLensRequest(tokens=ids, layers=(demo.info.n_layers - 1,), top=5)
    for cell, row in zip(logit_lens(demo, request).cells, captured.logits.softmax(-1), strict=True):
        chances = torch.tensor([entry.probability for entry in cell.top])
        torch.testing.assert_close(chances, row.topk(5).values, rtol=0, atol=1e-5)

"""Captures under a spec: what is read is what the model had while it was steered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, Unsupported
from steer.fit.bulk.capturing import BulkReading, capture_to
from steer.fit.bulk.selected import pieces, steered_texts
from steer.fit.bulk.shards import CapturedStates
from steer.fit.data.texts import GivenText
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.prompts import Marked
from steer.spec import parse_spec

POINT = HookPoint(1)
ROW = torch.randn(32, generator=torch.Generator().manual_seed(1))
READING = BulkReading((POINT,), answer_tokens=4, temperature=0.0, batch=3, dtype="float32")
CHATS: list[GivenText] = [
    [{"role": "user", "content": f"{n} is it?"}] if n % 2 else f"a text of number {n}"
    for n in range(5)
]


def plan(engine: TransformersEngine, where: Any = None, **more: Any) -> SteeringPlan:
    library = MemoryLibrary({"v": ControlVector.of({1: ROW}, name="v")})
    item = {"kind": "add", "vector": "v", "strength": 2.5, **({"where": where} if where else {})}
    return plans_of(engine, library).plan(parse_spec({"interventions": [item], **more}))


@pytest.mark.parametrize("phase", ["prompt", "generation"])
def test_edits_fall_where_they_fall_while_it_answers(
    lively: TransformersEngine, tmp_path: Path, phase: str
) -> None:
    """An edit after block 1 is not seen by blocks 0 and 1: at that point the state is the
    unsteered one of the same tokens, and the vector where it was added."""
    where = {"phases": [phase]}
    texts, _ = pieces(lively, CHATS)
    steered = steered_texts(lively, CHATS, plan(lively, where))
    card = capture_to(lively, texts, tmp_path, READING, steered=steered)
    assert card.steering == plan(lively, where).fingerprint
    found = CapturedStates.open(tmp_path)
    for n, text in enumerate(texts):
        numbers = np.flatnonzero(found.texts == n)
        whole = found.tokens[numbers].tolist()
        assert whole[: len(text)] == list(text)
        [plain] = lively.capture(CaptureRequest([whole], (POINT,)))
        said = torch.arange(len(whole)) >= len(text)
        added = said if phase == "generation" else ~said
        wanted = plain.states[POINT] + 2.5 * added[:, None] * ROW
        torch.testing.assert_close(found.rows(numbers), wanted, rtol=1e-5, atol=1e-5)
        assert found.generated[numbers].tolist() == said.tolist()


def test_a_response_is_what_was_generated(lively: TransformersEngine, tmp_path: Path) -> None:
    prompt = Marked([{"role": "user", "content": "who?"}], "nobody")
    texts, _ = pieces(lively, [prompt])
    reading = BulkReading((POINT,), dtype="float32")
    for name, where in (("said", {"phases": ["generation"]}), ("roles", {"roles": ["assistant"]})):
        steered = steered_texts(lively, [prompt], plan(lively, where))
        capture_to(lively, texts, tmp_path / name, reading, steered=steered)
    said, roles = (CapturedStates.open(tmp_path / name) for name in ("said", "roles"))
    [plain] = lively.capture(CaptureRequest(texts, (POINT,)))
    moved = said.rows(np.arange(len(said))) - plain.states[POINT]
    assert moved.norm(dim=-1).gt(1).sum() == len("nobody")
    torch.testing.assert_close(said.rows(np.arange(len(said))), roles.rows(np.arange(len(said))))


def test_token_ids_are_read_as_they_are(lively: TransformersEngine, tmp_path: Path) -> None:
    ids: list[GivenText] = [(10, 20, 30, 40), (50, 60, 70)]
    texts, owners = pieces(lively, [*ids, *CHATS], 3)
    assert texts[:2] == [(10, 20, 30), (50, 60, 70)]
    assert owners[:2] == [0, 1]
    texts, _ = pieces(lively, ids)
    steered = steered_texts(lively, ids, plan(lively, {"roles": ["user"]}))
    with pytest.raises(SteerError) as caught:
        capture_to(lively, texts, tmp_path, BulkReading((POINT,)), steered=steered)
    assert caught.value.code == "no_messages"
    assert caught.value.param == "/interventions/0/where/roles"
    with pytest.raises(SteerError) as caught:
        pieces(lively, [(1,) * 10_000])
    assert caught.value.code == "context_length_exceeded"


def test_a_gate_is_not_asked_of_answers(lively: TransformersEngine, tmp_path: Path) -> None:
    gate = {"when": {"vector": "v", "layer": 1, "scope": "token", "above": -1.0}}
    gated = plan(lively, **gate)
    texts, _ = pieces(lively, CHATS)
    steered = steered_texts(lively, CHATS, gated)
    with pytest.raises(Unsupported, match="states of answers under a gated spec"):
        capture_to(lively, texts, tmp_path / "said", READING, steered=steered)
    reading = BulkReading((POINT,), dtype="float32")
    capture_to(lively, texts, tmp_path / "read", reading, steered=steered)
    found = CapturedStates.open(tmp_path / "read")
    [captured] = lively.capture(CaptureRequest([texts[0]], (POINT,), plans=[gated]))
    rows = found.rows(np.flatnonzero(found.texts == 0))
    torch.testing.assert_close(rows, captured.states[POINT], rtol=1e-5, atol=1e-5)

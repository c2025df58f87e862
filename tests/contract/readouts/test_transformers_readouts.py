"""Read-outs of running requests equal an offline capture of the same tokens, in every form of the
running batch: padded, packed and alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from readout_oracle import SEVERAL, assert_read, expected, fed_tokens, reading, reading_library
from readout_oracle import steering as plan_of
from tiny_models import LAYERS, VOCABULARY, WIDTH
from together import complete_together

from steer.batch.ledger import Ledger
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine

LIBRARY = reading_library(WIDTH, LAYERS)
SPECS: dict[str, dict[str, Any] | None] = {
    "unsteered": None,
    "added": {"interventions": [{"kind": "add", "vector": "v0", "layers": [0, 1]}]},
    "ablated": {"interventions": [{"kind": "ablate", "vector": "v1", "layers": [1, 2]}]},
}
FORMS: dict[str, dict[str, Any]] = {
    "padded": {"chunk": 7, "rows": 6},
    "packed": {"batching": "packed", "rows": 6, "cache_tokens": 64},
    "alone": {"batching": "alone", "rows": 6},
}


@pytest.fixture(params=FORMS)
def engine(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], torch.nn.Module]
) -> Iterator[TransformersEngine]:
    with TransformersEngine(tiny_model("llama"), None, **FORMS[request.param]) as made:
        yield made


def crowd(engine: TransformersEngine) -> list[tuple[GenerationRequest, str | None, str]]:
    """Requests of every kind, with what they read (None: nothing) and their steering."""
    draw = random.Random(5)
    found = []
    for n in range(24):
        name = [*SEVERAL, None][n % 5]
        steered = list(SPECS)[n % 3]
        spec = SPECS[steered]
        plan = None if spec is None else plan_of(engine, LIBRARY, spec)
        tokens = ("all", "generated", "prompt")[n // 2 % 3]
        asked = None if name is None else {**SEVERAL[name], "tokens": tokens}
        found.append(
            (
                GenerationRequest(
                    str(n),
                    tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 30))),
                    SamplingParams(max_tokens=draw.randint(1, 9), temperature=0, ignore_eos=True),
                    plan,
                    readouts=None if asked is None else reading(engine, LIBRARY, asked, plan),
                ),
                name,
                steered,
            )
        )
    return found


def test_they_equal_an_offline_capture(engine: TransformersEngine) -> None:
    asked = crowd(engine)
    answers = complete_together(engine, [request for request, _, _ in asked])
    for (request, name, _), done in zip(asked, answers, strict=True):
        if name is None or request.readouts is None:
            assert done.readouts == ()
            continue
        tokens = fed_tokens(request, done, None)
        wanted = expected(engine, LIBRARY, SEVERAL[name], tokens, request.plan)
        first, end = request.readouts.wanted(len(request.prompt))
        assert_read(done, wanted, tokens, first, min(end, len(tokens)))


def test_reading_changes_no_token(engine: TransformersEngine) -> None:
    asked = [request for request, _, _ in crowd(engine)]
    plain = [
        GenerationRequest(one.id, one.prompt, one.sampling, one.plan) for one in asked
    ]
    said = [(one.tokens, one.receipt) for one in complete_together(engine, plain)]
    assert [(one.tokens, one.receipt) for one in complete_together(engine, asked)] == said


def test_sizes_are_those_of_the_receipt(engine: TransformersEngine) -> None:
    plan = plan_of(engine, LIBRARY, SPECS["added"] or {})
    request = GenerationRequest(
        "sizes",
        (5, 6, 7, 8, 9),
        SamplingParams(max_tokens=6, temperature=0, ignore_eos=True),
        plan,
        measure=True,
        readouts=reading(engine, LIBRARY, {"relative_size": True, "tokens": "all"}, plan),
    )
    [done] = complete_together(engine, [request])
    assert len(done.readouts) == 10
    assert done.receipt is not None
    for place, point in enumerate(done.receipt.hook_points):
        mean = sum(one.numbers[place] for one in done.readouts) / len(done.readouts)
        assert mean == pytest.approx(point.relative_size, rel=1e-5)


def test_a_token_that_ends_the_answer_has_been_read_up_to(engine: TransformersEngine) -> None:
    """Stopped by a token: the one before it was fed, itself it was not."""
    free = GenerationRequest(
        "free", (1, 7, 21), SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    )
    [plain] = complete_together(engine, [free])
    stop = plain.tokens[3]
    request = GenerationRequest(
        "stopped",
        free.prompt,
        SamplingParams(
            max_tokens=6, temperature=0, ignore_eos=True, stop_token_ids=frozenset([stop])
        ),
        readouts=reading(engine, LIBRARY, {"norms": [0], "tokens": "generated"}),
    )
    [done] = complete_together(engine, [request])
    assert done.finish == "stop"
    kept = plain.tokens[: plain.tokens.index(stop)]
    assert [one.token for one in done.readouts] == list(kept)


def test_the_packed_crowd_is_put_back_and_computed_anew(
    tiny_model: Callable[[str], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would say nothing about preemption."""
    anew: list[int] = []
    monkeypatch.setattr(Ledger, "recount", lambda self, row: anew.append(row))
    with TransformersEngine(tiny_model("llama"), None, **FORMS["packed"]) as engine:
        asked = [replace(one, plan=None) for one, _, _ in crowd(engine)]
        complete_together(engine, asked)
    assert anew

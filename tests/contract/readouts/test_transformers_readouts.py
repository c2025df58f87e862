"""Read-outs of running requests equal an offline capture of the same tokens, in every form of the
running batch: padded, packed and alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from readout_oracle import (
    SEVERAL,
    assert_read,
    expected,
    expected_kl,
    fed_tokens,
    reading,
    reading_library,
)
from readout_oracle import steering as plan_of
from tiny_models import LAYERS, VOCABULARY, WIDTH
from together import complete_together, submit_together

from steer.batch.ledger import Ledger
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.hooks import HookedModel
from steer.errors import EngineError, SteerError
from steer.readouts.twins import KeptStates

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
    plain = [GenerationRequest(one.id, one.prompt, one.sampling, one.plan) for one in asked]
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


@pytest.fixture(params=["padded", "alone"])
def pairing(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], torch.nn.Module]
) -> Iterator[TransformersEngine]:
    """The forms in which twins stay side by side."""
    with TransformersEngine(tiny_model("llama"), None, **FORMS[request.param]) as made:
        yield made


@pytest.mark.parametrize("beside", [{}, {"norms": [1], "tokens": "all"}])
def test_divergences_are_those_of_two_offline_passes(
    engine: TransformersEngine, beside: dict[str, Any]
) -> None:
    """Every generated token has one, the last too; what else is read is not disturbed."""
    draw = random.Random(2)
    asked = []
    for n, name in enumerate(["added", "ablated"] * 4):
        plan = plan_of(engine, LIBRARY, SPECS[name] or {})
        asked.append(
            GenerationRequest(
                str(n),
                tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 20))),
                SamplingParams(max_tokens=1 + n, temperature=0.9, seed=n, ignore_eos=True),
                plan,
                readouts=reading(engine, LIBRARY, {"kl": True, **beside}, plan),
            )
        )
    crowded = [one for pair in zip(asked, crowd(engine), strict=False) for one in pair]
    requests = [one if isinstance(one, GenerationRequest) else one[0] for one in crowded]
    answers = complete_together(engine, requests)
    for request, done in zip(asked, answers[::2], strict=True):
        assert request.readouts is not None
        tokens = (*request.prompt, *done.tokens)
        wanted = expected_kl(engine, tokens, len(request.prompt), request.plan)
        found = {one.position: one.kl for one in done.readouts if one.kl is not None}
        assert found == pytest.approx(wanted, abs=1e-5)
        positions = [one.position for one in done.readouts]
        assert positions == sorted(set(positions))
        if beside:
            assert [bool(one.numbers) for one in done.readouts] == [True] * (len(tokens) - 1) + [
                False
            ]
    assert {one.leads for one in engine._batch.sequences} <= {True}
    assert len(engine._batch._free_rows) == 2 * 6  # type: ignore[attr-defined]


def test_a_twin_that_finds_no_place_waits(tiny_model: Callable[[str], torch.nn.Module]) -> None:
    with TransformersEngine(tiny_model("llama"), None, rows=2) as engine:
        plan = plan_of(engine, LIBRARY, SPECS["added"] or {})
        asked = [
            GenerationRequest(
                str(n),
                (3 + n, 9),
                SamplingParams(max_tokens=3, temperature=0, ignore_eos=True),
                plan,
                readouts=reading(engine, LIBRARY, {"kl": True}, plan),
            )
            for n in range(5)
        ]
        answers = complete_together(engine, asked)
        assert [len(done.readouts) for done in answers] == [3] * 5


def asking_kl(engine: TransformersEngine) -> GenerationRequest:
    plan = plan_of(engine, LIBRARY, SPECS["added"] or {})
    return GenerationRequest(
        "kl",
        (3, 9, 5),
        SamplingParams(max_tokens=4, temperature=0, ignore_eos=True),
        plan,
        readouts=reading(engine, LIBRARY, {"kl": True}, plan),
    )


def test_a_packed_twin_that_fails_fails_its_request_alone(
    tiny_model: Callable[[str], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TransformersEngine(tiny_model("llama"), None, **FORMS["packed"]) as engine:
        request = asking_kl(engine)
        plain = replace(request, plan=None, readouts=None)
        take = KeptStates.take
        monkeypatch.setattr(KeptStates, "take", lambda self, fed: take(self, fed + 1))
        compared, alone = submit_together(engine, [request, plain])
        with pytest.raises(EngineError, match="no state was kept"):
            compared.result()
        assert len(alone.result().tokens) == 4
        engine._scheduler.run(lambda: None)
        assert len(engine._batch._free_rows) == 2 * 6  # type: ignore[attr-defined]


def test_who_fails_beside_a_twin_fails_alone(
    pairing: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that fails once ends nobody's twin without its leader, and leaves no row taken."""
    request = asking_kl(pairing)
    plain = replace(request, plan=None, readouts=None, prompt=(4, 4))
    forward, calls = HookedModel.forward, list[int]()

    def fails_once(self: HookedModel, *args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("once")
        return forward(self, *args, **named)

    monkeypatch.setattr(HookedModel, "forward", fails_once)
    ended: list[Any] = []
    for listener in submit_together(pairing, [request, plain]):
        try:
            ended.append(len(listener.result().readouts))
        except SteerError as error:
            ended.append(error.code)
    assert ended[1] == 0
    pairing._scheduler.run(lambda: None)
    assert pairing._batch.sequences == []
    assert len(pairing._batch._free_rows) == 2 * 6  # type: ignore[attr-defined]

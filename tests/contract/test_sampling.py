"""What sampling fields do to logits: vLLM's definitions and order, written out in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import random_vector
from tiny_models import LAYERS, VOCABULARY, WIDTH
from together import complete_together

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.sampling import NO_TOKEN, Sampler, choose, drawn
from steer.errors import SteerError
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

END = 2
PROMPT = (6, 7, 8, 8, 30, 11)
LIBRARY = MemoryLibrary({"v": random_vector(1, *range(LAYERS), width=WIDTH)})
STEERED = {"interventions": [{"kind": "add", "vector": "v", "layers": [1], "strength": 0.3}]}

CHANGES: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 2.0},
    "presence, rewarded": {"presence_penalty": -1.5},
    "frequency": {"frequency_penalty": 1.7},
    "frequency, rewarded": {"frequency_penalty": -0.3},
    "repetition": {"repetition_penalty": 3.0},
    "repetition, rewarded": {"repetition_penalty": 0.6},
    "bias": {"logit_bias": ((40, 100.0), (41, 2.5), (3, -100.0))},
    "a ban of half the vocabulary": {"logit_bias": tuple((n, -100.0) for n in range(50))},
    "no end for a while": {"min_tokens": 9, "logit_bias": ((END, 50.0),), "ignore_eos": False},
    "no stop token for a while": {
        "min_tokens": 4,
        "stop_token_ids": frozenset({50}),
        "logit_bias": ((50, 50.0),),
    },
    "everything": {
        "presence_penalty": 0.8,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.3,
        "logit_bias": ((12, 3.0),),
        "min_tokens": 3,
        "ignore_eos": False,
    },
}


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], torch.nn.Module]) -> Iterator[TransformersEngine]:
    with TransformersEngine(tiny_model("llama"), None, rows=16, slots=3) as running:
        yield running


def changed(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> np.ndarray:
    """float64 logits after bias, the ban of end tokens, and repetition, frequency and presence."""
    row = logits.astype(np.float64).copy()
    for token, bias in params.logit_bias:
        row[token] += bias
    if len(generated) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else (END,))):
            row[token] = -math.inf
    for token in {*prompt, *generated}:
        scale = params.repetition_penalty
        row[token] = row[token] / scale if row[token] > 0 else row[token] * scale
    for token, count in Counter(generated).items():
        row[token] -= params.frequency_penalty * count + params.presence_penalty
    return row


@pytest.mark.parametrize("name", CHANGES)
def test_greedy_tokens_follow_the_changed_logits(llama: TransformersEngine, name: str) -> None:
    params = SamplingParams(
        **{"max_tokens": 12, "temperature": 0, "ignore_eos": True, **CHANGES[name]}
    )
    compiled = PlanCache(LIBRARY, llama.info, llama.capabilities).plan(parse_spec(STEERED))
    plain = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    neighbours = [GenerationRequest(f"n{n}", (n, n + 1, 8), plain) for n in range(3, 8)]
    request = GenerationRequest("changed", PROMPT, params, compiled)
    done = complete_together(llama, [*neighbours, request, *neighbours])[len(neighbours)]
    expected: list[int] = []
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else (END,))}
    while len(expected) < params.max_tokens:
        capture = CaptureRequest([(*PROMPT, *expected)], plans=[compiled], logits="last")
        logits = llama.capture(capture)[0].logits
        assert logits is not None
        token = int(changed(logits[0].numpy(), params, PROMPT, expected).argmax())
        if token in ends:
            break
        expected.append(token)
    assert list(done.tokens) == expected
    assert done.finish == ("length" if len(expected) == params.max_tokens else "stop")
    (bare,) = llama.complete([GenerationRequest("bare", PROMPT, plain, compiled)])
    assert bare.tokens != done.tokens, "the field changed nothing: the test proves nothing"


def test_neighbours_of_changed_logits_keep_their_own(llama: TransformersEngine) -> None:
    plain = [
        GenerationRequest(f"n{n}", (n, n + 1, 8), SamplingParams(12, t, seed=n, logprobs=1))
        for n, t in ((3, 0.0), (4, 0.0), (5, 0.9), (6, 0.9))
    ]
    alone = complete_together(llama, plain)
    changing = [
        GenerationRequest(name, PROMPT, SamplingParams(max_tokens=12, temperature=0, **fields))
        for name, fields in CHANGES.items()
    ]
    together = complete_together(llama, [*plain, *changing])[: len(plain)]
    assert [done.tokens for done in together] == [done.tokens for done in alone]


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"min_p": 0.3}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.3, "top_k": 2}, {0, 1}),
        # The temperature comes first: at 4, token 4 has a third of the greatest probability.
        ({"min_p": 0.3, "temperature": 4.0}, {0, 1, 2, 3, 4}),
        # The penalty comes before the cut: token 0 was generated.
        ({"min_p": 0.3, "presence_penalty": 2.0}, {1, 2}),
        ({"top_k": 2, "logit_bias": ((5, 9.0),)}, {0, 5}),
    ],
)
def test_what_is_too_unlikely_is_never_drawn(fields: dict[str, Any], allowed: set[int]) -> None:
    shares = torch.tensor([[1.0, 0.6, 0.4, 0.1, 0.01, 1e-4, 1e-5]])
    drawn = set()
    for seed in range(60):
        sampler = Sampler(SamplingParams(seed=seed, **fields), torch.device("cpu"))
        drawn.update(choose(shares.log(), [sampler], [[0]]))
    assert drawn == allowed


def test_tokens_have_their_share_of_the_points() -> None:
    """Shares laid end to end in float64: each point is in one of them."""
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(scale=4.0, size=(3, 500)).astype(np.float32))
    scores[:, 100:400] = -math.inf
    scores[1, 399:] = -math.inf  # ends with tokens that have no share
    points = np.append(rng.random(2_000), [0.0, math.nextafter(1.0, 0.0)])
    for row in scores:
        wide = row.double().numpy()
        shares = np.exp(wide - wide.max())
        edges = np.cumsum(shares / shares.sum())
        found = np.array(drawn(row.expand(len(points), -1), list(points)))
        expected = np.searchsorted(edges, points, side="right").clip(max=np.nonzero(shares)[0][-1])
        # float32 shares move an edge by their rounding: a point that near to one may be either's.
        near = np.abs(edges[None] - points[:, None]).min(1) < 1e-6
        assert (found == expected)[~near].all()
        assert (~near).mean() > 0.9
        assert (shares[found] > 0).all()


def test_a_row_draws_the_same_beside_others() -> None:
    scores = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1)) * 3
    scores[7, 11] = math.nan
    points = torch.rand(40, generator=torch.Generator().manual_seed(2)).tolist()
    together = drawn(scores, points)
    assert together == [
        drawn(row[None], [point])[0] for row, point in zip(scores, points, strict=True)
    ]
    assert [n for n, token in enumerate(together) if token == NO_TOKEN] == [7]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_p": 1.5}, "/min_p"),
        ({"min_p": math.nan}, "/min_p"),
        ({"presence_penalty": 2.1}, "/presence_penalty"),
        ({"frequency_penalty": math.inf}, "/frequency_penalty"),
        ({"repetition_penalty": 0.0}, "/repetition_penalty"),
        ({"repetition_penalty": 1e30}, "/repetition_penalty"),
        ({"logit_bias": ((5, 101.0),)}, "/logit_bias"),
        ({"logit_bias": ((VOCABULARY, 1.0),)}, "/logit_bias"),
        ({"stop_token_ids": frozenset({-1})}, "/stop_token_ids"),
        ({"min_tokens": 17}, "/min_tokens"),
        ({"min_tokens": -1}, "/min_tokens"),
    ],
)
def test_values_that_nothing_can_be_chosen_by_are_refused(
    llama: TransformersEngine, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(SteerError) as caught:
        llama.admit(GenerationRequest("wrong", PROMPT, SamplingParams(**fields)))
    assert caught.value.param == param

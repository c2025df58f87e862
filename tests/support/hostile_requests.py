"""Requests at the edge of what numbers can be, and a check that their neighbours do not notice.

Strategies draw whole specs (every kind, site, gate and selection, with artefacts of every size) and
all the fields that say how tokens are chosen. `neighbours_of` runs such requests in one batch with
others, and again with harmless ones in their places that live as long, so that both batches have
the same shape in every pass and the neighbours must have the same bits.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from artefacts import random_adapter, random_detector, random_map, random_sae, random_vector
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_models import LAYERS, VOCABULARY, WIDTH
from together import submit_together

from steer.artefacts.affine import AffineMap, Channels
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.detector import Detector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.engines.base import Completion, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.plan.cache import PlanCache
from steer.spec import KINDS, SITES, parse_spec

ALTERNATING = torch.tensor([1.0, -1.0]).repeat(WIDTH // 2)


def _scaled_sae(sae: SAE, factor: float) -> SAE:
    return SAE.of(
        "standard",
        W_enc=sae.W_enc * factor,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec * factor,
        b_dec=sae.b_dec,
        layer=sae.layer,
    )


def _scaled_adapter(adapter: LowRankAdapter, factor: float) -> LowRankAdapter:
    parts = {n: (r * factor, w * factor, b * factor) for n, (r, w, b) in adapter.parts.items()}
    return LowRankAdapter.of(parts)


_SPIKE = torch.zeros(WIDTH)
_SPIKE[3] = 1e18
VECTORS = {
    "plain": random_vector(1, *range(LAYERS), width=WIDTH),
    "other": random_vector(2, *range(LAYERS), width=WIDTH),
    "long": ControlVector.of({0: ALTERNATING * 1e18}),
    "short": ControlVector.of({1: ALTERNATING * 1e-18}),
    "spike": ControlVector.of({2: _SPIKE}),
}
SAES = {
    **{name: random_sae(name, seed=7, width=WIDTH) for name in ("standard", "jumprelu", "topk")},
    "steep": _scaled_sae(random_sae("standard", seed=8, width=WIDTH), 1e30),
}
ADAPTERS = {
    "reft": random_adapter(3, 0, 2, width=WIDTH),
    "wild": _scaled_adapter(random_adapter(4, 1, width=WIDTH), 1e30),
}
MAPS = {
    "map": random_map(5, 0, 1, width=WIDTH),
    "steep-map": AffineMap.of({2: Channels(1e30 * ALTERNATING, 1e15 * ALTERNATING)}),
}
DETECTORS = {
    "watcher": random_detector(6, 0, width=WIDTH),
    "steep-watcher": Detector.of(1e18 * ALTERNATING, layer=0, bias=-1e38),
}
LIBRARY = MemoryLibrary(VECTORS, SAES, ADAPTERS, maps=MAPS, detectors=DETECTORS)


def inline(row: torch.Tensor, layer: int = 0) -> dict[str, Any]:
    """`row` as a vector inside a spec."""
    return {"data": base64.b64encode(save({f"layers.{layer}": row.contiguous()})).decode()}


def one(item: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    """A spec of one intervention."""
    return {"interventions": [dict(item)], **rest}


# Strategies

_EDGES = (0, 1e-45, 1e-38, 1e-19, 1e-5, 0.5, 1, 4, 65504, 1e5, 1e14, 1e15, 1e18, 2e19, 3e38, 1e308)
_INTEGERS = (0, 1, 2, 5, 31, 2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**70)


def _mostly(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One in twelve is `odd`: of many fields, one would else always be refused."""
    return st.integers(0, 11).flatmap(lambda drawn: usual if drawn else odd)


def _maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


numbers = st.one_of(
    st.sampled_from([sign * edge for edge in _EDGES for sign in (1, -1)]),
    st.floats(-4, 4),
    st.floats(allow_nan=False, allow_infinity=False),
)
integers = st.sampled_from([sign * edge for edge in _INTEGERS for sign in (1, -1)])
vectors = st.one_of(
    st.sampled_from([*VECTORS, "plain", "other", "plain", "other"]),
    st.builds(
        lambda size, layer: inline(ALTERNATING * size, layer), numbers, st.integers(0, LAYERS - 1)
    ),
)
features = st.lists(_mostly(st.integers(0, 63), integers), min_size=1, max_size=3)
layers = st.one_of(
    st.just("all"),
    st.lists(_mostly(st.integers(0, LAYERS - 1), integers), min_size=1, max_size=3),
)
where_fields = {
    "phases": st.lists(st.sampled_from(["prompt", "generation"]), min_size=1, max_size=2),
    "positions": st.lists(
        st.tuples(
            _mostly(st.integers(-4, 8), integers),
            _mostly(st.none() | st.integers(-4, 8), integers),
        ).map(list),
        min_size=1,
        max_size=2,
    ),
    "tokens": st.lists(
        _mostly(st.integers(0, VOCABULARY) | st.just("w5"), integers | st.just("w8 w9")),
        min_size=1,
        max_size=4,
    ),
}
where = _maybe(**where_fields, **{"except": _maybe(**where_fields)})
directed = st.fixed_dictionaries(
    {"vector": vectors, "above": numbers},
    optional={
        "below": numbers,
        "scope": st.sampled_from(["prompt", "token", "onward"]),
        "measure": st.sampled_from(["cosine", "projection"]),
        "layer": _mostly(st.just(0), integers),
    },
)
detected = st.fixed_dictionaries(
    {"detector": _mostly(st.sampled_from(sorted(DETECTORS)), st.just("nobody"))},
    optional={"threshold": numbers, "scope": st.sampled_from(["prompt", "token", "onward"])},
)
when = st.one_of(directed, detected)
strengths = st.one_of(
    numbers,
    st.fixed_dictionaries({"norm": numbers}),
    _mostly(numbers, st.sampled_from(["auto", {"kl": 0.1}, {"effect": 1e300}])),
)
modes = st.sampled_from(["set", "at_least", "at_most"])
_OWN_FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "add": {"vector": vectors, "strength": strengths},
    "ablate": {"vector": vectors, "strength": numbers},
    "project": {"vector": vectors, "value": numbers, "mode": modes},
    "clamp": {
        "sae": st.sampled_from(list(SAES)),
        "features": features,
        "value": numbers,
        "mode": modes | st.just("scale"),
    },
    "concept": {
        "sae": st.sampled_from(list(SAES)),
        "text": st.sampled_from(["w5 w6", "w9"]),
        "strength": numbers,
    },
    "swap": {"remove": vectors, "add": vectors, "strength": numbers},
    "exchange": {
        "vector": vectors,
        "toward": vectors,
        "mode": st.sampled_from(["move", "both", "one_way"]),
        "strength": numbers,
    },
    "read_write": {
        "read": vectors,
        "write": vectors,
        "measure": st.sampled_from(["product", "projection", "cosine"]),
        "bias": numbers,
        "strength": numbers | st.fixed_dictionaries({"norm": numbers}),
    },
    "low_rank": {"adapter": st.sampled_from(list(ADAPTERS))},
    "affine": {"map": st.sampled_from(list(MAPS)), "strength": numbers},
    "rotate": {
        "vector": vectors,
        "toward": vectors,
        "degrees": numbers,
        "mode": st.sampled_from(["by", "to"]),
    },
    "patch": {"vector": vectors},
}
assert set(_OWN_FIELDS) == set(KINDS), "a kind is not drawn"
_WIDE_SITES = [site for site in SITES if site not in ("mlp_act", "head_out")]
"""The sites that the artefacts here fit."""
interventions = st.one_of(
    *(
        st.fixed_dictionaries(
            {"kind": st.just(kind), **fields},
            optional={
                "layers": layers,
                "site": st.sampled_from(_WIDE_SITES),
                "where": where,
                "when": when,
            },
        )
        for kind, fields in _OWN_FIELDS.items()
    )
)
specs = st.fixed_dictionaries(
    {"interventions": st.lists(interventions, min_size=1, max_size=3)},
    optional={
        "where": where,
        "when": when,
        "norm": st.just("preserve"),
        "compose": st.just("orthogonal"),
    },
)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 5),
    temperature=st.one_of(st.just(0.0), st.just(1.0), numbers.map(abs)),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1)),
    top_k=_mostly(st.none() | st.integers(1, 200), integers),
    seed=_mostly(st.none() | st.integers(0, 9), integers),
    logprobs=_mostly(st.none() | st.integers(0, 5), integers),
    ignore_eos=st.booleans(),
)


DRAWN = SamplingParams(max_tokens=5, temperature=1.0, seed=1, ignore_eos=True)


@dataclass(frozen=True)
class Hostile:
    """A request as a client states it: nobody has looked at it yet."""

    prompt: tuple[int, ...]
    spec: dict[str, Any] | None
    sampling: SamplingParams = DRAWN


requests = st.builds(
    Hostile,
    prompt=st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=8).map(tuple),
    spec=st.one_of(st.none(), specs, specs, specs),
    sampling=samplings,
)


KNOWN = {
    "not_finite": one(
        {"kind": "add", "vector": "plain", "strength": {"norm": 1e14}, "layers": "all"}
    ),
    "norm_out_of_range": one({"kind": "add", "vector": inline(ALTERNATING * 1e38), "strength": 1}),
    "invalid_spec": one({"kind": "add", "vector": "plain", "strength": "much"}),
}
"""Specs that end so, whatever is drawn beside them."""

# Runs

Outcome = Completion | SteerError


def admitted(
    engine: TransformersEngine, plans: PlanCache, wanted: Hostile
) -> GenerationRequest | SteerError:
    """`wanted` as the engine takes it, or why it does not."""
    try:
        plan = None if wanted.spec is None else plans.plan(parse_spec(wanted.spec))
        request = GenerationRequest("hostile", wanted.prompt, wanted.sampling, plan)
        engine.admit(request)
    except SteerError as error:
        return error
    return request


def neighbours(plans: PlanCache) -> list[GenerationRequest]:
    """Greedy, drawn and steered ones, which outlive all that is hostile."""
    added = plans.plan(parse_spec(one({"kind": "add", "vector": "plain", "layers": [0, 1, 2]})))
    sampled = {"max_tokens": 8, "logprobs": 2, "ignore_eos": True}
    greedy = SamplingParams(temperature=0, **sampled)
    drawn = SamplingParams(temperature=0.9, top_p=0.95, seed=3, **sampled)
    return [
        GenerationRequest("greedy", (11, 12, 13), greedy),
        GenerationRequest("drawn", (21, 22, 23, 24), drawn),
        GenerationRequest("steered", (31, 32), greedy, added),
    ]


def run(engine: TransformersEngine, requests: Sequence[GenerationRequest]) -> list[Outcome]:
    """What becomes of requests that share a batch."""
    outcomes: list[Outcome] = []
    for listener in submit_together(engine, requests):
        try:
            outcomes.append(listener.result())
        except SteerError as error:
            outcomes.append(error)
    return outcomes


def neighbours_of(
    engine: TransformersEngine, plans: PlanCache, hostile: Sequence[GenerationRequest]
) -> tuple[list[Outcome], list[Outcome], list[Outcome]]:
    """What became of `hostile`, of its neighbours, and of these beside harmless requests."""
    beside = neighbours(plans)
    lived: dict[int, int] = dict.fromkeys(range(len(hostile)), 0)

    def counted(number: int, request: GenerationRequest) -> GenerationRequest:
        def count(_: int) -> bool:
            lived[number] += 1
            return False

        return GenerationRequest(
            request.id, request.prompt, request.sampling, request.plan, stop=count
        )

    both = run(engine, [*(counted(n, one) for n, one in enumerate(hostile)), *beside])
    ended = both[: len(hostile)]
    twins = []
    for number, request in enumerate(hostile):
        # The pass that ends in an error, or in an end of sequence, gives no token to count.
        passes = lived[number] + (lived[number] < request.sampling.max_tokens)
        sampling = SamplingParams(max_tokens=passes, temperature=0, ignore_eos=True)
        twins.append(GenerationRequest("harmless", request.prompt, sampling))
    return ended, both[len(hostile) :], run(engine, [*twins, *beside])[len(hostile) :]

"""Onward gates open at their first token that is in range, however tokens are computed."""

from __future__ import annotations

import torch
from artefacts import EVERYTHING, artefacts, random_vector, shape_of
from float64_reference import OnwardGates, f64
from hypothesis import given, settings
from hypothesis import strategies as st
from lives import Life, Tabled, Told, lead

from steer.artefacts.library import MemoryLibrary
from steer.batch.ledger import PositionLedger
from steer.batch.requests import SteeredRequest
from steer.batch.step import Step
from steer.batch.tables import Tables
from steer.engines.receipts import make_receipt
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

WIDTH, LAYERS, LONGEST = 16, 4, 24
VECTORS = {**artefacts(WIDTH, LAYERS)["vectors"], "gate": random_vector(3, 0, width=WIDTH)}
PLANS = PlanCache(MemoryLibrary(VECTORS), shape_of(WIDTH, LAYERS), EVERYTHING)
READ, EDITED = HookPoint(0), HookPoint(2)


def plan_of(selected: frozenset[int]) -> SteeringPlan:
    """An onward gate that reads the tokens of id 1, so that a draft's id has a say."""
    spec = {
        "interventions": [
            {"kind": "add", "vector": "v0", "layers": [2], "strength": 1.0},
            {"kind": "ablate", "vector": "v1", "layers": [3], "where": {"tokens": [1]}},
        ],
        "when": {"vector": "gate", "above": 0.0, "layer": 0, "scope": "onward"},
        "where": {"tokens": sorted(selected)},
    }
    return PLANS.plan(parse_spec(spec))


tokens = st.builds(Told, st.integers(0, 2), st.sampled_from([-1.0, -1.0, 1.0]))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(tokens, min_size=2, max_size=LONGEST), min_size=1, max_size=3),
    st.frozensets(st.integers(0, 2), min_size=1),
    st.data(),
)
def test_gates_open_where_their_first_token_is_however_tokens_are_computed(
    sequences: list[list[Told]], selected: frozenset[int], data: st.DataObject
) -> None:
    """In chunks, in one batch, again from any position, behind drafts that do not stay."""
    plan = plan_of(selected)
    tables = Tables(shape_of(WIDTH, LAYERS), slots=2)
    slot = tables.acquire(plan)
    ledger = PositionLedger(4, 3 * LONGEST, torch.device("cpu"), drafts=LONGEST)
    lives = lead(data, sequences, tokens, Tabled(plan, tables, slot, ledger), _pass)
    for one in lives:
        truth = OnwardGates()
        wanted = []
        for position, told in enumerate(one.tokens):
            bits = 0
            for place, chosen_ids in enumerate((selected, {1})):
                mine = told.token in chosen_ids
                truth.tell(place, position, selected=mine, in_range=told.value > 0)
                bits |= (mine and truth.are_open(place, position)) << place
            wanted.append(bits)
        _check(ledger, plan, one, wanted, truth)


def _pass(step: Step, shown: list[Told]) -> None:
    direction = torch.tensor(f64(VECTORS["gate"].directions[0])).float()
    for layer in range(LAYERS):
        x = torch.stack([told.value * direction for told in shown])
        step.edit(HookPoint(layer), x)
    step.finish()


def _check(
    ledger: PositionLedger, plan: SteeringPlan, one: Life, wanted: list[int], truth: OnwardGates
) -> None:
    # Rules are those of the interventions, in some order; two with the same tokens are one.
    points = [[EDITED in rule.blocks, HookPoint(3) in rule.blocks] for rule in plan.rules]
    for position, bits in enumerate(wanted):
        acted = int(ledger.applied[one.row, position])
        for place in range(2):
            found = any(acted >> n & 1 and points[n][place] for n in range(len(points)))
            assert found == bool(bits >> place & 1), (position, place)
    request = SteeredRequest(one.row, one.prompt_length, plan)
    receipt = make_receipt(request, ledger, len(one.tokens))
    opened = {gate.position for gate in receipt.gates if gate.position is not None}
    assert opened == set(truth.onsets.values())
    for gate in receipt.gates:
        assert (gate.value is None) == (gate.position is None)
        assert gate.value is None or gate.value > 0.99

"""Plans as files: what is read back acts the same, and nothing else is ever read as a plan."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import (
    EVERYTHING,
    artefacts,
    random_sae,
    random_spec,
    random_vector,
    shape_of,
    span_vocabulary,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from torch import Tensor

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.edits import Block, apply
from steer.errors import (
    FileFormatError,
    IncompatibleArtefact,
    SpecError,
    SteerError,
    StorageError,
    TooLarge,
)
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.file import (
    dump_plan,
    load_plan,
    load_selections,
    selection_from_json,
    selection_to_json,
)
from steer.plan.plan import SteeringPlan
from steer.plan.selection import Selection, trace_of
from steer.prompts.roles import RoleRanges
from steer.spec import KINDS, parse_spec

LIBRARY = MemoryLibrary(**artefacts())
INLINE = {"data": base64.b64encode(random_vector(7, 1).to_bytes()).decode(), "layer": 1}


def add(vector: Any = "v0", **fields: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": vector, "layers": [0, 1], "strength": 1.5, **fields}


def one(item: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"interventions": [item], **rest}


TOPK = one({"kind": "clamp", "sae": "topk", "features": [2, 7], "value": 3.0, "mode": "at_least"})
GATED = one(
    {"kind": "ablate", "vector": "v2", "layers": [1, 2]},
    when={"vector": "v1", "above": 0.0, "layer": 0},
    where={"positions": [[2, None]]},
)
INLINE_SPEC = one(add(INLINE, layers=[1]), when={"vector": INLINE, "above": 0.1, "layer": 1})

SPECS: dict[str, dict[str, Any]] = {
    "everything": one(add()),
    "norm units": one(add(strength={"norm": 0.4})),
    "the card's strength": one({"kind": "add", "vector": "v0", "layers": [2]}),
    "phases": one(add("v2"), where={"phases": ["generation"]}),
    "a window": one(
        add("v3"), where={"positions": [[-2, None]], "except": {"positions": [[4, 6]]}}
    ),
    "token triggers": one(add(strength=-2), where={"tokens": [9, 3, 5], "except": {"tokens": [5]}}),
    "a prompt gate": GATED,
    "a token gate": one(
        add("v1", layers=[2]), when={"vector": "v0", "below": 0.1, "layer": 1, "scope": "token"}
    ),
    "a projection gate between bounds": one(
        add("v1", layers=[3]),
        when={"vector": "v0", "above": -0.5, "below": 0.1, "layer": 1, "measure": "projection"},
    ),
    "a detector's gate": one(
        add("v1", layers=[3]), when={"detector": "d0", "threshold": 0.7, "scope": "token"}
    ),
    "ablate": one({"kind": "ablate", "vector": "v2", "layers": [1, 2]}),
    "project": one({"kind": "project", "vector": "v2", "value": "positive", "layers": [1]}),
    "a clamp": one({"kind": "clamp", "sae": "jumprelu", "features": [1, 5, 9], "value": 4.0}),
    "a scaled clamp": one(
        {"kind": "clamp", "sae": "standard", "features": [1], "value": [2.0], "mode": "scale"}
    ),
    "a clamp that competes": {"interventions": [*TOPK["interventions"], add("v3")]},
    "concept": one({"kind": "concept", "sae": "topk", "text": "sea", "contrast": "land"}),
    "swap": one({"kind": "swap", "remove": "v0", "add": "v1", "layers": [1]}),
    "low rank": one({"kind": "low_rank", "adapter": "lora", "layers": [1, 3]}),
    "rotate": one({"kind": "rotate", "vector": "v0", "toward": "v1", "degrees": 30, "layers": [2]}),
    "rotate to an angle": one(
        {"kind": "rotate", "vector": "v0", "toward": "v1", "degrees": 30, "layers": [2]}
        | {"mode": "to", "only": "positive"}
    ),
    "exchange": one({"kind": "exchange", "vector": "v0", "toward": "v1", "layers": [1]}),
    "read a cosine": one(
        {"kind": "read_write", "read": "v0", "write": "v1", "measure": "cosine", "layers": [1]}
    ),
    "channels": one({"kind": "affine", "map": "map", "layers": [1, 2]}),
    "patch": one({"kind": "patch", "vector": "v0", "layers": [1]}),
    "norm preserved": {
        "interventions": [add(strength=4), {"kind": "ablate", "vector": "v1", "layers": [0, 1]}],
        "norm": "preserve",
    },
    "inline": INLINE_SPEC,
    "nothing": one(add(strength=0)),
    **{f"random {n}": random_spec(random.Random(n)) for n in range(25)},
}


def encode_text(text: str, point: HookPoint) -> Tensor:
    generator = torch.Generator().manual_seed(len(text))
    return torch.randn(3, 16, generator=generator)


@functools.cache
def compiled(name: str) -> SteeringPlan:
    plans = PlanCache(LIBRARY, shape_of(), EVERYTHING, encode_text=encode_text)
    return plans.plan(parse_spec(SPECS[name]))


def find_sae(sha256: str) -> SAE:
    for sae in LIBRARY.saes.values():
        if sae.sha256 == sha256:
            return sae
    raise StorageError(f"no SAE {sha256!r}")


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["steer.plan"]), load(data)


def written(content: Any, tensors: dict[str, Any]) -> bytes:
    text = content if isinstance(content, str) else json.dumps(content)
    return bytes(save(tensors, metadata={"steer.plan": text}))


def test_every_kind_of_intervention_is_among_the_specs() -> None:
    assert {item["kind"] for spec in SPECS.values() for item in spec["interventions"]} == set(KINDS)


@pytest.mark.parametrize("name", SPECS)
def test_a_loaded_plan_equals_the_compiled_one(name: str) -> None:
    plan = compiled(name)
    data = dump_plan(plan)
    back = load_plan(data, find_sae, model=shape_of())
    for field in ("fingerprint", "artefacts", "strengths", "summary", "points", "gated"):
        assert getattr(back, field) == getattr(plan, field)
    assert back.describe() == plan.describe()
    for mine, other in zip(back.rules, plan.rules, strict=True):
        assert mine.selection == other.selection
        assert (mine.gate and mine.gate.identity) == (other.gate and other.gate.identity)
        assert mine.blocks.keys() == other.blocks.keys()
    if name != "inline":
        assert back.spec == plan.spec
    assert dump_plan(back) == data


@pytest.mark.parametrize("name", SPECS)
def test_loaded_blocks_act_the_same_to_the_bit(name: str) -> None:
    plan = compiled(name)
    back = load_plan(dump_plan(plan), find_sae)
    generator = torch.Generator().manual_seed(1)
    for mine, other in zip(back.rules, plan.rules, strict=True):
        for point, block in other.blocks.items():
            x = 3 * torch.randn(40, shape_of().width(point.site), generator=generator)
            assert torch.equal(apply(mine.blocks[point], x), apply(block, x))
            assert not torch.equal(apply(block, x), x), "the test proves nothing"


@pytest.mark.parametrize("name", SPECS)
def test_equal_plans_give_equal_bytes(name: str) -> None:
    again = PlanCache(
        MemoryLibrary(**artefacts()), shape_of(), EVERYTHING, encode_text=encode_text
    ).plan(parse_spec(SPECS[name]))
    assert again is not compiled(name)
    assert dump_plan(again) == dump_plan(compiled(name))
    reordered = [replace(p, blocks=dict(reversed(p.blocks.items()))) for p in again.rules]
    assert dump_plan(replace(again, rules=tuple(reordered))) == dump_plan(again)


def test_other_plans_give_other_bytes() -> None:
    files = {dump_plan(compiled(name)) for name in SPECS}
    assert len(files) == len(SPECS)


def test_the_encoder_of_a_competing_sae_stays_behind() -> None:
    data = dump_plan(compiled("a clamp that competes"))
    _, tensors = opened(data)
    read = LIBRARY.sae("topk").W_enc
    # Two features' read rows, write rows and laws; the added row on each of two layers.
    shapes = sorted(row.shape for row in tensors.values())
    assert shapes == [(2, 7), (2, 16), (2, 16), (16,), (16,)]
    assert len(data) < read.nbytes
    with pytest.raises(StorageError):
        load_plan(data, lambda sha256: find_sae("0" * 64))


def test_equal_rows_are_stored_once() -> None:
    """An ablation reads and writes one row; a vector of one row serves every layer."""
    vector = {"one": random_vector(3, 0)}
    plans = PlanCache(MemoryLibrary(vector), shape_of(), EVERYTHING)
    item = {"kind": "ablate", "vector": "one", "layers": [0, 1, 2, 3]}
    _, tensors = opened(dump_plan(plans.plan(parse_spec(one(item)))))
    assert sorted(row.shape for row in tensors.values()) == [(1, 7), (1, 16)]


def test_inline_payloads_are_not_repeated() -> None:
    data = dump_plan(compiled("inline"))
    assert INLINE["data"].encode() not in data
    back = load_plan(data, find_sae).spec
    digest = "sha256:" + hashlib.sha256(INLINE["data"].encode()).hexdigest()
    assert back.interventions[0].vector.data == back.when.vector.data == digest
    with pytest.raises(FileFormatError, match="not base64"):
        PlanCache(LIBRARY, shape_of(), EVERYTHING).plan(back)


def test_numbers_inside_a_spec_are_not_repeated() -> None:
    row = [0.125 + n for n in range(16)]
    spec = one({"kind": "add", "vector": {"values": row, "layer": 2}, "strength": 1.0})
    plan = PlanCache(LIBRARY, shape_of(), EVERYTHING).plan(parse_spec(spec))
    data = dump_plan(plan)
    assert b"11.125" not in data
    back = load_plan(data, find_sae)
    assert back.fingerprint == plan.fingerprint
    assert back.spec.interventions[0].vector.data.startswith("sha256:")
    x = torch.zeros(1, 16)
    assert torch.equal(apply(back.rules[0].blocks[HookPoint(2)], x), torch.tensor([row]))


def test_a_plan_for_another_model_is_refused_by_name() -> None:
    data = dump_plan(compiled("a prompt gate"))
    with pytest.raises(IncompatibleArtefact, match="compiled for another model"):
        load_plan(data, find_sae, model=shape_of(width=32))
    with pytest.raises(IncompatibleArtefact, match="layer 2 is out of range"):
        load_plan(data, find_sae, model=shape_of(layers=2))


def test_an_edit_that_overflows_is_refused_where_it_is_written() -> None:
    plan = compiled("everything")
    (rule,) = plan.rules
    blocks = {
        point: replace(block, shift=block.shift * 1e300) for point, block in rule.blocks.items()
    }
    with pytest.raises(SpecError, match=r"the edit at 0\.resid_post is not finite"):
        dump_plan(replace(plan, rules=(replace(rule, blocks=blocks),)))


def test_a_header_that_no_reader_takes_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.plan.file.MAX_HEADER_BYTES", 500)
    with pytest.raises(TooLarge, match="at most 500"):
        dump_plan(compiled("everything"))


# Selections

INTS = st.integers(-(2**63), 2**63 - 1)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "phases": st.none() | st.frozensets(st.sampled_from(["prompt", "generation"])),
    "ranges": st.none() | st.lists(st.tuples(INTS, st.none() | INTS), max_size=5).map(tuple),
    "tokens": st.none() | st.frozensets(INTS, max_size=20),
    "from_last_prompt_token": st.booleans(),
}
SELECTIONS = st.builds(Selection, excluded=st.none() | st.builds(Selection, **FIELDS), **FIELDS)


@given(SELECTIONS)
def test_selections_survive_json(selection: Selection) -> None:
    text = json.dumps(selection_to_json(selection))
    assert selection_from_json(json.loads(text)) == selection


def test_selections_are_compact() -> None:
    assert selection_to_json(Selection()) == {}
    chosen = Selection(tokens=frozenset({9, 3}), excluded=Selection())
    assert selection_to_json(chosen) == {"tokens": [3, 9], "excluded": {}}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "everywhere",
        {"where": {}},
        {"phases": ["thinking"]},
        {"ranges": [[1]]},
        {"ranges": [[1, 2, 3]]},
        {"ranges": [[None, 2]]},
        {"ranges": [[0.5, 2]]},
        {"tokens": ["a"]},
        {"tokens": [True]},
        {"tokens": [2**63]},
        {"from_last": 1},
        {"excluded": {"excluded": {}}},
    ],
)
def test_what_is_no_selection_is_refused(value: Any) -> None:
    with pytest.raises(FileFormatError, match="not a valid part of a plan"):
        selection_from_json(value)


def test_a_selection_that_could_not_be_read_is_not_written() -> None:
    for selection in (
        Selection(tokens=frozenset({2**63})),
        Selection(excluded=Selection(excluded=Selection())),
    ):
        with pytest.raises(SpecError):
            selection_to_json(selection)


# Bytes that are no plan


def changed(name: str, change: Any) -> bytes:
    content, tensors = opened(dump_plan(compiled(name)))
    change(content, tensors)
    return written(content, tensors)


def block_of(content: dict[str, Any]) -> dict[str, Any]:
    block: dict[str, Any] = content["passes"][0]["blocks"][0]
    return block


def set_row(tensors: dict[str, Any], name: str, value: float) -> None:
    row = tensors[name].copy()
    row.flat[0] = value
    tensors[name] = row


CHANGES: dict[str, tuple[str, Any, str]] = {
    "nothing": ("everything", lambda c, t: None, ""),
    "another version": ("everything", lambda c, t: c.update(version=2), "format version 2"),
    "no version": ("everything", lambda c, t: c.pop("version"), "format version None"),
    "no passes": ("everything", lambda c, t: c.pop("passes"), "passes: Field required"),
    "an unknown field": ("everything", lambda c, t: c.update(extra=1), "extra"),
    "an odd fingerprint": ("everything", lambda c, t: c.update(fingerprint="x"), "fingerprint"),
    "no spec": ("everything", lambda c, t: c.pop("spec"), "spec"),
    "an empty spec": ("everything", lambda c, t: c.update(spec={}), "/interventions"),
    "an unknown site": (
        "everything",
        lambda c, t: block_of(c).update(point=[0, "elsewhere"]),
        "point.1",
    ),
    "one point twice": (
        "everything",
        lambda c, t: block_of(c).update(point=[1, "resid_post"]),
        "edits 1.resid_post twice",
    ),
    "a missing tensor": ("everything", lambda c, t: t.pop("t0"), "'t0' is missing"),
    "an unused tensor": ("everything", lambda c, t: t.update(t9=t["t0"]), "t9"),
    "float64": ("everything", lambda c, t: t.update(t0=t["t0"].astype("f8")), "not float32"),
    "integers": ("everything", lambda c, t: t.update(t0=t["t0"].astype("i4")), "not float32"),
    "NaN in a row": ("everything", lambda c, t: set_row(t, "t0", math.nan), "not finite"),
    "infinity in a row": ("ablate", lambda c, t: set_row(t, "t0", math.inf), "not finite"),
    "NaN in a law": ("ablate", lambda c, t: set_row(t, "t1", math.nan), "NaN"),
    "an infinite bias": ("ablate", lambda c, t: set_row(t, "t1", math.inf), "not finite"),
    "NaN in a gate": (
        "a prompt gate",
        lambda c, t: set_row(t, c["passes"][0]["gate"]["direction"], math.nan),
        "one finite row",
    ),
    "a shift of two rows": (
        "everything",
        lambda c, t: t.update(t0=t["t0"].reshape(2, 8)),
        "one row",
    ),
    "an empty row": ("everything", lambda c, t: t.update(t0=t["t0"][:0]), "one row"),
    "laws of six columns": ("ablate", lambda c, t: t.update(t1=t["t1"][:, :6]), "laws"),
    "a write of other width": (
        "rotate",
        lambda c, t: t.update(t1=t["t1"][:, :8]),
        "both are",
    ),
    "a block that does nothing": (
        "everything",
        lambda c, t: (block_of(c).pop("shift"), t.pop("t0")),
        "neither",
    ),
    "half an edit": ("ablate", lambda c, t: block_of(c)["edits"].pop("laws"), "laws"),
    "k of none": (
        "a clamp that competes",
        lambda c, t: block_of(c)["competition"].update(k=0),
        "competition.k",
    ),
    "k of all and more": (
        "a clamp that competes",
        lambda c, t: block_of(c)["competition"].update(k=65),
        "k is 65 and the SAE",
    ),
    "an SAE by name": (
        "a clamp that competes",
        lambda c, t: block_of(c)["competition"].update(sae="../../etc/passwd"),
        "competition.sae",
    ),
    "a competition over a constant": (
        "everything",
        lambda c, t: block_of(c).update(competition={"sae": "a" * 64, "k": 1}),
        "",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_file_is_refused_by_what_is_wrong(what: str) -> None:
    name, change, message = CHANGES[what]
    data = changed(name, change)
    if what == "nothing":
        assert load_plan(data, find_sae).fingerprint == compiled(name).fingerprint
        return
    missing = what == "a competition over a constant"  # of an SAE that nobody has
    with pytest.raises(StorageError if missing else FileFormatError) as caught:
        load_plan(data, find_sae)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        written("", {}),
        written("[]", {}),
        written("null", {}),
        written('{"version": NaN}', {}),
        written("[" * 100_000, {}),
        written("9" * 5_000, {}),
        random_vector(0, 1).to_bytes(),
        LIBRARY.sae("topk").to_bytes(),
    ],
    ids=lambda data: data[:12].hex(),
)
def test_other_bytes_are_no_plan(data: bytes) -> None:
    with pytest.raises(FileFormatError):
        load_plan(data, find_sae)


def test_a_header_is_not_read_beyond_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dump_plan(compiled("everything"))
    monkeypatch.setattr("steer.plan.file.MAX_HEADER_BYTES", 500)
    with pytest.raises(FileFormatError, match="at most 500"):
        load_plan(data, find_sae)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (random_sae("topk", width=8), "reads rows of width 8"),
        (random_sae("topk-rescaled"), "compete in another way"),
        (random_sae("standard"), "in no known way"),
        (random_sae("groupmax"), "in no known way"),
    ],
    ids=["width", "measure", "no competition", "groups"],
)
def test_an_sae_whose_features_compete_otherwise_is_refused(other: SAE, why: str) -> None:
    data = dump_plan(compiled("a clamp that competes"))
    with pytest.raises(FileFormatError, match=why):
        load_plan(data, lambda _: other)


BROKEN = ("a clamp that competes", "a token gate", "token triggers", "random 3")


@given(st.sampled_from(BROKEN), st.data())
@settings(max_examples=150, deadline=None)
def test_truncated_files_are_refused(name: str, draw: st.DataObject) -> None:
    data = dump_plan(compiled(name))
    with pytest.raises(SteerError):
        load_plan(data[: draw.draw(st.integers(0, len(data) - 1))], find_sae)


@given(st.sampled_from(BROKEN), st.data())
@settings(max_examples=600, deadline=None)
def test_flipped_bytes_raise_our_own_errors_or_none(name: str, draw: st.DataObject) -> None:
    data = bytearray(dump_plan(compiled(name)))
    flips = st.lists(
        st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
    for place, value in draw.draw(flips):
        data[place] = value
    try:
        plan = load_plan(bytes(data), find_sae)
    except SteerError:
        return
    assert all(isinstance(b, Block) for p in plan.rules for b in p.blocks.values())
    dump_plan(plan)


TEXTS = one(
    add(),
    where={
        "after": ["<a>", [3, 4]],
        "outside": [["<", None]],
        "roles": ["user", "tool"],
        "every": {"nth": 3, "first": 9},
        "except": {"between": [["a", "b"]]},
    },
)


def text_plan() -> SteeringPlan:
    pieces = span_vocabulary()
    cache = PlanCache(LIBRARY, shape_of(), EVERYTHING, vocabulary=lambda: pieces)
    return cache.plan(parse_spec(TEXTS))


def test_texts_are_read_back_with_all_that_tokens_do_to_them() -> None:
    plan = text_plan()
    data = dump_plan(plan)
    (rule,) = load_plan(data, find_sae).rules
    selections = load_selections(data)
    assert selections == (rule.selection,) == plan.selections
    ids = list(range(60))
    roles = RoleRanges(30, ((2, 20, "user"),))
    masks = []
    for selection in (plan.selections[0], rule.selection, selections[0]):
        trace = trace_of([selection], ids[:30], roles)
        assert trace is not None
        trace.read(30, np.array(ids[30:]))
        masks.append(selection.mask(np.arange(60), 30, np.array(ids), trace).tolist())
    assert masks[0] == masks[1] == masks[2]
    named = selection_from_json(selection_to_json(rule.selection))
    assert named == rule.selection
    assert all(one.moves is None for one in named.automata)
    assert len(json.dumps(selection_to_json(rule.selection))) < 1000


@pytest.mark.parametrize("change", ["states", "row", "token", "missing"])
def test_what_tokens_do_to_texts_is_not_taken_on_trust(change: str) -> None:
    data = dump_plan(text_plan())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    content = json.loads(header["__metadata__"]["steer.plan"])
    text = content["passes"][0]["selection"]["texts"][0]["automata"][0]
    tensors = {name: array.copy() for name, array in load(data).items()}
    if change == "missing":
        del text["rows"]
    elif change == "states":
        tensors[text["rows"]][0, 0] = 99
    else:
        tensors[text["tokens"]][0, ["token", "row"].index(change)] += 1000
    broken = save(tensors, metadata={"steer.plan": json.dumps(content)})
    with pytest.raises(FileFormatError) as caught:
        load_selections(broken)
    assert caught.value.code == "invalid_plan"

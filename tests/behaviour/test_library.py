"""All that is shipped for the demo model: it loads, compiles, and does what its card says."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from steer_vectors import LIBRARY
from steer_vectors.demo.recipe.relations.facts import QUESTIONS, relation_facts
from steer_vectors.demo.recipe.relations.library import SHIPPED
from steer_vectors.demo.recipe.vectors import CHOOSING, DESCRIPTIONS, TAGS

from steer.artefacts.control_vector import Card
from steer.engines.base import CaptureRequest, Completion, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.fit import read_pairs
from steer.fit.data.pairs import Prompt, render
from steer.fit.data.prompt import Messages
from steer.fit.measure.calibrate import prompts_sha256
from steer.fit.methods.lrc import Ask, answered, ask, classify
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.registry.registry import Registry
from steer.registry.shipped import add_library
from steer.spec import parse_spec
from steer_server.serve import build
from steer_server.settings import ServerSettings

DEMO = LIBRARY / "demo"
VECTORS = sorted(path.stem for path in DEMO.glob("vectors/*.safetensors"))
CONCEPTS = sorted(path.stem for path in DEMO.glob("relations/*.safetensors"))
SAES = sorted(path.parent.name for path in DEMO.glob("saes/*/cfg.json"))
PROFILES = sorted(path.stem for path in DEMO.glob("profiles/*.json"))
ALL = [("vector", name) for name in (*VECTORS, *CONCEPTS)] + [("sae", name) for name in SAES]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry.open(tmp_path_factory.mktemp("library") / "registry") as opened:
        add_library(opened, DEMO)
        yield opened


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    with TransformersEngine.load(DEMO / "model", name="steer-demo", rows=128) as running:
        yield running


@pytest.fixture(scope="module")
def plans(engine: TransformersEngine, registry: Registry) -> PlanCache:
    return plans_of(engine, registry)


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[Messages]]:
    found: dict[str, list[Messages]] = {}
    for line in (DEMO / "data" / "heldout.jsonl").read_text("utf-8").splitlines():
        one = json.loads(line)
        found.setdefault(one["attribute"], []).append(one["messages"])
    return found


def spec_of(profile: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEMO / "profiles" / f"{profile}.json").read_text("utf-8"))
    spec: dict[str, Any] = found["spec"]
    return spec


def answers(
    engine: TransformersEngine,
    prompts: list[tuple[int, ...]],
    plan: SteeringPlan | None,
    **sampling: Any,
) -> list[Completion]:
    params = SamplingParams(temperature=0, logprobs=0, **sampling)
    return engine.complete(
        [GenerationRequest(f"{n}", tokens, params, plan) for n, tokens in enumerate(prompts)]
    )


def tokens_of(engine: TransformersEngine, prompts: list[Messages]) -> list[tuple[int, ...]]:
    return [tuple(render(engine.tokenizer, one)) for one in prompts]


# What is there


def test_there_is_a_vector_for_every_attribute_and_three_relations(registry: Registry) -> None:
    assert set(VECTORS) == set(DESCRIPTIONS)
    assert len(SHIPPED) >= 3
    for relation in SHIPPED:
        tagged = {one.name for one in registry.entries("vector", tag=relation)}
        assert len(tagged) >= 2
        assert tagged <= set(CONCEPTS)
    related = {one.name for one in registry.entries("vector", tag="relation")}
    assert related == set(CONCEPTS)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_the_card_says_what_whence_and_how_well(registry: Registry, kind: Any, name: str) -> None:
    card: Card = registry.entry(kind, name).card
    assert card.licence == "Apache-2.0"
    assert card.model == "steer-demo"
    assert len(card.description) > 10
    assert "demo" in card.tags
    recipe = card.provenance["recipe"]
    assert isinstance(recipe, str)
    assert importlib.util.find_spec(recipe) is not None
    measured = card.provenance["figures" if kind == "sae" else "held_out"]
    assert isinstance(measured, dict)
    assert len([x for x in measured.values() if isinstance(x, int | float)]) >= 3
    if name in TAGS:
        assert TAGS[name] in card.tags


def test_held_out_prompts_are_in_no_pair(held_out: dict[str, list[Messages]]) -> None:
    def asked(prompt: Prompt) -> str:
        assert isinstance(prompt, list)
        return str(prompt[-1]["content"])

    used = {
        asked(prompt)
        for name in VECTORS
        for pair in read_pairs(DEMO / "data" / f"{name}.jsonl").items
        for prompt in (pair.positive, pair.negative)
    }
    kept = {asked(prompt) for prompts in held_out.values() for prompt in prompts}
    assert len(kept) > 200
    assert not used & kept


# Calibrations


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_knows_its_strengths(registry: Registry, plans: PlanCache, name: str) -> None:
    card = registry.vector(name).card
    found = card.calibration
    assert found is not None
    assert (found.layers, found.site, found.where) == (
        card.used_layers,
        card.site,
        card.default_where,
    )
    doses: dict[str, float] = {}
    for wanted in ({"effect": 0.5}, "auto", {"kl": found.kl[-1] / 2}):
        item = {"kind": "add", "vector": name, "strength": wanted}
        plan = plans.plan(parse_spec({"interventions": [item]}))
        (settled,) = plan.resolved_strengths
        assert 0 < settled["strength"] <= found.safe_strength
        doses[str(wanted)] = settled["strength"]
    assert doses["{'effect': 0.5}"] <= doses["auto"]


@pytest.mark.parametrize("name", VECTORS)
def test_a_calibration_is_of_prompts_that_no_setting_was_chosen_on(
    registry: Registry, name: str
) -> None:
    pairs = read_pairs(DEMO / "data" / f"{name}.jsonl").items
    found = registry.vector(name).card.calibration
    assert found is not None
    assert found.data_sha256 == prompts_sha256([pair.negative for pair in pairs[CHOOSING:]])


# Profiles


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_compiles(
    engine: TransformersEngine, registry: Registry, plans: PlanCache, name: str
) -> None:
    profile = registry.profile(name)
    plan = plans.plan(profile.spec)
    assert plan.points
    assert all(0 <= point.layer < engine.info.n_layers for point in plan.points)
    assert re.search(r"\d%", profile.description or ""), "a profile says what was measured"


def test_profiles_show_every_way_to_steer() -> None:
    specs = {name: spec_of(name) for name in PROFILES}
    items = [item for spec in specs.values() for item in spec["interventions"]]
    assert {"add", "project", "clamp", "ablate"} <= {item["kind"] for item in items}
    assert any(len(spec["interventions"]) > 1 for spec in specs.values())
    assert any("when" in item for item in items)
    assert set(DESCRIPTIONS) - {"refusal"} | {"compliant", "cautious"} <= set(PROFILES)


def test_every_profile_changes_an_answer(
    engine: TransformersEngine, plans: PlanCache, held_out: dict[str, list[Messages]]
) -> None:
    kinds = ("french", "positive", "food", "verbose", "refusal", "compliance")
    prompts = tokens_of(engine, [one for kind in kinds for one in held_out[kind][:2]])
    plain = [done.tokens for done in answers(engine, prompts, None, max_tokens=24)]
    params = SamplingParams(temperature=0, max_tokens=24)
    requests = [
        GenerationRequest(f"{name} {n}", tokens, params, plans.plan(parse_spec(spec_of(name))))
        for name in PROFILES
        for n, tokens in enumerate(prompts)
    ]
    said = [done.tokens for done in engine.complete(requests)]
    by_profile = {
        name: said[n * len(prompts) : (n + 1) * len(prompts)] for n, name in enumerate(PROFILES)
    }
    assert [name for name, texts in by_profile.items() if texts == plain] == []


GATED = [name for name in PROFILES if any("when" in x for x in spec_of(name)["interventions"])]


@pytest.mark.parametrize("name", GATED)
def test_a_closed_gate_leaves_the_bits(
    engine: TransformersEngine, plans: PlanCache, held_out: dict[str, list[Messages]], name: str
) -> None:
    """Harmful and harmless requests in one batch; all of the same length, because a batch of
    another shape may round otherwise."""
    count = 24
    asked = held_out["refusal"][:count] + held_out["compliance"][:count]
    prompts = tokens_of(engine, asked)
    plain = answers(engine, prompts, None, max_tokens=6, ignore_eos=True)
    plan = plans.plan(parse_spec(spec_of(name)))
    gated = answers(engine, prompts, plan, max_tokens=6, ignore_eos=True)
    fired = []
    for before, after in zip(plain, gated, strict=True):
        assert after.receipt is not None
        fired.append(any(gate.fired for gate in after.receipt.gates))
        if not fired[-1]:
            assert (after.tokens, after.logprobs) == (before.tokens, before.logprobs)
    changed = [b.tokens != a.tokens for b, a in zip(plain, gated, strict=True)]
    assert sum(fired[:count]) <= 0.2 * count
    assert sum(fired[count:]) >= 0.8 * count
    assert sum(changed[count:]) >= 0.5 * count


# Relations


def known(engine: TransformersEngine, relation: str, count: int) -> list[Ask]:
    """Facts that the model knows, from all over the table."""
    facts = relation_facts()[relation]
    step = max(1, len(facts) // count)
    return answered(engine, [ask(engine, QUESTIONS[relation], f, (), 0) for f in facts[::step]])


@pytest.mark.parametrize("relation", SHIPPED)
def test_concepts_by_name_sort_subjects_and_swap_answers(
    engine: TransformersEngine, registry: Registry, plans: PlanCache, relation: str
) -> None:
    vectors = [registry.vector(x.name) for x in registry.entries("vector", tag=relation)]
    concepts = {str(one.card.provenance["object"]): one for one in vectors}
    names = sorted(concepts)
    facts = known(engine, relation, 24)
    assert len(facts) >= 12

    layer, site = vectors[0].card.layers[0], vectors[0].card.site
    point = HookPoint(layer, site)
    right, requests, targets = 0, [], []
    told = vectors[0].card.provenance["held_out"]
    assert isinstance(told, dict)
    for n, one in enumerate(facts):
        captured = engine.capture(CaptureRequest([one.tokens], (point,), positions=(one.subject,)))
        right += classify(concepts, captured[0].states[point], layer) == [one.fact.object]
        target = names[(names.index(one.fact.object) + 1 + n % (len(names) - 1)) % len(names)]
        item = {
            "kind": "swap",
            "remove": concepts[one.fact.object].card.name,
            "add": concepts[target].card.name,
            "strength": told["swap_strength"],
            "layers": "all",
            "where": {"positions": [[one.subject, one.subject + 1]]},
        }
        params = SamplingParams(max_tokens=8, temperature=0)
        plan = plans.plan(parse_spec({"interventions": [item]}))
        requests.append(GenerationRequest(f"{n}", one.prompt, params, plan))
        targets.append(target)
    said = [str(engine.tokenizer.decode(list(x.tokens))) for x in engine.complete(requests)]
    swapped = sum(text.strip().startswith(t) for text, t in zip(said, targets, strict=True))
    # These subjects were fitted on, those of the card were not; the margin is for the sample.
    assert right / len(facts) >= float(str(told["classification"])) - 0.15
    assert swapped / len(facts) >= float(str(told["swapped"])) - 0.2
    assert swapped > len(facts) / len(names)


def test_the_swap_that_the_library_page_shows(engine: TransformersEngine, plans: PlanCache) -> None:
    page = (LIBRARY / "README.md").read_text("utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    decoder = json.JSONDecoder()
    first, end = decoder.raw_decode(block)
    swap, _ = decoder.raw_decode(block[end:].strip())
    assert plans.plan(parse_spec(first)).points
    prompts = tokens_of(engine, [[{"role": "user", "content": "Where does the fox live?"}]])
    (done,) = answers(engine, prompts, plans.plan(parse_spec(swap)), max_tokens=24)
    said = engine.tokenizer.decode(list(done.tokens), skip_special_tokens=True)
    assert said == "The dolphin lives in the sea."
    assert said in page


# The server


async def test_the_server_lists_profiles_as_models_and_filters_by_tag(tmp_path: Path) -> None:
    settings = ServerSettings(model="steer-demo", registry=str(tmp_path / "r"))
    app = build(settings)
    try:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            models = {one["id"] for one in (await http.get("/v1/models")).json()["data"]}
            found = await http.get("/v1/steering/vectors", params={"tag": "relation"})
    finally:
        app.state.steer.registry.close()
    assert models == {"steer-demo", *(f"steer-demo:{name}" for name in PROFILES)}
    assert sorted(one["name"] for one in found.json()["data"]) == CONCEPTS

"""Suites on a small model: factors chosen on one half, rated on the other, resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.measure.answers import Answer
from steer.fit.measure.suite.file import Suite, SuiteConcept, parse_suite
from steer.fit.measure.suite.rating import Rating
from steer.fit.measure.suite.report import write_suite_report
from steer.fit.measure.suite.result import ConceptRow, SuiteResult
from steer.fit.measure.suite.run import run_suite, suite_steps
from steer.fit.measure.suite.way import Way
from steer.spec import parse_spec

PROMPTS = ["one", "two words", "and three more", "four", "the fifth", "six"]
SUITE = parse_suite(
    {
        "name": "letters",
        "concepts": [
            {"name": name, "description": name, "instruction": f"Say {name}."} for name in "ez"
        ],
        "prompts": PROMPTS,
        "factors": [0.01, 1.0, 2.0],
        "max_tokens": 4,
    }
)


class Letters:
    """Rates the share of a concept's letter; instruction and fluency are always full."""

    identity = "letters"

    def __init__(self) -> None:
        self.rated = 0

    def rate(
        self, concept: SuiteConcept, answers: Sequence[Answer], places: Sequence[int]
    ) -> list[Rating]:
        assert len(answers) == len(places)
        self.rated += len(answers)
        return [Rating(2 * a.text.count(concept.name) / 4, 2, 2) for a in answers]


def run(engine: TransformersEngine, **fields: Any) -> tuple[SuiteResult, Letters]:
    head = engine._hooked.model.get_output_embeddings().weight.detach()  # type: ignore[operator]
    vectors = {
        name: ControlVector.of({2: 20 * head[ord(name)] / head[ord(name)].norm()}, name=name)
        for name in "ez"
    }
    cache = plans_of(engine, MemoryLibrary(vectors))

    def plan(kind: str) -> Any:
        def of(concept: SuiteConcept) -> Way:
            spec = parse_spec({"interventions": [{"kind": kind, "vector": concept.name}]})
            return Way.of(cache.plan(spec))

        return of

    panel = Letters()
    methods = fields.pop("methods", {"added": plan("add"), "ablated": plan("ablate")})
    suite: Suite = fields.pop("suite", SUITE)
    found = run_suite(engine, suite, PROMPTS, methods, lambda *_: panel, **{"nulls": 1, **fields})
    return found, panel


def test_factors_are_chosen_on_one_half_and_rated_on_the_other(
    engine: TransformersEngine,
) -> None:
    steps: list[int] = []
    found, _ = run(engine, progress=steps.append)
    assert sum(steps) == suite_steps(SUITE, 2, 1)
    assert [one.concept for one in found.concepts] == ["e", "z"]
    for one in found.concepts:
        assert [row.method for row in one.rows] == ["unsteered", "prompt only", "added", "ablated"]
        unsteered, _, added, ablated = one.rows
        assert all(len(row.ratings) == 3 for row in one.rows)
        assert [factor for factor, _ in added.chosen_from] == [0.01, 1.0, 2.0]
        best = max(score for _, score in added.chosen_from)
        assert dict(added.chosen_from)[added.factor or 0] == best
        assert added.overall > unsteered.overall
        assert added.nulls is not None
        assert [null.kind for null in added.nulls.nulls] == ["isotropic", "covariance"]
        assert added.nulls.above_null
        # What is no addition is not turned, and has no nulls.
        assert ablated.chosen_from == ((1.0, ablated.chosen_from[0][1]),)
        assert "more than to add" in str(ablated.no_nulls)
    by_name = {one.method: one for one in found.summaries}
    assert by_name["added"].above_null == 1
    assert by_name["added"].overall.value > by_name["prompt only"].overall.value
    assert by_name["ablated"].null is None


def test_of_equal_factors_the_weakest(engine: TransformersEngine) -> None:
    suite = SUITE.model_copy(update={"factors": (4.0, 2.0, 8.0)})
    found, _ = run(engine, suite=suite, nulls=0)
    row = found.concepts[0].rows[2]
    assert len({score for _, score in row.chosen_from}) == 1
    assert row.factor == 2.0
    assert row.no_nulls == "no nulls were asked for"


def test_a_run_goes_on_where_it_was(engine: TransformersEngine, tmp_path: Path) -> None:
    first, panel = run(engine, folder=tmp_path)
    assert panel.rated > 0
    steps: list[int] = []
    again, idle = run(engine, folder=tmp_path, progress=steps.append)
    assert idle.rated == 0
    assert sum(steps) == suite_steps(SUITE, 2, 1)
    assert again.as_json() == first.as_json()
    # What is damaged, or was of something else, is measured again.
    (tmp_path / "concepts" / "e.json").write_text('{"key"')
    partly, some = run(engine, folder=tmp_path)
    assert 0 < some.rated < panel.rated
    assert partly.as_json() == first.as_json()
    _, other = run(engine, folder=tmp_path, seed=1)
    assert other.rated == panel.rated


def test_a_report_is_a_folder(engine: TransformersEngine, tmp_path: Path) -> None:
    found, _ = run(engine)
    write_suite_report(tmp_path / "report", found)
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert figures["published"]["prompt"] == 0.894
    assert [one["method"] for one in figures["methods"]][2] == "added"
    rows = figures["concepts"][0]["rows"]
    assert [ConceptRow.from_json(row) for row in rows] == list(found.concepts[0].rows)
    assert (tmp_path / "report" / "suite.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report" / "report.md").read_text()
    assert page.count("\n| ") == (2 + 4) + (2 + 8)


@pytest.mark.parametrize("methods", [{}, {"prompt only": None}, {"unsteered": None}])
def test_methods_have_names_of_their_own(engine: TransformersEngine, methods: Any) -> None:
    with pytest.raises(SteerError) as caught:
        run(engine, methods=methods)
    assert caught.value.code == "invalid_option"


def test_a_name_that_is_wrong_is_told_before_anything_is_run(engine: TransformersEngine) -> None:
    missing = SUITE.concepts[1].model_copy(update={"name": "missing"})
    suite = SUITE.model_copy(update={"concepts": (SUITE.concepts[0], missing)})
    with pytest.raises(SteerError, match="missing"):
        run(engine, suite=suite)

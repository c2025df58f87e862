"""Ways to steer that a suite fits itself: from answers to both forms, to the same reach, kept."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.measure.divergence import References
from steer.fit.measure.suite import fitted
from steer.fit.measure.suite.file import Suite, parse_suite
from steer.fit.measure.suite.fitted import FITS, SuiteFitter, fit_questions
from steer.fit.requests.suite import FitName, SuiteRequest

QUESTIONS = ["the red sun", "a day", "one more", "four of them", "the fifth", "six"]


def suite(**changes: object) -> Suite:
    concepts = [
        {"name": name, "description": name, "instruction": f"{name}!", "score": "regex:."}
        for name in ("loud", "soft")
    ]
    fields = {"name": "small", "concepts": concepts, "prompts": ["one", "two"], "max_tokens": 4}
    return parse_suite({**fields, **changes})


def test_requests_name_every_fit() -> None:
    assert set(get_args(FitName)) == set(FITS)


@pytest.mark.parametrize("method", FITS)
def test_factor_1_is_the_same_reach_for_every_method(
    method: str, lively: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitted, "STEPS", 3)
    monkeypatch.setattr(fitted, "REACH", 0.05)
    small = suite()
    done: list[int] = []
    fitter = SuiteFitter(lively, small, QUESTIONS, folder=tmp_path, progress=done.append)
    way = fitter.way_of(method)(small.concepts[0])
    assert way.at is not None
    # The unsteered answers, the told ones, and the fit.
    assert sum(done) == 2 * len(QUESTIONS) + 1
    plain = References(lively, fitter._plain).first(4, 24)
    [kl] = plain.divergences([way.plan]).mean(1).tolist()
    assert kl == pytest.approx(0.05, rel=0.05)
    assert way.at(1.0).fingerprint == way.plan.fingerprint
    [less] = plain.divergences([way.at(0.5)]).mean(1).tolist()
    assert less < kl
    # Read again, it is the same plan, and nothing is asked.
    asked: list[int] = []
    again = SuiteFitter(lively, small, QUESTIONS, folder=tmp_path, progress=asked.append)
    assert again.way_of(method)(small.concepts[0]).plan.fingerprint == way.plan.fingerprint
    assert asked == []


def test_what_is_kept_is_of_what_is_asked(lively: TransformersEngine, tmp_path: Path) -> None:
    kept = []
    for changes in ({}, {"place": "after"}, {"max_tokens": 3}):
        small = suite(**changes)
        SuiteFitter(lively, small, QUESTIONS, folder=tmp_path).way_of("diffmean")(small.concepts[0])
        kept.append(len(list((tmp_path / "fitted").iterdir())))
    assert kept == [1, 2, 3]


def test_questions_are_none_of_the_suites() -> None:
    first = fit_questions(suite())[0]
    assert first not in fit_questions(suite(prompts=[first, "two"]))


def test_an_instruction_that_changes_nothing_is_refused(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitted, "Telling", lambda *_: lambda prompt: prompt)
    small = suite()
    with pytest.raises(SteerError, match="'loud!'") as caught:
        SuiteFitter(engine, small, QUESTIONS).way_of("diffmean")(small.concepts[0])
    assert caught.value.code == "no_difference"


def test_a_request_counts_its_fits_and_needs_one_way_each() -> None:
    plain = {"suite": suite().model_dump(), "nulls": 0}
    one = SuiteRequest.model_validate({**plain, "methods": [{"name": "a", "profile": "a"}]})
    other = SuiteRequest.model_validate({**plain, "methods": [{"name": "a", "fit": "psr"}]})
    assert other.answers - one.answers == 24 * 3 + 2
    for wrong in ({}, {"fit": "psr", "profile": "a"}, {"fit": "none"}):
        with pytest.raises(ValueError, match="fit"):
            SuiteRequest.model_validate({**plain, "methods": [{"name": "a", **wrong}]})

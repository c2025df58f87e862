"""What one may ask of a suite: concepts, and the ways to steer towards each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from steer.errors import SteerError, pointer
from steer.fit.measure.suite.file import Suite
from steer.fit.requests.fields import NullsField, Ref, Seed
from steer.fit.requests.measuring import NULLS, MethodParam, as_asked
from steer.spec import exactly_one

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.measure.answers import Progress
    from steer.fit.measure.scoring import AnswerScorer, Scorer
    from steer.fit.measure.suite.result import SuiteResult
    from steer.fit.measure.suite.run import PanelOf
    from steer.fit.measure.suite.way import WayOf

SUITE_GROUP = 64
"""Answers between two reports: those of a concept are many, and each is short."""

CONCEPT = "{concept}"
"""Stands for the concept's name in what a method names."""


FitName: TypeAlias = Literal["diffmean", "logistic", "pca", "psr", "reps", "low-rank"]
"""The keys of `steer.fit.measure.suite.fitted.FITS`, which needs torch."""


class SuiteMethodParam(BaseModel):
    """A way to steer towards every concept, under its name in the table: a spec, a saved profile,
    or a method that is fitted for each concept."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra=exactly_one("steering", "profile", "fit")
    )

    name: Annotated[str, Field(min_length=1, max_length=128)]
    steering: dict[str, Any] | None = None
    profile: Ref | None = None
    fit: FitName | None = None

    @model_validator(mode="after")
    def _one(self) -> SuiteMethodParam:
        if [self.steering, self.profile, self.fit].count(None) != 2:
            raise ValueError(
                "a method is either a spec ('steering'), a 'profile', or a method to 'fit'"
            )
        return self

    def towards(self, concept: str) -> MethodParam:
        """The spec or profile with the concept's name in it."""
        text = json.dumps(self.model_dump(mode="json", exclude={"name", "fit"}))
        return MethodParam(name=self.name, **json.loads(text.replace(CONCEPT, concept)))


class SuiteRequest(BaseModel):
    """Which suite, by which methods: `{concept}` in a method's spec or profile is each concept's
    name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: Annotated[Suite, Field(description="Concepts, prompts and factors.")]
    methods: Annotated[
        tuple[SuiteMethodParam, ...],
        Field(
            min_length=1,
            max_length=32,
            fail_fast=True,
            description="Ways to steer; {concept} in them is each concept's name, and those to "
            "'fit' are fitted for each concept.",
        ),
    ]
    nulls: NullsField = NULLS
    seed: Annotated[Seed, Field(description="Draws the nulls and the bootstrap.")] = 0
    plain: Annotated[
        StrictBool,
        Field(description="Continue texts as they are, also where there is a chat form."),
    ] = False

    @model_validator(mode="after")
    def _distinct(self) -> SuiteRequest:
        if len({method.name for method in self.methods}) < len(self.methods):
            raise ValueError("two methods have one name")
        return self

    @property
    def answers(self) -> int:
        """Everything that `run` tells `progress` of, where nothing was fitted before."""
        from steer.fit.measure.suite.fitted import fit_steps
        from steer.fit.measure.suite.run import suite_steps

        fits = fit_steps(len(self.suite.concepts), len(self.fits))
        return fits + suite_steps(self.suite, len(self.methods), self.nulls)

    @property
    def fits(self) -> dict[str, FitName]:
        """The methods that are fitted, by their names in the table."""
        return {one.name: one.fit for one in self.methods if one.fit is not None}

    def check_scores(self) -> None:
        """Raises `SteerError` (`no_scorer`) for a concept that only a judge could rate."""
        for place, concept in enumerate(self.suite.concepts):
            if concept.score is None:
                raise SteerError(
                    f"the concept {concept.name!r} has no 'score', and no judge was named: give "
                    "it a scorer",
                    code="no_scorer",
                    param=pointer("suite", "concepts", place, "score"),
                )

    def run(
        self,
        engine: Engine,
        methods: Mapping[str, WayOf],
        *,
        scorers: Mapping[str, Scorer | AnswerScorer] | None = None,
        panel_of: PanelOf | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> SuiteResult:
        """Runs the suite by `methods`, and by those that it fits; it is rated by `panel_of`, or
        else with the `scorers` of the concepts by the model itself. Raises `SteerError`."""
        from steer.fit.measure.suite.rating import ModelPanel
        from steer.fit.measure.suite.run import run_suite

        def own_panel(_: Any, plain: Any) -> ModelPanel:
            prompts = [answer.prompt for answer in plain]
            return ModelPanel(engine, dict(scorers or {}), prompts, plain)

        ways = {**methods, **self._fitted(engine, folder, progress)}
        return run_suite(
            engine,
            self.suite,
            as_asked(engine, self.suite.prompts, plain=self.plain),
            {one.name: ways[one.name] for one in self.methods},
            panel_of or own_panel,
            nulls=self.nulls,
            seed=self.seed,
            folder=folder,
            group=SUITE_GROUP,
            progress=progress,
        )

    def _fitted(
        self, engine: Engine, folder: Path | None, progress: Progress | None
    ) -> dict[str, WayOf]:
        from steer.fit.measure.suite.fitted import SuiteFitter, fit_questions

        questions = as_asked(engine, fit_questions(self.suite), plain=self.plain)
        fitter = SuiteFitter(engine, self.suite, questions, self.seed, folder, progress)
        return {name: fitter.way_of(fit) for name, fit in self.fits.items()}

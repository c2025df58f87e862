"""What one may ask of a suite: concepts, and the ways to steer towards each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from steer.errors import SteerError, pointer
from steer.fit.measure.suite.file import Suite
from steer.fit.requests.fields import NullsField, Seed
from steer.fit.requests.measuring import GROUP, NULLS, MethodParam, as_asked

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.measure.answers import Progress
    from steer.fit.measure.scoring import AnswerScorer, Scorer
    from steer.fit.measure.suite.result import SuiteResult
    from steer.fit.measure.suite.run import PanelOf, PlanOf

CONCEPT = "{concept}"
"""Stands for the concept's name in what a method names."""


class SuiteRequest(BaseModel):
    """Which suite, by which methods: `{concept}` in a method's spec or profile is each concept's
    name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: Annotated[Suite, Field(description="Concepts, prompts and factors.")]
    methods: Annotated[
        tuple[MethodParam, ...],
        Field(
            min_length=1,
            max_length=32,
            fail_fast=True,
            description="Ways to steer; {concept} in them is each concept's name.",
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
        """Everything that `run` tells `progress` of."""
        from steer.fit.measure.suite.run import suite_steps

        return suite_steps(self.suite, len(self.methods), self.nulls)

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
        methods: Mapping[str, PlanOf],
        *,
        scorers: Mapping[str, Scorer | AnswerScorer] | None = None,
        panel_of: PanelOf | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> SuiteResult:
        """Runs the suite; it is rated by `panel_of`, or else with the `scorers` of the concepts by
        the model itself. Raises `SteerError`."""
        from steer.fit.measure.suite.rating import ModelPanel
        from steer.fit.measure.suite.run import run_suite

        def own_panel(_: Any, plain: Any) -> ModelPanel:
            prompts = [answer.prompt for answer in plain]
            return ModelPanel(engine, dict(scorers or {}), prompts, plain)

        return run_suite(
            engine,
            self.suite,
            as_asked(engine, self.suite.prompts, plain=self.plain),
            methods,
            panel_of or own_panel,
            nulls=self.nulls,
            seed=self.seed,
            folder=folder,
            group=GROUP,
            progress=progress,
        )


def towards(method: MethodParam, concept: str) -> MethodParam:
    """`method` with the concept's name in it."""
    text = json.dumps(method.model_dump(mode="json", exclude={"name"}))
    return MethodParam(name=method.name, **json.loads(text.replace(CONCEPT, concept)))

"""Runs a suite: every concept, every way to steer, every factor, with their nulls.

A concept is one piece of work: all its answers share the engine's batch, and what it found is kept
before the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from steer.engines.base import Engine, SamplingParams
from steer.errors import SteerError
from steer.fit.data.prompt import Prompt
from steer.fit.measure.answers import GROUP, Answer, Progress, answers_under
from steer.fit.measure.evaluate import PROMPT_ONLY, UNSTEERED
from steer.fit.measure.nulls.runs import NULLS
from steer.fit.measure.suite.concept import ConceptBench, concept_steps
from steer.fit.measure.suite.file import Suite
from steer.fit.measure.suite.kept import KeptResult
from steer.fit.measure.suite.rating import Panel
from steer.fit.measure.suite.result import SuiteResult
from steer.fit.measure.suite.way import WayOf

PanelOf: TypeAlias = Callable[[Sequence[Prompt], Sequence[Answer]], Panel]
"""The panel, from the suite's prompts and the unsteered answers to them."""


def run_suite(
    engine: Engine,
    suite: Suite,
    prompts: Sequence[Prompt],
    methods: Mapping[str, WayOf],
    panel_of: PanelOf,
    *,
    nulls: int = NULLS,
    seed: int = 0,
    folder: Path | None = None,
    group: int = GROUP,
    progress: Progress | None = None,
) -> SuiteResult:
    """Rates `methods` on every concept of `suite`, beside the unsteered model and asking in words.

    `prompts` are the suite's, as the engine is asked. What can be turned (`Way`) is, by
    each of the suite's factors; another stays as it is. `folder` keeps each concept's result, and
    is where one that is there already comes from. `progress` is told of `suite_steps` in all.
    Raises `SteerError`.
    """
    _check(suite, methods)
    sampling = SamplingParams(max_tokens=suite.max_tokens, temperature=0.0, seed=seed, logprobs=0)
    [plain] = answers_under(
        engine,
        [prompts],
        [None],
        sampling=sampling,
        group=group,
        progress=progress,
    )
    bench = ConceptBench(
        engine, suite, prompts, plain, panel_of(prompts, plain), sampling, nulls, seed, group
    )
    # Every plan is made before the first is run: a name that is wrong is told at once.
    ways = [{name: of(concept) for name, of in methods.items()} for concept in suite.concepts]
    found = []
    for concept, mine in zip(suite.concepts, ways, strict=True):
        kept = KeptResult.of(folder, concept.name, bench.asked(concept, mine))
        result = kept.read()
        if result is None:
            result = bench.run(concept, mine, progress)
            kept.write(result)
        elif progress is not None:
            progress(concept_steps(suite, len(methods), nulls))
        found.append(result)
    return SuiteResult(
        suite.name, engine.info.own_name, bench.panel.identity, len(prompts), tuple(found), seed
    )


def suite_steps(suite: Suite, methods: int, nulls: int = NULLS) -> int:
    """How much `run_suite` tells `progress` of: the unsteered answers, and each concept's."""
    return len(suite.prompts) + len(suite.concepts) * concept_steps(suite, methods, nulls)


def _check(suite: Suite, methods: Mapping[str, WayOf]) -> None:
    reserved = sorted({UNSTEERED, PROMPT_ONLY} & methods.keys())
    if reserved or not methods:
        raise SteerError(
            f"a row {reserved[0]!r} is always there: name the method differently"
            if reserved
            else f"there is nothing to run {suite.name!r} with: give at least one way to steer",
            code="invalid_option",
        )

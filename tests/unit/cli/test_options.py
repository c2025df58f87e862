"""Options made of a request's fields, and a method that is nothing but its request."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pytest
import torch
import typer
from pydantic import BaseModel, ConfigDict, Field
from typer.testing import CliRunner

from steer.artefacts.control_vector import ControlVector
from steer.cli.options import checked, command, options, read_values
from steer.engines.fake.engine import FakeEngine
from steer.errors import SpecError
from steer.fit.requests.fields import LayersField, NameField, Spelled, UsedWhereField
from steer.fit.requests.request import FitPlace, FitRequest, Fitted
from steer.jobs import JobContext
from steer.jobs.kinds.fit import fit_kind
from steer.registry.registry import Registry


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    what: Annotated[str, Spelled(argument=True), Field(description="What it is about.")]
    count: Annotated[int, Field(ge=1, le=9, description="How many.")] = 3
    share: Annotated[float, Field(gt=0, lt=1, description="How much.")] = 0.5
    colour: Annotated[Literal["red", "green"], Field(description="Which.")] = "red"
    layers: LayersField = None
    where: UsedWhereField = None
    loud: Annotated[bool, Field(description="Loudly.")] = False
    secret: Annotated[int, Spelled(hidden=True), Field(description="For jobs.")] = 1


def run(*arguments: str) -> tuple[list[Asked], Any]:
    """The request that the options come to, and how the command ended."""
    found: list[Asked] = []

    def take(values: dict[str, Any]) -> None:
        found.append(checked(Asked, read_values(Asked, values)))

    app = typer.Typer()
    app.command()(command(take, tuple(options(Asked)), summary="Ask."))
    return found, CliRunner().invoke(app, arguments)


def test_what_is_not_given_is_the_fields_default() -> None:
    found, result = run("it")
    assert result.exit_code == 0, result.output
    assert found == [Asked(what="it")]


def test_options_are_read_into_fields() -> None:
    found, _ = run(
        *("it", "--count", "9", "--colour", "green", "--layers", "2-4", "--where", "generation"),
        "--loud",
    )
    wanted = {"count": 9, "colour": "green", "layers": (2, 3, 4), "loud": True}
    assert found == [
        Asked.model_validate({"what": "it", "where": {"phases": ["generation"]}, **wanted})
    ]


@pytest.mark.parametrize(
    "arguments", [("--count", "10"), ("--count", "0"), ("--colour", "blue"), ("--secret", "1")]
)
def test_bounds_and_choices_are_the_fields(arguments: tuple[str, ...]) -> None:
    found, result = run("it", *arguments)
    assert (found, result.exit_code) == ([], 2)


def test_a_bound_that_options_do_not_know_is_the_models() -> None:
    _, result = run("it", "--share", "1")
    assert isinstance(result.exception, SpecError)
    assert [problem.param for problem in result.exception.problems] == ["/share"]


class OnesRequest(FitRequest):
    """Ones everywhere: the least that a method can be."""

    command: ClassVar = "ones"
    summary: ClassVar = "Fit ones."

    name: NameField
    length: Annotated[float, Field(gt=0, description="Of the vector.")] = 2.0

    def work(self, data: Any) -> int:
        return 1

    def run(self, place: FitPlace, data: Any) -> Fitted:
        if place.progress is not None:
            place.progress(1)
        row = torch.ones(place.engine.info.d_model)
        return Fitted({self.name: ControlVector.of({0: self.length * row / row.norm()})})


def test_a_method_is_a_job_by_its_request_alone(tmp_path: Any) -> None:
    kind = fit_kind(OnesRequest)
    reports: list[tuple[int, int | None]] = []
    with Registry.open(tmp_path) as registry:
        request = OnesRequest(name="ones", length=3)
        kind.check(FakeEngine(), registry, request)
        context = JobContext(
            FakeEngine(),
            registry,
            tmp_path,
            tmp_path,
            lambda done, total=None, note="": reports.append((done, total)),
        )
        result = kind.run(context, request)
        assert float(registry.vector("ones")[0].norm()) == pytest.approx(3)
    assert (kind.name, result["name"], reports) == ("fit/ones", "ones", [(0, 1), (1, 1)])
    assert {one.name for one in options(OnesRequest)} == {"name", "length"}

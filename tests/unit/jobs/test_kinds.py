"""The kinds of job: imports from URLs, and scorers that clients may name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.engines.fake.engine import FakeEngine
from steer.errors import SteerError
from steer.jobs import JobContext, builtin_kinds
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.importing import Download, ImportParams
from steer.jobs.kinds.kind import Report
from steer.registry.registry import Registry

VECTOR = ControlVector.of({1: torch.ones(16)})


def test_a_fetcher_is_used_for_its_scheme_alone(tmp_path: Path) -> None:
    asked = []

    def fetch(source: str, folder: Path, progress: Report) -> Download:
        asked.append(source)
        progress(50, 100, "bytes")
        (folder / "file").write_bytes(VECTOR.to_bytes())
        return Download(folder / "file", "hf://org/repo/v.safetensors@0123")

    kind = builtin_kinds({"hf": fetch})["import"]
    reports = []
    with Registry.open(tmp_path / "registry") as registry, registry.scratch() as scratch:
        scratch.mkdir()
        params = ImportParams(name="v", source="hf://org/repo/v.safetensors@main")
        kind.check(FakeEngine(), registry, params)
        context = JobContext(
            FakeEngine(),
            registry,
            scratch,
            tmp_path / "none",
            lambda done, total=None, note="": reports.append((done, total, note)),
        )
        result = kind.run(context, params)
        assert asked == [params.source]
        assert registry.vector(result["id"]).sha256 == VECTOR.sha256
        assert (50, 100, "bytes") in reports
        for source in ("http://x/y", "hf:/x", "s3://x"):
            with pytest.raises(SteerError) as raised:
                kind.check(FakeEngine(), registry, ImportParams(name="v", source=source))
            assert (raised.value.code, raised.value.param) == ("unsupported_source", "/source")
        with pytest.raises(SteerError) as raised:
            kind.run(context, ImportParams(name="v"))
        assert raised.value.code == "input_lost"


@pytest.mark.parametrize(
    ("scorer", "text", "value"),
    [
        ("regex:jo+y", "such JOOY!", 1.0),
        ("regex:^joy", "such joy", 0.0),
        ("words:joy, fun", "it is fun", 1.0),
        ("words:joy", "enjoying", 0.0),
    ],
)
def test_scorers_of_clients(scorer: str, text: str, value: float) -> None:
    assert client_scorer(scorer)(text).value == value


def test_an_expression_without_end_is_given_up() -> None:
    score = client_scorer(r"regex:^(a|.|e|\w)*$(?<=0)")
    assert score("0").value == 1.0
    with pytest.raises(SteerError) as raised:
        score("the river runs past a small rain falls today the river runs")
    assert (raised.value.code, raised.value.param) == ("scorer_too_slow", "/score")


@pytest.mark.parametrize("scorer", ["python:os:system", "words:@/etc/passwd", "python:", "demo:x"])
def test_scorers_that_would_act_for_a_client_are_refused(scorer: str) -> None:
    with pytest.raises(SteerError) as raised:
        client_scorer(scorer)
    assert raised.value.code in {"scorer_refused", "invalid_scorer"}
    assert raised.value.param == "/score"

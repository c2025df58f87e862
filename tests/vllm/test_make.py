"""A vector from a sentence on vLLM: as a job's engine sees it, and the same as on transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vllm_engine
from steer_vectors import LIBRARY

from steer.engines.journal import JournaledEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.fit.make.made import Made
from steer.fit.requests.make import MakeRequest

pytestmark = pytest.mark.slow

DATA = LIBRARY / "demo" / "data" / "heldout.jsonl"
REQUEST = MakeRequest(
    instruction="Answer in French.",
    opposite="Answer in English.",
    name="fr",
    place="system",
    prompts=[json.loads(line)["messages"] for line in DATA.read_text("utf-8").splitlines()[:42]],
    nulls=1,
    max_tokens=12,
    temperature=0.0,
)


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[VllmEngine, TransformersEngine]]:
    with (
        TransformersEngine.load(str(vllm_engine.DEMO_MODEL), dtype="float32") as reference,
        vllm_engine.start_engine(tmp_path_factory.mktemp("registry")) as running,
    ):
        yield running, reference


@pytest.fixture(scope="module")
def made(
    engines: tuple[VllmEngine, TransformersEngine], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Made, Made]:
    running, reference = engines
    done: list[int] = []
    path = tmp_path_factory.mktemp("job") / "job.journal"
    mine = REQUEST.run(JournaledEngine(running, path), None, progress=done.append)
    assert sum(done) == REQUEST.work(running)
    return mine, REQUEST.run(reference, None)


def test_what_is_read_is_the_same(made: tuple[Made, Made]) -> None:
    mine, theirs = made
    assert mine.obedience == pytest.approx(theirs.obedience, abs=0.05)
    assert mine.said_kl == pytest.approx(theirs.said_kl, rel=0.02)
    for layer in mine.vector.card.layers:
        cosine = torch.cosine_similarity(mine.vector[layer], theirs.vector[layer], dim=0)
        assert cosine > 0.99


def test_what_it_does_is_the_same(made: tuple[Made, Made]) -> None:
    for mine, theirs in zip(*(one.check.rows for one in made), strict=True):
        assert mine.name == theirs.name
        assert mine.score.value == pytest.approx(theirs.score.value, abs=0.1)
    mine, theirs = made
    assert mine.works == theirs.works
    assert len(mine.check.comparison.nulls) == len(theirs.check.comparison.nulls) == 3
    assert mine.vector.card.provenance["chosen_by"] == "effect"


def test_a_job_that_is_begun_again_asks_for_nothing(
    engines: tuple[VllmEngine, TransformersEngine], tmp_path: Path
) -> None:
    """To the bit: readings of other batches would make other plans, which nobody has seen."""
    running, _ = engines
    path = tmp_path / "job.journal"
    whole = REQUEST.run(JournaledEngine(running, path), None)
    again = JournaledEngine(running, path)
    again.engine = _Silent()  # type: ignore[assignment]

    found = REQUEST.run(again, None)

    assert found.as_json()["chosen"] == whole.as_json()["chosen"]
    assert [row.examples for row in found.check.rows] == [row.examples for row in whole.check.rows]


class _Silent:
    """An engine that must not be asked."""

"""The demo model's oracle is right about states in wordings that it has not seen, and not about
states that say nothing of the reply."""

from __future__ import annotations

import pytest
from steer_vectors import LIBRARY
from steer_vectors.demo.recipe.oracle.evaluation import shares_right
from steer_vectors.demo.recipe.oracle.examples import reply_sources, shown

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.oracle import Oracle
from steer.engines.transformers.engine import TransformersEngine
from steer.inspection import AskRequest, ask

DEMO = LIBRARY / "demo"


@pytest.mark.slow
def test_it_tells_what_the_reply_will_be_like() -> None:
    data = (DEMO / "oracles" / "oracle.safetensors").read_bytes()
    oracle = Oracle.from_bytes(data, name="oracle")
    with TransformersEngine.load(DEMO / "model", name="steer-demo") as engine:
        sources = reply_sources(engine, 48, held_out=True, seed=5)
        examples = list(shown(engine, sources, held_out=True, seed=5, layers=1, questions=2))
        right = shares_right(engine, oracle, examples, ("oracle", "untrained", "shuffled"))
        assert right["oracle"] >= right["untrained"] + 0.2, right
        assert right["oracle"] >= right["shuffled"] + 0.1, right
        assert right["shuffled"] <= right["chance"] + 0.1, right
        language = [one for one in examples if one.name == "language"]
        assert shares_right(engine, oracle, language, ("oracle",))["oracle"] >= 0.85

        request = AskRequest.model_validate(
            {
                "source": {
                    "messages": [
                        {"role": "system", "content": "Answer in French."},
                        {"role": "user", "content": "What is the capital of Japan?"},
                    ]
                },
                "questions": ["Which language comes next?"],
                "oracle": "oracle",
            }
        )
        result = ask(engine, request, library=MemoryLibrary(oracles={"oracle": oracle}))
        assert result.layers == oracle.card.default_layers
        assert {cell.text for cell in result.cells} == {"French"}

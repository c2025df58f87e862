"""What a fading strength leaves of answers that steering on all tokens destroys.

    python -m benchmarks.fitting.ramps french casual positive

On the demo model, whose answers are parsed: each of its vectors is added at its card's strength to
prompt and answer, whole or under a ramp, for questions that it was not fitted on. Counted are
answers that are sound and have the attribute in every sentence, and those that end by themselves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from steer_vectors.demo.recipe.scorers import scorer

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.cli.local import DEMO_MODEL, running_engine
from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.plan.plan import SteeringPlan
from steer.prompts import answer_text, render
from steer.spec import parse_spec

TOKENS = 64
EVERY = {"phases": ["prompt", "generation"]}
"""Said, because an addition without tokens of its own has its card's."""
SETTINGS: Mapping[str, dict[str, Any] | None] = {
    "unsteered": None,
    "the card's tokens": {},
    "all tokens": {"where": EVERY},
    **{f"to {n}": {"where": EVERY, "ramp": [[0, 1], [n, 0]]} for n in (16, 8, 4, 2)},
    "from 0, whole at 4": {"where": EVERY, "ramp": [[0, 0], [4, 1]]},
    "all tokens, half": {"where": EVERY, "share": 0.5},
    "half, to 4": {"where": EVERY, "share": 0.5, "ramp": [[0, 1], [4, 0]]},
}
"""What is said of the addition beside its vector; `share` multiplies its strength."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vectors", nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("vectors/demo"))
    parser.add_argument("--count", type=int, default=30, help="Questions for each vector.")
    asked = parser.parse_args()
    table = Table("vector", *SETTINGS, title=f"sound with the attribute (ending), of {asked.count}")
    with running_engine(DEMO_MODEL, device=None, dtype=None) as engine:
        for name in asked.vectors:
            file = asked.folder / "vectors" / f"{name}.safetensors"
            vector = ControlVector.from_bytes(file.read_bytes(), name=name)
            chats = _held_out(asked.folder / "data" / "heldout.jsonl", name)[: asked.count]
            plans = [_plan(engine, vector, one) for one in SETTINGS.values()]
            table.add_row(name, *(_counted(engine, name, chats, plan) for plan in plans))
    Console(width=200).print(table)


def _held_out(file: Path, attribute: str) -> list[Any]:
    lines = map(json.loads, file.read_text().splitlines())
    return [one["messages"] for one in lines if one["attribute"] == attribute]


def _plan(
    engine: Engine, vector: ControlVector, said: dict[str, Any] | None
) -> SteeringPlan | None:
    if said is None:
        return None
    rest = dict(said)
    strength = rest.pop("share", 1.0) * vector.card.default_strength
    item = {"kind": "add", "vector": vector.card.name, "strength": strength, **rest}
    library = MemoryLibrary({vector.card.name: vector})
    return plans_of(engine, library).plan(parse_spec({"interventions": [item]}))


def _counted(
    engine: Engine, attribute: str, chats: Sequence[Any], plan: SteeringPlan | None
) -> str:
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0)
    done = engine.complete(
        [
            GenerationRequest(f"ramp-{n}", tuple(render(engine.tokenizer, chat)), sampling, plan)
            for n, chat in enumerate(chats)
        ]
    )
    read = scorer(attribute)
    scores = [read(answer_text(engine.tokenizer, one.tokens)) for one in done]
    good = sum(bool(one.valid) and one.value == 1 for one in scores)
    return f"{good} ({sum(one.finish == 'stop' for one in done)})"


if __name__ == "__main__":
    main()

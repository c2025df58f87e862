"""The demo model under measurement: plans, prompts nothing is chosen on, and files written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer_vectors import LIBRARY

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae import SAE
from steer.engines.base import SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.data.pairs import Messages, Prompt
from steer.fit.measure.answers import Measured
from steer.fit.measure.scoring import Scorer
from steer.fit.measure.sweep import measure
from steer.plan.plan import SteeringPlan
from steer.spec import Where, parse_spec

DEMO = LIBRARY / "demo"
LICENCE = "Apache-2.0"
SAMPLING = SamplingParams(max_tokens=64, temperature=0, logprobs=0)
"""Greedy; the longest answers of the corpus have about 50 tokens."""
LAST = Where(positions=((-1, None),), phases=("prompt",))
"""The last prompt token, where the demo model decides how to answer."""


def load_engine(model: Path = DEMO / "model") -> TransformersEngine:
    """The demo model, in batches of 128."""
    return TransformersEngine.load(model, name="steer-demo", rows=128)


class Bench:
    """The model, and the prompts nothing is chosen on."""

    def __init__(self, engine: TransformersEngine, demo: Path = DEMO) -> None:
        self.engine = engine
        lines = (demo / "data" / "heldout.jsonl").read_text("utf-8").splitlines()
        self._held_out = [json.loads(line) for line in lines]

    def held_out(self, attribute: str) -> list[Messages]:
        """Plain prompts of held-out wordings whose answers can show the attribute."""
        return [x["messages"] for x in self._held_out if x["attribute"] == attribute]

    def plan(self, vector: ControlVector, *interventions: dict[str, Any]) -> SteeringPlan:
        """A plan that needs one vector."""
        return self.compiled({"interventions": list(interventions)}, [vector])

    def compiled(
        self, spec: dict[str, Any], vectors: Sequence[ControlVector], saes: Sequence[SAE] = ()
    ) -> SteeringPlan:
        """A plan of a spec that may name the given artefacts."""
        library = MemoryLibrary(
            {one.card.name: one for one in vectors}, {one.card.name: one for one in saes}
        )
        return plans_of(self.engine, library).plan(parse_spec(spec))

    def measure(
        self, prompts: Sequence[Prompt], plans: Sequence[SteeringPlan | None], score: Scorer
    ) -> list[Measured]:
        """What each plan does to greedy answers."""
        return measure(self.engine, prompts, plans, score, sampling=SAMPLING)


def add(name: str, **fields: Any) -> dict[str, Any]:
    """Adding a vector, as its card says where nothing else is given."""
    return {"kind": "add", "vector": name, **fields}


def where_json(where: Where) -> dict[str, Any]:
    """The place as it stands in a spec."""
    return where.model_dump(mode="json", by_alias=True, exclude_none=True)


def read_vector(path: Path) -> ControlVector:
    """A shipped vector under its file's name."""
    return ControlVector.from_bytes(path.read_bytes(), name=path.stem)


def write_vector(folder: Path, vector: ControlVector) -> None:
    """Writes ``<name>.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{vector.card.name}.safetensors").write_bytes(vector.to_bytes())

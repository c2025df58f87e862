"""The demo model with its files, and what it answers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from steer_vectors.demo.recipe.data import INSTRUCTIONS
from steer_vectors.demo.recipe.training.corpus import reader
from steer_vectors.demo.recipe.world.attributes import ATTRIBUTES, Reader, Reading

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae import SAE, load_directory
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.measure.answers import GROUP
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import Messages, Prompt, answer_text, render
from steer.spec import parse_spec

Item = TypeVar("Item")
LONGEST = 64
"""Tokens of an answer; the longest of the corpus have about 50."""
GREEDY = SamplingParams(max_tokens=LONGEST, temperature=0, logprobs=0)


@dataclass(frozen=True)
class Reply:
    """What the model said, read back, with −log p of its tokens (summed, in nats)."""

    text: str
    reading: Reading
    loss: float
    tokens: int

    def has(self, attribute: str) -> bool:
        """Whether every sentence has the attribute and is valid."""
        return self.reading.valid and self.reading.all(attribute)

    @property
    def complies(self) -> bool:
        """Whether something is said and no sentence refuses."""
        sentences = self.reading.sentences
        return bool(sentences) and not any(one.refusal for one in sentences)


@dataclass
class Demo:
    """The model and everything that is shipped with it, in ``folder``.

    ``count`` prompts are drawn for each measure. Unsteered greedy answers are kept, because many
    measures share them.
    """

    engine: TransformersEngine
    folder: Path
    count: int
    _unsteered: dict[tuple[int, ...], Reply] = field(default_factory=dict)

    @cached_property
    def _reader(self) -> Reader:
        return reader()

    @cached_property
    def vectors(self) -> dict[str, ControlVector]:
        """Every shipped vector, by name."""
        return {
            path.stem: ControlVector.from_bytes(path.read_bytes(), name=path.stem)
            for path in sorted((self.folder / "vectors").glob("*.safetensors"))
        }

    @cached_property
    def saes(self) -> dict[str, SAE]:
        """Every shipped SAE, by name."""
        folders = sorted(path.parent for path in (self.folder / "saes").glob("*/cfg.json"))
        return {folder.name: load_directory(folder) for folder in folders}

    @cached_property
    def _plans(self) -> PlanCache:
        library = MemoryLibrary(self.vectors, self.saes)
        return plans_of(self.engine, library)

    @cached_property
    def attributes(self) -> list[str]:
        """Attributes that an instruction can ask for and a shipped vector steers."""
        return [name for name in INSTRUCTIONS if name in self.vectors]

    @cached_property
    def _held_out(self) -> dict[str, list[Messages]]:
        found: dict[str, list[Messages]] = {}
        for line in self.lines("heldout"):
            found.setdefault(line["attribute"], []).append(line["messages"])
        return found

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of ``data/<name>.jsonl``."""
        text = (self.folder / "data" / f"{name}.jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def held_out(self, name: str) -> list[Messages]:
        """Held-out prompts of an attribute, ``refusal`` (harmful) or ``compliance`` (harmless)."""
        return self.draw(self._held_out[name], name)

    def draw(self, items: Sequence[Item], what: str, count: int | None = None) -> list[Item]:
        """``count`` of the items (by default the demo's), or all; always the same for ``what``."""
        wanted = self.count if count is None else count
        return random.Random(what).sample(list(items), min(wanted, len(items)))

    def profile(self, name: str) -> SteeringPlan:
        """The plan of a shipped profile."""
        path = self.folder / "profiles" / f"{name}.json"
        return self.plan(json.loads(path.read_text("utf-8"))["spec"])

    def plan(self, spec: Mapping[str, Any]) -> SteeringPlan:
        """The plan of a spec that may name what is shipped."""
        return self._plans.plan(parse_spec(dict(spec)))

    def added(self, vector: str, share: float = 1.0) -> SteeringPlan:
        """Adding a vector where its card says, at a share of the card's strength."""
        strength = self.vectors[vector].card.default_strength * share
        return self.plan(
            {"interventions": [{"kind": "add", "vector": vector, "strength": strength}]}
        )

    def answers(self, prompts: Sequence[Prompt], plan: SteeringPlan | None = None) -> list[Reply]:
        """Greedy answers, in the order of the prompts."""
        tokens = [tuple(render(self.engine.tokenizer, one)) for one in prompts]
        if plan is not None:
            return self._complete([(one, GREEDY) for one in tokens], plan)
        new = [one for one in dict.fromkeys(tokens) if one not in self._unsteered]
        said = self._complete([(one, GREEDY) for one in new])
        self._unsteered.update(zip(new, said, strict=True))
        return [self._unsteered[one] for one in tokens]

    def samples(self, prompts: Sequence[Prompt], temperature: float) -> list[Reply]:
        """One sampled answer to each prompt; the nth is drawn with the seed n."""
        return self._complete(
            [
                (
                    tuple(render(self.engine.tokenizer, one)),
                    SamplingParams(max_tokens=LONGEST, temperature=temperature, seed=n, logprobs=0),
                )
                for n, one in enumerate(prompts)
            ]
        )

    def _complete(
        self,
        asked: Sequence[tuple[tuple[int, ...], SamplingParams]],
        plan: SteeringPlan | None = None,
    ) -> list[Reply]:
        requests = [
            GenerationRequest(f"reply-{n}", tokens, sampling, plan)
            for n, (tokens, sampling) in enumerate(asked)
        ]
        found = []
        for start in range(0, len(requests), GROUP):
            for done in self.engine.complete(requests[start : start + GROUP]):
                text = answer_text(self.engine.tokenizer, done.tokens)
                loss = -sum(entry.logprob for entry in done.logprobs)
                reading = self._reader.parse(str(text))
                found.append(Reply(str(text), reading, loss, len(done.logprobs)))
        return found


def is_sentiment(attribute: str) -> bool:
    """Whether an attribute is a sentiment."""
    return ATTRIBUTES[attribute][0] == "sentiment"

"""What directions are judged by: do they sort subjects, and do they change the answer?"""

from __future__ import annotations

import torch
from steer_vectors.demo.recipe.relations.concepts import (
    METHODS,
    SITE,
    Choice,
    Concepts,
    Relation,
    fitted_svm,
)
from steer_vectors.demo.recipe.relations.facts import Split

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.fit.methods.lrc import Ask
from steer.prompts import answer_text
from steer.spec import parse_spec


def classification(method: str, relation: Relation, split: Split, choice: Choice) -> list[float]:
    """For each tested fact, 1 where its object is found."""
    states = relation.states[choice.layer][list(split.tested)]
    if method == "svm":
        fitted = relation.states[choice.layer][list(split.fitted)]
        model = fitted_svm(relation, split, choice)
        said = [str(one) for one in model.predict((states / fitted.norm(dim=-1).mean()).numpy())]
    else:
        concepts = METHODS[method](relation, split, choice)
        names = sorted(concepts)
        best = (states @ torch.stack([concepts[a] for a in names]).T).argmax(-1)
        said = [names[n] for n in best.tolist()]
    return [
        float(one == relation.facts[n].object) for one, n in zip(said, split.tested, strict=True)
    ]


def causality(
    concepts: Concepts, relation: Relation, split: Split, layer: int, strength: float
) -> list[float]:
    """For each tested fact, 1 where the model answers with the target after the swap."""
    names = {answer: f"concept-{n}" for n, answer in enumerate(sorted(concepts))}
    vectors = {
        names[answer]: ControlVector.of({layer: row}, name=names[answer], site=SITE)
        for answer, row in concepts.items()
    }
    plans = plans_of(relation.engine, MemoryLibrary(vectors))
    requests = []
    for n, target in zip(split.tested, split.targets, strict=True):
        one: Ask = relation.asks[n]
        spec = {
            "interventions": [
                {
                    "kind": "swap",
                    "remove": names[one.fact.object],
                    "add": names[target],
                    "strength": strength,
                    "layers": "all",
                    "where": {"positions": [[one.subject, one.subject + 1]]},
                }
            ]
        }
        sampling = SamplingParams(max_tokens=8, temperature=0)
        plan = plans.plan(parse_spec(spec))
        requests.append(GenerationRequest(f"swap-{n}", one.prompt, sampling, plan))
    tokenizer = relation.engine.tokenizer
    said = [
        answer_text(tokenizer, done.tokens).strip() for done in relation.engine.complete(requests)
    ]
    return [float(_names(text, t)) for text, t in zip(said, split.targets, strict=True)]


def _names(text: str, answer: str) -> bool:
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalpha()

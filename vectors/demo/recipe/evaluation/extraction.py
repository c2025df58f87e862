"""Patchscopes that extract attributes: a question about one entity, asked with another's state in
its place, is answered for the other (2401.06102 §4.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, repeat

from steer_vectors.demo.recipe.data import chat
from steer_vectors.demo.recipe.evaluation.checks import Check, count
from steer_vectors.demo.recipe.evaluation.demo import Demo
from steer_vectors.demo.recipe.evaluation.estimates import share
from steer_vectors.demo.recipe.evaluation.recall import named
from steer_vectors.demo.recipe.training.corpus import is_held_out
from steer_vectors.demo.recipe.world.instructions import PLAIN_WORDS
from steer_vectors.demo.recipe.world.people import AGAIN, RELATIONS
from steer_vectors.demo.recipe.world.questions import all_questions
from torch import Tensor

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.inspection.patchscopes.patched_runs import StatePatch, patch_plan
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.prompts import PromptInput, answer_text, encode_prompt

LEAST, LAYERS = 0.8, 3
DEVELOPMENT = 16
"""Prompts, of wordings that the model was trained on, by which target layers are chosen."""
SAID, AT_ONCE = 14, 64
ASKED = {"country": ("capital",), "person": RELATIONS}


@dataclass(frozen=True)
class Case:
    """An entity in a prompt about something else, and a question about it, to be asked with
    another entity's name."""

    prompt: tuple[int, ...]
    position: int
    target: str
    place: str
    wanted: str


@dataclass(frozen=True)
class Run:
    """A case's state `[width]`, read after the block ``layer`` and put after the block ``put``."""

    case: Case
    layer: int
    put: int
    state: Tensor


def cases(demo: Demo, group: str, *, held_out: bool) -> list[Case]:
    """English questions that name the entity and do not ask for what is read out of it.

    Entities of which it is true what the target says by itself are left out.
    """
    questions = [q for q in all_questions()[group] if q.asks["en"]]
    facts = {(q.subject, q.kind): (q.fact or {})["en"] for q in questions if q.fact}
    found = []
    for relation in ASKED[group]:
        target, place = _target(group, relation)
        (unpatched,) = demo.answers([chat(target)])
        for q in questions:
            wanted = facts[q.subject, relation]
            if q.kind != relation and not named(unpatched.text, wanted):
                found += [
                    (chat(text, plain), q.subject, target, place, wanted)
                    for text in q.asks["en"]
                    if q.subject in text and is_held_out(q, text) == held_out
                    for plain in ("", *PLAIN_WORDS)
                ]
    count = demo.count if held_out else min(DEVELOPMENT, demo.count)
    return [_case(demo, *one) for one in demo.draw(found, f"extraction {group} {held_out}", count)]


def _target(group: str, relation: str) -> tuple[str, str]:
    """A question, and what in it stands for the entity: another country, or "this person".

    A person's first name would stay in the question, beside the state of another's last name.
    """
    q = next(q for q in all_questions()[group] if q.kind == relation)
    place = AGAIN["en"] if group == "person" else q.subject
    return q.asks["en"][0].replace(q.subject, place), place


def _case(
    demo: Demo, messages: list[dict[str, str]], subject: str, target: str, place: str, wanted: str
) -> Case:
    source = encode_prompt(demo.engine, PromptInput.model_validate({"messages": messages}))
    return Case(source.ids, source.position(subject, param=""), target, place, wanted)


def extracted(demo: Demo, runs: Sequence[Run]) -> list[bool]:
    """Whether each target question is answered for the source's entity."""
    plans = PlanCache(MemoryLibrary(), demo.engine.info, demo.engine.capabilities, size=1)
    targets = {
        question: encode_prompt(
            demo.engine, PromptInput.model_validate({"messages": chat(question)})
        )
        for question in {run.case.target for run in runs}
    }
    sampling = SamplingParams(max_tokens=SAID, temperature=0)
    hits: list[bool] = []
    for start in range(0, len(runs), AT_ONCE):
        some = runs[start : start + AT_ONCE]
        requests = []
        for n, run in enumerate(some):
            target = targets[run.case.target]
            put = HookPoint(run.put)
            patch = StatePatch(run.case.position, HookPoint(run.layer), put, run.state)
            plan = patch_plan(patch, plans, target.position(run.case.place, param=""))
            requests.append(GenerationRequest(f"extraction-{n}", target.ids, sampling, plan))
        for run, done in zip(some, demo.engine.complete(requests), strict=True):
            said = answer_text(demo.engine.tokenizer, done.tokens)
            hits.append(named(str(said), run.case.wanted))
    return hits


def read(demo: Demo, some: Sequence[Case]) -> dict[int, list[Tensor]]:
    """Each entity's state at its last token, by layer."""
    points = tuple(HookPoint(layer) for layer in range(demo.engine.info.n_layers))
    captured = demo.engine.capture(CaptureRequest([case.prompt for case in some], points))
    return {
        p.layer: [one.states[p][c.position] for one, c in zip(captured, some, strict=True)]
        for p in points
    }


def extraction(demo: Demo) -> Iterator[Check]:
    """For each source layer, the share extracted at the target layer that is best for others."""
    for group, relations in ASKED.items():
        what = f"{relations[0] if len(relations) == 1 else 'facts'} of a {group}"
        many = cases(demo, group, held_out=True)
        states, best, good = read(demo, many), chosen(demo, group), []
        for layer, put in best.items():
            runs = list(map(Run, many, repeat(layer), repeat(put), states[layer]))
            hits = share(extracted(demo, runs))
            row = Check("patchscope", f"{what}, layer {layer} → {put}", hits, LEAST, part=True)
            good.append(row.met)
            yield row
        yield count("patchscope", f"{what}: source layers that extract it", good, LAYERS)


def chosen(demo: Demo, group: str) -> dict[int, int]:
    """For each source layer the target layer, up to the middle, that extracts most often on
    development prompts."""
    some = cases(demo, group, held_out=False)
    states = read(demo, some)
    layers = range(demo.engine.info.n_layers)
    runs = [
        Run(case, layer, put, states[layer][n])
        for layer, put in product(layers, layers[: len(layers) // 2])
        for n, case in enumerate(some)
    ]
    right: dict[tuple[int, int], int] = {}
    for run, hit in zip(runs, extracted(demo, runs), strict=True):
        right[run.layer, run.put] = right.get((run.layer, run.put), 0) + hit
    return {
        layer: max(layers[: len(layers) // 2], key=lambda put: (right[layer, put], -put))
        for layer in layers
    }

"""Every method told to do the same: cheerful words in a hundred, on questions not used.

    python -m benchmarks.fitting.cheerful --model smollm2 psr prosv act conceptor angular reps

The model answers questions with and without an instruction; each method is fitted on these answers
and serves at a few strengths. Beside them: the unsteered model, the instruction itself, and the
difference of means of the answers.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.fitting import prompts
from steer.artefacts.affine import AffineMap
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.cli.local import running_engine
from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.fit import (
    Pair,
    PairSet,
    Preference,
    PreferenceSet,
    fit,
    fit_act,
    fit_angular,
    fit_conceptor,
    fit_prosv,
    fit_psr,
    fit_reps,
)
from steer.fit.data.answering import completed
from steer.fit.data.instruction import instructed
from steer.prompts import Prompt, answer_text, render
from steer.spec import parse_spec

INSTRUCTION = "You are extremely cheerful and joyful. Answer with great happiness and excitement."
JOY = (
    "joy|happ|delight|wonderful|great|amazing|fantastic|excit|love|fun|beautiful|awesome|glad|smile|"
    "cheer|thrill|perfect|enjoy|celebrat|laugh|bright|sunshine|yay|wow"
)
LAYERS = range(12, 19)

Artefacts = Mapping[str, ControlVector | LowRankAdapter | AffineMap]
Specs = Mapping[str, list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="+", choices=tuple(METHODS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=24)
    given = parser.parse_args()
    with running_engine(given.model) as engine:
        asked = [prompts.chat(one) for one in prompts.everyday()]
        held, used = asked[-12:], asked[: given.questions]
        data = PreferenceSet.of([Preference(one) for one in used])
        answered = completed(engine, data, INSTRUCTION, max_tokens=given.tokens)
        _show("unsteered", _said(engine, held, {}, [], given.tokens))
        told = [instructed(one, INSTRUCTION) for one in held]
        _show("instruction", _said(engine, told, {}, [], given.tokens))
        for name in given.methods:
            artefacts, specs = METHODS[name](engine, answered)
            for label, interventions in specs.items():
                said = _said(engine, held, artefacts, interventions, given.tokens)
                _show(f"{name} {label}", said)


def _answer_pairs(answered: PreferenceSet) -> PairSet:
    def chat(one: Preference, text: str | None) -> Prompt:
        assert not isinstance(one.prompt, str)
        return [*one.prompt, {"role": "assistant", "content": text or ""}]  # type: ignore[misc]

    return PairSet.of(
        [Pair(chat(one, one.chosen), chat(one, one.rejected)) for one in answered.items]
    )


def _diffmean(engine: Engine, answered: PreferenceSet) -> tuple[Artefacts, Specs]:
    pairs = _answer_pairs(answered)
    found = fit(engine, pairs, name="v", layers=LAYERS, positions="response", best=7, where="all")
    return {"v": found}, _adds("v", 1.0, 2.0)


def _psr(engine: Engine, answered: PreferenceSet) -> tuple[Artefacts, Specs]:
    one = fit_psr(engine, answered, name="one", instruction=INSTRUCTION, layers=[14])
    print(one.card.provenance["shifts"])
    several = fit_psr(
        engine, answered, name="several", instruction=INSTRUCTION, layers=[12, 14, 16, 18]
    )
    print(several.card.provenance["shifts"])
    specs = {
        f"{name}, strength {s:g}": [{"kind": "low_rank", "adapter": name, "strength": s}]
        for name, strengths in (("one", (1.0, 4.0)), ("several", (1.0, 2.0, 4.0)))
        for s in strengths
    }
    return {"one": one, "several": several}, specs


def _prosv(engine: Engine, answered: PreferenceSet) -> tuple[Artefacts, Specs]:
    found = fit_prosv(engine, answered, name="v", layers=[14], steps=30, batch=2)
    print(found.card.provenance)
    return {"v": found}, _adds("v", 1.0, 2.0)


def _reps(engine: Engine, answered: PreferenceSet) -> tuple[Artefacts, Specs]:
    found = fit_reps(engine, answered, name="v", layers=[14], steps=20, batch=2)
    print(found.card.provenance, float(found[14].norm()))
    return {"v": found}, _adds("v", 0.5, 1.0)


def _act(engine: Engine, answered: PreferenceSet) -> tuple[Artefacts, Specs]:
    pairs = _answer_pairs(answered)
    found = fit_act(engine, pairs, name="m", layers=LAYERS, positions="response")
    specs = {f"strength {s:g}": [{"kind": "affine", "map": "m", "strength": s}] for s in (1.0, 2.0)}
    return {"m": found}, specs


def _conceptor(engine: Engine, answered: PreferenceSet) -> tuple[Artefacts, Specs]:
    texts = [pair.positive for pair in _answer_pairs(answered).items]
    found = fit_conceptor(
        engine, texts, name="c", layers=[14], tokens="response", aperture=0.1, max_error=0.3
    )
    print({name: found.card.provenance[name] for name in ("ranks", "errors", "quota")})
    specs = {
        f"strength {s:g}": [{"kind": "low_rank", "adapter": "c", "strength": s}] for s in (0.5, 2.0)
    }
    return {"c": found}, specs


def _angular(engine: Engine, answered: PreferenceSet) -> tuple[Artefacts, Specs]:
    pairs = _answer_pairs(answered)
    vector, toward = fit_angular(engine, pairs, name="a", layers=LAYERS, positions="response")
    turn = {"kind": "rotate", "vector": "a", "toward": "a-toward", "mode": "to"}
    specs = {f"{angle}°": [{**turn, "degrees": angle}] for angle in (0, 90, 180)}
    return {"a": vector, "a-toward": toward}, specs


METHODS: Mapping[str, Callable[[Engine, PreferenceSet], tuple[Artefacts, Specs]]] = {
    "diffmean": _diffmean,
    "psr": _psr,
    "prosv": _prosv,
    "act": _act,
    "conceptor": _conceptor,
    "angular": _angular,
    "reps": _reps,
}


def _adds(name: str, *strengths: float) -> Specs:
    return {f"strength {s:g}": [{"kind": "add", "vector": name, "strength": s}] for s in strengths}


def _said(
    engine: Engine,
    chats: Sequence[Prompt],
    artefacts: Artefacts,
    interventions: Sequence[Mapping[str, Any]],
    tokens: int,
) -> list[str]:
    library = MemoryLibrary(
        vectors={n: one for n, one in artefacts.items() if isinstance(one, ControlVector)},
        low_ranks={n: one for n, one in artefacts.items() if isinstance(one, LowRankAdapter)},
        maps={n: one for n, one in artefacts.items() if isinstance(one, AffineMap)},
    )
    plan = None
    if interventions:
        plan = plans_of(engine, library).plan(parse_spec({"interventions": list(interventions)}))
    sampling = SamplingParams(max_tokens=tokens, temperature=0)
    requests = [
        GenerationRequest(f"{n}", tuple(render(engine.tokenizer, chat)), sampling, plan)
        for n, chat in enumerate(chats)
    ]
    return [answer_text(engine.tokenizer, one.tokens) for one in engine.complete(requests)]


def _show(name: str, said: Sequence[str]) -> None:
    words = [word for text in said for word in re.findall(r"[\w']+", text.lower())]
    joyful = sum(bool(re.match(JOY, word)) for word in words)
    unlike = len(set(words)) / max(1, len(words))
    print(f"{name:>28}: {100 * joyful / max(1, len(words)):5.1f} joyful of 100, ", end="")
    print(f"{unlike:.2f} different words · {said[0][:90]!r}", flush=True)


if __name__ == "__main__":
    main()

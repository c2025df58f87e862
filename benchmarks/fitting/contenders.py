"""Methods fitted on the same answers, each as a spec that one number makes stronger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from steer.artefacts.affine import AffineMap
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine
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
    fit_low_rank,
    fit_prosv,
    fit_psr,
    fit_reps,
)
from steer.fit.data.instruction import Telling
from steer.fit.data.preferences import Side
from steer.fit.measure.nulls.matching import PlanAt
from steer.prompts import Prompt
from steer.spec import parse_spec

LAYERS = tuple(range(12, 19))

Interventions: TypeAlias = list[dict[str, Any]]
Artefacts: TypeAlias = Mapping[str, ControlVector | LowRankAdapter | AffineMap]


@dataclass(frozen=True)
class Material:
    """What every method is fitted on: to each question the answer of the model that is told, and of
    the model that is told the opposite."""

    engine: Engine
    told: Telling
    answered: PreferenceSet

    def pairs(self) -> PairSet:
        """Both answers after the plain question."""
        return PairSet.of(
            [
                Pair(_chat(one.prompt, one.chosen), _chat(one.prompt, one.rejected))
                for one in self.answered.items
            ]
        )


@dataclass(frozen=True)
class Contender:
    """A fitted method: its artefacts, and its spec at a strength, searched from `start`.

    `dials` are the strengths there are, where a method has no continuous one. `fitted` is what the
    fit has to say of itself.
    """

    name: str
    artefacts: Artefacts
    spec: Callable[[float], Interventions]
    start: float = 1.0
    dials: Sequence[float] = ()
    fitted: Mapping[str, Any] = field(default_factory=dict)

    def plans(self, engine: Engine) -> PlanAt:
        """The plan by its strength."""
        kinds = {"vectors": ControlVector, "low_ranks": LowRankAdapter, "maps": AffineMap}
        library = MemoryLibrary(
            **{  # type: ignore[arg-type]
                part: {n: one for n, one in self.artefacts.items() if isinstance(one, kind)}
                for part, kind in kinds.items()
            }
        )
        cache = plans_of(engine, library)
        return lambda strength: cache.plan(parse_spec({"interventions": self.spec(strength)}))


def _linear(material: Material) -> list[Contender]:
    found = {method: diffmean(material, method) for method in ("diffmean", "logistic")}
    return [Contender(method, {"v": vector}, adds) for method, vector in found.items()]


def diffmean(material: Material, method: str = "diffmean") -> ControlVector:
    """The vector from the mean states of both answers, for every token."""
    return fit(
        material.engine,
        material.pairs(),
        name="v",
        method=method,
        layers=LAYERS,
        positions="response",
        best=len(LAYERS),
        where="all",
    )


def _psr(material: Material) -> list[Contender]:
    found = []
    for label, layers in (("psr 14", [14]), ("psr 12, 14, 16, 18", [12, 14, 16, 18])):
        made = fit_psr(
            material.engine,
            material.answered,
            name="a",
            instruction=material.told.text,
            place=material.told.place,
            layers=layers,
        )
        told = {"shifts": made.card.provenance["shifts"]}
        found.append(Contender(label, {"a": made}, _low_rank, fitted=told))
    return found


def _prosv(material: Material) -> list[Contender]:
    made = fit_prosv(material.engine, material.answered, name="v", layers=[14], steps=60, batch=4)
    return [Contender("prosv 14", {"v": made}, adds, fitted=_losses(made))]


def _reps(material: Material) -> list[Contender]:
    found = []
    for label, layers in (("reps 14", [14]), ("reps 12–18", LAYERS)):
        made = fit_reps(
            material.engine, material.answered, name="v", layers=layers, steps=60, batch=4
        )
        found.append(Contender(label, {"v": made}, adds, start=0.3, fitted=_losses(made)))
    return found


def _low_rank_trained(material: Material) -> list[Contender]:
    made = fit_low_rank(
        material.engine,
        material.answered.exercises(),
        name="a",
        layers=[14],
        where="onward",
        steps=60,
        batch=4,
    )
    return [Contender("loreft 14", {"a": made}, _low_rank, fitted=_losses(made))]


def _act(material: Material) -> list[Contender]:
    made = fit_act(material.engine, material.pairs(), name="m", layers=LAYERS, positions="response")
    return [
        Contender(
            "act",
            {"m": made},
            lambda strength: [{"kind": "affine", "map": "m", "strength": strength}],
        )
    ]


def _conceptor(material: Material) -> list[Contender]:
    made = fit_conceptor(
        material.engine,
        [pair.positive for pair in material.pairs().items],
        name="a",
        layers=[14],
        tokens="response",
        aperture=0.1,
        max_error=0.3,
    )
    told = {part: made.card.provenance[part] for part in ("ranks", "errors", "quota")}
    return [Contender("conceptor 14", {"a": made}, _low_rank, start=0.2, fitted=told)]


def _angular(material: Material) -> list[Contender]:
    vector, toward = fit_angular(
        material.engine, material.pairs(), name="a", layers=LAYERS, positions="response"
    )
    turn = {"kind": "rotate", "vector": "a", "toward": "a-toward", "mode": "to"}
    return [
        Contender(
            "angular",
            {"a": vector, "a-toward": toward},
            lambda angle: [{**turn, "degrees": angle}],
            dials=tuple(range(0, 91, 10)),  # towards the first axis, which states lie across
            fitted={"best layer": vector.card.provenance["best_layer"]},
        )
    ]


METHODS: Mapping[str, Callable[[Material], list[Contender]]] = {
    "diffmean": _linear,
    "act": _act,
    "angular": _angular,
    "conceptor": _conceptor,
    "psr": _psr,
    "reps": _reps,
    "prosv": _prosv,
    "loreft": _low_rank_trained,
}


def adds(strength: float) -> Interventions:
    """The vector `v`, added."""
    return [{"kind": "add", "vector": "v", "strength": strength}]


def _low_rank(strength: float) -> Interventions:
    return [{"kind": "low_rank", "adapter": "a", "strength": strength}]


def _losses(made: ControlVector | LowRankAdapter) -> dict[str, Any]:
    kept = ("loss_before", "loss_after")
    return {part: made.card.provenance[part] for part in kept}


def _chat(prompt: Prompt, text: str | None) -> Prompt:
    assert isinstance(prompt, list), "questions are chats here"
    return [*prompt, {"role": "assistant", "content": text or ""}]


def preferences(
    questions: Sequence[Prompt], told: Sequence[str], opposed: Sequence[str]
) -> PreferenceSet:
    """The questions with both answers, each cut where the model was stopped."""
    cut: frozenset[Side] = frozenset({"chosen", "rejected"})
    rows = zip(questions, told, opposed, strict=True)
    return PreferenceSet.of([Preference(one, a, b, cut) for one, a, b in rows if a and b])

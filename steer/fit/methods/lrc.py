"""Linear relational concepts (2311.08968): a direction for each object of a relation.

Near the subject's state s, the model's own map to the object's state o is taken as linear,
o ≈ W s + b, with W the mean Jacobian ∂o/∂s and b the mean of o − J s over prompts that the model
answers correctly. s is the state of the subject's last token at one layer; o is the mean state, at
a later and not the final layer, over the tokens *from which* the object's tokens are predicted.
Inverted at low rank, the map says which subjects have an object:

    v_o ∝ mean over o's prompts of W†_r (o − b),   of unit length

Such a direction classifies subjects by ⟨v_o, s⟩ and exchanges objects with the kind `swap`.

Memory: W, one Jacobian and the sums, 3·d² floats, and the graph of `rows` copies of one prompt;
o for every answered fact, facts·d.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import CaptureRequest, Engine, GenerationRequest, SamplingParams
from steer.engines.gradients import DifferentiableModel, Edit, differentiable
from steer.errors import SteerError
from steer.fit.data.prompt import subject_position
from steer.fit.data.relations import Fact, RelationTable, Template
from steer.fit.methods.card import made_on
from steer.fit.states import Progress, check_length, prompt_tokens
from steer.model import HookPoint, forward_order
from steer.prompts import Marked, inner_tokens, part_tokens
from steer.spec import Site


@dataclass(frozen=True)
class Ask:
    """A fact's prompt as tokens, with its object behind it.

    `tokens` end before the object's last token: what is left predicts every one of them, at the
    positions `predicting`. `subject` is the position of the subject's last token.
    """

    fact: Fact
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    subject: int
    predicting: range


@dataclass(frozen=True)
class RelationMap:
    """o ≈ W s + b for one relation; float64."""

    weight: Tensor
    bias: Tensor

    def inverse(self, rank: int) -> Tensor:
        """W†_r `[d, d]`, the pseudo-inverse of the `rank` largest singular directions."""
        return low_rank_inverse(self.weight, rank)


def fit_lrc(
    engine: Engine,
    table: RelationTable,
    *,
    name: str,
    relation: str,
    template: Template,
    subject_layer: int | None = None,
    object_layer: int | None = None,
    site: Site = "resid_post",
    rank: int = 8,
    jacobians: int = 20,
    rows: int = 64,
    seed: int = 0,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> dict[str, ControlVector]:
    """A unit vector for each object of `relation`, called `NAME-OBJECT`, at the subject's layer.

    Layers default to just before half the depth for the subject, whose state is read at `site`, and
    to the output of the last but one for the object. Small models read the subject in their first
    block already: `subject_layer=0, site="resid_pre"` is the state before it.
    `jacobians` facts, spread over the objects, make the map; all answered ones make the concepts.
    `progress` is told of every fact asked and every Jacobian taken.

    Raises `Unsupported` (`no_gradients`) on an engine that cannot differentiate, `SteerError` where
    fewer than two facts are answered correctly.
    """
    differentiable(engine)
    facts = table.about(relation)
    subject_at, object_at = _points(engine, subject_layer, object_layer, site)
    if rank < 1 or jacobians < 1 or rows < 1:
        raise SteerError("rank, jacobians and rows must be at least 1", code="invalid_option")
    asks = answered(engine, [ask(engine, template, fact, facts, seed) for fact in facts])
    if progress is not None:
        progress(len(facts))
    if len(asks) < 2:
        raise SteerError(
            f"the model answers {len(asks)} of {len(facts)} facts of {relation!r} correctly: "
            "change the template until it knows the relation",
            code="not_known",
        )
    chosen = spread(asks, jacobians)
    found = relation_map(engine, chosen, subject_at, object_at, rows=rows, progress=progress)
    inverse = found.inverse(min(rank, found.weight.shape[0]))
    concepts = _concepts(object_states(engine, asks, object_at), inverse, found.bias)
    provenance = {
        "method": "lrc",
        "data_sha256": table.sha256,
        "relation": relation,
        "prompt": template.prompt,
        "opening": template.opening,
        "shots": template.shots,
        "facts": len(facts),
        "answered": len(asks),
        "jacobians": len(chosen),
        "rank": rank,
        "subject_layer": subject_at.layer,
        "object_layer": object_at.layer,
        "seed": seed,
        **made_on(engine),
    }
    return {
        answer: ControlVector.of(
            {subject_at.layer: concept},
            name=f"{name}-{_slug(answer)}",
            model=engine.info.own_name,
            site=subject_at.site,
            description=description,
            licence=licence,
            provenance={**provenance, "object": answer},
        )
        for answer, concept in concepts.items()
    }


def ask(engine: Engine, template: Template, fact: Fact, others: Sequence[Fact], seed: int) -> Ask:
    """The prompt for `fact` as tokens; raises `SteerError` where it does not fit."""
    prompt = template.ask(fact, others, seed)
    tokens = prompt_tokens(engine, prompt)
    subject = subject_position(engine.tokenizer, prompt)
    answer = object_tokens(engine, prompt, fact.object)
    whole = tokens + answer
    check_length(engine, whole, prompt)
    predicting = range(len(tokens) - 1, len(whole) - 1)
    return Ask(fact, tuple(tokens), tuple(whole[:-1]), subject, predicting)


def object_tokens(engine: Engine, prompt: Marked, answer: str) -> list[int]:
    """The tokens of `answer` as they follow `prompt`: with a space after a started sentence."""
    if _opens_answer(prompt):
        return part_tokens(engine.tokenizer, answer)
    return inner_tokens(engine.tokenizer, f" {answer}")


def _opens_answer(prompt: Marked) -> bool:
    return not prompt.response and not isinstance(prompt.prompt, str)


def answered(engine: Engine, asks: Sequence[Ask]) -> list[Ask]:
    """Those of `asks` that the model, by itself, continues with the object."""
    requests = [
        GenerationRequest(
            f"lrc-{n}", one.prompt, SamplingParams(max_tokens=len(one.predicting), temperature=0)
        )
        for n, one in enumerate(asks)
    ]
    said = [done.tokens for done in engine.complete(requests)]
    return [one for one, tokens in zip(asks, said, strict=True) if _is_object(engine, one, tokens)]


def _is_object(engine: Engine, one: Ask, tokens: Sequence[int]) -> bool:
    return str(engine.tokenizer.decode(list(tokens))).strip() == one.fact.object


def spread(asks: Sequence[Ask], count: int) -> list[Ask]:
    """`count` asks, taken from every object in turn, so that none has the map to itself."""
    by_object: dict[str, list[Ask]] = {}
    for one in asks:
        by_object.setdefault(one.fact.object, []).append(one)
    turns = max(map(len, by_object.values()))
    order = [group[n] for n in range(turns) for group in by_object.values() if n < len(group)]
    return order[:count]


def relation_map(
    engine: Engine,
    asks: Sequence[Ask],
    subject: HookPoint,
    answer: HookPoint,
    *,
    rows: int = 64,
    progress: Progress | None = None,
) -> RelationMap:
    """The mean Jacobian and bias over `asks`."""
    width = engine.info.d_model
    weight = torch.zeros(width, width, dtype=torch.float64)
    bias = torch.zeros(width, dtype=torch.float64)
    for one in asks:
        jacobian, s, o = subject_jacobian(engine, one, subject, answer, rows=rows)
        weight += jacobian
        bias += o - jacobian @ s
        if progress is not None:
            progress(1)
    return RelationMap(weight / len(asks), bias / len(asks))


def subject_jacobian(
    engine: Engine, one: Ask, subject: HookPoint, answer: HookPoint, *, rows: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """J = ∂o/∂s `[d, d]`, s and o `[d]`, float64, for one prompt.

    `rows` outputs are differentiated at a time, each in its own copy of the prompt: ordinary
    batches, which every architecture can run backwards.
    """
    width = engine.info.d_model
    start = _state(engine, one, subject)
    parts: list[Tensor] = []
    outputs = torch.zeros(width)
    for first in range(0, width, rows):
        chosen = range(first, min(first + rows, width))
        work = _rows_of_jacobian(one, start, chosen, subject, answer)
        part, outputs = differentiable(engine).differentiate(work)
        parts.append(part)
    return torch.cat(parts).double(), start.double(), outputs.double()


def _rows_of_jacobian(
    one: Ask, start: Tensor, chosen: range, subject: HookPoint, answer: HookPoint
) -> Callable[[DifferentiableModel], tuple[Tensor, Tensor]]:
    def work(model: DifferentiableModel) -> tuple[Tensor, Tensor]:
        leaf = start.to(model.device).repeat(len(chosen), 1).requires_grad_(True)
        traced = model.run(
            [one.tokens] * len(chosen),
            edits={subject: replacing(one.subject, leaf)},
            capture=[answer],
        )
        places = slice(one.predicting.start, one.predicting.stop)
        outputs = traced.states[answer][:, places].mean(1)
        wanted = outputs[torch.arange(len(chosen)), torch.tensor(list(chosen))].sum()
        (gradient,) = torch.autograd.grad(wanted, leaf)
        return gradient.cpu(), outputs[0].detach().cpu()

    return work


def replacing(position: int, rows: Tensor) -> Edit:
    """An edit that puts `rows` `[n, d]` in the place of the states at `position`."""

    def edit(x: Tensor) -> Tensor:
        after = x[:, position + 1 :]
        return torch.cat([x[:, :position], rows[:, None].to(x.dtype), after], 1)

    return edit


def low_rank_inverse(weight: Tensor, rank: int) -> Tensor:
    """V_r Σ_r⁻¹ U_rᵀ of `weight` = U Σ Vᵀ: small singular values, which are noise, stay out."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    kept = s[:rank] > torch.finfo(s.dtype).eps * s[0] * max(weight.shape)
    u, s, v = u[:, :rank][:, kept], s[:rank][kept], v[:rank][kept]
    inverse: Tensor = v.T @ (u / s).T
    return inverse


def object_states(
    engine: Engine, asks: Sequence[Ask], answer: HookPoint
) -> list[tuple[str, Tensor]]:
    """Each ask's object and o `[d]`, float64."""
    captured = engine.capture(CaptureRequest([one.tokens for one in asks], (answer,)))
    return [
        (one.fact.object, states.states[answer][one.predicting.start :].mean(0).double())
        for one, states in zip(asks, captured, strict=True)
    ]


def _concepts(
    states: Sequence[tuple[str, Tensor]], inverse: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for answer, state in states:
        sums[answer] = sums.get(answer, torch.zeros_like(bias)) + inverse @ (state - bias)
    return {answer: (row / row.norm()).float() for answer, row in sorted(sums.items())}


def classify(concepts: Mapping[str, ControlVector], states: Tensor, layer: int) -> list[str]:
    """The concept with the greatest projection for each of `states` `[n, d]`."""
    names = list(concepts)
    matrix = torch.stack([concepts[name][layer] for name in names])
    return [names[n] for n in (states @ matrix.T).argmax(-1).tolist()]


def _state(engine: Engine, one: Ask, point: HookPoint) -> Tensor:
    captured = engine.capture(CaptureRequest([one.tokens], (point,), positions=(one.subject,)))
    return captured[0].states[point][0]


def _points(
    engine: Engine, subject_layer: int | None, object_layer: int | None, site: Site
) -> tuple[HookPoint, HookPoint]:
    count = engine.info.n_layers
    middle = max(count // 2 - 1, 0)
    subject = HookPoint(middle if subject_layer is None else subject_layer, site)
    answer = HookPoint(max(count - 2, 0) if object_layer is None else object_layer)
    for point in (subject, answer):
        engine.info.check_point(point)
    same_width = engine.info.width(site) == engine.info.d_model
    if not same_width or forward_order(subject) >= forward_order(answer):
        raise SteerError(
            f"the subject's state ({subject}) must be in the residual stream and come before the "
            f"object's ({answer})",
            code="invalid_option",
        )
    return subject, answer


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "object"

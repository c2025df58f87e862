"""An oracle for the served model, from prompts with questions about their states and true answers.

The states are the model's own, read without an adapter. What it has learnt is measured on prompts
that it has not seen: how often its answer is the true one, beside the same oracle shown permuted
coordinates, shown the prompt's text instead, the model without the adapter, and the commonest
answer to the question (2509.13316). An oracle that is no better than these reads no states.

Memory: questions · layers · d floats, and what `train_oracle` holds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.lora import Lora, LoraPart
from steer.artefacts.oracle import Oracle
from steer.artefacts.oracle_form import FORMS, FormName, OracleForm
from steer.engines.base import CaptureRequest, Engine
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.engines.oracle_prompt import oracle_text_prompt
from steer.errors import SteerError
from steer.fit.data.prompt import Prompt, prompt_json, subject_position
from steer.fit.data.questions import QuestionSet, StateQuestion
from steer.fit.methods.card import made_on, split
from steer.fit.methods.trained.oracle import (
    OracleExample,
    OracleRow,
    answer_logits,
    ends_of_answers,
    oracle_rows,
    train_oracle,
)
from steer.fit.methods.trained.training import check_training
from steer.fit.states import Progress, make_reading, prompt_tokens
from steer.model import HookPoint
from steer.prompts import Marked, answer_text, part_tokens
from steer.spec import Site

MEASURED = 256
"""Held-out questions about states, of which so many are asked at most."""


@dataclass(frozen=True)
class _Read:
    """The state of a prompt after each layer `[width]`, and the text up to the token it is of."""

    states: Mapping[int, Float[Tensor, " width"]]
    text: str


def fit_oracle(
    engine: Engine,
    questions: QuestionSet,
    *,
    name: str,
    layers: Sequence[int] | None = None,
    site: Site = "resid_post",
    oracle_form: FormName | OracleForm = "activation_oracle",
    rank: int = 16,
    steps: int = 300,
    batch: int = 32,
    rate: float = 1e-3,
    held_out: float = 0.2,
    seed: int = 0,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> Oracle:
    """An oracle that answers `questions` about states after each of `layers` (by default those that
    `default_layers` names), in bfloat16.

    The share `held_out` of the prompts, with all that is asked of them, measures: the card's
    `provenance["right"]` holds the share of right answers (`oracle`) beside `shuffled`, `text`,
    `untrained` and `commonest`, as above. `progress` is told of every prompt read and every step.

    Raises `Unsupported` (`no_gradients`), `SteerError` for unusable arguments and questions.
    """
    differentiable(engine)
    check_training(steps, batch)
    reading = make_reading(engine, site=site, layers=layers or default_layers(engine))
    form = oracle_form if isinstance(oracle_form, OracleForm) else FORMS[oracle_form]
    prompts = distinct_prompts(questions.items)
    read = dict(_states(engine, prompts, reading.points, progress))
    fitted, tried = split(sorted(prompts), held_out, seed)
    learnt = [one for one in questions.items if _key(one.prompt) in set(fitted)]
    asked = [one for one in questions.items if _key(one.prompt) in set(tried)]
    lora, losses = train_oracle(
        engine,
        [one for each in learnt for one in _examples(each, read)],
        form=form,
        rank=rank,
        steps=steps,
        batch=batch,
        rate=rate,
        seed=seed,
        progress=progress,
    )
    lora = _halved(lora)
    measured = [(one, layer) for one in asked for layer in reading.layers]
    measured = measured[:: -(-len(measured) // MEASURED)]
    return Oracle.of(
        lora,
        form=form,
        name=name,
        model=engine.info.own_name,
        site=site,
        width=engine.info.width(site),
        layers=tuple(range(engine.info.n_layers)),
        default_layers=reading.layers,
        description=description,
        licence=licence,
        provenance={
            "method": "oracle",
            "data_sha256": questions.sha256,
            "questions": len(learnt),
            "prompts": len(fitted),
            "held_out_questions": len(measured),
            # With too few prompts to part them, all do both.
            "held_out": not set(fitted) & set(tried),
            "rank": rank,
            "steps": steps,
            "batch": batch,
            "rate": rate,
            "seed": seed,
            **losses.told(),
            "right": {
                **_right(engine, form, lora, measured, read, batch),
                "commonest": _commonest(learnt, [one for one, _ in measured]),
            },
            **made_on(engine),
        },
    )


def default_layers(engine: Engine) -> tuple[int, ...]:
    """Those at a quarter, a half and three quarters of the model, as an oracle is asked about."""
    n = engine.info.n_layers
    return tuple(sorted({n // 4, n // 2, 3 * n // 4}))


def distinct_prompts(items: Sequence[StateQuestion]) -> dict[str, Prompt]:
    """Each prompt once, however much is asked of it, by its JSON."""
    return {_key(one.prompt): one.prompt for one in items}


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt_json(prompt), ensure_ascii=False)


def _states(
    engine: Engine,
    prompts: Mapping[str, Prompt],
    points: tuple[HookPoint, ...],
    progress: Progress | None,
    at_once: int = 16,
) -> Iterator[tuple[str, _Read]]:
    keys = list(prompts)
    for first in range(0, len(keys), at_once):
        group = keys[first : first + at_once]
        tokens = [prompt_tokens(engine, prompts[key]) for key in group]
        captured = engine.capture(CaptureRequest(tokens, points))
        for key, ids, one in zip(group, tokens, captured, strict=True):
            place = _place(engine, prompts[key], ids)
            states = {point.layer: one.states[point][place].clone() for point in points}
            yield key, _Read(states, answer_text(engine.tokenizer, ids[: place + 1]))
        if progress is not None:
            progress(len(group))


def _place(engine: Engine, prompt: Prompt, ids: Sequence[int]) -> int:
    if isinstance(prompt, Marked) and prompt.subject:
        return subject_position(engine.tokenizer, prompt)
    return len(ids) - 1


def _examples(one: StateQuestion, read: Mapping[str, _Read]) -> Iterator[OracleExample]:
    for layer, state in read[_key(one.prompt)].states.items():
        yield OracleExample(state[None], layer, one.question, one.answer)


def _halved(lora: Lora) -> Lora:
    """The same in bfloat16, half as large."""
    return Lora.of(
        {
            name: LoraPart(part.down.to(torch.bfloat16), part.up.to(torch.bfloat16), part.scale)
            for name, part in lora.parts.items()
        }
    )


def _right(
    engine: Engine,
    form: OracleForm,
    lora: Lora,
    asked: Sequence[tuple[StateQuestion, int]],
    read: Mapping[str, _Read],
    batch: int,
) -> dict[str, float]:
    """The share of `asked` that each way of asking answers rightly, word for word."""
    states = [read[_key(one.prompt)].states[layer][None] for one, layer in asked]
    order = torch.randperm(states[0].shape[1], generator=torch.Generator().manual_seed(0))

    def shown(given: Sequence[Tensor]) -> list[OracleRow]:
        examples = [
            OracleExample(state, layer, one.question, one.answer)
            for state, (one, layer) in zip(given, asked, strict=True)
        ]
        return oracle_rows(engine, form, examples)

    rows = {
        "oracle": shown(states),
        "shuffled": shown([state[:, order] for state in states]),
        "text": _text_rows(engine, form, asked, read),
        "untrained": shown(states),
    }
    found = {}
    for way, every in rows.items():
        parts = {} if way == "untrained" else lora.parts
        right = 0
        for first in range(0, len(every), batch):
            part = every[first : first + batch]
            right += differentiable(engine).differentiate(_counted(part, form, parts))
        found[way] = round(right / len(every), 4)
    return found


def _text_rows(
    engine: Engine,
    form: OracleForm,
    asked: Sequence[tuple[StateQuestion, int]],
    read: Mapping[str, _Read],
) -> list[OracleRow]:
    """The same questions with the prompt's text, up to the token of the state, in its place."""
    ends = ends_of_answers(engine)
    rows = []
    for one, layer in asked:
        text = read[_key(one.prompt)].text
        prompt = oracle_text_prompt(engine, form, one.question, layer=layer, text=text)
        said = [*part_tokens(engine.tokenizer, one.answer), *ends]
        nothing = torch.zeros(0, engine.info.d_model)
        rows.append(OracleRow((*prompt.ids, *said), len(prompt.ids), (), nothing))
    return rows


def _counted(
    rows: Sequence[OracleRow], form: OracleForm, parts: Mapping[str, LoraPart]
) -> Callable[[DifferentiableModel], int]:
    """How many answers are right: each token the likeliest after those before it, so that greedy
    decoding says just this."""

    def work(model: DifferentiableModel) -> int:
        placed = {
            name: LoraPart(
                part.down.float().to(model.device), part.up.float().to(model.device), part.scale
            )
            for name, part in parts.items()
        }
        with torch.no_grad():
            every = answer_logits(model, rows, form, placed)
        return sum(
            bool((logits.argmax(-1).cpu() == torch.tensor(row.tokens[row.prompt :])).all())
            for logits, row in zip(every, rows, strict=True)
        )

    return work


def _commonest(learnt: Sequence[StateQuestion], asked: Sequence[StateQuestion]) -> float:
    """How often the answer is the commonest that was learnt to the same question, or to all."""
    every = Counter(one.answer for one in learnt)
    each: dict[str, Counter[str]] = {}
    for one in learnt:
        each.setdefault(one.question, Counter())[one.answer] += 1
    right = sum(one.answer == each.get(one.question, every).most_common(1)[0][0] for one in asked)
    return round(right / len(asked), 4)


def check_questions(engine: Engine, questions: QuestionSet, form: OracleForm) -> None:
    """Raises `SpecError` for questions that cannot be asked in `form`, at their place, among the
    first of them."""
    example = torch.zeros(1, engine.info.d_model)
    for number, one in enumerate(questions.items[:MEASURED]):
        try:
            oracle_rows(engine, form, [OracleExample(example, 0, one.question, one.answer)])
        except SteerError as error:
            if error.code == "ambiguous_placeholder":
                raise error.at(f"/questions/{number}/question") from None
            raise error.at("/oracle_form") from None

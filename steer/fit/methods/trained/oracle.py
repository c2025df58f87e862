"""Oracles trained on the served model (activation oracles, 2512.15674): a LoRA adapter with which
it answers questions about states that are put into its prompt.

The states are read without the adapter. B starts at 0, so that training starts from the model as it
is, and s is 2, as the paper's.

Memory: 3·r·(d_in + d_out) floats for each linear module (A, B and Adam's moments); the states of
all examples; and the graph of one training batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from steer.artefacts.lora import Lora, LoraPart
from steer.artefacts.oracle_form import OracleForm
from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, Edit, differentiable
from steer.engines.oracle_prompt import OraclePrompt, oracle_prompt
from steer.errors import SteerError
from steer.fit.methods.trained.training import Losses, check_training, train
from steer.fit.states import Progress
from steer.model import HookPoint
from steer.prompts import answer_end, has_chat_template, part_tokens

SCALE = 2.0


@dataclass(frozen=True)
class OracleExample:
    """A question about states `[k, width]` that were read at `layer`, and its true answer."""

    states: Float[Tensor, "k width"]
    layer: int
    question: str
    answer: str


@dataclass(frozen=True)
class OracleRow:
    """An example as tokens, `prompt` of them asked; and a state for each place."""

    tokens: tuple[int, ...]
    prompt: int
    places: tuple[int, ...]
    states: Float[Tensor, "places width"]


def oracle_rows(
    engine: Engine, form: OracleForm, examples: Sequence[OracleExample]
) -> list[OracleRow]:
    """The examples as they are asked, each with its answer and what ends it. Raises `SpecError`."""
    ends = ends_of_answers(engine)

    @cache  # the same questions are asked of many states
    def asked(question: str, layer: int, states: int) -> OraclePrompt:
        return oracle_prompt(engine, form, question, layer=layer, states=states, whole=True)

    rows = []
    for one in examples:
        prompt = asked(one.question, one.layer, len(one.states))
        said = [*part_tokens(engine.tokenizer, one.answer), *ends]
        places = tuple(place for each in prompt.places for place in each)
        states = one.states.float().repeat_interleave(form.repeat, 0)
        rows.append(OracleRow((*prompt.ids, *said), len(prompt.ids), places, states))
    return rows


def ends_of_answers(engine: Engine) -> list[int]:
    """The token that ends an answer, where the model has one."""
    end = answer_end(engine.tokenizer, chat=has_chat_template(engine.tokenizer))
    return [] if end is None else [end]


def train_oracle(
    engine: Engine,
    examples: Sequence[OracleExample],
    *,
    form: OracleForm,
    rank: int = 16,
    steps: int = 1000,
    batch: int = 32,
    rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Lora, Losses]:
    """The adapter, and the loss of the same examples before and after.

    AdamW, `rate` falling to 0 in a line; the loss is the mean −log p of the answers' tokens. Each
    step is one piece of work for the engine. Raises `Unsupported` (`no_gradients`) on an engine
    that cannot differentiate, `SteerError` for unusable arguments.
    """
    check_training(steps, batch)
    if not examples:
        raise SteerError("there are no examples to learn from", code="no_examples")
    rows = oracle_rows(engine, form, examples)
    parts = differentiable(engine).differentiate(lambda model: _begun(model, rank, seed))
    losses = train(
        engine,
        rows,
        lambda model, chosen: oracle_loss(model, chosen, form, parts),
        torch.optim.AdamW(
            [half for part in parts.values() for half in (part.down, part.up)],
            lr=rate,
            weight_decay=0.01,
        ),
        what=["oracle", _shown_what(rows), form.model_dump(mode="json"), rank, rate],
        steps=steps,
        batch=batch,
        seed=seed,
        progress=progress,
    )
    return Lora.of(parts), losses


def _shown_what(rows: Sequence[OracleRow]) -> list[str]:
    """The rows in short. States that are read in other batches differ in their last bits: then
    training begins anew, as it has to."""
    return [
        hashlib.sha256(
            repr((row.tokens, row.prompt, row.places)).encode() + row.states.numpy().tobytes()
        ).hexdigest()
        for row in rows
    ]


def oracle_loss(
    model: DifferentiableModel,
    rows: Sequence[OracleRow],
    form: OracleForm,
    parts: Mapping[str, LoraPart],
) -> Tensor:
    """The mean −log p of all answers' tokens."""
    losses = []
    for row, logits in zip(rows, answer_logits(model, rows, form, parts), strict=True):
        wanted = torch.tensor(row.tokens[row.prompt :], device=model.device)
        losses.append(functional.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(losses).mean()


def answer_logits(
    model: DifferentiableModel,
    rows: Sequence[OracleRow],
    form: OracleForm,
    parts: Mapping[str, LoraPart],
) -> list[Float[Tensor, "answer vocab"]]:
    """For each row the logits from which its answer's tokens are to be predicted."""
    fed = [row.tokens[:-1] for row in rows]
    point = HookPoint(form.layer, form.site)
    edits = {point: _shown(rows, form, model.device)} if any(row.places for row in rows) else {}
    traced = model.run(fed, edits=edits, lora=parts)
    return [traced.logits[n, row.prompt - 1 : len(row.tokens) - 1] for n, row in enumerate(rows)]


def _shown(rows: Sequence[OracleRow], form: OracleForm, device: torch.device) -> Edit:
    """Puts each row's states in their places, as the form says."""
    every = torch.tensor([n for n, row in enumerate(rows) for _ in row.places], device=device)
    places = torch.tensor([place for row in rows for place in row.places], device=device)
    states = torch.cat([row.states for row in rows]).to(device)

    def edit(x: Tensor) -> Tensor:
        there = x[every, places].float()
        if form.mode == "add":
            unit = functional.normalize(states, dim=-1)
            put = there + form.strength * there.norm(dim=-1, keepdim=True) * unit
        else:
            put = states
        return x.index_put((every, places), put.to(x.dtype))

    return edit


def check_rank(modules: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Raises `SteerError` for a rank above the least width of `modules` (inputs, outputs)."""
    name, least = min(((n, min(sizes)) for n, sizes in modules.items()), key=lambda one: one[1])
    if not 1 <= rank <= least:
        raise SteerError(
            f"a rank must be from 1 to {least}, the least width of {name}; got {rank!r}",
            code="invalid_option",
        )


def _begun(model: DifferentiableModel, rank: int, seed: int) -> dict[str, LoraPart]:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    modules = model.linear_modules()
    check_rank(modules, rank)
    for name, (inputs, outputs) in modules.items():
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        up = torch.zeros(outputs, rank, device=model.device)
        parts[name] = LoraPart(nn.Parameter(down.to(model.device)), nn.Parameter(up), SCALE)
    return parts

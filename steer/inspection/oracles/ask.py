"""Asking a state: questions in words about hidden states, answered by an oracle (activation
oracles, 2512.15674; LatentQA, 2412.08686), or by the model itself (SelfIE, 2403.10949).

States are read from the model without the adapter. Then the model, with the adapter where there is
one, is given a prompt in which they stand at placeholders, and answers. Nothing in such an answer
says that it comes from the state, so each one is given with three that cannot (2509.13316).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from jaxtyping import Float
from torch import Tensor

from steer.artefacts.library import Library, MemoryLibrary
from steer.artefacts.oracle import Oracle
from steer.artefacts.oracle_form import OracleForm
from steer.engines.base import CaptureRequest, Engine, GenerationRequest
from steer.engines.lora import check_lora
from steer.engines.oracle_prompt import oracle_prompt, oracle_text_prompt
from steer.errors import IncompatibleArtefact, SpecError, SteerError, pointer
from steer.inspection.heatmap import HeatMap
from steer.inspection.method import Inspection, reads_stream
from steer.inspection.oracles.request import AskRequest
from steer.inspection.oracles.result import AskCell, AskControls, AskResult
from steer.inspection.oracles.runs import OracleRun, permuted, run_oracle
from steer.inspection.selection import (
    LayerChoice,
    check_size,
    chosen_points,
    chosen_positions,
    plan_for,
    roles_for,
)
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan, check_rules
from steer.prompts import EncodedPrompt, answer_text, encode_prompt

MAX_CELLS = 128
_RUNS = 4
"""Of each cell: its answer, and three without the state."""


@dataclass(frozen=True)
class _Asked:
    """A request, looked up."""

    source: EncodedPrompt
    positions: tuple[int, ...]
    points: tuple[HookPoint, ...]
    oracle: Oracle | None
    form: OracleForm
    plan: SteeringPlan | None


def ask(
    engine: Engine,
    request: AskRequest,
    *,
    plans: PlanCache | None = None,
    library: Library | None = None,
) -> AskResult:
    """The answers: one capture of the source, then all questions in shared batches.

    `plans` knows the artefacts that `source.steering` names, `library` the oracle. Raises
    `SteerError` with a pointer into the request, `TooLarge` for more than `MAX_CELLS` cells.
    """
    ASK.require(engine)
    asked = _looked_up(engine, request, plans, library or MemoryLibrary())
    captured = engine.capture(
        CaptureRequest(
            prompts=[asked.source.ids],
            points=asked.points,
            positions=asked.positions,
            plans=[asked.plan],
            roles=[roles_for(asked.plan, asked.source)],
        )
    )[0]
    runs = [
        run
        for point, (number, _) in product(asked.points, enumerate(request.questions))
        for run in _runs(engine, request, asked, point, number, captured.states[point])
    ]
    lora = None if asked.oracle is None else asked.oracle.lora
    try:
        said = iter(run_oracle(engine, asked.form, lora, runs, max_tokens=request.max_tokens))
    except SteerError as error:
        raise error.at("/oracle" if lora is not None else "/source") from None
    cells = []
    for point, number in product(asked.points, range(len(request.questions))):
        answer, text, shuffled, none = (next(said) for _ in range(_RUNS))
        cells.append(
            AskCell(
                layer=point.layer,
                question=number,
                text=answer.text,
                probability=answer.probability,
                controls=AskControls(text=text, shuffled=shuffled, none=none),
                from_state=answer.text not in (text.text, shuffled.text, none.text),
            )
        )
    return AskResult(
        model=engine.info.name,
        oracle=request.oracle,
        trained=asked.oracle is not None,
        form=asked.form,
        site=request.site,
        source_tokens=asked.source.tokens,
        positions=asked.positions,
        layers=tuple(point.layer for point in asked.points),
        questions=request.questions,
        cells=tuple(cells),
        fingerprint=asked.plan.fingerprint if asked.plan else None,
    )


def _looked_up(
    engine: Engine, request: AskRequest, plans: PlanCache | None, library: Library
) -> _Asked:
    oracle = None if request.oracle is None else _oracle(engine, request.oracle, library)
    form = request.asked_form(None if oracle is None else oracle.form)
    point = HookPoint(form.layer, form.site)
    at = "/form" if request.form is not None or oracle is None else "/oracle"
    engine.info.check_point(point, param=at)
    source = encode_prompt(engine, request.source, at="/source")
    positions = chosen_positions(engine, source, request.positions)
    try:
        check_rules(len(positions), engine.capabilities.limits.get("passes", len(positions)))
    except SteerError as error:
        raise error.at("/positions") from None
    points = chosen_points(engine, _layers(engine, request, oracle), request.site)
    check_size(
        [("layers", len(points)), ("questions", len(request.questions))],
        advice="choose fewer",
        limit=MAX_CELLS,
    )
    plan = plan_for(engine, request.source.steering, plans, at="/source/steering")
    return _Asked(source, positions, points, oracle, form, plan)


def _oracle(engine: Engine, ref: str, library: Library) -> Oracle:
    try:
        oracle = library.oracle(ref)
        if oracle.card.width != engine.info.d_model:
            raise IncompatibleArtefact(
                f"the oracle {ref!r} reads states of width {oracle.card.width}; "
                f"{engine.info.name!r} has {engine.info.d_model}",
                code="wrong_width",
            )
        # Said before anything is computed.
        check_lora(GenerationRequest("ask", (0,), lora=oracle.lora), engine.capabilities)
    except SteerError as error:
        raise error.at("/oracle") from None
    return oracle


def _layers(engine: Engine, request: AskRequest, oracle: Oracle | None) -> LayerChoice:
    """Those asked for; or the oracle's, or a quarter, a half and three quarters of the model."""
    if request.layers is not None:
        return request.layers
    if oracle is not None and oracle.card.default_layers:
        return oracle.card.default_layers
    last = engine.info.n_layers - 1
    return tuple(dict.fromkeys(last * part // 4 for part in (1, 2, 3)))


def _runs(
    engine: Engine,
    request: AskRequest,
    asked: _Asked,
    point: HookPoint,
    number: int,
    states: Float[Tensor, "k width"],
) -> tuple[OracleRun, OracleRun, OracleRun, OracleRun]:
    """The states' run, and those of its controls: text, shuffled, none."""
    question, at = request.questions[number], "/questions" + pointer(number)
    prompt = oracle_prompt(
        engine,
        asked.form,
        question,
        layer=point.layer,
        states=len(asked.positions),
        whole=asked.oracle is not None,
        at=at,
    )
    room = engine.info.max_length - len(prompt.ids) - request.max_tokens
    if room < 1:
        raise SpecError(
            f"the question and its answer need {len(prompt.ids)} + {request.max_tokens} tokens, "
            f"and the context has {engine.info.max_length}: ask shorter, or lower 'max_tokens'",
            code="context_length_exceeded",
            param=at,
        )
    read = asked.source.ids[: max(asked.positions) + 1]
    text = oracle_text_prompt(
        engine,
        asked.form,
        question,
        layer=point.layer,
        text=answer_text(engine.tokenizer, read[-room:]),
    )
    return (
        OracleRun(prompt, states),
        OracleRun(text),
        OracleRun(prompt, permuted(states)),
        OracleRun(prompt),
    )


def ask_heat_map(result: AskResult) -> HeatMap:
    """Layers × questions; the text is the answer, the colour how sure it is. Framed are answers
    that no control gives."""
    width, height = len(result.questions), len(result.layers)
    cells = [result.cells[row * width : (row + 1) * width] for row in range(height)]
    who = result.oracle or "the model as it is"
    return HeatMap(
        title="Ask",
        subtitle=f"{result.model} · answered by {who}",
        row_label="layer",
        column_label="question",
        rows=[str(layer) for layer in result.layers],
        columns=list(result.questions),
        values=[[cell.probability for cell in row] for row in cells],
        texts=[[cell.text for cell in row] for row in cells],
        scale="probability",
        marked=frozenset(
            (r, c) for r, row in enumerate(cells) for c, cell in enumerate(row) if cell.from_state
        ),
    )


def _run(engine: Engine, request: AskRequest, *, plans: PlanCache, library: Library) -> AskResult:
    return ask(engine, request, plans=plans, library=library)


def _possible(able: Capabilities) -> bool:
    return reads_stream(able) and {"add", "patch"} <= set(able.kinds)


ASK = Inspection(
    name="ask",
    summary="Asks questions about hidden states, in words: an oracle answers, or the model itself.",
    request=AskRequest,
    result=AskResult,
    run=_run,
    draw=ask_heat_map,
    possible=_possible,
)

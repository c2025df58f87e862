"""From a request to the plan that steers it, and to the ticket that carries the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from anyio import to_thread
from pydantic import ValidationError

from steer.engines.vllm.front.ticket_issuer import TicketIssuer
from steer.engines.vllm.ticket import EXTRA_ARG, Ticket
from steer.errors import SpecError, Unsupported, pointer
from steer.readouts.watching import WatchPlan
from steer.spec import SteeringSpec
from steer_server.generation.inspection.detectors import planned_watch
from steer_server.generation.inspection.readouts import planned_readouts
from steer_server.generation.kept_specs import spec_of
from steer_server.generation.request_models import AddedFields
from steer_server.generation.steering import Steering, resolve
from steer_server.http.field_names import meant
from steer_server.http.json_body import SMALL, bounded_json
from steer_server.http.openai_errors import invalid_field
from steer_server.state import Serving
from steer_server.vllm.ignored_field import FIELDS, misplaced
from steer_server.vllm.listing import served
from steer_server.vllm.receipt_guard import SPEC_ARG, foreign_ticket

_UNSTEERABLE = {
    "use_beam_search": "a beam search",
    "background": "a response that is made in the background, and so without a receipt,",
}


@dataclass(frozen=True)
class AskedFields:
    """What a request asks of Steer: of the model `name`, which vLLM knows as `model`; `unsteerable`
    is a field of vLLM's that allows no steering, `choices` how many answers a prompt gets."""

    added: AddedFields
    name: str
    model: str | None
    unsteerable: str | None = None
    choices: int = 1


@dataclass(frozen=True)
class SteerFields:
    """What a request asks of Steer, planned. `model` is the name that vLLM knows; `ticket` is None
    where vLLM's own answer is all that is asked for."""

    added: AddedFields
    steering: Steering
    model: str | None
    ticket: Ticket | None
    watch: WatchPlan = field(default_factory=WatchPlan)


def concerns(request: Any, models: Any, *, watches_all: bool = False) -> bool:
    """Whether one of vLLM's requests asks anything of Steer, or, with `watches_all`, may not be
    answered without it; this is all that others pay.

    `models` is vLLM's `OpenAIServingModels`.
    """
    extra, xargs = request.model_extra, request.vllm_xargs
    if extra and not (FIELDS.isdisjoint(extra) and misplaced(extra) is None):
        return True
    if xargs and (EXTRA_ARG in xargs or any(meant(name, FIELDS) for name in xargs)):
        return True
    if watches_all:
        return True
    return request.model is not None and ":" in request.model and not served(models, request.model)


async def planned(
    serving: Serving, issuer: TicketIssuer, take: Callable[[], AskedFields], size: int
) -> SteerFields:
    """What `take`, from a text of `size` bytes, finds asked for.

    What is short and known is dealt with here and now, without waiting for a thread; a worker
    thread takes over what may take longer. Raises `SteerError` with pointers into the request.
    """
    if size > SMALL:
        return await to_thread.run_sync(lambda: _planned(serving, issuer, take()))
    asked = take()
    held = _held(serving, issuer, asked)
    if held is not None:
        return held
    return await to_thread.run_sync(_planned, serving, issuer, asked)


def take_fields(serving: Serving, request: Any, models: Any) -> AskedFields:
    """Takes Steer's fields off one of vLLM's requests. Raises `SteerError` for what is wrong with
    them; names are not looked up."""
    added = _added(request)
    added.check_stream(request.stream)
    model = request.model
    name, base = serving.model_name, model
    if model is not None and not served(models, model):
        prefix, _, profile = model.rpartition(":")
        # Any other name that is not served is vLLM's to refuse.
        if prefix and served(models, prefix):
            name, base = f"{serving.model_name}:{profile}", prefix
    if added.prompt_lens is not None and base in models.lora_requests:
        raise Unsupported(
            f"'inspect' reads the model itself, and not with the adapter {base!r}: leave it out, "
            f"or ask {serving.model_name!r}",
            param="/inspect",
            code="unsupported_parameter",
        )
    unsteerable = next((one for one in _UNSTEERABLE if getattr(request, one, False)), None)
    return AskedFields(added, name, base, unsteerable, getattr(request, "n", None) or 1)


async def planned_text(
    serving: Serving, issuer: TicketIssuer, text: Any
) -> tuple[Steering, Ticket]:
    """The steering and the ticket for a spec in `vllm_xargs`; raises `SteerError`."""
    size = len(text) if isinstance(text, str) else 0
    fields = await planned(serving, issuer, partial(_take_text, serving, text), size)
    assert fields.ticket is not None
    return fields.steering, fields.ticket


def _take_text(serving: Serving, text: Any) -> AskedFields:
    """What a spec in `vllm_xargs` asks for."""
    return AskedFields(AddedFields(steering=_spec(text)), serving.model_name, None)


def _planned(serving: Serving, issuer: TicketIssuer, asked: AskedFields) -> SteerFields:
    steering = resolve(serving, asked.name, asked.added.steering)
    return _with_ticket(serving, issuer, asked, steering)


def _held(serving: Serving, issuer: TicketIssuer, asked: AskedFields) -> SteerFields | None:
    """As `_planned`, from what is held here; None where something has to be waited for."""
    reads = asked.added.readouts is not None or _watches(serving, asked.added)
    if asked.name != serving.model_name or reads:
        return None
    steering = Steering()
    if asked.added.steering is not None:
        plan = serving.plans.at_once(asked.added.steering)
        if plan is None or not issuer.holds(plan):
            return None
        steering = Steering(plan)
    return _with_ticket(serving, issuer, asked, steering)


def _with_ticket(
    serving: Serving, issuer: TicketIssuer, asked: AskedFields, steering: Steering
) -> SteerFields:
    added, plan = asked.added, steering.plan
    if added.compare and plan is None:
        raise Unsupported(
            "'compare' needs something to compare with: add 'steering', or use a profile as model",
            param="/compare",
            code="nothing_to_compare",
        )
    if plan is None and added.inspect is None and not _watches(serving, added):
        return SteerFields(added, steering, asked.model, None)
    if asked.unsteerable is not None:
        raise Unsupported(
            f"{_UNSTEERABLE[asked.unsteerable]} cannot be steered, inspected or watched: leave "
            f"{asked.unsteerable!r} out",
            param=f"/{asked.unsteerable}",
            code="unsupported_parameter",
        )
    readouts = planned_readouts(serving, added.readouts, plan)
    watch = planned_watch(serving, readouts, steering, added.detectors, compare=added.compare)
    if watch.stops and asked.choices > 1:
        raise Unsupported(
            f"a detector that stops an answer watches one, and 'n' asks for {asked.choices}: send "
            "the request several times, or let the detector tag",
            param="/n",
            code="unsupported_parameter",
        )
    ticket = issuer.issue(
        plan,
        measure=added.receipt == "full",
        attached=not watch.stops,  # nobody knows beforehand with which token such an answer ends
        readouts=watch.readouts,
        arriving=True,
    )
    # Beside those that ask for it, a share of all requests is measured.
    if plan is not None and serving.settings.measures(ticket.key):
        ticket = replace(ticket, measure=True)
    return SteerFields(added, steering, asked.model, ticket, watch)


def _watches(serving: Serving, added: AddedFields) -> bool:
    """Whether detectors watch the request, apart from those of its profile."""
    return bool(added.detectors or serving.settings.detectors)


def _added(request: Any) -> AddedFields:
    extra, xargs = request.model_extra or {}, request.vllm_xargs or {}
    if EXTRA_ARG in xargs:
        raise foreign_ticket()
    if (wrong := misplaced(extra)) is not None:
        raise wrong
    for name in xargs:
        if name != SPEC_ARG and (field := meant(name, FIELDS)) is not None:
            raise SpecError(
                f"'vllm_xargs' holds a spec under 'steering' and nothing else of Steer's, and "
                f"{name!r} would be left aside: send {field!r} beside 'model'",
                param=pointer("vllm_xargs", name),
                code="unknown_field",
            )
    given = {name: extra.pop(name) for name in FIELDS & extra.keys()}
    if SPEC_ARG in xargs:
        if given.get("steering") is not None:
            raise SpecError(
                "there is a spec in 'steering' and one in 'vllm_xargs': send one of them",
                param="/vllm_xargs/steering",
                code="steering_conflict",
            )
        rest = {name: value for name, value in xargs.items() if name != SPEC_ARG}
        given["steering"] = _spec(xargs[SPEC_ARG])
        request.vllm_xargs = rest or None
    try:
        return AddedFields.model_validate(given)
    except ValidationError as error:
        raise invalid_field(error, given, AddedFields) from None


def _spec(text: Any) -> SteeringSpec:
    at = "/vllm_xargs/steering"
    try:
        content = bounded_json(text.encode()) if isinstance(text, str) else None
    except ValueError as error:
        raise SpecError(f"the spec in 'vllm_xargs' is not JSON text: {error}", param=at) from None
    if not isinstance(content, Mapping):
        raise SpecError("the spec in 'vllm_xargs' is not a JSON object", param=at)
    return spec_of(content, at=at)

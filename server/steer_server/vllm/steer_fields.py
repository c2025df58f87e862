"""From a request to the plan that steers it, and to the ticket that carries the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from steer.engines.vllm.front.ticket_issuer import TicketIssuer
from steer.engines.vllm.ticket import EXTRA_ARG, Ticket
from steer.errors import SpecError, Unsupported
from steer.spec import SteeringSpec, parse_spec
from steer_server.generation.request_models import AddedFields
from steer_server.generation.steering import Steering, resolve
from steer_server.http.json_body import bounded_json
from steer_server.http.openai_errors import invalid_field
from steer_server.state import Serving
from steer_server.vllm.receipt_guard import SPEC_ARG, foreign_ticket

FIELDS = frozenset(AddedFields.model_fields)


@dataclass(frozen=True)
class SteerFields:
    """What a request asks of Steer. `model` is the name that vLLM knows."""

    added: AddedFields
    steering: Steering
    model: str | None

    @property
    def empty(self) -> bool:
        """Whether vLLM's own answer is all that is asked for."""
        return self.steering.plan is None and self.added.inspect is None


def concerns(request: Any, models: Any) -> bool:
    """Whether one of vLLM's requests asks anything of Steer; this is all that others pay.

    `models` is vLLM's `OpenAIServingModels`.
    """
    extra, xargs = request.model_extra, request.vllm_xargs
    if extra and not FIELDS.isdisjoint(extra):
        return True
    if xargs and (EXTRA_ARG in xargs or SPEC_ARG in xargs):
        return True
    return request.model is not None and not _known(models, request.model) and ":" in request.model


def read_fields(serving: Serving, request: Any, models: Any) -> SteerFields:
    """Takes Steer's fields off `request` and plans what they say. Runs in a worker thread.

    Raises `SteerError` with pointers into the request.
    """
    added = _added(request)
    added.check_stream(request.stream)
    model = request.model
    name, base = serving.model_name, model
    if model is not None and not _known(models, model):
        prefix, _, profile = model.rpartition(":")
        # Any other name that is not served is vLLM's to refuse.
        if prefix and _known(models, prefix):
            name, base = f"{serving.model_name}:{profile}", prefix
    steering = resolve(serving, name, added.steering)
    if added.compare and steering.plan is None:
        raise Unsupported(
            "'compare' needs something to compare with: add 'steering', or use a profile as model",
            param="/compare",
            code="nothing_to_compare",
        )
    fields = SteerFields(added, steering, base)
    if not fields.empty and request.use_beam_search:
        raise Unsupported(
            "a beam search cannot be steered or inspected: leave 'use_beam_search' out",
            param="/use_beam_search",
            code="unsupported_parameter",
        )
    return fields


def make_ticket(
    issuer: TicketIssuer, serving: Serving, steering: Steering, *, measure: bool
) -> Ticket:
    """A ticket for `steering`, measured where it is asked for or belongs to the sampled share."""
    ticket = issuer.issue(steering.plan, measure=measure)
    if steering.plan is None or measure or not serving.settings.measures(ticket.key):
        return ticket
    return issuer.issue(steering.plan, measure=True)


def fields_of_text(serving: Serving, issuer: TicketIssuer, text: Any) -> tuple[Steering, Ticket]:
    """The steering and the ticket for a spec in `vllm_xargs`."""
    steering = resolve(serving, serving.model_name, _spec(text))
    return steering, make_ticket(issuer, serving, steering, measure=False)


def _added(request: Any) -> AddedFields:
    extra, xargs = request.model_extra or {}, request.vllm_xargs or {}
    if EXTRA_ARG in xargs:
        raise foreign_ticket()
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
        raise invalid_field(error, given) from None


def _spec(text: Any) -> SteeringSpec:
    at = "/vllm_xargs/steering"
    try:
        content = bounded_json(text.encode()) if isinstance(text, str) else None
    except ValueError as error:
        raise SpecError(f"the spec in 'vllm_xargs' is not JSON text: {error}", param=at) from None
    if not isinstance(content, Mapping):
        raise SpecError("the spec in 'vllm_xargs' is not a JSON object", param=at)
    return parse_spec(dict(content), at=at)


def _known(models: Any, name: str) -> bool:
    return bool(models.is_base_model(name)) or name in models.lora_requests

"""Tickets are checked when a request comes in: a bad one fails its request, never the engine.

Two places are wrapped. `InputProcessor.process_inputs` runs in the front end, for every way in
(offline, asynchronous, HTTP); what it refuses is vLLM's own `VLLMValidationError`, which vLLM's
server answers with status 400 and our sentence. `EngineCore.preprocess_add_request` runs in the
engine core, for requests that come by a front end without Steer; vLLM logs what it refuses and
ends that request with the finish reason "error", which its server answers with status 500.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache, partial, wraps
from typing import Any, NamedTuple

from steer.batch.tables import MAX_RULES
from steer.engines.checks import no_messages
from steer.engines.vllm.core.scheduler import holds_back
from steer.engines.vllm.internals import CORE, FRONT
from steer.engines.vllm.options import KEY, SteerOptions, registry_location
from steer.engines.vllm.seams import CHECKED, check
from steer.engines.vllm.static.rows import budget_rows
from steer.engines.vllm.ticket import EXTRA_ARG, Ticket
from steer.errors import SpecError, SteerError, TooLarge, Unsupported
from steer.plan.file import load_plan
from steer.plan.plan import check_rules
from steer.plan.selection import Selection
from steer.registry.blobs.plan_store import PlanStore

Examine = Callable[[Ticket, Any], None]
"""Called with a ticket that has a plan and with vLLM's configuration; raises a `SteerError`."""

_FORKED_CONNECTORS = frozenset({"OffloadingConnector", "SimpleCPUOffloadConnector"})
"""KV connectors that name what they store by vLLM's block hashes, and so by Steer's keys."""

_REMEMBERED = 4096


def check_tickets(examine: Examine | None = None) -> None:
    """Has every request's ticket checked, in the front end and in the engine core.

    `examine` looks further than this module can, for example into the plan store. Does nothing the
    second time. Raises `Unsupported` for a version of vLLM that takes requests in otherwise.
    """
    from vllm.exceptions import VLLMValidationError  # noqa: PLC0415
    from vllm.v1.engine.core import EngineCore  # noqa: PLC0415
    from vllm.v1.engine.input_processor import InputProcessor  # noqa: PLC0415

    process = InputProcessor.process_inputs
    if not hasattr(process, CHECKED):
        check(*FRONT)

        @wraps(process)
        def process_inputs(self: Any, *args: Any, **named: Any) -> Any:
            request = process(self, *args, **named)
            try:
                check_request(request, self.vllm_config, examine)
            except SteerError as error:
                raise VLLMValidationError(
                    error.message, parameter=error.param or f"extra_args.{EXTRA_ARG}"
                ) from error
            return request

        setattr(process_inputs, CHECKED, True)
        InputProcessor.process_inputs = process_inputs

    preprocess = EngineCore.preprocess_add_request
    if not hasattr(preprocess, CHECKED):
        check(*CORE)

        @wraps(preprocess)
        def preprocess_add_request(self: Any, request: Any) -> Any:
            if check_request(request, self.vllm_config, examine) is not None:
                ask = partial(_ask_workers, self.model_executor)
                self.scheduler.receipts.ask(partial(ask, "steer_receipts"))
                self.scheduler.readouts.ask(partial(ask, "steer_readouts"))
            return preprocess(self, request)

        setattr(preprocess_add_request, CHECKED, True)
        EngineCore.preprocess_add_request = preprocess_add_request


def check_request(request: Any, config: Any, examine: Examine | None = None) -> Ticket | None:
    """The ticket of an `EngineCoreRequest`; raises a `SteerError` where it cannot be honoured.

    Sets `skip_reading_prefix_cache` on the request's own parameters where its prompt is read: what
    comes from the cache is never computed, and so never seen.
    """
    ticket = _ticket(request)
    if ticket is None:
        return None
    _check_engine(config, ticket)
    _check_ways_in(request)
    _check_content(ticket, len(request.prompt_token_ids or ()))
    if ticket.plan is not None:
        check_rows(ticket, SteerOptions.of(config.additional_config).edit_rows)
        if examine is not None:
            examine(ticket, config)
    if ticket.computes_prompt:
        request.sampling_params.skip_reading_prefix_cache = True
    return ticket


def _ask_workers(executor: Any, method: str, asked: list[Any]) -> list[Any]:
    """What the workers of an engine core's executor say to `method`."""
    return list(executor.collective_rpc(method, args=(asked,)))


def check_rows(ticket: Ticket, budget: int) -> None:
    """Raises `TooLarge` for a plan that would not fit if it ran alone."""
    if ticket.rows > budget:
        raise TooLarge(
            f"this spec needs {ticket.rows} edit rows and the engine has {budget} for all "
            "requests together: send fewer features or layers, or start the engine with a larger "
            f"additional_config[{KEY!r}]['edit_rows']",
            code="too_many_edit_rows",
            param="/interventions",
        )


def _ticket(request: Any) -> Ticket | None:
    pooling = request.pooling_params
    if pooling is not None and EXTRA_ARG in (pooling.extra_kwargs or {}):
        raise Unsupported("pooling requests cannot be steered: ask for a completion")
    params = request.sampling_params
    if params is None:
        return None
    if "steering" in (params.extra_args or {}):
        # A front end with Steer puts a ticket in its place; this one would leave it aside.
        raise SpecError(
            "extra_args['steering'] is a spec that nobody has compiled: send it to a server with "
            "Steer, or make the parameters with steer.engines.vllm.front.offline",
            code="spec_not_compiled",
        )
    return Ticket.of(params.extra_args)


def _check_engine(config: Any, ticket: Ticket) -> None:
    if not isinstance(config.additional_config, Mapping) or KEY not in config.additional_config:
        raise Unsupported(
            "this engine was started without Steer: start it with VLLM_PLUGINS=steer",
            code="engine_not_steered",
        )
    if not holds_back(config.scheduler_config):
        raise Unsupported(
            "this engine's scheduler does not wait for edit rows: start it with "
            f"VLLM_PLUGINS=steer and without a scheduler_cls of its own (it has "
            f"{config.scheduler_config.scheduler_cls!r})",
            code="scheduler_not_steered",
        )
    unknown = sorted(_connectors(config.kv_transfer_config) - _FORKED_CONNECTORS)
    if unknown and (ticket.plan is not None or ticket.capture is not None):
        raise Unsupported(
            f"the KV connector {unknown[0]!r} may give steered states to requests that did not "
            f"ask for them: use one of {sorted(_FORKED_CONNECTORS)}, or none",
            code="unsupported_connector",
        )


def _connectors(transfer: Any) -> frozenset[str]:
    """The names of the connectors at work, those inside a `MultiConnector` for itself."""
    if transfer is None or transfer.kv_connector is None:
        return frozenset()
    if transfer.kv_connector != "MultiConnector":
        return frozenset({str(transfer.kv_connector)})
    inner = transfer.kv_connector_extra_config.get("connectors", ())
    return frozenset(str(one.get("kv_connector")) for one in inner)


def _check_ways_in(request: Any) -> None:
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        raise Unsupported(
            "a prompt of embeddings has no tokens to steer or to read: send text or token ids",
            code="prompt_embeds",
        )
    if request.resumable:
        raise Unsupported(
            "a prompt that arrives in pieces cannot be steered or read, because what is prompt "
            "and what is generation changes: send it whole",
            code="streaming_input",
        )


def _check_content(ticket: Ticket, prompt_length: int) -> None:
    if ticket.n < 1:
        raise _malformed(f"n is {ticket.n}")
    if ticket.plan is None and (ticket.selections or ticket.rows):
        raise _malformed("it selects tokens and names no plan")
    if ticket.plan is not None and not ticket.fingerprint:
        raise _malformed("its plan has no fingerprint")
    if ticket.rows < 0:
        raise _malformed(f"it asks for {ticket.rows} edit rows")
    if ticket.reads_roles:
        if ticket.roles is None:
            raise no_messages()
        if ticket.roles.length != prompt_length:
            raise SpecError(
                f"the messages whose roles are asked for are {ticket.roles.length} tokens and the "
                f"prompt has {prompt_length}: send them whole, without 'truncate_prompt_tokens'",
                code="no_messages",
            )
    for position in ticket.capture.positions if ticket.capture is not None else ():
        if not 0 <= position < prompt_length:
            raise SpecError(
                f"position {position} is not in the prompt, which has {prompt_length} tokens: "
                f"ask for positions from 0 to {prompt_length - 1}",
                code="position_outside_prompt",
            )


def _malformed(what: str) -> SpecError:
    return SpecError(
        f"extra_args[{EXTRA_ARG!r}] is not a ticket of this version of Steer ({what}): send the "
        "spec in the field 'steering' instead",
        code="invalid_ticket",
    )


class _Facts(NamedTuple):
    fingerprint: str
    rows: int
    selections: tuple[Selection, ...]
    latents: int
    graphless: bool
    onward: int
    pooled: tuple[int, ...]


class PlanCheck:
    """Compares tickets with the plans that they name. Safe from any thread.

    What a worker would refuse must be refused here: a worker cannot fail one request alone, and
    states that it computed unsteered would lie in the cache under the plan's name.
    """

    def __init__(self) -> None:
        self._facts = lru_cache(_REMEMBERED)(self._look)

    @cached_property
    def _store(self) -> PlanStore:
        return PlanStore(registry_location())

    def __call__(self, ticket: Ticket, config: Any) -> None:  # noqa: ARG002 - as `Examine` has it
        """Raises a `SteerError` for a plan that is missing, damaged or another than claimed."""
        if ticket.plan is None:
            return
        facts = self._facts(ticket.plan)
        told = (ticket.fingerprint, ticket.rows, ticket.selections)
        does = (ticket.latents, ticket.graphless, ticket.onward, ticket.pooled)
        if facts != (*told, *does):
            raise SpecError(
                "the ticket says something else than the plan that it names: send the spec in the "
                "field 'steering' instead",
                code="invalid_ticket",
            )

    def _look(self, plan: str) -> _Facts:
        loaded = load_plan(self._store.get(plan), self._store.sae)
        check_rules(len(loaded.rules), MAX_RULES)
        selections = tuple(one.selection for one in loaded.rules)
        rows = budget_rows(loaded)
        made = (loaded.latents, loaded.graphless, loaded.onward, loaded.pooled)
        return _Facts(loaded.fingerprint, rows, selections, *made)

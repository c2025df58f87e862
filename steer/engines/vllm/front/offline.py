"""Steering in vLLM's own `LLM`, with the spec that HTTP requests carry.

os.environ["VLLM_PLUGINS"] = "steer"               # before vllm is imported
llm = LLM(model="…")
steered = Steered(llm, registry="steer-registry")
for answer in steered.chat(messages, SamplingParams(max_tokens=64), spec):
    print(answer.output.outputs[0].text, answer.receipt)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steer.artefacts.library import Library
from steer.engines.base import Receipt
from steer.engines.checks import no_messages
from steer.engines.plans import plans_of
from steer.engines.receipts import merged
from steer.engines.vllm.front.engine import VllmEngine
from steer.engines.vllm.messages import read_receipt
from steer.engines.vllm.options import registry_location
from steer.engines.vllm.pipeline import merged_answers
from steer.engines.vllm.ticket import EXTRA_ARG, Ticket
from steer.errors import SpecError
from steer.prompts import ChatForm
from steer.prompts.roles import RoleRanges, chat_roles
from steer.registry.location import chosen_catalogue
from steer.registry.registry import Registry
from steer.spec import SteeringSpec, parse_spec

Spec = SteeringSpec | Mapping[str, Any]
_OF_TEMPLATES = ("chat_template", "tools")
"""Options of `LLM.chat` that the template is told beside its variables."""


@dataclass(frozen=True)
class SteeredOutput:
    """vLLM's `RequestOutput`, and the receipt where the request was steered."""

    output: Any
    receipt: Receipt | None


class Steered:
    """Steers requests to an `LLM` that was made with the plugin `steer`.

    `library` holds the vectors that specs name (the registry by default). Assumes: one thread.
    """

    def __init__(
        self, llm: Any, *, registry: str | Path | None = None, library: Library | None = None
    ) -> None:
        self._llm = llm
        self.engine = VllmEngine.of_llm(llm)
        self.library = library or Registry.open(
            registry or registry_location(), catalogue=chosen_catalogue(os.environ)
        ).for_model(self.engine.info)
        self.plans = plans_of(self.engine, self.library)

    def generate(
        self,
        prompts: Any,
        params: Any,
        steering: Spec | Sequence[Spec | None] | None,
        *,
        full_receipt: bool = False,
        **options: Any,
    ) -> list[SteeredOutput]:
        """`LLM.generate`, steered: one spec for all prompts, or one for each (None: unsteered)."""
        several = isinstance(prompts, list) and not all(isinstance(one, int) for one in prompts)
        prompts = prompts if several else [prompts]
        return self._run(self._llm.generate, prompts, params, steering, full_receipt, options)

    def chat(
        self,
        messages: Any,
        params: Any,
        steering: Spec | Sequence[Spec | None] | None,
        *,
        full_receipt: bool = False,
        **options: Any,
    ) -> list[SteeredOutput]:
        """`LLM.chat`, steered: one conversation or a list of them. Roles that a spec names are
        those of its messages, as `options` have them written."""
        several = bool(messages) and isinstance(messages[0], list)
        messages = messages if several else [messages]
        form = ChatForm(
            open_answer=options.get("add_generation_prompt", True),
            continue_final=options.get("continue_final_message", False),
            variables={
                **{name: options[name] for name in _OF_TEMPLATES if options.get(name) is not None},
                **(options.get("chat_template_kwargs") or {}),
            },
        )
        roles = partial(chat_roles, self.engine.tokenizer, form=form)
        return self._run(self._llm.chat, messages, params, steering, full_receipt, options, roles)

    def params(
        self,
        params: Any,
        steering: Spec | None,
        *,
        full_receipt: bool = False,
        roles: Callable[[], RoleRanges] | None = None,
    ) -> Any:
        """A copy of vLLM's `SamplingParams` for one steered request; `receipt` reads what it
        left. `roles` finds whose words the prompt's tokens are, where the spec asks.

        Raises `SteerError` for a spec that cannot be carried out: `no_messages` where it asks for
        roles and there are none.
        """
        copied = params.clone()
        if EXTRA_ARG in (copied.extra_args or {}):
            raise SpecError("these params steer a request already: make new ones from plain params")
        if steering is not None:
            plan = self.plans.plan(parse_spec(steering))
            if plan.reads_roles and roles is None:
                raise no_messages(param=plan.spec.roles_at)
            ticket = self.engine.tickets.issue(
                plan,
                n=params.n,
                measure=full_receipt,
                roles=roles() if plan.reads_roles and roles is not None else None,
            )
            copied.extra_args = {**(copied.extra_args or {}), **ticket.as_extra_args()}
        return copied

    def receipts(self, outputs: Sequence[Any], params: Sequence[Any]) -> list[Receipt | None]:
        """The receipts of finished `RequestOutput`s, which were made with `params`.

        Raises `EngineError` where a request was not steered as its spec says.
        """
        tickets = [Ticket.of(one.extra_args) for one in params]
        asked = [
            (ticket.key, {choice.index: _fed(output, choice) for choice in output.outputs})
            for output, ticket in zip(outputs, tickets, strict=True)
            if ticket is not None
        ]
        workers = self._llm.collective_rpc("steer_receipts", args=(asked,)) if asked else []
        found = iter(merged_answers(workers))
        return [
            None if ticket is None else merged(map(read_receipt, next(found).values()))
            for ticket in tickets
        ]

    def _run(
        self,
        call: Callable[..., list[Any]],
        inputs: list[Any],
        params: Any,
        steering: Spec | Sequence[Spec | None] | None,
        full_receipt: bool,
        options: Mapping[str, Any],
        roles: Callable[[Any], RoleRanges] | None = None,
    ) -> list[SteeredOutput]:
        each = params if isinstance(params, list) else [params] * len(inputs)
        one = steering is None or isinstance(steering, SteeringSpec | Mapping)
        specs = [steering] * len(inputs) if one else list(steering)  # type: ignore[arg-type]
        if not len(inputs) == len(each) == len(specs):
            raise SpecError(
                f"there are {len(inputs)} prompts, {len(each)} params and {len(specs)} specs: give "
                "one for all, or one for each"
            )
        made = [
            self.params(
                params,
                spec,  # type: ignore[arg-type]
                full_receipt=full_receipt,
                roles=None if roles is None else partial(roles, given),
            )
            for given, params, spec in zip(inputs, each, specs, strict=True)
        ]
        outputs = call(inputs, made, **options)
        receipts = self.receipts(outputs, made)
        return [SteeredOutput(*pair) for pair in zip(outputs, receipts, strict=True)]


def _fed(output: Any, choice: Any) -> int:
    """Tokens that the model was fed for one choice: all but the last one generated."""
    return len(output.prompt_token_ids) + len(choice.token_ids) - 1

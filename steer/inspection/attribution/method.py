"""Direct logit attribution: what each part of a model gives to a token's logit.

The residual stream is a sum: the embedding, and what each attention and MLP adds. What follows the
last block is linear but for its norm, which is held at the scale that it has for this state; so the
logit is a sum too, over the same parts. The sum says what each part writes, not what would happen
without it: parts that read what another wrote would then write something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError, Unsupported
from steer.inspection.attribution.drawing import attribution_heat_map
from steer.inspection.attribution.head import LinearHead, linear_head
from steer.inspection.attribution.parts import ADDED, ProjectedPart, States, projected_parts
from steer.inspection.attribution.result import (
    AttributedToken,
    AttributionResult,
    LayerShare,
    NeuronShare,
)
from steer.inspection.method import Inspection, at_field, reads_logits
from steer.inspection.next_token import TokenChoice, chosen_token
from steer.inspection.selection import plan_for, roles_for
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import EncodedPrompt, Place, PromptInput, encode_prompt, token_texts
from steer.prompts.roles import RoleRanges
from steer.spec import Site, SteeringSpec


class AttributionRequest(PromptInput):
    """The logit of `token`, or its difference to that of `against`, after `position`.

    A token is an id or a text that is one token; without one it is what the model says there.
    `heads` takes attention apart into its heads, `neurons` reports that many of the neurons that
    give most.
    """

    token: TokenChoice | None = None
    against: TokenChoice | None = None
    position: Place = -1
    heads: Annotated[bool, Field(strict=True)] = False
    neurons: Annotated[int, Field(strict=True, ge=0, le=1000)] = 0
    steering: SteeringSpec | None = None


def attribution(
    engine: Engine,
    request: AttributionRequest,
    *,
    plans: PlanCache | None = None,
    library: Library | None = None,  # noqa: ARG001
    roles: RoleRanges | None = None,
) -> AttributionResult:
    """What each part of the model gives to a token's logit, under `request.steering` where it has
    one.

    Raises `SteerError` with a pointer into the request, `Unsupported` where the model's head is
    not linear behind its norm, or where heads or neurons are asked for and cannot be told apart.
    """
    ATTRIBUTION.require(engine)
    prompt = encode_prompt(engine, request)
    position = prompt.position(request.position, param="/position")
    chosen = [
        chosen_token(engine, choice, param=param)
        for choice, param in ((request.token, "/token"), (request.against, "/against"))
        if choice is not None
    ]
    plan = plan_for(engine, request.steering, plans, at="/steering")
    taken_apart = _sites_taken_apart(engine, request, plan)
    states = _read(engine, prompt, plan, roles, position, taken_apart)
    end = states[HookPoint(engine.info.n_layers - 1)][-1]
    if request.token is None:
        chosen.insert(0, int(engine.unembed(end[None])[0].argmax()))
    if len(set(chosen)) < len(chosen):
        raise SpecError(
            f"the token and the one it is held against are the same, {chosen[0]}: choose another",
            param="/against",
            code="same_token",
        )
    head = linear_head(engine, end, chosen)
    return _result(engine, request, prompt, position, plan, states, head)


def _sites_taken_apart(
    engine: Engine, request: AttributionRequest, plan: SteeringPlan | None
) -> tuple[Site, ...]:
    """The sites whose channels are asked for."""
    asked: list[tuple[Site, str]] = []
    if request.heads:
        asked.append(("head_out", "heads"))
    if request.neurons:
        asked.append(("mlp_act", "neurons"))
    for site, name in asked:
        engine.info.check_point(HookPoint(0, site), param=f"/{name}")
        if site not in engine.capabilities.projections:
            raise Unsupported(
                f"the {engine.capabilities.engine} engine does not give the output projection "
                f"behind {site!r}, which {name!r} needs: leave {name!r} out",
                code="unsupported_inspection",
                param=f"/{name}",
            )
        edited = plan is not None and any(point.site == ADDED[site] for point in plan.points)
        if edited:
            raise Unsupported(
                f"the steering edits {ADDED[site]!r}, which is then no longer what the {name} add: "
                f"leave {name!r} out, or steer at another site",
                code="unsupported_inspection",
                param=f"/{name}",
            )
    return tuple(site for site, _ in asked)


def _read(
    engine: Engine,
    prompt: EncodedPrompt,
    plan: SteeringPlan | None,
    roles: RoleRanges | None,
    position: int,
    taken_apart: tuple[Site, ...],
) -> States:
    """States at `position`, the last row; before it the prompt's other tokens where parts are
    taken apart, since the weight of a norm shows over several."""
    layers = range(engine.info.n_layers)
    sites: tuple[Site, ...] = ("attn_out", "mlp_out", "resid_post", *taken_apart)
    points = [HookPoint(0, "resid_pre")]
    points += [HookPoint(layer, site) for layer in layers for site in sites]
    (captured,) = engine.capture(
        CaptureRequest(
            prompts=[prompt.ids],
            points=tuple(points),
            positions=tuple(range(position + 1)) if taken_apart else (position,),
            plans=[plan],
            roles=[roles or roles_for(plan, prompt)],
        )
    )
    return captured.states


@dataclass(frozen=True)
class _Shares:
    """What the parts of a model give along one direction of its last state.

    `states` hold the token in question in their last rows, `direction` is float64 `[d_model]`.
    """

    engine: Engine
    states: States
    direction: Float[Tensor, " d_model"]

    def of(self, layer: int, site: Site) -> float:
        """What the state at a site gives."""
        state = self.states[HookPoint(layer, site)][-1]
        return float(state.double().cpu() @ self.direction)

    def layer(self, layer: int, heads: ProjectedPart | None) -> LayerShare:
        """What the parts of one block give; `heads` is its attention where that is taken apart."""
        before = self.of(0, "resid_pre") if layer == 0 else self.of(layer - 1, "resid_post")
        attention, mlp = self.of(layer, "attn_out"), self.of(layer, "mlp_out")
        share = LayerShare(
            layer=layer,
            attention=attention,
            mlp=mlp,
            rest=self.of(layer, "resid_post") - before - attention - mlp,
        )
        if heads is None:
            return share
        rows = heads.heads(self.engine, self.engine.info.n_heads or 1) @ self.direction
        return share.model_copy(
            update={"heads": tuple(rows.tolist()), "head_bias": attention - float(rows.sum())}
        )

    def neurons(self, parts: Iterable[ProjectedPart], count: int) -> tuple[NeuronShare, ...]:
        """The `count` neurons that give most, for or against, the greatest first."""
        found: list[NeuronShare] = []
        for part in parts:
            shares = part.along(self.engine, self.direction)
            best = shares.abs().topk(min(count, len(shares))).indices.tolist()
            found += [
                NeuronShare(
                    layer=part.point.layer,
                    neuron=n,
                    activation=float(part.state[n]),
                    share=float(shares[n]),
                )
                for n in best
            ]
        return tuple(sorted(found, key=lambda one: -abs(one.share))[:count])


def _result(
    engine: Engine,
    request: AttributionRequest,
    prompt: EncodedPrompt,
    position: int,
    plan: SteeringPlan | None,
    states: States,
    head: LinearHead,
) -> AttributionResult:
    """The answer, from the states of `_read` and the head of the one or two tokens."""
    signs = torch.tensor([1.0, -1.0]).double()[: len(head.tokens)]
    shares = _Shares(engine, states, signs @ head.directions)
    by_layer: list[ProjectedPart | None] = [None] * engine.info.n_layers
    if request.heads:
        with at_field("/heads"):
            leave_out = "leave 'heads' out"
            by_layer = list(projected_parts(engine, states, "head_out", instead=leave_out))
    layers = tuple(shares.layer(layer, part) for layer, part in enumerate(by_layer))
    neurons = None
    if request.neurons:
        with at_field("/neurons"):
            parts = projected_parts(engine, states, "mlp_act", instead="leave 'neurons' out")
            neurons = shares.neurons(parts, request.neurons)
    logit, constant = float(signs @ head.uncapped), float(signs @ head.constant)
    embedding = shares.of(0, "resid_pre")
    told = constant + embedding + sum(one.attention + one.mlp + one.rest for one in layers)
    texts = token_texts(engine.tokenizer, head.tokens)
    named = [
        AttributedToken(token=text, id=token, logit=own)
        for text, token, own in zip(texts, head.tokens, head.logits.tolist(), strict=True)
    ]
    return AttributionResult(
        model=engine.info.name,
        tokens=prompt.tokens,
        position=position,
        token=named[0],
        against=named[1] if len(named) > 1 else None,
        logit=logit,
        cap=head.cap,
        constant=constant,
        embedding=embedding,
        layers=layers,
        neurons=neurons,
        unexplained=logit - told,
        fingerprint=plan.fingerprint if plan else None,
    )


def _possible(able: Capabilities) -> bool:
    return reads_logits(able) and {"resid_pre", "attn_out", "mlp_out", "resid_post"} <= set(
        able.captures
    )


ATTRIBUTION = Inspection(
    name="attribution",
    summary="What the embedding, each attention, MLP, head and neuron give to a token's logit.",
    request=AttributionRequest,
    result=AttributionResult,
    run=attribution,
    draw=attribution_heat_map,
    possible=_possible,
)

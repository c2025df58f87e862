"""Attention flow: which heads bring what from which tokens, and what a next token owes to it.

After the paper that reads heads' outputs as tokens and draws how they flow (2305.13417). What a
head adds to the stream is a sum over the tokens that it attends to; each term is an edge from that
token's state to the one that it is added to. Edges are weighed by what they give to the logit of
the token that is said there, with the final norm held at its state (as in an attribution): they say
what a head writes, not what would happen without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from steer.artefacts.library import Library
from steer.engines.base import Captured, CaptureRequest, Engine
from steer.errors import TooLarge, Unsupported
from steer.inspection.attribution.head import LinearHead, linear_head
from steer.inspection.attribution.parts import ProjectedPart, projected_parts
from steer.inspection.attribution.result import AttributedToken
from steer.inspection.flow.drawing import flow_picture
from steer.inspection.flow.edges import HeadsAt, OutputProjection
from steer.inspection.flow.nodes import flow_nodes
from steer.inspection.flow.result import (
    FlowEdge,
    FlowResult,
    FollowedToken,
    HeadFlow,
    LayerFlow,
    stream_id,
)
from steer.inspection.method import Inspection, reads_logits
from steer.inspection.next_token import TokenChoice, chosen_token
from steer.inspection.selection import (
    PositionChoice,
    check_size,
    chosen_positions,
    plan_for,
    roles_for,
)
from steer.inspection.weights.scored import highest_tokens
from steer.inspection.weights.vocabulary import Vocabulary
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import EncodedPrompt, PromptInput, encode_prompt, token_texts
from steer.prompts.roles import RoleRanges
from steer.spec import Site, SteeringSpec

MAX_TOKENS = 512
"""The longest prompt: a layer's heads are read with a weight for each pair of tokens."""

MAX_POSITIONS = 64
"""Each needs the model's head at a state of its own."""

_SITES: tuple[Site, ...] = ("attn_out", "mlp_out", "resid_post", "head_out")


class FlowRequest(PromptInput):
    """What flows into `positions`, each followed by the logit of `token` there: an id or a text
    that is one token; without it the token that the model says at that position.

    `edges` are reported of each position, the strongest of all layers and heads, and `top` tokens
    of each node and edge.
    """

    positions: PositionChoice = (-1,)
    token: TokenChoice | None = None
    edges: Annotated[int, Field(strict=True, ge=1, le=512)] = 24
    top: Annotated[int, Field(strict=True, ge=1, le=50)] = 5
    steering: SteeringSpec | None = None


def flow(
    engine: Engine,
    request: FlowRequest,
    *,
    plans: PlanCache | None = None,
    library: Library | None = None,  # noqa: ARG001
    roles: RoleRanges | None = None,
) -> FlowResult:
    """What heads carry from token to token, under `request.steering` where it has one.

    Raises `SteerError` with a pointer into the request, `TooLarge` where the prompt or the answer
    would be too long, `Unsupported` where the model's head is not linear behind its norm, and where
    a head's output has no parts by token.
    """
    FLOW.require(engine)
    prompt = encode_prompt(engine, request)
    positions = chosen_positions(engine, prompt, request.positions)
    _check_sizes(engine, request, prompt, positions)
    token = None if request.token is None else chosen_token(engine, request.token, param="/token")
    plan = plan_for(engine, request.steering, plans, at="/steering")
    _check_plan(plan)
    captured = _read(engine, prompt, plan, roles, max(positions) + 1)
    traced = [_Position.of(engine, captured, position, token) for position in positions]
    for heads in _heads(engine, captured, positions):
        for one, at in zip(traced, heads, strict=True):
            one.see(at, request.edges)
    return _result(engine, request, prompt, plan, captured, traced)


def _check_sizes(
    engine: Engine, request: FlowRequest, prompt: EncodedPrompt, positions: Sequence[int]
) -> None:
    if len(prompt.ids) > MAX_TOKENS:
        raise TooLarge(
            f"a flow has an edge for each pair of tokens, and this prompt has {len(prompt.ids)}: "
            f"read one of at most {MAX_TOKENS}",
            code="answer_too_large",
        )
    advice = "read fewer positions"
    check_size([("positions", len(positions))], advice=advice, limit=MAX_POSITIONS)
    # An edge may bring a node and a head, and each layer has two nodes.
    at_each = 3 * request.edges + 2 * engine.info.n_layers
    parts = [("positions", len(positions)), ("edges and nodes", at_each), ("tokens", request.top)]
    check_size(parts, advice=f"{advice}, or lower 'edges' or 'top'")


def _check_plan(plan: SteeringPlan | None) -> None:
    """Refuses steering after which heads do not add what they made."""
    edited = {point.site for point in plan.points} if plan is not None else set()
    for site in ("head_out", "attn_out"):
        if site in edited:
            raise Unsupported(
                f"the steering edits {site!r}, which is then no longer what the heads make of what "
                "they attend to: steer at another site",
                code="unsupported_inspection",
                param="/steering",
            )


def _read(
    engine: Engine,
    prompt: EncodedPrompt,
    plan: SteeringPlan | None,
    roles: RoleRanges | None,
    seen: int,
) -> Captured:
    """States and attention at the first `seen` tokens of the prompt."""
    layers = range(engine.info.n_layers)
    points = [HookPoint(0, "resid_pre")]
    points += [HookPoint(layer, site) for layer in layers for site in _SITES]
    (captured,) = engine.capture(
        CaptureRequest(
            prompts=[prompt.ids],
            points=tuple(points),
            positions=tuple(range(seen)),
            plans=[plan],
            roles=[roles or roles_for(plan, prompt)],
            attention=tuple(layers),
        )
    )
    return captured


def _heads(
    engine: Engine, captured: Captured, positions: Sequence[int]
) -> Iterator[tuple[HeadsAt, ...]]:
    """The heads at each of `positions`, layer by layer."""
    parts = [
        projected_parts(
            engine,
            {at: rows[: position + 1] for at, rows in captured.states.items()},
            "head_out",
            instead="attribution without 'heads' says what each layer's attention adds as a whole",
        )
        for position in positions
    ]
    for layer, at_each in enumerate(zip(*parts, strict=True)):
        out = OutputProjection.of(engine, layer)

        def heads_at(position: int, part: ProjectedPart) -> HeadsAt:
            attention = captured.attention[part.point.layer]
            return HeadsAt.of(engine, attention, position, part, out)  # noqa: B023 (called at once)

        yield tuple(map(heads_at, positions, at_each))


@dataclass(frozen=True)
class Carried:
    """An edge before it is read as tokens; `written` and `whole`, all that its head adds, are
    float64 `[d_model]`."""

    layer: int
    head: int
    reads: int
    weight: float
    share: float
    head_share: float
    written: Float[Tensor, " d_model"]
    whole: Float[Tensor, " d_model"]


@dataclass
class _Position:
    """What is known of one position: the head at its last state, and, layer by layer, what flows
    into it."""

    position: int
    states: dict[HookPoint, Float[Tensor, " d_model"]]
    head: LinearHead
    layers: list[LayerFlow] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)

    @staticmethod
    def of(engine: Engine, captured: Captured, position: int, token: int | None) -> _Position:
        states = {point: rows[position].double().cpu() for point, rows in captured.states.items()}
        end = states[HookPoint(engine.info.n_layers - 1)]
        said = int(engine.unembed(end.float()[None])[0].argmax()) if token is None else token
        return _Position(position, states, linear_head(engine, end, [said]))

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        return self.head.directions[0]

    def stream(self, layer: int) -> Float[Tensor, " d_model"]:
        """The state after block `layer`; -1 is before block 0."""
        point = HookPoint(0, "resid_pre") if layer < 0 else HookPoint(layer, "resid_post")
        return self.states[point]

    def share(self, state: Float[Tensor, " d_model"]) -> float:
        return float(state @ self.direction)

    def see(self, heads: HeadsAt, most: int) -> None:
        """Takes in the next layer, and keeps the `most` strongest edges of all so far."""
        layer, shares = heads.layer, heads.shares(self.direction)
        best = shares.abs().flatten().topk(min(most, shares.numel())).indices.tolist()
        chosen = [divmod(place, shares.shape[1]) for place in best]
        of, tokens = [head for head, _ in chosen], [token for _, token in chosen]
        written, whole = heads.written(of, tokens), heads.whole(of)
        found = [
            Carried(
                layer=layer,
                head=head,
                reads=token,
                weight=float(heads.weights[head, token]),
                share=float(shares[head, token]),
                head_share=float(shares[head].sum()),
                written=written[n],
                whole=whole[n],
            )
            for n, (head, token) in enumerate(chosen)
        ]
        self.carried = sorted([*self.carried, *found], key=lambda one: -abs(one.share))[:most]
        attention = self.share(self.states[HookPoint(layer, "attn_out")])
        mlp = self.share(self.states[HookPoint(layer, "mlp_out")])
        gained = self.share(self.stream(layer)) - self.share(self.stream(layer - 1))
        self.layers.append(
            LayerFlow(
                layer=layer,
                attention=attention,
                mlp=mlp,
                rest=gained - attention - mlp,
                bias=attention - float(shares.sum()),
                left_out=float(shares.sum()),
            )
        )

    def followed(self, engine: Engine) -> FollowedToken:
        """The logit and how it comes together."""
        kept = dict.fromkeys(range(len(self.layers)), 0.0)
        for one in self.carried:
            kept[one.layer] += one.share
        layers = tuple(
            one.model_copy(update={"left_out": one.left_out - kept[one.layer]})
            for one in self.layers
        )
        (text,) = token_texts(engine.tokenizer, self.head.tokens)
        logit, constant = float(self.head.uncapped[0]), float(self.head.constant[0])
        embedding = self.share(self.stream(-1))
        told = constant + embedding + sum(one.attention + one.mlp + one.rest for one in layers)
        return FollowedToken(
            position=self.position,
            token=AttributedToken(
                token=text, id=self.head.tokens[0], logit=float(self.head.logits[0])
            ),
            logit=logit,
            constant=constant,
            embedding=embedding,
            unexplained=logit - told,
            layers=layers,
        )


def _result(
    engine: Engine,
    request: FlowRequest,
    prompt: EncodedPrompt,
    plan: SteeringPlan | None,
    captured: Captured,
    traced: Sequence[_Position],
) -> FlowResult:
    vocabulary = Vocabulary.of(engine)
    edges: list[FlowEdge] = []
    heads: list[HeadFlow] = []
    for at in traced:
        writes = highest_tokens(vocabulary, [one.written for one in at.carried], request.top)
        edges += [
            FlowEdge(
                source=stream_id(one.layer - 1, one.reads),
                target=stream_id(one.layer, at.position),
                layer=one.layer,
                head=one.head,
                reads=one.reads,
                position=at.position,
                weight=one.weight,
                share=one.share,
                norm=float(one.written.norm()),
                writes=tokens,
            )
            for one, tokens in zip(at.carried, writes, strict=True)
        ]
        of = list({(one.layer, one.head): one for one in at.carried}.values())
        writes = highest_tokens(vocabulary, [one.whole for one in of], request.top)
        heads += [
            HeadFlow(
                layer=one.layer,
                head=one.head,
                position=at.position,
                share=one.head_share,
                writes=tokens,
            )
            for one, tokens in zip(of, writes, strict=True)
        ]
    directions = {at.position: at.direction for at in traced}
    return FlowResult(
        model=engine.info.name,
        tokens=prompt.tokens,
        positions=tuple(at.position for at in traced),
        followed=tuple(at.followed(engine) for at in traced),
        nodes=flow_nodes(engine, vocabulary, captured.states, directions, edges, request.top),
        edges=tuple(edges),
        heads=tuple(heads),
        cap=traced[0].head.cap,
        fingerprint=plan.fingerprint if plan else None,
    )


def _possible(able: Capabilities) -> bool:
    read = {"resid_pre", *_SITES} <= set(able.captures)
    return able.attention and read and "head_out" in able.projections and reads_logits(able)


FLOW = Inspection(
    name="flow",
    summary="What heads carry from token to token, and what the next token owes to it.",
    request=FlowRequest,
    result=FlowResult,
    run=flow,
    draw=flow_picture,
    possible=_possible,
)

"""What makes a request impossible on any engine: found before it is queued, or in what it gave."""

from __future__ import annotations

from math import inf

from steer.engines.base import Captured, CaptureRequest, GenerationRequest, SamplingParams
from steer.errors import EngineError, NotFinite, SpecError, SteerError, Unsupported
from steer.model import Capabilities, HookPoint, ModelInfo, forward_order
from steer.readouts.spec import check_readable
from steer.spec import Site

_PARTS: tuple[tuple[Site, ...], ...] = (
    ("attn_in", "head_out", "attn_out"),
    ("mlp_in", "mlp_act", "mlp_out"),
)
"""The sites of a block that the stream passes by."""

MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MIN_REPETITION, MAX_REPETITION = 0.01, 100.0
"""Far beyond what is of use, and far from what float32 cannot hold."""


def check_request(request: GenerationRequest, model: ModelInfo, max_length: int) -> None:
    """Raises where `request` can never run: `max_length` counts prompt and generated tokens."""
    length = len(request.prompt)
    if length == 0:
        raise SpecError("the prompt is empty: send at least one token", code="empty_prompt")
    if length >= max_length:
        room = f"the context {max_length}"
        if max_length < model.max_length:
            room = f"there is memory for {max_length} here, of a context of {model.max_length}"
        raise SteerError(
            f"the prompt has {length} tokens and {room}: shorten the prompt",
            code="context_length_exceeded",
        )
    unknown = [token for token in request.prompt if not 0 <= token < model.vocab_size]
    if unknown:
        raise SpecError(
            f"the token {unknown[0]} is not in the vocabulary of {model.vocab_size}",
            code="unknown_token",
        )
    check_roles(request)
    check_sampling(request.sampling, model.vocab_size)


def check_roles(request: GenerationRequest) -> None:
    """Raises `SpecError` (`no_messages`) where the plan asks for the messages of a prompt that was
    not given as such."""
    if request.plan is None or not request.plan.reads_roles:
        return
    if request.roles is None:
        raise no_messages(param=request.plan.spec.roles_at)
    if request.roles.length != len(request.prompt):
        raise AssertionError("the roles are those of another prompt")


def no_messages(*, param: str | None = None) -> SpecError:
    """For a spec that names roles, with a prompt that has none."""
    return SpecError(
        "'roles' are those of a chat's messages, and this prompt is a text or token ids: send "
        "messages, or select by 'positions', 'between' or 'after'",
        param=param,
        code="no_messages",
    )


def check_readouts(request: GenerationRequest, capabilities: Capabilities) -> None:
    """Raises `Unsupported` for read-outs that the engine cannot make while it answers."""
    if request.readouts is not None:
        check_readable(request.readouts.fields, capabilities)
    elif request.halt is not None:
        raise EngineError("a request that is halted by what is read of it reads nothing")


def check_projection(point: HookPoint, model: ModelInfo, able: Capabilities) -> None:
    """Raises `Unsupported` (`no_projection`) where the projection behind `point` cannot be asked,
    what `ModelInfo.check_point` raises where there is no such point."""
    model.check_point(point)
    if point.site not in able.projections:
        offered = ", ".join(able.projections) or "no site"
        raise Unsupported(
            f"the {able.engine} engine gives the output projection of {offered}, not of "
            f"{point.site!r}",
            code="no_projection",
        )


def check_carry(source: HookPoint, target: HookPoint, model: ModelInfo, able: Capabilities) -> None:
    """Raises `Unsupported` (`cannot_carry`) where blocks cannot be run by themselves, or what is at
    `target` does not follow from `source` alone; what `ModelInfo.check_point` raises where there is
    no such point."""
    for point in (source, target):
        model.check_point(point)
    if not able.carries:
        raise Unsupported(
            f"the {able.engine} engine does not run a block by itself, from {source} to {target}",
            code="cannot_carry",
        )
    if source.layer != target.layer or forward_order(source) >= forward_order(target):
        raise AssertionError(f"{target} does not follow {source} within a block")
    part = next((one for one in _PARTS if source.site in one), None)
    if part is not None and target.site not in part:
        raise Unsupported(
            f"what is at {target} does not follow from {source} alone, because the stream passes "
            f"by that: start from the stream, or end at one of {', '.join(part)}",
            code="cannot_carry",
        )


def check_attends(request: CaptureRequest, able: Capabilities) -> None:
    """Raises `Unsupported` (`no_attention`) where a capture asks for attention that the engine does
    not tell."""
    if request.attention and not able.attention:
        raise Unsupported(
            f"the {able.engine} engine does not tell what heads attend to: leave 'attention' out",
            code="no_attention",
        )


def check_scores(layer: int, model: ModelInfo, able: Capabilities) -> None:
    """Raises `Unsupported` (`no_attention`) where an engine does not tell what heads attend by,
    what `ModelInfo.check_point` raises where there is no such layer."""
    model.check_point(HookPoint(layer))
    if not able.attention:
        raise Unsupported(
            f"the {able.engine} engine does not tell the queries and keys of heads",
            code="no_attention",
        )


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raises `SteerError` for values that no token can be chosen by."""
    wrong = {
        "max_tokens": params.max_tokens < 1,
        "temperature": not 0 <= params.temperature < inf,
        "top_p": not 0 <= params.top_p <= 1,
        "top_k": params.top_k is not None and params.top_k < 1,
        "min_p": not 0 <= params.min_p <= 1,
        "presence_penalty": not -MAX_PENALTY <= params.presence_penalty <= MAX_PENALTY,
        "frequency_penalty": not -MAX_PENALTY <= params.frequency_penalty <= MAX_PENALTY,
        "repetition_penalty": not MIN_REPETITION <= params.repetition_penalty <= MAX_REPETITION,
        "logit_bias": not all(-MAX_BIAS <= bias <= MAX_BIAS for _, bias in params.logit_bias),
        "min_tokens": not 0 <= params.min_tokens <= params.max_tokens,
        "seed": params.seed is not None and not -(1 << 63) <= params.seed < 1 << 64,
        "logprobs": params.logprobs is not None and not 0 <= params.logprobs <= vocab_size,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise SteerError(
                f"{name} is {getattr(params, name)!r}, which is out of range",
                code="invalid_sampling",
                param=f"/{name}",
            )
    if params.json_schema is not None and (params.min_tokens or params.ignore_eos):
        raise SteerError(
            "min_tokens and ignore_eos contradict a JSON schema, which says where an answer ends: "
            "leave them out",
            code="invalid_sampling",
            param="/ignore_eos" if params.ignore_eos else "/min_tokens",
        )
    named = {
        "logit_bias": [token for token, _ in params.logit_bias],
        "stop_token_ids": sorted(params.stop_token_ids),
    }
    for name, tokens in named.items():
        if unknown := [token for token in tokens if not 0 <= token < vocab_size]:
            raise SpecError(
                f"{name} names the token {unknown[0]}, which is not in the vocabulary of "
                f"{vocab_size}",
                code="unknown_token",
                param=f"/{name}",
            )


def not_finite(what: str, *, steered: bool) -> SteerError:
    """Why there is no answer where `what` of a request holds NaN or infinity: its steering, or, in
    a request without, the model itself."""
    if steered:
        return NotFinite(
            f"with this steering {what} are not finite: use a smaller strength or value, and look "
            "at the states with a small one first"
        )
    return EngineError(
        f"{what} are not finite, without any steering: load the model in a wider dtype",
        code="not_finite",
    )


def check_captured(captured: Captured, *, steered: bool) -> None:
    """Raises what `not_finite` says for states without a finite norm in float32, of which no
    reading makes sense, and for logits that name no likeliest token."""
    for point, rows in captured.states.items():
        if not bool(rows.norm(dim=-1).isfinite().all()):
            raise not_finite(f"the states at {point}", steered=steered)
    logits = captured.logits
    if logits is not None and not bool(logits.amax(-1).isfinite().all()):
        raise not_finite("the model's logits", steered=steered)

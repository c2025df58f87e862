"""The one engine interface: two real adapters (transformers, vLLM) and one fake implement it.

Requests are frozen; everything that changes while a request runs belongs to the engine. The
synchronous methods may be called from any thread and wait for their turn between steps.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from steer.artefacts.lora import Lora
from steer.model import Capabilities, HookPoint, ModelInfo
from steer.prompts.roles import RoleRanges
from steer.spec import RampPoints

if TYPE_CHECKING:
    from steer.plan.plan import SteeringPlan
    from steer.readouts.plan import ReadoutPlan

FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, in vLLM's order: bias, penalties, temperature, then what is cut off.

    A `temperature` of 0 is greedy, among what `logit_bias` and the penalties leave, and so is one
    below 1e-5. `logprobs` is the number of alternatives to report beside the chosen token (0: only
    the chosen one, None: nothing); they are the model's own, before all of this. An answer ends
    with any of the model's own end tokens, unless `ignore_eos` is set, and with any of
    `stop_token_ids`.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    """The least probability that counts, as a share of the greatest."""
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    """Taken from the logit of every token that was generated, once."""
    frequency_penalty: float = 0.0
    """Taken from the logit of every token that was generated, as often as it was."""
    repetition_penalty: float = 1.0
    """Divides (where positive) or multiplies the logits of the tokens in prompt and answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, each with what is added to its logit."""
    min_tokens: int = 0
    """No token that ends the sequence comes before that many others."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence beside the model's own, also where those are ignored."""
    json_schema: str | None = None
    """The schema of the JSON that the answer is, as JSON text."""


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate; `n` choices are n requests."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    plan: SteeringPlan | None = None
    measure: bool = False
    """Measure the relative size of the edits (`"receipt": "full"`)."""
    stop: Callable[[int], bool] | None = None
    """Called with every generated token, in order and once; true ends the request after that token
    with finish `"stop"` and its receipt. Front ends match stop strings here, because closing the
    iterator would lose the receipt."""
    roles: RoleRanges | None = None
    """Whose words the prompt's tokens are; None where it was not given as messages, and then no
    plan may ask."""
    readouts: ReadoutPlan | None = None
    """What is read of its tokens."""
    halt: Callable[[Sequence[TokenReadout]], bool] | None = None
    """Called before each token with what was read since the one before, in order and once; true
    ends the request with that token, finish `"content_filter"` and its receipt. The token is
    reported and is no part of the answer, and `stop` does not hear of it."""
    lora: Lora | None = None
    """What the model's weights gain for this request alone; `complete` takes it, where the
    capabilities say `lora`."""


@dataclass(frozen=True)
class TokenReadout:
    """What was read of one token of a request, which stands at `position`: the numbers of its
    `ReadoutPlan`, in their order. They are those of the pass that the token was fed in, so that the
    last token of an answer has none; `kl` is of the distribution that it was chosen from."""

    position: int
    token: int
    numbers: tuple[float, ...] = ()
    kl: float | None = None


@dataclass(frozen=True)
class PointReceipt:
    """What happened at one hook point: tokens edited, and mean ‖Δx‖/‖x‖ where it was measured."""

    point: HookPoint
    tokens: int
    relative_size: float | None = None


@dataclass(frozen=True)
class GateReceipt:
    """A gate's decisions: how many tokens it let through; and of one that is decided for more than
    one token the `position` of the token that opened it (None: it did not open), and the `value`
    that was read there, of a prompt gate whether it opened or not."""

    name: str
    fired: int
    value: float | None = None
    position: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The JSON form that clients get."""
        return {
            "name": self.name,
            "fired": self.fired,
            "value": self.value,
            "position": self.position,
        }


@dataclass(frozen=True)
class RampReceipt:
    """What a ramp did where a rule acted: its points, the tokens edited under it, and the mean of
    their factors; None where there were none."""

    points: RampPoints
    tokens: int
    mean: float | None = None


@dataclass(frozen=True)
class SpeculationReceipt:
    """Tokens that an engine drafted for a request and computed ahead of its choice, and how many of
    the tokens that were fed in the end had been drafted."""

    drafted: int
    accepted: int


@dataclass(frozen=True)
class Receipt:
    """Proof of what was applied to one request.

    `tokens_steered` counts the fed tokens that at least one intervention selected, `tokens_skipped`
    the fed tokens that none did; their sum is prompt + generated − 1, because the last token is
    never fed back. `tokens_cached` counts the steered ones whose state came from a prefix cache.
    """

    fingerprint: str
    tokens_steered: int
    tokens_skipped: int
    tokens_cached: int = 0
    hook_points: tuple[PointReceipt, ...] = ()
    gates: tuple[GateReceipt, ...] = ()
    strengths: tuple[Mapping[str, Any], ...] = ()
    """The strengths that a calibration or a limit turned into another number; see
    `SteeringPlan.resolved_strengths`."""
    concepts: tuple[Mapping[str, Any], ...] = ()
    """The features that concepts lit, where a spec asks; see `SteeringPlan.explanations`."""
    speculation: SpeculationReceipt | None = None
    """Given by engines that speculate."""
    ramps: tuple[RampReceipt, ...] = ()
    """One for each rule of the plan that has a ramp, in their order."""

    def as_json(self) -> dict[str, Any]:
        """The form of `response.steering`."""
        points: list[dict[str, Any]] = []
        for entry in self.hook_points:
            row: dict[str, Any] = {
                "layer": entry.point.layer,
                "site": entry.point.site,
                "tokens": entry.tokens,
            }
            if entry.relative_size is not None:
                row["relative_size"] = entry.relative_size
            points.append(row)
        answer = {
            "fingerprint": self.fingerprint,
            "tokens_steered": self.tokens_steered,
            "tokens_skipped": self.tokens_skipped,
            "tokens_cached": self.tokens_cached,
            "hook_points": points,
            "gates": [gate.as_dict() for gate in self.gates],
        }
        if self.strengths:
            answer["strengths"] = [dict(entry) for entry in self.strengths]
        if self.concepts:
            answer["concepts"] = [dict(entry) for entry in self.concepts]
        if self.ramps:
            answer["ramps"] = [
                {
                    "points": [list(point) for point in ramp.points],
                    "tokens": ramp.tokens,
                    "mean": ramp.mean,
                }
                for ramp in self.ramps
            ]
        if self.speculation is not None:
            answer["speculation"] = asdict(self.speculation)
        return answer


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability and the best alternatives at its place, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. The last event of a request carries the reason and the receipt.

    An end-of-sequence token is reported as an event whose `finish` is `"stop"`; it is not text.
    Where `GenerationRequest.stop` or `halt` ended the request, that token is reported in the same
    way.
    `readouts` are those of the tokens that were fed since the event before: the first one has the
    prompt's, and each later one the token before its own.
    """

    token: int
    logprob: TokenLogprob | None = None
    finish: FinishReason | None = None
    receipt: Receipt | None = None
    readouts: tuple[TokenReadout, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole generated sequence; `tokens` are without the token that finished it with `"stop"`
    or was withheld with `"content_filter"`."""

    tokens: tuple[int, ...]
    finish: FinishReason
    receipt: Receipt | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    readouts: tuple[TokenReadout, ...] = ()


@dataclass(frozen=True)
class CaptureRequest:
    """Read activations of whole prompts, without generating.

    `positions` are absolute, negative from the prompt's end; None reads every token. `logits`
    asks for the next-token logits at the last position or at every position; `logprobs` for the
    log-probability of every token of the prompt but the first, with that many alternatives. With a
    `tail`, logits are those at the last `tail` positions and log-probabilities those of the last
    `tail` tokens; what comes before is then computed once for prompts that share it, unsteered.
    States are read after the edits of `plan` at the same point, as the model goes on to see them.
    `roles` has one entry for each prompt, as `GenerationRequest.roles`. `attention` asks for what
    the heads of these layers attend to, where the capabilities say `attention`.
    """

    prompts: Sequence[Sequence[int]]
    points: tuple[HookPoint, ...] = ()
    positions: tuple[int, ...] | None = None
    plans: Sequence[SteeringPlan | None] | None = None
    logits: Literal["none", "last", "all"] = "none"
    logprobs: int | None = None
    tail: int | None = None
    roles: Sequence[RoleRanges | None] | None = None
    attention: tuple[int, ...] = ()

    def of(self, numbers: Sequence[int]) -> CaptureRequest:
        """The same, asked of the prompts with these numbers alone."""
        return replace(
            self,
            prompts=[self.prompts[n] for n in numbers],
            plans=None if self.plans is None else [self.plans[n] for n in numbers],
            roles=None if self.roles is None else [self.roles[n] for n in numbers],
        )

    def read_for_logits(self, length: int) -> range:
        """The positions of a prompt of `length` tokens whose logits are needed: for those that are
        asked for, and for log-probabilities also the one before, which predicts the first."""
        if self.logits != "all" and self.logprobs is None:
            return range(length - 1, length) if self.logits == "last" else range(0)
        if self.tail is None:
            return range(length)
        return range(max(length - self.tail - (self.logprobs is not None), 0), length)

    def kept_logits(self, logits: Tensor) -> Tensor | None:
        """Of the logits at `read_for_logits` `[n, vocab]`, those that were asked for."""
        if self.logits == "none":
            return None
        if self.logits == "last":
            return logits[-1:]
        return logits if self.tail is None else logits[-self.tail :]


@dataclass(frozen=True)
class Attention:
    """What the heads of one layer attend to, all float32: `weights` `[heads, positions, tokens]`
    and `values` `[heads, tokens, head_dim]`, those of grouped heads repeated.

    Guarantees: of a head, weights times values are its part of `head_out` before any edit, unless
    the layer does something to it in between, such as a gate.
    """

    weights: Tensor
    values: Tensor


@dataclass(frozen=True)
class QueriesKeys:
    """What the heads of one layer look with and are found by, float32 `[N, heads, head_dim]` each,
    keys of grouped heads repeated. The product of a query and a key of a head is the score that
    weights are made of, the scale included, a soft cap and the distance left out."""

    queries: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Captured:
    """One prompt's activations: float32 `[positions, width]` for each hook point, and float32
    logits `[1, tokens or tail, vocab]`, log-probabilities (one fewer than tokens, or `tail`) and
    `attention` by layer where asked for."""

    states: Mapping[HookPoint, Tensor]
    logits: Tensor | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    attention: Mapping[int, Attention] = field(default_factory=dict)


@dataclass
class EngineStats:
    """Live figures for metrics; counters only ever grow."""

    slots: int = 0
    slots_in_use: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    slot_waits: int = 0
    extra: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Runs requests with their plans, many in one batch.

    Guarantees: a request's tokens do not depend on its neighbours; a plan is applied to exactly
    the tokens its selections name, or the request is refused; one whose numbers stop being finite
    ends with `NotFinite` and alone, and a capture of such states raises it; slots are freed however
    a request ends (finished, cancelled by closing the iterator, failed).
    """

    info: ModelInfo
    capabilities: Capabilities
    tokenizer: Any
    """A Hugging Face tokenizer, or an object with its `encode`, `decode` and chat template."""

    def start(self) -> None:
        """Begin to serve; proves that steering acts and that slot 0 changes nothing."""

    def stop(self) -> None:
        """Finish what runs, then release everything. May be called twice."""

    def admit(self, request: GenerationRequest) -> None:
        """Raises what `generate` would raise at once for this request."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Tokens as they come. Closing the iterator cancels the request."""

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Whole sequences, batched together; in the order of `requests`."""

    def capture(self, request: CaptureRequest) -> list[Captured]:
        """Activations of each prompt, in order, batched internally."""

    def unembed(self, states: Tensor) -> Tensor:
        """What the model makes of states after its last block: `[..., d_model]` residuals to
        float32 logits `[..., vocab]`, normed, projected, scaled and capped as the model's own.

        Raises `Unsupported` (`no_unembedding`) where the capabilities say that it cannot.
        """

    def token_rows(self, tokens: Sequence[int]) -> Tensor:
        """The row of each token in the output matrix less the mean of all rows, with the final
        norm's scale folded in, and without its own mean where that norm takes the mean away:
        float32 `[tokens, d_model]`. Their product with a state after the last block is what the
        norm's divisor, a bias, a scale and a soft cap make the token's logit, less the mean of all
        logits, of.

        Raises `Unsupported` (`no_unembedding`) where they cannot be had.
        """

    def project(self, point: HookPoint, states: Tensor) -> Tensor:
        """What the output projection behind `point`, a `head_out` or `mlp_act`, makes of its input:
        `[..., width]` to float32 `[..., d_model]`, its bias included, without the norm that may
        follow.

        Raises `Unsupported` (`no_projection`) where the capabilities do not say that it can.
        """

    def carry(
        self,
        source: HookPoint,
        target: HookPoint,
        states: Tensor,
        channels: range | None = None,
    ) -> Tensor:
        """What a block makes, at its hook point `target`, of states that stand at its earlier one
        `source`, each the first token of a sequence of its own: `[N, width]` to float32
        `[N, width]`, or `[N, len(channels)]` where only these are asked for. A token that is alone
        attends to itself. Of a `source` within attention or MLP `target` is one within it too.

        Raises `Unsupported` (`cannot_carry`) where the capabilities do not say that it can, and
        where this block does not.
        """

    def queries_and_keys(self, layer: int, states: Tensor) -> QueriesKeys:
        """What the attention of a block is handed of states `[N, d_model]` before the block, each
        the first token of a sequence of its own: so a rotary embedding turns nothing, or all alike.

        Raises `Unsupported` (`no_attention`) where the capabilities do not say `attention`, and
        where this layer does not show it.
        """

    def stats(self) -> EngineStats:
        """Live figures for metrics."""

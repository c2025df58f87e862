"""`"echo": true`: the prompt before its continuation, with the log-probabilities of its tokens.

So evaluation harnesses score texts: they send prompt and continuation as one prompt, with
`"max_tokens": 0` or 1 and `"logprobs": 1`. A steered request's are those of the steered model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anyio import to_thread

from steer.engines.base import CaptureRequest, GenerationRequest, TokenLogprob
from steer.errors import Unsupported
from steer.prompts import answer_text
from steer_server.generation.generation import Generation, Prompt
from steer_server.generation.request_models import CompletionRequest
from steer_server.state import Serving

_TOKENS = 4096
"""Of the prompts that are scored in one piece, between two steps of other requests."""


@dataclass(frozen=True)
class Echo:
    """A prompt's text and, where asked for, its tokens' log-probabilities: none for the first.

    `offset` is where the first token begins, counted from the text: before it where the tokenizer
    put special tokens around what the client sent.
    """

    text: str = ""
    logprobs: tuple[tuple[int, TokenLogprob | None], ...] = ()
    offset: int = 0


class Echoes:
    """The echo of every sequence of a request; an empty one where none was asked for."""

    def __init__(self) -> None:
        self._found: dict[tuple[Prompt, bool], Echo] = {}

    def add(self, request: GenerationRequest, echo: Echo) -> None:
        self._found[_key(request)] = echo

    def of(self, request: GenerationRequest) -> Echo:
        return self._found.get(_key(request), Echo())


def _key(request: GenerationRequest) -> tuple[Prompt, bool]:
    # One HTTP request has one plan, and beside it the unsteered sequences to compare with.
    return request.prompt, request.plan is None


async def echoes(serving: Serving, run: Generation, body: CompletionRequest) -> Echoes:
    """The echoes of the sequences of `run`. Raises what is wrong with scoring them."""
    if not body.echo:
        return Echoes()
    return await to_thread.run_sync(_echoes, serving, run, body)


def _echoes(serving: Serving, run: Generation, body: CompletionRequest) -> Echoes:
    engine = serving.engine
    if body.logprobs is not None and not engine.capabilities.captures:
        raise Unsupported(
            "this engine gives no log-probabilities of prompts: leave 'echo' or 'logprobs' out",
            param="/echo",
            code="unsupported_parameter",
        )
    given = dict(zip(run.prompts, body.prompt, strict=True))
    distinct = {_key(one): one for one in (*run.sequences, *run.default)}
    found = Echoes()
    for group in _groups(list(distinct.values())):
        scores = _scores(serving, group, body.logprobs)
        for request, logprobs in zip(group, scores, strict=True):
            whole = answer_text(engine.tokenizer, request.prompt, special=True)
            sent = given[request.prompt]
            text = sent if isinstance(sent, str) else whole
            before = len(whole) - len(text) if whole.endswith(text) else 0
            found.add(request, Echo(text, logprobs, -before))
    return found


def _scores(
    serving: Serving, group: Sequence[GenerationRequest], count: int | None
) -> list[tuple[tuple[int, TokenLogprob | None], ...]]:
    if count is None:
        return [() for _ in group]
    captured = serving.engine.capture(
        CaptureRequest(
            [one.prompt for one in group], plans=[one.plan for one in group], logprobs=count
        )
    )
    return [
        tuple(zip(one.prompt, (None, *scored.logprobs), strict=True))
        for one, scored in zip(group, captured, strict=True)
    ]


def _groups(requests: Sequence[GenerationRequest]) -> Iterator[list[GenerationRequest]]:
    """`requests` in pieces of at most `_TOKENS` tokens, or one request."""
    group: list[GenerationRequest] = []
    for one in requests:
        if group and sum(len(each.prompt) for each in (*group, one)) > _TOKENS:
            yield group
            group = []
        group.append(one)
    if group:
        yield group

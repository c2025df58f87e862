"""Which tokens of a prompt a `Where` selects, for whoever reads states there.

The same selection that a spec has (`steer.plan.selection`), asked of a sequence that is known
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from steer.engines.base import Engine
from steer.engines.checks import no_messages
from steer.plan.plan import SteeringPlan
from steer.plan.selection import Selection, TokenReader, resolve
from steer.prompts import Prompt, trigger_tokens
from steer.prompts.rendering import rendered_roles
from steer.prompts.roles import RoleRanges
from steer.prompts.vocabulary import vocabulary_of
from steer.spec import Where


def reader_of(engine: Engine) -> TokenReader:
    """How the engine's model reads the texts and roles of a selection."""
    tokenizer = engine.tokenizer
    return TokenReader(
        partial(trigger_tokens, tokenizer),
        partial(vocabulary_of, tokenizer, engine.info.vocab_size),
        engine.capabilities.roles,
        engine.info.vocab_size,
    )


@dataclass(frozen=True)
class TokenChoice:
    """A `Where` made ready to be asked of prompts; it stands at the pointer `at` of a request."""

    where: Where
    selection: Selection
    at: str

    @staticmethod
    def of(engine: Engine, where: Where, *, at: str) -> TokenChoice:
        """Raises `SteerError` with a pointer below `at`, as a spec's `where` does."""
        return TokenChoice(where, resolve(where, reader_of(engine), param=at), at)

    def positions(
        self,
        tokens: Sequence[int],
        roles: Callable[[], RoleRanges | None],
        prompt_length: int | None = None,
    ) -> tuple[int, ...]:
        """The selected positions of `tokens`, of which the first `prompt_length` (None: all) are
        the prompt. `roles` says whose words all of them are, and is asked where that matters.

        Raises `SpecError` (`no_messages`) where it does and the prompt was no chat, `Unsupported`
        (`roles_unsupported`).
        """
        known = None
        if self.selection.reads_roles:
            known = roles()
            if known is None:
                raise no_messages(param=self.at + (self.where.roles_at or ""))
        return self.selection.positions(tokens, prompt_length, known)


def roles_under(
    engine: Engine, plan: SteeringPlan | None, prompt: Prompt | None, *, answer: int = 0
) -> RoleRanges | None:
    """Whose words the tokens of `render`, and an answer of so many tokens behind them, are where
    `plan` asks; None where it does not. `prompt` is None where only its tokens are known.

    Raises `SpecError` (`no_messages`) for a prompt that is no chat, `Unsupported`
    (`roles_unsupported`).
    """
    if plan is None or not plan.reads_roles:
        return None
    found = None if prompt is None else rendered_roles(engine.tokenizer, prompt)
    if found is None:
        raise no_messages(param=plan.spec.roles_at)
    return found.answered(answer)

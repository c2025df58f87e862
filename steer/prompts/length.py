"""How long a text may be, told before all of it is tokenised.

Tokenising takes many times the memory of the text and keeps Python's interpreter, so that megabytes
for a context of a few hundred tokens must not be read to their end to be refused.
"""

from __future__ import annotations

from typing import Any

from steer.errors import SteerError
from steer.prompts.forms import Messages

_CHARACTERS = 8
"""Characters for each token of the context that are tokenised without a look: more than the tokens
of any language have in the mean."""

_GROWTH = 4


def check_text_length(
    tokenizer: Any, asked: str | Messages, max_length: int, *, param: str | None
) -> None:
    """Raises `SteerError` (`context_length_exceeded`) for a text, or a chat, far over `max_length`
    tokens. Of a chat what its turns say is looked at, without what its template adds.

    Longer and longer beginnings are tokenised, until one has more than twice as many tokens. So no
    text is refused that fits, however its tokenizer shortens it (runs of spaces to one token, say),
    and the work has a bound; between one and two times, the tokens themselves are counted later.
    """
    text = asked if isinstance(asked, str) else "\n".join(str(turn["content"]) for turn in asked)
    size = _CHARACTERS * max_length
    while size < len(text):
        tokens = len(tokenizer.encode(text[:size], add_special_tokens=False))
        if tokens > 2 * max_length:
            raise SteerError(
                f"the prompt has {len(text)} characters, and its first {size} alone are {tokens} "
                f"tokens; the model reads at most {max_length}: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        size *= _GROWTH

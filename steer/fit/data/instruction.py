"""An instruction in words, and where it stands in a prompt.

Models differ in where they listen: a small one may pass over its system message and follow what
stands after the question (`steer.fit.make.placing` finds out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from steer.errors import SteerError
from steer.prompts import Marked, Messages, Prompt

Placement: TypeAlias = Literal["system", "after", "before"]
"""In the system message; after what the user says last; before it. A text without a chat has no
system message: there `system` is `before`."""

PLACEMENTS: tuple[Placement, ...] = ("system", "after", "before")


@dataclass(frozen=True)
class Telling:
    """An instruction with its place; called with a prompt, it tells it."""

    text: str
    place: Placement = "system"

    def __call__(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, Marked):
            return replace(prompt, prompt=self._told(prompt.prompt))
        return self._told(prompt)

    def _told(self, prompt: str | Messages) -> str | Messages:
        if isinstance(prompt, str):
            return f"{prompt}\n{self.text}\n" if self.place == "after" else f"{self.text}\n{prompt}"
        messages = [dict(message) for message in prompt]
        if self.place == "system":
            return _with_system(messages, self.text)
        return _with_user(messages, self._joined)

    def _joined(self, content: str) -> str:
        parts = [content, self.text] if self.place == "after" else [self.text, content]
        return "\n\n".join(parts)


def _with_system(messages: list[dict[str, str]], text: str) -> Messages:
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] += f"\n{text}"
        return messages
    return [{"role": "system", "content": text}, *messages]


def _with_user(messages: list[dict[str, str]], change: Callable[[str], str]) -> Messages:
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] = change(message["content"])
            return messages
    raise SteerError(
        "an instruction cannot be put beside what the user says: a prompt has no message of the "
        "role 'user'",
        code="invalid_option",
        param="/prompts",
    )


def instructed(prompt: Prompt, instruction: str) -> Prompt:
    """`prompt` with the instruction in words: in the system message of a chat, before a text."""
    return Telling(instruction)(prompt)

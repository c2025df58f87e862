"""Prompts with an instruction in words."""

from __future__ import annotations

from dataclasses import replace

from steer.prompts import Marked, Messages, Prompt


def instructed(prompt: Prompt, instruction: str) -> Prompt:
    """`prompt` with the instruction in words: in the system message of a chat, before a text."""
    if isinstance(prompt, Marked):
        return replace(prompt, prompt=_instructed(prompt.prompt, instruction))
    return _instructed(prompt, instruction)


def _instructed(prompt: str | Messages, instruction: str) -> str | Messages:
    if isinstance(prompt, str):
        return f"{instruction}\n{prompt}"
    messages = [dict(message) for message in prompt]
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] += f"\n{instruction}"
        return messages
    return [{"role": "system", "content": instruction}, *messages]

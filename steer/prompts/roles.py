"""Whose message each token of a chat stands in.

A chat is written twice, the second time with marks around what each message says: characters that
are in no text. Where taking the marks out again gives the chat to the letter, they say where each
message lies, whatever the template writes around it. Where it does not, because the template looks
into what is said and writes something else, nothing is supposed and the request is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer.errors import SteerError, Unsupported
from steer.prompts.chat import OPEN, THOUGHT_ENDS, ChatForm, read_chat
from steer.prompts.forms import Messages
from steer.prompts.spans import token_spans, tokens_within
from steer.spec import ROLES, Role

_MARKS = range(0xE000, 0xF8FF)
"""Unicode's private characters."""
_AS = {"developer": "system", "function": "tool"}
"""What other roles count as."""
_SAMPLES: dict[Role, list[dict[str, str]]] = {
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is Oslo?"},
    ],
    "user": [{"role": "user", "content": "Where is Oslo?"}],
    "assistant": [
        {"role": "user", "content": "Where is Oslo?"},
        {"role": "assistant", "content": "In Norway."},
        {"role": "user", "content": "And Rome?"},
    ],
    "tool": [
        {"role": "user", "content": "Where is Oslo?"},
        {"role": "assistant", "content": "I look it up."},
        {"role": "tool", "content": "Norway"},
    ],
}


@dataclass(frozen=True)
class RoleRanges:
    """Half-open ranges of positions, each of one message's text, in a prompt of `length` tokens."""

    length: int
    ranges: tuple[tuple[int, int, Role], ...]

    def answered(self, tokens: int) -> RoleRanges:
        """The same with an answer of so many tokens behind it, as one prompt."""
        if tokens == 0:
            return self
        end = self.length + tokens
        return RoleRanges(end, (*self.ranges, (self.length, end, "assistant")))


@dataclass(frozen=True)
class MarkedChat:
    """Messages with marks around what each says; `places` are the numbers of those that say
    something, `roles` whose they are."""

    messages: list[dict[str, Any]]
    roles: tuple[Role, ...]
    marks: tuple[tuple[str, str], ...]

    @staticmethod
    def of(messages: Messages, *, avoiding: str) -> MarkedChat:
        """Marks that do not occur in `avoiding`, around the words of each message: white space at
        its ends, which templates trim, stays outside, and so do thoughts that it begins with.

        Raises `Unsupported` for more messages than there are marks.
        """
        free = (chr(code) for code in _MARKS if chr(code) not in avoiding)
        marked: list[dict[str, Any]] = []
        roles: list[Role] = []
        marks: list[tuple[str, str]] = []
        for turn in messages:
            role = _role(turn["role"])
            parts = _texts(turn.get("content"))
            if role is None or not "".join(parts).strip():
                marked.append(dict(turn))
                continue
            pair = next(free, ""), next(free, "")
            if not all(pair):
                raise _unsupported(f"it has more than {len(marks)} messages")
            marked.append({**turn, "content": _marked(turn["content"], pair)})
            roles.append(role)
            marks.append(pair)
        return MarkedChat(marked, tuple(roles), tuple(marks))

    def spans(self, text: str, marked: str) -> list[tuple[int, int]]:
        """Where in `text`, the chat as it is, each message lies, by the `marked` one.

        Raises `Unsupported` where the two are not alike but for the marks.
        """
        signs = {sign for pair in self.marks for sign in pair}
        places: dict[str, int] = {}
        for place, sign in enumerate(marked):
            if sign in signs:
                if sign in places:
                    raise _unsupported("it writes a message twice")
                places[sign] = place - len(places)
        if "".join(sign for sign in marked if sign not in signs) != text:
            raise _unsupported("it writes other marks around other words")
        if len(places) < len(signs):
            raise _unsupported("it leaves out what a message says")
        return [(places[start], places[end]) for start, end in self.marks]


def role_ranges(
    tokenizer: Any,
    ids: Sequence[int],
    text: str,
    chat: MarkedChat,
    marked: str,
) -> RoleRanges:
    """The messages of a chat whose tokens are `ids` and whose text is `text`; `marked` is that of
    `chat`. A token belongs to a message where it shares characters with what it says.

    Raises `Unsupported` (`roles_unsupported`).
    """
    found = chat.spans(text, marked)
    read, spans = token_spans(tokenizer, ids, text)
    if read != text:
        raise _unsupported("its tokens do not stand for the text that it writes")
    each = []
    for role, span in zip(chat.roles, found, strict=True):
        places = tokens_within(spans, span)
        if places:
            each.append((places[0], places[-1] + 1, role))
    return RoleRanges(len(ids), tuple(each))


def chat_roles(
    tokenizer: Any,
    messages: Messages,
    form: ChatForm = OPEN,
    *,
    ids: Sequence[int] | None = None,
    param: str | None = None,
) -> RoleRanges:
    """Where in the tokens of `messages` each message lies: in `chat_tokens`, or in `ids` where
    these were made of the same text in another way.

    Raises `SteerError` as `chat_tokens` does, and `Unsupported` (`roles_unsupported`).
    """
    read, text = read_chat(tokenizer, messages, form, param=param)
    try:
        chat = MarkedChat.of(messages, avoiding=text + contents(messages))
        _, marked = read_chat(tokenizer, chat.messages, form, param=param)
        return role_ranges(tokenizer, read if ids is None else ids, text, chat, marked)
    except SteerError as error:
        raise error if param is None else error.at(param) from None


def found_roles(tokenizer: Any) -> tuple[Role, ...]:
    """The roles whose messages are found in chats of this tokenizer's template: a short chat of
    each is written and read."""
    return tuple(role for role in ROLES if _is_found(tokenizer, role))


def _is_found(tokenizer: Any, role: Role) -> bool:
    messages = _SAMPLES[role]
    try:
        found = chat_roles(tokenizer, messages)
        ids, _ = read_chat(tokenizer, messages)
    except Exception:  # templates are programs that come with the model
        return False
    wanted = [turn["content"] for turn in messages if turn["role"] == role]
    said = [
        str(tokenizer.decode(list(ids[start:end])))
        for start, end, whose in found.ranges
        if whose == role
    ]
    return len(said) == len(wanted) and all(
        text in told for text, told in zip(wanted, said, strict=True)
    )


def _role(name: str) -> Role | None:
    """The role that a message of this one counts as."""
    counted = _AS.get(name, name)
    return next((role for role in ROLES if role == counted), None)


def contents(messages: Messages) -> str:
    """All that messages say."""
    return "".join(text for turn in messages for text in _texts(turn.get("content")))


def _texts(content: Any) -> list[str]:
    """What a message says, in its parts where it has such."""
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part.get("text"), str)]


def _marked(content: Any, pair: tuple[str, str]) -> Any:
    """`content` with one mark before its first word, and the other behind its last."""
    if isinstance(content, str):
        start, end = _words(content)
        return content[:start] + pair[0] + content[start:end] + pair[1] + content[end:]
    said = [n for n, part in enumerate(content) if _texts([part]) and part["text"].strip()]
    parts = [dict(part) for part in content]
    first, last = parts[said[0]], parts[said[-1]]
    end = _words(last["text"])[1]
    last["text"] = last["text"][:end] + pair[1] + last["text"][end:]
    start = _words(first["text"])[0]
    first["text"] = first["text"][:start] + pair[0] + first["text"][start:]
    return parts


def _words(text: str) -> tuple[int, int]:
    """Where in a text what it says begins and ends: without thoughts, which templates leave out of
    a history, and white space around it."""
    start = _after_thoughts(text)
    start += len(text[start:]) - len(text[start:].lstrip())
    return start, max(len(text.rstrip()), start)


def _after_thoughts(text: str) -> int:
    """How much of a message are thoughts, which templates leave out of a history."""
    return max((text.rfind(mark) + len(mark) for mark in THOUGHT_ENDS if mark in text), default=0)


def _unsupported(why: str) -> Unsupported:
    return Unsupported(
        f"the model's chat template does not show whose words are whose ({why}): select by "
        "'positions', 'between' or 'after' in place of 'roles'",
        code="roles_unsupported",
    )

"""Chats as their model reads them: written by its own template, and tokenised with it.

The template's tokens are taken as they are. Writing the text and reading it again gives the same
with Hugging Face's templates alone: Mistral's own tokenizer, for one, reads no control token in a
text. What a user's message spells is treated as the tokenizer treats it, as vLLM does: Hugging
Face's read `<|im_end|>` in it as the control token, Mistral's as text.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jinja2.defaults
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from steer.errors import SteerError, Unsupported, pointer
from steer.prompts.forms import Messages, Prompt

MAX_REASON = 400
"""Characters of a template's own complaint that are passed on: it may quote the whole chat."""
THOUGHT_ENDS = ("</think>", "[/THINK]", "</thinking>", "</thought>", "</seed:think>")
"""How templates end thoughts; what stands before the last of them is none of the answer."""


@dataclass(frozen=True)
class ChatForm:
    """What follows the messages, and what the template is told beside them.

    `open_answer` adds the opening of an answer. `continue_final` leaves the last message open, for
    the model to go on with; the two exclude each other. `variables` are the template's.
    """

    open_answer: bool = True
    continue_final: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


OPEN = ChatForm()
CLOSED = ChatForm(open_answer=False)
CONTINUED = ChatForm(open_answer=False, continue_final=True)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer knows how its model's chats are written."""
    template = getattr(tokenizer, "chat_template", None)
    if template is not None:
        return not isinstance(template, Mapping) or "default" in template
    try:
        # Tokenizers that write chats in a program of their own have no template to look at.
        return bool(tokenizer.apply_chat_template([{"role": "user", "content": "a"}]))
    except Exception:
        return False


def as_chat(tokenizer: Any, prompt: Prompt, system: str | None = None) -> Prompt:
    """A text as a user's message, where the model has a way to write chats; all else as it is."""
    if not isinstance(prompt, str) or not has_chat_template(tokenizer):
        return prompt
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": prompt}]


def require_chat_template(tokenizer: Any, *, param: str | None = None) -> None:
    """Raises `SteerError` (`no_chat_template`) at `param` where chats cannot be written."""
    if has_chat_template(tokenizer):
        return
    template = getattr(tokenizer, "chat_template", None)
    why = "the model's tokenizer has no chat template"
    if isinstance(template, Mapping):
        why = (
            f"the model's tokenizer has several chat templates ({', '.join(sorted(template))}) "
            "and none of them is its 'default'"
        )
    raise SteerError(f"{why}: give prompts as plain texts", param=param, code="no_chat_template")


def chat_tokens(
    tokenizer: Any, messages: Messages, form: ChatForm = OPEN, *, param: str | None = None
) -> list[int]:
    """The tokens of `messages` in the model's own template.

    Raises `SteerError` at `param`: `no_chat_template`, or `invalid_messages` where the template
    refuses them.
    """
    found = _applied(tokenizer, messages, form, tokenize=True, param=param)
    return list(found["input_ids"] if isinstance(found, Mapping) else found)


def read_chat(
    tokenizer: Any, messages: Messages, form: ChatForm = OPEN, *, param: str | None = None
) -> tuple[list[int], str]:
    """The tokens of `messages`, and the text that they stand for; raises as `chat_tokens` does."""
    ids = chat_tokens(tokenizer, messages, form, param=param)
    if template_source(tokenizer) is None:
        return ids, str(tokenizer.decode(ids, skip_special_tokens=False))
    return ids, str(_applied(tokenizer, messages, form, tokenize=False, param=param))


def answered_form(tokenizer: Any) -> ChatForm:
    """How a chat is written that ends with an answer.

    Its template closes it as it does in a history. A tokenizer with a program of its own, as
    Mistral's, writes histories of questions alone, and leaves the answer open.
    """
    return CLOSED if template_source(tokenizer) is not None else CONTINUED


def template_source(tokenizer: Any) -> str | None:
    """The chat template as text; None where there is none to read."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


def template_variables(tokenizer: Any) -> frozenset[str]:
    """The variables that the chat template reads beside the messages and what always comes with
    them; of a tokenizer without one, the arguments of its own program that are like these."""
    source = template_source(tokenizer)
    if source is not None:
        return _free_names(source) - _GIVEN
    try:
        program = inspect.signature(tokenizer.apply_chat_template)
    except (AttributeError, TypeError, ValueError):
        return frozenset()
    return frozenset(program.parameters) & _ARGUMENTS


def check_variables(tokenizer: Any, variables: Mapping[str, Any], *, param: str) -> None:
    """Raises `Unsupported` for a variable that the template would never look at."""
    known = template_variables(tokenizer)
    for name in variables:
        if name not in known:
            raise Unsupported(
                f"the model's chat template does not read {name!r} (it reads "
                f"{variables_told(known)}), so that it would change nothing: leave it out",
                param=param + pointer(name),
                code="unsupported_parameter",
            )


def variables_told(known: Collection[str]) -> str:
    """The variables that a template reads, as errors name them."""
    return ", ".join(map(repr, sorted(known))) or "no variable at all"


_GIVEN = {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"}.union(
    jinja2.defaults.DEFAULT_NAMESPACE
)
"""What a template is always given, and what Jinja gives it."""
_ARGUMENTS = {"reasoning_effort", "enable_thinking", "documents"}
"""The arguments of a tokenizer's own program that are about the chat, as a template's variables."""


class _GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}`, Hugging Face's mark of what a model has said."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _free_names(source: str) -> frozenset[str]:
    environment = ImmutableSandboxedEnvironment(
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    try:
        tree = environment.parse(source)
    except jinja2.TemplateError:
        return frozenset()
    free = meta.find_undeclared_variables(tree)
    # Jinja counts those among them that the template sets, if only in a branch.
    first: dict[str, str] = {}
    for name in _names(tree):
        first.setdefault(name.name, name.ctx)
    return frozenset(name for name in free if first.get(name, "load") == "load")


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    """All names in the order in which they are met: what is set is read first."""
    if isinstance(node, nodes.Name):
        yield node
    below = list(node.iter_child_nodes())
    for child in reversed(below) if isinstance(node, nodes.Assign | nodes.AssignBlock) else below:
        yield from _names(child)


def _applied(
    tokenizer: Any, messages: Messages, form: ChatForm, *, tokenize: bool, param: str | None
) -> Any:
    require_chat_template(tokenizer, param=param)
    try:
        return tokenizer.apply_chat_template(
            _turns(tokenizer, messages),
            tokenize=tokenize,
            add_generation_prompt=form.open_answer,
            continue_final_message=form.continue_final,
            return_dict=False,
            **form.variables,
        )
    except Exception as error:
        # Templates are programs that come with the model; whatever they raise is about the chat.
        reason = str(error)
        if len(reason) > MAX_REASON:
            reason = reason[:MAX_REASON] + "…"
        raise SteerError(
            f"the model's chat template refuses these messages: {reason}",
            param=param,
            code="invalid_messages",
        ) from error


def _turns(tokenizer: Any, messages: Messages) -> Sequence[Mapping[str, str]]:
    """`messages` in roles that the template knows.

    Most know OpenAI's `developer` only as `system`, and many want one system message, the first;
    vLLM decides and gathers as is done here.
    """
    source = template_source(tokenizer) or ""
    if "'developer'" in source or '"developer"' in source:
        return [dict(turn) for turn in messages]
    if all(turn["role"] != "developer" for turn in messages):
        return [dict(turn) for turn in messages]
    turns = [
        {**turn, "role": "system"} if turn["role"] == "developer" else dict(turn)
        for turn in messages
    ]
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    if len(system) == 1 and turns[0]["role"] == "system":
        return turns
    rest = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(filter(None, system))}, *rest]

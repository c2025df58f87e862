"""From the `where` of a spec to a selection, as the model reads its texts and roles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from steer.errors import SpecError, Unsupported, pointer
from steer.plan.selection.counting import Counted
from steer.plan.selection.tokens import EVERYWHERE, Selection
from steer.plan.texts.automaton import compile_automaton
from steer.plan.texts.condition import RELATIONS, TextCondition, TextRelation
from steer.spec import Mark, Role, Schedule, Where


@dataclass(frozen=True)
class TokenReader:
    """What turns a `Where` into a selection: how the model reads a text (`tokenize`), the bytes
    that each of its tokens stands for (`vocabulary`), the `roles` that are found in its chats, and
    how many tokens it has (`vocab_size`)."""

    tokenize: Callable[[str], list[int]] | None = None
    vocabulary: Callable[[], Sequence[bytes]] | None = None
    roles: Collection[Role] = ()
    vocab_size: int | None = None


NO_READER = TokenReader()


def resolve(where: Where | None, reader: TokenReader = NO_READER, *, param: str = "") -> Selection:
    """`where` as a `Selection`; a token string must be exactly one token of the model.

    Raises `SpecError`, with `unknown_token` for an id that the model has no token for, which would
    never select anything, and `Unsupported` (`roles_unsupported`) for roles that are not found in
    the model's chats; `param` is the pointer of `where`.
    """
    if where is None:
        return EVERYWHERE
    tokens = None
    if where.tokens is not None:
        _check_ids(where.tokens, reader, f"{param}/tokens")
        tokens = frozenset(
            token
            if isinstance(token, int)
            else _single_token(token, reader.tokenize, f"{param}/tokens/{i}")
            for i, token in enumerate(where.tokens)
        )
    if where.roles is not None:
        _check_roles(where.roles, reader.roles, param + "/roles")
    return Selection(
        phases=None if where.phases is None else frozenset(where.phases),
        ranges=where.positions,
        tokens=tokens,
        roles=None if where.roles is None else frozenset(where.roles),
        counted=None if where.every is None else _counted(where.every),
        texts=_texts(where, reader, param),
        excluded=None
        if where.except_ is None
        else resolve(where.except_, reader, param=f"{param}/except"),
    )


def _check_ids(tokens: Sequence[int | str], reader: TokenReader, param: str) -> None:
    for place, token in enumerate(tokens):
        known = isinstance(token, str) or reader.vocab_size is None or token < reader.vocab_size
        if not known:
            raise SpecError(
                f"the token {token} is not in the vocabulary of {reader.vocab_size}: give the id "
                "of one of the model's tokens, or its text",
                param=param + pointer(place),
                code="unknown_token",
            )


def _counted(schedule: Schedule) -> Counted:
    return Counted(1 if schedule.nth is None else schedule.nth, schedule.first)


def _check_roles(asked: Sequence[Role], known: Collection[Role], param: str) -> None:
    for place, role in enumerate(asked):
        if role not in known:
            found = f"it finds {', '.join(sorted(known))}" if known else "it finds none"
            raise Unsupported(
                f"this engine does not find messages of the role {role!r} in the model's chats "
                f"({found}): leave it out, or say the tokens by 'positions', 'between' or 'after'",
                param=param + pointer(place),
                code="roles_unsupported",
            )


def _texts(where: Where, reader: TokenReader, param: str) -> tuple[TextCondition, ...]:
    found = []
    for relation in RELATIONS:
        pairs = _pairs(where, relation)
        if not pairs:
            continue
        if reader.vocabulary is None:
            raise Unsupported(
                f"{relation!r} looks for texts among tokens, which nobody follows here: "
                "send the spec to an engine, or select by 'phases', 'positions' or 'tokens'",
                param=f"{param}/{relation}",
                code="texts_unsupported",
            )
        for place, pair in enumerate(pairs):
            for which, mark in enumerate(pair):
                if isinstance(mark, tuple):
                    at = (place,) if relation in ("after", "before") else (place, which)
                    _check_ids(mark, reader, f"{param}/{relation}" + pointer(*at))
        vocabulary = reader.vocabulary()
        automata = [compile_automaton(*pair, vocabulary) for pair in pairs]
        found.append(TextCondition(relation, tuple(automata)))
    return tuple(found)


def _pairs(where: Where, relation: TextRelation) -> Sequence[tuple[Mark, Mark | None]]:
    """The marks that one field of `where` looks for, each with its closing where it has one."""
    match relation:
        case "after":
            return [(mark, None) for mark in where.after or ()]
        case "before":
            return [(mark, None) for mark in where.before or ()]
        case "between":
            return where.between or ()
        case "outside":
            return where.outside or ()


def _single_token(text: str, tokenize: Callable[[str], list[int]] | None, param: str) -> int:
    if tokenize is None:
        raise SpecError(
            f"the token {text!r} is a string and there is no tokenizer here: give its id",
            param=param,
        )
    ids = tokenize(text)
    if len(ids) != 1:
        raise SpecError(
            f"{text!r} is {len(ids)} tokens ({ids}): a trigger is one token; give one of these "
            "ids, or a string that is a single token (a leading space counts)",
            param=param,
            code="not_one_token",
        )
    return ids[0]

"""What the selections of one request know of its tokens, as far as these have been read.

The state of an automaton before a token follows from the tokens before it alone. States are kept by
position, so that a token may be read again (after a preemption, or in the place of a drafted one
that did not stay) and in pieces of any length: what it is does not change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from steer.errors import EngineError
from steer.plan.texts.automaton import TokenAutomaton
from steer.prompts.roles import RoleRanges
from steer.spec import ROLES, Role

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

_GROWTH = 256


class TokenTrace:
    """Assumes: `read` is shown the tokens of each pass before masks are asked for them.

    Guarantees: the same tokens give the same states, however they come.
    """

    def __init__(
        self,
        automata: Iterable[TokenAutomaton],
        prompt: Sequence[int] | Ints,
        roles: RoleRanges | None = None,
    ) -> None:
        self._automata = tuple(dict.fromkeys(automata))
        self._number = {one: number for number, one in enumerate(self._automata)}
        self._prompt_length = len(prompt)
        self._states = np.zeros((len(self._automata), len(prompt) + 1 + _GROWTH), dtype=np.int16)
        self._roles = None if roles is None else _role_numbers(roles, len(prompt))
        self._known = 0
        self._take(0, np.asarray(prompt, dtype=np.int64))

    def read(self, start: int, tokens: Ints) -> None:
        """The tokens at positions from `start` on, as they are now. Those of the prompt are known
        already. Raises `EngineError` where some before them were never shown."""
        if not self._automata:
            return
        if start > self._known:
            raise EngineError(
                f"the token at position {start} is computed and {self._known} tokens before it "
                "were seen, so that nobody knows which texts stand in between",
                code="steps_missed",
            )
        skipped = max(self._prompt_length - start, 0)
        if skipped < len(tokens):
            self._take(start + skipped, tokens[skipped:])

    def before(self, automaton: TokenAutomaton, positions: Ints) -> Ints:
        """The state before each of the tokens at `positions`."""
        found: Ints = self._states[self._number[automaton], positions].astype(np.int64)
        return found

    def after(self, automaton: TokenAutomaton, positions: Ints) -> Ints:
        """The state after each of the tokens at `positions`."""
        return self.before(automaton, positions + 1)

    def in_roles(self, roles: Collection[Role], positions: Ints) -> Mask:
        """Which of the tokens at `positions` are of a message of one of `roles`; what is generated
        is the assistant's."""
        if self._roles is None:
            raise AssertionError("a request whose messages are not known was let in")
        wanted = np.zeros(len(ROLES) + 1, dtype=bool)
        wanted[[ROLES.index(role) for role in roles]] = True
        generated = positions >= self._prompt_length
        numbers = np.full(len(positions), ROLES.index("assistant"))
        numbers[~generated] = self._roles[positions[~generated]]
        found: Mask = wanted[numbers]
        return found

    def _take(self, start: int, tokens: Ints) -> None:
        end = start + len(tokens)
        if end >= self._states.shape[1]:
            room = np.zeros((len(self._automata), end + _GROWTH), dtype=np.int16)
            self._states = np.concatenate([self._states, room], axis=1)
        for number, automaton in enumerate(self._automata):
            states = self._states[number]
            state = int(states[start])
            for place, token in enumerate(tokens.tolist(), start + 1):
                state = automaton.after(state, token)
                states[place] = state
        self._known = end


def _role_numbers(roles: RoleRanges, prompt_length: int) -> Ints:
    """The number of each prompt token's role; those of no message have one behind all of them."""
    numbers = np.full(prompt_length, len(ROLES), dtype=np.int64)
    for start, end, role in roles.ranges:
        numbers[start:end] = ROLES.index(role)
    return numbers

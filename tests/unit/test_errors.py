"""Errors answer alike everywhere: how they end, and how much of what was sent they say again."""

from __future__ import annotations

import pytest

from steer.errors import (
    LONGEST_MESSAGE,
    LONGEST_PARAM,
    Problem,
    SpecError,
    SteerError,
    UnknownArtefact,
    UnknownModel,
    clipped,
)


def test_what_the_address_names_is_not_found_and_what_a_body_names_is_wrong() -> None:
    assert UnknownArtefact("there is no vector named 'x'").status == 404
    assert UnknownArtefact("…", param="/steering/interventions/0/vector").status == 400
    assert UnknownArtefact("…").at("/lens").status == 400
    # OpenAI's clients know this one.
    assert UnknownModel("…", param="/model").status == 404


@pytest.mark.parametrize("kind", [SteerError, SpecError, UnknownArtefact])
def test_what_was_sent_comes_back_shortened(kind: type[SteerError]) -> None:
    error = kind(f"there is no vector named {'x' * 2_000_000!r}: upload it", param="/" + "y" * 5000)
    for one in (error, error.problems[0], Problem(error.message, "c", error.param)):
        assert len(one.message) == LONGEST_MESSAGE
        assert one.message.startswith("there is no vector named 'xx")
        assert one.message.endswith("xx': upload it"), "what to do is kept"
        assert one.param is not None
        assert len(one.param) == LONGEST_PARAM
    assert str(error) == error.message


def test_what_is_short_stays_as_it_is() -> None:
    assert clipped("a" * LONGEST_MESSAGE) == "a" * LONGEST_MESSAGE
    assert clipped("") == ""
    assert SteerError("short").param is None

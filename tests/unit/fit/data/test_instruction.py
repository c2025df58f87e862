"""Where an instruction stands, in chats and in texts."""

from __future__ import annotations

import pytest

from steer.errors import SteerError
from steer.fit.data.instruction import PLACEMENTS, Placement, Telling
from steer.prompts import Marked

CHAT = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("system", [{"role": "system", "content": "Be brief."}, *CHAT]),
        ("after", [*CHAT[:2], {"role": "user", "content": "How are you?\n\nBe brief."}]),
        ("before", [*CHAT[:2], {"role": "user", "content": "Be brief.\n\nHow are you?"}]),
    ],
)
def test_a_chat_is_told(place: Placement, expected: list[dict[str, str]]) -> None:
    assert Telling("Be brief.", place)(CHAT) == expected
    assert CHAT[2]["content"] == "How are you?"


def test_a_system_message_that_is_there_is_kept() -> None:
    chat = [{"role": "system", "content": "You are a clerk."}, *CHAT]

    told = Telling("Be brief.", "system")(chat)

    assert told[0]["content"] == "You are a clerk.\nBe brief."  # type: ignore[index]
    assert chat[0]["content"] == "You are a clerk."


@pytest.mark.parametrize("place", PLACEMENTS)
def test_a_text_is_told_and_marks_stay(place: Placement) -> None:
    told = Telling("Be brief.", place)(Marked("How are you?", response="Fine."))

    assert isinstance(told, Marked)
    assert told.response == "Fine."
    assert sorted(str(told.prompt).split("\n")) == sorted(
        ["Be brief.", "How are you?", *([""] if place == "after" else [])]
    )


@pytest.mark.parametrize("place", ["after", "before"])
def test_a_chat_without_a_user_cannot_be_told_beside_what_he_says(place: Placement) -> None:
    with pytest.raises(SteerError, match="no message of the role 'user'"):
        Telling("Be brief.", place)([{"role": "assistant", "content": "Hello."}])

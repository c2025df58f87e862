"""Preferences: files, and answers that the model gives itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.engines.base import SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import FileFormatError, SteerError
from steer.fit.data.answering import completed
from steer.fit.data.preferences import Preference, PreferenceSet, read_preferences, sides_needed
from steer.fit.measure.answers import answers_under


def test_a_file_is_what_a_set_from_memory_is(tmp_path: Path) -> None:
    file = tmp_path / "likes.jsonl"
    file.write_text(
        '{"prompt": "a", "chosen": "yes", "rejected": "no"}\n\n{"prompt": [{"role": "user", '
        '"content": "b"}]}\n'
    )
    found = read_preferences(file)
    chat = [{"role": "user", "content": "b"}]
    assert found.items == (Preference("a", "yes", "no"), Preference(chat))
    assert (found.without("chosen"), found.without("rejected")) == (1, 1)
    assert PreferenceSet.of(found.items).sha256 != PreferenceSet.of(found.items[:1]).sha256


@pytest.mark.parametrize(
    "line",
    [
        '{"chosen": "a", "rejected": "b"}',
        '{"prompt": "a", "chosen": ""}',
        '{"prompt": "a", "rejected": 3}',
        '{"prompt": "a", "answer": "b"}',
        '["a"]',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "likes.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(FileFormatError, match="line 2") as caught:
        read_preferences(file)
    assert caught.value.code == "invalid_preferences"


def test_missing_answers_are_the_models_with_and_without_the_instruction(
    lively: TransformersEngine,
) -> None:
    given = PreferenceSet.of([Preference("the red sun", rejected="no"), Preference("a day")])
    done: list[int] = []
    found = completed(lively, given, "Shout!", max_tokens=5, progress=done.append)
    assert sum(done) == 3
    sampling = SamplingParams(max_tokens=5, temperature=0)
    asked = ["Shout!\na day", "a day"]
    [(told, plain)] = answers_under(lively, [asked], [None], sampling=sampling)
    assert found.items[0].rejected == "no"
    assert (found.items[1].chosen, found.items[1].rejected) == (told.text, plain.text)
    # Cut off where the model was stopped: there is no end to learn.
    assert found.items[1].cut == {"chosen", "rejected"}
    assert found.items[0].cut == {"chosen"}
    assert found.sha256 == given.sha256
    after = completed(lively, given, "Shout!", place="after", max_tokens=5)
    [(told_after,)] = answers_under(lively, [["a day\nShout!\n"]], [None], sampling=sampling)
    assert after.items[1].chosen == told_after.text
    only = completed(lively, given, "Shout!", sides=sides_needed("lm"), max_tokens=5)
    assert only.items[1].rejected is None


def test_answers_that_cannot_be_had_are_refused(lively: TransformersEngine) -> None:
    given = PreferenceSet.of([Preference("a", "yes", "no"), Preference("b", "yes")])
    with pytest.raises(SteerError, match="prompt 2 has no 'rejected'") as caught:
        completed(lively, given, None)
    assert (caught.value.code, caught.value.param) == ("no_answers", "/instruction")
    same = PreferenceSet.of([Preference("a", "yes", "yes")])
    with pytest.raises(SteerError) as caught:
        completed(lively, same, None)
    assert caught.value.code == "no_difference"

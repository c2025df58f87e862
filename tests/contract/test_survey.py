"""Every class of transformers that generates text is served exactly, or refused by name; and
docs/models.md says which."""

from __future__ import annotations

import pytest
import transformers
from survey import PAGE, classes, survey

CLASSES = classes()
_TEXT = PAGE.read_text()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        f"transformers {transformers.__version__}" not in _TEXT,
        reason="docs/models.md is of another transformers",
    ),
]


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_what_the_page_says(name: str) -> None:
    assert survey(CLASSES[name]).row in _TEXT.splitlines()


def test_the_page_names_no_other_class() -> None:
    _, _, table = _TEXT.partition("| class |")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(CLASSES)

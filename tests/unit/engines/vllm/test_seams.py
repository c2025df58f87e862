"""What is said of an internal function that is not as it was: one line, with file and name."""

from __future__ import annotations

import json.decoder

import pytest

from steer.engines.vllm.seams import Seam

HERE = "json.decoder"
FILE = "json/decoder.py: "


@pytest.mark.parametrize(
    "seam",
    [
        Seam(HERE, "JSONDecoder"),
        Seam(HERE, "JSONDecoder.raw_decode", ("self", "s", "idx")),
        Seam(HERE, "JSONDecoder.raw_decode", takes=("idx",)),
        Seam(HERE, "JSONDecoder.decode", mentions=("raw_decode",)),
        Seam("steer.engines.vllm.seams", "Seam", fields=("module", "takes")),
    ],
    ids=str,
)
def test_what_is_as_expected_has_not_moved(seam: Seam) -> None:
    assert seam.moved() is None


@pytest.mark.parametrize(
    ("seam", "line"),
    [
        (Seam("json.gone", "x"), "json/gone.py: x is not there (No module named 'json.gone')"),
        (Seam(HERE, "Gone.x"), FILE + "Gone.x is not there (json.decoder has no 'Gone')"),
        (
            Seam(HERE, "JSONDecoder.gone"),
            FILE + "JSONDecoder.gone is not there (JSONDecoder has no 'gone')",
        ),
        (
            Seam(HERE, "JSONDecoder.raw_decode", ("self", "s")),
            FILE + "JSONDecoder.raw_decode takes ('self', 's', 'idx') and not ('self', 's')",
        ),
        (
            Seam(HERE, "JSONDecoder.raw_decode", takes=("idx", "end")),
            FILE + "JSONDecoder.raw_decode takes ('self', 's', 'idx') and not ['end']",
        ),
        (
            Seam(HERE, "JSONDecoder.decode", mentions=("raw_decode", "gone")),
            FILE + "JSONDecoder.decode no longer calls ['gone']",
        ),
        (
            Seam("steer.engines.vllm.seams", "Seam", fields=("module", "gone")),
            "steer/engines/vllm/seams.py: Seam lacks ['gone']",
        ),
    ],
    ids=str,
)
def test_what_has_moved_is_told_in_one_line(seam: Seam, line: str) -> None:
    assert seam.moved() == line


def test_an_inherited_method_is_not_the_classs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An override would act on the class below it alone."""
    below = type("Below", (json.decoder.JSONDecoder,), {})
    monkeypatch.setattr(json.decoder, "Below", below, raising=False)
    moved = Seam(HERE, "Below.decode").moved()
    assert moved is not None
    assert "Below has no 'decode'" in moved

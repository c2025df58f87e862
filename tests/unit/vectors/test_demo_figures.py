"""The demo's pictures: the tokens that a column steers, and drawing given data."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from steer_vectors.demo.recipe.figures.dose import DosePanel, DosePoint, place_name, wilson
from steer_vectors.demo.recipe.figures.figures import Figures, write_figures
from steer_vectors.demo.recipe.figures.where import (
    ANSWER,
    COLUMNS,
    EVERY,
    FIRST,
    WHOLE,
    Trial,
    WhereCell,
    WhereMap,
    intervention,
    tokens_of,
)

from steer.plan.selection import resolve
from steer.spec import Where, parse_spec

PROMPT, TOTAL = 9, 13


def steered(where: Where | None) -> list[int]:
    positions = np.arange(TOTAL)
    return [int(p) for p in np.flatnonzero(resolve(where).mask(positions, PROMPT, positions))]


@pytest.mark.parametrize("back", range(1, 9))
def test_a_position_is_one_token_counted_from_the_prompts_end(back: int) -> None:
    if back > 1:
        assert steered(tokens_of(str(-back), PROMPT)) == [PROMPT - back]
    else:
        assert steered(tokens_of("-1", PROMPT)) == [PROMPT - 1]


def test_the_other_columns_steer_what_they_say() -> None:
    assert steered(tokens_of(WHOLE, PROMPT)) == list(range(PROMPT))
    assert steered(tokens_of(FIRST, PROMPT)) == [PROMPT]
    assert steered(tokens_of(EVERY, PROMPT)) == list(range(PROMPT, TOTAL))
    assert steered(tokens_of(ANSWER, PROMPT)) == list(range(PROMPT - 1, TOTAL))


@pytest.mark.parametrize("column", COLUMNS)
def test_a_trial_becomes_a_spec_with_its_layer_strength_and_tokens(column: str) -> None:
    item = intervention("french", Trial(4, column, 1.25), PROMPT)
    (read,) = parse_spec({"interventions": [item]}).interventions
    assert read.where is not None
    assert steered(read.where) == steered(tokens_of(column, PROMPT))
    assert (item["layers"], item["strength"]) == ([4], 1.25)


def test_a_wilson_interval_has_the_published_ends() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_a_place_is_named_where_it_has_a_name() -> None:
    assert place_name(tokens_of(ANSWER, PROMPT)) == ANSWER
    assert place_name(None) == "every token"
    assert place_name(Where(positions=((2, 3),))) == '{"positions": [[2, 3]]}'


def test_given_data_is_drawn_and_drawn_again_the_same(tmp_path: Path) -> None:
    figures = Figures(dose=(panel(), panel()), where=(where_map(), where_map(), where_map()))
    again = Figures.model_validate_json(figures.model_dump_json())
    first = write_figures(figures, tmp_path / "first")
    second = write_figures(again, tmp_path / "second")
    assert [path.name for path in first] == ["demo-dose-response.png", "demo-where.png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        picture = matplotlib.image.imread(one)
        assert picture.shape[0] > 200
        assert picture.std() > 0.01


def panel() -> DosePanel:
    return DosePanel(
        attribute="french",
        layers=(2,),
        place="last prompt token",
        default=1.0,
        prompts=8,
        points=tuple(
            DosePoint(
                strength=s,
                success=s / 2,
                valid=1 - s / 4,
                success_and_valid=s / 3,
                nats_more_loss=s,
            )
            for s in (0.0, 1.0, 2.0)
        ),
    )


def where_map() -> WhereMap:
    row = [WhereCell(share=n / len(COLUMNS), strength=1.0) for n in range(len(COLUMNS) - 1)]
    cells = (*row, WhereCell(share=None, strength=0.25))
    return WhereMap(
        attribute="french", prompts=8, layers=(0, 1), columns=COLUMNS, cells=(cells, cells)
    )

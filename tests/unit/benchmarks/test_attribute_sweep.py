"""The sweep of attributes: what is asked, and that its cells one by one are the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.inspection.attribute_sweep import Said, Sweep, agreement
from benchmarks.inspection.chat_latency import quantile
from benchmarks.inspection.facts import CAPITAL, SOURCE
from benchmarks.inspection.one_by_one import OneByOne
from steer.cli.local import DEMO_MODEL, running_engine
from steer.engines.transformers.checkpoints.found import find_model
from steer.inspection.patchscopes.method import MAX_CELLS, PatchscopeRequest, patchscope
from steer.prompts import text_tokens


def test_every_cell_is_asked_for_once_and_no_request_is_too_large() -> None:
    sweep = Sweep.of(3, range(50), 1)
    cells = [
        (number, layer, goal)
        for number, body in sweep.bodies()
        for layer in body["layers"]
        for goal in body["target_layers"]
    ]
    assert len(cells) == len(set(cells)) == sweep.cells == 3 * 50 * 50
    for _, body in sweep.bodies():
        PatchscopeRequest.model_validate(body)
        assert len(body["layers"]) * len(body["target_layers"]) <= MAX_CELLS
    with pytest.raises(ValueError, match="subjects"):
        Sweep.of(10_000, range(2), 1)


def test_agreement_is_over_the_cells_that_both_have() -> None:
    mine = {(0, n, 0): Said(n) for n in range(4)}
    theirs = {**mine, (0, 1, 0): Said(9), (1, 0, 0): Said(3)}
    assert agreement(mine, theirs) == 0.75
    with_text = {(0, 0, 0): Said(0, " a ")}
    assert agreement(with_text, {(0, 0, 0): Said(0, "a")}) == 1.0
    with pytest.raises(ValueError, match="both ways"):
        agreement(mine, {})
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]


def test_one_by_one_says_what_the_sweep_says() -> None:
    """At every pair of layers, the last one among them: its state is that before the final norm."""
    torch.set_num_threads(1)
    plain = OneByOne(find_model(DEMO_MODEL).location)
    sweep = Sweep.of(2, range(plain.layers), 1)
    with running_engine(DEMO_MODEL, device=None, dtype=None) as engine:
        # Its tokenizer has no token for the x alone: states are put at the last token instead.
        text = CAPITAL.format("x")
        target = tuple(text_tokens(engine.tokenizer, text))
        for number, body in sweep.bodies():
            asked = PatchscopeRequest.model_validate({**body, "target": {"text": text}})
            found = patchscope(engine, asked)
            source = tuple(text_tokens(engine.tokenizer, SOURCE.format(sweep.subjects[number])))
            for cell in found.cells:
                said = plain.say(source, cell.layer, target, len(target) - 1, cell.target_layer, 1)
                assert said == [cell.top[0].id], cell

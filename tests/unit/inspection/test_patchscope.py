from __future__ import annotations

from typing import Any

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.inspection.patchscopes.method import PatchscopeCell, PatchscopeRequest, patchscope
from steer.inspection.patchscopes.patched_runs import StatePatch, patch_plan
from steer.model import HookPoint
from steer.plan.cache import PlanCache

SOURCE = "the river"
TARGET = "cat -> cat; dog -> dog; ?"


def ids_of(engine: TransformersEngine, text: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer.encode(text))


def run(engine: TransformersEngine, **fields: Any) -> Any:
    body = {"source": {"text": SOURCE}, "target": {"text": TARGET}, "preset": "custom", **fields}
    return patchscope(engine, PatchscopeRequest.model_validate(body))


def chances(cell: Any) -> dict[int, float]:
    return {entry.id: entry.probability for entry in cell.top}


def patched(
    engine: TransformersEngine, ids: tuple[int, ...], layer: int, place: int, state: torch.Tensor
) -> torch.Tensor:
    """The engine's logits at the last position, with one state replaced."""
    cache = PlanCache(MemoryLibrary(), engine.info, engine.capabilities)
    point = HookPoint(layer)
    plan = patch_plan(StatePatch(place, point, point, state), cache, place)
    request = CaptureRequest(prompts=[ids], plans=[plan], logits="last")
    logits = engine.capture(request)[0].logits
    assert logits is not None
    return logits[-1]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 4, -1])
def test_a_state_put_back_where_it_was_changes_nothing(
    engine: TransformersEngine, layer: int, place: int
) -> None:
    ids = ids_of(engine, SOURCE)
    place %= len(ids)
    captured = engine.capture(
        CaptureRequest(prompts=[ids], points=(HookPoint(layer),), positions=(place,), logits="last")
    )[0]
    assert captured.logits is not None
    state = captured.states[HookPoint(layer)][0]
    torch.testing.assert_close(
        patched(engine, ids, layer, place, state), captured.logits[-1], rtol=0, atol=1e-5
    )


def test_a_patch_at_the_last_layer_leaves_only_the_final_norm(subject: Any) -> None:
    engine = subject.engine
    source, target = ids_of(engine, SOURCE), ids_of(engine, TARGET)
    for state in subject.states(source):
        found = patched(engine, target, 2, len(target) - 1, state[3])
        torch.testing.assert_close(found, subject.read(state[3]), rtol=0, atol=1e-5)
        torch.testing.assert_close(found, engine.unembed(state[3]), rtol=0, atol=1e-5)


def test_every_cell_equals_plain_hooks(subject: Any) -> None:
    engine = subject.engine
    source, target = ids_of(engine, SOURCE), ids_of(engine, TARGET)
    states = subject.states(source)
    result = run(
        engine, positions=[2, -1], target_layers="all", max_tokens=5, top=8, expect="token"
    )
    assert len(result.cells) == 2 * 3 * 3
    place = len(target) - 1
    for cell in result.cells:
        state = states[cell.layer][cell.position]
        expected = subject.patched_logits(target, cell.target_layer, place, state)[-1].softmax(-1)
        for token, chance in chances(cell).items():
            assert chance == pytest.approx(float(expected[token]), abs=1e-5)
        assert cell.top[0].id == int(expected.argmax())
        assert cell.expected.id == source[cell.position]
        assert cell.expected.probability == pytest.approx(
            float(expected[cell.expected.id]), abs=1e-5
        )
        assert cell.text == subject.patched_text(target, cell.target_layer, place, state, 5)


def test_cells_and_baseline_differ(engine: TransformersEngine) -> None:
    result = run(engine, positions=[2])
    assert all(chances(cell) != chances(result.baseline) for cell in result.cells)


def test_a_placeholder_before_the_end_is_patched(subject: Any) -> None:
    engine = subject.engine
    result = run(engine, target={"text": "what is x now", "placeholder": "x"}, max_tokens=4)
    target = ids_of(engine, "what is x now")
    assert result.target_position == target.index(ord("x"))
    states = subject.states(ids_of(engine, SOURCE))
    for cell in result.cells:
        state = states[cell.layer][cell.position]
        found = subject.patched_text(target, cell.layer, result.target_position, state, 4)
        assert cell.text == found


def test_a_piece_of_the_target_names_its_last_token(engine: TransformersEngine) -> None:
    target = {"text": "what is this now", "position": "this"}
    result = run(engine, target=target, max_tokens=0, layers=[0])
    assert result.target_position == len(ids_of(engine, "what is this")) - 1


def test_a_sweep_equals_its_cells_one_at_a_time(engine: TransformersEngine) -> None:
    """Ten runs over six slots: batches are cut, answers are not."""
    sweep = run(engine, positions=[1, 2, -1], max_tokens=6)
    assert len(sweep.cells) == 9
    for cell in sweep.cells:
        (alone,) = run(engine, positions=[cell.position], layers=[cell.layer], max_tokens=6).cells
        assert alone.text == cell.text
        assert [entry.id for entry in alone.top] == [entry.id for entry in cell.top]
        for one, other in zip(alone.top, cell.top, strict=True):
            assert one.probability == pytest.approx(other.probability, abs=1e-5)
    assert engine.stats().slots_in_use == 0


def test_next_token_is_what_the_model_says_itself(subject: Any) -> None:
    source = ids_of(subject.engine, SOURCE)
    result = run(subject.engine, positions="all", max_tokens=0, expect="next_token")
    own = subject.logits(source).argmax(-1).tolist()
    assert [cell.expected.id for cell in result.cells] == [t for t in own for _ in range(3)]
    assert all(cell.text is None for cell in result.cells)
    # At the last layer the target run ends in the source's own last state.
    last = [cell for cell in result.cells if cell.layer == 2]
    assert all(cell.hit for cell in last)
    assert result.precision[-1].precision_at_1 == 1.0
    for entry in result.precision:
        hits = [cell.hit for cell in result.cells if cell.layer == entry.layer]
        assert entry.precision_at_1 == pytest.approx(sum(hits) / len(source))
        assert entry.positions == len(source)


def test_the_source_is_read_under_its_steering(engine: TransformersEngine) -> None:
    inline = {"interventions": [{"kind": "add", "vector": "joy", "strength": 3.0}]}
    vector = _vector(engine)
    plans = PlanCache(MemoryLibrary({"joy": vector}), engine.info, engine.capabilities)
    body = {
        "source": {"text": SOURCE, "steering": inline},
        "layers": [0, 1],
        "max_tokens": 0,
    }
    steered = patchscope(engine, PatchscopeRequest.model_validate(body), plans=plans)
    body["source"] = {"text": SOURCE}
    plain = patchscope(engine, PatchscopeRequest.model_validate(body))
    assert steered.fingerprint
    assert plain.fingerprint is None
    assert chances(steered.cells[0]) == chances(plain.cells[0])
    assert chances(steered.cells[1]) != chances(plain.cells[1])
    assert chances(steered.baseline) == chances(plain.baseline)


def _vector(engine: TransformersEngine) -> ControlVector:
    row = torch.randn(engine.info.d_model, generator=torch.Generator().manual_seed(1))
    return ControlVector.of({1: row}, name="joy")


def test_presets_have_their_place(engine: TransformersEngine) -> None:
    source = {"text": SOURCE}
    identity = patchscope(
        engine, PatchscopeRequest.model_validate({"source": source, "max_tokens": 0})
    )
    assert identity.target_position == len(identity.target_tokens) - 1
    assert identity.target_tokens[-1] == "?"
    assert identity.target_layers is None
    assert all(cell.layer == cell.target_layer for cell in identity.cells)
    entity = patchscope(
        engine,
        PatchscopeRequest.model_validate(
            {"source": source, "preset": "attribute", "max_tokens": 0, "layers": [0]}
        ),
    )
    assert entity.target_tokens[entity.target_position] == "x"
    assert isinstance(entity.cells[0], PatchscopeCell)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"positions": [0, 40]}, "/positions/1", "position_out_of_range"),
        ({"positions": ["moon"]}, "/positions/0", "text_not_found"),
        ({"layers": [0, 3]}, "/layers/1", "layer_out_of_range"),
        ({"target_layers": [9]}, "/target_layers/0", "layer_out_of_range"),
        ({"target": {"text": "abc", "position": -9}}, "/target/position", "position_out_of_range"),
        (
            {"target": {"text": "abc", "placeholder": "bc"}},
            "/target/placeholder",
            "not_one_token",
        ),
        (
            {"target": {"text": "abc", "placeholder": "z"}},
            "/target/placeholder",
            "text_not_found",
        ),
        ({"target": {"tokens": [400]}}, "/target/tokens/0", "token_out_of_range"),
        ({"source": {"text": "word " * 60}}, "/source/text", "context_length_exceeded"),
        ({"target": {"text": "word " * 60}}, "/target/text", "context_length_exceeded"),
        ({"target": {"text": "w" * 127}}, "/target", "context_length_exceeded"),
    ],
)
def test_what_cannot_be_read_is_refused(
    engine: TransformersEngine, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        run(engine, **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_sweep_has_a_limit(engine: TransformersEngine) -> None:
    with pytest.raises(SteerError, match="choose fewer") as caught:
        run(
            engine,
            source={"text": "w" * 120},
            positions="all",
            target_layers="all",
        )
    assert caught.value.code == "answer_too_large"


def test_a_shuffled_state_is_another_tokens_of_the_same_length(subject: Any) -> None:
    engine = subject.engine
    source, target = ids_of(engine, SOURCE), ids_of(engine, TARGET)
    states, place = subject.states(source), len(target) - 1
    result = run(engine, positions=[2, -1], max_tokens=3, expect="token", top=8)
    others = {cell.position: cell.shuffled.position for cell in result.cells}
    assert set(others) == {2, len(source) - 1}
    for cell in result.cells:
        one, other = others[cell.position], cell.position
        assert one not in (0, other)
        own, moved = states[cell.layer][other], states[cell.layer][one]
        moved = moved * (own.norm() / moved.norm())
        logits = subject.patched_logits(target, cell.layer, place, moved)[-1]
        assert cell.shuffled.top[0].id == int(logits.argmax())
        # What the cell was to say is what counts, not what the other token is.
        assert cell.shuffled.expected.id == source[cell.position]
        chance = float(logits.softmax(-1)[source[cell.position]])
        assert cell.shuffled.expected.probability == pytest.approx(chance, abs=1e-5)
        assert cell.shuffled.text == subject.patched_text(target, cell.layer, place, moved, 3)


def test_the_text_takes_the_place_of_the_state(subject: Any) -> None:
    """Of the token too: the target prompt reads what the source read, and no state."""
    engine = subject.engine
    target = {"text": "what is x now", "placeholder": "x"}
    result = run(engine, target=target, positions=[2, -1], max_tokens=2, expect="next_token")
    assert [one.position for one in result.text_only] == [2, len(SOURCE)]
    for one in result.text_only:
        # A token for each letter, after the one for the beginning.
        logits = subject.logits(ids_of(engine, f"what is {SOURCE[: one.position]} now"))[-1]
        assert one.top[0].id == int(logits.argmax())
        assert one.hit == (one.top[0].id == one.expected.id)
        assert one.text is not None


def test_a_text_that_leaves_no_room_is_read_from_its_end(subject: Any) -> None:
    engine = subject.engine
    source = "a long way " * 10
    (one,) = run(engine, source={"text": source}, layers=[0], max_tokens=4).text_only
    room = engine.info.max_length - len(TARGET) - 4
    logits = subject.logits(ids_of(engine, TARGET[:-1] + source[-room:]))[-1]
    assert one.top[0].id == int(logits.argmax())


def test_precision_stands_beside_that_of_the_controls(engine: TransformersEngine) -> None:
    result = run(engine, positions="all", max_tokens=0, expect="next_token")
    for entry in result.precision:
        cells = [cell for cell in result.cells if cell.layer == entry.layer]
        shares = {
            "none": [result.baseline.top[0].id == cell.expected.id for cell in cells],
            "text": [one.hit for one in result.text_only],
            "shuffled": [cell.shuffled.hit for cell in cells],
        }
        found = {name: sum(hits) / len(cells) for name, hits in shares.items()}
        assert entry.controls == pytest.approx(found)


def test_controls_may_be_left_out(engine: TransformersEngine) -> None:
    bare = run(engine, positions=[2], controls=[], max_tokens=0, expect="token")
    assert bare.text_only == ()
    assert all(cell.shuffled is None for cell in bare.cells)
    assert set(bare.precision[0].controls) == {"none"}
    whole = run(engine, positions=[2], max_tokens=0, expect="token")
    for one, other in zip(bare.cells, whole.cells, strict=True):
        assert one.top[0].id == other.top[0].id
        assert chances(one) == pytest.approx(chances(other), abs=1e-5)


def test_a_single_token_has_no_other_state(engine: TransformersEngine) -> None:
    result = run(engine, source={"tokens": [ord("x")]}, max_tokens=0)
    assert all(cell.shuffled is None for cell in result.cells)
    assert len(result.text_only) == 1


def test_what_runs_share_is_computed_once(engine: TransformersEngine) -> None:
    """Prompts that begin alike, unsteered there, go through the model as one up to that place."""
    ids = ids_of(engine, TARGET)
    cache = PlanCache(MemoryLibrary(), engine.info, engine.capabilities)
    point = HookPoint(1)
    generator = torch.Generator().manual_seed(0)
    plans = []
    for place in (len(ids) - 1, len(ids) - 3, len(ids) - 1):
        state = torch.randn(engine.info.d_model, generator=generator)
        plans.append(patch_plan(StatePatch(place, point, point, state), cache, place))
    prompts = [ids, ids, (*ids[:-2], ord("a"), ids[-1])]
    fed: list[int] = []
    handle = engine._hooked.model.register_forward_pre_hook(
        lambda _m, _a, inputs: fed.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    try:
        together = engine.capture(CaptureRequest(prompts, plans=plans, logits="last"))
    finally:
        handle.remove()
    assert fed == [len(ids) - 3, 3 * 3]
    for prompt, plan, one in zip(prompts, plans, together, strict=True):
        (alone,) = engine.capture(CaptureRequest([prompt], plans=[plan], logits="last"))
        torch.testing.assert_close(one.logits, alone.logits, rtol=0, atol=1e-5)

"""The logit lens through a tuned lens, against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer.artefacts.lens import Lens
from steer.artefacts.library import MemoryLibrary
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.inspection import lens_heat_map
from steer.inspection.logit_lens import LogitLensRequest, logit_lens

TEXT = "the river runs"
LAYERS, WIDTH = 3, 32


def random_lens(seed: int = 1, layers: int = LAYERS, width: int = WIDTH) -> Lens:
    generator = torch.Generator().manual_seed(seed)
    return Lens.of(
        {
            layer: (
                0.1 * torch.randn(width, width, generator=generator),
                torch.randn(width, generator=generator),
            )
            for layer in range(layers)
        },
        name="tuned",
    )


def read(engine: TransformersEngine, held: Lens | None = None, **fields: Any) -> Any:
    library = MemoryLibrary(lenses={} if held is None else {"tuned": held})
    given = {"text": TEXT, **({} if held is None else {"lens": "tuned"}), **fields}
    return logit_lens(engine, LogitLensRequest.model_validate(given), library=library)


def test_every_layer_equals_the_formula(subject: Any) -> None:
    engine, lens = subject.engine, random_lens()
    ids = tuple(engine.tokenizer.encode(TEXT))
    result = read(engine, lens, top=20)
    assert result.lens == f"tuned@{lens.sha256[:12]}"
    states = subject.states(ids)
    for layer in range(LAYERS - 1):
        # A block's output is the next one's input, so the next one's translator reads it.
        weight, bias = (part.double() for part in lens.translators[layer + 1])
        x = states[layer].double()
        translated = x + x @ weight.T + bias
        expected = subject.read(translated.float()).double().softmax(-1)
        for cell in result.row(layer):
            own = expected[cell.position]
            assert cell.entropy == pytest.approx(float(-(own * own.log()).sum()), abs=1e-4)
            for entry in cell.top:
                assert entry.probability == pytest.approx(float(own[entry.id]), abs=1e-5)


def test_the_last_layer_stays_exactly_the_models_own(engine: TransformersEngine) -> None:
    assert read(engine, random_lens(), top=9).row(2) == read(engine, top=9).row(2)
    assert read(engine, random_lens(), top=9).row(1) != read(engine, top=9).row(1)


def test_a_lens_of_zeros_changes_nothing(engine: TransformersEngine) -> None:
    zeros = {n: (torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH)) for n in range(LAYERS)}
    assert read(engine, Lens.of(zeros, name="tuned")).cells == read(engine).cells


def test_a_blocks_input_is_the_output_of_the_one_before(engine: TransformersEngine) -> None:
    lens = random_lens()
    after = read(engine, lens, layers=[0, 1])
    before = read(engine, lens, layers=[1, 2], site="resid_pre")
    for one, other in zip(after.cells, before.cells, strict=True):
        assert [entry.id for entry in one.top] == [entry.id for entry in other.top]
        assert one.entropy == pytest.approx(other.entropy, abs=1e-5)


def test_half_precision_translators_are_computed_in_float32() -> None:
    whole = random_lens()
    half = Lens.of({n: (w.half(), b.half()) for n, (w, b) in whole.translators.items()})
    states = torch.randn(5, WIDTH)
    found = half.translated(states, 0, "resid_pre")
    weight, bias = (part.double() for part in half.translators[0])
    expected = states.double() + states.double() @ weight.T + bias
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_heat_map_names_the_lens(engine: TransformersEngine) -> None:
    assert "tuned@" in lens_heat_map(read(engine, random_lens())).title


@pytest.mark.parametrize(
    ("lens", "fields", "code", "param"),
    [
        (random_lens(width=16), {}, "incompatible_artefact", "/lens"),
        (random_lens(layers=4), {}, "incompatible_artefact", "/lens"),
        (random_lens(), {"lens": "other"}, "unknown_lens", "/lens"),
        (random_lens(), {"site": "resid_mid"}, "unsupported_site", "/site"),
    ],
)
def test_what_cannot_be_read_through_it(
    engine: TransformersEngine, lens: Lens, fields: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(SteerError) as raised:
        read(engine, lens, **fields)
    assert (raised.value.code, raised.value.param) == (code, param)


def test_without_a_registry(engine: TransformersEngine) -> None:
    request = LogitLensRequest.model_validate({"text": TEXT, "lens": "tuned"})
    with pytest.raises(SteerError) as raised:
        logit_lens(engine, request)
    assert raised.value.code == "unknown_lens"


def jacobian_lens(
    seed: int = 3, blocks: tuple[int, ...] = (1, 2), depth: int | None = None
) -> Lens:
    generator = torch.Generator().manual_seed(seed)
    return Lens.of_jacobians(
        {n: torch.randn(WIDTH, WIDTH, generator=generator) for n in blocks},
        depth=depth,
        name="tuned",
    )


def test_a_jacobian_lens_reads_norm_and_head_of_j_times_h(subject: Any) -> None:
    engine, lens = subject.engine, jacobian_lens()
    ids = tuple(engine.tokenizer.encode(TEXT))
    result = read(engine, lens, top=20)
    assert (result.lens_method, result.layers) == ("jacobian", (0, 1, 2))
    states = subject.states(ids)
    for layer in range(LAYERS - 1):
        moved = states[layer].double() @ lens.translators[layer + 1].weight.double().T
        expected = subject.read(moved.float()).double().softmax(-1)
        for cell in result.row(layer):
            for entry in cell.top:
                own = float(expected[cell.position][entry.id])
                assert entry.probability == pytest.approx(own, abs=1e-5)
    assert result.row(2) == read(engine, top=20).row(2)
    assert lens_heat_map(result).title.startswith("Jacobian lens tuned@")


def test_all_layers_are_those_that_a_jacobian_lens_has(engine: TransformersEngine) -> None:
    assert read(engine, jacobian_lens(blocks=(2,))).layers == (1, 2)
    assert read(engine, jacobian_lens(), site="resid_pre").layers == (1, 2)
    with pytest.raises(SteerError) as raised:
        read(engine, jacobian_lens(blocks=(2,)), layers=[0, 2])
    assert (raised.value.code, raised.value.param) == ("layer_not_in_lens", "/layers")


def test_a_lens_of_one_layer_reads_that_one_and_the_last(engine: TransformersEngine) -> None:
    lens = jacobian_lens(blocks=(1,), depth=LAYERS)
    assert read(engine, lens).layers == (0, 2)
    assert read(engine, lens).row(2) == read(engine).row(2)
    with pytest.raises(SteerError, match=r"the layers \[0\], and of the last, 2") as raised:
        read(engine, lens, layers=[1])
    assert (raised.value.code, raised.value.param) == ("layer_not_in_lens", "/layers")

"""The model's names and shape, and the one way in which layers are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import SteerError
from steer.model import MAX_LAYERS, Capabilities, ModelInfo, parse_layer_choice, parse_layers
from steer.spec import STRENGTH_UNITS, Add, parse_spec

INFO = ModelInfo("/models/Qwen3-8B", "Qwen3ForCausalLM", 4, 16, 100, 64)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("3", (3,)),
        ("1,3", (1, 3)),
        ("3,1", (1, 3)),
        ("2-5", (2, 3, 4, 5)),
        ("4-4", (4,)),
        ("0,4-6", (0, 4, 5, 6)),
        (" 1, 3 ", (1, 3)),
        (f"0-{MAX_LAYERS - 1}", tuple(range(MAX_LAYERS))),
    ],
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers
    assert parse_layer_choice(text) == layers


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("x", "invalid_option", "2-5"),
        ("", "invalid_option", "2-5"),
        (",", "invalid_option", "2-5"),
        ("1,", "invalid_option", "2-5"),
        ("-1", "invalid_option", "2-5"),
        ("1-", "invalid_option", "2-5"),
        ("1-2-3", "invalid_option", "2-5"),
        ("1.5", "invalid_option", "2-5"),
        ("+1", "invalid_option", "2-5"),
        ("1_0", "invalid_option", "2-5"),
        ("²", "invalid_option", "2-5"),
        ("١", "invalid_option", "2-5"),  # a digit elsewhere
        ("3-1", "invalid_option", "1-3"),
        ("2,5-3", "invalid_option", "3-5"),
        ("1,1", "invalid_option", "layer 1 twice"),
        ("0-3,2-5", "invalid_option", "layer 2 twice"),
        ("1024", "layer_out_of_range", "layer 1024 "),
        ("0-999999999999", "layer_out_of_range", "layer 999999999999 "),
        ("9" * 5000, "layer_out_of_range", "layer 99"),
        ("0-1023," * 5000 + "0", "invalid_option", "layer 0 twice"),
    ],
)
def test_what_is_no_list_of_layers_is_refused(text: str, code: str, says: str) -> None:
    with pytest.raises(SteerError) as raised:
        parse_layers(text)
    error = raised.value
    assert (error.code, error.param) == (code, "/layers")
    assert says in error.message
    assert error.status == 400
    assert len(error.message) < 200


def test_all_is_a_choice_of_layers_and_no_list() -> None:
    assert parse_layer_choice(" all ") == "all"
    with pytest.raises(SteerError, match="write 3"):
        parse_layers("all")


@given(st.text(alphabet="0123456789-, x", max_size=12))
def test_layers_are_read_or_refused(text: str) -> None:
    try:
        layers = parse_layers(text)
    except SteerError:
        return
    assert layers == tuple(sorted(set(layers)))
    assert 0 <= layers[0] <= layers[-1] < MAX_LAYERS


def test_a_served_model_is_known_by_both_names() -> None:
    served = INFO.served_as("prod")
    assert (served.name, served.own_name) == ("prod", "Qwen3-8B")
    for name in ("prod", "Qwen3-8B", "Qwen/Qwen3-8B", "/elsewhere/Qwen3-8B/"):
        assert served.is_called(name), name
    for name in ("Qwen3", "prod2", "Qwen3-8B/other", ""):
        assert not served.is_called(name), name
    again = served.served_as("canary")
    assert (again.name, again.own_name) == ("canary", "Qwen3-8B")
    assert INFO.served_as(INFO.name) == INFO
    assert INFO.own_name == "Qwen3-8B"


def test_every_way_to_state_a_strength_is_announced() -> None:
    assert STRENGTH_UNITS == ("multiple", "norm", "kl", "effect", "auto")
    assert Capabilities("any", (), ()).strength_units == STRENGTH_UNITS
    for unit in STRENGTH_UNITS:
        value = {"multiple": 0.5, "auto": "auto"}.get(unit, {unit: 0.5})
        item = {"kind": "add", "vector": "v", "strength": value}
        (parsed,) = parse_spec({"interventions": [item]}).interventions
        assert isinstance(parsed, Add)
    with pytest.raises(SteerError, match="norm, kl, effect"):
        parse_spec({"interventions": [{"kind": "add", "vector": "v", "strength": {"volume": 1}}]})
